"""The fused step against the limits, and what it costs outside the compiled graph."""

import time

import pytest
import torch

from benchmarks import harness, peers

KINDS = (harness.OURS, harness.PRODUCTS, harness.LIMIT)


@pytest.fixture(scope="module")
def steps(data, choose):
    """A function from (batch size, precision) to the results of ours and the limits, in rounds of one step."""
    done = {}

    def measure(batch: int, precision: str) -> dict[str, harness.Result]:
        if (batch, precision) not in done:
            contestants = {kind: harness.build(harness.Entry(kind, precision), data, batch) for kind in KINDS}
            plays = {kind: harness.timed(lambda c=c: c.run(1)) for kind, c in contestants.items()}
            seconds = harness.interleave(plays, choose(60, 20))
            done[batch, precision] = {
                kind: harness.Result(seconds[kind], batch, c.loss()) for kind, c in contestants.items()
            }
        return done[batch, precision]

    return measure


@pytest.mark.benchmark(group="step", timer=harness.replay)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", harness.PRECISIONS["cpu"])
@pytest.mark.parametrize("batch", [128, 256, 512])
def test_step(batch, precision, kind, steps, benchmark):
    results = steps(batch, precision)
    benchmark.extra_info |= {
        "samples_per_second": round(results[kind].samples_per_second),
        "to_limit": round(results[kind].ratio(results[harness.LIMIT]), 3),
        "loss": results[kind].loss,
    }
    harness.replay.report(benchmark, results[kind].seconds)


@pytest.mark.benchmark(group="overhead", timer=harness.replay)
def test_overhead(data, benchmark, board, monkeypatch):
    """The seconds of a step of batch 128 that pass outside the call of the compiled library."""
    work = peers.Work(data, 128)
    inside = [0.0]

    class Watched(torch._C._aoti.AOTIModelContainerRunnerCpu):
        def run(self, *args):
            start = time.perf_counter()
            try:
                return super().run(*args)
            finally:
                inside[0] += time.perf_counter() - start

    monkeypatch.setattr(torch._C._aoti, "AOTIModelContainerRunnerCpu", Watched)
    advance = harness.timed(peers.Ours(work).advance)
    outside, total = [], []
    for _ in range(110):
        inside[0] = 0.0
        total.append(advance())
        outside.append(total[-1] - inside[0])
    if not inside[0]:
        pytest.skip("the step does not call the library that this test watches")
    share = sum(outside[10:]) / sum(total[10:])
    benchmark.extra_info["share_of_step"] = round(share, 5)
    board.lines.append(f"Outside the compiled library at batch 128: {share:.2%} of the step")
    harness.replay.report(benchmark, outside[10:])
