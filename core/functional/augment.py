"""Normalisation and augmentation of a batch of images."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from core.functional import model, prng
from core.spec import CIFAR10, DataInfo, Spec, SpecError

# Test-time augmentation: the largest move of an image, in pixels, and whether mirror images are evaluated too.
TTA = {"none": (0, False), "flip": (0, True), "shifts": (1, True)}


def normalise(images: Tensor, info: DataInfo = CIFAR10) -> Tensor:
    """uint8 [batch, inputs] or [batch, *shape] to float32 of the same shape. Over the training images each channel has
    mean 0 and variance 1."""
    channels, height, width = info.shape
    channel = torch.arange(channels, device=images.device)[:, None, None]
    if images.ndim == 2:
        channel = torch.arange(info.inputs, device=images.device) // (height * width)
    scale, offset = _scale_and_offset(channel, info)
    return torch.addcmul(offset, images.float(), scale)


def _scale_and_offset(channel: Tensor, info: DataInfo) -> tuple[Tensor, Tensor]:
    # Built from scalars in the graph, so the step needs no constant tensor on the device.
    mean, std = info.mean, info.std
    scale = torch.full(channel.shape, 1 / (255 * std[-1]), device=channel.device)
    offset = torch.full(channel.shape, -mean[-1] / std[-1], device=channel.device)
    for c in range(len(mean) - 1):
        scale = torch.where(channel == c, 1 / (255 * std[c]), scale)
        offset = torch.where(channel == c, -mean[c] / std[c], offset)
    return scale, offset


def mirror(images: Tensor, info: DataInfo = CIFAR10) -> Tensor:
    """Images [batch, inputs] with left and right exchanged."""
    return images.view(-1, info.inputs // info.shape[2], info.shape[2]).flip(2).view(-1, info.inputs)


def views(x: Tensor, tta: str, spec: Spec, info: DataInfo = CIFAR10) -> Iterator[Tensor]:
    """The variants of normalised images that test-time augmentation evaluates, each float32 [batch, inputs].

    "none": the images alone. "flip": the images and their mirror images. "shifts": the nine moves by -1, 0 and 1 pixels
    in both directions, each with its mirror image. `shift_fill` fills the new pixels, as in training.
    """
    reach, mirrored = TTA[tta]
    height, width = info.shape[1:]
    planes = x.view(-1, *info.shape)
    if reach:
        planes = F.pad(planes, [reach] * 4, "reflect" if spec["shift_fill"] == "reflect" else "constant")
    for down in range(2 * reach + 1):
        for right in range(2 * reach + 1):
            moved = planes[..., down : down + height, right : right + width].flatten(1)
            yield moved
            if mirrored:
                yield mirror(moved, info)


def whiten(x: Tensor, whitening: dict[str, Tensor], precision: str) -> Tensor:
    """Whitened images, float32 [batch, k], or [batch, inputs] with `back`, from normalised images [batch, inputs].

    Args:
        whitening: `weight` [k, inputs], float32 or already in the precision of the product; `bias` float32 [k]; for
            local layers `back` [inputs, k], as `weight`.
    """
    product = model.matmul(whitening["weight"], model.cast(x, precision).t(), precision) + whitening["bias"][:, None]
    if "back" in whitening:
        product = model.matmul(whitening["back"], model.cast(product, precision), precision)
    return product.t()


def check(spec: Spec, info: DataInfo) -> None:
    """Refuse a resolved spec whose augmentations cannot take the images.

    Raises:
        core.spec.SpecError: They take images of 3x32x32 alone.
    """
    used = [key for key in ("rotate", "zoom", "cutout") if spec[key]] + ["augment"] * (spec["augment"] != "none")
    if used and info.shape != CIFAR10.shape:
        shape = "x".join(map(str, info.shape))
        raise SpecError(f"{used[0]} takes images of 3x32x32, those of {spec['dataset']} have {shape}")


def derived(spec: Spec) -> dict[str, list[float]]:
    """Hyper-parameters of augmentation that are computed from a resolved spec: the quantiles that mixup draws from."""
    return {"mixup": prng.beta_quantiles(spec["mixup"])}


def augment(images: Tensor, spec: Spec, hyper: dict[str, Tensor], step: Tensor, info: DataInfo = CIFAR10) -> Tensor:
    """Normalised and augmented images. Random augmentations take images of 3x32x32.

    `augment`: "flip" mirrors each image with probability 1/2; "flip+shift" first moves it by up to `shift` pixels
    vertically and horizontally. `rotate` turns each image about its centre by up to that many degrees. `zoom` scales it
    by a factor from 1 - zoom to 1 + zoom. Angle and factor are uniform. `shift_fill` fills the new pixels: with zeros,
    or with the image reflected as by numpy.pad. `cutout` sets a square with that side to zero. Its centre may be any
    pixel, so the border may cut the square (DeVries and Taylor 2017).

    Args:
        images: uint8 [batch, inputs].
        spec: what core.spec.static returns; it says which augmentations are on.
        hyper: 0-d tensors `rotate`, `zoom`, `cutout` (float32) and `seed` (int32).
        step: int32, 0-d. Random draws are a function of `seed`, `step` and the index in the batch.

    Returns:
        float32 [batch, inputs].
    """
    if spec["rotate"] or spec["zoom"]:
        x = _sample(images, spec, hyper, step, info)
    elif spec["augment"] == "none":
        x = normalise(images, info)
    else:
        x = _mirror_and_move(images, spec, hyper["seed"], step, info)
    if spec["cutout"]:
        x = _cut_out(x.view(-1, 3, 32, 32), hyper["cutout"], hyper["seed"], step)
    return x.reshape(-1, info.inputs)


def _placement(spec: Spec, seed: Tensor, step: Tensor, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which images are not mirrored, bool [batch]; by how many pixels the position to read from moves down, and right,
    int32 [batch]. The move comes first, then the mirroring."""
    zeros = torch.zeros(batch, dtype=torch.int32, device=seed.device)
    if spec["augment"] == "none":
        return zeros == 0, zeros, zeros
    if spec["augment"] == "flip":
        return prng.bits(seed, prng.AUGMENT, step, batch) < 0, zeros, zeros
    draws, limit = prng.bits(seed, prng.AUGMENT, step, 3 * batch).view(3, batch), spec["shift"]
    moves = (((draws[1:] >> 16) + 32768) * (2 * limit + 1) >> 16) - limit
    return draws[0] < 0, moves[0], moves[1]


def _mirror_and_move(images: Tensor, spec: Spec, seed: Tensor, step: Tensor, info: DataInfo) -> Tensor:
    """Normalised images, float32 [batch, 3072] or [batch, 3, 32, 32]."""
    batch = len(images)
    keep, down, right = _placement(spec, seed, step, batch)
    # Rows as words of eight pixels. A gather of single pixels would need one scalar load for each pixel.
    words = images.view(torch.int64).view(batch, 96, 4)
    mirrored, first = _mirror(words), keep[:, None, None]
    words, mirrored = torch.where(first, words, mirrored), torch.where(first, mirrored, words)
    if spec["augment"] == "flip":
        return normalise(words.view(torch.uint8).view(batch, 3072), info)
    return _move(words, mirrored, down, torch.where(keep, right, -right), spec["shift_fill"] == "reflect", info)


def _mirror(words: Tensor) -> Tensor:
    """Rows of 32 pixels in reverse order, int64 [..., 4] with eight pixels in each word."""
    words = words.flip(-1)
    for bits, mask in ((8, 0x00FF00FF00FF00FF), (16, 0x0000FFFF0000FFFF), (32, 0x00000000FFFFFFFF)):
        words = ((words >> bits) & mask) | ((words & mask) << bits)
    return words


def _move(words: Tensor, mirrored: Tensor, down: Tensor, right: Tensor, reflect: bool, info: DataInfo) -> Tensor:
    """Normalised images, float32 [batch, 3, 32, 32], read from `down` pixels further down and `right` further right.

    Args:
        words: the images, int64 [batch, 96, 4]: in each row four words of eight pixels.
        mirrored: the same with each row mirrored.
        down, right: int32 [batch], from -8 to 8.
    """
    batch, position = len(words), torch.arange(32, device=words.device)
    rows, columns = position + down[:, None], position + right[:, None]  # [batch, 32]
    left_edge = right_edge = torch.zeros_like(words[..., :1])
    if reflect:  # eight pixels from the second one on, mirrored, and eight up to the last but one
        left_edge = ((mirrored[..., 2:3] >> 56) & 0xFF) | (mirrored[..., 3:] << 8)
        right_edge = ((mirrored[..., :1] >> 8) & (2**56 - 1)) | (mirrored[..., 1:2] << 56)
    pixels = torch.cat([left_edge, words, right_edge], 2).view(torch.uint8).view(-1)  # 48 a row
    source = (31 - (31 - rows.abs()).abs()) if reflect else rows.clamp(0, 31)
    planes = torch.arange(3 * batch, device=words.device).view(batch, 3, 1)
    starts = (planes * 32 + source[:, None]) * 48 + 8 + right[:, None, None]
    # A view of all windows of 32 pixels, so that reading a row is one contiguous load, wherever it starts.
    x = normalise(pixels.unfold(0, 32, 1).index_select(0, starts.view(-1)).view(batch, 3, 32, 32), info)
    return x if reflect else torch.where(_within(rows - 15.5, columns - 15.5, 16), x, 0.0)


def _within(rows: Tensor, columns: Tensor, distance: float | Tensor) -> Tensor:
    """Whether a pixel is less than `distance` away in rows and in columns: bool [batch, 1, 32, 32].

    Args:
        rows, columns: distances of rows and columns, float32 [batch, 32]. (Masks of bool are slow in a compiled loop.)
    """
    return torch.maximum(rows.abs()[:, None, :, None], columns.abs()[:, None, None, :]) < distance


def _sample(images: Tensor, spec: Spec, hyper: dict[str, Tensor], step: Tensor, info: DataInfo) -> Tensor:
    """Normalised images, float32 [batch, 3, 32, 32], mirrored, moved, rotated and scaled by one bilinear sampling.

    Angle and scale mean the same as in torchvision.transforms.v2.functional.affine.
    """
    batch, device = len(images), images.device
    keep, down, right = (t[:, None] for t in _placement(spec, hyper["seed"], step, batch))
    draws = prng.bits(hyper["seed"], prng.AFFINE, step, 2 * batch).view(2, batch).float() * 2.0**-31  # in -1 to 1
    angle, scale = draws[0] * (hyper["rotate"] * (math.pi / 180)), 1 + draws[1] * hyper["zoom"]
    cos, sin = (torch.cos(angle) / scale)[:, None], (torch.sin(angle) / scale)[:, None]
    position = torch.arange(32, device=device) - 15.5  # from the centre
    y, x = position + down, torch.where(keep, position, -position) + right  # [batch, 32]
    row = (cos * y)[:, :, None] - (sin * x)[:, None, :] + 15.5  # [batch, 32, 32], to read from
    column = (sin * y)[:, :, None] + (cos * x)[:, None, :] + 15.5
    if spec["shift_fill"] == "reflect":
        row, column = _reflect(row), _reflect(column)
    # Bilinear: the weight of a pixel is (1 - its distance in rows) * (1 - its distance in columns), and 0 beyond 1.
    # Outside the image the weights add up to less than 1, so the sample is partly zero.
    top, left = row.floor().clamp(0, 30), column.floor().clamp(0, 30)
    distances = row - top, row - top - 1, column - left, column - left - 1
    upper, lower, first, second = ((1 - distance.abs()).clamp(min=0)[:, None] for distance in distances)
    # One word holds a pixel and its neighbours right, below, and below right: one load instead of four.
    words = images.int()
    words = words[:, :-33] | (words[:, 1:-32] << 8) | (words[:, 32:-1] << 16) | (words[:, 33:] << 24)
    index = (top * 32 + left).long()[:, None] + torch.arange(0, 3072, 1024, device=device)[:, None, None]
    words = words.gather(1, index.view(batch, 3072)).view(batch, 3, 32, 32)
    pixels = [((words >> bits) & 255).float() for bits in (0, 8, 16, 24)]
    x = upper * (first * pixels[0] + second * pixels[1]) + lower * (first * pixels[2] + second * pixels[3])
    scale, offset = _scale_and_offset(torch.arange(3, device=device)[:, None, None], info)
    return torch.addcmul(offset * ((upper + lower) * (first + second)), x, scale)


def _reflect(position: Tensor) -> Tensor:
    """Coordinates, float32, reflected at 0 and 31 as by numpy.pad mode "reflect"."""
    position = position.abs()
    return 31 - (31 - (position - 62 * (position / 62).floor())).abs()


def _cut_out(x: Tensor, side: Tensor, seed: Tensor, step: Tensor) -> Tensor:
    """Images [batch, 3, 32, 32] with zeros in a square whose centre is drawn from all pixels."""
    position, draws = torch.arange(32, device=x.device), prng.bits(seed, prng.CUTOUT, step, len(x))
    # A square with an even side reaches further up and left than down and right.
    rows, columns = (position - (at & 31)[:, None] + (side / 2).floor() - (side - 1) / 2 for at in (draws, draws >> 5))
    return torch.where(_within(rows, columns, side / 2), 0.0, x)


def mixup(
    x: Tensor, labels: Tensor, quantiles: Tensor, seed: Tensor, step: Tensor, classes: int = 10
) -> tuple[Tensor, Tensor]:
    """Each example mixed with the one before it in the batch (Zhang, Cisse, Dauphin, Lopez-Paz 2018). The share of each
    example is drawn from Beta(alpha, alpha). The order of a batch is random, and so is the partner.

    Args:
        x: float32 [batch, inputs]. labels: int64 [batch].
        quantiles: of Beta(alpha, alpha), as core.functional.prng.beta_quantiles returns them.

    Returns:
        Mixed images, float32 [batch, inputs], and the shares of the classes in them, float32 [batch, classes].
    """
    share = prng.inverse_transform(prng.bits(seed, prng.MIXUP, step, len(x)), quantiles)[:, None]
    hot = (labels[:, None] == torch.arange(classes, device=x.device)).float()
    mixed, shares = (share * t + (1 - share) * t.roll(1, 0) for t in (x, hot))
    return mixed, shares
