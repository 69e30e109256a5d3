"""The evaluation of 10,000 images against its matrix products alone, of the same precision, in turn."""

import pytest

from benchmarks import harness, limits, peers
from benchmarks.conftest import DEVICES
from core.compile.device import synchronize, to_device
from core.functional import step as steps


@pytest.fixture(scope="module")
def evaluations(data_on, choose):
    """A function from (device, precision) to the results of both."""
    done = {}

    def measure(device, precision):
        if (device, precision) not in done:
            data = data_on(device)
            work = peers.Work(data, 128, precision)
            state = to_device(steps.init_state(work.spec), work.device)

            def evaluate():
                steps.evaluate(state["params"], state["stats"], data.test_images, data.test_labels, work.spec)
                synchronize(work.device)

            images = len(data.test_labels)
            plays = {harness.OURS: evaluate, harness.PRODUCTS: limits.evaluation_products(work, images)}
            seconds = harness.interleave({name: harness.timed(play) for name, play in plays.items()}, choose(15, 5))
            done[device, precision] = {name: harness.Result(seconds[name], images, None) for name in plays}
        return done[device, precision]

    return measure


@pytest.mark.benchmark(group="evaluation", timer=harness.replay)
@pytest.mark.parametrize("name", [harness.OURS, harness.PRODUCTS])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", DEVICES)
def test_evaluation(device, precision, name, evaluations, benchmark, board):
    results = evaluations(device, precision)
    result = results[name]
    times = 1 / result.ratio(results[harness.PRODUCTS])
    benchmark.extra_info |= {"samples_per_second": round(result.samples_per_second), "times_products": round(times, 3)}
    if name == harness.OURS:
        board.lines.append(
            f"Evaluation of 10,000 images in {precision} on {device}: {result.samples_per_second:,.0f} samples/s, "
            f"{times:.2f} times its matrix products"
        )
    harness.replay.report(benchmark, result.seconds)
