"""Comparisons that end when the answer is clear: by simulation, on records made by hand, and the command.

uv run python -m tests.test_compare      prints the tables of docs/compare.md
"""

import contextlib
import functools
import json
import math
import re

import msgspec
import numpy as np
import pytest
from scipy import special, stats

import main
from core import compare
from core.commands import run as run_command
from core.compare import Candidate, Question
from core.report import plots, questions, text
from core.runs import layout
from core.runs.record import read_records
from core.runs.run import Run
from core.store import StoreError, locked
from experiments import SUITES
from tests.conftest import ROOT
from tests.test_report import failed, make

SEEDS, TRIALS, ALPHA = 50, 10_000, 0.05
WIDTHS = np.array([math.inf, *(compare.half_width(1.0, n, ALPHA) for n in range(2, SEEDS + 1))])
NAIVE = np.array([math.inf, *(special.stdtrit(n - 1, 1 - ALPHA / 2) / n**0.5 for n in range(2, SEEDS + 1))])


# By simulation


@functools.cache
def noise(kind):
    """Differences of 10,000 comparisons with 50 seeds each, with mean 0."""
    random = np.random.default_rng(0)
    if kind == "normal":
        return random.standard_normal((TRIALS, SEEDS))
    if kind == "t with 3 degrees":
        return random.standard_t(3, (TRIALS, SEEDS)) / 3**0.5
    # Of each candidate, 5% of all runs diverge: 47 points, 94 deviations, worse than the others.
    diverged = random.random((2, TRIALS, SEEDS)) < 0.05
    return random.standard_normal((TRIALS, SEEDS)) + 94 * (diverged[0].astype(float) - diverged[1])


KINDS = ("normal", "t with 3 degrees", "diverged")


def intervals(kind, shift, widths=WIDTHS):
    """Means and half-widths, [trial, number of seeds - 1], in deviations of one difference."""
    values, n = noise(kind) + shift, np.arange(1, SEEDS + 1)
    means = values.cumsum(1) / n
    squares = (values**2).cumsum(1) - n * means**2
    with np.errstate(invalid="ignore"):
        return means, np.where(n > 1, (squares.clip(0) / np.maximum(n - 1, 1)) ** 0.5 * widths, math.inf)


def first(found):
    """At how many seeds each trial first has what is asked; 1,000 if it never has."""
    return np.where(found.any(1), found.argmax(1) + 1, 1000)


def wrong(kind, widths=WIDTHS):
    """The share of comparisons of equals that ever call a winner."""
    means, half = intervals(kind, 0.0, widths)
    return (np.abs(means) > half).any(1).mean()


@pytest.mark.parametrize("kind", KINDS)
def test_looking_often_does_not_make_it_wrong(kind):
    """The interval of one look, read at every look, is wrong several times as often as it says."""
    assert wrong(kind) <= ALPHA
    assert wrong(kind, NAIVE) > (4 if kind == "normal" else 2) * ALPHA


def test_the_width_is_the_set_of_means_that_the_bayes_factor_does_not_reject():
    """Against the integral over the effect size: a noncentral t density, weighted by a standard normal prior."""
    n, deviation = 12, 1.7
    t = compare.half_width(deviation, n, ALPHA) * n**0.5 / deviation
    effects = np.linspace(-8, 8, 4001)
    effects = np.linspace(-6, 6, 601)
    densities = stats.nct.pdf(t, n - 1, effects * n**0.5)
    factor = np.trapezoid(densities * stats.norm.pdf(effects), effects)
    assert factor / stats.t.pdf(t, n - 1) == pytest.approx(1 / ALPHA, rel=1e-4)


@pytest.mark.parametrize(("difference", "most"), [(0.5, 40), (1.0, 14), (2.0, 8)])
def test_a_difference_is_found(difference, most):
    """In half of all cases with so many seeds or fewer."""
    means, half = intervals("normal", difference)
    assert np.median(first(means > half)) <= most
    assert not (means < -half).any(1).mean() > 0.001


def test_an_equal_pair_ends_as_within():
    """With a deviation that is the difference that matters, as for the default network: within 50 seeds."""
    means, half = intervals("normal", 0.0)
    ends = first(np.abs(means) + half < 1)
    assert (ends <= SEEDS).mean() > 0.97
    assert np.median(ends) <= 20
    # A true difference of exactly 1 is called smaller in at most 5%.
    means, half = intervals("normal", 1.0)
    assert (np.abs(means) + half < 1).any(1).mean() <= ALPHA


def page():
    """The tables of docs/compare.md."""
    found = {
        difference: first(np.abs(m) > h) for difference in (0.5, 1.0, 2.0) for m, h in [intervals("normal", difference)]
    }
    means, half = intervals("normal", 0.0)
    found_within = first(np.abs(means) + half < 1)
    wrong_rows = [(kind, f"{wrong(kind):.1%}", f"{wrong(kind, NAIVE):.1%}") for kind in KINDS]
    rows = [(f"{d:g} deviations", "better", ends) for d, ends in found.items()] + [
        ("none", "within 1 deviation", found_within)
    ]
    seeds = [
        (what, answer, f"{(ends <= SEEDS).mean():.0%}", *(_count(np.percentile(ends, q)) for q in (10, 50, 90)))
        for what, answer, ends in rows
    ]
    widths = [(str(n), f"{WIDTHS[n - 1]:.2f}", f"{NAIVE[n - 1]:.2f}") for n in (5, 6, 8, 12, 20, 30, 50)]
    return [
        text.grid(("differences of single seeds", "this interval", "interval of one look"), wrong_rows),
        text.grid(("true difference", "answer", "decided by 50 seeds", "10% by", "50% by", "90% by"), seeds),
        text.grid(("seeds", "this interval", "interval of one look"), widths),
    ]


def _count(seeds):
    return "more than 50" if seeds > SEEDS else f"{seeds:.0f}"


def test_the_tables_of_the_page_are_current():
    said = (ROOT / "docs" / "compare.md").read_text(encoding="utf-8")
    assert all(table in said for table in page())


# What the records say


def records_of(label_of, differences, **changes):
    """Two experiments whose validation accuracies differ by these points, seed by seed."""
    noise = [0.1, -0.4, 0.3, 0.0, 0.2, -0.1, 0.4, -0.3]
    a = [make("a", seed=i, validation=0.5 + noise[i % 8] / 100 + d / 100) for i, d in enumerate(differences)]
    b = [make("b", seed=i, validation=0.5 + noise[i % 8] / 100, lr=0.1) for i in range(len(differences))]
    return [*a, *b]


A, B, C = (
    Candidate("a", "a", {"epochs": 2}),
    Candidate("b", "b", {"epochs": 2, "lr": 0.1}),
    Candidate("c", "c", {"epochs": 3}),
)


def answer(records, **changes):
    question = Question(**{"candidates": [A, B], "max_seeds": 8, **changes})
    found = compare.look(question, compare.assign(question, records))
    return found, questions.sentence(question, found)


def test_the_three_answers_in_a_sentence():
    found, said = answer(records_of("a", [1.0, 1.2, 0.8, 1.0, 1.2, 0.8]))
    width = compare.half_width(np.std([1.0, 1.2, 0.8, 1.0, 1.2, 0.8], ddof=1), 6, ALPHA)
    assert said == f"a beats b on validation: 1.00 ± {width:.2f}, 6 seeds, 95% at every look"
    found, said = answer(records_of("a", [-0.1, 0.1, 0.0, -0.1, -0.1, 0.1, -0.1, 0.0]))
    assert said == "b and a differ by less than 0.5 points on validation: 0.03 ± 0.13, 8 seeds, 95% at every look"
    found, said = answer(records_of("a", [2, -2, 1, 3, -1, 2, 0, -1]))
    assert found.answer == "undecided"
    assert re.fullmatch(r"a and b cannot be told apart on validation: .*\. About [\d,]+ seeds would decide it", said)
    found, said = answer(records_of("a", [2, -2, 1, 3]))
    assert (found.answer, said[:46]) == ("", "a and b cannot be told apart on validation yet")


def test_no_answer_depends_on_the_test_split():
    records = records_of("a", [1.0, 1.2, 0.8, 1.0, 1.2, 0.8])
    others = [make(r.name, test=0.9 - i / 100, validation=compare.accuracy(r), **r.spec) for i, r in enumerate(records)]
    assert [r.metrics.test.accuracy for r in others] != [r.metrics.test.accuracy for r in records]
    assert answer(others) == answer(records)


def test_a_diverged_run_counts_as_chance_and_another_failure_as_nothing():
    records = records_of("a", [0, 0, 0, 0, 0])[:-1]
    found, said = answer([*records, failed("b", seed=4, lr=0.1)])
    assert found.pairs[0].difference.mean == pytest.approx((50.2 - 10) / 5)
    assert said.endswith(". 1 run of b diverged and counts as chance")
    other = msgspec.structs.replace(failed("b", seed=4, lr=0.1), error="out of memory on cpu")
    assert answer([*records, other])[0].pairs[0].difference.n == 4


def test_the_picture_has_the_interval_after_each_seed():
    records = records_of("a", [1, 2, 0, 1, 2, 1, 0])
    question = Question(candidates=[A, B])
    known = compare.assign(question, records)
    (picture,) = questions.pictures([questions.Asked(question, known, compare.look(question, known))])
    within, [(label, seeds, means, widths)] = picture.content
    assert (within, label, seeds) == (0.5, "a minus b", [5, 6, 7])
    assert means == pytest.approx([6 / 5, 7 / 6, 1.0])
    assert widths[2] == pytest.approx(compare.half_width(np.std([1, 2, 0, 1, 2, 1, 0], ddof=1), 7, ALPHA))
    assert plots.is_picture(plots.draw(picture))


def test_the_picture_of_one_look_has_its_interval():
    """A line through one point shows nothing."""
    question = Question(candidates=[A, B])
    known = compare.assign(question, records_of("a", [1, 2, 0, 1, 2]))
    (picture,) = questions.pictures([questions.Asked(question, known, compare.look(question, known))])
    _, [(_, [seeds], [mean], [half])] = picture.content
    [ax] = plots.paint(picture).axes
    [bar] = ax.containers
    assert bar[2][0].get_segments()[0][:, 1] == pytest.approx([mean - half, mean + half])
    low, high = ax.get_xlim()
    assert [tick for tick in ax.get_xticks() if low <= tick <= high] == [seeds] == [5]
    assert [text.get_text() for text in ax.texts] == ["a\nminus b"]


def test_rounds_grow_and_a_beaten_candidate_gets_no_more_seeds():
    asked = []

    def train(todo):
        asked.append([(candidate.label, seed) for candidate, seed in todo])
        shift = {"a": 0.5, "b": 0.5, "c": 0.3}
        return [
            make(
                each.name,
                seed=seed,
                validation=shift[each.label] + 0.002 * ((seed * 7 + (each.label == "a") * seed) % 5),
                **{key: each.spec[key] for key in ("epochs", "lr")},
            )
            for each, seed in todo
        ]

    question = Question(candidates=[A, B, C], max_seeds=30)
    have = [make("a", seed=0, validation=0.5)]
    *_, last = compare.rounds(question, have, train)
    first_round = compare.first_look(question.alpha)
    assert first_round == 6
    assert len(asked[0]) == 3 * 6 - 1
    assert ("a", 0) not in asked[0]
    assert {label for each in asked[1:] for label, _ in each} == {"a", "b"}
    sizes = np.cumsum([len({seed for _, seed in each}) for each in asked])
    assert sizes.tolist() == [6, 7, 8, 10, 12, 15, 18, 22, 27, 30][: len(sizes)]
    assert last.answer
    assert "c" not in last.left
    assert "c is beaten" in questions.sentence(question, last)


# The command


@pytest.fixture
def ask(monkeypatch, tmp_path, capsys):
    """Calls `compare` on the demo for one epoch, eager; returns status, stdout and stderr."""
    monkeypatch.setattr(plots, "draw", lambda picture: b"<dc:identifier>" + 10 * plots.identifier(picture))
    demo = {**SUITES["demo"]["demo"], "epochs": 1}
    monkeypatch.setattr(main, "PROJECT", main.PROJECT._replace(suites={**SUITES, "demo": {"demo": demo}}))

    def ask(*words, out=tmp_path):
        status = main.main(["compare", *words, "--out", str(out), "--no-compile", "--device", "cpu"])
        return status, *capsys.readouterr()

    return ask


def test_a_comparison_goes_on_and_ends_with_a_sentence(ask, tmp_path, monkeypatch):
    better, worse = "demo lr=5e-3", "demo lr=1e-5"
    status, said, _ = ask(better, worse, "--dry-run", "--json")
    assert status == 0
    assert json.loads(said)["first round"] == {"seeds": 5, "runs": 10, "to_train": 10, "estimated_seconds": None}
    assert json.loads(said)["all seeds"]["runs"] == 100
    assert not list(tmp_path.iterdir())

    real = run_command.train

    def stop_in_the_third(args, runs, source, display, stop):
        return 130, real(args, runs[:2], source, display, stop)[1]

    monkeypatch.setattr("core.commands.compare.train", stop_in_the_third)
    assert ask(better, worse)[0] == 130
    monkeypatch.setattr("core.commands.compare.train", real)
    assert "cannot be told apart on validation yet" in (tmp_path / "results.md").read_text()
    for weights in tmp_path.glob("checkpoints/demo/*.safetensors"):
        weights.unlink()  # a record alone counts
    status, said, _ = ask(better, worse, "--dry-run")
    assert "first round: 5 seeds, 10 runs, 8 to train: " in said

    status, said, warned = ask(better, worse, "--json")
    first, *_, last = map(json.loads, said.splitlines())
    assert (status, first["answer"], last["answer"]) == (0, "winner", "winner")
    assert last["left"] == [better]
    assert last["pairs"][0]["seeds"] == 5
    assert re.fullmatch(
        r'"demo lr=5e-3" beats "demo lr=1e-5" on validation: \d+\.\d\d ± \d+\.\d\d, 5 seeds, 95% at every look',
        last["sentence"],
    )
    assert re.fullmatch(
        r'On test, which has no part in the decision, "demo lr=5e-3" minus "demo lr=1e-5" is -?\d+\.\d\d points over 5 '
        r"seeds: ± \d+\.\d\d for other seeds, ± \d+\.\d\d for other test images \(95% each\)\.",
        last["test"],
    )
    assert len(re.findall(r"seed \d: validation", warned)) == 8  # the runs that were missing
    report = (tmp_path / "results.md").read_text()
    assert f"**{last['sentence']}.** {last['test']}" in report
    (picture,) = tmp_path.glob("checkpoints/compare-*.svg")
    assert picture.name in report

    # Again, in another order: it is the same question, and nothing is trained.
    monkeypatch.setattr("core.commands.compare.train", None)
    for words in ((worse, better), (better, worse)):
        status, said, _ = ask(*words)
        assert (status, said.splitlines()) == (0, [said.splitlines()[0], last["sentence"], last["test"]])
    assert len(list(tmp_path.glob("checkpoints/compare-*.json"))) == 1
    assert main.main(["report", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "results.md").read_text() == report


def test_a_comparison_trains_in_cohorts(ask, tmp_path):
    assert ask("demo lr=5e-3", "demo lr=1e-5", "--cohort", "5", "--max-seeds", "5")[0] == 0
    modes = [record.environment.mode for record in read_records(tmp_path)]
    assert modes == ["eager, cohort of 5"] * 10


def test_a_comparison_whose_runs_another_process_trains_ends_without_an_answer(ask, tmp_path, monkeypatch):
    monkeypatch.setattr("core.runs.run.locked", lambda *paths, timeout: locked(*paths, timeout=0))  # does not wait
    spec = {**SUITES["demo"]["demo"], "epochs": 1}
    runs = [Run("demo", {**spec, **change, "seed": i}, tmp_path) for change in ({}, {"lr": 0.1}) for i in range(5)]
    with contextlib.ExitStack() as locks:
        for run in runs:
            locks.enter_context(run.lock())
        status, said, warned = ask("demo", "demo lr=0.1", "--max-seeds", "5")
    assert status == 1
    assert warned.count("is being trained by") == len(runs)
    assert "cannot be told apart" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["demo"], "found 1 candidates, expected 2 to 20"),
        (["demo", " demo "], "demo and demo are the same experiment, expected two that differ"),
        (["demo", "demo epochs=1"], "demo and demo epochs=1 are the same experiment, expected two that differ"),
        (["demo", "dmeo"], "'dmeo'"),
        (["demo", "demo lr=0.1,0.2"], "'demo lr=0.1,0.2' stands for 2 experiments, expected one"),
        (["demo", "lr=0.1"], "'lr=0.1' names 0 experiments, expected one: quote an experiment"),
        (["demo", "demo seed=3"], "'demo seed=3' has a seed"),
        (["demo", "demo train_on=all"], "demo train_on=all trains on all images: it has no validation accuracy"),
        (["demo", "smoke"], "demo, smoke cannot be compared: expected one data set"),
        (["demo", "demo lr=0.1", "--within", "0"], "--within 0, expected points of accuracy above 0"),
        (["demo", "demo lr=0.1", "--confidence", "100"], "--confidence 100, expected percent"),
        (
            ["demo", "demo lr=0.1", "--max-seeds", "1"],
            "--max-seeds 1, expected 5 to 1,000: 2 candidates need at least 5",
        ),
        (["demo", "demo lr=0.1", "--max-seeds", "2000"], "--max-seeds 2000, expected 5 to 1,000"),
    ],
)
def test_a_bad_question_is_one_sentence(ask, tmp_path, words, message):
    status, said, error = ask(*words)
    assert (status, said, error.count("\n")) == (2, "", 1 + ("The data is synthetic" in error))
    assert message in error
    assert not list(tmp_path.iterdir())


def test_a_file_of_somebody_else_is_left_as_it_is(ask, tmp_path):
    question = Question(candidates=[Candidate("a", "a", {}), Candidate("b", "b", {"lr": 0.1})])
    path = tmp_path / question.file
    path.parent.mkdir()
    question.write(tmp_path)
    assert msgspec.to_builtins(layout.read(path, compare.Question, compare.WHAT)) == msgspec.to_builtins(question)
    path.write_text("{}")
    with pytest.raises(StoreError, match="is not a question that `compare` has written"):
        question.write(tmp_path)
    assert compare.read_all(tmp_path) == []
    assert path.read_text() == "{}"


if __name__ == "__main__":
    print("\n".join(page()))
