"""Counter-based random numbers: pure functions of (seed, stream, step, index), without the state of a generator.

Threefry-2x32 with 20 rounds (Salmon, Moraes, Dror, Shaw: "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) in
int32 arithmetic, which overflows in the same way on every device, eager, compiled and vmapped. The key is (seed,
stream) and the counter is (index, step): two draws that differ in any of the four never share a block.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

DROPOUT, AUGMENT, AFFINE, CUTOUT, MIXUP, CENTRES = 1, 2, 3, 4, 5, 6  # the streams: what random numbers are for

_PARITY = 0x1BD11BDA
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def threefry2x32(key: tuple[Tensor, Tensor], counter: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Encrypt counters of two words under a key of two words. All are int32 tensors that broadcast together."""
    keys = (*key, key[0] ^ key[1] ^ _PARITY)
    x0, x1 = counter[0] + keys[0], counter[1] + keys[1]
    for group in range(5):
        for r in _ROTATIONS[group % 2]:
            x0 = x0 + x1
            # On int32 `>>` copies the sign bit. The mask clears the copies, so the two shifts are a rotation.
            x1 = ((x1 << r) | ((x1 >> (32 - r)) & ((1 << r) - 1))) ^ x0
        x0 = x0 + keys[(group + 1) % 3]
        x1 = x1 + keys[(group + 2) % 3] + (group + 1)
    return x0, x1


def bits(seed: Tensor, stream: int, step: Tensor, count: int) -> Tensor:
    """Random numbers of 32 bits, int32 [count].

    Args:
        seed: int32 scalar.
        stream: the purpose of the numbers, a constant of this module.
        step: int32 scalar.
        count: at most 2**32.
    """
    index = torch.arange(-(-count // 2), dtype=torch.int32, device=seed.device)
    x0, x1 = threefry2x32((seed, torch.full_like(seed, stream)), (index, step))
    # The view as int32 puts the two words of a block side by side. It also makes inductor keep the numbers in a buffer;
    # with torch.stack, each kernel that reads them would compute all rounds again.
    return ((x1.long() << 32) | (x0.long() & 0xFFFFFFFF)).view(torch.int32)[:count]


def dropout_masks(seed: Tensor, step: Tensor, rate: Tensor, widths: Sequence[int], batch: int) -> list[Tensor]:
    """For each width, float32 [width, batch]: 0 with probability `rate` (within 2**-16), otherwise 1 / (1 - rate).

    One random number serves two units of a layer: one reads its upper half, the other its lower half. This halves the
    time of the draws, from 4% of a step to 2%.

    Args:
        rate: float32 scalar in [0, 1).
    """
    rows = [-(-width // 2) for width in widths]
    draws = bits(seed, DROPOUT, step, sum(rows) * batch).split([n * batch for n in rows])
    threshold = (rate * 2.0**32 - 2.0**31).to(torch.int32)
    second = torch.arange(2, device=seed.device)[:, None, None] == 1
    masks = []
    for width, n, drawn in zip(widths, rows, draws, strict=True):
        drawn = drawn.view(n, batch)
        both = torch.where(second, drawn << 16, drawn).view(2 * n, batch)[:width]
        masks.append(torch.where(both < threshold, 0.0, 1 / (1 - rate)))
    return masks


def inverse_transform(draws: Tensor, quantiles: Tensor) -> Tensor:
    """Random numbers of a distribution from uniform ones and a table of its quantile function.

    Args:
        draws: int32 [n], from `bits`.
        quantiles: float32 [1025], the quantiles at 0, 1/1024, ... 1. Between them the function is linear.

    Returns:
        float32 [n].
    """
    index, within = (draws >> 22) & 1023, (draws & 0x3FFFFF).float() * 2.0**-22
    return torch.lerp(quantiles[index], quantiles[index + 1], within)


def beta_quantiles(alpha: float) -> list[float]:
    """The table of Beta(alpha, alpha) for `inverse_transform`, [1025]. With alpha = 0 every quantile is 1."""
    if not alpha:
        return [1.0] * 1025
    from scipy.special import betaincinv  # slow to import

    return [float(betaincinv(alpha, alpha, i / 1024)) for i in range(1025)]
