"""Grids, seeds, estimates and progress: what a sweep consists of."""

import re

import numpy as np
import pytest
from msgspec.structs import replace

from core import estimate, plan, terminal
from core.commands import options
from core.errors import UserError
from core.events import Ended, EpochDone, FirstStep, OnCluster, Started, StepDone
from core.functional import model
from core.listeners import progress
from core.runs.record import check_name
from core.spec import resolve
from core.tally import Tally
from experiments import SUITES
from tests.conftest import EXPERIMENTS
from tests.test_report import failed, make

GRID = {"lr": [1e-3, 5e-4], "dropout": [0, 0.2], "epochs": 3}


# Grids


def test_a_grid_is_every_combination_in_the_order_written():
    assert list(plan.expand("wide", GRID).items()) == [
        ("wide-lr=0.001-dropout=0", {"lr": 1e-3, "dropout": 0, "epochs": 3}),
        ("wide-lr=0.001-dropout=0.2", {"lr": 1e-3, "dropout": 0.2, "epochs": 3}),
        ("wide-lr=0.0005-dropout=0", {"lr": 5e-4, "dropout": 0, "epochs": 3}),
        ("wide-lr=0.0005-dropout=0.2", {"lr": 5e-4, "dropout": 0.2, "epochs": 3}),
    ]


def test_widths_are_a_list_and_a_grid_of_them_a_list_of_lists():
    assert plan.expand("x", {"widths": [64, 32]}) == {"x": {"widths": [64, 32]}}
    grid = plan.expand("x", {"widths": [[64, 32], [], (8,)]})
    assert [spec["widths"] for spec in grid.values()] == [[64, 32], [], [8]]
    assert list(grid) == ["x-widths=64x32", "x-widths=none", "x-widths=8"]


def test_numpy_arrays_ranges_and_tuples_are_axes():
    """A notebook writes np.logspace. The members, their names and their ids are those of plain lists."""
    arrays = {
        "lr": np.array([1e-3, 5e-4]),
        "epochs": range(1, 3),
        "dropout": (np.float64(0.1), 0),
        "widths": np.array([[64, 32], [8, 8]]),
        "ema": np.float64(0.5),
        "batch_size": np.array(100),
    }
    lists = {
        "lr": [1e-3, 5e-4],
        "epochs": [1, 2],
        "dropout": [0.1, 0],
        "widths": [[64, 32], [8, 8]],
        "ema": 0.5,
        "batch_size": 100,
    }
    grid = plan.expand("x", arrays)
    assert list(grid.items()) == list(plan.expand("x", lists).items())
    assert len(grid) == 16
    runs, same = plan.runs(grid, {}, np.arange(2)), plan.runs(plan.expand("x", lists), {}, range(2))
    assert [(run.name, run.spec) for run in runs] == [(run.name, run.spec) for run in same]
    assert plan.catalog({"s": {"x": arrays}, "t": {"x": arrays}})["x"] == grid


SIX = {
    "activation": ["leaky_relu", "relu"],
    "optimizer": ["adam", "nesterov"],
    "schedule": ["constant", "cosine"],
    "label_smoothing": [0.1, 0.15],
    "weight_decay": [0.0005, 0.001],
    "warmup_epochs": [1, 2],
}


def test_names_that_are_too_long_are_shortened_and_stay_unique():
    """The names are folders and never change: a run that was trained is found again."""
    grid = plan.expand("six", SIX)
    assert len(grid) == 64
    for name, spec in grid.items():
        check_name(name)
        assert name.startswith("six-activation=")
        assert resolve(spec)["activation"] == name.split("=")[1].split("-")[0]
    assert next(iter(grid)) == (
        "six-activation=leaky_relu-optimizer=adam-schedule=constant-label_smoothing=0.1-weight_d-704edf12cf20"
    )
    fits = {key: SIX[key] for key in list(SIX)[:4]}
    assert all(name.count("=") == 4 for name in plan.expand("four", fits)), "a name that fits is written out"
    with pytest.raises(UserError, match="two members of its grid are named six-"):
        plan.expand("six", {**SIX, "warmup_epochs": [1, 1]})


def test_names_of_members_are_valid():
    every = {
        "widths": [[1024, 512], []],
        "augment": ["flip+shift"],
        "lr": [1e-30, 1.5e10],
        "activation": ["leaky_relu"],
        "weight_decay": [1e-4],
    }
    for name, spec in plan.expand("x", every).items():
        check_name(name)
        resolve(spec)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"lr": []}, "lr = [], expected at least one value"),
        ({"lr": [1e-3, 0.001]}, "two members of its grid are named wide-lr=0.001"),
        ({"dropout": [0, 0.0]}, "two members of its grid are named wide-dropout=0"),
        ({"seed": [0, 1]}, "seed = [0, 1], expected one seed; --seeds trains several"),
        ({"lr": [0.1] * 101, "dropout": [0.1] * 100}, "its grid has 10,100 members, expected at most 10,000"),
        ({key: [0.1] * 1000 for key in "abcdefgh"}, "its grid has 1,000,000,000,000,000,000,000,000 members"),
        ([1e-3], "a spec is a dict, found list"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_an_invalid_grid_is_refused(spec, words):
    with pytest.raises(UserError, match=re.escape(f"experiment wide: {words}")):
        plan.expand("wide", spec)


def test_a_name_is_a_suite_a_grid_or_an_experiment():
    found = plan.catalog({"s": {"wide": GRID, "x": {}}, "t": {"x": {}}})
    members = plan.expand("wide", GRID)
    assert found["s"] == {**members, "x": {}}
    assert found["wide"] == members
    assert found["t"] == found["x"] == {"x": {}}
    assert all(found[name] == {name: spec} for name, spec in members.items())
    assert plan.experiments(SUITES).keys() >= {"lr-1e-3", "baseline", "smoke"}


@pytest.mark.parametrize(
    "suites",
    [
        {"s": {"x": {}}, "t": {"x": {"lr": 0.1}}},  # one experiment would hide the other
        {"s": {"wide": {"lr": [0.1, 0.2]}, "wide-lr=0.1": {"lr": 0.3}}},
        {"x": {"x": {}, "y": {}}},
        {"s": {"wide": {"lr": [0.1, 0.2]}}, "t": {"wide": {"lr": [0.1, 0.3]}}},
    ],
)
def test_an_ambiguous_name_is_refused(suites):
    with pytest.raises(UserError, match=r"the name (x|wide|wide-lr=0.1) stands for two different things"):
        plan.catalog(suites)


@pytest.mark.parametrize(
    "name", ["results.csv", "metrics.json", "learning-curves.svg", "x.PNG", "results.lock", "a.1.tmp"]
)
def test_names_of_files_of_the_report_are_refused(name):
    """The folder of such an experiment would be where a file has to be."""
    with pytest.raises(UserError, match=f"'{name}' cannot name an experiment, as files of the report end in"):
        plan.runs({name: {}}, {})


@pytest.mark.parametrize("suite", ["a/b", "..", "x" * 101, "", "a\n"])
def test_a_suite_whose_picture_could_not_be_written_is_refused(suite):
    with pytest.raises(UserError, match="cannot name a suite"):
        plan.catalog({suite: {"x": {}}})


@pytest.mark.parametrize("name", ["con", "NUL", "aux.b", "Com1", "lpt9.lr=0.1", "x."])
def test_names_that_windows_cannot_have_are_refused(name):
    with pytest.raises(UserError, match=f"^'{name}' cannot name an experiment, as Windows has no files of that name"):
        plan.runs({name: {}})
    with pytest.raises(UserError, match="cannot name a suite"):
        plan.catalog({name: {"x": {}}})
    for good in (f"x{name}x", "console", "com10", "x.con"):
        check_name(good)


@pytest.mark.parametrize("suites", [{"s": {"Wide": {}, "wide": {}}}, {"s": {"Wide": {}}, "wide": {"x": {}}}])
def test_names_that_differ_only_in_case_are_refused(suites):
    with pytest.raises(UserError, match=r"the names (Wide|wide) and (Wide|wide) in experiments/ differ only in case"):
        plan.catalog(suites)


# Seeds


def test_seeds():
    assert list(plan.parse_seeds("5")) == [0, 1, 2, 3, 4]
    assert list(plan.parse_seeds("1")) == [0]
    assert list(plan.parse_seeds("11,3,7")) == [11, 3, 7]


@pytest.mark.parametrize(
    "text", ["0", "-1", "-1,2", "3,3", "3,03", "many", "", "3,", ",", "1.5", "1e3", "5 ", "\u0665", "9" * 5000]
)
def test_invalid_seeds_are_refused(text):
    with pytest.raises(UserError, match=r"^--seeds .*, expected how many"):
        plan.parse_seeds(text)


def test_every_experiment_has_a_seed_before_any_has_the_next():
    runs = plan.runs({"a": {}, "b": {"lr": 0.1}}, {"epochs": 3}, range(2))
    assert [(run.name, run.seed) for run in runs] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert runs[3].spec == resolve({"lr": 0.1, "epochs": 3, "seed": 1})
    [run] = plan.runs({"a": {"seed": 4}})
    assert (run.name, run.spec) == ("a", resolve({"seed": 4}))


@pytest.mark.parametrize(
    ("experiments", "seeds", "words"),
    [
        ({"a": {}, "b": {}}, range(5_001), "10,002 runs, expected at most 10,000 in one call"),
        ({"a": {}}, range(10**9), "1,000,000,000 runs"),
        ({"a": {"lrr": 1}}, None, "experiment a: unknown key 'lrr'"),
        ({"a" * 101: {}}, None, "cannot name an experiment"),
        ({"a": {}}, [2**31], "experiment a: seed = 2147483648"),
    ],
)
def test_invalid_or_too_many_runs_are_refused(experiments, seeds, words):
    with pytest.raises(UserError, match=re.escape(words)):
        plan.runs(experiments, {}, seeds)


def test_ten_thousand_runs_are_not_too_many():
    assert len(plan.runs({f"x{i}": {} for i in range(100)}, {}, range(100))) == 10_000


# Estimates


OTHERS = {  # networks that no experiment has
    "layer norm": {"norm": "layer"},
    "blocks": {"expansion": 4, "norm": "layer", "widths": [64, 64, 32, 10]},
    "blocks without norm": {"expansion": 1, "norm": "none", "widths": [3072, 64]},
    "no blocks": {"expansion": 2, "widths": []},
}


@pytest.mark.parametrize("name", EXPERIMENTS | OTHERS)
def test_the_work_of_a_run_is_parameters_times_epochs(name):
    spec = resolve((EXPERIMENTS | OTHERS)[name])
    small = {**spec, "widths": [max(1, width // 16) for width in spec["widths"]]}
    params, _ = model.init(small, 0)
    assert estimate.work(small) == sum(p.numel() for p in params.values()) * spec["epochs"]


def test_an_estimate_is_what_was_measured_here():
    """Seconds in proportion to epochs for the same shape; to parameters, too, for another; nothing from elsewhere."""
    here = make("a", lr=1e-3)
    name, threads, epochs = here.environment.device_name, here.environment.threads, here.spec["epochs"]
    took = epochs * here.metrics.train.n / 9002  # samples a second, as the median of the epochs has it
    known = estimate.Measured([here, failed("b")], name, threads)
    assert known.estimate([here.spec]).seconds == pytest.approx(took)
    longer = {**here.spec, "epochs": 7 * epochs, "lr": 0.1, "seed": 3}
    assert known.estimate([longer, here.spec], compiled=False).seconds == pytest.approx(8 * took)
    small = resolve({"widths": [64], "epochs": epochs})
    ratio = estimate.work(small) / estimate.work(here.spec)
    assert known.estimate([small]).seconds == pytest.approx(ratio * took)
    assert known.estimate([{**small, "precision": "bfloat16"}, small]).seconds is None
    assert estimate.Measured([here], "another machine", threads).estimate([here.spec]).seconds is None
    assert estimate.Measured([here], name, threads + 1).estimate([here.spec]).seconds is None
    assert estimate.Measured([], name, threads).estimate([]) == (0, 0, 0)


def test_an_estimate_needs_more_than_a_moment():
    """The first step compiles, so it is not timed: of a run of one step nothing is, of a run of two steps one."""
    for batch_size, seconds, speed in ((45_000, 0.0, 0), (22_500, 0.9, 25_000)):
        short = make("a", epochs=1, batch_size=batch_size)
        short.history = [replace(short.history[0], seconds=seconds, samples_per_second=speed)]
        name, threads = short.environment.device_name, short.environment.threads
        found = estimate.Measured([short], name, threads).estimate([short.spec])
        assert terminal.estimate(found).startswith("time not measured here yet, ")
    assert terminal.estimate(estimate.Estimate(0.3, 0, 0)) == "under a second, 0 bytes"


def test_the_bytes_of_an_estimate():
    spec = resolve({})
    found = estimate.Measured([], "here", 1).estimate([spec, spec])
    assert found.kept == pytest.approx(2 * 4 * 3_809_034, rel=0.01)
    assert found.meanwhile == 3 * 3 * 4 * 3_809_034
    assert terminal.estimate(found) == "time not measured here yet, 30.5 MB"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (41, "41 s"), (99.6, "2 min"), (530, "9 min"), (7500, "2 h 5 min"), (6e5, "166 h 40 min")],
)
def test_durations(seconds, text):
    assert terminal.duration(seconds) == text


# Progress


@pytest.fixture
def tally():
    """Two experiments of 3 epochs with two seeds each."""
    return Tally(plan.runs({"a": {"lr": 0.1}, "b": {"lr": 0.2}}, {"epochs": 3}, range(2)))


def test_progress_shows_the_time_left_and_the_best_mean(tally):
    tally.add(make("a", seed=0, validation=0.55, epochs=3))
    assert tally.seconds_left() is None
    assert progress.progress(tally) == "1 of 4 done; best so far a, validation 55.00%"
    tally.add(make("b", seed=0, validation=0.50, epochs=3), seconds=30)
    assert progress.progress(tally) == "2 of 4 done, about 60 s left; best so far a, validation 55.00%"
    tally.add(make("a", seed=1, validation=0.40, epochs=3), seconds=60)
    assert progress.progress(tally) == "3 of 4 done, about 45 s left; best so far b, validation 50.00%"
    tally.add(make("b", seed=1, validation=0.52, epochs=3), seconds=60)
    assert progress.progress(tally) == "4 of 4 done; best so far b, mean validation of 2 seeds 51.00%"


def test_a_pause_of_an_hour_does_not_change_the_time_left(tally):
    for seed, seconds in enumerate((30, 3600, 30)):
        tally.add(make("ab"[seed % 2], seed=seed, epochs=3), seconds=seconds)
    assert tally.seconds_left() == pytest.approx(30)


def test_a_resumed_run_counts_with_the_time_of_all_its_steps(capsys):
    runs = plan.runs({"a": {}}, {"epochs": 3}, range(3))
    display = progress.Display(Tally(runs), verbose=False)
    for run, seconds, left in ((runs[0], 2.0, "20 s"), (runs[1], 11.75, "11 s")):
        display(run, Started(1))
        display.started -= seconds
        display(run, Ended(make("a", seed=run.seed, epochs=3)))  # 9.75 s of training
        assert f"{run.seed + 1} of 3 done, about {left} left" in capsys.readouterr().out


def test_a_run_that_ends_twice_counts_once(capsys):
    """Its cohort was too large for the remaining runs, so all start again one by one."""
    runs = plan.runs({"a": {}}, {"epochs": 3}, range(2))
    display = progress.Display(Tally(runs), verbose=False)
    for run in runs:
        display(run, Started(2))
    for _ in range(2):
        display(runs[0], Ended(make("a", seed=0, epochs=3)))
    display(runs[1], Started(1))
    display(runs[1], Ended(make("a", seed=1, epochs=3)))
    assert display.tally.done == 2
    ended = [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if " done" in line]
    assert ended == ["a seed 0", "a seed 1"]


def test_off_a_terminal_a_line_every_half_minute_says_how_far_a_run_is(capsys, monkeypatch):
    [run, other] = plan.runs({"a": {}}, {"epochs": 3}, range(2))
    now = 100.0
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now)
    display = progress.Display(Tally([run, other]), verbose=False)
    display(run, Started(1))
    assert capsys.readouterr().out == "a seed 0: starts; a step that is new here has to be compiled\n"
    display(run, FirstStep(1, 201))
    capsys.readouterr()
    for step in range(2, 102):  # a second each
        now += 1
        display(run, StepDone(step))
        if step == 80:
            display(run, EpochDone(1, 0.1, 1.5, 0.5, 1.4, 0.56, 79.0, 1000))
    assert capsys.readouterr().out.splitlines() == [
        "a seed 0: step 31 of 201, about 3 min left",
        "a seed 0: step 61 of 201, about 2 min left",
        "a seed 0: step 91 of 201, validation 56.00%, about 2 min left",
    ]
    display(run, Ended(make("a", seed=0, epochs=3)))
    capsys.readouterr()
    display(other, Started(1))
    assert not capsys.readouterr().out, "only the first run of a process may have to wait for the compiler"


def test_on_a_cluster_a_bar_of_all_runs_begins_with_the_first(capsys):
    """Not before: the data may be fetched, with a bar of its own."""
    runs = plan.runs({"a": {}}, {"epochs": 3}, range(2))
    with progress.Display(Tally(runs), verbose=False, on_cluster=True) as display:
        assert display.bars is None
        display(runs[0], Ended(make("a", seed=0, epochs=3)))  # another process has trained it
        display(runs[1], Started(1))
        bar = display.bars
        display(runs[1], Started(1))
        assert bar is display.bars
        assert bar.tasks[0].completed == 1
        display(runs[1], Ended(make("a", seed=1, epochs=3)))
        assert bar.tasks[0].completed == bar.tasks[0].total == 2
    assert capsys.readouterr().out.count("on the cluster") == 2


def test_off_a_terminal_a_line_every_half_minute_says_how_many_runs_a_cluster_has(capsys, monkeypatch):
    runs = plan.runs({"a": {}}, {"epochs": 3}, range(3))
    now = 100.0
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now)
    with progress.Display(Tally(runs), verbose=False, on_cluster=True) as display:
        display(runs[0], Started(1))
        for second in range(70):
            now += 1
            display(runs[0], OnCluster(3 if second < 40 else 1))
        assert capsys.readouterr().out.splitlines() == [
            "the cluster has 3 runs (0 of 3 done)",
            "the cluster has 1 run (0 of 3 done)",
        ]


def test_of_many_runs_a_sentence_names_three():
    assert options.labels(plan.runs({"a": {}}, {}, range(3))) == "a seed 0, a seed 1, a seed 2"
    assert options.labels(plan.runs({"a": {}}, {}, range(5))) == "a seed 0, a seed 1, a seed 2 and 2 more"


def test_a_run_that_is_left_out_counts_neither_as_done_nor_as_left(tally):
    for seed in range(2):
        tally.leave_out(plan.runs({"b": {}}, {"epochs": 3, "seed": seed})[0])
        tally.add(make("a", seed=seed, epochs=3), 2.0)
    assert (tally.done, tally.total, tally.seconds_left()) == (2, 2, 0)


def test_a_table_has_a_row_for_each_experiment(tally, capsys):
    for seed in range(2):
        for name in "ab":
            tally.add(make(name, seed=seed, test=0.5 + seed / 100, epochs=3))
    tally.add(failed("a", seed=2))
    terminal.table(tally)
    heading, *rows = capsys.readouterr().out.splitlines()
    assert "seeds" in heading
    assert [row.split()[0] for row in rows] == ["a", "b"]
    assert all("50.50 ± 0.71%" in row for row in rows)


def test_a_table_of_very_many_shows_the_best(capsys):
    tally = Tally(plan.runs({f"x{i}": {} for i in range(100)}, {}))
    for i in range(100):
        tally.add(make(f"x{i}", validation=0.3 + i / 200))
    terminal.table(tally)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 30 + 1
    assert lines[1].split()[0] == "x99"
    assert lines[-1] == "the best 30 of 100 experiments by validation accuracy"
