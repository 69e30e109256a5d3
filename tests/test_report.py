"""results.md and its picture, from records made by hand."""

import os
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from core.report import markdown, plots, stats
from core.report.rebuild import rebuild
from core.runs.record import Failed, Finished, encode
from core.runs.store import StoreError
from core.spec import resolve, spec_id

ROOT = Path(__file__).resolve().parent.parent


def make(name, test=0.57, validation=0.56, train=0.7, **changes):
    """The record of a finished run; `changes` are keys of its spec, which has two epochs unless they say otherwise."""
    spec = resolve({"epochs": 2, **changes})

    def split(accuracy, n, loss):
        correct = round(accuracy * n)
        counts = [correct // 10 + (i < correct % 10) for i in range(10)]
        return {"accuracy": accuracy, "n": n, "loss": loss, "correct": counts, "count": [n // 10] * 10}

    history = [
        {
            "epoch": epoch,
            "train_loss": 2.0 / epoch,
            "train_accuracy": 0.3,
            "val_loss": 2.1 / epoch,
            "val_accuracy": validation - 0.1 / epoch,
            "seconds": 3.25,
            "samples_per_second": 9000 + epoch,
        }
        for epoch in range(1, spec["epochs"] + 1)
    ]
    record = {
        "name": name,
        "status": "finished",
        "spec": spec,
        "spec_id": spec_id(spec),
        "seed": spec["seed"],
        "data": "15fc275e5cae3db098ab0f217a684a1f.dir",
        "environment": {
            "torch": "2.15.0",
            "device": "cpu",
            "hardware": "x86_64 AVX2",
            "mode": "compiled",
            "device_name": "A processor",
            "threads": 2,
            "python": "3.11.7",
            "git": "0123456789ab",
        },
        "parameters": 3809034,
        "history": history,
        "first_step_seconds": 7.5,
        "metrics": {
            "train": split(train, 45_000, 0.9),
            "validation": split(validation, 5_000, 1.3),
            "test": split(test, 10_000, 1.2345),
        },
        "digest": "abcdef0123456789" * 4,
        "bitwise": True,
    }
    return msgspec.convert(record, Finished)


def failed(name, **changes):
    run = make(name, **changes)
    return Failed(
        name=name,
        spec=run.spec,
        spec_id=run.spec_id,
        data=run.data,
        environment=run.environment,
        seed=run.seed,
        error="the loss is NaN since step 7 (epoch 1)",
    )


def write(out, records):
    for record in records:
        folder = out / "checkpoints" / record.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{record.spec_id}.json").write_bytes(encode(record))


def draw(records):
    return plots.draw(plots.content(stats.groups(records)))


def edit_history(record, **changes):
    """The record with other values in its last epoch."""
    return replace(record, history=[*record.history[:-1], replace(record.history[-1], **changes)])


def rows(text):
    """The cells of the first table, without its two lines of heading."""
    table = [line for line in text.split("\n\n")[2].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


EXPERIMENTS = {
    "lr-1e-3": {"epochs": 2, "lr": 1e-3},
    "lr-5e-4": {"epochs": 2, "lr": 5e-4},
    "lr-1e-4": {"epochs": 2, "lr": 1e-4},
    "baseline": {"epochs": 2, "widths": [512], "norm": "none", "activation": "relu", "dropout": 0.0},
}
THREE = [
    # The best on test is not the best on validation.
    make("lr-1e-3", lr=1e-3, validation=0.55, test=0.59),
    make("lr-5e-4", lr=5e-4, validation=0.57, test=0.575),
    make("lr-1e-4", lr=1e-4, validation=0.54, test=0.56),
]
BASELINE = make(
    "baseline", widths=[512], norm="none", activation="relu", dropout=0.0, test=0.53, validation=0.53, train=0.8
)


def test_interval_against_published_values():
    """Wilson's interval: of 5 in 10, and of none in 10."""
    assert stats.interval(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert stats.interval(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    low, high = stats.interval(0.57, 10_000)
    assert (high - low) / 2 == pytest.approx(1.96 * (0.57 * 0.43 / 10_000) ** 0.5, rel=1e-3)


def test_a_row_says_what_the_record_says():
    (row,) = rows(markdown.markdown([make("lr-1e-3")], EXPERIMENTS))
    assert dict(zip([heading for heading, _ in markdown.RUN_COLUMNS], row, strict=True)) == {
        "experiment": "lr-1e-3",
        "lr": "0.001",
        "seed": "0",
        "parameters": "3,809,034",
        "epochs": "2",
        "batch": "256",
        "train": "70.00%",
        "validation": "56.00%",
        "test (95% interval)": "**57.00%** (56.0–58.0)",
        "gap": "13.0",
        "test loss": "1.2345",
        "time": "6 s",
        "samples/s": "9,002",
        "device": "cpu, compiled",
        "weights": "`abcdef012345`",
    }


def test_the_choice_is_by_validation_alone():
    text = markdown.markdown(THREE, EXPERIMENTS)
    choice = text.split("## Choice of the learning rate")[1].split("##")[0]
    assert "chooses **lr-5e-4** (0.0005): 57.00%, 2.00 points before lr-1e-3" in choice
    assert "on it, lr-5e-4 reaches 57.50%" in choice
    assert "59.00%" not in choice


@pytest.mark.parametrize(("second", "verdict"), [(0.569, "within"), (0.50, "more than")])
def test_the_choice_says_whether_the_lead_is_more_than_chance(second, verdict):
    text = markdown.markdown([THREE[1], make("lr-1e-3", lr=1e-3, validation=second)], EXPERIMENTS)
    assert f"which is {verdict} the sampling error" in text


def test_runs_that_differ_in_more_than_the_learning_rate_are_not_compared():
    text = markdown.markdown([make("a", lr=1e-3), make("b", lr=5e-4, epochs=3)], EXPERIMENTS)
    assert "Choice of the learning rate" not in text


def test_the_baseline_is_compared_with_the_best_by_validation():
    text = markdown.markdown([*THREE, BASELINE], EXPERIMENTS)
    bought = text.split("## What the network bought over the baseline")[1].split("##")[0]
    assert "lr-5e-4 gains +4.50 points" in bought
    assert "53.00% to 57.50%" in bought
    assert "from 27.0 to 12.5 points" in bought
    assert "What the network bought" not in markdown.markdown(THREE, EXPERIMENTS)
    assert "What the network bought" not in markdown.markdown([BASELINE], EXPERIMENTS)


def test_seeds_give_mean_and_sample_deviation():
    text = markdown.markdown(
        [make("x", seed=0, test=0.50), make("x", seed=1, test=0.52), make("x", seed=2, test=0.54)], EXPERIMENTS
    )
    assert "| x | 3 | 52.00% | 2.00 |" in text


def test_a_failed_run_claims_no_number():
    text = markdown.markdown([failed("lr-1e-3", lr=1e-3), *THREE[1:]], EXPERIMENTS)
    row = next(row for row in rows(text) if row[0] == "lr-1e-3")
    assert row[1:3] == ["0.001", "0"]
    assert set(row[3:]) == {"–"}
    assert len(row) == len(markdown.RUN_COLUMNS)
    assert "\nlr-1e-3 failed: the loss is NaN since step 7 (epoch 1).\n" in text
    elsewhere = [line for line in text.splitlines() if "lr-1e-3" in line]
    assert len(elsewhere) == 2  # its row and its reason: neither in a choice nor in the commands


def test_failed_runs_alone_make_a_report():
    text = markdown.markdown([failed("a")], EXPERIMENTS)
    assert "## Reproduce" not in text
    assert plots.PICTURE not in text


def test_no_runs_make_a_report():
    assert markdown.markdown([], EXPERIMENTS).startswith("# Results\n")
    assert draw([]).startswith(b"<?xml")


def test_a_run_that_is_not_bitwise_says_so():
    record = replace(make("a"), bitwise=False)
    text = markdown.markdown([record], EXPERIMENTS)
    assert "`abcdef012345` (not bitwise)" in text
    assert "a was resumed where its bits are not those of an uninterrupted run" in text
    assert "not bitwise" not in markdown.markdown([make("a")], EXPERIMENTS)


def test_speed_is_the_median_of_the_timed_epochs():
    def speed(*speeds):
        record = make("a", epochs=len(speeds))
        epochs = zip(record.history, speeds, strict=True)
        return stats.speed(replace(record, history=[replace(epoch, samples_per_second=s) for epoch, s in epochs]))

    assert speed(0, 5, 100, 7) == 7  # 0: not timed
    assert speed(0) == 0


def test_rebuild_reads_the_records_and_nothing_else(tmp_path):
    write(tmp_path, [*THREE, BASELINE])
    (tmp_path / "results.md").write_text("what somebody wrote by hand")
    records = rebuild(tmp_path, EXPERIMENTS)
    text = (tmp_path / "results.md").read_text()
    assert text == markdown.markdown(records, EXPERIMENTS)
    assert "by hand" not in text
    assert [row[0] for row in rows(text)] == ["lr-1e-3", "lr-5e-4", "lr-1e-4", "baseline"]
    picture = (tmp_path / plots.PICTURE).read_bytes()
    assert picture == draw(records)
    assert f"]({plots.PICTURE})" in text


def test_rebuild_twice_gives_the_same_bytes(tmp_path):
    """In whatever order the runs were finished."""
    everything = [*THREE, BASELINE, failed("other", lr=0.5)]
    written = []
    for out, records in ((tmp_path / "a", everything), (tmp_path / "b", everything[::-1])):
        write(out, records)
        for _ in range(2):
            rebuild(out, EXPERIMENTS)
            written.append(((out / "results.md").read_bytes(), (out / plots.PICTURE).read_bytes()))
    assert all(each == written[0] for each in written)


def test_rebuild_passes_over_what_is_no_record(tmp_path):
    write(tmp_path, [THREE[0]])
    folder = tmp_path / "checkpoints" / "lr-1e-3"
    (folder / "half.json").write_text('{"name": ')
    (folder / "other.json").write_text("[1]")
    assert [record.name for record in rebuild(tmp_path, EXPERIMENTS)] == ["lr-1e-3"]


def test_a_damaged_record_spoils_no_report(tmp_path):
    write(tmp_path, THREE)
    rebuild(tmp_path, EXPERIMENTS)
    before = (tmp_path / "results.md").read_bytes()
    (tmp_path / "checkpoints" / "lr-1e-3" / f"{THREE[0].spec_id}.json").write_text("{")
    with pytest.raises(StoreError, match="damaged"):
        rebuild(tmp_path, EXPERIMENTS)
    assert (tmp_path / "results.md").read_bytes() == before


# Nothing is written twice


@pytest.fixture
def drawings(monkeypatch):
    """What has been drawn."""
    drawn, real = [], plots.draw
    monkeypatch.setattr(plots, "draw", lambda content: drawn.append(content) or real(content))
    return drawn


def test_a_second_rebuild_draws_and_writes_nothing(tmp_path, drawings):
    write(tmp_path, [*THREE, BASELINE, failed("other", lr=0.5)])
    files = [tmp_path / "results.md", tmp_path / plots.PICTURE]

    def state():
        return [(file.read_bytes(), file.stat().st_mtime_ns, file.stat().st_ino) for file in files]

    rebuild(tmp_path, EXPERIMENTS)
    before = state()
    assert len(drawings) == 1
    rebuild(tmp_path, EXPERIMENTS)
    assert (state(), len(drawings)) == (before, 1)
    rebuild(tmp_path, EXPERIMENTS, redraw=True)
    assert (state(), len(drawings)) == (before, 2)  # drawn, to the same bytes
    files[1].write_bytes(before[1][0].replace(b"</svg>", b""))
    rebuild(tmp_path, EXPERIMENTS, redraw=True)
    assert [content for content, *_ in state()] == [content for content, *_ in before]


def test_only_what_has_changed_is_written(tmp_path, drawings):
    write(tmp_path, THREE)
    rebuild(tmp_path, EXPERIMENTS)
    report, picture = (tmp_path / "results.md").read_bytes(), (tmp_path / plots.PICTURE).read_bytes()
    write(tmp_path, [replace(THREE[0], digest="0" * 64)])  # in the table, but not in the picture
    rebuild(tmp_path, EXPERIMENTS)
    assert (tmp_path / "results.md").read_bytes() != report
    assert len(drawings) == 1
    write(tmp_path, [edit_history(THREE[0], val_loss=1.0)])  # the other way round
    rebuild(tmp_path, EXPERIMENTS)
    assert len(drawings) == 2
    write(tmp_path, THREE)
    rebuild(tmp_path, EXPERIMENTS)
    assert ((tmp_path / "results.md").read_bytes(), (tmp_path / plots.PICTURE).read_bytes()) == (report, picture)


# The picture


@pytest.fixture
def axes(monkeypatch):
    """A function that draws records and returns the axes of accuracy and of loss."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **options: figures.append(self) or save(self, *args, **options)
    )
    return lambda records: (draw(records), figures[-1].axes)[1]


def test_the_picture_is_the_same_bytes_for_equal_records():
    one = draw(THREE)
    assert one == draw([replace(record) for record in THREE])
    assert b"<dc:date>" not in one
    assert draw([edit_history(THREE[0], val_loss=2.5), *THREE[1:]]) != one


def test_the_picture_is_the_same_whatever_matplotlib_is_set_to_and_changes_no_setting():
    import matplotlib

    one = draw(THREE)
    with matplotlib.rc_context({"lines.linewidth": 9, "savefig.facecolor": "none"}):
        before = dict(matplotlib.rcParams)
        assert draw(THREE) == one
        assert dict(matplotlib.rcParams) == before
    background = re.search(rb'<g id="patch_1">.*?style="([^"]*)"', one, re.S)
    assert background
    assert background[1] == b"fill: #ffffff"


@pytest.mark.parametrize("name", ["a$x_1$b", "$x_{$", r"$\frac$", "a_b^c"])
def test_a_name_is_not_read_as_mathematics(name, axes):
    (label,) = axes([replace(make("a"), name=name)])[1].get_legend().get_texts()
    assert label.get_text() == name
    assert not label.get_parse_math()


@pytest.mark.parametrize("epochs", [1, 2, 3, 7, 150])
def test_the_axis_has_whole_epochs(epochs, axes):
    for ax in axes([make("a", epochs=epochs)]):
        low, high = ax.get_xlim()
        ticks = [tick for tick in ax.get_xticks() if low <= tick <= high]
        assert ticks
        assert all(tick == int(tick) for tick in ticks)


def test_curves_are_means_over_seeds_with_a_band():
    """Whose epochs are few enough to be drawn, and whose first and last always are."""
    seeds = [
        edit_history(make("a", seed=seed), val_accuracy=0.5 + 0.1 * seed, val_loss=1.0 + seed) for seed in range(3)
    ]
    content = plots.content(stats.groups([*seeds, make("b")]))
    assert "means over seeds" in content.title
    assert [(curve.label, curve.epochs) for curve in content.curves] == [("a", [1, 2]), ("b", [1, 2])]
    accuracy, loss = content.curves[0].accuracy, content.curves[0].loss
    assert [accuracy.validation[1], accuracy.low[1], accuracy.high[1]] == pytest.approx([60, 50, 70])
    assert [loss.validation[1], loss.low[1], loss.high[1]] == pytest.approx([2, 1, 3])
    assert loss.train == pytest.approx([2, 1])
    assert content.curves[1].loss.low == content.curves[1].loss.high
    assert plots.content(stats.groups([make("b")])).title == "solid: validation · dotted: train, while training"
    (long,) = plots.content([[make("a", epochs=1000)]]).curves
    assert len(long.epochs) == len(long.loss.train) == plots.POINTS
    assert (long.epochs[0], long.epochs[-1]) == (1, 1000)


def test_the_curves_of_many_groups_are_those_of_the_best_by_validation():
    records = [make(f"x{i}", lr=0.01 * (i + 1), validation=0.5 + 0.002 * (i * 7 % 12)) for i in range(12)]
    content = plots.content(stats.groups(records))
    assert [curve.label for curve in content.curves] == ["x5", "x10", "x3", "x8", "x1", "x6", "x11", "x4", "x9", "x2"]
    assert content.title.endswith("the best 10 of 12 by validation")


@pytest.mark.slow
def test_the_picture_warns_of_nothing_where_home_cannot_be_written():
    code = "from core.report import plots; plots.draw(plots.content([]))"
    environment = {key: os.environ[key] for key in os.environ if not key.startswith(("MPL", "XDG"))}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**environment, "HOME": "/dev/null"}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# More than thirty runs


def test_thirty_runs_have_a_row_each():
    records = [make("x", seed=seed) for seed in range(30)]
    assert len(rows(markdown.markdown(records, EXPERIMENTS))) == 30
    assert len(rows(markdown.markdown([*records, failed("x", seed=30)], EXPERIMENTS))) == 1


def test_more_runs_are_aggregated_over_their_seeds():
    """Against numbers reckoned by hand: 4 of 0.50 and 4 of 0.54 have the mean 0.52, and the deviation
    sqrt(8 * 0.02**2 / 7) = 0.02138."""
    records = [make("x", lr=0.01, seed=seed, test=0.54 - 0.04 * (seed % 2), validation=0.55) for seed in range(8)]
    records += [make("y", lr=0.02, seed=seed, test=0.6, validation=0.5 + 0.01 * seed, train=0.9) for seed in range(24)]
    records += [make("x", lr=0.01, dropout=0.5, validation=0.8), failed("y", lr=0.02, seed=99)]
    text = markdown.markdown(records, EXPERIMENTS)
    headings = [heading for heading, _ in markdown.GROUP_COLUMNS]
    single, y, x = (dict(zip(headings, row, strict=True)) for row in rows(text))
    assert single["seeds"] == "1"
    assert (single["validation"], single["test"]) == ("80.00%", "**57.00%**")
    # 0 to 23 have the mean 11.5 and the deviation sqrt(24 * 25 / 12) = 7.0711
    assert (y["experiment"], y["seeds"], y["validation"]) == ("y", "24", "61.50 ± 7.07%")
    assert x == {
        "experiment": "x",
        "lr": "0.01",
        "seeds": "8",
        "parameters": "3,809,034",
        "epochs": "2",
        "batch": "256",
        "train": "70.00 ± 0.00%",
        "validation": "55.00 ± 0.00%",
        "test": "**52.00 ± 2.14%**",
        "gap": "18.0",
        "test loss": "1.2345",
        "time": "6 s",
        "samples/s": "9,002",
    }
    assert "\ny failed: the loss is NaN since step 7 (epoch 1).\n" in text
    assert "left out" not in text
    assert "## Over seeds" not in text  # the table has it
    choice = text.split("## Choice of the learning rate")[1].split("##")[0]
    assert "Of y, x, which differ in the learning rate alone, the mean validation accuracy chooses **y**" in choice
    assert "61.50%, 6.50 points before x" in choice


def test_the_table_has_the_best_thirty_rows_and_counts_the_others():
    records = [make(f"x{i}", lr=0.01 * (i + 1), validation=0.5 + 0.002 * i) for i in range(33)]
    records += [make("x0", lr=0.01, seed=seed, validation=0.5) for seed in range(1, 5)]
    records.append(failed("x0", lr=0.01, seed=5))  # no finished run
    text = markdown.markdown(records, EXPERIMENTS)
    assert [row[0] for row in rows(text)] == [f"x{i}" for i in range(32, 2, -1)]
    assert "\n3 of 33 rows, with 7 of 37 finished runs, are left out. Every record is in `checkpoints/`.\n" in text
    assert "Of 33 experiments, which differ in the learning rate alone" in text


def test_lists_are_cut_off_with_a_count():
    runs = [replace(make("x", lr=0.01, seed=seed), bitwise=False) for seed in range(40)]
    runs += [make("z", dropout=0.01 * i, lr=lr) for i in range(40) for lr in (1e-3, 1e-2)]
    environment = runs[0].environment
    runs += [replace(make("y", seed=i), environment=replace(environment, git=f"{i:012x}")) for i in range(40)]
    text = markdown.markdown([*runs, *(failed("x", seed=seed) for seed in range(100, 140))], EXPERIMENTS)
    assert text.count("\nx failed: ") == 9
    assert "\n31 more runs failed.\n" in text
    assert text.count("\nx was resumed where its bits") == 9
    assert "\n31 more runs were resumed in this way.\n" in text
    assert text.count("differ in the learning rate alone") == 9
    assert "more sets of learning rates" in text
    places = text.split("Made on:\n\n")[1].splitlines()
    assert (len(places), places[-1]) == (10, "- and 32 more")
    block = re.search(r"```sh\n(.*?)```", text, re.S)
    assert block
    commands = block[1].splitlines()
    assert len(commands) == 30
    assert re.fullmatch(r"# and \d+ more", commands[-2])


def test_two_thousand_runs_make_a_small_report(tmp_path):
    """In the worst case: all of them different, and with many epochs."""
    runs = [make(f"{'x' * 80}{i}", lr=0.001 * (i + 1), epochs=40, validation=0.0002 * i + 0.1) for i in range(2000)]
    write(tmp_path, runs)
    assert len(rebuild(tmp_path, {})) == 2000
    assert (tmp_path / "results.md").stat().st_size < 100_000
    assert (tmp_path / plots.PICTURE).stat().st_size < 300_000


def test_the_largest_picture_is_small():
    runs = [make(f"x{i}", seed=seed, lr=0.01 * (i + 1), epochs=200) for i in range(12) for seed in range(3)]
    noisy = [
        replace(run, history=[replace(e, val_accuracy=hash((e.epoch, run.seed)) % 97 / 97) for e in run.history])
        for run in runs
    ]
    assert len(draw(noisy)) < 300_000


# How to reproduce it


def test_how_to_reproduce_names_the_runs():
    text = markdown.markdown([*THREE, BASELINE], EXPERIMENTS)
    block = re.search(r"```sh\n(.*?)```", text, re.S)
    assert block
    assert block[1].splitlines()[0] == "uv run main.py run lr-1e-3 lr-5e-4 lr-1e-4 baseline"
    assert "commit 0123456789ab, data 15fc275e5cae" in text


def test_how_to_reproduce_names_the_options_of_a_run():
    """Or says that the name no longer stands for such a spec."""
    records = [THREE[0], make("lr-1e-3", lr=1e-3, seed=7), make("lr-1e-3", lr=1e-3, dropout=0.1), make("gone")]
    block = re.search(r"```sh\n(.*?)```", markdown.markdown(records, EXPERIMENTS), re.S)
    assert block
    plain, seeded, changed, gone, _ = block[1].splitlines()
    assert plain == "uv run main.py run lr-1e-3"
    assert seeded == "uv run main.py run lr-1e-3 --seed 7"
    assert changed.startswith(f"# lr-1e-3 ({records[2].spec_id})")
    assert gone.startswith("# gone (")


def test_an_experiment_that_has_become_invalid_spoils_no_report():
    text = markdown.markdown(THREE, {**EXPERIMENTS, "lr-1e-3": {"learning_rate": 1e-3}})
    assert "\nuv run main.py run lr-5e-4 lr-1e-4\n# lr-1e-3 (" in text


def test_one_spec_under_two_names_is_one_run():
    """Neither a second seed nor a rival of itself."""
    text = markdown.markdown([THREE[0], replace(THREE[0], name="again")], EXPERIMENTS)
    assert "Over seeds" not in text
    assert "Choice of the learning rate" not in text
