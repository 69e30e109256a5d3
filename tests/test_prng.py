"""The counter-based draws: published answers, an independent reference, the same bits everywhere, independence.

Statistical bounds are six standard deviations wide and the draws are fixed, so a test here either always passes or
never does.
"""

import itertools

import numpy as np
import pytest
import scipy.stats
import torch

from core.compile import inductor
from core.functional import prng

# From kat_vectors of Random123 (Salmon et al.), "threefry2x32 20": counter, key, answer.
KNOWN_ANSWERS = [
    ((0x00000000, 0x00000000), (0x00000000, 0x00000000), (0x6B200159, 0x99BA4EFE)),
    ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
    ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
]
COUNTS = [1, 2, 3, 4, 5, 63, 64, 1001]
STREAMS = [prng.DROPOUT, prng.AUGMENT, prng.AFFINE, prng.CUTOUT, prng.MIXUP]


def reference(key, counter):
    """Threefry-2x32-20 in unsigned NumPy arithmetic, after the paper."""
    ks = [np.uint32(key[0]), np.uint32(key[1])]
    ks.append(np.uint32(ks[0] ^ ks[1] ^ np.uint32(0x1BD11BDA)))
    x0, x1 = np.atleast_1d(counter[0]).astype(np.uint32), np.atleast_1d(counter[1]).astype(np.uint32)
    with np.errstate(over="ignore"):
        x0, x1 = x0 + ks[0], x1 + ks[1]
        for i in range(20):
            r = np.uint32((13, 15, 26, 6, 17, 29, 16, 24)[i % 8])
            x0 = x0 + x1
            x1 = (x1 << r | x1 >> (np.uint32(32) - r)) ^ x0
            if i % 4 == 3:
                n = i // 4 + 1
                x0, x1 = x0 + ks[n % 3], x1 + ks[(n + 1) % 3] + np.uint32(n)
    return x0, x1


def reference_bits(seed, stream, step, count):
    blocks = np.arange(-(-count // 2), dtype=np.uint32)
    words = np.stack(reference((seed, stream), (blocks, np.full_like(blocks, step))), 1).astype("<u4")
    return words.view("<i4").reshape(-1)[:count]


def int32(value):
    return torch.tensor(np.uint32(value).view(np.int32).item(), dtype=torch.int32)


def bits(seed=0, stream=prng.DROPOUT, step=0, count=1 << 16):
    return prng.bits(int32(seed), stream, int32(step), count)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter, key, answer):
    drawn = prng.threefry2x32(tuple(map(int32, key)), tuple(map(int32, counter)))
    assert tuple(np.int32(word.item()).view(np.uint32) for word in drawn) == answer
    assert tuple(word.item() for word in reference(key, counter)) == answer


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(("seed", "step"), [(0, 0), (1, 7), (2**31 - 1, 2**31 - 1)])
def test_bits_are_those_of_the_reference(seed, step, count):
    for stream in STREAMS:
        drawn = bits(seed, stream, step, count)
        assert drawn.dtype == torch.int32
        assert drawn.shape == (count,)
        assert np.array_equal(drawn.numpy(), reference_bits(seed, stream, step, count))


def test_a_longer_draw_begins_with_the_shorter():
    longest = bits(count=COUNTS[-1])
    assert all(torch.equal(bits(count=count), longest[:count]) for count in COUNTS)


@pytest.mark.slow
def test_compiled_bits_are_those_of_eager():
    """Odd sizes and step, since vector code has a tail. With the options of the step, which save 20 s here."""
    compiled = torch.compile(prng.bits, fullgraph=True, dynamic=False, options=inductor.options())
    assert torch.equal(compiled(int32(3), prng.DROPOUT, int32(11), 1003), bits(3, step=11, count=1003))


def test_vmapped_bits_are_those_of_each_alone():
    seeds, steps = torch.tensor([0, 1, 77], dtype=torch.int32), torch.tensor([5, 5, 6], dtype=torch.int32)
    together = torch.func.vmap(lambda seed, step: prng.bits(seed, prng.DROPOUT, step, 37))(seeds, steps)
    alone = [prng.bits(seed, prng.DROPOUT, step, 37) for seed, step in zip(seeds, steps, strict=True)]
    assert torch.equal(together, torch.stack(alone))


def masks(seed, step, rate, widths, batch):
    return prng.dropout_masks(int32(seed), int32(step), torch.tensor(rate), widths, batch)


def test_vmapped_masks_are_those_of_each_alone():
    seeds, rates = torch.tensor([4, 5], dtype=torch.int32), torch.tensor([0.2, 0.7])
    together = torch.func.vmap(lambda seed, rate: prng.dropout_masks(seed, int32(2), rate, [7, 4], 3))(seeds, rates)
    for i, (seed, rate) in enumerate(((4, 0.2), (5, 0.7))):
        alone = masks(seed, 2, rate, [7, 4], 3)
        assert all(torch.equal(mask[i], each) for mask, each in zip(together, alone, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_draws_on_a_gpu_are_those_of_the_cpu():
    for seed, step, count in ((0, 0, 1003), (2**31 - 1, 77, 1 << 20)):
        drawn = prng.bits(int32(seed).cuda(), prng.DROPOUT, int32(step).cuda(), count)
        assert torch.equal(drawn.cpu(), bits(seed, step=step, count=count))


def test_masks_are_made_of_the_draws():
    """By an independent reading of them: the halves of a word, for widths that are even and odd."""
    widths, batch, rate = [6, 5, 1], 3, 0.3
    words = reference_bits(4, prng.DROPOUT, 9, (3 + 3 + 1) * batch).view(np.uint32)
    for mask, width in zip(masks(4, 9, rate, widths, batch), widths, strict=True):
        rows = (width + 1) // 2
        used, words = words[: rows * batch].reshape(rows, batch), words[rows * batch :]
        # A number in [0, 1) from each: all 32 bits for the first half of the units, the lower 16 for the second.
        numbers = np.concatenate([used ^ np.uint32(1 << 31), (used << np.uint32(16)) ^ np.uint32(1 << 31)]) / 2.0**32
        assert np.array_equal(mask.numpy() == 0, numbers[:width] < np.float32(rate))
    assert not len(words)


def test_the_global_generator_neither_matters_nor_moves():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    drawn = bits()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(bits(), drawn)


def chi_square(cells, n_cells):
    counts = torch.bincount(cells.long(), minlength=n_cells).double()
    expected = len(cells) / n_cells
    return ((counts - expected) ** 2 / expected).sum().item()


def within_chance(chi, degrees):
    return abs(chi - degrees) < 6 * (2 * degrees) ** 0.5


@pytest.mark.parametrize("shift", [0, 8, 16, 24])
@pytest.mark.parametrize("lane", [0, 1])
def test_bytes_are_uniform(shift, lane):
    """In both draws that share a block, and in each byte of them."""
    drawn = bits(count=1 << 18)[lane::2]
    assert within_chance(chi_square((drawn >> shift) & 255, 256), 255)


ORIGIN = {"seed": 0, "stream": prng.DROPOUT, "step": 0}
NEIGHBOURS = [
    {"seed": 1},
    {"seed": 2},
    {"seed": 1 << 16},
    {"step": 1},
    {"step": 2},
    {"step": 1 << 16},
    {"stream": prng.AUGMENT},
    {"seed": 1, "step": 1},
    {"seed": prng.AUGMENT, "stream": 0},
]


def unrelated(a, b):
    """Neither a correlation of the values nor one of their top four bits."""
    n = len(a)
    correlation = torch.corrcoef(torch.stack([a, b]).double())[0, 1].item()
    pairs = (a >> 28 & 15) * 16 + (b >> 28 & 15)
    return abs(correlation) < 6 / n**0.5 and within_chance(chi_square(pairs, 256), 255)


@pytest.mark.parametrize("other", NEIGHBOURS, ids=str)
def test_seeds_streams_and_steps_are_independent(other):
    assert unrelated(bits(**ORIGIN), bits(**{**ORIGIN, **other}))


@pytest.mark.parametrize("pair", list(itertools.combinations(STREAMS, 2)), ids=str)
def test_no_two_streams_are_alike(pair):
    """The draws of one purpose are independent of those of another in the same step."""
    assert unrelated(*(bits(1, stream, 3) for stream in pair))


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 64, 256, 32768])
def test_places_in_a_draw_are_independent(lag):
    """A lag is the distance between two units, two examples or two layers of one mask."""
    drawn = bits(count=(1 << 16) + lag)
    assert unrelated(drawn[:-lag], drawn[lag:])


def test_the_measure_of_independence_can_fail():
    drawn = bits()
    assert not unrelated(drawn, drawn)
    assert not unrelated(drawn, drawn.roll(1) // 2 + drawn // 2)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.2, 0.5, 0.9, 1 - 2**-12])
def test_masks_keep_the_mean_and_drop_the_rate(rate):
    """In each half of the units."""
    (mask,) = masks(0, 0, rate, [1 << 11], 1 << 10)
    assert mask.dtype == torch.float32
    assert set(mask.unique().tolist()) <= {0.0, (1 / (1 - torch.tensor(rate))).item()}
    for half in mask.chunk(2):
        chance = 6 * (rate * (1 - rate) / half.numel()) ** 0.5 + 2**-16
        assert abs((half == 0).double().mean().item() - rate) <= chance
        assert abs(half.double().mean().item() - 1) <= chance / (1 - rate)
    if rate == 0:
        assert (mask == 1).all()


def test_units_and_layers_are_independent():
    """The masks are one draw for all hidden layers, and a draw serves two units: none of them may share a pattern."""
    width, batch = 128, 64
    parts = torch.cat(masks(0, 3, 0.5, [width] * 3, batch)).view(6, -1) > 0  # the halves of three layers
    correlations = torch.corrcoef(parts.double()) - torch.eye(6)
    assert correlations.abs().max() < 6 / (width * batch / 2) ** 0.5


@pytest.mark.parametrize("alpha", [0.05, 0.2, 1.0, 3.0, 9.0])
def test_draws_from_a_table_have_the_distribution_of_beta(alpha):
    """Each draw against the quantile itself, and their mean and variance."""
    draws = bits(count=1 << 14, stream=prng.MIXUP)
    found = prng.inverse_transform(draws, torch.tensor(prng.beta_quantiles(alpha))).double().numpy()
    beta = scipy.stats.beta(alpha, alpha)
    uniform = draws.numpy().view(np.uint32) / 2.0**32
    # Between two places of the table the quantile is somewhere between those of the places.
    below, above = (beta.ppf(rounded(uniform * 1024) / 1024) for rounded in (np.floor, np.ceil))
    assert ((below - 1e-6 <= found) & (found <= above + 1e-6)).all()
    inner = (uniform > 0.01) & (uniform < 0.99)
    np.testing.assert_allclose(found[inner], beta.ppf(uniform[inner]), atol=2e-3)
    assert abs(found.mean() - 0.5) < 6 * beta.std() / len(found) ** 0.5
    assert abs(found.var() / beta.var() - 1) < 0.05


def test_a_table_is_finite_ordered_and_symmetric():
    for alpha in (1e-300, 1e-6, 0.2, 1.0, 9.9):
        table = torch.tensor(prng.beta_quantiles(alpha))
        assert table.shape == (1025,)
        assert table[0] == 0
        assert table[-1] == 1
        assert (table.diff() >= 0).all()
        torch.testing.assert_close(table, 1 - table.flip(0))
    assert set(prng.beta_quantiles(0.0)) == {1.0}
