"""results.md and its picture: a view of the records, rebuilt from them and from nothing else."""

import io
import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core import runs, store
from core.spec import Spec, SpecError, canonical, resolve

Record = dict[str, Any]
PICTURE = "checkpoints/learning-curves.svg"


def interval(accuracy: float, n: int) -> tuple[float, float]:
    """The 95% interval of an accuracy measured on n examples (Wilson 1927)."""
    z = 1.959964
    center = (accuracy + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(accuracy * (1 - accuracy) / n + z * z / (4 * n * n))
    return center - half, center + half


def percent(value: float) -> str:
    return f"{100 * value:.2f}%"


def speed(record: Record) -> int:
    """The median over the epochs, in samples a second; 0 where none was timed."""
    speeds = sorted(entry["samples_per_second"] for entry in record["history"] if entry["samples_per_second"])
    return speeds[len(speeds) // 2] if speeds else 0


def rebuild(out: Path, experiments: Mapping[str, Spec]) -> list[Record]:
    """Write results.md and the learning curves under `out`; returns the records, in the order of the table.

    Args:
        experiments: what the names of experiments stand for now, to say how to run them again.

    Raises:
        core.store.StoreError: they cannot be written; the old ones are intact.
    """
    with store.locked(out / "checkpoints" / "results.lock"):
        records = sorted(runs.records(out), key=_order)
        finished = [r for r in records if r["status"] == "finished"]
        store.atomic_write(out / PICTURE, picture(finished))
        store.atomic_write(out / "results.md", markdown(records, experiments).encode())
    return records


def _order(record: Record) -> tuple:
    # By network, so that a baseline stands below the runs it is compared with; deeper first, then by learning rate.
    spec = record["spec"]
    return -len(spec["widths"]), canonical([spec["widths"], spec["norm"]]), -spec["lr"], record["name"], spec["seed"]


def _row(record: Record) -> list[str]:
    spec = record["spec"]
    start = [record["name"], f"{spec['lr']:g}", str(spec["seed"])]
    if record["status"] != "finished":
        return [*start, *["–"] * 12]
    train, validation, test = (record["metrics"][split] for split in ("train", "validation", "test"))
    low, high = interval(test["accuracy"], test["n"])
    history, where = record["history"], record["environment"]
    return [
        *start,
        f"{record['parameters']:,}",
        str(spec["epochs"]),
        str(spec["batch_size"]),
        percent(train["accuracy"]),
        percent(validation["accuracy"]),
        f"**{percent(test['accuracy'])}** ({100 * low:.1f}–{100 * high:.1f})",
        f"{100 * (train['accuracy'] - test['accuracy']):.1f}",
        f"{test['loss']:.4f}",
        f"{sum(entry['seconds'] for entry in history):.0f} s",
        f"{speed(record):,}",
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
        f"chooses **{best['name']}** ({best['spec']['lr']:g}): {percent(accuracies[0])}, {100 * lead:.2f} points "
        f"before {second['name']}, which is {verdict} the sampling error of such a difference ({100 * error:.1f} "
        f"points). The test split took no part in the choice; on it, {best['name']} reaches "
        f"{percent(best['metrics']['test']['accuracy'])}.\n"
    )


def _seeds(groups: list[list[Record]]) -> str:
    rows = []
    for group in groups:
        tests = [r["metrics"]["test"]["accuracy"] for r in group]
        mean = sum(tests) / len(tests)
        deviation = math.sqrt(sum((t - mean) ** 2 for t in tests) / (len(tests) - 1))
        rows.append([group[0]["name"], str(len(tests)), percent(mean), f"{100 * deviation:.2f}"])
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
        parts.append(f"\n## Learning curves\n\n![accuracy and loss of every epoch]({PICTURE})\n")
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


def picture(finished: list[Record]) -> bytes:
    """Validation and train curves of the finished runs as SVG; equal records give equal bytes."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    style: Any = {"svg.hashsalt": "cifar10-mlp", "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
        for record in finished:
            epochs = [entry["epoch"] for entry in record["history"]]
            for ax, quantity, factor in zip(axes, ("accuracy", "loss"), (100, 1), strict=True):
                validation = [factor * entry[f"val_{quantity}"] for entry in record["history"]]
                train = [factor * entry[f"train_{quantity}"] for entry in record["history"]]
                (line,) = ax.plot(epochs, validation, label=record["name"], marker="." if len(epochs) == 1 else None)
                ax.plot(epochs, train, color=line.get_color(), linestyle=":", alpha=0.7)
        for ax, label in zip(axes, ("accuracy (%)", "cross-entropy"), strict=True):
            ax.set(xlabel="epoch", ylabel=label)
            ax.grid(alpha=0.3)
        axes[0].set_title("solid: validation · dotted: train, while training", fontsize=9, loc="left")
        if finished:
            axes[1].legend(fontsize=8)
        out = io.BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
        plt.close(figure)
    return out.getvalue()
