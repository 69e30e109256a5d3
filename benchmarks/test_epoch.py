"""A whole shuffled epoch on the CPU: ours, the peers and the limits, in both precisions, in turn."""

import pytest

from benchmarks import harness
from benchmarks.conftest import BATCHES


def report(results, name, benchmark):
    """Hand the result of a contestant to the benchmark, and check that it has learnt something."""
    result = results[name]
    benchmark.extra_info |= {
        "samples_per_second": round(result.samples_per_second),
        **{key: round(value, 3) for key, value in harness.ratios(results, name).items()},
        "loss": result.loss,
    }
    harness.replay.report(benchmark, result.seconds)
    assert result.loss is None or result.loss < 2  # 2.3 is that of guessing


@pytest.mark.benchmark(group="epoch", timer=harness.replay)
@pytest.mark.parametrize("name", harness.contestants("cpu"))
@pytest.mark.parametrize("batch", BATCHES)
def test_epoch(batch, name, epochs, benchmark):
    if reason := harness.missing(harness.contestants("cpu")[name].kind):
        pytest.skip(reason)
    report(epochs(batch, "cpu"), name, benchmark)
