"""Nothing is lost: processes of main.py are killed, stopped, run out of disk space and memory, and are resumed."""

import contextlib
import random
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from core.report import markdown
from core.runs import checkpoint
from core.runs.record import ResumePoint, Weights, read_record, read_records
from core.runs.resume import KEEP
from core.runs.run import Run
from core.store import locked
from tests.conftest import EXPERIMENTS, ROOT
from tests.test_reproducible import shapes

pytestmark = pytest.mark.slow
if not hasattr(signal, "SIGKILL"):
    pytest.skip("needs SIGKILL", allow_module_level=True)
EPOCHS = 10
OPTIONS = ("--no-compile", "--device", "cpu", "--batch-size", 200, "--checkpoint-every", 1)


@pytest.fixture(scope="module")
def smoke(data_dir):
    """A run of 100 steps."""
    return ("run", "smoke", *OPTIONS, "--data", data_dir, "--epochs", EPOCHS)


@pytest.fixture(scope="module")
def others(data_dir):
    """Two short runs."""
    return ("run", "smoke", "baseline", *OPTIONS, "--data", data_dir, "--epochs", 2)


def run_of(out, name="smoke", epochs=EPOCHS):
    return Run(name, {**EXPERIMENTS[name], "batch_size": 200, "epochs": epochs}, out)


def digest(out, name="smoke", epochs=EPOCHS):
    return read_record(run_of(out, name, epochs).record).digest


def finish(start, *argv, out):
    done = start(*argv, out=out)
    assert done.wait() == 0, done.output()
    return done.output()


@pytest.fixture(scope="module")
def uninterrupted(start, smoke, tmp_path_factory):
    """The digest of an uninterrupted run."""
    out = tmp_path_factory.mktemp("uninterrupted")
    finish(start, *smoke, out=out)
    return digest(out)


def assert_nothing_torn(out):
    """Every file with its final name is complete."""
    for path in out.rglob("*.safetensors"):
        checkpoint.load(path, ResumePoint if ".step-" in path.name else Weights, lambda _, path=path: shapes(path))
    for path in out.glob("checkpoints/*/*.json"):
        read_record(path)
    for path in out.glob("results.md"):
        assert re.fullmatch(r"# Results\n.*\n", path.read_text(), re.DOTALL)


def assert_nothing_left(out):
    """After the end of a run there is neither a temporary file nor a resume point."""
    left = [path.name for path in out.rglob("*") if ".tmp" in path.name or ".step-" in path.name]
    assert not left


# SIGKILL


def test_killed_at_twenty_random_moments(start, smoke, uninterrupted, tmp_path):
    draw, kills, resumed, runs = random.Random(4), 0, 0, 0
    while kills < 20:
        out = tmp_path / str(runs)
        process = start(*smoke, out=out)
        if kills % 2:  # half of them anywhere, start-up included; the others while it trains and saves
            process.until("epoch")
        time.sleep(draw.uniform(0, 0.6))
        process.signal(signal.SIGKILL)  # of one that has ended already it is a zombie, which takes it
        ended = process.wait()
        kills += ended == -signal.SIGKILL
        resumed += "resumed after step" in process.output()
        assert_nothing_torn(out)
        if ended != -signal.SIGKILL:
            assert ended == 0, process.output()
            assert digest(out) == uninterrupted
            runs += 1
    finish(start, *smoke, out=out)
    assert digest(out) == uninterrupted
    assert_nothing_left(out)
    assert resumed >= 5  # else the moments were all before the first resume point


SWEEP = """
import experiments
experiments.SUITES["tiny"] = {"tiny": {"widths": [[16], [8]], "lr": [1e-3, 5e-4], "epochs": 1, "batch_size": 500}}
"""


def test_a_sweep_killed_five_times_trains_only_what_is_missing(start, data_dir, tmp_path):
    """Twelve runs; killed somewhere after the 2nd, 4th, 6th, 8th and 10th."""
    command = ("run", "tiny", "--seeds", 3, "--no-compile", "--device", "cpu", "--data", data_dir)

    def finished(out):
        """The digest of every finished run, and what a rewritten record would change."""
        runs = [Run(record.name, record.spec, out) for record in read_records(out)]
        return {
            str(run.record.relative_to(out)): (found.digest, run.record.stat().st_ino, run.record.stat().st_mtime_ns)
            for run in runs
            if (found := run.result()) and not run.resume_points()
        }

    alone, out, draw = tmp_path / "uninterrupted", tmp_path / "killed", random.Random(12)
    process = start(*command, out=alone, patch=SWEEP)
    assert process.wait() == 0, process.output()
    before = {}
    for kill in range(5):
        patch = SWEEP + SLOW_SAVE.format(seconds=0.4)  # else it may end before it is killed
        process, end = start(*command, out=out, patch=patch), time.monotonic() + 120
        while len(finished(out)) < 2 * (kill + 1):
            assert time.monotonic() < end, process.output()
            time.sleep(0.05)
        time.sleep(draw.uniform(0, 0.1))
        process.signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, process.output()
        assert_nothing_torn(out)
        after = finished(out)
        assert before.items() <= after.items()
        before = after
    process = start(*command, out=out, patch=SWEEP)
    assert process.wait() == 0, process.output()
    assert f"{len(before)} of 12 runs are finished already" in process.output()
    after = finished(out)
    assert before.items() <= after.items()
    assert len(after) == 12
    assert {name: found[0] for name, found in after.items()} == {n: found[0] for n, found in finished(alone).items()}
    assert_nothing_left(out)


KILL_IN_FSYNC = """
import os, signal
calls, fsync = iter(range({n})), os.fsync
os.fsync = lambda file: fsync(file) if next(calls, None) is not None else os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_inside_every_write(start, smoke, tmp_path):
    """At each fsync, where a file is written and not yet renamed, or renamed and its folder not yet synced."""
    options = (*smoke[:-1], 1)
    finish(start, *options, out=tmp_path / "uninterrupted")
    n = 0
    while True:
        out = tmp_path / str(n)
        process = start(*options, out=out, patch=KILL_IN_FSYNC.format(n=n))
        if process.wait() == 0:
            break
        assert_nothing_torn(out)
        # A killed write leaves its temporary file, a completed one none.
        assert len(list(out.rglob("*.tmp"))) == (n + 1) % 2
        finish(start, *options, out=out)
        assert digest(out, epochs=1) == digest(tmp_path / "uninterrupted", epochs=1)
        assert_nothing_left(out)
        assert (out / "results.md").read_text().count("| smoke |") == 1
        n += 1
    assert n >= 12  # the resume point, weights, record, tables, picture, results.md; two syncs each


def compilers_of(pid, cache):
    """The processes, started by a process, that compile in a cache folder."""
    for child in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # It has ended.
            if any(str(cache) in word for word in child.cmdline()):
                yield child


@pytest.mark.parametrize("compiler_runs", [False, True])
def test_stopped_while_it_compiles(start, data_dir, tmp_path, compiler_runs):
    """Within two seconds on an idle machine; the C++ compiler ends too, and nothing of the compilation is left."""
    cache = tmp_path / "cache"
    arguments = ("run", "smoke", "--epochs", 1, "--batch-size", 499, "--device", "cpu", "--data", data_dir)
    process = start(*arguments, out=tmp_path, env={"TORCHINDUCTOR_CACHE_DIR": str(cache), "CXX": None})
    compilers, end = [], time.monotonic() + 120
    while not (compilers if compiler_runs else list(cache.glob("*.scratch"))):
        assert time.monotonic() < end, process.output()
        time.sleep(0.02)
        compilers = list(compilers_of(process.pid, cache))
    since = time.monotonic()
    process.signal(signal.SIGTERM)
    assert process.wait() == 130, process.output()
    assert time.monotonic() - since < 10, "it went on to compile"  # five times as long, for a busy machine
    assert process.output().endswith("compiled\nstopped before the first step\n")
    assert {path.suffix for path in cache.iterdir()} == {".lock"}
    with locked(next(cache.glob("*.lock")), timeout=0):
        pass
    _, left = psutil.wait_procs(compilers, timeout=10)
    assert not left


SIGNAL_IN_AN_IMPORT = """
import gc, os, signal
disable = gc.disable
def interrupt():
    gc.disable = disable
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(10**6):
            pass
    except BaseException:  # as C code does that imports a module
        print("swallowed")
gc.disable = interrupt
"""


def test_a_signal_cannot_get_lost_in_an_import(start, smoke, tmp_path):
    process = start(*smoke, out=tmp_path, patch=SIGNAL_IN_AN_IMPORT)
    assert process.wait() == 128 + signal.SIGTERM, process.output()
    assert process.output() == ""


def test_the_default_network_compiled_diverges(start, data_dir, tmp_path):
    process = start(
        "run",
        "lr-1e-3",
        "--lr",
        "1e30",
        "--epochs",
        1,
        "--batch-size",
        128,
        "--device",
        "cpu",
        "--data",
        data_dir,
        out=tmp_path,
    )
    assert process.wait() == 1
    assert "lr-1e-3 seed 0 failed: the loss or a gradient is NaN or infinite since step 2 (epoch 1)" in process.output()
    text = (tmp_path / "results.md").read_text()
    assert "lr-1e-3, seed 0, failed: the loss" in text
    assert "%" not in text


# Signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_says_how_to_go_on(start, smoke, uninterrupted, tmp_path, number):
    process = start(*smoke, out=tmp_path, patch=SLOW_SAVE.format(seconds=0.3))  # else it may end before the signal
    process.until("epoch 3")
    process.signal(number)
    assert process.wait() == 130
    (line,) = (line for line in process.output().splitlines() if "stopped" in line)
    step = int(line.split("after step ")[1].split()[0])
    assert step >= 30
    assert line.endswith("which is saved; the same command goes on from there")
    assert run_of(tmp_path).resume_points()[0] == run_of(tmp_path).resume_point(step)
    assert f"resumed after step {step} " in finish(start, *smoke, out=tmp_path)
    assert digest(tmp_path) == uninterrupted


def test_the_same_stop_from_two_senders_still_saves(start, smoke, uninterrupted, tmp_path):
    """`uv run` passes on a signal that its child has already had, as a supervisor signals the whole group."""
    for delay in (0, 0.3):
        process = start(*smoke, out=tmp_path, patch=SLOW_SAVE.format(seconds=0.4))
        process.until("first step" if delay else "epoch 1")
        process.signal(signal.SIGTERM)
        time.sleep(delay)
        process.signal(signal.SIGINT if delay else signal.SIGTERM)
        assert process.wait() == 130, f"the second signal cut the save off: {process.output()}"
        assert "which is saved; the same command goes on from there" in process.output()
    finish(start, *smoke, out=tmp_path)
    assert digest(tmp_path) == uninterrupted


SLOW_SAVE = """
import time, core.runs.resume as r
save = r.save
r.save = lambda *a: (print('saving', flush=True), time.sleep({seconds}), save(*a))
"""


def test_a_later_signal_stops_at_once(start, smoke, tmp_path):
    """Even a save that does not come to an end."""
    process = start(*smoke, out=tmp_path, patch=SLOW_SAVE.format(seconds=600))
    process.until("saving")
    process.signal(signal.SIGINT)
    time.sleep(1.5)
    process.signal(signal.SIGINT)
    assert process.wait() == 128 + signal.SIGINT


def test_with_nohup_a_hangup_stops_nothing(start, smoke, tmp_path):
    patch = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)"
    process = start(*smoke[:-1], 5, out=tmp_path, patch=patch)
    process.until("epoch 1")
    process.signal(signal.SIGHUP)
    assert process.wait() == 0, process.output()


def test_a_signal_before_the_first_step(start, smoke, tmp_path):
    patch = """
import time, core.compile.fused
core.compile.fused.fuse = lambda *_, **__: (print('compiling', flush=True), time.sleep(60))
"""
    process = start(*smoke, out=tmp_path, patch=patch)
    process.until("compiling")
    process.signal(signal.SIGTERM)
    assert process.wait() == 130
    assert "stopped before the first step\n" in process.output()


@pytest.mark.parametrize("delay", [0, 0.02, 0.1, 0.3, 1])
def test_a_signal_during_the_imports_prints_no_traceback(tmp_path, delay):
    """From the moment on that Python starts to execute main.py."""
    process = subprocess.Popen(
        (sys.executable, str(ROOT / "main.py"), "run", "smoke", "--out", str(tmp_path)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # ignored where the tests run in the background
    )
    termination = 1 << (signal.SIGTERM - 1)  # SIGHUP is ignored where the tests run under nohup
    status = f"/proc/{process.pid}/status"
    while not int(re.search(r"SigCgt:\s*(\w+)", open(status).read())[1], 16) & termination:  # noqa: SIM115
        time.sleep(0.001)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (130, 128 + signal.SIGINT)
    assert "Traceback" not in errors


def test_a_signal_in_the_last_epoch_starts_no_other_experiment(start, others, tmp_path):
    patch = """
import os, signal, core.session
finish = core.session.Session.finish
core.session.Session.finish = lambda self, *rest: (os.kill(os.getpid(), signal.SIGTERM), finish(self, *rest))[1]
"""
    process = start(*others[:-1], 1, out=tmp_path, patch=patch)
    assert process.wait() == 130, process.output()
    assert digest(tmp_path, epochs=1)
    assert not (tmp_path / "checkpoints" / "baseline").exists()


def test_a_signal_between_two_runs(start, others, tmp_path):
    patch = """
import os, signal, core.listeners.progress as p
ended = p.Display._say_result
p.Display._say_result = lambda self, *rest: (ended(self, *rest), os.kill(os.getpid(), signal.SIGTERM))
"""
    process = start(*others[:-1], 1, out=tmp_path, patch=patch)
    assert process.wait() == 130
    assert "stopped between two runs, 1 of 2 done; the same command goes on from there\n" in process.output()
    assert "1 of 2 runs are finished already" in finish(start, *others[:-1], 1, out=tmp_path)


# Two processes


def test_two_processes_share_the_experiments(start, others, smoke, tmp_path):
    epochs, out = 4, tmp_path / "both"
    both = (*others[:-1], epochs, "-v")
    first = start(*both, out=out, patch=SLOW_SAVE.format(seconds=0.8))
    first.until("smoke seed 0: epoch 1:")
    second = start(*both, out=out)
    second.until("taking the next one")
    assert f"smoke seed 0 is being trained by process {first.pid} on" in second.output()
    second.until("baseline seed 0: epoch 1:")
    assert first.wait() == 0, first.output()
    assert second.wait() == 0, second.output()
    assert "baseline seed 0 is being trained by process" in first.output() or "by another process" in first.output()
    finish(start, *smoke[:-1], epochs, out=tmp_path / "alone")
    assert digest(out, epochs=epochs) == digest(tmp_path / "alone", epochs=epochs)
    rows = [line for line in (out / "results.md").read_text().splitlines() if f" | {epochs} | " in line]
    assert {row.split(" | ")[0] for row in rows} == {"| smoke", "| baseline"}
    assert_nothing_left(out)


# The disk


LIMIT = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({n}, {n}))"


def test_a_full_disk_is_reported_before_the_first_epoch(start, smoke, tmp_path):
    for i, patch in enumerate(
        (LIMIT.format(n=100_000), "import shutil\nshutil.disk_usage = lambda _: shutil._ntuple_diskusage(9, 0, 9)")
    ):
        out = tmp_path / str(i)
        process = start(*smoke, out=out, patch=patch)
        assert process.wait() == 2
        assert f"cannot write {run_of(out).resume_point(10 * EPOCHS)}: " in process.output()
        assert "epoch" not in process.output()
        assert_nothing_left(out)


def test_training_again_keeps_the_old_result_until_it_is_replaced(start, smoke, tmp_path):
    """On a full disk, and when it is stopped; the second goes on without --force."""
    command = (*smoke[:-1], 3)
    finish(start, *command, out=tmp_path)
    run = run_of(tmp_path, epochs=3)
    before = run.record.read_bytes(), run.weights.read_bytes()
    process = start(*command, "--force", out=tmp_path, patch=LIMIT.format(n=100_000))
    assert process.wait() == 2
    assert (run.record.read_bytes(), run.weights.read_bytes()) == before
    assert run.result()
    process = start(*command, "--force", out=tmp_path, patch=SLOW_SAVE.format(seconds=0.5))
    process.until("epoch 1")
    process.signal(signal.SIGTERM)
    assert process.wait() == 130
    assert "; without --force, the same command goes on from there" in process.output()
    assert (run.record.read_bytes(), run.weights.read_bytes()) == before
    assert "smoke seed 0: resumed after step" in finish(start, *command, out=tmp_path)
    assert run.weights.read_bytes() == before[1]
    assert_nothing_left(tmp_path)


def test_a_disk_that_becomes_full_during_the_training(start, smoke, uninterrupted, tmp_path):
    patch = (
        """
import core.runs.resume
save, saves = core.runs.resume.save, iter(range(4))
def fill_up(*arguments):
    if next(saves, None) is None:
        """
        + LIMIT.format(n=100_000).replace("\n", "; ")
        + """
    save(*arguments)
core.runs.resume.save = fill_up
"""
    )
    process = start(*smoke, out=tmp_path, patch=patch)
    assert process.wait() == 2
    assert f"error: cannot write {run_of(tmp_path).resume_point(50)}: File too large" in process.output()
    assert not list(tmp_path.rglob("*.tmp"))
    assert run_of(tmp_path).resume_points() == [run_of(tmp_path).resume_point(n) for n in (40, 30)]
    assert_nothing_torn(tmp_path)
    finish(start, *smoke, out=tmp_path)
    assert digest(tmp_path) == uninterrupted


def test_results_that_cannot_be_written_stay_unchanged(start, smoke, tmp_path):
    finish(start, *smoke[:-1], 1, out=tmp_path)
    long = "import core.report.rebuild as r\nr.markdown.markdown = lambda *_: 'x' * 1_000_000\n"
    svg, text = b"<dc:identifier>" + b"0" * 64, markdown.HEADER.encode()  # as they are known to be ours
    for patch, name, old in (("", "checkpoints/learning-curves.svg", svg), (long, "results.md", text)):
        (tmp_path / name).write_bytes(old)
        process = start("report", out=tmp_path, patch=patch + LIMIT.format(n=500_000 if patch else 500))
        assert process.wait() == 2
        assert f"error: cannot write {tmp_path / name}" in process.output()
        assert (tmp_path / name).read_bytes() == old
    assert_nothing_left(tmp_path)


# NaN and memory


def assert_failed_alone(process, out, reason):
    """Smoke has failed in one line and claims no number, and the experiment after it has been trained."""
    assert process.wait() == 1, process.output()
    (line,) = (line for line in process.output().splitlines() if "smoke seed 0 failed" in line)
    assert reason in line
    (record,) = map(read_record, out.glob("checkpoints/smoke/*.json"))
    assert reason in record.error
    assert not {"metrics", "digest"} & set(record.__struct_fields__)
    text = (out / "results.md").read_text()
    assert [line for line in text.splitlines() if "smoke" in line] == [f"smoke, seed 0, failed: {record.error}."]
    assert "| baseline" in text
    assert digest(out, "baseline", 2)


def test_a_run_that_diverges(start, others, tmp_path):
    patch = "import experiments\nexperiments.SUITES['smoke']['smoke']['lr'] = 1e30"
    process = start(*others, out=tmp_path, patch=patch)
    assert_failed_alone(process, tmp_path, "NaN or infinite since step 2 (epoch 1)")


def test_a_run_that_diverges_later_keeps_its_resume_points(start, smoke, tmp_path):
    patch = """
import torch, core.compile.fused
fuse = core.compile.fused.fuse
def poisoned(spec, state, *rest, **options):
    made = fuse(spec, state, *rest, **options)
    def advance():
        if int(state["step"]) == 37:
            state["params"]["1.weight"].view(-1)[5] = torch.nan
        made.advance()
    return made._replace(advance=advance)
core.compile.fused.fuse = poisoned
"""
    process = start(*smoke, out=tmp_path, patch=patch)
    assert process.wait() == 1
    assert "NaN or infinite since step 38 (epoch 4)" in process.output()
    points = run_of(tmp_path).resume_points()
    assert points == [run_of(tmp_path).resume_point(n) for n in (30, 20)][:KEEP]
    assert_nothing_torn(tmp_path)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_run_that_needs_more_memory_than_there_is(start, others, tmp_path, compiled):
    """An allocation that truly fails: 17 GB under a limit of 8."""
    patch = """
import experiments, resource
experiments.SUITES['smoke']['smoke']['widths'] = [64, 65536, 65536]
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
"""
    if compiled:
        process = start("run", "smoke", *others[4:], out=tmp_path, patch=patch)
        assert process.wait() == 1
        assert "smoke seed 0 failed: out of memory on cpu" in process.output()
    else:
        assert_failed_alone(start(*others, out=tmp_path, patch=patch), tmp_path, "out of memory on cpu")


@pytest.mark.parametrize("error", ["torch.OutOfMemoryError('CUDA out of memory')", "MemoryError()"])
def test_other_errors_for_too_little_memory(start, others, tmp_path, error):
    """What a device or Python raises, which cannot be had at will."""
    patch = f"""
import torch, core.session
begin = core.session.Session.begin
def exhausted(self, *rest):
    if self.run.name == "smoke":
        raise {error}
    return begin(self, *rest)
core.session.Session.begin = exhausted
"""
    assert_failed_alone(start(*others, out=tmp_path, patch=patch), tmp_path, "out of memory on cpu")
