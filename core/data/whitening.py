"""Whitening: the fixed projection of an image on its principal components, each scaled to about unit variance, and back
to pixels for local layers."""

import functools

import torch
from torch import Tensor

from core.spec import CIFAR10, DataInfo

# {"weight": float32 [components, inputs], "bias": float32 [components]}; for local layers also "back": float32 [inputs,
# components]
Whitening = dict[str, Tensor]

CHUNK = 256  # images; float32 adds their products exactly


def whitening(
    images: Tensor, examples: Tensor, components: int, eps: float, back: bool = False, info: DataInfo = CIFAR10
) -> Whitening:
    """The projection `weight @ x + bias` of a normalised image x, a function of the images alone.

    The principal components are those of the examples and their mirror images. Each is divided by sqrt(variance + eps);
    see Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images", appendix A, and, for eps, Coates and
    Ng 2011. The bits depend on the machine, but not on the number of threads.

    With `back`, the components become an image again: `back @ (weight @ x + bias)` is x less its mean, with these
    components at about unit variance and without the others. This is ZCA (Bell and Sejnowski 1997; Krizhevsky 2009),
    times sqrt(inputs / components), so that the pixels have about unit variance, too, where eps is small.

    Args:
        images: uint8 [n, inputs], on any device. examples: int64 indices into them.
        components: how many, from 1 to `inputs`. eps: above 0.
        back: for local layers, which need pixels. info: of the data set.

    Returns:
        float32 on the CPU: `weight` [components, inputs] and `bias` [components]; with `back` also `back` [inputs,
        components].
    """
    mean, variances, vectors = _principal_components(images, _Same(examples), info)
    weight = vectors[:components] * torch.rsqrt(variances[:components, None] + eps)
    found = {"weight": weight.float(), "bias": (weight @ -mean).float()}
    if back:
        found["back"] = (vectors[:components].mT * (info.inputs / components) ** 0.5).float().contiguous()
    return found


class _Same:
    """Index tensor hashed by value, usable as a cache key."""

    def __init__(self, indices: Tensor) -> None:
        self.indices = indices.cpu()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and torch.equal(self.indices, other.indices)

    def __hash__(self) -> int:
        return len(self.indices)


@functools.lru_cache(maxsize=2)  # the seeds of a sweep share it
def _principal_components(images: Tensor, examples: _Same, info: DataInfo) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [inputs], variances [inputs] in descending order and vectors [inputs, inputs], a row each, in float64.

    An image and its mirror image together are a symmetric and an antisymmetric half, which are not correlated: two
    problems of half the size, an eighth of the time each.
    """
    _, height, width = info.shape
    rows, columns, size = info.inputs // width, width // 2, info.inputs // 2  # of half an image
    channel = torch.arange(info.inputs) // (height * width)
    std, mean = (torch.tensor(values, dtype=torch.float64)[channel] for values in (info.std, info.mean))
    scale = (1 / (255 * std)).view(rows, width)[:, :columns].reshape(-1)
    sums, n = torch.zeros(size, dtype=torch.float64), len(examples.indices)
    products = torch.zeros(2, size, size, dtype=torch.float64)
    for chunk in examples.indices.split(CHUNK):
        # Integers of at most 8 bits and a sign: every sum below is exact, in whatever order it is added up.
        x = (images[chunk.to(images.device)].cpu().short() - 128).view(-1, rows, 2, columns)
        left, right = x[:, :, 0], x[:, :, 1].flip(2)
        symmetric, antisymmetric = (half.reshape(-1, size).float() for half in (left + right, left - right))
        products[0] += symmetric.t() @ symmetric  # one by one: faster than as a batch
        products[1] += antisymmetric.t() @ antisymmetric
        sums += symmetric.double().sum(0)
    middle = sums / (2 * n)  # of an image less 128, alike on both sides
    center = (middle * scale).view(rows, columns)
    covariance = products / (2 * n)
    covariance[0] -= 2 * torch.outer(middle, middle)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the bits of a decomposition depend on the number
    try:
        variances, vectors = torch.linalg.eigh(covariance * torch.outer(scale, scale))
    finally:
        torch.set_num_threads(threads)
    halves = vectors.mT.reshape(2, size, rows, columns) / 2**0.5
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64)[:, None, None, None]
    vectors = torch.cat([halves, signs * halves.flip(3)], 3).view(info.inputs, info.inputs)
    order = variances.view(-1).argsort(descending=True, stable=True)
    mean = torch.cat([center, center.flip(1)], 1).view(-1) + (128 / 255 - mean) / std
    return mean, variances.view(-1)[order], vectors[order]
