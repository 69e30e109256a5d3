"""Searches: spaces, and what Optuna is told and asked. The networks are tiny and eager, the images invented."""

import functools
import importlib
import json
import re
import sys

import pytest

from core import plan, run_experiment, schedule, space
from core.compare import Candidate, Question
from core.errors import UserError
from core.report import rebuild, searches
from core.report.catalog import Catalog
from core.runs.record import Failed, Finished, Partial, read_record, read_records
from core.runs.run import Run
from core.session import run_cohort
from core.spec import resolve
from core.store import StoreError
from tests.conftest import EXPERIMENTS, ROOT, lacking
from tests.test_report import failed, make, partial, write

TINY = {"widths": [8], "batch_size": 500, "epochs": 4, "dropout": 0.0}
SEARCH = {"base": "tiny", "dropout": {"low": 0.0, "high": 0.5}, "lr": {"low": 1e-4, "high": 1e-2, "log": True}}
KNOWN = {"tiny": TINY, "lr-1e-3": {}}


@pytest.fixture
def found(tmp_path, invented):
    """A search under a folder; the options of `train` are those of core.search.Search.train."""
    if importlib.util.find_spec("optuna") is None:
        lacking("Optuna is not installed: `uv run --group search pytest` has it")
    from core import search

    class Found(search.Search):
        def __init__(self, out="out", **changes):
            parsed = space.parse("s", {"s": {**SEARCH, **changes}}, KNOWN)
            super().__init__(parsed, tmp_path / out, None)

        def train(self, trials, **options):
            how = {"data": invented, "device": "cpu", "compiled": False, "falls_behind": self.falls_behind}
            executor = schedule.one_after_another(functools.partial(run_cohort, **how))
            return list(super().train(executor, trials, **options))

    return Found


# Spaces


def parse(**changes):
    return space.parse("s", {"s": {key: v for key, v in {**SEARCH, **changes}.items() if v is not None}}, KNOWN)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learning_rate": {"low": 1, "high": 2}}, "unknown key 'learning_rate'; did you mean 'lr'?"),
        ({"learning_rate": 1e-3}, "unknown key 'learning_rate'; did you mean 'lr'?"),
        ({"base": "tony"}, "base = 'tony', expected the name of an experiment; did you mean 'tiny'?"),
        ({"base": None}, "base = None, expected the name of an experiment"),
        ({"dropout": 0.1, "lr": 0.1}, "no key has a range or choices, so there is nothing to search"),
        ({"dropout": {"low": 0.5, "high": 0.5}}, "the range of dropout is empty: low = 0.5 is not below high = 0.5"),
        ({"dropout": {"low": 0.0, "high": 0.5, "log": True}}, "dropout has low = 0, expected above 0 with log"),
        ({"dropout": {"low": 0.0, "high": 1.0}}, "dropout has the high end 1.0, expected a number of at least 0 and"),
        ({"dropout": {"low": 0.0}}, 'dropout = {\'low\': 0.0}, expected {"choices": [...]} or {"low": ..., '),
        ({"lr": {"low": 1e-4, "high": 1e-2, "log": "no"}}, "lr has log = 'no', expected True or False"),
        ({"norm": {"low": 0, "high": 1}}, "norm = {'low': 0, 'high': 1}, expected {\"choices\": [...]}"),
        ({"norm": {"choices": []}}, "norm has the choices [], expected a list of at least one value"),
        ({"norm": {"choices": ["batch", "group"]}}, "norm has the choice 'group', expected one of batch, layer, none"),
        ({"batch_size": {"low": 1.5, "high": 8}}, "batch_size has the low end 1.5, expected an integer from 2"),
        ({"seed": {"low": 0, "high": 8}}, "seed = {'low': 0, 'high': 8}, expected one value: accuracies are compared"),
        ({"train_on": "all"}, "train_on = 'all' leaves no validation images to choose by"),
        ({"lr": [1e-3, 1e-4]}, "lr = [0.001, 0.0001], expected a finite number above 0"),
        ({"schedule": {"choices": ["one-cycle"]}, "warmup_epochs": {"choices": [1.0, 2]}}, "none of 100 combinations"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_space_that_is_refused(changes, words):
    with pytest.raises(UserError, match=re.escape(f"search s: {words}")) as refused:
        parse(**changes)
    assert "\n" not in str(refused.value)


def test_an_unknown_search_is_refused_with_the_nearest_name():
    with pytest.raises(UserError, match=r"^unknown search 'serch-default'; did you mean 'search-default'\?$"):
        space.parse("serch-default", {"search-default": {}}, KNOWN)


def test_what_lies_in_a_space():
    found = parse(norm={"choices": ["batch", "layer"]}, widths={"choices": [[8], (16,)]})
    assert found.spec == resolve({**TINY})
    spec = found.at({"lr": 0.00123456, "dropout": 0.4999999, "norm": "layer", "widths": [16]})
    assert (spec["lr"], spec["dropout"], spec["norm"], spec["widths"]) == (0.00123, 0.5, "layer", [16])
    assert found.has(spec)
    for other in ({"lr": 0.1}, {"norm": "none"}, {"widths": [32]}, {"seed": 1}, {"epochs": 5}):
        assert not found.has({**spec, **other})
    assert len(found.sample(20)) == 20
    assert all(map(found.has, found.sample(20)))


def test_combinations_that_a_spec_refuses_are_not_drawn():
    """More sigmas than hidden layers; local layers in residual blocks."""
    locality = {"choices": [[2, 5], [3], []]}  # integers become floats, as in a record
    found = parse(widths={"choices": [[8], [8, 8]]}, locality=locality, expansion={"choices": [0, 2]})
    assert found.axes["locality"] == [[2.0, 5.0], [3.0], []]
    assert all(type(each) is float for sigmas in found.axes["locality"] for each in sigmas)
    specs = found.sample(200)
    assert len(specs) == 200
    assert all(len(spec["locality"]) <= len(spec["widths"]) for spec in specs)
    assert not any(spec["locality"] and spec["expansion"] for spec in specs)
    drawn = {(len(spec["widths"]), len(spec["locality"]), spec["expansion"]) for spec in specs}
    assert drawn == {(1, 1, 0), (2, 2, 0), (2, 1, 0), *((n, 0, k) for n in (1, 2) for k in (0, 2))}


def test_the_spaces_of_the_project_are_valid_and_their_names_are_experiments():
    from main import PROJECT

    for name in PROJECT.searches:
        parsed = space.parse(name, PROJECT.searches, EXPERIMENTS)
        assert len(parsed.sample(60)) == 60
        [run] = plan.chosen(PROJECT, [name, "lr=0.002"], {}, None, ROOT)
        assert (run.name, run.spec) == (name, {**parsed.spec, "lr": 0.002})
    for clash in ("demo", "lr-1e-3"):
        with pytest.raises(UserError, match=f"the name {clash} stands for"):
            plan.chosen(PROJECT._replace(searches={clash: {"base": "baseline"}}), ["demo"], {}, None, ROOT)


# What Optuna is told and asked


def test_a_search_trains_what_optuna_proposes_and_goes_on_where_it_was(found):
    with found(epochs=1) as search:
        first = search.train(3)
        assert [type(record) for record in first] == [Finished] * 3
        assert [record.name for record in first] == ["s"] * 3
        assert len({(record.spec["lr"], record.spec["dropout"]) for record in first}) == 3
    with found(epochs=1) as search:
        assert search.train(3) == []
        assert search.told == [record.spec_id for record in first]
        assert {record.spec_id: record for record in first} == search.records
        [fourth] = search.train(4)
    with found("another", epochs=1) as search:
        assert [record.spec for record in search.train(4)] == [record.spec for record in [*first, fourth]], "seeded"
        best = max(search.records.values(), key=lambda record: record.metrics.validation.accuracy)
        assert search.best(1) == [best]
    assert space.read_all(search.out) == [space.Trials("s", "tiny", ["dropout", "lr"], ["lr"], search.told)]
    (search.out / "checkpoints" / "search-s.journal").unlink()  # a clone has none
    with found("another", epochs=1) as again:
        assert again.told == search.told, "the trials keep their numbers"


def test_records_that_fit_are_told_first_and_what_was_trained_is_not_trained_again(found, tmp_path):
    spec = {**TINY, "lr": 1e-3}
    grid = {"dropout": {"choices": [0.0, 0.1]}, "lr": {"choices": [1e-3, 2e-3]}}
    good = [make("other", **{**spec, "lr": 1e-3}, validation=0.6), partial("s", **{**spec, "lr": 2e-3})]
    good += [failed("s", **{**spec, "dropout": 0.1}), make("y", **{**spec, "lr": 2e-3, "dropout": 0.1}, validation=0.5)]
    bad = [make("z", **spec, seed=1), make("z", **{**spec, "lr": 5e-3}), make("z", **{**spec, "widths": [9]})]
    write(tmp_path / "out", [*good, *bad])
    with found(**grid) as search:
        assert set(search.told) == {record.spec_id for record in good}
        assert search.train(12) == [], "all four combinations were trained already"
        assert search.count == 12
        assert len(search.told) == 4
        states = {trial.params["lr"] + trial.params["dropout"]: trial.state.name for trial in search._study.trials}
        assert states == {"0.0010.0": "COMPLETE", "0.0020.0": "PRUNED", "0.0010.1": "PRUNED", "0.0020.1": "COMPLETE"}
        assert [record.name for record in search.best(3)] == ["other", "y"]
        assert search._study.best_value == 0.6


def test_a_run_that_was_finished_later_is_told_again(found, tmp_path):
    spec = {**TINY, "lr": 1e-3}
    write(tmp_path / "out", [partial("s", **spec)])
    with found() as search:
        assert search.best(3) == []
    write(tmp_path / "out", [make("s", **spec, validation=0.6)])
    with found() as search:
        assert search._study.best_value == 0.6
        assert len(search.told) == 1


def test_combinations_that_a_spec_refuses_are_not_trained(found):
    axes = {"schedule": {"choices": ["one-cycle", "cosine"]}, "warmup_epochs": {"choices": [0.0, 1.0]}}
    with found(**axes, epochs=1) as search:
        trained = search.train(4)
        assert len(trained) == 4
        states = [trial.state.name for trial in search._study.trials]
        assert states.count("FAIL") == len(states) - 4 > 0
    combinations = {(record.spec["schedule"], record.spec["warmup_epochs"]) for record in trained}
    assert ("one-cycle", 1.0) not in combinations


def test_a_search_whose_process_died_goes_on_with_its_run(found, tmp_path):
    with found() as search:
        [first] = search.train(1)
        left = iter(range(3))
        [stopped] = search.train(2, should_stop=lambda: next(left, None) is None)
        assert isinstance(stopped, schedule.Interrupted)
        [run] = stopped.runs
    journal = tmp_path / "out" / "checkpoints" / "search-s.journal"
    journal.write_bytes(journal.read_bytes() + b'{"op_code": 5, "torn')
    with found() as search:
        assert [trial.state.name for trial in search._study.trials] == ["COMPLETE", "FAIL", "WAITING"]
        [again] = search.train(2)
    assert (again.spec_id, again.exact) == (run.id, True)
    with found("another") as search:
        assert [record.digest for record in search.train(2)] == [first.digest, again.digest]


def test_a_trial_that_falls_behind_stops_and_run_finishes_it(found, invented, tmp_path, monkeypatch):
    """After one of four epochs, or after two."""
    from core import search as module

    monkeypatch.setattr(module, "KEPT", 1)
    with found() as search:
        trained = search.train(8)
    behind = [record for record in trained if isinstance(record, Partial)]
    assert {len(record.history) for record in behind} <= {1, 2}
    assert behind
    states = [trial.state.name for trial in search._study.trials]
    assert states == ["PRUNED" if isinstance(record, Partial) else "COMPLETE" for record in trained]
    run = Run("s", behind[0].spec, tmp_path / "out")
    assert len(run.resume_points()) == 1
    assert read_record(run.record) == behind[0]
    how = {"data": invented, "device": "cpu", "compiled": False}
    again = run_experiment("s", run.spec, tmp_path / "out", **how)
    assert again.digest == run_experiment("s", run.spec, tmp_path / "whole", **how).digest
    assert read_record(run.record) == again


def test_who_falls_behind(found):
    with found(schedule={"choices": ["constant", "one-cycle"]}) as search:
        for i, accuracy in enumerate((0.3, 0.4, 0.5, 0.6)):  # after one epoch of four 0.1 less
            record = make("s", **{**TINY, "lr": 1e-3 + i / 1e4}, validation=accuracy)
            search.records[record.spec_id] = record

        def behind(accuracy, epochs=1, **changes):
            run = Run("s", {**TINY, **changes}, search.out)
            return search.falls_behind(run, make("s", **TINY, validation=accuracy).history[:epochs])

        assert [behind(accuracy) for accuracy in (0.35, 0.45, 0.55)] == [True, False, False]
        assert not behind(0.1, schedule="one-cycle"), "no other trial has this schedule"
        assert behind(0.1, 2)
        assert not behind(0.1, 3), "not at three quarters"


def test_a_diverged_trial_is_the_worst(found):
    with found(lr={"choices": [1e30]}) as search:
        [record] = search.train(1)
        assert isinstance(record, Failed)
        assert search.best(3) == []
        [trial] = search._study.trials
        assert (trial.state.name, trial.intermediate_values) == ("PRUNED", {})


def test_two_processes_do_not_search_at_once_and_a_damaged_journal_is_named(found, tmp_path):
    with found(), pytest.raises(UserError, match=r"^process [0-9]+ on "), found():
        pass
    journal = tmp_path / "out" / "checkpoints" / "search-s.journal"
    journal.write_bytes(b"{nothing\n{}\n")
    with (
        pytest.raises(UserError, match=r"the journal of the search cannot be used .*: delete .*search-s.journal"),
        found(),
    ):
        pass


# The command and the report


@pytest.fixture
def main(monkeypatch, tmp_path, capsys, found):
    """Calls `search` in this process, eager, on synthetic data; returns status, stdout and stderr."""
    import main as program

    base = {"dataset": "synthetic", "widths": [8], "batch_size": 100, "epochs": 1, "dropout": 0.0}
    project = program.PROJECT._replace(suites={"d": {"base": base}}, ablations={}, default="d", former={})
    monkeypatch.setattr(
        program, "PROJECT", project._replace(searches={"s": {**SEARCH, "base": "base", "norm": "layer"}})
    )
    monkeypatch.setattr(program.stop, "install", lambda: None)

    def main(*argv):
        status = program.main(["search", *map(str, argv), "--out", str(tmp_path / "out")])
        return status, *capsys.readouterr()

    return main


def test_the_command_searches_compares_on_fresh_seeds_and_reports(main, tmp_path):
    status, text, _ = main("s", "--trials", 3, "--max-seeds", 6)
    assert status == 0
    lines = text.splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("trial ")] == [f"trial {i} of 3" for i in (1, 2, 3)]
    assert text.count("after the start of the process") == 1, "the comparison waits for no process"
    sentence, pasted = lines[-2:]
    said = r"[0-9.]+% on validation \(chosen among 3\); with [0-9]+ fresh seeds [0-9.]+%; (.*) base norm=layer (.*)"
    assert re.fullmatch(rf"(best trial|trial [123], number [23] of the search,) {said}", sentence)
    spec = eval(pasted.removeprefix("to paste into experiments/: "))
    records = list(read_records(tmp_path / "out"))
    assert resolve(spec) in [record.spec for record in records if record.seed == 0]
    fresh = {record.seed for record in records} - {0}
    assert fresh == set(range(1, len(fresh) + 1))
    results = (tmp_path / "out" / "results.md").read_text()
    section = results.split("\n## Searches\n")[1].split("\n## ")[0]
    assert sentence in section
    assert "checkpoints/search-s.svg" in section
    assert not any("| s (" in line for line in results.splitlines()), "trials are in no other table"
    assert b"<dc:identifier>" in (tmp_path / "out" / "checkpoints" / "search-s.svg").read_bytes()
    status, text, _ = main("s", "--trials", 3, "--max-seeds", 6, "--json")
    assert (status, json.loads(text.splitlines()[-1])["sentence"]) == (0, sentence), "nothing is trained again"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["t"], "unknown search 't'; known are s"),
        (["s", "--trials", 0], "--trials 0"),
        (["s", "--minutes", 0], "--minutes 0"),
        (["s", "--max-seeds", 3], "--max-seeds 3, expected "),
    ],
)
def test_a_bad_question_is_refused_before_anything_is_trained(main, tmp_path, argv, words):
    status, _, text = main(*argv)
    assert (status, len(text.splitlines())) == (2, 1)
    assert words in text
    assert not (tmp_path / "out").exists()


def test_without_optuna_a_sentence_says_how_to_have_it(main, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    said = "error: Optuna is not installed: `uv run --group search main.py search s` has it"
    status, out, text = main("s")
    assert (status, out, text.splitlines()[1:]) == (2, "", [said])
    assert not (tmp_path / "out").exists(), "nothing is written"


def test_a_dry_run_says_what_it_takes_and_writes_nothing(main, tmp_path):
    status, text, _ = main("s", "--dry-run")
    assert status == 0
    assert [line.split(",")[0] for line in text.splitlines()] == ["60 trials", "comparison of 4 with 20 seeds"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("gain", "verdict"), [(0.05, "beats"), (-0.05, "is beaten by")])
def test_the_best_trial_of_a_search_may_be_the_base(tmp_path, gain, verdict):
    """It is not compared with itself. If it is the best on fresh seeds too, there is nothing to paste."""
    lrs = (1e-3, 2e-3, 3e-3, 4e-3)
    trials = [make("lr-1e-3" if lr == 1e-3 else "s", lr=lr, validation=0.6 - lr) for lr in lrs]
    candidates = [Candidate(searches.label("s", n), "s", trials[n - 1].spec) for n in (2, 3, 4)]
    question = Question(candidates=[*candidates, Candidate("lr-1e-3", "lr-1e-3", trials[0].spec)], first_seed=1)
    question.data = trials[0].data
    fresh = [(seed, seed % 3 / 1000) for seed in range(1, 9)]
    records = [make("s", lr=lr, seed=seed, validation=0.5 + gain + noise) for lr in lrs[1:] for seed, noise in fresh]
    records += [make("lr-1e-3", lr=1e-3, seed=seed, validation=0.5) for seed, _ in fresh]
    write(tmp_path, [*trials, *records])
    question.write(tmp_path)
    space.Trials("s", "lr-1e-3", ["lr"], [], [r.spec_id for r in trials], question.file).write(tmp_path)
    rebuild.rebuild(tmp_path, Catalog({"d": {"lr-1e-3": {}}}))
    section = (tmp_path / "results.md").read_text().split("\n## Searches\n")[1].split("\n## ")[0]
    assert "**trial 2, number 2 of the search, 59.8% on validation (chosen among 4); with 8 fresh seeds" in section
    assert f"; {verdict} lr-1e-3 by " in section
    assert ("to paste" in section) == (verdict == "beats")


def test_the_report_of_a_search_stopped_trials_and_all(tmp_path):
    records = [make("s", lr=0.001 * i, validation=0.5 + i / 100, seed=0) for i in range(1, 13)]
    records += [partial("s", lr=0.1), failed("s", lr=0.2), make("lr-1e-3", validation=0.56)]
    write(tmp_path, records)
    ids = [record.spec_id for record in records[:-1]]
    space.Trials("s", "lr-1e-3", ["lr", "widths"], ["lr"], ids).write(tmp_path)
    rebuild.rebuild(tmp_path, Catalog({"d": {"lr-1e-3": {}}}))
    text = (tmp_path / "results.md").read_text()
    section = text.split("\n## Searches\n")[1].split("\n## ")[0]
    assert "**best trial 62.0% on validation (chosen among 14); not compared on fresh seeds yet.**" in section
    assert "Of 14 trials, 1 fell behind and stopped early, and 1 failed" in section
    rows = [line for line in section.splitlines() if line.startswith("| 1")]
    assert rows[0] == "| 12 | 62.00% | 0.012 | 1024-512-256 |"
    assert "failed: the loss" not in text, "a trial that fails is in the section of the search alone"
    before = (tmp_path / "checkpoints" / "search-s.svg").read_bytes()
    rebuild.rebuild(tmp_path, Catalog({"d": {"lr-1e-3": {}}}), redraw=True)
    assert (tmp_path / "checkpoints" / "search-s.svg").read_bytes() == before
    (tmp_path / "checkpoints" / "search-s.json").write_text("{}")
    with pytest.raises(StoreError, match="is not a file that `search` has written"):
        space.Trials("s", "lr-1e-3", ["lr"], [], ids).write(tmp_path)
