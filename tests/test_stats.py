"""The statistics of the report, against published values, numpy and scipy.stats."""

import math

import numpy as np
import pytest
from scipy import stats as reference

from core.report import stats
from tests.test_report import answered, make


def runs(name, accuracies, **changes):
    """An experiment with these validation accuracies, a seed each."""
    (group,) = stats.groups(make(name, seed=seed, validation=v, **changes) for seed, v in accuracies.items())
    return group


def test_interval_against_published_values():
    """Wilson's interval: of 5 in 10, and of none in 10."""
    assert stats.interval(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert stats.interval(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    low, high = stats.interval(0.57, 10_000)
    assert (high - low) / 2 == pytest.approx(1.96 * (0.57 * 0.43 / 10_000) ** 0.5, rel=1e-3)


def test_the_interval_of_a_mean_is_students():
    """Gosset's own data, the sleep that ten patients gained: 1.58 hours on average, from 0.70 to 2.46."""
    gained = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    assert stats.half_width(gained) == pytest.approx(0.8799, abs=1e-4)
    low, high = reference.t.interval(0.95, 9, np.mean(gained), reference.sem(gained))
    assert 2 * stats.half_width(gained) == pytest.approx(high - low)
    group = runs("a", {0: 0.5, 1: 0.52, 2: 0.54})
    assert stats.mean_interval(group, "validation") == pytest.approx(
        reference.t.interval(0.95, 2, 0.52, reference.sem([0.5, 0.52, 0.54]))
    )
    assert stats.mean_interval(runs("a", {0: 0.5}), "validation") == stats.interval(0.5, 5000)


def test_a_paired_comparison_uses_the_seeds_of_both():
    a, b = runs("a", {0: 0.50, 1: 0.54, 2: 0.52, 9: 0.1}), runs("b", {2: 0.512, 1: 0.531, 0: 0.493, 7: 0.9}, lr=0.1)
    found = stats.compare(a, b, "validation")
    test = reference.ttest_rel([0.50, 0.54, 0.52], [0.493, 0.531, 0.512])
    low, high = test.confidence_interval(0.95)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((100 * low, 100 * high))
    assert (found.n, found.significant) == (3, bool(test.pvalue < 0.05)) == (3, True)
    assert found.deviation == pytest.approx(np.std([0.7, 0.9, 0.8], ddof=1))
    # Not paired, the same differences are lost among the seeds.
    assert reference.ttest_ind([0.50, 0.54, 0.52], [0.493, 0.531, 0.512]).pvalue > 0.5


def test_without_two_common_seeds_there_is_no_interval():
    for other in ({0: 0.56}, {2: 0.56, 3: 0.56}):
        found = stats.compare(runs("a", {0: 0.58}), runs("b", other, lr=0.1), "validation")
        assert found.mean == pytest.approx(2.0)
        assert (found.half, found.significant, found.n) == (math.inf, False, int(0 in other))


@pytest.mark.parametrize(("turn", "hits"), [(0, 0.57), (5, 0.57), (300, 0.56), (1, 0.58), (0, 0.60)])
def test_images_are_compared_by_the_exact_test_of_mcnemar(turn, hits):
    one, other = answered(make("a", test=0.57)), answered(make("b", test=hits, lr=0.1), turn)
    found = stats.image_by_image([one], [other])
    x, y = (np.unpackbits(np.frombuffer(r.answers.right, np.uint8)).astype(bool) for r in (one, other))
    first, second = int((x & ~y).sum()), int((y & ~x).sum())
    assert found[:2] == (first, second)
    assert found[2] == pytest.approx(reference.binomtest(first, first + second).pvalue if first + second else 1)


def test_images_are_compared_for_the_first_seed_that_both_recorded():
    a = [make("a", seed=0), answered(make("a", seed=1)), answered(make("a", seed=2))]
    b = [answered(make("b", seed=0)), answered(make("b", seed=2), 9), answered(make("b", seed=1))]
    assert stats.image_by_image(a, b) == (0, 0, 1.0)
    assert stats.image_by_image(a[2:], b) != (0, 0, 1.0)
    assert stats.image_by_image(a[:1], b) is None
    assert stats.image_by_image(a[1:2], b[:1]) is None


def test_the_doubt_about_other_test_images():
    """Of 10,000 images, 50 are right in the first network alone and 50 in the second alone: 1% differ by 1 or -1."""
    one, other = answered(make("a", test=0.57)), answered(make("b", test=0.57, lr=0.1), 5)
    assert stats.over_images([(one, other)]) == pytest.approx(1.96 * 0.1 / 100, rel=1e-3)
    assert stats.over_images([(one, other), (other, one)]) == 0
    assert stats.over_images([(one, make("b"))]) is None
