"""A sweep on a Ray cluster of this machine against the same sweep in this process; the driver's own time a run."""

import importlib.util
import resource
import time

import pytest
from msgspec.structs import replace

from benchmarks import harness
from core import remote, run_experiment, session
from core.runs import record as records
from core.runs.run import Run
from core.spec import spec_id

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="uv run --group ray ... has it")

SMALL = {"widths": [256, 128], "batch_size": 256, "epochs": 3}


def groups(count, out, **changes):
    return [[Run("x", {**SMALL, **changes, "seed": seed}, out)] for seed in range(count)]


@pytest.mark.benchmark(group="remote", timer=harness.replay)
def test_two_workers_against_one_process(data, tmp_path, benchmark, board):
    """Twelve small runs: two workers of one thread, and one process of as many threads as it takes. The step is
    compiled before."""
    run_experiment("x", SMALL, tmp_path / "first", data, "cpu")
    start = time.perf_counter()
    for group in groups(12, tmp_path / "here"):
        session.run_cohort(group, data, "cpu", checkpoint_every=10**9)
    here = time.perf_counter() - start
    list(remote.train(groups(2, tmp_path / "warm"), data))  # compiles the step for one thread
    start = time.perf_counter()
    times = [time.perf_counter() - start for _ in remote.train(groups(12, tmp_path / "there"), data)]
    board.lines.append(
        f"Ray: 12 small runs take {here:.1f} s in one process and {times[-1]:.1f} s with two workers "
        f"({here / times[-1]:.2f} times as fast), of which {times[0]:.1f} s are until the first run has ended"
    )
    harness.replay.report(benchmark, [times[-1]])


@pytest.mark.benchmark(group="remote", timer=harness.replay)
def test_runs_that_end_at_once(data, tmp_path, benchmark, board, choose, monkeypatch):
    """The workers have nothing to do: they return one run under many names."""
    many, tiny = choose(10_000, 1_000), {"widths": [1], "epochs": 1}
    record = run_experiment("x", {**SMALL, **tiny}, tmp_path / "one", data, "cpu", compiled=False)
    file = Run("x", record.spec, tmp_path / "one").weights.read_bytes()
    made = records.encode(record)

    def task(software, group, *rest):
        [(name, spec)] = group
        found = replace(records.decode(made), name=name, spec=spec, spec_id=spec_id(spec), seed=spec["seed"])
        return [remote.Trained(records.encode(found), file)]

    monkeypatch.setattr(remote, "by_value", lambda: task)
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    done = sum(1 for _ in remote.train(groups(many, tmp_path / "many", **tiny), data))
    seconds, megabytes = (
        time.perf_counter() - start,
        (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
    )
    assert done == many
    board.lines.append(
        f"Ray: {many:,} runs that end at once take {seconds:.0f} s ({1000 * seconds / many:.1f} ms a run) and "
        f"{megabytes:.0f} MB more of this process"
    )
    harness.replay.report(benchmark, [seconds])
