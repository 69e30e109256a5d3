"""Cohorts of 1 to 64 members: model-samples a second (images times members), against the same runs one by one."""

import pytest

from benchmarks import harness, peers
from benchmarks.conftest import DEVICES

NETWORKS = {"narrow": {"widths": [64, 32], "batch_size": 256}, "default": {"batch_size": 256}}
SIZES = {"narrow": (1, 4, 16, 64), "default": (1, 4)}  # 64 of the default network need 3 GB and a quarter of a minute


def build(entry, data, size, folder=None, compiled=True):
    """A cohort of a network, for a harness.Worker."""
    return peers.Runs(data, NETWORKS[entry.kind], size, compiled)


def against_one_by_one(results):
    """Size -> how many times as fast as the same runs one by one: these take that many times as long as one. Empty if
    that one did not take part."""
    return {size: size * result.ratio(results[1]) for size, result in results.items() if 1 in results}


@pytest.mark.benchmark(group="cohort", timer=harness.replay)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("network", NETWORKS)
def test_cohort(network, device, data_on, benchmark, board, choose):
    steps, images = 8, NETWORKS[network]["batch_size"]
    cohorts = {size: build(harness.Entry(network, "float32"), data_on(device), size) for size in SIZES[network]}
    plays = {str(size): harness.timed(lambda c=cohort: c.run(steps)) for size, cohort in cohorts.items()}
    seconds = harness.interleave(plays, choose(9, 5))
    found = {size: harness.Result(seconds[str(size)], steps * images * size, None) for size in SIZES[network]}
    ratios = against_one_by_one(found)
    for size, result in found.items():
        benchmark.extra_info[f"model_samples_per_second_{size}"] = round(result.samples_per_second)
        board.lines.append(
            f"Cohort of {size} ({network}, {device}): {result.samples_per_second:,.0f} model-samples/s, "
            f"{ratios[size]:.2f} times one by one"
        )
    harness.replay.report(benchmark, seconds["1"])
