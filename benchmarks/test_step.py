"""The fused step against the limits, and what it costs outside the compiled graph."""

import time

import pytest
import torch

from benchmarks import harness, limits, peers


@pytest.fixture(scope="module")
def steps(data):
    """A function from a batch size to the result of ours and the limits, in rounds of a few steps."""
    done = {}

    def measure(batch: int) -> dict[str, harness.Result]:
        if batch not in done:
            work = peers.Work(data, batch)
            contestants = {name: harness.CONTESTANTS[name](work) for name in (harness.OURS, *limits.LIMITS)}
            plays = {name: harness.timed(lambda c=c: c.run(1)) for name, c in contestants.items()}
            seconds = harness.interleave(plays, 60)
            done[batch] = {name: harness.Result(seconds[name], batch, c.loss()) for name, c in contestants.items()}
        return done[batch]

    return measure


@pytest.mark.benchmark(group="step", timer=harness.replay)
@pytest.mark.parametrize("name", [harness.OURS, *limits.LIMITS])
@pytest.mark.parametrize("batch", [128, 256, 512])
def test_step(batch, name, steps, benchmark):
    results = steps(batch)
    benchmark.extra_info |= {
        "samples_per_second": round(results[name].samples_per_second),
        "to_limit": round(results[name].ratio(results[limits.LIMIT]), 3),
        "loss": results[name].loss,
    }
    harness.replay.report(benchmark, results[name].seconds)


@pytest.mark.benchmark(group="overhead", timer=harness.replay)
def test_overhead(data, benchmark, board, monkeypatch):
    """The seconds of a step of batch 128 that pass outside the call of the compiled library."""
    work = peers.Work(data, 128)
    if work.device.type != "cpu":
        pytest.skip("on this device a step is one replay of a graph, and the host does not wait for it")
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
    outside, whole = [], []
    for _ in range(110):
        inside[0] = 0.0
        whole.append(advance())
        outside.append(whole[-1] - inside[0])
    if not inside[0]:
        pytest.skip("the step does not call the library that this test watches")
    share = sum(outside[10:]) / sum(whole[10:])
    benchmark.extra_info["share_of_step"] = round(share, 5)
    board.lines.append(f"Outside the compiled library at batch 128: {share:.2%} of the step")
    harness.replay.report(benchmark, outside[10:])
