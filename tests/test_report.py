"""results.md and its picture, from records made by hand."""

import copy
import json
import re

import pytest

from core.report import markdown, plots, stats
from core.report.rebuild import rebuild
from core.spec import resolve, spec_id


def make(name, test=0.57, validation=0.56, train=0.7, **changes):
    """The record of a finished run of two epochs."""
    spec = resolve({"epochs": 2, **changes})

    def split(accuracy, n, loss):
        return {"accuracy": accuracy, "n": n, "loss": loss, "correct": [0] * 10, "count": [n // 10] * 10}

    history = [
        {
            "epoch": epoch,
            "train_loss": 2.0 / epoch,
            "train_accuracy": 0.3 * epoch,
            "val_loss": 2.1 / epoch,
            "val_accuracy": validation - 0.1 / epoch,
            "seconds": 3.25,
            "samples_per_second": 9000 + epoch,
        }
        for epoch in (1, 2)
    ]
    return {
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


def failed(name, **changes):
    record = make(name, **changes)
    kept = ("name", "spec", "spec_id", "seed", "data", "environment")
    return {**{key: record[key] for key in kept}, "status": "failed", "error": "the loss is NaN since step 7 (epoch 1)"}


def write(out, records):
    for record in records:
        folder = out / "checkpoints" / record["name"]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{record['spec_id']}.json").write_text(json.dumps(record))


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
    assert len(row) == len(markdown.COLUMNS)
    found = dict(zip(markdown.COLUMNS, row, strict=True))
    assert found == {
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
    assert len(row) == len(markdown.COLUMNS)
    assert "\nlr-1e-3 failed: the loss is NaN since step 7 (epoch 1).\n" in text
    elsewhere = [line for line in text.splitlines() if "lr-1e-3" in line]
    assert len(elsewhere) == 2  # its row and its reason: neither in a choice nor in the commands


def test_failed_runs_alone_make_a_report():
    text = markdown.markdown([failed("a")], EXPERIMENTS)
    assert "## Reproduce" not in text
    assert plots.PICTURE not in text


def test_no_runs_make_a_report():
    assert markdown.markdown([], EXPERIMENTS).startswith("# Results\n")
    assert plots.picture([]).startswith(b"<?xml")


def test_a_run_that_is_not_bitwise_says_so():
    record = {**make("a"), "bitwise": False}
    text = markdown.markdown([record], EXPERIMENTS)
    assert "`abcdef012345` (not bitwise)" in text
    assert "a was resumed where its bits are not those of an uninterrupted run" in text
    assert "not bitwise" not in markdown.markdown([make("a")], EXPERIMENTS)


def test_speed_is_the_median_of_the_timed_epochs():
    record = make("a")
    record["history"] = [{**record["history"][0], "samples_per_second": s} for s in (None, 5, 100, 7)]
    assert stats.speed(record) == 7
    record["history"] = [{**record["history"][0], "samples_per_second": None}]
    assert stats.speed(record) == 0


def test_rebuild_reads_the_records_and_nothing_else(tmp_path):
    write(tmp_path, [*THREE, BASELINE])
    (tmp_path / "results.md").write_text("what somebody wrote by hand")
    records = rebuild(tmp_path, EXPERIMENTS)
    text = (tmp_path / "results.md").read_text()
    assert text == markdown.markdown(records, EXPERIMENTS)
    assert "by hand" not in text
    assert [row[0] for row in rows(text)] == ["lr-1e-3", "lr-5e-4", "lr-1e-4", "baseline"]
    picture = (tmp_path / plots.PICTURE).read_bytes()
    assert picture == plots.picture(records)
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
    assert [record["name"] for record in rebuild(tmp_path, EXPERIMENTS)] == ["lr-1e-3"]


def test_the_picture_is_the_same_bytes_for_equal_records():
    one, other = plots.picture(THREE), plots.picture(copy.deepcopy(THREE))
    assert one == other
    assert b"<dc:date>" not in one
    changed = copy.deepcopy(THREE)
    changed[0]["history"][1]["val_loss"] += 0.5
    assert plots.picture(changed) != one


def test_the_picture_leaves_matplotlib_as_it_was():
    import matplotlib

    before = dict(matplotlib.rcParams)
    plots.picture(THREE)
    after = dict(matplotlib.rcParams)
    assert {key for key in before if before[key] != after[key]} <= {"backend"}


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
    assert changed.startswith(f"# lr-1e-3 ({records[2]['spec_id']})")
    assert gone.startswith("# gone (")


def test_an_experiment_that_has_become_invalid_spoils_no_report():
    text = markdown.markdown(THREE, {**EXPERIMENTS, "lr-1e-3": {"learning_rate": 1e-3}})
    assert "\nuv run main.py run lr-5e-4 lr-1e-4\n# lr-1e-3 (" in text


def test_one_spec_under_two_names_is_one_run():
    """Neither a second seed nor a rival of itself."""
    text = markdown.markdown([THREE[0], {**THREE[0], "name": "again"}], EXPERIMENTS)
    assert "Over seeds" not in text
    assert "Choice of the learning rate" not in text
