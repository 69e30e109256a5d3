"""The evaluation of 10,000 images against its matrix products alone, in turn."""

import pytest

from benchmarks import harness, limits, peers
from core.compile.device import to_device
from core.functional import step as steps


@pytest.fixture(scope="module")
def evaluations(data):
    work = peers.Work(data, 128)
    state = to_device(steps.init_state(work.spec), work.device)
    plays = {
        harness.OURS: lambda: steps.evaluate(
            state["params"], state["stats"], data.test_images, data.test_labels, work.spec
        ),
        limits.PRODUCTS: limits.evaluation_products(work, len(data.test_labels)),
    }
    seconds = harness.interleave({name: harness.timed(play) for name, play in plays.items()}, 15)
    return {name: harness.Result(seconds[name], len(data.test_labels), None) for name in plays}


@pytest.mark.benchmark(group="evaluation", timer=harness.replay)
@pytest.mark.parametrize("name", [harness.OURS, limits.PRODUCTS])
def test_evaluation(name, evaluations, benchmark, board):
    result = evaluations[name]
    times = 1 / result.ratio(evaluations[limits.PRODUCTS])
    benchmark.extra_info |= {"samples_per_second": round(result.samples_per_second), "times_products": round(times, 3)}
    if name == harness.OURS:
        board.lines.append(
            f"Evaluation of 10,000 images: {result.samples_per_second:,.0f} samples/s, "
            f"{times:.2f} times its matrix products"
        )
    harness.replay.report(benchmark, result.seconds)
