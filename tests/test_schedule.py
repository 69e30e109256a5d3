"""Many runs as one generator of results, and those who listen."""

import functools
import importlib.util
import re
from pathlib import Path

import pytest

from core import schedule
from core.errors import UserError
from core.events import (
    Diverged,
    Ended,
    EpochDone,
    FirstStep,
    Listeners,
    Notice,
    Resumed,
    Started,
    StepDone,
    Stopped,
)
from core.runs.record import Finished
from core.runs.run import Run
from core.session import TooLarge, prepare, run_cohort
from core.signals import Stop
from core.store import Held
from tests.conftest import ROOT, Events, lacking
from tests.test_report import failed


@pytest.fixture
def runs(small_spec, tmp_path):
    return [Run("x", small_spec(epochs=1, seed=seed), tmp_path) for seed in range(3)]


def trains(invented, **options):
    """The executor that trains eager in this process."""

    train = functools.partial(run_cohort, data=invented, device="cpu", compiled=False, **options)
    return schedule.one_after_another(train)


@pytest.mark.parametrize("cohort", [1, 2])
def test_every_run_has_its_record_and_every_listener_hears_of_it(runs, invented, cohort):
    events = Events()
    results = list(schedule.train_all(runs, trains(invented), [events], cohort=cohort))
    assert [(result.name, result.seed) for result in results] == [("x", 0), ("x", 1), ("x", 2)]
    assert all(isinstance(result, Finished) for result in results)
    assert events.kinds().count("Ended") == 3


def test_a_stop_in_the_middle_of_a_run_is_the_last_result(runs, invented):
    left = iter(range(20))  # 15 steps a run
    results = list(schedule.train_all(runs, trains(invented), should_stop=lambda: next(left, None) is None))
    assert isinstance(results[0], Finished)
    assert results[1:] == [schedule.Interrupted([runs[1]], results[1].step, 15)]
    assert runs[1].resume_points()[0] == runs[1].resume_point(results[1].step)


def test_a_stop_between_two_runs_is_the_last_result(runs, invented):
    stopped = []
    stop = lambda run, event: stopped.append(run) if type(event).__name__ == "Ended" else None  # noqa: E731
    results = list(schedule.train_all(runs, trains(invented), [stop], lambda: bool(stopped)))
    assert isinstance(results[0], Finished)
    assert results[1:] == [schedule.Interrupted()]


def test_an_exception_of_a_signal_becomes_a_result(runs):
    def executor(groups, listener, should_stop):
        yield "one"
        raise KeyboardInterrupt

    assert list(schedule.train_all(runs, executor)) == ["one", schedule.Interrupted()]


def test_a_cohort_that_is_too_large_or_held_is_tried_one_by_one(runs):
    def train(group, **how):
        if len(group) > 1:
            raise TooLarge("too large")
        if group[0] is runs[1]:
            raise Held("process 1 on x")
        return [group[0].seed]

    results = list(schedule.train_all(runs, schedule.one_after_another(train), cohort=3))
    assert (results[0], results[2]) == (0, 2)
    assert (results[1].run, str(results[1].reason)) == (runs[1], "process 1 on x")


def test_finished_runs_of_a_stopped_cohort_have_records(runs):
    ended = failed("x")
    train = lambda group, **how: [ended, Stopped(7, 15), Stopped(7, 15)]  # noqa: E731
    results = list(schedule.train_all(runs, schedule.one_after_another(train), cohort=3))
    assert results == [ended, schedule.Interrupted(runs[1:], 7, 15)]


def test_there_are_steps_to_save_from_the_first_step_to_the_end_of_the_last_run(runs):
    """Only then does a signal wait for the training. While a step compiles, it stops at once."""
    stop, (a, b, _) = Stop(), runs
    ended = Ended(failed("x"))
    happened = [
        (a, Started(2), False),
        (a, Resumed(5, 1, None), False),
        (b, Started(2), False),
        (a, Notice("compiles eager"), False),
        (a, FirstStep(6, 15), True),
        (a, StepDone(16), True),
        (a, Diverged("x"), True),
        (a, ended, True),  # b goes on
        (b, ended, False),
        (a, Started(1), False),
        (a, FirstStep(1, 15), True),
        (a, Stopped(7, 15), False),
    ]
    for run, event, stepping in happened:
        stop.listen(run, event)
        assert stop.stepping == stepping, event


def test_data_that_is_too_large_is_reported_without_a_traceback(invented, monkeypatch):
    def to(data, device):
        raise MemoryError

    monkeypatch.setattr("core.data.tensors.Data.to", to)
    with pytest.raises(UserError, match=r"^there is not enough memory for the data$"):
        prepare("cpu", lambda: invented)
    with pytest.raises(UserError, match=r"^there is not enough memory for the data$"):
        run_cohort([], invented, "cpu")


def test_a_listener_that_fails_is_reported_once_and_switched_off(runs, invented, caplog):
    def broken(run, event):
        raise ZeroDivisionError("by zero")

    events = Events()
    results = list(schedule.train_all(runs, trains(invented), [broken, events]))
    assert all(isinstance(result, Finished) for result in results)
    assert caplog.messages == [
        f"the listener {broken.__qualname__} failed and is switched off: ZeroDivisionError: by zero"
    ]
    assert events.kinds().count("Ended") == 3


def test_listeners_hear_in_the_order_in_which_they_are_given(runs):
    heard = []
    tell = Listeners([lambda run, event: heard.append(1), lambda run, event: heard.append(2)])
    tell(runs[0], Notice("x"))
    assert heard == [1, 2]


def test_the_listener_in_the_docs_works(runs, invented, tmp_path, monkeypatch):
    source = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "listeners.md").read_text(), re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("core.data.cifar10.load", lambda folder: invented)
    source = source.replace('"epochs": 5', '"epochs": 1, "widths": [8], "batch_size": 100')
    exec(source.replace(', "trials", data', ', "trials", data, "cpu", compiled=False'), {})
    lines = Path("epochs.csv").read_text().splitlines()
    assert lines[0].startswith("small,0,1,")


# TensorBoard


@pytest.fixture
def read(tmp_path):
    """Reads the files in the folder of a run, as TensorBoard does: by tag, (step, value)."""
    if importlib.util.find_spec("tensorboard") is None:
        lacking("TensorBoard is not installed: uv run --group tensorboard pytest")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def scalars(run):
        found = EventAccumulator(str(tmp_path / "tensorboard" / run.name / run.id)).Reload()
        tags = {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
        return tags, found.PluginTagToContent("hparams")

    return scalars


def test_tensorboard_reads_what_was_written(small_spec, tmp_path, invented, read):
    from core.listeners.tensorboard import TensorBoard

    run, events = Run("x", small_spec(epochs=3, schedule="cosine"), tmp_path), Events()
    left = iter(range(40))  # stopped in the third epoch of 15 steps
    for stop in (lambda: next(left, None) is None, lambda: False):
        [record] = schedule.train_all([run], trains(invented), [TensorBoard(tmp_path), events], stop)
    tags, hparams = read(run)
    for name, tag in (
        ("train_loss", "loss/train"),
        ("val_loss", "loss/validation"),
        ("train_accuracy", "accuracy/train"),
    ):
        assert tags[tag] == [(e.epoch, pytest.approx(getattr(e, name))) for e in record.history]
    assert tags["learning rate"] == [(e.epoch, pytest.approx(e.lr)) for e in events.of(EpochDone)]
    assert tags["learning rate"][0][1] > tags["learning rate"][2][1] > 0
    assert tags["accuracy/validation"][-1] == (3, pytest.approx(record.metrics.validation.accuracy))
    assert len(list((tmp_path / "tensorboard").rglob("*/*/*"))) == 2, "a file for each call, in one folder"
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= hparams.keys()
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    started = HParamsPluginData.FromString(hparams["_hparams_/session_start_info"]).session_start_info.hparams
    assert started["lr"].number_value == run.spec["lr"]
    assert started["widths"].string_value == str(run.spec["widths"])


def test_tensorboard_has_runs_of_other_processes(small_spec, tmp_path, invented, read):
    from core.events import Ended
    from core.listeners.tensorboard import TensorBoard

    run = Run("x", small_spec(epochs=2, train_on="all"), tmp_path)
    [record] = run_cohort([run], invented, "cpu", compiled=False)
    TensorBoard(tmp_path)(run, Ended(record))
    tags, _ = read(run)
    assert [step for step, _ in tags["loss/train"]] == [1, 2]
    assert "accuracy/validation" not in tags


def test_a_run_may_depend_on_the_results_before_it(small_spec, invented, tmp_path):
    seeds = []

    def runs():
        while sum(seeds) < 3:
            yield Run("x", small_spec(epochs=1, seed=1 + len(seeds)), tmp_path)

    for result in schedule.train_all(runs(), trains(invented)):
        seeds.append(result.seed)
    assert seeds == [1, 2]
