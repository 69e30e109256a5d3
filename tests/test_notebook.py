"""run_experiment for people: progress, the look of its results, an interrupt; and examples/quickstart.ipynb in a real
kernel."""

import asyncio
import importlib.util
import json
import signal
import subprocess
import sys
import threading
import time

import pytest

from core import run_experiment
from core.errors import UserError
from core.events import Resumed
from core.interactive import AGAIN
from core.runs.record import Failed, Finished
from tests.conftest import ROOT, Events, lacking

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
TINY = {"widths": [8], "batch_size": 50, "epochs": 2}  # 20 steps an epoch


@pytest.fixture
def train(invented, tmp_path):
    """Train eager, without a display."""

    def train(spec=TINY, name="x", out="out", **options):
        return run_experiment(name, spec, tmp_path / out, invented, "cpu", **{"compiled": False, **options})

    return train


@pytest.fixture(autouse=True)
def interruptible():
    """A shell lets what it starts in the background ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupting(where, times=1):
    """A listener that sends SIGINT to this process at the event whose text begins so."""

    def listener(run, event):
        if repr(event).startswith(where):
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

    return listener


# Progress


def test_a_script_shows_nothing_and_a_session_shows_each_epoch(train, capsys, monkeypatch):
    train(out="script")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    train(out="off", progress=False)
    assert capsys.readouterr() == ("", "")
    train(out="session")
    start, first, *epochs = capsys.readouterr().out.splitlines()
    assert start.endswith(": starts; a step that is new here has to be compiled")
    assert "s after the start of this experiment" in first
    assert [line.split(":")[1] for line in epochs] == [" epoch 1", " epoch 2"]


# What a record looks like


def test_a_record_is_a_table_a_line_and_a_picture(train):
    record = train({**TINY, "lr": 5e-4})
    table, line = record._repr_html_(), repr(record)
    for words in ("x seed 0", "widths 8", "lr 0.0005", "validation accuracy", "test accuracy", "95% interval"):
        assert words in table
        assert words in line
    assert "\n" not in line
    assert len(line) < 400
    assert "epochs 2" in line
    assert "momentum" not in line  # it has its default
    figure = record.plot()
    [validation, *_] = figure.axes[0].lines
    assert list(validation.get_ydata()) == [100 * epoch.val_accuracy for epoch in record.history]
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_a_run_on_all_images_has_a_table_and_a_picture(train):
    record = train({**TINY, "train_on": "all", "epochs": 1})
    assert "validation" not in record._repr_html_()
    assert record.plot()._repr_png_()


def test_the_table_of_a_record_shows_text_and_runs_none(train):
    failed = train({**TINY, "lr": 1e38})
    assert isinstance(failed, Failed)
    assert failed.error in failed._repr_html_()
    assert "<script>" not in Failed(**{**_fields(failed), "error": "<script>alert(1)</script>"})._repr_html_()


def _fields(record):
    return {key: getattr(record, key) for key in record.__struct_fields__}


# An interrupt


def test_an_interrupt_saves_the_step_and_the_next_call_goes_on(train):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as stop:
        train(listeners=[interrupting("StepDone(step=32")])  # in the middle of the second epoch
    sentence = f"x seed 0 stopped after step 32 of 40, which is saved; {AGAIN}"
    assert (str(stop.value), stop.value._render_traceback_()) == (sentence, [sentence])
    assert signal.getsignal(signal.SIGINT) is before
    record = train(listeners=[events := Events()])
    assert events.of(Resumed) == [Resumed(32, 2, None)]
    assert record.exact
    assert record.digest == train(out="uninterrupted").digest


@pytest.mark.parametrize(
    ("where", "times", "sentence"),
    [
        ("Started", 1, "x seed 0 stopped before it could save a step; the same call starts from the beginning"),
        ("StepDone(step=32", 2, f"x seed 0 stopped before it could save a step; {AGAIN}"),
        ("EpochDone(epoch=2", 1, "x seed 0 has ended, and its record is on disk"),
    ],
    ids=["before the first step", "twice", "in the last evaluation"],
)
def test_an_interrupt_at_any_time_ends_a_loop_over_runs_and_not_the_process(where, times, sentence, train, monkeypatch):
    monkeypatch.setattr("core.signals.SAME_STOP", 0.0)
    with pytest.raises(KeyboardInterrupt) as stop:
        train(listeners=[interrupting(where, times)])
    assert str(stop.value) == sentence
    assert isinstance(train(), Finished)


def test_a_handler_of_the_caller_stays_and_a_thread_sets_none(train, monkeypatch):
    caught = []
    before = signal.signal(signal.SIGINT, lambda *_: caught.append(1))
    try:
        assert isinstance(train(listeners=[interrupting("StepDone(step=32")]), Finished)
    finally:
        signal.signal(signal.SIGINT, before)
    assert caught == [1]
    results = []
    thread = threading.Thread(target=lambda: results.append(train(out="thread")))
    thread.start()
    thread.join()
    assert isinstance(results[0], Finished)


# Errors


def test_an_error_of_a_user_is_the_line_of_the_call_and_one_sentence(train):
    with pytest.raises(UserError) as raised:
        train({"lrr": 1})
    place, code, message = "".join(raised.value._render_traceback_()).splitlines()
    assert __file__ in place
    assert "run_experiment(name, spec" in code
    assert message == "SpecError: unknown key 'lrr'; did you mean 'lr'?"


# The notebook


def cells():
    return {cell["id"]: cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]}


def test_the_notebook_holds_no_outputs_and_no_path_of_this_machine():
    for cell in cells().values():
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
    assert str(ROOT.parent) not in NOTEBOOK.read_text(encoding="utf-8")


def test_outside_a_clone_the_notebook_makes_one(tmp_path, monkeypatch):
    """In a folder below a clone it finds that one; elsewhere it clones what CLONE names, and installs the libraries."""
    source = "".join(cells()["find"]["source"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(ROOT / "core" / "data")
    exec(source, found := {})
    assert found["root"] == ROOT

    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match="write into CLONE"):
        exec(source, {})
    commands = []

    def run(command, check):
        commands.append(command)
        if command[0] == "git":
            (tmp_path / "cifar10-mlp").symlink_to(ROOT, target_is_directory=True)

    monkeypatch.setattr(subprocess, "run", run)
    exec(source.replace('CLONE = ""', 'CLONE = "somewhere"'), made := {})
    exec(source, again := {})
    assert made["root"] == again["root"] == tmp_path / "cifar10-mlp"
    clone, install = commands
    assert clone == ["git", "clone", "--quiet", "--depth", "1", "somewhere", str(tmp_path / "cifar10-mlp")]
    assert any(library.startswith("msgspec>=") for library in install)


# A listener of the kernel: it waits in the second epoch of the run `longer`, until the test has sent the interrupt.
WAIT = """
import time
from core.listeners.progress import Display
epoch_done, waiting, sent = Display._epoch, Path({folder!r}, "waiting"), Path({folder!r}, "sent")
def wait(self, run, event):
    epoch_done(self, run, event)
    if run.name == "longer" and event.epoch == 2 and not sent.exists():
        waiting.touch()
        while not sent.exists():
            time.sleep(0.005)
Display._epoch = wait
"""
COMPARE = """
uninterrupted = run_experiment("longer", longer.spec, out / "uninterrupted", data, compiled=False, progress=False)
print(longer.exact, longer.digest == uninterrupted.digest)
"""
MISSPELT = 'x = 1\nrun_experiment("misspelt", {"lrr": 1}, out, data)'


@pytest.mark.slow
def test_the_notebook_in_a_kernel(tmp_path):
    """Every cell works, as it stands but for the folder of the files and shorter runs. A run is interrupted by the
    kernel's interrupt, and goes on to the same bits."""
    if not importlib.util.find_spec("nbclient"):
        lacking("uv run --group notebook ... has nbclient and ipykernel")
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    by_name = {cell.id: cell for cell in notebook.cells}

    def change(name, old, new):
        assert old in by_name[name].source
        by_name[name].source = by_name[name].source.replace(old, new)

    change("data", 'root / "trials"', f"Path({str(tmp_path)!r})")
    change("train", '"epochs": 8', '"epochs": 2')
    change("stop", '"epochs": 100', '"epochs": 4')
    for name, source in (("wait", WAIT.format(folder=str(tmp_path))), ("again", by_name["stop"].source)):
        by_name[name] = nbformat.v4.new_code_cell(source)
    by_name["compare"], by_name["misspelt"] = map(nbformat.v4.new_code_cell, (COMPARE, MISSPELT))
    order = [cell.id for cell in notebook.cells if cell.cell_type == "code"]
    at = order.index("stop")
    order[at : at + 1] = ["wait", "stop", "again", "compare", "misspelt"]
    notebook.cells = [by_name[name] for name in order]
    client = NotebookClient(
        notebook, timeout=120, allow_errors=True, resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    )

    def interrupt():
        while not (tmp_path / "waiting").exists():
            time.sleep(0.005)
        asyncio.run(client.km.interrupt_kernel())
        (tmp_path / "sent").touch()

    threading.Thread(target=interrupt, daemon=True).start()
    client.execute()

    shown = {name: cell.outputs for name, cell in zip(order, notebook.cells, strict=True)}
    errors = {name: out.traceback for name, outs in shown.items() for out in outs if out.output_type == "error"}
    assert set(errors) == {"stop", "misspelt"}, errors
    [sentence] = errors["stop"]
    assert sentence == f"longer seed 0 stopped after step 36 of 72, which is saved; {AGAIN}"
    place, code, message = "\n".join(errors["misspelt"]).splitlines()
    assert "line 2" in place
    assert "run_experiment" in code
    assert message.startswith("SpecError: unknown key 'lrr'")

    def text(name):
        return "".join(out.text for out in shown[name] if out.output_type == "stream")

    def data(name):
        [result] = [out.data for out in shown[name] if out.output_type in ("execute_result", "display_data")]
        return result

    assert text("train").count("quick seed 0: epoch ") == 2
    assert text("train").startswith("quick seed 0: starts")
    assert "\x1b" not in text("train")
    assert "<table>" in data("train")["text/html"]
    assert "image/png" in data("curves")
    assert text("stop").count("epoch ") == 2
    assert "longer seed 0: resumed after step 36 (epoch 3)" in text("again")
    assert text("compare") == "True True\n"
    assert text("use").count("with probability") == 5
    assert not text("cifar10")
