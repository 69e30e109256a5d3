"""What happens to a batch of images before the network sees it: normalisation and augmentation."""

import torch
from torch import Tensor

from core.functional import model, prng
from core.spec import Spec

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of the training images, a channel, in 0..1


def normalise(images: Tensor) -> Tensor:
    """uint8 [batch, 3072] or [batch, 3, 32, 32] to float32 of that shape, zero mean and unit variance a channel over
    the training images."""
    # Built from scalars in the graph, so that no constant has to be kept on the device.
    channel = torch.arange(3, device=images.device)[:, None, None]
    if images.ndim == 2:
        channel = torch.arange(3072, device=images.device) // 1024
    scale = torch.full(channel.shape, 1 / (255 * STD[2]), device=images.device)
    shift = torch.full(channel.shape, -MEAN[2] / STD[2], device=images.device)
    for c in (0, 1):
        scale = torch.where(channel == c, 1 / (255 * STD[c]), scale)
        shift = torch.where(channel == c, -MEAN[c] / STD[c], shift)
    return torch.addcmul(shift, images.float(), scale)


def mirror(images: Tensor) -> Tensor:
    """Mirror images, left for right, of [batch, 3072]."""
    return images.view(-1, 96, 32).flip(2).view(-1, 3072)


def whiten(x: Tensor, whitening: dict[str, Tensor], precision: str) -> Tensor:
    """The components [batch, k] of normalised images [batch, 3072] that a projection keeps.

    Args:
        whitening: `weight` [k, 3072], which may be in the precision of the product already, and `bias` float32 [k].
    """
    product = model.matmul(whitening["weight"], model.operand(x, precision).t(), precision)
    return (product + whitening["bias"][:, None]).t()


def augment(images: Tensor, spec: Spec, hyper: dict[str, Tensor], step: Tensor) -> Tensor:
    """Images as the network sees them in training: normalised, and augmented as the spec says.

    `augment`: "flip" mirrors each image with probability 1/2; "flip+shift" also moves it by up to `shift` pixels
    vertically and horizontally. What moves in is `shift_fill`: zeros, or the image reflected as by numpy.pad.

    Args:
        images: uint8 [batch, 3072].
        spec: resolved; of the keys that reach the step as tensors it only says which are on.
        hyper: its `seed`, with `step` and the place in the batch, decides what is drawn.

    Returns:
        float32 [batch, 3072].
    """
    if spec["augment"] == "none":
        return normalise(images)
    batch, moves, limit = len(images), spec["augment"] == "flip+shift", spec["shift"]
    draws = prng.bits(hyper["seed"], prng.AUGMENT, step, (3 if moves else 1) * batch).view(-1, batch)
    keep = draws[0] < 0  # the others are mirrored
    # Rows as words of eight pixels: a gather of pixels by computed indices would be one scalar load for each pixel.
    words = images.view(torch.int64).view(batch, 96, 4)
    mirrored, first = _mirror(words), keep[:, None, None]
    words, mirrored = torch.where(first, words, mirrored), torch.where(first, mirrored, words)
    if not moves:
        return normalise(words.view(torch.uint8).view(batch, 3072))
    down, right = (((draws[1:] >> 16) + 32768) * (2 * limit + 1) >> 16) - limit  # pixels, [batch]
    return _move(words, mirrored, down, torch.where(keep, right, -right), spec["shift_fill"] == "reflect")


def _mirror(words: Tensor) -> Tensor:
    """Rows of 32 pixels, int64 [..., 4] with eight pixels in each word, the other way around."""
    words = words.flip(-1)
    for bits, mask in ((8, 0x00FF00FF00FF00FF), (16, 0x0000FFFF0000FFFF), (32, 0x00000000FFFFFFFF)):
        words = ((words >> bits) & mask) | ((words & mask) << bits)
    return words


def _move(words: Tensor, mirrored: Tensor, down: Tensor, right: Tensor, reflect: bool) -> Tensor:
    """Normalised images, float32 [batch, 3072], each read from `down` pixels further down and `right` further right.

    Args:
        words: the images, int64 [batch, 96, 4]: in each row four words of eight pixels.
        mirrored: the same with each row mirrored.
        down, right: int32 [batch], from -8 to 8.
    """
    batch, place = len(words), torch.arange(32, device=words.device)
    rows, columns = place + down[:, None], place + right[:, None]  # [batch, 32]
    left_edge = right_edge = torch.zeros_like(words[..., :1])
    if reflect:  # eight pixels from the second one on, mirrored, and eight up to the last but one
        left_edge = ((mirrored[..., 2:3] >> 56) & 0xFF) | (mirrored[..., 3:] << 8)
        right_edge = ((mirrored[..., :1] >> 8) & (2**56 - 1)) | (mirrored[..., 1:2] << 56)
    pixels = torch.cat([left_edge, words, right_edge], 2).view(torch.uint8).view(-1)  # 48 a row
    source = (31 - (31 - rows.abs()).abs()) if reflect else rows.clamp(0, 31)
    planes = torch.arange(3 * batch, device=words.device).view(batch, 3, 1)
    starts = (planes * 32 + source[:, None]) * 48 + 8 + right[:, None, None]
    # All runs of 32 pixels as a view, so that a row is one contiguous load from any pixel.
    x = normalise(pixels.unfold(0, 32, 1).index_select(0, starts.view(-1)).view(batch, 3, 32, 32))
    if not reflect:  # numbers, since masks of bool are slow in compiled loops
        outside = [(t != t.clamp(0, 31)).float() for t in (rows, columns)]
        x = torch.where(outside[0][:, None, :, None] + outside[1][:, None, None, :] > 0, 0.0, x)
    return x.reshape(batch, 3072)
