"""The text of results.md, from the records."""

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from core.report import plots, stats
from core.spec import Spec, SpecError, canonical, resolve

Record = dict[str, Any]


def order(record: Record) -> tuple:
    # By network, so that a baseline stands below the runs it is compared with; deeper first, then by learning rate.
    spec = record["spec"]
    return -len(spec["widths"]), canonical([spec["widths"], spec["norm"]]), -spec["lr"], record["name"], spec["seed"]


def _row(record: Record) -> list[str]:
    spec = record["spec"]
    start = [record["name"], f"{spec['lr']:g}", str(spec["seed"])]
    if record["status"] != "finished":
        return [*start, *["–"] * 12]
    train, validation, test = (record["metrics"][split] for split in ("train", "validation", "test"))
    low, high = stats.interval(test["accuracy"], test["n"])
    history, where = record["history"], record["environment"]
    return [
        *start,
        f"{record['parameters']:,}",
        str(spec["epochs"]),
        str(spec["batch_size"]),
        stats.percent(train["accuracy"]),
        stats.percent(validation["accuracy"]),
        f"**{stats.percent(test['accuracy'])}** ({100 * low:.1f}–{100 * high:.1f})",
        f"{100 * (train['accuracy'] - test['accuracy']):.1f}",
        f"{test['loss']:.4f}",
        f"{sum(entry['seconds'] for entry in history):.0f} s",
        f"{stats.speed(record):,}",
        f"{where['device']}, {where['mode']}",
        f"`{record['digest'][:12]}`" + ("" if record["bitwise"] else " (not bitwise)"),
    ]


COLUMNS = ["experiment", "lr", "seed", "parameters", "epochs", "batch", "train", "validation", "test (95% interval)"]
COLUMNS += ["gap", "test loss", "time", "samples/s", "device", "weights"]


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _same_but(records: list[Record], *keys: str) -> list[list[Record]]:
    """Groups of records whose specs agree in all but these keys, and differ in them."""
    groups: dict[str, dict[str, Record]] = defaultdict(dict)
    for record in records:
        rest = canonical({key: value for key, value in record["spec"].items() if key not in keys})
        groups[rest].setdefault(record["spec_id"], record)  # one spec may have run under two names
    return [list(group.values()) for group in groups.values() if len(group) > 1]


def _choice(group: list[Record]) -> str:
    ranked = sorted(group, key=lambda r: -r["metrics"]["validation"]["accuracy"])
    best, second = ranked[0], ranked[1]
    n = best["metrics"]["validation"]["n"]
    accuracies = [r["metrics"]["validation"]["accuracy"] for r in (best, second)]
    # The error of a difference of two accuracies, as if measured independently; on the same images it is smaller.
    error = 1.96 * math.sqrt(sum(a * (1 - a) / n for a in accuracies))
    lead = accuracies[0] - accuracies[1]
    verdict = "more than" if lead > error else "within"
    return (
        f"Of {', '.join(r['name'] for r in group)}, which differ in the learning rate alone, the validation accuracy "
        f"chooses **{best['name']}** ({best['spec']['lr']:g}): {stats.percent(accuracies[0])}, {100 * lead:.2f} points "
        f"before {second['name']}, which is {verdict} the sampling error of such a difference ({100 * error:.1f} "
        f"points). The test split took no part in the choice; on it, {best['name']} reaches "
        f"{stats.percent(best['metrics']['test']['accuracy'])}.\n"
    )


def _seeds(groups: list[list[Record]]) -> str:
    rows = []
    for group in groups:
        tests = [r["metrics"]["test"]["accuracy"] for r in group]
        mean = sum(tests) / len(tests)
        deviation = math.sqrt(sum((t - mean) ** 2 for t in tests) / (len(tests) - 1))
        rows.append([group[0]["name"], str(len(tests)), stats.percent(mean), f"{100 * deviation:.2f}"])
    return _table(["experiment", "seeds", "mean test accuracy", "standard deviation (points)"], rows)


def _baseline(finished: list[Record]) -> str:
    """What batch norm, dropout, leaky ReLU and depth bought, where a run named baseline stands beside others."""
    base = next((r for r in finished if r["name"] == "baseline"), None)
    others = [
        r for r in finished if r["spec"]["norm"] != "none" and base and r["spec"]["epochs"] == base["spec"]["epochs"]
    ]
    if base is None or not others:
        return ""
    best = max(others, key=lambda r: r["metrics"]["validation"]["accuracy"])

    def numbers(record: Record) -> tuple[float, float]:
        train, test = (100 * record["metrics"][split]["accuracy"] for split in ("train", "test"))
        return test, train - test

    (test, gap), (base_test, base_gap) = numbers(best), numbers(base)
    return (
        "\n## What the network bought over the baseline\n\n"
        f"`baseline` has the hidden widths {base['spec']['widths']} and {base['spec']['activation']}, without batch "
        f"norm or dropout. Against it, {best['name']} gains {test - base_test:+.2f} points of test accuracy "
        f"({base_test:.2f}% to {test:.2f}%), and the gap between train and test goes from {base_gap:.1f} to {gap:.1f} "
        "points.\n"
    )


OPTIONS = {"epochs": "--epochs", "batch_size": "--batch-size", "lr": "--lr", "seed": "--seed"}


def _commands(finished: list[Record], experiments: Mapping[str, Spec]) -> list[str]:
    """What trains these runs again, those without options in one line."""
    plain, others = [], []
    for record in finished:
        name, spec = record["name"], record["spec"]
        try:
            now = resolve(experiments[name])
        except (KeyError, SpecError):  # a name that is gone, or that stands for something which cannot be run
            now = {}
        changed = [key for key in spec if spec[key] != now.get(key)]
        if not changed:
            plain.append(name)
        elif set(changed) <= OPTIONS.keys():
            others.append(" ".join(["uv run main.py run", name, *(f"{OPTIONS[key]} {spec[key]}" for key in changed)]))
        else:
            others.append(f"# {name} ({record['spec_id']}): its spec is in its record, and in experiments/ no more")
    return [" ".join(["uv run main.py run", *plain])] * bool(plain) + others


def markdown(records: list[Record], experiments: Mapping[str, Spec]) -> str:
    """The text of results.md; see rebuild."""
    finished = [r for r in records if r["status"] == "finished"]
    parts = [
        "# Results\n\nWritten by `main.py` from the records in `checkpoints/`; do not edit. Accuracies are measured in "
        "evaluation mode on all 45,000 train, 5,000 validation and 10,000 test images; the test split is read once, at "
        "the end of a run. The gap is train minus test, in points. The time is that of the steps, without compilation. "
        "`weights` is the start of the sha256 of the final weights.\n\n",
        _table(COLUMNS, [_row(record) for record in records]),
    ]
    parts += [f"\n{r['name']} failed: {r['error']}.\n" for r in records if r["status"] == "failed"]
    parts += [
        f"\n{r['name']} was resumed where its bits are not those of an uninterrupted run: --resume-anyway.\n"
        for r in finished
        if not r["bitwise"]
    ]
    choices = [_choice(group) for group in _same_but(finished, "lr")]
    if choices:
        parts += ["\n## Choice of the learning rate\n\n", "\n".join(choices)]
    if seeds := _same_but(finished, "seed"):
        parts += ["\n## Over seeds\n\n", _seeds(seeds)]
    parts.append(_baseline(finished))
    if finished:
        parts.append(f"\n## Learning curves\n\n![accuracy and loss of every epoch]({plots.PICTURE})\n")
        places = sorted({f"- {_place(r)}" for r in finished})
        commands = [*_commands(finished, experiments), "uv run main.py evaluate"]
        parts.append("\n## Reproduce\n\n```sh\n" + "\n".join(commands) + "\n```\n\nMade on:\n\n")
        parts.append("\n".join(places) + "\n")
    return "".join(parts)


def _place(record: Record) -> str:
    where = record["environment"]
    return (
        f"{where['device_name']} ({where['hardware']}), {where['threads']} threads, torch {where['torch']}, Python "
        f"{where['python']}, commit {where['git']}, data {record['data'][:12]}"
    )
