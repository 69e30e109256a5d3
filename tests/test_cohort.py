"""Runs that are trained together: each has the numbers and the files that it would have alone."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from core import session
from core.compile import fused
from core.data.loader import epoch_order
from core.events import Diverged, Ended, Stopped
from core.functional.tree import flatten
from core.mode import Mode
from core.runs import resume
from core.runs.record import Failed, Finished, write_record
from core.runs.run import Run
from core.session import TooLarge, run_cohort
from core.spec import SpecError, resolve
from core.train import Training, stack
from tests.conftest import Events
from tests.test_compile import compiles

EAGER = {"compiled": False}
CHANGES = ({"lr": 1e-3, "seed": 0}, {"lr": 5e-4, "seed": 1, "dropout": 0.5}, {"weight_decay": 0.1, "seed": 2})


def members(small_spec, out):
    """Each has a local layer of its own: the centres of its units depend on the seed."""
    shared = {"epochs": 2, "locality": [3], "whiten": 20}
    return [Run(f"m{i}", small_spec(**shared, **change), out) for i, change in enumerate(CHANGES)]


@pytest.fixture
def runs(small_spec, tmp_path):
    return members(small_spec, tmp_path)


@pytest.fixture(scope="module")
def uninterrupted(small_spec, tmp_path_factory, invented):
    """The records of a cohort that is not interrupted."""
    return run_cohort(members(small_spec, tmp_path_factory.mktemp("uninterrupted")), invented, "cpu", **EAGER)


@pytest.fixture
def together(runs, tmp_path, invented):
    """Trains the runs as a cohort, and can be stopped after any number of steps; returns their records."""

    def train(out, stop_after=10**9, **options):
        left = iter(range(stop_after))
        stop = lambda: next(left, None) is None  # noqa: E731
        return run_cohort(moved(runs, tmp_path / out), invented, "cpu", (), stop, **{**EAGER, **options})

    return train


def moved(runs, out):
    return [replace(run, out=out) for run in runs]


def close(one, other):
    for mine, theirs in zip(one.history, other.history, strict=True):
        assert mine.train_loss == pytest.approx(theirs.train_loss, rel=1e-3)
        assert mine.val_loss == pytest.approx(theirs.val_loss, rel=1e-2)


def test_each_has_the_files_and_numbers_that_it_has_alone(together, runs, tmp_path, invented):
    for run, record in zip(moved(runs, tmp_path / "cohort"), together("cohort"), strict=True):
        [alone] = run_cohort(moved([run], tmp_path / "alone"), invented, "cpu", **EAGER)
        close(record, alone)
        assert record.environment.mode == "eager, cohort of 3"
        assert run.finished(record.data) == record
        assert not run.resume_points()


@compiles
@pytest.mark.slow
def test_a_compiled_step_of_a_cohort_equals_that_of_each_run_alone(runs, invented):
    """Gradients, as the first moments hold them, statistics and losses; that draws are the same to the bit when they
    are vmapped and compiled is tested in test_prng.py. Muon's weights are near: see test_optim.py. Adam trains what
    Muon does not."""
    cpu = torch.device("cpu")
    changes = {"optimizer": "muon", "clip": 0.5, "augment": "flip+shift", "rotate": 15, "zoom": 0.2}
    specs = [resolve({**run.spec, **changes}) for run in runs]
    trainings = [Training(spec, invented, cpu) for spec in specs]
    alone = [Training(spec, invented, cpu) for spec in specs]
    for training in trainings + alone:
        spec = training.spec
        training.data["order"].copy_(epoch_order(training.examples, spec["batch_size"], spec["seed"], 0))
    before = [{name: p.clone() for name, p in each.state["params"].items()} for each in alone]
    trees = stack(trainings)
    made = fused.fuse(specs[0], *trees)
    assert made.mode == Mode("compiled", 3)
    made.advance()
    for mine, theirs, old in zip(trainings, alone, before, strict=True):
        fused.fuse(theirs.spec, theirs.state, theirs.data, theirs.hyper, compiled=False).advance()
        one, other = flatten(mine.state), flatten(theirs.state)
        for name in one:
            if name.startswith(("opt/", "stats/", "metrics/", "step")):
                torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-5)
        for name in theirs.state["opt"].get("momentum", {}):
            new, expected = mine.state["params"][name], theirs.state["params"][name]
            assert (new - expected).norm() < 0.1 * (expected - old[name]).norm()


@pytest.mark.parametrize("member", [0, 1])
def test_a_member_that_diverges_leaves_the_others_alone(runs, uninterrupted, tmp_path, invented, member):
    runs[member] = replace(runs[member], spec={**runs[member].spec, "lr": 1e38})
    heard = []
    listener = lambda run, event: heard.append((run.name, type(event)))  # noqa: E731
    records = run_cohort(moved(runs, tmp_path / "nan"), invented, "cpu", [listener], **EAGER)
    assert isinstance(records[member], Failed)
    assert "NaN or infinite" in records[member].error
    assert [kind for name, kind in heard if name == f"m{member}"][-2:] == [Diverged, Ended]
    for i in {0, 1, 2} - {member}:
        assert isinstance(records[i], Finished)
        assert records[i].digest == uninterrupted[i].digest, "a member depends on another one"


@pytest.mark.parametrize("after", [7, 15, 20])
def test_a_stopped_cohort_is_resumed(together, uninterrupted, runs, tmp_path, after):
    stops = together("cut", after)
    assert stops == [Stopped(stops[0].step, 30)] * 3
    again = together("cut")
    assert [record.digest for record in again] == [record.digest for record in uninterrupted]
    assert all(record.exact for record in again)


@pytest.mark.parametrize("saves", range(7))
def test_a_cohort_killed_between_two_saves_is_resumed(together, uninterrupted, monkeypatch, saves):
    """Some members have one more resume point, or a record. The results are those of an uninterrupted cohort."""

    class Killed(BaseException):
        pass

    def save(*arguments):
        if next(left, None) is None:
            raise Killed
        really(*arguments)

    left, really = iter(range(saves)), resume.save
    with monkeypatch.context() as patch:
        patch.setattr(resume, "save", save)
        if saves < 6:
            with pytest.raises(Killed):
                together("cut")
        else:  # in the middle of the records
            patch.setattr(session, "write_record", lambda *arguments: save(*arguments))
            patch.setattr(session.resume, "save", really)
            left, really = iter(range(1)), write_record
            with pytest.raises(Killed):
                together("cut")
    again = together("cut")
    assert [record.digest for record in again] == [record.digest for record in uninterrupted]
    assert all(record.exact for record in again)


@pytest.mark.parametrize(("longest", "expected"), [(600.0, [1, 7, 13, 14]), (3.5, [1, 6, 11, 14])])
def test_no_epoch_is_saved_while_saving_has_taken_more_than_a_twentieth(
    small_spec, tmp_path, invented, monkeypatch, longest, expected
):
    """On a clock on which an epoch takes 1 s and each save 0.1 s. All members are saved after the same epochs."""

    def save(run, state, history, about):
        saved[run.name].append(len(history))
        really(run, state, history, about)

    runs = [Run(f"m{i}", small_spec(widths=[8], batch_size=500, epochs=14, seed=i), tmp_path) for i in range(3)]
    saved, really, heard = {run.name: [] for run in runs}, resume.save, Events()
    clock = lambda: heard.kinds().count("EpochDone") / 3 + sum(map(len, saved.values())) / 10  # noqa: E731
    monkeypatch.setattr(resume, "save", save)
    monkeypatch.setattr(resume.Pace, "LONGEST", longest)
    monkeypatch.setattr(resume, "time", SimpleNamespace(perf_counter=clock))
    run_cohort(runs, invented, "cpu", [heard], **EAGER)
    assert list(saved.values()) == [expected] * 3


def test_a_run_from_another_cohort_is_resumed_and_marked(together, runs, tmp_path, invented):
    """A member alone, and two members at different steps."""
    together("cut", 7)
    events = Events()
    [alone] = run_cohort(moved(runs[:1], tmp_path / "cut"), invented, "cpu", [events], **EAGER)
    assert events.kinds()[:3] == ["Started", "Resumed", "Notice"]
    assert not alone.exact
    records = together("cut")
    assert records[0] == alone
    assert not any(record.exact for record in records)
    assert records[1].environment.mode == "eager, cohort of 2"


def test_a_run_without_memory_beside_others_has_not_failed(runs, tmp_path, invented, monkeypatch):
    """The other runs, at other steps, are in memory, too. Alone, the run may fit."""
    left = iter(range(25))  # two resume points, so that it does not begin anew with the other
    run_cohort(runs[:1], invented, "cpu", (), lambda: next(left, None) is None, **EAGER)

    def fit(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr(session, "fit", fit)
    with pytest.raises(TooLarge, match="2 runs together"):
        run_cohort(runs[:2], invented, "cpu", **EAGER)
    assert not any(run.record.exists() for run in runs)
    [alone] = run_cohort(runs[:1], invented, "cpu", **EAGER)
    assert (type(alone), alone.error) == (Failed, "out of memory on cpu")


def test_runs_that_differ_in_shape_or_epochs_are_refused(small_spec, tmp_path, invented):
    one = small_spec(epochs=1)
    for other in (small_spec(epochs=2), small_spec(epochs=1, activation="relu"), one):
        with pytest.raises(SpecError, match="cannot be trained together"):
            run_cohort([Run("x", spec, tmp_path) for spec in (one, other)], invented, "cpu", **EAGER)
    assert not Run("x", one, tmp_path).record.exists()
