"""The contestants of the benchmarks train what they should; what they measure is left to benchmarks/."""

import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

import conftest
from benchmarks import gpu, harness, test_cohort
from tests.conftest import ROOT, lacking

# What is compiled is left out, as that takes half a minute: our step has tests of its own, and what torch.compile
# compiles is the eager contestant. JAX and Keras, which take a quarter of a minute, learn in bfloat16 alone.
TRIED = [
    name
    for name, entry in harness.contestants("cpu").items()
    if entry.kind not in (harness.OURS, "compiled")
    and (entry.kind not in harness.NEEDS or entry.precision == "bfloat16")
]


@pytest.fixture
def losses(cifar10, data_dir):
    """The mean loss of a contestant's first two steps, and of the next twenty."""

    def measure(entry):
        if entry.kind in harness.NEEDS:  # JAX has threads, and a process that has them must not fork, as others here do
            worker = harness.Worker(entry, "cpu", data_dir)
            worker.build(128)
            run, loss = worker.run, lambda: worker.loss
        else:
            contestant = harness.build(entry, cifar10, 128, data_dir)
            run, loss = contestant.run, contestant.loss
        found = []
        for steps in (2, 20):
            run(steps)
            found.append(loss())
        if entry.kind in harness.NEEDS:
            worker.close()
        return found

    return measure


@pytest.mark.slow
@pytest.mark.parametrize("name", TRIED)
def test_a_contestant_learns(losses, name):
    """The loss starts at about ln(10) = 2.3, that of guessing, and falls."""
    entry = harness.contestants("cpu")[name]
    if reason := harness.missing(entry.kind):
        lacking(reason)
    first, later = losses(entry)
    if entry.kind in (harness.PRODUCTS, harness.LIMIT):
        assert (first, later) == (None, None)
    else:
        assert 2 < first < 3
        assert 1.5 < later < first - 0.1


def test_contestants_in_each_precision():
    """All but the naive one, which has one form."""
    names = harness.contestants("cpu")
    assert set(names) == {f"{k} {p}" for k in harness.KINDS for p in ("float32", "bfloat16")} - {"naive bfloat16"}
    assert {f"{kind} tf32" for kind in harness.KINDS if kind != "naive"} < set(harness.contestants("cuda"))


def test_a_missing_package_is_named_with_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "jax" else name)
    for kind in harness.NEEDS:
        assert harness.missing(kind) == "skipped: jax not installed (`uv sync --group peers`)"
    assert harness.missing("eager") is None


def test_ratios_take_the_peer_and_the_limit_of_the_precision():
    seconds = {
        "ours float32": 2,
        "ours bfloat16": 1,
        "eager float32": 3,
        "eager bfloat16": 4,  # slower than in float32, as where products in bfloat16 are emulated
        "naive float32": 8,
        "products + Adam float32": 2,
        "products + Adam bfloat16": 0.5,
    }
    results = {name: harness.Result([s, s, s], 100, None) for name, s in seconds.items()}
    assert harness.fastest_peer(results) == "eager float32"
    assert harness.fastest_peer(results, "tf32") is None
    expected = {"to_naive": 8, "to_peer": 4, "to_any_peer": 3, "to_limit": 0.5}
    assert harness.ratios(results, "ours bfloat16") == expected  # no to_jax, as it did not take part
    results["jax float32"] = harness.Result([2.5] * 3, 100, None)
    assert harness.ratios(results, "ours float32") == {
        "to_naive": 4,
        "to_jax": 1.25,
        "to_peer": 1.25,
        "to_any_peer": 1.25,
        "to_limit": 1,
    }


def test_contestants_take_turns_after_a_round_that_does_not_count():
    turns, clock = [], itertools.count()
    plays = {name: lambda name=name: turns.append(name) or next(clock) for name in "ab"}
    assert harness.interleave(plays, 2) == {"a": [2, 4], "b": [3, 5]}
    assert turns == list("ababab")


def test_contestants_that_are_not_ready_are_left_out_after_one_wait():
    """However many there are."""

    class Stuck:
        def __init__(self):
            self.killed = threading.Event()
            self.process = SimpleNamespace(kill=self.killed.set)

        def build(self, value):
            assert self.killed.wait(60)
            raise EOFError

    def fail(value):
        raise RuntimeError(f"no batch of {value}")

    ready = SimpleNamespace(build=lambda value: None, run=lambda steps: None)
    workers = {"ready": ready, "broken": SimpleNamespace(build=fail), **{f"stuck {i}": Stuck() for i in range(20)}}
    start = time.perf_counter()
    found = harness.prepare(workers, dict.fromkeys(workers, 128), 0.5)
    assert time.perf_counter() - start < 5
    assert found.pop("broken") == "no batch of 128"
    assert found == {name: "not ready after 0.5 s" for name in workers if "stuck" in name}


@pytest.mark.parametrize("size", [1, 2])
def test_runs_learn_together(cifar10, size):
    """Each member has the loss of guessing at first, and a lower one later."""
    runs = test_cohort.build(harness.Entry("narrow", "float32"), cifar10, size, compiled=False)
    losses = runs.state["metrics"]["loss"]
    runs.run(2)
    first = losses.clone() / (2 * 256)
    assert ((first > 2) & (first < 3)).all()
    losses.zero_()
    runs.run(20)
    assert (losses / (20 * 256) < first - 0.1).all()
    assert runs.state["step"].tolist() == ([22, 22] if size == 2 else 22)


@pytest.mark.slow
def test_what_a_gpu_says_is_kept_section_by_section(data_dir, tmp_path, monkeypatch):
    """In small, on the CPU: sections that finish, one that fails, one that is cut off, and one that is not started."""
    finish = ("epoch-512", "cohorts", "recipe")
    limits = {"start": 0.5, **dict.fromkeys(finish, 60), "epoch-none": 60, "verify": 10_000}
    monkeypatch.setattr(gpu, "LIMITS", limits)
    monkeypatch.setattr(gpu, "SMALL_LIMIT", 10_000)
    out = tmp_path / "out"
    folders = ("--out", str(out), "--work", str(tmp_path / "work"))
    assert gpu.main([*limits, "--small", *folders, "--data", str(data_dir)]) == 1
    assert {file.name for file in out.iterdir()} == {f"{section}.json" for section in limits}
    found = {section: json.loads((out / f"{section}.json").read_text()) for section in limits}
    assert found["start"]["status"] == "cut off after 0.5 s"
    assert found["verify"]["status"].startswith("not started: it may take 10000 s")
    assert found["epoch-none"]["status"] == "failed, exit status 2: see the log"
    assert "invalid choice" in found["epoch-none"]["log"][-1]
    assert {found[section]["status"] for section in finish} == {"finished"}, found
    assert found["epoch-512"]["machine"]["device"] == "cpu"
    _, after_round, *rest = found["epoch-512"]["results"]
    assert after_round["seconds"].keys() == set(gpu.SMALL.contestants)
    speeds = {each["contestant"]: each["samples_per_second"] for each in rest if "samples_per_second" in each}
    assert speeds.keys() == set(gpu.SMALL.contestants)
    assert all(speed > 0 for speed in speeds.values())
    _, *together = found["cohorts"]["results"]
    assert [each["cohort"] for each in together] == [1, 2]
    assert together[0]["times_one_by_one"] == 1
    [trained] = found["recipe"]["results"]
    assert [record["name"] for record in trained["records"]] == ["demo"]
    written = (out / "recipe.json").read_bytes()
    monkeypatch.setattr(gpu, "SECONDS", 0)
    assert gpu.main(["recipe", "--small", *folders]) == 1
    assert (out / "recipe.json").read_bytes() == written, "not started: the earlier results stay"


@pytest.mark.parametrize(
    ("args", "source", "only", "taken", "workers"),
    [
        (["tests"], "TESTPATHS", False, ["tests"], 2),
        (["tests"], "TESTPATHS", True, [str(conftest.BENCHMARKS)], 0),
        (["benchmarks"], "ARGS", False, ["benchmarks"], 0),
        (["benchmarks/test_step.py::test_step"], "ARGS", True, ["benchmarks/test_step.py::test_step"], 0),
        (["tests", "benchmarks"], "ARGS", False, ["tests", "benchmarks"], 0),
    ],
)
def test_benchmarks_run_alone_and_only_when_asked_for(args, source, only, taken, workers):
    source = pytest.Config.ArgsSource[source]
    config = SimpleNamespace(args=args, args_source=source, option=SimpleNamespace(benchmark_only=only))
    conftest.pytest_cmdline_main(config)
    assert config.args == taken
    assert conftest.pytest_xdist_auto_num_workers(config) == workers


@pytest.mark.slow
def test_benchmark_only_without_a_path():
    """In a process of its own: all benchmarks are collected, and the cheapest one runs on all cores."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "OMP"))}
    command = (sys.executable, "-m", "pytest", "--benchmark-only", "-k", "test_write", "-p", "no:cacheprovider")
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"collected (\d+) items / (\d+) deselected / 1 selected", done.stdout)
    assert found, done.stdout
    assert int(found[2]) > 100
    assert "1 passed" in done.stdout
    assert os.cpu_count() == 1 or ", 1 threads" not in done.stdout
