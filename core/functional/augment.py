"""What happens to a batch of images before the network sees it: normalisation and augmentation."""

import torch
import torch.nn.functional as F
from torch import Tensor

from core.functional import model, prng
from core.spec import Spec

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of the training images, a channel, in 0..1


def normalise(images: Tensor) -> Tensor:
    """uint8 [batch, 3072] to float32, zero mean and unit variance a channel over the training images."""
    # Built from scalars in the graph, so that no constant has to be kept on the device.
    channel = torch.arange(3072, device=images.device) // 1024
    scale = torch.full((3072,), 1 / (255 * STD[2]), device=images.device)
    shift = torch.full((3072,), -MEAN[2] / STD[2], device=images.device)
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


def augment(images: Tensor, spec: Spec, seed: Tensor, step: Tensor) -> Tensor:
    """Random mirror images, and random moves by up to spec["shift"] pixels in each direction.

    Args:
        images: float32 [batch, 3072], normalised.
        spec: `augment` is "flip" or "flip+shift"; by `shift_fill`, zeros or the reflected image move in.
        seed, step: int32 scalars that, with the place in the batch, decide what is drawn.
    """
    batch, device = len(images), images.device
    draws = prng.bits(seed, prng.AUGMENT, step, 3 * batch).view(3, batch)
    column = torch.arange(32, device=device)
    columns = torch.where(draws[0, :, None] < 0, column, 31 - column)  # [batch, 32], to read from
    images = images.view(batch, 3, 32, 32)
    rows = column.expand(batch, 32)
    if spec["augment"] == "flip+shift":
        shift = spec["shift"]
        images = F.pad(images, (shift,) * 4, mode="reflect" if spec["shift_fill"] == "reflect" else "constant")
        moves = ((draws[1:] >> 16) + 32768) * (2 * shift + 1) >> 16  # [2, batch], 0..2 * shift
        rows, columns = rows + moves[0, :, None], columns + moves[1, :, None]
    width = images.shape[-1]
    index = (rows[:, :, None] * width + columns[:, None, :]).view(batch, 1, 1024).expand(batch, 3, 1024)
    return images.reshape(batch, 3, -1).gather(2, index).view(batch, 3072)
