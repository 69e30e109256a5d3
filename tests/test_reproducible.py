"""A run is a function of (spec, seed, data): the same bits again, and after a stop anywhere."""

import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from core import train
from core.runs import checkpoint
from core.runs.files import Run
from core.spec import resolve, spec_id
from experiments import EXPERIMENTS
from tests.conftest import ROOT
from tests.test_cli import call

CPU = torch.device("cpu")


def digest(out, name, **changes):
    run = Run(out, name, spec_id(resolve({**EXPERIMENTS[name], **changes})))
    return json.loads(run.record.read_text())["digest"]


@pytest.mark.slow
def test_processes_and_compile_caches(data_dir, tmp_path):
    """Compiled, with a warm cache and with one that is empty. Below, on the default network: the number of threads."""
    digests = []
    for i, env in enumerate(({}, {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")})):
        out = tmp_path / str(i)
        done = call("run", "smoke", "--device", "cpu", "--data", data_dir, "--out", out, **env)
        assert done.returncode == 0, done.stderr
        digests.append(digest(out, "smoke"))
    assert len(set(digests)) == 1
    other = tmp_path / "other"
    assert call("run", "smoke", "--seed", 1, "--data", data_dir, "--out", other).returncode == 0
    assert digest(other, "smoke", seed=1) != digests[0]  # a digest that never changes would prove nothing


@pytest.mark.slow
def test_verify_trains_again_and_compares(data_dir, tmp_path):
    assert call("run", "smoke", "--data", data_dir, "--out", tmp_path).returncode == 0
    done = call("verify", "smoke", "--data", data_dir, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "smoke: the same bits" in done.stdout
    record = Run(tmp_path, "smoke", spec_id(resolve(EXPERIMENTS["smoke"]))).record
    record.write_text(record.read_text().replace(digest(tmp_path, "smoke"), "0" * 64))
    done = call("verify", "smoke", "--data", data_dir, "--out", tmp_path)
    assert done.returncode == 1
    assert "DIFFERENT bits" in done.stdout


@pytest.mark.slow
def test_the_default_network_compiled_stopped_killed_and_resumed(data_dir, tmp_path):
    """The main job's own network: not stopped at all; with one thread; stopped by SIGTERM in the middle of its epoch,
    then killed, then left alone; and, as the negative control, with a state that lost its moments on the way."""
    options = ("run", "lr-1e-3", "--epochs", "1", "--device", "cpu", "--data", str(data_dir))
    changes = {"epochs": 1}

    def finish(out, **env):
        done = call(*options, "--out", tmp_path / out, **env)
        assert done.returncode == 0, done.stderr
        return digest(tmp_path / out, "lr-1e-3", **changes), done.stdout

    def cut(out, words, number):
        process = subprocess.Popen(
            (sys.executable, str(ROOT / "main.py"), *options, "--out", str(tmp_path / out)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for line in process.stdout:
            if words in line:
                process.send_signal(number)
                break
        _, errors = process.communicate(timeout=60)
        return process.returncode, errors

    whole, _ = finish("whole")
    assert finish("one thread", OMP_NUM_THREADS="1")[0] == whole
    status, errors = cut("cut", "first step", signal.SIGTERM)
    assert status == 130
    assert "goes on from there" in errors
    shutil.copytree(tmp_path / "cut", tmp_path / "control")
    assert cut("cut", "resumed after step", signal.SIGKILL)[0] == -signal.SIGKILL
    resumed, output = finish("cut")
    assert "resumed after step" in output
    assert resumed == whole

    run = Run(tmp_path / "control", "lr-1e-3", spec_id(resolve({**EXPERIMENTS["lr-1e-3"], **changes})))
    (path,) = run.resume_points()
    tensors, meta = checkpoint.load(path, lambda _: shapes(path))
    checkpoint.save(path, {n: torch.zeros_like(t) if "exp_avg/" in n else t for n, t in tensors.items()}, meta)
    assert finish("control")[0] != whole


def test_the_number_of_threads_could_matter():
    """The negative control of equal digests: a sum that torch shares between threads depends on their number."""
    threads = torch.get_num_threads()
    values = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0))
    try:
        sums = []
        for n in (1, 2, 3, 4):
            torch.set_num_threads(n)
            sums.append(values.sum().item())
    finally:
        torch.set_num_threads(threads)
    assert len(set(sums)) > 1


@pytest.fixture
def training(tmp_path, invented, small_spec):
    """A training of three epochs of 15 steps, eager, that can be stopped after any number of steps."""
    spec = small_spec(epochs=3)

    def make(out, stop_after=10**9, **options):
        run = Run(tmp_path / out, "x", spec_id(spec))
        run.folder.mkdir(parents=True, exist_ok=True)
        left = iter(range(stop_after))
        options = {"compiled": False, **options}
        return train.Training(run, "x", spec, invented, CPU, should_stop=lambda: next(left, None) is None, **options)

    return make


def stopped(training, out, after):
    """A run folder that was left in mid-run, and the newest of its resume points."""
    first = training(out, after)
    with pytest.raises(train.Interrupted):
        first()
    return first.run.resume_points()[0]


@pytest.mark.parametrize("after", [0, 7, 14, 15, 29, 40])
def test_a_resumed_run_is_the_uninterrupted_one(training, after):
    whole = training("whole")()
    stopped(training, "cut", after)
    events = []
    again = training("cut", listen=lambda event, details: events.append(event))()
    assert events[0] == "resumed"
    assert again["digest"] == whole["digest"]
    assert again["metrics"] == whole["metrics"]
    timeless = [[{k: v for k, v in e.items() if "second" not in k} for e in r["history"]] for r in (again, whole)]
    assert timeless[0] == timeless[1]
    assert again["bitwise"]
    assert not training("cut").run.resume_points()


@pytest.mark.parametrize("group", ["opt/exp_avg/", "opt/exp_avg_sq/", "stats/"])
def test_each_part_of_the_state_matters(training, group):
    """The negative control: without it, the comparison above could not fail."""
    whole = training("whole")()
    path = stopped(training, "cut", 20)
    tensors, meta = checkpoint.load(path, lambda _: shapes(path))
    dropped = {name: torch.zeros_like(t) if name.startswith(group) else t for name, t in tensors.items()}
    checkpoint.save(path, dropped, meta)
    assert training("cut")()["digest"] != whole["digest"]


def shapes(path):
    """What a resume point says of itself, which a program that trusts nothing would not ask."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return checkpoint.shapes_of({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118


@pytest.mark.parametrize("key", ["code", "torch", "hardware", "mode", "device"])
def test_resuming_elsewhere_is_refused_or_marked(training, key):
    path = stopped(training, "cut", 20)
    tensors, meta = checkpoint.load(path, lambda _: shapes(path))
    checkpoint.save(path, tensors, {**meta, "environment": {**meta["environment"], key: "another"}})
    with pytest.raises(train.ResumeError, match=f"{key} another .*--resume-anyway"):
        training("cut")()
    assert training("cut", loosely=True)()["bitwise"] is False


@pytest.mark.parametrize("change", [{"data": "other"}, {"spec": {"lr": 1}}], ids=str)
def test_resuming_on_other_data_or_another_spec_is_refused_or_marked(training, change):
    path = stopped(training, "cut", 20)
    tensors, meta = checkpoint.load(path, lambda _: shapes(path))
    checkpoint.save(path, tensors, {**meta, **change})
    with pytest.raises(train.ResumeError, match=f"another {next(iter(change))}: .*--resume-anyway"):
        training("cut")()
    assert training("cut", loosely=True)()["bitwise"] is False


def test_what_began_eager_goes_on_eager(training):
    """As where compiling had failed: the same command must go on, bit by bit."""
    whole = training("whole")()
    stopped(training, "cut", 20)
    again = training("cut", compiled=True)()
    assert again["environment"]["mode"] == "eager"
    assert again["bitwise"]
    assert again["digest"] == whole["digest"]


def test_a_signal_between_the_end_of_an_epoch_and_its_save(training):
    """Whatever moment it comes at: what is said to be saved is."""
    for moment in range(15, 19):
        asked = iter(range(10**9))
        out = str(moment)
        run = training(out, every=2)
        run.should_stop = lambda asked=asked, moment=moment: next(asked) >= moment
        with pytest.raises(train.Interrupted) as stop:
            run()
        step = int(str(stop.value).split("after step ")[1].split()[0])
        assert run.run.resume_points()[0] == run.run.resume_point(step)


def test_the_newest_damaged_falls_back_to_the_one_before_loudly(training):
    whole = training("whole")()
    newest = stopped(training, "cut", 40)
    points = training("cut").run.resume_points()
    assert len(points) == train.KEEP
    newest.write_bytes(newest.read_bytes()[:-1])
    events = []
    again = training("cut", listen=lambda *event: events.append(event))()
    assert [event for event, _ in events[:2]] == ["damaged", "resumed"]
    assert str(newest) in events[0][1]["reason"]
    assert again["digest"] == whole["digest"]


@pytest.mark.parametrize("key", ["spec", "data", "environment", "progress"])
def test_a_resume_point_that_lacks_something_is_damaged(training, key):
    """Though rightly signed: the one before is good."""
    newest = stopped(training, "cut", 40)
    tensors, meta = checkpoint.load(newest, lambda _: shapes(newest))
    checkpoint.save(newest, tensors, {k: v for k, v in meta.items() if k != key})
    events = []
    training("cut", listen=lambda *event: events.append(event))()
    assert [event for event, _ in events[:2]] == ["damaged", "resumed"]


def test_all_damaged_is_refused_and_nothing_restarts(training):
    stopped(training, "cut", 40)
    points = training("cut").run.resume_points()
    for path in points:
        path.write_bytes(b"")
    with pytest.raises(train.ResumeError, match="every resume point of x is damaged"):
        training("cut")()
    assert training("cut").run.resume_points() == points


def test_two_runs_of_one_folder_are_the_same_bits(training, tmp_path):
    first = training("a")()
    shutil.rmtree(tmp_path / "a")
    assert training("a")()["digest"] == first["digest"]
