"""A run is a function of (spec, seed, data): the same bits again, and after a stop anywhere."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from core import run_experiment
from core.compile import fused
from core.errors import UserError
from core.events import EpochDone, ModeChanged, Notice, Stopped
from core.mode import COMPILED, Mode
from core.runs import checkpoint
from core.runs.provenance import environment
from core.runs.record import Partial, ResumePoint, read_record
from core.runs.resume import KEEP, ResumeError
from core.runs.run import Run
from tests.conftest import EXPERIMENTS, MUON, ROOT, Events


def run_of(out, name, **changes):
    return Run(name, {**EXPERIMENTS[name], **changes}, out)


def digest(out, name, **changes):
    return read_record(run_of(out, name, **changes).record).digest


# Processes of main.py

# From the second epoch on each step takes a tenth of a second, so that a signal comes before the end on a busy machine.
SLOW = """
import time, core.compile.fused
fuse = core.compile.fused.fuse
def slow(spec, state, data, *rest, **options):
    made = fuse(spec, state, data, *rest, **options)
    def advance():
        time.sleep(0.1 * (int(state["step"]) >= len(data["order"])))
        made.advance()
    return made._replace(advance=advance)
core.compile.fused.fuse = slow
"""


def test_a_project_that_cannot_be_written_trains(data_dir, tmp_path):
    """As in a container, or installed for several users; below, it compiles too."""
    project = tmp_path / "project"
    project.mkdir()
    for name in ("core", "experiments", "main.py"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, project / name)
    project.chmod(0o555)
    bound = ["setpriv", "--bounding-set=-dac_override"] if os.geteuid() == 0 else []
    options = ["run", "smoke", "--no-compile", "--epochs", 1, "--batch-size", 5000]
    options += ["--data", data_dir, "--out", tmp_path / "out"]
    done = subprocess.run(
        (*bound, sys.executable, str(project / "main.py"), *map(str, options)), capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_verify_trains_again_and_compares(call, tmp_path):
    """What decides the bits of MKL is recorded, and named where it is set from outside now."""
    assert call("run", "smoke", "--no-compile", out=tmp_path, all_images=False).returncode == 0
    done = call("verify", "smoke", out=tmp_path, all_images=False)
    assert done.returncode == 0, done.stderr
    assert "smoke seed 0: the same bits" in done.stdout
    record = run_of(tmp_path, "smoke").record
    assert read_record(record).environment.settings == "MKL_CBWR=AUTO,STRICT"
    record.write_text(record.read_text().replace(digest(tmp_path, "smoke"), "0" * 64))
    done = call("verify", "smoke", out=tmp_path, all_images=False)
    assert done.returncode == 1
    assert "DIFFERENT bits" in done.stderr
    assert "to be expected" not in done.stderr
    done = call("verify", "smoke", "--quiet", out=tmp_path, all_images=False, env={"MKL_CBWR": "COMPATIBLE"})
    assert "DIFFERENT bits" in done.stderr
    assert "the recorded run had settings MKL_CBWR=AUTO,STRICT (now MKL_CBWR=COMPATIBLE)" in done.stderr


@pytest.mark.slow
@pytest.mark.longest
def test_the_default_network_compiled_stopped_killed_and_resumed(start, data_dir, tmp_path):
    """Three runs: one is not stopped, one has two threads, one is stopped by SIGTERM in the middle of its epoch, then
    killed, then finished. The negative control is in the next test."""
    changes = {"epochs": 2, "batch_size": 128}
    options = ("run", "lr-1e-3", "--epochs", 2, "--batch-size", 128, "--device", "cpu", "--data", data_dir)

    def finish(out, **how):
        process = start(*options, out=tmp_path / out, **how)
        assert process.wait() == 0, process.output()
        return digest(tmp_path / out, "lr-1e-3", **changes), process.output()

    def cut(out, words, number):
        process = start(*options, out=tmp_path / out, patch=SLOW)
        process.until(words)
        process.signal(number)
        return process.wait(), process.output()

    expected, _ = finish("uninterrupted")
    assert finish("two threads", threads=2)[0] == expected
    status, output = cut("cut", "epoch 1", signal.SIGTERM)
    assert status == 130
    assert "goes on from there" in output
    assert cut("cut", "resumed after step", signal.SIGKILL)[0] == -signal.SIGKILL
    resumed, output = finish("cut")
    assert "resumed after step" in output
    assert resumed == expected


@pytest.mark.slow
@pytest.mark.longest
def test_muon_in_bfloat16_compiled_stopped_and_with_another_number_of_threads(start, data_dir, tmp_path):
    """With clipping, and Adam for what Muon does not train. On AMX, oneDNN shares the terms of a sum between threads,
    so there the number of threads is recorded as deciding the bits; held to AVX-512 it does not. With two threads it is
    compiled anew, as nothing can be written into the project. The negative control loses the momentum."""
    changes = {**MUON, "epochs": 2}
    suite = f"import experiments; experiments.SUITES['muon'] = {{'muon': {changes}}}\n"

    def begin(out, isa="ALL", home=None, patch="", **how):
        env = {"ONEDNN_MAX_CPU_ISA": isa} | ({"XDG_CACHE_HOME": str(home)} if home else {})
        command = ("run", "muon", "--device", "cpu", "--data", data_dir)
        return start(*command, out=tmp_path / out, env=env, patch=suite + patch, **how)

    def finish(out, *options, **how):
        process = begin(out, *options, **how)
        assert process.wait() == 0, process.output()
        record = read_record(run(out).record)
        assert record.environment.mode == "compiled"
        return record.digest, process.output()

    def run(out):
        return Run("muon", changes, tmp_path / out)

    held, _ = finish("held", "AVX512_CORE_BF16")
    home, patch = tmp_path / "home", "import pathlib, core.compile.cache as c\nc.PROJECT = pathlib.Path('/sys/x')"
    again, output = finish("two threads", "AVX512_CORE_BF16", home=home, patch=patch, threads=2)
    assert re.search(rf"cannot use /sys/x/.cache \(.*\): compiled steps are kept in {home}", output)
    assert list(home.rglob("*.so")), "nothing was compiled"
    assert again == held

    expected, _ = finish("uninterrupted")
    process = begin("cut", patch=SLOW)
    process.until("epoch 1")
    process.signal(signal.SIGTERM)
    assert process.wait() == 130, process.output()
    shutil.copytree(tmp_path / "cut", tmp_path / "control")
    assert finish("cut")[0] == expected
    for path in run("control").resume_points():
        edit(path, drop=["opt/momentum/"])
    assert finish("control")[0] != expected


def test_bfloat16_on_amx_records_the_threads(monkeypatch, tmp_path, invented, small_spec):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True, "avx512_bf16": True})
    cpu, threads = torch.device("cpu"), f"{torch.get_num_threads()} threads"
    assert environment(cpu, COMPILED, bfloat16=True).hardware.endswith(f" amx_bf16, {threads}")
    assert environment(cpu, COMPILED).hardware.endswith(" amx_bf16")
    record = run_experiment("x", small_spec(epochs=1, optimizer="muon"), tmp_path, invented, "cpu", compiled=False)
    assert record.environment.hardware.endswith(threads), "the products inside Muon are in bfloat16"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": False, "avx512_bf16": True})
    assert environment(cpu, COMPILED, bfloat16=True).hardware.endswith(" avx512_bf16")


def test_emulated_bfloat16_is_reported(tmp_path, invented, small_spec, monkeypatch):
    def reasons(precision, optimizer="adam"):
        events = Events()
        spec = small_spec(epochs=1, precision=precision, optimizer=optimizer)
        run_experiment("x", spec, tmp_path, invented, "cpu", [events], compiled=False, force=True)
        return [event.reason for event in events.of(Notice)]

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True})
    assert not reasons("float32")
    assert "float32 is faster here" in "".join(reasons("bfloat16"))
    assert "another optimizer than Muon is faster here" in "".join(reasons("float32", "muon"))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert not reasons("bfloat16")


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


# run_experiment


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, invented):
    """The record of an uninterrupted eager run, trained once for all tests."""
    out = tmp_path_factory.mktemp("uninterrupted")
    return lambda spec: run_experiment("x", spec, out, invented, "cpu", compiled=False)


@pytest.fixture
def train(request, tmp_path, invented, small_spec, uninterrupted):
    """Trains three epochs of 15 steps, eager, and can be stopped after any number of steps; returns the record. `param`
    changes the network; `uninterrupted` returns the record of the uninterrupted run."""
    spec = small_spec(epochs=3, **getattr(request, "param", {}))

    def train(out, stop_after=10**9, **options):
        left = iter(range(stop_after))
        stop = {"should_stop": lambda: next(left, None) is None}
        return run_experiment("x", spec, tmp_path / out, invented, "cpu", **{"compiled": False, **stop, **options})

    train.run = lambda out: Run("x", spec, tmp_path / out)
    train.uninterrupted = lambda: uninterrupted(spec)
    return train


def stopped(train, out, after):
    """The newest resume point of a run that was stopped."""
    assert isinstance(train(out, after), Stopped)
    return train.run(out).resume_points()[0]


def edit(path, drop=(), **changes):
    """Sign a resume point again, with other metadata."""
    tensors, about = checkpoint.load(path, ResumePoint, lambda _: shapes(path))
    for key, value in changes.items():
        setattr(about, key, value)
    checkpoint.save(
        path, {n: torch.zeros_like(t) if n.startswith(tuple(drop)) else t for n, t in tensors.items()}, about
    )


def shapes(path):
    """The shapes and dtypes of the tensors in a file, which is not checked."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return checkpoint.shapes_of({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118


def test_a_run_reports_its_events(train):
    events = Events()
    record = train("uninterrupted", listeners=[events])
    assert events.kinds() == ["Started", "FirstStep", "EpochDone", "EpochDone", "EpochDone", "Ended"]
    assert [event.epoch for event in events.of(EpochDone)] == [1, 2, 3]
    assert [event.lr for event in events.of(EpochDone)] == [pytest.approx(record.spec["lr"])] * 3
    assert events[-1].record == record
    assert [entry.val_accuracy for entry in record.history] == [event.val_accuracy for event in events.of(EpochDone)]
    assert record == read_record(train.run("uninterrupted").record)


def test_a_finished_run_is_not_trained_again_without_force(train):
    first, events = train("uninterrupted"), Events()
    assert train("uninterrupted", listeners=[events]) == first
    assert events.kinds() == ["Ended"]
    again = train("uninterrupted", listeners=[events], force=True)
    events.pop(0)
    assert events.kinds()[:2] == ["Started", "FirstStep"]
    assert again.digest == first.digest


@pytest.mark.parametrize(
    ("train", "after"),
    [
        *(({}, after) for after in (1, 7, 14, 15, 16, 29, 40)),
        ({"norm": "layer", "expansion": 4}, 20),
        ({"locality": [2, 5], "ema": 0.9}, 20),
    ],
    indirect=["train"],
    ids=str,
)
def test_a_resumed_run_is_the_uninterrupted_one(train, after):
    expected = train.uninterrupted()
    stopped(train, "cut", after)
    events = Events()
    again = train("cut", listeners=[events])
    assert events.kinds()[:2] == ["Started", "Resumed"]
    assert again.digest == expected.digest
    assert again.metrics == expected.metrics
    timeless = [
        [(e.epoch, e.train_loss, e.train_accuracy, e.val_loss, e.val_accuracy) for e in record.history]
        for record in (again, expected)
    ]
    assert timeless[0] == timeless[1]
    assert again.exact
    assert not train.run("cut").resume_points()


def test_a_run_that_fell_behind_goes_on_as_the_uninterrupted_one(train):
    events = Events()
    record = train("cut", listeners=[events], falls_behind=lambda run, history: len(history) == 2, checkpoint_every=3)
    assert events.kinds() == ["Started", "FirstStep", "EpochDone", "EpochDone", "Ended"]
    assert record == read_record(train.run("cut").record)
    assert [entry.epoch for entry in record.history] == [1, 2]
    assert train.run("cut").resume_points() == [train.run("cut").resume_point(30)]
    again = train("cut", falls_behind=lambda run, history: len(history) == 3)
    assert again.digest == train.uninterrupted().digest
    assert read_record(train.run("cut").record) == again
    again = train("cut", falls_behind=lambda run, history: True, force=True)
    assert isinstance(again, Partial)
    assert read_record(train.run("cut").record).digest == train.uninterrupted().digest, "a result is not replaced"


def test_a_stop_before_the_first_step_leaves_nothing(train):
    assert train("cut", 0) == Stopped(0, 45)
    assert not train.run("cut").resume_points()


@pytest.mark.parametrize("group", ["opt/exp_avg/", "opt/exp_avg_sq/", "stats/"])
def test_each_part_of_the_state_matters(train, group):
    """The negative control: without it, the comparison above could not fail."""
    expected = train.uninterrupted()
    edit(stopped(train, "cut", 20), drop=[group])
    assert train("cut").digest != expected.digest


@pytest.mark.parametrize("key", ["code", "torch", "hardware", "mode", "device", "settings"])
def test_resuming_elsewhere_is_refused_or_marked(train, key):
    path = stopped(train, "cut", 20)
    _, about = checkpoint.load(path, ResumePoint, lambda _: shapes(path))
    value = "compiled" if key == "mode" else "another"
    edit(path, environment=type(about.environment)(**{**as_dict(about.environment), key: value}))
    with pytest.raises(ResumeError, match=f"{key} {value} .*--resume-anyway"):
        train("cut")
    assert train("cut", exact=False).exact is False


def as_dict(struct):
    return {key: getattr(struct, key) for key in struct.__struct_fields__}


def test_resuming_with_another_spec_is_refused_or_marked(train):
    edit(stopped(train, "cut", 20), spec={"lr": 1})
    with pytest.raises(ResumeError, match=r"another spec: .*--resume-anyway"):
        train("cut")
    assert train("cut", exact=False).exact is False


def test_an_eager_run_is_resumed_eager(train):
    """As after a failed compilation: the same command goes on with the same bits."""
    expected = train.uninterrupted()
    stopped(train, "cut", 20)
    again = train("cut", compiled=True)
    assert again.environment.mode == "eager"
    assert again.exact
    assert again.digest == expected.digest


@pytest.fixture
def nothing_compiles(monkeypatch):
    """Only the eager step works."""
    fuse = fused.fuse

    def refuse(*inputs, compiled=True, **options):
        if compiled:
            raise fused.CompileError("the linker is missing")
        return fuse(*inputs, compiled=False, **options)

    monkeypatch.setattr(fused, "fuse", refuse)


def test_a_compilation_that_fails_becomes_eager(train, nothing_compiles):
    """One event with the reason, the same run to the end, and the record says in which mode it was made."""
    events = Events()
    record = train("x", compiled=True, listeners=[events])
    assert events.of(ModeChanged) == [
        ModeChanged(Mode("eager"), "the linker is missing: the train step runs eager, which is slower")
    ]
    assert record.environment.mode == "eager"
    assert record.exact
    assert record.digest == train.uninterrupted().digest


def test_an_unpatched_step_is_recorded_and_resumed_as_such(train, monkeypatch):
    fuse, mode = fused.fuse, Mode("unpatched")

    def another(*inputs, compiled=True, **options):
        return fuse(*inputs, compiled=False, **options)._replace(mode=mode, problem="no such name")

    monkeypatch.setattr(fused, "fuse", another)
    events = Events()
    expected = train("uninterrupted", compiled=True, listeners=[events])
    [event] = events.of(ModeChanged)
    assert str(event.mode) == expected.environment.mode == "unpatched"
    assert event.reason.endswith("no such name")
    assert isinstance(train("cut", 20, compiled=True), Stopped)
    mode = COMPILED
    with pytest.raises(ResumeError, match=r"the step would be compiled, and was unpatched; .*--resume-anyway"):
        train("cut", compiled=True)
    mode = Mode("unpatched")
    again = train("cut", compiled=True)
    assert again.exact
    assert (again.digest, again.environment.mode) == (expected.digest, "unpatched")


def test_a_compiled_run_is_not_silently_resumed_eager(train, nothing_compiles):
    path = stopped(train, "cut", 20)
    _, about = checkpoint.load(path, ResumePoint, lambda _: shapes(path))
    edit(path, environment=type(about.environment)(**{**as_dict(about.environment), "mode": "compiled"}))
    with pytest.raises(ResumeError, match=r"the linker is missing; .*--resume-anyway"):
        train("cut", compiled=True)
    assert train("cut", compiled=True, exact=False).exact is False


@pytest.mark.parametrize("moment", range(15, 19))
def test_a_signal_between_the_end_of_an_epoch_and_its_save(train, moment):
    """At any moment, a step that is reported as saved is saved."""
    stop = train("cut", moment, checkpoint_every=2)
    assert train.run("cut").resume_points()[0] == train.run("cut").resume_point(stop.step)


def test_a_damaged_resume_point_is_reported_and_the_one_before_is_used(train):
    expected = train.uninterrupted()
    newest = stopped(train, "cut", 40)
    assert len(train.run("cut").resume_points()) == KEEP
    newest.write_bytes(newest.read_bytes()[:-1])
    events = Events()
    again = train("cut", listeners=[events])
    assert events.kinds()[:3] == ["Started", "Notice", "Resumed"]
    assert str(newest) in events[1].reason
    assert again.digest == expected.digest


@pytest.mark.parametrize("key", ["spec", "data", "environment", "progress"])
def test_an_undamaged_resume_point_that_lacks_a_key_is_of_another_version(train, key, monkeypatch):
    """That version may go on from it."""
    newest = stopped(train, "cut", 40)
    to_builtins = checkpoint.msgspec.to_builtins
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.msgspec, "to_builtins", lambda about: {**to_builtins(about), key: None})
        edit(newest)
    with pytest.raises(ResumeError, match=rf"^{newest} is a checkpoint of another version .*--force$"):
        train("cut")
    assert newest.exists()


def test_if_all_resume_points_are_damaged_nothing_restarts(train):
    stopped(train, "cut", 40)
    points = train.run("cut").resume_points()
    for path in points:
        path.write_bytes(b"")
    with pytest.raises(ResumeError, match="every resume point of x is damaged"):
        train("cut")
    assert train.run("cut").resume_points() == points


def test_two_runs_in_one_folder_have_the_same_bits(train, tmp_path):
    first = train("a")
    shutil.rmtree(tmp_path / "a")
    assert train("a").digest == first.digest


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "x\n", "\ud800", "a" * 101, "$x$", "|", "-x"])
def test_a_name_that_could_not_be_a_folder_is_refused(invented, tmp_path, name):
    with pytest.raises(UserError, match="cannot name an experiment"):
        run_experiment(name, {}, tmp_path, invented, "cpu")
    assert not list(tmp_path.iterdir())


def test_the_returned_record_is_complete(train):
    """`run_experiment` returns what it has written: no file needs to be read."""
    record = train("x")
    assert 0 <= record.metrics.test.accuracy <= 1
    assert json.loads(train.run("x").record.read_text())["digest"] == record.digest
