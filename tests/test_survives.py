"""Nothing is lost whatever happens: processes that are really killed, full disks, two at once, numbers that explode."""

import json
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

import main
from core import checkpoint, train
from core.spec import resolve, spec_id
from core.store import Run, StoreError, records
from experiments import EXPERIMENTS
from tests.conftest import ROOT
from tests.test_cli import call
from tests.test_reproducible import digest, shapes

KILLS = 20


def start(*arguments, script=None, **options):
    """main.py as a process that can be watched; `script` is run in its place."""
    command = ["-c", script] if script else [str(ROOT / "main.py")]
    return subprocess.Popen(
        (sys.executable, *command, *map(str, arguments)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        **options,
    )


def wait_for(process, words):
    """Read what a process prints until a line has these words."""
    for line in process.stdout:
        if words in line:
            return
    pytest.fail(f"the process ended without {words!r}: {process.stderr.read()}")


def assert_whole(out):
    """Every file that is there is whole: records parse, checkpoints load, results.md ends as it should."""
    records(out)
    for path in out.glob("checkpoints/*/*.safetensors"):
        checkpoint.load(path, lambda _, path=path: shapes(path))
    if (out / "results.md").exists():
        assert (out / "results.md").read_text().endswith("\n")


def leftovers(out):
    return [str(path) for path in out.rglob("*") if path.suffix == ".tmp" or ".step-" in path.name]


# Kills itself at the N-th renaming of a file, before it (even N) or after it (odd N); saves are most of these.
SUICIDAL = """
import os, signal, sys
sys.argv[0] = "main.py"
n = int(sys.argv.pop(1))
rename, count = os.replace, 0
def replace(*paths):
    global count
    count += 1
    if count == n // 2 and n % 2 == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(*paths)
    if count == n // 2:
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace
import main
sys.exit(main.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_killed_at_any_moment(data_dir, tmp_path):
    """Kills at random moments, and inside saves; then the run ends with the bits of one that nobody killed."""
    options = ("run", "smoke", "--epochs", 12, "--no-compile", "--device", "cpu", "--data", data_dir)
    whole = call(*options, "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    out, draw = tmp_path / "killed", random.Random(0)
    killed = 0
    for n in range(4, 13):
        process = start(n, *options, "--out", out, script=SUICIDAL)
        process.communicate(timeout=120)
        killed += process.returncode == -signal.SIGKILL
        assert_whole(out)
    assert killed >= 7
    while killed < KILLS:
        process = start(*options, "--out", out)
        try:
            process.communicate(timeout=draw.uniform(0.3, 3.5))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            killed += 1
        else:  # it got to the end: once more from the start
            assert digest(out, "smoke", epochs=12) == digest(tmp_path / "whole", "smoke", epochs=12)
            Run(out, "smoke", spec_id(resolve({**EXPERIMENTS["smoke"], "epochs": 12}))).clear()
        assert_whole(out)
    last = call(*options, "--out", out)
    assert last.returncode == 0, last.stderr
    assert digest(out, "smoke", epochs=12) == digest(tmp_path / "whole", "smoke", epochs=12)
    assert not leftovers(out)
    assert call("evaluate", "--data", data_dir, "--out", out).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(signum, data_dir, tmp_path):
    options = ("run", "smoke", "--epochs", 300, "--no-compile", "--device", "cpu", "--data", data_dir)
    process = start(*options, "--out", tmp_path)
    wait_for(process, "epoch 1:")
    sent = time.monotonic()
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert time.monotonic() - sent < 30
    assert "which is saved; the same command goes on from there" in errors
    assert "Traceback" not in errors
    run = Run(tmp_path, "smoke", spec_id(resolve({**EXPERIMENTS["smoke"], "epochs": 300})))
    step = int(run.resume_points()[0].name.split("-")[-1].split(".")[0])
    again = start(*options, "--out", tmp_path)
    wait_for(again, f"resumed after step {step} ")
    again.send_signal(signum)
    again.send_signal(signum)  # the second stops at once
    again.communicate(timeout=30)
    assert again.returncode != 0
    assert_whole(tmp_path)


@pytest.mark.slow
def test_two_processes_share_an_out(data_dir, tmp_path):
    """The second says who holds the run, takes the next one, and the lock of the first goes with its death."""
    options = ("--no-compile", "--device", "cpu", "--data", data_dir, "--out", tmp_path)
    first = start("run", "smoke", "--epochs", 300, *options)
    wait_for(first, "first step")
    second = call("run", "smoke", "--epochs", 300, *options)
    assert second.returncode == 0, second.stderr
    assert f"smoke is being trained by process {first.pid} on " in second.stderr
    assert call("run", "smoke", *options).returncode == 0  # another id, so another lock
    first.kill()
    first.communicate()
    third = start("run", "smoke", "--epochs", 300, *options)
    wait_for(third, "resumed after step")
    third.kill()
    third.communicate()
    assert digest(tmp_path, "smoke")


@pytest.mark.slow
def test_a_full_disk_is_named_and_nothing_is_torn(data_dir, tmp_path):
    """A limit on the size of files stands for the disk: known before an epoch is spent, and the old files intact."""
    options = ("--no-compile", "--device", "cpu", "--data", str(data_dir), "--out", str(tmp_path))
    assert call("run", "smoke", *options).returncode == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file() and path.suffix != ".lock"}

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    process = start("run", "smoke", "--seed", "1", *options, preexec_fn=limited)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "epoch 1" not in printed
    (line,) = errors.strip().splitlines()
    assert line.startswith(f"error: cannot write {tmp_path}/checkpoints/smoke/")
    assert not leftovers(tmp_path)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.slow
def test_numbers_that_explode_fail_one_experiment_alone(data_dir, tmp_path, monkeypatch):
    """Its record and results.md claim no number, the experiment after it is trained, the exit status says so."""
    monkeypatch.setitem(EXPERIMENTS, "explodes", {**EXPERIMENTS["smoke"], "lr": 1e30})
    status = main.main(
        ["run", "explodes", "smoke", "--no-compile", "--device", "cpu", "--data", str(data_dir), "--out", str(tmp_path)]
    )
    assert status == 1
    failed, finished = sorted(records(tmp_path), key=lambda r: r["status"])
    assert failed["status"] == "failed"
    assert "NaN or infinite since step" in failed["error"]
    assert finished["status"] == "finished"
    assert "metrics" not in failed
    (row,) = [line for line in (tmp_path / "results.md").read_text().splitlines() if line.startswith("| explodes")]
    assert not any(character.isdigit() for character in row.split("|", 4)[4])


def test_the_first_bad_step_is_named(tmp_path, invented, small_spec, monkeypatch):
    """One weight becomes infinite before step 20, in the middle of the second epoch."""
    run = Run(tmp_path, "x", "0" * 12)
    run.folder.mkdir(parents=True)
    training = train.Training(run, "x", small_spec(epochs=3), invented, torch.device("cpu"), compiled=False)
    fuse = train.jit.fuse

    def poisoned(spec, state, *rest):
        advance = fuse(spec, state, *rest)

        def step():
            if int(state["step"]) == 19:
                state["params"]["1.weight"][0, 0] = float("inf")
            advance()

        return step

    monkeypatch.setattr(train.jit, "fuse", poisoned)
    with pytest.raises(train.Diverged, match=r"since step 20 \(epoch 2\)"):
        training()
    assert [path.name.split("-")[1] for path in run.resume_points()] == ["0000000015.safetensors"]
    assert not run.record.exists()


@pytest.mark.slow
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()], ids=str)
def test_out_of_memory_fails_one_experiment_in_one_line(error, data_dir, tmp_path, monkeypatch, capsys):
    def exhausted(_):
        raise error

    monkeypatch.setattr(train.Training, "__call__", exhausted)
    arguments = ["run", "smoke", "--no-compile", "--device", "cpu", "--data", str(data_dir), "--out", str(tmp_path)]
    assert main.main(arguments) == 1
    assert capsys.readouterr().err.strip() == "smoke failed: out of memory on cpu"
    assert [record["status"] for record in records(tmp_path)] == ["failed"]


def test_a_damaged_record_is_named(tmp_path):
    path = tmp_path / "checkpoints" / "smoke" / f"{'0' * 12}.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"status": "finished"}))
    with pytest.raises(StoreError, match=str(path)):
        records(tmp_path)
