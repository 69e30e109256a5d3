"""What a picture is, how it is drawn, and the pictures that compare experiments. Each is as wide as a phone can show:
one column, few elements, large letters."""

import hashlib
import io
import itertools
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterable
from functools import cache
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from core.report import stats
from core.report.stats import Group

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

CURVES = "checkpoints/learning-curves.svg"
MAX_CURVES = 4  # more would hide one another
MAX_POINTS = 100  # of a curve: more cannot be seen, and make a large file
MAX_BARS = 20  # of a picture of intervals
MAX_LABEL = 26  # letters
WIDTH = 6.4  # inches

STYLE: dict[str, Any] = {
    "svg.hashsalt": "cifar10-mlp",
    "axes.spines.top": False,
    "axes.spines.right": False,
    # Colours that colour-blind readers can tell apart (Okabe and Ito 2008), those with the most contrast first.
    "axes.prop_cycle": "cycler('color', ['0072B2', 'D55E00', '009E73', 'CC79A7', 'E69F00', '56B4E9'])",
    "figure.titlesize": 13,
    "font.size": 13,
    "legend.fontsize": 12,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
}

# The environment variables that matplotlib reads on import. A notebook sets the first one, for every process that it
# starts, to a module that only its own environment has.
SETTINGS = ("MPLBACKEND", "MATPLOTLIBRC", "MPLCONFIGDIR")


class Picture(NamedTuple):
    """A picture that can be drawn. Equal titles and contents give equal pictures."""

    path: str  # under the folder of the report; the suffix is the format
    title: str
    content: Any
    paint: Callable[["Figure", Any, Any], None]  # paint(figure, content, pixels) draws on an empty figure
    height: float  # in inches
    alt: str  # what it shows, in words
    load: Callable[[], Any] = lambda: ()  # reads the pixels, which the content only names; None: not available
    table: str = ""  # the numbers of the content, as Markdown


def identifier(picture: Picture) -> bytes:
    """A hash of what is drawn. It is in the file, so one need not draw the picture again to compare it."""
    return hashlib.sha256(msgspec.json.encode((picture.title, picture.content))).hexdigest().encode()


def is_picture(data: bytes) -> bool:
    """Whether `draw` made this file: it has an identifier."""
    return re.search(rb"(<dc:identifier>|Identifier\0)[0-9a-f]{64}", data) is not None


def paint(picture: Picture, pixels: Any = ()) -> "Figure":
    """The picture as a figure of matplotlib, in the style that the caller has set."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, picture.height), layout="constrained")
    figure.suptitle(picture.title, x=0.01, horizontalalignment="left")
    picture.paint(figure, picture.content, pixels)
    return figure


def draw(picture: Picture) -> bytes | None:
    """The picture as SVG or PNG; None if its pixels or matplotlib are not available."""
    pixels = picture.load()
    if pixels is None or not _import_matplotlib():
        return None
    from matplotlib import style

    # On top of matplotlib's defaults, not of this machine's matplotlibrc.
    with style.context(STYLE, after_reset=True):
        figure = paint(picture, pixels)
        kind, out = picture.path.rpartition(".")[2], io.BytesIO()
        metadata = {"Identifier": identifier(picture).decode(), {"svg": "Date", "png": "Software"}[kind]: None}
        figure.savefig(out, format=kind, dpi=100, metadata=metadata)
    return out.getvalue()


@cache
def _import_matplotlib() -> bool:
    """Import matplotlib, without the settings of the environment if it refuses them. Warns if it cannot be imported."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns if it cannot write to HOME
    reason = ""
    for names in ((), SETTINGS):
        removed = {name: os.environ.pop(name) for name in names if name in os.environ}
        try:
            import matplotlib  # noqa: F401

            return True
        except Exception as error:  # a wrong setting can raise anything
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
                del sys.modules[name]  # half imported
        finally:
            os.environ.update(removed)
    log.warning(
        f"no picture can be drawn, since matplotlib cannot be imported ({reason}). Repair its installation or its "
        "settings (a file matplotlibrc), then `uv run main.py report` draws them"
    )
    return False


def short(label: str) -> str:
    """A label, without its middle if it is too long."""
    half = MAX_LABEL // 2
    return label if len(label) <= MAX_LABEL else f"{label[:half]}…{label[1 - half :]}"


def legend(figure: "Figure", ax: Any, columns: int = 2) -> None:
    """The legend of `ax`, below the whole picture."""
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=columns, frameon=False)


def label_ends(ax: Any, ends: Iterable[tuple[float, str, str]], inches: float) -> None:
    """Write the names of lines at their right ends, one below the other where they would overlap.

    Args:
        ends: for each line the height of its end, its name and its colour; all names have as many lines of text.
        inches: the height of the axes, about.
    """
    ends = sorted(ends, reverse=True)
    low, high = ax.get_ylim()
    text = 0.25 * (high - low) / inches * max((1 + name.count("\n") for _, name, _ in ends), default=0)
    places = list(itertools.accumulate((y for y, *_ in ends), lambda above, y: min(y, above - text)))
    shift = fmean(y - place for (y, *_), place in zip(ends, places, strict=True)) if ends else 0.0
    for (_, name, color), place in zip(ends, places, strict=True):
        corner, units = (1, place + shift), ax.get_yaxis_transform()
        ax.annotate(name, corner, (5, 0), units, "offset points", color=color, va="center", annotation_clip=False)


# Learning curves


# Each line with its statistic over the seeds, and the key in the history of a run.
LINES: dict[str, tuple[Callable[[list[float]], float], str]] = {
    f"{quantity}_{line}": (statistic, f"{split}_{quantity}")
    for quantity in ("accuracy", "loss")
    for line, statistic, split in (
        ("validation", fmean, "val"),
        ("low", min, "val"),
        ("high", max, "val"),
        ("train", fmean, "train"),
    )
}


class Curve(NamedTuple):
    label: str
    epochs: list[int]
    lines: dict[str, list[float]]  # NaN where a run has no number


EXPLAINED = "solid: validation, dotted: train while training"  # the lines of the curves


def curves(groups: list[Group]) -> Picture:
    """The curves of experiments; the best of too many."""
    shown = stats.ranked(groups)[:MAX_CURVES]
    title = EXPLAINED
    if any(len(group) > 1 for group in shown):
        title += "\nmeans over seeds; bands from least to greatest"
    if len(shown) < len(groups):
        title += f"\nthe best {MAX_CURVES} of {len(groups):,} experiments by validation"
    alt = f"Accuracy and loss of every epoch, on train and validation, of {', '.join(group.label for group in shown)}"
    return Picture(CURVES, title, [curve(group, MAX_POINTS) for group in shown], paint_curves, 8, alt)


def curve(group: Group, points: int) -> Curve:
    """At most `points` epochs, evenly spaced, with the first and the last."""
    histories = [record.history for record in group]
    last = len(histories[0]) - 1
    indices = sorted({round(i * last / (points - 1)) for i in range(points)})
    lines = {}
    for name, (statistic, key) in LINES.items():
        by_epoch = [[getattr(history[i], key) for history in histories] for i in indices]
        lines[name] = [math.nan if None in values else statistic(values) for values in by_epoch]
    return Curve(group.label, [histories[0][i].epoch for i in indices], lines)


def paint_curves(figure: "Figure", curves: list[Curve], _: Any) -> None:
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    axes = figure.subplots(2, 1)
    labels = {"accuracy": "accuracy (%)", "loss": "cross-entropy"}
    for ax, (quantity, label) in zip(axes, labels.items(), strict=True):
        factor, ends = 100 if quantity == "accuracy" else 1, list[tuple[float, str, str]]()
        for i, curve in enumerate(curves):
            names = ("validation", "low", "high", "train")
            validation, low, high, train = (factor * np.array(curve.lines[f"{quantity}_{name}"]) for name in names)
            color, marker = f"C{i}", "." if len(curve.epochs) == 1 else None
            ax.plot(curve.epochs, validation, color=color, marker=marker, linewidth=2)
            ax.plot(curve.epochs, train, color=color, linestyle=":", marker=marker, alpha=0.8)
            ax.fill_between(curve.epochs, low, high, color=color, alpha=0.15, linewidth=0)
            end = train[-1] if np.isnan(validation[-1]) else validation[-1]
            ends.append((end, short(curve.label), color))
        label_ends(ax, ends, figure.get_figheight() / 2 - 1)
        ax.set(xlabel="epoch", ylabel=label)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
        ax.grid(alpha=0.3)


# Intervals


def suite_path(suite: str) -> str:
    return f"checkpoints/suite-{suite}.svg"


def intervals(suite: str, groups: list[Group]) -> Picture:
    """The accuracies of the experiments of a suite, the best by validation first."""
    shown = stats.ranked(groups)[:MAX_BARS]
    title = f"{short(suite)}: accuracy with 95% intervals"
    if len(shown) < len(groups):
        title += f"\nthe best {MAX_BARS} of {len(groups):,} experiments by validation"
    labels = [group.label for group in shown]
    numbers = {
        split: [(stats.accuracy(group, split), *stats.mean_interval(group, split)) for group in shown]
        for split in ("validation", "test")
    }
    alt = f"Accuracy on validation and test with 95% intervals, from the best, {labels[0]}, to {labels[-1]}"
    height = 1.5 + 0.45 * len(labels)
    return Picture(suite_path(suite), title, (labels, numbers), _paint_intervals, height, alt)


def _paint_intervals(figure: "Figure", content: tuple[list[str], dict[str, list]], _: Any) -> None:
    import numpy as np

    labels, numbers = content
    ax = figure.subplots()
    for split, marker, color, shift in (("validation", "o", "C0", -0.14), ("test", "D", "C1", 0.14)):
        means, lows, highs = 100 * np.array(numbers[split]).T
        heights, errors = np.arange(len(labels)) + shift, [means - lows, highs - means]
        ax.errorbar(means, heights, xerr=errors, fmt=marker, color=color, label=split, markersize=6, linewidth=2)
    ax.set_yticks(range(len(labels)), [short(label) for label in labels])
    ax.set_ylim(len(labels) - 0.5, -0.5)  # the first is on top
    ax.grid(alpha=0.3, axis="x")
    ax.set_xlabel("accuracy (%)")
    legend(figure, ax)
