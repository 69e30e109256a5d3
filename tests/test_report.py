"""results.md, its tables and its pictures, from records made by hand."""

import csv
import functools
import io
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import safetensors.numpy
from msgspec.structs import replace
from scipy.stats import t

from core import code_hash, compare
from core.code_hash import CODE
from core.compare import half_width
from core.data import cifar10 as dataset
from core.data.archive import Archive
from core.errors import UserError
from core.report import best_run, markdown, plots, published, rebuild, stats, tables
from core.report.catalog import Catalog
from core.runs.record import UNSET, Answers, Failed, Finished, Flipped, Mistake, Partial, decode, encode
from core.spec import CIFAR10, FIELDS, SpecError, resolve, spec_id
from core.store import StoreError

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
            "code": CODE,
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


def answered(record, turn=0):
    """The record with answers on test that have its metrics. The i-th image is of class i mod 10, and a wrong answer is
    the next class; `turn` decides which images are wrong."""
    test = record.metrics.test
    right = np.zeros(test.n, bool)
    for label, (hits, count) in enumerate(zip(test.correct, test.count, strict=True)):
        right[label::10] = (np.arange(count) + turn) % count < hits
    confusion = [
        [hits if other == label else count - hits if other == (label + 1) % 10 else 0 for other in range(10)]
        for label, (hits, count) in enumerate(zip(test.correct, test.count, strict=True))
    ]
    wrong = np.flatnonzero(~right)[:12].tolist()
    mistakes = [Mistake(i, i % 10, (i + 1) % 10, round(0.99 - 0.01 * k, 6)) for k, i in enumerate(wrong)]
    return replace(record, answers=Answers(np.packbits(right).tobytes(), confusion, mistakes))


def partial(name, reached=1, **changes):
    """The record of a run that fell behind after some of its epochs."""
    run = make(name, **changes)
    about = {key: getattr(run, key) for key in ("name", "spec", "spec_id", "data", "environment", "seed")}
    return Partial(**about, history=run.history[:reached])


def write(out, records):
    for record in records:
        folder = out / "checkpoints" / record.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{record.spec_id}.json").write_bytes(encode(record))


def draw(records):
    """The learning curves."""
    return plots.draw(plots.curves(stats.groups(records)))


def edit_history(record, **changes):
    """The record with other values in its last epoch."""
    return replace(record, history=[*record.history[:-1], replace(record.history[-1], **changes)])


def table(text):
    """The cells of the first table, without its two lines of heading."""
    lines = [line for line in text[text.index("|") :].split("\n\n")[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def parts(text):
    """The sections of the suites, and that of the other experiments."""
    return [part for part in text.split("\n## ") if part.startswith(("Suite ", "Other experiments"))]


def rows(text):
    """The cells of the tables of the suites, and of that of the other experiments."""
    return [row for part in parts(text) for row in table(part)]


def section(text, heading):
    return text.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def folded(text, summary):
    """What a click on a summary opens."""
    return text.split(f"<details><summary>{summary}</summary>\n")[1].split("</details>")[0]


def choice(text):
    """Which learning rate is best: the sentences, and the table below them."""
    found = re.search(r"^Of .* differ in the learning rate alone.*?</details>", text, re.S | re.M)
    assert found
    return found[0]


EXPERIMENTS = {
    "lr-1e-3": {"epochs": 2, "lr": 1e-3},
    "lr-5e-4": {"epochs": 2, "lr": 5e-4},
    "lr-1e-4": {"epochs": 2, "lr": 1e-4},
    "baseline": {"epochs": 2, "widths": [512], "norm": "none", "activation": "relu", "dropout": 0.0},
}
SUITES = Catalog(
    {
        "learning-rate": {name: EXPERIMENTS[name] for name in ("lr-1e-3", "lr-5e-4", "lr-1e-4")},
        "baseline": {"baseline": EXPERIMENTS["baseline"]},
    }
)
THREE = [
    # The best on test is not the best on validation.
    make("lr-1e-3", lr=1e-3, validation=0.55, test=0.59),
    make("lr-5e-4", lr=5e-4, validation=0.57, test=0.575),
    make("lr-1e-4", lr=1e-4, validation=0.54, test=0.56),
]
BASELINE = make(
    "baseline", widths=[512], norm="none", activation="relu", dropout=0.0, test=0.53, validation=0.53, train=0.8
)


def cells(text):
    """The same rows, by heading."""
    found = []
    for part in parts(text):
        headings = (*markdown.COLUMNS, *["time on"] * part.startswith("Other experiments"))
        found += [dict(zip(headings, row, strict=True)) for row in table(part)]
    return found


def test_a_row_has_the_numbers_of_the_record():
    text = markdown.markdown([make("lr-1e-3")], SUITES)
    assert cells(text) == [
        {
            "experiment": "lr-1e-3",
            "n": "1",
            "validation": "56.00% (54.62–57.37)",
            "test": "**57.00%** (56.03–57.97)",
            "train": "70.00%",
            "gap": "13.0",
            "time": "6 s",
            "samples/s": "9,002",
            "lr": "0.001",
            "parameters": "3,809,034",
            "epochs": "2",
            "precision": "float32",
        }
    ]
    assert "Where n is 1" in folded(text, "How to read the tables")


def test_a_row_stands_for_an_experiment():
    """Against numbers reckoned by hand: 50, 52 and 54 have the mean 52 and the deviation 2; Student's t with two
    degrees of freedom has its 97.5% point at 4.3027, and 4.3027 * 2 / sqrt(3) is 4.97."""
    text = markdown.markdown([make("x", seed=seed, test=0.5 + 0.02 * seed) for seed in range(3)], SUITES)
    (row,) = cells(text)
    assert (row["n"], row["test"]) == ("3", "**52.00 ± 2.00%** (47.03–56.97)")
    assert row["train"] == "70.00 ± 0.00%"
    assert "Student's t" in folded(text, "How to read the tables")


def test_experiments_of_one_name_have_different_labels():
    text = markdown.markdown([make("x"), make("x", dropout=0.5, validation=0.5), make("y", validation=0.4)], SUITES)
    assert [row["experiment"] for row in cells(text)] == ["x (dropout 0.2)", "x (dropout 0.5)", "y"]


def test_a_variant_of_an_experiment_is_in_no_suite():
    """A run whose options changed a key, beside a run of the spec of experiments/."""
    official, variant = make("full", 0.5), make("full", 0.6, precision="bfloat16")
    plain = make("plain", 0.4, dropout=0.0)
    catalog = Catalog({"x": {"full": official.spec, "plain": plain.spec}}, {"x": {"full": "full"}})
    text = markdown.markdown([official, variant, plain], catalog)
    assert [row[0] for row in table(section(text, "Suite x"))] == ["full", "plain"]
    assert [row[0] for row in table(section(text, "Other experiments"))] == ["full (precision bfloat16)"]
    assert "`precision`" not in section(text, "What helped")
    only = markdown.markdown([variant], catalog)
    assert [row[0] for row in table(section(only, "Suite x"))] == ["full"], "nothing else has its name"


def test_the_choice_is_by_validation_alone():
    text = markdown.markdown(THREE, SUITES)
    said = choice(section(text, "Suite learning-rate"))
    assert said.startswith(
        "Of lr-1e-3, lr-5e-4 and lr-1e-4, which differ in the learning rate alone, validation chooses **lr-5e-4**. "
        "Its 57.00% (n = 1) is "
    )
    assert "; on test, which has no part in the choice, it reaches 57.50%." in said
    first, _ = table(said)
    assert first[:5] == ["lr-5e-4 minus lr-1e-3", "+2.00", "-1.50", "1", "too few seeds"]
    assert [row[0] for row in rows(text)] == ["lr-5e-4", "lr-1e-3", "lr-1e-4"]


@pytest.mark.parametrize(
    ("second", "verdict", "sure"),
    [
        ([0.569], "too few seeds", " is not significantly better than lr-1e-3;"),
        ([0.569, 0.581, 0.558], "not significant", " is not significantly better than lr-1e-3;"),
        ([0.5, 0.52, 0.49], "better (one look)", " is significantly better than the others;"),
        (2 * [0.5, 0.52, 0.49], "better", " is significantly better than the others;"),
    ],
)
def test_the_choice_says_whether_the_lead_is_significant(second, verdict, sure):
    best = seeds_of("lr-5e-4", (2 * [0.57, 0.58, 0.56])[: len(second)], lr=5e-4)
    text = markdown.markdown([*best, *seeds_of("lr-1e-3", second, lr=1e-3)], SUITES)
    assert table(choice(text))[0][4] == verdict
    assert sure in choice(text)


def test_the_intervals_of_a_choice_hold_together_and_at_every_look():
    accuracies = {"lr-5e-4": [0.57, 0.58, 0.56], "lr-1e-3": [0.55, 0.57, 0.53], "lr-1e-4": [0.5, 0.52, 0.49]}
    rates = {"lr-5e-4": 5e-4, "lr-1e-3": 1e-3, "lr-1e-4": 1e-4}
    records = [run for name, values in accuracies.items() for run in seeds_of(name, 3 * values, lr=rates[name])]
    first, _ = table(choice(markdown.markdown(records, SUITES)))
    differences = 3 * [2.0, 1.0, 3.0]
    assert first[1] == f"+2.00 ± {half_width(np.std(differences, ddof=1), 9, 0.05 / 3):.2f}"


def seeds_of(name, validations, **changes):
    return [
        make(name, seed=seed, validation=validation, test=validation - 0.01, **changes)
        for seed, validation in enumerate(validations)
    ]


def test_seeds_are_compared_paired():
    """Seeds that differ by far more than the experiments: by themselves the means could not be told apart."""
    better = seeds_of("a", [0.54, 0.58, 0.56], lr=1e-3)
    worse = seeds_of("b", [0.53, 0.568, 0.551], lr=5e-4)
    said = choice(markdown.markdown([*better, *worse], SUITES))
    # 1.0, 1.2 and 0.9 have the mean 1.033 and the deviation 0.1528; 4.3027 * 0.1528 / sqrt(3) is 0.3795
    assert "| a minus b | +1.03 ± 0.38 | +1.03 ± 0.38 | 3 | better (one look) | " in said
    assert " is significantly better than the others;" in said


def test_a_comparison_says_how_many_seeds_it_needs():
    a, b = (seeds_of(name, v, lr=lr) for name, v, lr in (("a", [0.56, 0.57], 1e-3), ("b", [0.558, 0.571], 5e-4)))
    said = choice(markdown.markdown([*a, *b], SUITES))
    needed = compare.needed(compare.interval([0.2, -0.1], 0.05), 0.5, 0.05)
    assert f"| a minus b | +0.05 ± 1.91 | +0.05 ± 1.91 | 2 | not significant | {needed} |" in said


def test_the_choice_says_which_images_only_one_gets_right():
    one = answered(make("a", lr=1e-3, seed=3, test=0.57, validation=0.58))
    other = answered(make("b", lr=5e-4, seed=3, test=0.57), turn=5)
    text = markdown.markdown([one, other], SUITES)
    assert table(choice(text))[0][6] == "50 : 50, p = 1"
    assert "McNemar test" in folded(text, "How to read the tables")
    text = markdown.markdown([one, make("b", lr=5e-4, seed=3)], SUITES)
    assert not table(choice(text))[0][6]


def test_runs_that_differ_in_more_than_the_learning_rate_are_not_compared():
    text = markdown.markdown([make("a", lr=1e-3), make("b", lr=5e-4, epochs=3)], SUITES)
    assert "learning rate alone" not in text


def test_the_baseline_is_compared_with_the_best_by_validation():
    gain = section(markdown.markdown([*THREE, BASELINE], SUITES), "Gain over the baseline")
    assert "baseline has the hidden widths 512, the activation relu, the norm none and dropout 0. " in gain
    assert "test accuracy goes from 53.00% to 57.50%, and the gap" in gain
    assert "from 27.0 to 12.5 points" in gain
    assert "| lr-5e-4 minus baseline | +4.00 | +4.50 | 1 | too few seeds |" in gain
    assert "## Gain" not in markdown.markdown(THREE, SUITES)
    assert "## Gain" not in markdown.markdown([BASELINE], SUITES)


PLAIN = {"widths": [512], "norm": "none", "activation": "relu", "dropout": 0.0}
ABLATION = Catalog(
    {
        "learning-rate": {"lr-1e-3": {}},
        "what pays": {
            "baseline": PLAIN,
            "plus": {**PLAIN, "norm": "batch"},
            "minus": {"norm": "none"},
            "deep": {**PLAIN, "widths": [1024, 512, 256]},
            "dropped": {"dropout": 0.0},
            "both": {**PLAIN, "norm": "batch", "dropout": 0.2},
            "mistyped": {"dropuot": 0.0},
            "lr-1e-3": {},
        },
    },
    {"what pays": {"plain": "baseline", "full": "lr-1e-3"}},
)


def test_a_verdict_names_the_values_and_where_they_were_compared():
    """Whatever the names; the verdict is that of validation."""
    values = {
        "baseline": [0.50, 0.51, 0.505],
        "lr-1e-3": [0.58, 0.57, 0.575],
        "plus": [0.53, 0.538, 0.534],
        "minus": [0.55, 0.541, 0.546],
        "deep": [0.50, 0.53, 0.49],
        "dropped": [0.59, 0.581, 0.5856],
        "both": [0.6, 0.6, 0.6],
    }
    specs = ABLATION.suites["what pays"]
    records = [run for name, v in values.items() for run in seeds_of(name, 3 * v, **specs[name])]
    helped = section(markdown.markdown(records, ABLATION), "What helped")

    def points(after, before):
        """Of nine seeds, at every look and four rows together."""
        differences = 3 * [100 * (a - b) for a, b in zip(values[after], values[before], strict=True)]
        width = half_width(np.std(differences, ddof=1), 9, 0.05 / 4)
        return f"{np.mean(differences):+.2f} ± {width:.2f}"

    deep, plus = points("deep", "baseline"), points("plus", "baseline")
    norm, dropout = points("lr-1e-3", "minus"), points("lr-1e-3", "dropped")
    assert [row[:5] for row in table(helped)] == [
        ["`widths` 512 → 1024-512-256 in baseline", deep, deep, "9", "not significant"],
        ["`norm` none → batch in baseline", plus, plus, "9", "helped"],
        ["`norm` none → batch in lr-1e-3", norm, norm, "9", "helped"],
        ["`dropout` 0 → 0.2 in lr-1e-3", dropout, dropout, "9", "hurt"],
    ]
    assert (
        f"- Helped: `norm` none → batch in baseline ({plus}) and `norm` none → batch in lr-1e-3 ({norm}).\n"
        f"- Hurt: `dropout` 0 → 0.2 in lr-1e-3 ({dropout}).\n"
        f"- Not significant: `widths` 512 → 1024-512-256 in baseline ({deep}).\n"
    ) in helped
    assert "no verdict of the 4 rows is wrong. With 6 seeds or more, that holds however often" in helped
    few = section(markdown.markdown([r for r in records if r.seed < 3], ABLATION), "What helped")
    differences = [100 * (a - b) for a, b in zip(values["lr-1e-3"], values["minus"], strict=True)]
    width = t.ppf(1 - 0.05 / 8, 2) * np.std(differences, ddof=1) / 3**0.5
    assert f"| {np.mean(differences):+.2f} ± {width:.2f} | 3 | helped (one look) |" in few
    single = section(markdown.markdown([r for r in records if r.seed == 0], ABLATION), "What helped")
    assert {(row[1], row[4]) for row in table(single)} >= {("+3.00", "too few seeds")}
    assert "- Helped: " not in single


def test_a_key_that_the_full_network_lacks_is_compared_too():
    """The recipe has no dropout, and its variant has. If the variant is worse, dropout hurts."""
    records = [
        *seeds_of("full", 3 * [0.7, 0.71], dropout=0.0),
        *seeds_of("full-dropout", 3 * [0.68, 0.69], dropout=0.2),
    ]
    catalog = Catalog({"x": {"full": {"dropout": 0.0}, "full-dropout": {}}}, {"x": {"full": "full"}})
    helped = section(markdown.markdown(records, catalog), "What helped")
    assert "- Helped: `dropout` 0.2 → 0 in full (+2.00 ± 0.02).\n" in helped


def test_a_suite_is_an_ablation_if_ablations_names_it():
    names = {"first": {"dropout": 0.0}, "second": {}, "third": {"dropout": 0.5}}
    records = [run for name, spec in names.items() for run in seeds_of(name, [0.5, 0.6], **spec)]
    assert "## What helped" not in markdown.markdown(records, Catalog({"my-ablation": names}))
    assert "## What helped" in markdown.markdown(records, Catalog({"mine": names}, {"mine": {"plain": "first"}}))


@pytest.mark.parametrize("ablations", [{"y": {}}, {"x": {"plain": "b"}}, {"x": {"first": "a"}}])
def test_an_ablation_with_unknown_names_is_refused(ablations):
    Catalog({"x": {"a": {}}}, {"x": {"full": "a"}}).check()
    with pytest.raises(UserError, match="ABLATIONS in experiments/"):
        Catalog({"x": {"a": {}}}, ablations).check()


# Runs of other code, or on other data


def elsewhere(record, code=CODE, data=dataset.DIRECTORY_HASH):
    """The record as a run of other code or on other data leaves it."""
    return replace(record, data=data, environment=replace(record.environment, code=code))


def counted(text):
    """The rows of all tables with a column `n`, by heading."""
    found = []
    for block in text.split("\n\n"):
        lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines() if line[0] == "|"]
        found += [dict(zip(lines[0], line, strict=True)) for line in lines[2:] if "n" in lines[0]]
    return found


OTHER = {"code": "0" * 12}, {"data": "other"}, {"code": ""}


@pytest.mark.parametrize("other", OTHER, ids=str)
def test_runs_of_other_code_or_data_are_never_averaged(tmp_path, other):
    """They take part in no choice, comparison, metric or curve, and the report says how to train them anew."""
    mine = seeds_of("lr-1e-3", [0.5, 0.52], lr=1e-3)
    others = [elsewhere(run, **other) for run in seeds_of("lr-1e-3", [0.6, 0.6, 0.7, 0.72], lr=1e-3)[2:]]
    rival = elsewhere(make("lr-5e-4", lr=5e-4, validation=0.9), **other)
    write(tmp_path, [*mine, *others, rival])
    rebuild.rebuild(tmp_path, SUITES)
    text = (tmp_path / "results.md").read_text()
    first, *apart = counted(text)
    assert (first["experiment"], first["n"]) == ("lr-1e-3", "2")
    assert first["validation"].startswith("51.00 ± 1.41%")
    what, said = next(iter(other.items()))
    assert {row[what] for row in apart} == {said or "unknown"}
    assert {row["code" if what == "data" else "data"] for row in apart} == {"this"}
    ns = [("lr-1e-3", "2", "71.00 ± 1.41%"), ("lr-5e-4", "1", "90.00%")]
    if not said:  # nobody knows whether two runs of unknown code are of the same
        ns[:1] = [("lr-1e-3", "1", "70.00%"), ("lr-1e-3", "1", "72.00%")]
    assert [(row["experiment"], row["n"], row["validation"]) for row in apart] == ns
    assert "\n3 finished runs are of other code or on other data, and not compared: see [Runs of other" in text
    anew = folded(text, markdown.OTHER)
    assert "uv run main.py run lr-5e-4 --force" in anew
    seeds = '--seeds "2,3"' if said else "--seed 2"
    assert f"uv run main.py run lr-1e-3 {seeds} --force" in anew
    assert "learning rate alone" not in text
    assert "uv run main.py run lr-1e-3 --seeds 2\n" in folded(text, "Reproduce")
    assert '"lr-1e-3": 0.51' in (tmp_path / "checkpoints" / "metrics.json").read_text()
    assert "lr-5e-4" not in (tmp_path / tables.CURVES_CSV).read_text()
    current = [(row["seed"], row["current"]) for row in csv.DictReader((tmp_path / tables.RESULTS_CSV).open())]
    assert current == [("0", "True"), ("1", "True"), ("2", "False"), ("3", "False"), ("0", "False")]


def test_code_with_the_same_numbers_is_the_same_code(monkeypatch):
    old = "0123456789ab"
    records = [make("x", seed=seed) for seed in (0, 1)] + [elsewhere(make("x", seed=2), old)]
    assert [row["n"] for row in cells(markdown.markdown(records, SUITES))] == ["2"]
    monkeypatch.setattr(code_hash, "SAME_NUMBERS", {CODE, old})
    text = markdown.markdown(records, SUITES)
    assert [row["n"] for row in cells(text)] == ["3"]
    assert markdown.OTHER not in text


def test_two_other_codes_are_not_averaged_with_each_other():
    records = [elsewhere(make("x", seed=seed), f"{seed:012x}") for seed in range(3)]
    text = markdown.markdown([*records, failed("y")], SUITES)
    assert [(row["n"], row["code"]) for row in counted(text)] == [("1", f"{seed:012x}") for seed in range(3)]
    assert "\ny, seed 0, failed: " in text
    assert "\ny, seed 0, failed (other code or data): " in markdown.markdown([elsewhere(failed("y"), "1" * 12)], SUITES)


def test_a_folder_with_only_other_data_has_a_full_report():
    records = [elsewhere(run, data="mine") for run in THREE]
    text = markdown.markdown(records, SUITES)
    assert "The data are not CIFAR-10: mine." in text
    assert choice(text)
    assert markdown.OTHER not in text
    assert "not CIFAR-10" not in markdown.markdown(THREE, SUITES)


# Runs on all images


def on_all(name, test, mirrored=None, **changes):
    """The record of a run that has trained on all 50,000 images."""
    spec = resolve({"epochs": 2, "train_on": "all", **changes})
    train = make(name, train=0.9).metrics.train
    train = replace(train, n=50_000, count=[5_000] * 10, correct=[4_500] * 10)
    record = make(name, test, **changes)
    return replace(
        record,
        spec=spec,
        spec_id=spec_id(spec),
        metrics=replace(record.metrics, train=train, validation=None),
        history=[replace(entry, val_loss=None, val_accuracy=None) for entry in record.history],
        flipped=Flipped(None, make(name, mirrored).metrics.test) if mirrored else UNSET,
    )


def test_runs_on_all_images_are_in_best_by_time_and_in_no_choice():
    minute = [on_all("minute", *accuracies, seed=i) for i, accuracies in enumerate([(0.70, 0.71), (0.71, 0.73)])]
    text = markdown.markdown([*THREE, *minute], SUITES)
    assert text.replace(section(text, "Best by time"), "").count("minute") == 1, "but for the command that trains it"
    named = dict(zip(published.columns(stats.groups(minute)), table(section(text, "Best by time"))[0], strict=True))
    assert (named["recipe"], named["n"]) == ("minute", "2")
    assert (named["test"], named["test, with mirror images"]) == ("70.50 ± 0.71%", "**72.00 ± 1.41%**")
    assert (named["training"], named["with compilation"]) == ("6 s", "14 s")
    assert named["petaFLOP"] == f"{6 * 3809034 * 2 * 50_000 / 1e15:.3g}"
    assert "| S-FC, beta-lasso | 85.19% | 256,000,000 | 4,000 | 307 | [Neyshabur 2020]" in text
    alone = markdown.markdown(minute, SUITES)
    assert "## Best by time" in alone
    assert "learning rate alone" not in alone
    assert "## Best by time" not in markdown.markdown(THREE, SUITES)


def test_best_by_time_has_a_column_for_shifts_where_a_run_has_them():
    old, new = on_all("hour", 0.78, 0.79), on_all("minute", 0.70, 0.71)
    new = replace(new, shifted=make("minute", 0.72).metrics.test)
    text = markdown.markdown([*THREE, old, new], SUITES)
    rows = [dict(zip(published.RUNS, row, strict=True)) for row in table(section(text, "Best by time"))]
    assert {row["recipe"]: row[published.SHIFTED] for row in rows} == {"hour": "not evaluated", "minute": "72.00%"}
    assert published.SHIFTED not in markdown.markdown([*THREE, old], SUITES)


def test_a_cell_of_fewer_runs_than_its_row_says_so():
    runs = [on_all("x", 0.70, 0.71), on_all("x", 0.70, 0.73, seed=1), on_all("x", 0.70, seed=2)]
    (row,) = table(section(markdown.markdown(runs, SUITES), "Best by time"))
    assert row[1:4] == ["3", "70.00 ± 0.00%", "**72.00 ± 1.41%** (n = 2)"]


@pytest.mark.parametrize(("times", "ticks"), [((7, 18), [1, 10, 60]), ((14, 40), [10, 60]), ((30, 800), [60, 600])])
def test_accuracy_against_time_has_two_ticks_or_more(times, ticks):
    runs = [edit_history(on_all(f"x{n}", 0.7, epochs=1), seconds=float(n)) for n in times]
    [ax] = plots.paint(published.against_time(stats.groups(runs))).axes
    low, high = ax.get_xlim()
    assert low < times[0] < times[1] < high
    assert [tick for tick in ax.get_xticks() if low <= tick <= high] == ticks


def test_whitening_is_part_of_the_arithmetic():
    for more, products in (({}, 1), ({"locality": [3.0]}, 2)):  # with local layers, there and back
        plain, whitened = (published.work(on_all("x", 0.7, whiten=k, **more)) for k in (0, 400))
        assert whitened - plain == pytest.approx(products * 2 * 3072 * 400 * 100_000 / 1e15)


def test_a_record_that_was_not_evaluated_with_mirror_images_says_so():
    groups = stats.groups([on_all("x", 0.7)])
    assert published.RUNS["test, with mirror images"](groups[0]) == "not evaluated"
    ours, _ = published.picture(groups).content
    assert not ours


def test_the_picture_shows_the_most_accurate_of_very_many():
    groups = stats.groups([on_all(f"x{i}", 0.5, 0.5 + i / 100) for i in range(2 * plots.MAX_BARS)])
    ours, _ = published.picture(groups).content
    assert {p.label for p in ours} == {f"x{i}" for i in range(plots.MAX_BARS, 2 * plots.MAX_BARS)}


@pytest.mark.parametrize("path", [published.PICTURE, published.TIME])
def test_the_pictures_of_best_by_time(tmp_path, path):
    write(tmp_path, [on_all("minute", 0.7, 0.71), on_all("hour", 0.78, 0.79, epochs=9)])
    rebuild.rebuild(tmp_path, SUITES)
    assert f"({path})" in section((tmp_path / "results.md").read_text(), "Best by time")
    svg = (tmp_path / path).read_bytes()
    assert b"svg" in svg[:300]
    assert len(svg) < 300_000
    rebuild.rebuild(tmp_path, SUITES, redraw=True)
    assert (tmp_path / path).read_bytes() == svg


def test_accuracy_against_time_has_the_recipes_and_the_best_of_each_suite_by_machine(tmp_path):
    """Not the variants of an ablation."""
    gpu = replace(BASELINE.environment, device="cuda", device_name="A GPU")
    recipes = [on_all("minute", 0.7, 0.71, epochs=4), replace(on_all("gpu", 0.8, epochs=9), environment=gpu)]
    write(tmp_path, [*THREE, BASELINE, make("variant", dropout=0.5), *recipes])
    catalog = Catalog({**SUITES.suites, "ablation": {"variant": {}}}, {"ablation": {}}, "learning-rate")
    rebuild.rebuild(tmp_path, catalog)
    alt = re.search(rf"!\[(.*)\]\({published.TIME}\)", (tmp_path / "results.md").read_text())
    assert alt
    assert alt[1] == (
        "Test accuracy against seconds of training. A processor, 2 threads: lr-5e-4 57.5% after 6 s, "
        "baseline 53.0% after 6 s, minute 70.0% after 13 s; A GPU: gpu 80.0% after 29 s"
    )


@pytest.mark.parametrize("path", [published.PICTURE, published.TIME])
def test_no_name_in_best_by_time_is_cut_or_covered(monkeypatch, path):
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **kw: figures.append(self) or save(self, *a, **kw))
    runs = {"minute": (0.7, 0.727, 38), "hour": (0.779, 0.789, 5000), "two-hours": (0.78, 0.791, 7000)}
    groups = stats.groups([on_all(name, *numbers, epochs=epochs) for name, (*numbers, epochs) in runs.items()])
    plots.draw(published.picture(groups) if path == published.PICTURE else published.against_time(groups))
    (figure,) = figures
    texts = [text for text in figure.axes[0].texts if text.get_text()]
    width, height = figure.canvas.get_width_height()
    boxes = [text.get_window_extent() for text in texts]
    assert not any(box.overlaps(other) for box, other in itertools.combinations(boxes, 2))
    for box in boxes:
        assert box.x0 >= 0
        assert box.x1 <= width
        assert box.y0 >= 0
        assert box.y1 <= height
    names = {text.get_text() for text in texts}
    if path == published.PICTURE:
        assert names == {*runs, *(p.network for p in published.PUBLISHED)}
    else:
        assert names == {"minute 70.0%", "hour 77.9%", "two-hours 78.0%"}


@pytest.mark.parametrize("changes", [{"train_on": "all"}, {}], ids=str)
def test_a_record_has_validation_unless_it_trained_on_all(changes):
    good = on_all("x", 0.7) if changes else make("x")
    other = make("x") if changes else on_all("x", 0.7)
    for field in ("metrics", "history"):
        with pytest.raises(ValueError, match=r"validation metrics .*do not fit train_on"):
            decode(encode(replace(good, **{field: getattr(other, field)})))


def test_a_failed_run_has_no_numbers():
    text = markdown.markdown([failed("lr-1e-3", lr=1e-3), *THREE[1:]], SUITES)
    assert [line for line in text.splitlines() if "lr-1e-3" in line] == [
        "lr-1e-3, seed 0, failed: the loss is NaN since step 7 (epoch 1)."
    ]


def test_a_run_that_fell_behind_is_a_row_and_no_result():
    """Neither is it a failure."""
    records = [*THREE, partial("lr-1e-3", lr=2e-3)]
    assert markdown.markdown(records, SUITES) == markdown.markdown(THREE, SUITES)
    rows = csv.DictReader(io.StringIO(tables.results_csv(records, stats.results(records))))
    [row] = [row for row in rows if row["status"] == "partial"]
    assert (row["lr"], row["validation_accuracy"], row["error"]) == ("0.002", "", "")


def test_failed_runs_alone_make_a_report(tmp_path):
    write(tmp_path, [failed("a")])
    rebuild.rebuild(tmp_path, SUITES)
    assert "## " not in (tmp_path / "results.md").read_text()
    assert not list((tmp_path / "checkpoints").glob("*.svg"))


def test_no_runs_make_a_report(tmp_path):
    assert rebuild.rebuild(tmp_path, SUITES) == []
    assert (tmp_path / "results.md").read_text().startswith("# Results\n")
    assert (tmp_path / tables.RESULTS_CSV).read_text().count("\n") == 1


def test_a_run_that_is_not_exact_is_marked():
    text = markdown.markdown([replace(make("a"), exact=False)], SUITES)
    assert "\na, seed 0, is not exact: it went on from a resume point" in text
    assert "not exact" not in markdown.markdown([make("a")], SUITES)


def test_speed_is_the_median_of_the_timed_epochs():
    def speed(*speeds):
        record = make("a", epochs=len(speeds))
        epochs = zip(record.history, speeds, strict=True)
        return stats.speed(replace(record, history=[replace(epoch, samples_per_second=s) for epoch, s in epochs]))

    assert speed(0, 5, 100, 7) == 7  # 0: not timed
    assert speed(0) == 0


def test_rebuild_reads_the_records_and_nothing_else(tmp_path):
    write(tmp_path, [*THREE, BASELINE])
    (tmp_path / "results.md").write_text(f"{markdown.HEADER} What somebody wrote by hand")
    records = rebuild.rebuild(tmp_path, SUITES)
    assert [record.name for record in records] == ["lr-1e-3", "lr-5e-4", "lr-1e-4", "baseline"]
    text = (tmp_path / "results.md").read_text()
    assert "by hand" not in text
    assert [row[0] for row in rows(text)] == ["lr-5e-4", "lr-1e-3", "lr-1e-4", "baseline"]
    assert (tmp_path / plots.CURVES).read_bytes() == draw(THREE)
    assert set(re.findall(r"\]\((checkpoints/.*?)\)", text)) == {
        path.relative_to(tmp_path).as_posix() for path in (tmp_path / "checkpoints").glob("*.[cs]*") if path.is_file()
    }


EVERY = [*rebuild.BEGINNINGS, *rebuild.PICTURES, plots.suite_path("learning-rate")]


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("records", [[], THREE], ids=len)
def test_a_file_of_another_program_is_left_unchanged(tmp_path, name, records):
    """The error comes before anything is written."""
    write(tmp_path, records)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('{"accuracy": 0.9}, # Results')
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    for function in (rebuild.prepare, rebuild.rebuild):
        with pytest.raises(StoreError, match=rf"{name}: the file there was not written by this program.* Move it away"):
            function(tmp_path, SUITES)
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_every_file_of_a_report_is_known_as_ours(tmp_path, cifar_folder):
    """Also where Git has changed the ends of lines."""
    records = [*map(answered, THREE), on_all("minute", 0.7, 0.71), make("local", locality=[2.0])]
    write(tmp_path, records)
    weights(tmp_path, records)
    rebuild.rebuild(tmp_path, SUITES, cifar_folder)
    assert {f"checkpoints/{name}" for name in files(tmp_path)} - {"checkpoints/results.md"} == set(EVERY[1:])
    for name in rebuild.BEGINNINGS:
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes().replace(b"\n", b"\r\n"))
    rebuild.prepare(tmp_path, SUITES)


@pytest.mark.parametrize("name", EVERY)
def test_a_foreign_file_is_reported_before_the_training(tmp_path, name):
    (tmp_path / name).mkdir(parents=True)
    with pytest.raises(StoreError, match=rf"cannot write .*{name}"):
        rebuild.prepare(tmp_path, SUITES)


@pytest.mark.parametrize("name", ["results.md", tables.RESULTS_CSV])
def test_a_link_stays_a_link(tmp_path, name):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    write(out, THREE)
    (out / name).symlink_to(elsewhere)
    for _ in range(2):  # to a file that does not exist yet, and to one that does
        rebuild.prepare(out, SUITES)
        rebuild.rebuild(out, SUITES)
        write(out, [BASELINE])
    assert (out / name).is_symlink()
    assert "baseline" in elsewhere.read_text()
    elsewhere.chmod(0o444)  # as DVC leaves the files of its cache, which must not change
    before = elsewhere.read_bytes()
    write(out, [make("one-more", epochs=3)])
    rebuild.rebuild(out, SUITES)
    assert elsewhere.read_bytes() == before
    assert "one-more" in (out / name).read_text()
    (out / name).unlink()
    (out / name).symlink_to(tmp_path / "missing" / "file")
    with pytest.raises(StoreError, match=r"cannot write .*missing"):
        rebuild.prepare(out, SUITES)


# The files of every report with finished runs.
FILES = {
    "results.md",
    "results.csv",
    "metrics.json",
    "learning-curves.csv",
    "learning-curves.svg",
    "suite-learning-rate.svg",
}


def files(out):
    """The files of a report."""
    found = [out / "results.md", *sorted(path for path in (out / "checkpoints").glob("*.*") if path.suffix != ".lock")]
    return {path.name: path for path in found}


def test_rebuild_twice_gives_the_same_bytes(tmp_path, cifar_folder):
    """In whatever order the runs were finished."""
    everything = [*map(answered, THREE), BASELINE, failed("other", lr=0.5)]
    written = []
    for out, records in ((tmp_path / "a", everything), (tmp_path / "b", everything[::-1])):
        write(out, records)
        weights(out, records)
        for _ in range(2):
            rebuild.rebuild(out, SUITES, cifar_folder)
            written.append({name: path.read_bytes() for name, path in files(out).items()})
    assert all(each == written[0] for each in written)
    assert set(written[0]) == FILES | {"best-confusion.svg", "best-mistakes.png", "best-first-layer.png"}


def test_rebuild_skips_files_that_are_no_records(tmp_path):
    write(tmp_path, [THREE[0]])
    folder = tmp_path / "checkpoints" / "lr-1e-3"
    (folder / "half.json").write_text('{"name": ')
    (folder / "other.json").write_text("[1]")
    assert [record.name for record in rebuild.rebuild(tmp_path, SUITES)] == ["lr-1e-3"]


def test_a_damaged_record_does_not_stop_a_report(tmp_path, caplog):
    write(tmp_path, THREE)
    path = tmp_path / "checkpoints" / "lr-1e-3" / f"{THREE[0].spec_id}.json"
    path.write_text("{")
    rebuild.rebuild(tmp_path, SUITES)
    assert [row[0] for row in rows((tmp_path / "results.md").read_text())] == ["lr-5e-4", "lr-1e-4"]
    assert str(path) in caplog.text
    assert path.read_text() == "{"


# Nothing is written twice


@pytest.fixture
def drawings(monkeypatch):
    """What has been drawn."""
    drawn, real = [], plots.draw
    monkeypatch.setattr(plots, "draw", lambda picture: drawn.append(picture.path) or real(picture))
    return drawn


@pytest.fixture(scope="module")
def cifar_folder(tmp_path_factory):
    """A folder that looks like that of CIFAR-10, and is enough to read the test images."""
    folder = tmp_path_factory.mktemp("data")
    (folder / dataset.ARCHIVE.folder).mkdir()
    for name in dataset.ARCHIVE.files:
        (folder / dataset.ARCHIVE.folder / name).touch()
    return folder


@functools.cache
def invented_images():
    return np.random.default_rng(0).integers(0, 256, (10_000, 3072), np.uint8)


@pytest.fixture(autouse=True)
def _invented_images(monkeypatch):
    monkeypatch.setattr(Archive, "read", lambda self, folder, name: {b"data": invented_images()})


def weights(out, records):
    """Weights beside the records of finished runs."""
    values = np.random.default_rng(0).uniform(-1, 1, (100, 3072)).astype(np.float32)
    for record in records:
        if isinstance(record, Finished):
            path = out / "checkpoints" / record.name / f"{record.spec_id}.safetensors"
            path.write_bytes(safetensors.numpy.save({"1.weight": values}))


def test_a_second_rebuild_draws_and_writes_nothing(tmp_path, drawings, cifar_folder):
    records = [*map(answered, THREE), BASELINE, failed("other", lr=0.5)]
    write(tmp_path, records)
    weights(tmp_path, records)

    def state():
        return [(file.read_bytes(), file.stat().st_mtime_ns, file.stat().st_ino) for file in files(tmp_path).values()]

    rebuild.rebuild(tmp_path, SUITES, cifar_folder)
    before = state()
    assert (len(before), len(drawings)) == (9, 5)
    rebuild.rebuild(tmp_path, SUITES, cifar_folder)
    assert (state(), len(drawings)) == (before, 5)
    rebuild.rebuild(tmp_path, SUITES, cifar_folder, redraw=True)
    assert (state(), len(drawings)) == (before, 10)  # drawn, to the same bytes
    curves = tmp_path / plots.CURVES
    curves.write_bytes(curves.read_bytes().replace(b"</svg>", b""))
    rebuild.rebuild(tmp_path, SUITES, cifar_folder, redraw=True)
    assert [content for content, *_ in state()] == [content for content, *_ in before]


def test_only_what_has_changed_is_written(tmp_path, drawings):
    write(tmp_path, THREE)
    rebuild.rebuild(tmp_path, SUITES)
    before = {name: path.read_bytes() for name, path in files(tmp_path).items()}
    assert len(drawings) == 3  # the curves, the suite, and the weights, which are not there
    write(tmp_path, [replace(THREE[0], parameters=7)])  # in the tables, but in no picture
    rebuild.rebuild(tmp_path, SUITES)
    assert [n for n, path in files(tmp_path).items() if path.read_bytes() != before[n]] == ["results.md", "results.csv"]
    assert drawings[3:] == [best_run.FILTERS]
    write(tmp_path, [edit_history(THREE[0], val_loss=1.0)])  # the other way round
    rebuild.rebuild(tmp_path, SUITES)
    assert drawings[4:] == [best_run.FILTERS, plots.CURVES]
    write(tmp_path, THREE)
    rebuild.rebuild(tmp_path, SUITES)
    assert {name: path.read_bytes() for name, path in files(tmp_path).items()} == before


# The picture


@pytest.fixture
def axes(monkeypatch):
    """A function that draws the curves of records and returns the axes of accuracy and of loss."""
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


def test_the_picture_neither_depends_on_settings_of_matplotlib_nor_changes_them():
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
    for ax in axes([replace(make("a"), name=name)]):
        (label,) = ax.texts
        assert label.get_text() == name
        assert not label.get_parse_math()


@pytest.mark.parametrize("epochs", [1, 2, 3, 7, 150])
def test_the_axis_has_integer_epochs(epochs, axes):
    for ax in axes([make("a", epochs=epochs)]):
        low, high = ax.get_xlim()
        ticks = [tick for tick in ax.get_xticks() if low <= tick <= high]
        assert ticks
        assert all(tick == int(tick) for tick in ticks)


def test_curves_are_means_over_seeds_with_a_band():
    """Only so many epochs are drawn, always with the first and the last."""
    seeds = [
        edit_history(make("a", seed=seed), val_accuracy=0.5 + 0.1 * seed, val_loss=1.0 + seed) for seed in range(3)
    ]
    picture = plots.curves(stats.groups([*seeds, make("b", validation=0.5)]))
    assert "means over seeds" in picture.title
    one, other = picture.content
    assert [(curve.label, curve.epochs) for curve in (one, other)] == [("a", [1, 2]), ("b", [1, 2])]
    for quantity, values in (("accuracy", [0.6, 0.5, 0.7]), ("loss", [2, 1, 3])):
        names = (f"{quantity}_{line}" for line in ("validation", "low", "high"))
        assert [one.lines[name][1] for name in names] == pytest.approx(values)
    assert one.lines["loss_train"] == pytest.approx([2, 1])
    assert other.lines["loss_low"] == other.lines["loss_high"]
    assert "seeds" not in plots.curves(stats.groups([make("b")])).title
    (long,) = plots.curves(stats.groups([make("a", epochs=1000)])).content
    assert len(long.epochs) == len(long.lines["loss_train"]) == plots.MAX_POINTS
    assert (long.epochs[0], long.epochs[-1]) == (1, 1000)


def test_the_curves_of_many_groups_are_those_of_the_best_by_validation():
    records = [make(f"x{i}", lr=0.01 * (i + 1), validation=0.5 + 0.002 * (i * 7 % 12)) for i in range(12)]
    picture = plots.curves(stats.groups(records))
    assert [curve.label for curve in picture.content] == ["x5", "x10", "x3", "x8"]
    assert picture.title.endswith("the best 4 of 12 experiments by validation")


def test_each_curve_has_its_name_at_its_end_in_its_colour(axes):
    """The names do not overlap, however close the ends are, and none is cut."""
    runs = [make(f"{'x' * 30}{i}", lr=0.01 * (i + 1), validation=0.5 + i / 5000) for i in range(4)]
    for ax in axes(runs):
        ax.figure.draw_without_rendering()
        colors = {line.get_color() for line in ax.lines}
        assert {text.get_color() for text in ax.texts} == colors
        assert len(colors) == 4
        boxes = sorted((text.get_window_extent() for text in ax.texts), key=lambda box: box.y0)
        assert all(below.y1 <= above.y0 for below, above in itertools.pairwise(boxes))
        width, height = ax.figure.canvas.get_width_height()
        assert all(box.x0 > ax.bbox.x1 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height for box in boxes)
    (one, _) = axes([make("a", lr=1e-3, validation=0.7), make("b", lr=1e-4, validation=0.3)])
    ends = {text.get_text(): text.xy[1] for text in one.texts}
    assert ends == {"a": pytest.approx(65), "b": pytest.approx(25)}, "names that are far apart are not moved"


def test_the_default_suite_is_first_with_its_own_curves(tmp_path):
    """However good the others are, and wherever it is in the catalog."""
    others = [make(f"x{i}", dropout=0.01 * i, validation=0.6 + i / 100) for i in range(3)]
    write(tmp_path, [*map(answered, [*THREE, *others]), BASELINE])
    catalog = SUITES._replace(suites={"x": {run.name: {} for run in others}, **SUITES.suites}, default="learning-rate")
    rebuild.rebuild(tmp_path, catalog)
    text = (tmp_path / "results.md").read_text()
    headings = re.findall("^## (.*)", text, re.M)
    assert headings == [
        *("Suite learning-rate", "Suite x", "Suite baseline", "Gain over the baseline"),
        *("The best experiment of the suite learning-rate by validation: lr-5e-4", "Details"),
    ]
    suite = section(text, "Suite learning-rate")
    places = [suite.index(part) for part in ("| lr-1e-4 ", choice(text), "suite-learning-rate.svg", plots.CURVES)]
    assert places == sorted(places)
    assert f"of lr-5e-4, lr-1e-3, lr-1e-4]({plots.CURVES})" in suite
    rebuild.rebuild(tmp_path, SUITES._replace(suites={"x": catalog.suites["x"]}, default="none of these was trained"))
    assert f"of x2, x1, x0]({plots.CURVES})" in section((tmp_path / "results.md").read_text(), "Suite x")


def test_a_report_answers_in_order():
    """Choices, time, comparisons, ablations; what one looks up comes last, folded."""
    ablation = [*seeds_of("plus", [0.6, 0.6], norm="batch", widths=[512]), make("gone", validation=0.3)]
    catalog = Catalog(
        {"ablation": {"plus": {}, "baseline": {}}, **SUITES.suites},
        {"ablation": {"plain": "baseline"}},
        "learning-rate",
    )
    text = markdown.markdown([*THREE, BASELINE, *ablation, on_all("minute", 0.7), elsewhere(make("old"), "")], catalog)
    assert re.findall("^## (.*)", text, re.M) == [
        *("Suite learning-rate", "Suite baseline", "Gain over the baseline", "Best by time", "Suite ablation"),
        *("Other experiments", "Details"),
    ]
    assert re.findall("<summary>(.*)</summary>", section(text, "Details")) == [
        *("How to read the tables", markdown.OTHER, "Reproduce", "Made on"),
    ]


def test_the_table_has_the_curves_of_every_experiment():
    """Also of those that are not in the picture, and of those that were trained on all images."""
    seeds = [
        edit_history(make("a", seed=seed), val_accuracy=0.5 + 0.1 * seed, val_loss=1.0 + seed) for seed in range(3)
    ]
    records = [*seeds, make("b", epochs=1000), *(make(f"x{i}", lr=0.01 * (i + 1)) for i in range(12))]
    found = list(csv.DictReader(io.StringIO(tables.curves_csv(stats.results([*records, on_all("c", 0.7)])))))
    assert {row["experiment"] for row in found} == {"a", "b", "c", *(f"x{i}" for i in range(12))}
    a, b, c = ([row for row in found if row["experiment"] == name] for name in "abc")
    assert [(row["epoch"], row["epochs"]) for row in a] == [("1", "2"), ("2", "2")]
    assert [float(a[1][f"accuracy_{what}"]) for what in ("validation", "low", "high")] == [0.6, 0.5, 0.7]
    assert [float(row["loss_train"]) for row in a] == [2, 1]
    assert (len(b), b[0]["epoch"], b[-1]["epoch"], b[0]["epochs"]) == (plots.MAX_POINTS, "1", "1000", "1000")
    assert [row["accuracy_validation"] for row in c] == ["", ""]
    assert [float(row["accuracy_train"]) for row in c] == [0.3, 0.3]
    assert tables.curve_points(10_000) == 5


@pytest.mark.slow
def test_the_picture_warns_of_nothing_where_home_cannot_be_written():
    code = "from core.report import plots; plots.draw(plots.curves([]))"
    environment = {key: os.environ[key] for key in os.environ if not key.startswith(("MPL", "XDG"))}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**environment, "HOME": "/dev/null"}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


REBUILD = """
import sys
from pathlib import Path
from core.report.catalog import Catalog
from core.report.rebuild import rebuild
rebuild(Path(sys.argv[1]), Catalog())
"""


def rebuild_with(out, **env):
    """Rebuild in another process, in the folder of the report."""
    environment = {key: os.environ[key] for key in os.environ if not key.startswith("MPL")}
    environment |= {"PYTHONPATH": str(ROOT), **env}
    return subprocess.run(
        [sys.executable, "-c", REBUILD, out], cwd=out, env=environment, capture_output=True, text=True, timeout=60
    )


def test_invalid_settings_of_matplotlib_do_not_matter(tmp_path):
    """Any notebook sets such a backend for the processes that it starts."""
    write(tmp_path, THREE)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    refused = {"MATPLOTLIBRC": str(tmp_path / "binary"), "MPLCONFIGDIR": str(tmp_path / "binary")}
    done = rebuild_with(tmp_path, MPLBACKEND="module://matplotlib_inline.backend_inline", **refused)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert plots.CURVES in (tmp_path / "results.md").read_text()
    assert (tmp_path / plots.CURVES).read_bytes() == draw(THREE)


def test_without_matplotlib_there_is_a_report_without_pictures(tmp_path):
    write(tmp_path, THREE)
    (tmp_path / "matplotlibrc").write_bytes(b"\xff\xfe\x00")  # in the working folder it wins over all others
    done = rebuild_with(tmp_path)
    assert done.returncode == 0
    (line,) = done.stderr.splitlines()
    assert line.startswith("no picture can be drawn, since matplotlib cannot be imported (UnicodeDecodeError")
    assert [row[0] for row in rows((tmp_path / "results.md").read_text())] == ["lr-5e-4", "lr-1e-3", "lr-1e-4"]
    assert "![" not in (tmp_path / "results.md").read_text()


# Many runs


def test_the_table_has_the_best_thirty_rows_and_counts_the_others():
    records = [make(f"x{i}", lr=0.01 * (i + 1), validation=0.5 + 0.002 * i) for i in range(33)]
    records += [make("x0", lr=0.01, seed=seed, validation=0.5) for seed in range(1, 5)]
    records.append(failed("x0", lr=0.01, seed=5))  # no finished run
    text = markdown.markdown(records, SUITES)
    assert [row[0] for row in rows(text)] == [f"x{i}" for i in range(32, 2, -1)]
    assert "\n3 more rows are left out.\n" in text
    assert "x24 and 24 others, which differ in the learning rate alone" in text
    assert "\n2 more rows are left out.\n" in choice(text)


def test_long_lists_end_with_a_count():
    runs = [replace(make("x", lr=0.01, seed=seed), exact=False) for seed in range(40)]
    runs += [make("z", dropout=0.01 * i, lr=lr) for i in range(40) for lr in (1e-3, 1e-2)]
    environment = runs[0].environment
    runs += [replace(make("y", seed=i), environment=replace(environment, git=f"{i:012x}")) for i in range(40)]
    text = markdown.markdown([*runs, *(failed("x", seed=seed) for seed in range(100, 140))], SUITES)
    assert text.count(", failed: the loss") == 9
    assert "\n31 more runs failed.\n" in text
    assert text.count(", is not exact: ") == 9
    assert "\n31 more runs were resumed in this way.\n" in text
    assert text.count("differ in the learning rate alone") == 5
    assert "more sets of learning rates" in text
    machines = table(folded(text, "Made on"))
    assert [(len(cells), cells[-1].count(", "), cells[-1][-9:]) for cells in machines] == [(8, 8, "32 others")]
    block = re.search(r"```sh\n(.*?)```", text, re.S)
    assert block
    commands = block[1].splitlines()
    assert len(commands) == 30
    assert re.fullmatch(r"# and \d+ more", commands[-2])


def test_two_thousand_runs_make_a_small_report(tmp_path):
    """In the worst case: all of them different, and with many epochs."""
    runs = [make(f"{'x' * 80}{i}", lr=0.001 * (i + 1), epochs=40, validation=0.0002 * i + 0.1) for i in range(2000)]
    write(tmp_path, runs)
    assert len(rebuild.rebuild(tmp_path, Catalog())) == 2000
    assert (tmp_path / "results.md").stat().st_size < 100_000
    assert all(path.stat().st_size < 300_000 for path in files(tmp_path).values() if path.suffix != ".csv")
    assert len(list(csv.DictReader((tmp_path / tables.RESULTS_CSV).open()))) == 2000


def test_the_largest_picture_is_small():
    runs = [make(f"x{i}", seed=seed, lr=0.01 * (i + 1), epochs=200) for i in range(12) for seed in range(3)]
    noisy = [
        replace(run, history=[replace(e, val_accuracy=hash((e.epoch, run.seed)) % 97 / 97) for e in run.history])
        for run in runs
    ]
    assert len(draw(noisy)) < 300_000


# How to reproduce it


def commands(records, suites=SUITES):
    block = re.search(r"```sh\n(.*?)```", markdown.markdown(records, suites), re.S)
    assert block
    return block[1].splitlines()


def test_the_commands_name_the_runs():
    first, last = commands([*THREE, BASELINE])
    assert first == "uv run main.py run lr-5e-4 lr-1e-3 lr-1e-4 baseline"
    assert last == "uv run main.py evaluate"
    made = folded(markdown.markdown(THREE, SUITES), "Made on")
    assert "The data are 15fc275e5cae." in made
    machine = ["A processor", "x86_64 AVX2", "2", "3", "compiled on cpu", "2.15.0", "3.11.7", "0123456789ab"]
    assert table(made) == [machine]


def test_a_machine_has_one_row():
    """Whatever ran on it. The record of a run in bfloat16 has the threads in its hardware, too."""
    record, other = THREE[:2]
    where = replace(
        record.environment, hardware="x86_64 AVX2, 2 threads", git="fedcba987654", torch="2.16.0", mode="eager"
    )
    text = markdown.markdown([other, replace(record, environment=where)], SUITES)
    (machine,) = table(folded(text, "Made on"))
    assert machine[3:6] == ["2", "compiled on cpu and eager on cpu", "2.15.0 and 2.16.0"]
    assert machine[-1] == "0123456789ab and fedcba987654"
    for changes in ({"threads": 4}, {"hardware": "x86_64 AVX512"}, {"device_name": "Another"}):
        elsewhere = replace(record, environment=replace(record.environment, **changes))
        text = markdown.markdown([other, elsewhere], SUITES)
        assert [row[3] for row in table(folded(text, "Made on"))] == ["1", "1"]


def timed(seed, seconds, speed, **changes):
    """A run of one epoch that took so long, on a machine of its own if there are changes."""
    run = edit_history(make("x", seed=seed, epochs=1), seconds=seconds, samples_per_second=speed)
    return replace(run, environment=replace(run.environment, **changes))


def test_times_are_medians_on_the_machine_that_trained_the_first_seed():
    slow = [timed(seed, 100.0, 10, device_name="Another") for seed in range(3, 8)]
    fast = [timed(2, 50.0, 800), timed(1, 5.0, 900), timed(0, 6.0, 700)]
    (row,) = cells(markdown.markdown([*slow, *fast], SUITES))
    assert (row["n"], row["time"], row["samples/s"]) == ("8", "6 s", "800")
    by_epochs = table(section(markdown.markdown([*slow, *fast], SUITES, group_by="epochs"), "By epochs"))
    assert by_epochs[0][-2:] == ["6 s", "800"]


def test_a_table_with_times_of_several_machines_names_them():
    here, there = make("lr-1e-3", lr=1e-3), make("lr-5e-4", lr=5e-4, validation=0.5)
    assert "time on" not in section(markdown.markdown([here, there], SUITES), "Suite learning-rate")
    there = replace(there, environment=replace(there.environment, device_name="Another", threads=8))
    suite = section(markdown.markdown([here, there], SUITES), "Suite learning-rate")
    assert [row[-1] for row in table(suite)] == ["A processor, 2 threads", "Another, 8 threads"]


def test_the_times_of_other_experiments_always_have_their_machine():
    """A reader compares them with the times of the suites."""
    others = section(markdown.markdown([make("lr-1e-3", lr=1e-3), make("mine", lr=1e-3)], SUITES), "Other experiments")
    assert [row[-1] for row in table(others)] == ["A processor, 2 threads"]


def test_a_local_prior_is_said_in_the_table_and_the_pictures_of_best_by_time():
    for sigmas, name in (([], "x"), ([3.0], "x (local)")):
        groups = stats.groups([on_all("x", 0.7, 0.71, locality=sigmas)])
        text = section(markdown.markdown(list(groups[0]), SUITES), "Best by time")
        assert table(text)[0][0] == name
        assert ("has a prior that the published ones do not have" in text) is bool(sigmas)
        for made in (published.against_time(groups), published.picture(groups)):
            assert f": {name} 7" in made.alt


def test_the_commands_have_the_options_of_a_run():
    """Or says that there is no such experiment any more."""
    records = [
        *seeds_of("lr-1e-3", [0.6, 0.6, 0.6], lr=1e-3),
        *(make("lr-5e-4", lr=5e-4, seed=seed) for seed in (3, 7)),
        make("lr-1e-4", lr=1e-4, seed=7),
        make("lr-1e-4", lr=1e-4, epochs=3, widths=[8, 4], validation=0.5),
        make("lr-1e-3", lr=1e-3, dropout=0.1, validation=0.4),
        make("gone", validation=0.3),
    ]
    assert commands(records) == [
        "uv run main.py run lr-1e-3 --seeds 3",
        'uv run main.py run lr-5e-4 --seeds "3,7"',
        "uv run main.py run lr-1e-4 --seed 7",
        'uv run main.py run lr-1e-4 "widths=8,4" epochs=3',
        "uv run main.py run lr-1e-3 dropout=0.1",
        f"# gone ({records[-1].spec_id}): its spec is in its record, and in experiments/ no more",
        "uv run main.py evaluate",
    ]


def test_an_experiment_that_has_become_invalid_does_not_stop_a_report():
    plain, gone, _ = commands(THREE, Catalog({**SUITES.suites, "other": {"lr-1e-3": {"learning_rate": 1e-3}}}))
    assert plain == "uv run main.py run lr-5e-4 lr-1e-4"
    assert gone.startswith("# lr-1e-3 (")


def test_one_spec_under_two_names_is_one_run():
    """It is no second seed, and it is not compared with itself."""
    text = markdown.markdown([THREE[0], replace(THREE[0], name="again")], SUITES)
    assert [row[1] for row in rows(text)] == ["1", "1"]
    assert "learning rate alone" not in text


# The pictures of the best experiment


def test_the_pictures_are_those_of_the_best_by_validation(tmp_path, cifar_folder):
    records = list(map(answered, THREE))
    write(tmp_path, records)
    weights(tmp_path, records)
    rebuild.rebuild(tmp_path, SUITES, cifar_folder)
    heading = "The best experiment of the suite learning-rate by validation: lr-5e-4"
    best = section((tmp_path / "results.md").read_text(), heading)
    assert "| airplane | 57.5 | 42.5 | 0.0 |" in best
    first = records[1].answers.mistakes[0]
    label, predicted = CIFAR10.classes[first.label], CIFAR10.classes[first.predicted]
    assert f"| {first.index} | {label} | {predicted} | 99.0000% |" in best
    for path in (best_run.CONFUSION, best_run.MISTAKES, best_run.FILTERS):
        assert re.search(rf"!\[[^\]]{{30,}}\]\({path}\)", best), "it has a text for who cannot see it"
    for path in files(tmp_path).values():
        assert path.stat().st_size < 300_000, path


def test_the_confusion_matrix_is_the_mean_over_the_seeds_that_have_one():
    group = stats.groups([answered(make("a", test=0.5)), answered(make("a", seed=1, test=0.7)), make("a", seed=2)])[0]
    picture = best_run.confusion(group, CIFAR10.classes)
    _, percent = picture.content
    assert percent[9] == pytest.approx([40, 0, 0, 0, 0, 0, 0, 0, 0, 60])
    assert "mean of 2 seeds" in picture.title


def test_records_without_answers_make_a_report_without_them(tmp_path, cifar_folder):
    write(tmp_path, THREE)
    rebuild.rebuild(tmp_path, SUITES, cifar_folder)
    assert set(files(tmp_path)) == FILES
    assert "The best experiment" not in (tmp_path / "results.md").read_text()


@pytest.mark.parametrize("redraw", [False, True])
def test_without_weights_and_data_the_pictures_stay(tmp_path, cifar_folder, redraw):
    records = list(map(answered, THREE))
    write(tmp_path, records)
    weights(tmp_path, records)
    rebuild.rebuild(tmp_path, SUITES, cifar_folder)
    before = {name: path.read_bytes() for name, path in files(tmp_path).items()}
    for path in (tmp_path / "checkpoints").glob("*/*.safetensors"):
        path.unlink()
    rebuild.rebuild(tmp_path, SUITES, tmp_path / "no-data", redraw)
    assert {name: path.read_bytes() for name, path in files(tmp_path).items()} == before
    # With another best experiment they stay too, but they are not shown as those of that one.
    write(tmp_path, [answered(make("lr-1e-3", lr=1e-3, validation=0.9, test=0.59))])
    rebuild.rebuild(tmp_path, SUITES, None, redraw)
    assert all(files(tmp_path)[name].read_bytes() == before[name] for name in before if name.endswith(".png"))
    assert ".png" not in (tmp_path / "results.md").read_text()


def test_the_first_layer_is_of_the_best_run_whose_weights_are_here(tmp_path):
    """Without them, it stays that of the picture on disk. A local first layer is beside it."""
    runs = [make("lr-1e-3", lr=1e-3, seed=seed, validation=0.5 + seed / 100) for seed in range(3)]
    local = make("local", locality=[2.0], validation=0.4)

    def shown():
        rebuild.rebuild(tmp_path, SUITES)
        text = (tmp_path / "results.md").read_text()
        return [line for line in text.splitlines() if "first-layer.png" in line]

    def drawn(run):
        return (
            plots.identifier(best_run.filters(best_run.FILTERS, run, tuple))
            in files(tmp_path)[Path(best_run.FILTERS).name].read_bytes()
        )

    write(tmp_path, [*runs, local])
    assert not shown()
    weights(tmp_path, runs[:2])
    assert len(shown()) == 1
    assert drawn(runs[1])
    for path in (tmp_path / "checkpoints").glob("*/*.safetensors"):
        path.unlink()
    assert len(shown()) == 1
    assert drawn(runs[1])
    weights(tmp_path, [runs[2], local])
    (line,) = shown()
    assert drawn(runs[2])
    assert re.findall(r"\((.*?\.png)\)", line) == [best_run.FILTERS, best_run.LOCAL]
    assert f"of local as small colour images, a unit each]({best_run.LOCAL})" in line


@pytest.mark.parametrize(
    ("record", "shown"),
    [
        (on_all("local", 0.7, locality=[2.0]), []),  # no experiment has a validation accuracy
        (make("lr-1e-3", lr=1e-3, locality=[2.0]), [best_run.FILTERS]),  # and not the same picture twice
    ],
)
def test_a_local_first_layer_alone(tmp_path, record, shown):
    write(tmp_path, [record])
    weights(tmp_path, [record])
    rebuild.rebuild(tmp_path, SUITES)
    assert re.findall(r"\((\S*first-layer\.png)\)", (tmp_path / "results.md").read_text()) == shown


@pytest.mark.parametrize("data", [b"", b"x" * 100, safetensors.numpy.save({"1.weight": np.full((3, 3072), np.nan)})])
def test_weights_that_cannot_be_used_are_not_drawn(tmp_path, data):
    write(tmp_path, [THREE[0]])
    (tmp_path / "checkpoints" / "lr-1e-3" / f"{THREE[0].spec_id}.safetensors").write_bytes(data)
    rebuild.rebuild(tmp_path, SUITES)
    assert not (tmp_path / best_run.FILTERS).exists()


# results.csv, and a table by a key


def test_every_run_is_a_row_of_the_csv(tmp_path):
    inexact = replace(make("a", seed=4, lr=0.125, validation=0.5), exact=False)
    write(tmp_path, [inexact, failed("b", widths=[])])
    rebuild.rebuild(tmp_path, SUITES)
    one, other = csv.DictReader((tmp_path / tables.RESULTS_CSV).open())
    assert set(one) >= FIELDS.keys()
    assert (one["experiment"], one["lr"], one["seed"], one["widths"]) == ("a", "0.125", "4", "1024-512-256")
    assert (one["validation_accuracy"], one["test_loss"], one["seconds"]) == ("0.5", "1.2345", "6.5")
    assert (one["bitwise"], one["digest"], one["device"]) == ("False", inexact.digest, "cpu")
    assert (other["status"], other["widths"], other["test_accuracy"], other["digest"]) == ("failed", "none", "", "")
    assert other["error"] == "the loss is NaN since step 7 (epoch 1)"


def test_a_table_by_a_key_has_means_over_all_runs(tmp_path):
    write(tmp_path, [make("a", test=0.5), make("b", test=0.54, epochs=3), make("c", test=0.6, dropout=0.5)])
    rebuild.rebuild(tmp_path, SUITES, group_by="dropout")
    by_dropout = section((tmp_path / "results.md").read_text(), "By dropout")
    # 50 and 54 have the deviation sqrt(8)
    assert "| 0.2 | 2 | 2 | 56.00 ± 0.00% | 52.00 ± 2.83% | 70.00 ± 0.00% |" in by_dropout
    assert "| 0.5 | 1 | 1 | 56.00% | 60.00% | 70.00% |" in by_dropout
    rebuild.rebuild(tmp_path, SUITES)
    assert "## By" not in (tmp_path / "results.md").read_text()


def test_an_unknown_key_is_refused(tmp_path):
    with pytest.raises(SpecError, match=r"cannot group by 'learning_rate': it is no key .*; did you mean 'lr'"):
        rebuild.rebuild(tmp_path, SUITES, group_by="learning_rate")
    assert not list(tmp_path.iterdir())
