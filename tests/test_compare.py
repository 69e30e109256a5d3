"""Comparisons that end when the answer is clear."""

import functools
import math

import numpy as np
import pytest
from scipy import special, stats

from core import compare

SEEDS, TRIALS, ALPHA = 50, 10_000, 0.05
WIDTHS = np.array([math.inf, *(compare.half_width(1.0, n, ALPHA) for n in range(2, SEEDS + 1))])
NAIVE = np.array([math.inf, *(special.stdtrit(n - 1, 1 - ALPHA / 2) / n**0.5 for n in range(2, SEEDS + 1))])


# By simulation


@functools.cache
def noise(kind):
    """Differences of 10,000 comparisons with 50 seeds each, with mean 0."""
    random = np.random.default_rng(0)
    if kind == "normal":
        return random.standard_normal((TRIALS, SEEDS))
    if kind == "t with 3 degrees":
        return random.standard_t(3, (TRIALS, SEEDS)) / 3**0.5
    # Of each candidate, 5% of all runs diverge: 47 points, 94 deviations, worse than the others.
    diverged = random.random((2, TRIALS, SEEDS)) < 0.05
    return random.standard_normal((TRIALS, SEEDS)) + 94 * (diverged[0].astype(float) - diverged[1])


def intervals(kind, shift, widths=WIDTHS):
    """Means and half-widths, [trial, number of seeds - 1], in deviations of one difference."""
    values, n = noise(kind) + shift, np.arange(1, SEEDS + 1)
    means = values.cumsum(1) / n
    squares = (values**2).cumsum(1) - n * means**2
    with np.errstate(invalid="ignore"):
        return means, np.where(n > 1, (squares.clip(0) / np.maximum(n - 1, 1)) ** 0.5 * widths, math.inf)


def first(found):
    """At how many seeds each trial first has what is asked; 1,000 if it never has."""
    return np.where(found.any(1), found.argmax(1) + 1, 1000)


def wrong(kind, widths=WIDTHS):
    """The share of comparisons of equals that ever call a winner."""
    means, half = intervals(kind, 0.0, widths)
    return (np.abs(means) > half).any(1).mean()


@pytest.mark.parametrize("kind", ["normal", "t with 3 degrees", "diverged"])
def test_looking_often_does_not_make_it_wrong(kind):
    """The interval of one look, read at every look, is wrong several times as often as it says."""
    assert wrong(kind) <= ALPHA
    assert wrong(kind, NAIVE) > (4 if kind == "normal" else 2) * ALPHA


def test_the_width_is_the_set_of_means_that_the_bayes_factor_does_not_reject():
    """Against the integral over the effect size: a noncentral t density, weighted by a standard normal prior."""
    n, deviation = 12, 1.7
    t = compare.half_width(deviation, n, ALPHA) * n**0.5 / deviation
    effects = np.linspace(-8, 8, 4001)
    effects = np.linspace(-6, 6, 601)
    densities = stats.nct.pdf(t, n - 1, effects * n**0.5)
    factor = np.trapezoid(densities * stats.norm.pdf(effects), effects)
    assert factor / stats.t.pdf(t, n - 1) == pytest.approx(1 / ALPHA, rel=1e-4)
