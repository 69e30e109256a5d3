"""The pictures of a report. Each is as wide as a phone can show: one column, few elements, large letters."""

import hashlib
import io
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from core.report import sheet, stats
from core.runs.record import UNSET, Finished, Mistake

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVES, CURVES_TABLE = "checkpoints/learning-curves.svg", "checkpoints/learning-curves.csv"
CONFUSION, MISTAKES, FILTERS = (
    f"checkpoints/best-{what}" for what in ("confusion.svg", "mistakes.png", "first-layer.png")
)
SHOWN = 6  # curves, at most: more lie on one another
POINTS = 100  # of a curve, at most: more cannot be seen, and make a large file
BARS = 20  # rows of a picture of intervals, at most
LABEL = 26  # letters of a label, at most
UNITS = 8  # rows and columns of a contact sheet
WIDTH = 6.4  # inches
LEVELS = 15  # of a colour in a contact sheet: more cannot be seen, and make a large file

STYLE: dict[str, Any] = {
    "svg.hashsalt": "cifar10-mlp",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 13,
    "axes.titlelocation": "left",
    "figure.titlesize": 13,
    "font.size": 13,
    "legend.fontsize": 12,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
}


class Picture(NamedTuple):
    """A picture, before it is drawn.

    Attributes:
        path: under the folder of the report; the suffix is the format.
        alt: what it shows, in words.
        content: all that decides what is drawn; equal contents give equal pictures.
        paint: draws the content on an empty figure; it takes the figure, the content and what `load` returns.
        height: in inches.
        load: reads the pixels that the content only names; None where they are not there.
    """

    path: str
    alt: str
    content: Any
    paint: Callable[["Figure", Any, Any], None]
    height: float
    load: Callable[[], Any] = lambda: ()


def identifier(picture: Picture) -> bytes:
    """The hash of what is drawn. A picture carries it, so that it need not be drawn again to compare it."""
    return hashlib.sha256(msgspec.json.encode(picture.content)).hexdigest().encode()


def draw(picture: Picture) -> bytes | None:
    """The picture as SVG or PNG, equal bytes for equal contents; None where what it shows is not there."""
    loaded = picture.load()
    if loaded is None:
        return None
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns where it cannot write to HOME
    from matplotlib import style
    from matplotlib.figure import Figure

    # From matplotlib's own defaults: a matplotlibrc on this machine changes no byte, and the background is white.
    with style.context(STYLE, after_reset=True):
        figure = Figure(figsize=(WIDTH, picture.height), layout="constrained")
        picture.paint(figure, picture.content, loaded)
        kind, out = picture.path.rpartition(".")[2], io.BytesIO()
        metadata = {"Identifier": identifier(picture).decode(), {"svg": "Date", "png": "Software"}[kind]: None}
        figure.savefig(out, format=kind, dpi=100, metadata=metadata)
    return out.getvalue()


def short(label: str) -> str:
    """A label without its middle where it is too long."""
    half = LABEL // 2
    return label if len(label) <= LABEL else f"{label[:half]}…{label[1 - half :]}"


def _whole_numbers(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))


# Learning curves


class Lines(NamedTuple):
    """One quantity of a group of runs, for each epoch: its means over the seeds, and the range of validation."""

    validation: list[float]
    low: list[float]
    high: list[float]
    train: list[float]


class Curve(NamedTuple):
    """What is drawn of a group of runs."""

    label: str
    epochs: list[int]
    accuracy: Lines
    loss: Lines


class Curves(NamedTuple):
    title: str
    curves: list[Curve]


def curves(groups: list[stats.Group]) -> Picture:
    """A curve of each group, or of the best by validation where they are too many."""
    shown = stats.ranked(groups)[:SHOWN]
    title = "solid: validation, dotted: train while training"
    if any(len(group) > 1 for group in shown):
        title += "\nmeans over seeds; bands from least to greatest"
    if len(shown) < len(groups):
        title += f"\nthe best {SHOWN} of {len(groups):,} experiments by validation"
    content = Curves(title, [_curve(group) for group in shown])
    alt = f"Accuracy and loss of every epoch, on train and validation, of {', '.join(c.label for c in content.curves)}"
    return Picture(CURVES, alt, content, _paint_curves, 8)


def _curve(group: stats.Group) -> Curve:
    histories = [record.history for record in group]
    last = len(histories[0]) - 1
    indices = sorted({round(i * last / (POINTS - 1)) for i in range(POINTS)})  # evenly spaced, with both ends

    def lines(quantity: str) -> Lines:
        def over_seeds(statistic: Callable[[list[float]], float], key: str) -> list[float]:
            return [statistic([getattr(history[i], key) for history in histories]) for i in indices]

        val, train = f"val_{quantity}", f"train_{quantity}"
        return Lines(over_seeds(fmean, val), over_seeds(min, val), over_seeds(max, val), over_seeds(fmean, train))

    return Curve(group.label, [histories[0][i].epoch for i in indices], lines("accuracy"), lines("loss"))


def curves_as_table(content: Curves) -> str:
    """Every number of the picture, as CSV."""
    whats = [f"{quantity}_{what}" for quantity in ("accuracy", "loss") for what in Lines._fields]
    rows = (
        (curve.label, *numbers)
        for curve in content.curves
        for numbers in zip(curve.epochs, *curve.accuracy, *curve.loss, strict=True)
    )
    return sheet.write(("experiment", "epoch", *whats), rows)


def _paint_curves(figure: "Figure", content: Curves, _: Any) -> None:
    axes = figure.subplots(2, 1)
    for ax, quantity, label in zip(axes, ("accuracy", "loss"), ("accuracy (%)", "cross-entropy"), strict=True):
        factor = 100 if quantity == "accuracy" else 1
        for curve in content.curves:
            lines = Lines(*([factor * value for value in line] for line in getattr(curve, quantity)))
            marker = "." if len(curve.epochs) == 1 else None
            (drawn,) = ax.plot(curve.epochs, lines.validation, label=short(curve.label), marker=marker, linewidth=2)
            color = drawn.get_color()
            ax.plot(curve.epochs, lines.train, color=color, linestyle=":", alpha=0.8)
            if lines.low != lines.high:
                ax.fill_between(curve.epochs, lines.low, lines.high, color=color, alpha=0.15, linewidth=0)
        ax.set(xlabel="epoch", ylabel=label)
        _whole_numbers(ax.xaxis)
        ax.grid(alpha=0.3)
    axes[0].set_title(content.title)
    if content.curves:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)


# Intervals


class Bar(NamedTuple):
    """An experiment; mean and both ends of its interval, in percent, of both splits."""

    label: str
    validation: tuple[float, float, float]
    test: tuple[float, float, float]


class Intervals(NamedTuple):
    title: str
    bars: list[Bar]


def intervals(suite: str, groups: list[stats.Group]) -> Picture:
    """The accuracies of the experiments of a suite, the best by validation first."""
    shown = stats.ranked(groups)[:BARS]
    title = f"{short(suite)}: accuracy with 95% intervals"
    if len(shown) < len(groups):
        title += f"\nthe best {BARS} of {len(groups):,} experiments by validation"

    def of(group: stats.Group, split: str) -> tuple[float, float, float]:
        mean, (low, high) = stats.accuracy(group, split), stats.mean_interval(group, split)
        return 100 * mean, 100 * low, 100 * high

    bars = [Bar(group.label, of(group, "validation"), of(group, "test")) for group in shown]
    alt = f"Accuracy on validation and test with 95% intervals, from the best, {bars[0].label}, to {bars[-1].label}"
    height = 1.5 + 0.45 * len(bars)
    return Picture(f"checkpoints/suite-{suite}.svg", alt, Intervals(title, bars), _paint_intervals, height)


def _paint_intervals(figure: "Figure", content: Intervals, _: Any) -> None:
    ax = figure.subplots()
    styles = {"validation": ("o", "C0", -0.14), "test": ("D", "C1", 0.14)}
    for split, (marker, color, shift) in styles.items():
        points = [getattr(bar, split) for bar in content.bars]
        means = [mean for mean, _, _ in points]
        errors = [[mean - low for mean, low, _ in points], [high - mean for mean, _, high in points]]
        places = [i + shift for i in range(len(points))]
        ax.errorbar(means, places, xerr=errors, fmt=marker, color=color, label=split, markersize=6, linewidth=2)
    ax.set_yticks(range(len(content.bars)), [short(bar.label) for bar in content.bars])
    ax.set_ylim(len(content.bars) - 0.5, -0.5)  # the first is on top
    ax.grid(alpha=0.3, axis="x")
    ax.set_xlabel("accuracy (%)")
    figure.suptitle(content.title, x=0.01, horizontalalignment="left")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)


# The best experiment


class Confusion(NamedTuple):
    """In percent of the images of each class (a row), how many are taken for each class (a column)."""

    title: str
    classes: Sequence[str]
    percent: list[list[float]]


def confusion(group: stats.Group, classes: Sequence[str]) -> Picture | None:
    """The confusion matrix of an experiment on test, over all its seeds that have one."""
    found = [record.answers.confusion for record in group if record.answers is not UNSET]
    if not found:
        return None
    counts = [[sum(matrix[i][j] for matrix in found) for j in range(10)] for i in range(10)]
    percent = [[100 * count / max(1, sum(row)) for count in row] for row in counts]
    worst = max((percent[i][j], i, j) for i in range(10) for j in range(10) if i != j)
    seeds = f", mean of {len(found)} seeds" if len(found) > 1 else ""
    title = f"{short(group.label)}{seeds}: of 100 test images of a\nclass, how many are taken for each class"
    content = Confusion(title, classes, percent)
    alt = (
        f"Confusion matrix of {group.label} on test. The most frequent mistake: {worst[0]:.0f}% of class "
        f"{classes[worst[1]]} are taken for {classes[worst[2]]}"
    )
    return Picture(CONFUSION, alt, content, _paint_confusion, 6.6)


def _paint_confusion(figure: "Figure", content: Confusion, _: Any) -> None:
    ax = figure.subplots()
    ax.imshow(content.percent, cmap="Blues", vmin=0, vmax=100)
    for i, row in enumerate(content.percent):
        for j, value in enumerate(row):
            color = "white" if value > 50 else "black" if value >= 0.5 else "lightgrey"
            ax.text(j, i, f"{value:.0f}", color=color, ha="center", va="center")
    ax.set_xticks(range(10), content.classes, rotation=90)
    ax.set_yticks(range(10), content.classes)
    ax.set(xlabel="taken for", ylabel="true class")
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    figure.suptitle(content.title, x=0.01, horizontalalignment="left")


class Mistakes(NamedTuple):
    title: str
    classes: Sequence[str]
    mistakes: list[Mistake]


def mistakes(record: Finished, classes: Sequence[str], load_images: Callable[[list[int]], Any]) -> Picture | None:
    """The test images that a run gets most confidently wrong.

    Args:
        load_images: from indices of the test split to images, uint8 [n, 3072]; None where the data is not there.
    """
    if record.answers is UNSET or not record.answers.mistakes:
        return None
    found = record.answers.mistakes[:12]
    title = f"{short(record.name)}, seed {record.seed}: what the image shows,\nthen the answer and its probability"
    alt = f"The {len(found)} test images that {record.name} gets most confidently wrong; the table below names them"
    rows = math.ceil(len(found) / 4)
    return Picture(
        MISTAKES,
        alt,
        Mistakes(title, classes, found),
        _paint_mistakes,
        0.7 + 2.05 * rows,
        lambda: load_images([mistake.index for mistake in found]),
    )


def _paint_mistakes(figure: "Figure", content: Mistakes, images: Any) -> None:
    rows = math.ceil(len(content.mistakes) / 4)
    axes = figure.subplots(rows, 4, squeeze=False).ravel()
    for ax in axes:
        ax.axis("off")
    for ax, mistake, image in zip(axes, content.mistakes, images, strict=False):
        ax.imshow(image.reshape(3, 32, 32).transpose(1, 2, 0))
        said = content.classes[mistake.predicted]
        ax.set_title(
            f"{content.classes[mistake.label]}\n{said} {100 * mistake.probability:.0f}%", fontsize=12, loc="center"
        )
    figure.suptitle(content.title, x=0.01, horizontalalignment="left")


class Filters(NamedTuple):
    title: str
    digest: str  # of the weights


def filters(record: Finished, load_weights: Callable[[], Any]) -> Picture:
    """The weights of the first layer of a run as images: those units that have the largest.

    Args:
        load_weights: the first layer's weights, float [units, 3072]; None where they are not there.
    """
    title = f"{short(record.name)}, seed {record.seed}: what units of the first layer\nrespond to (grey: nothing)"
    alt = f"The weights of the first layer of {record.name} as small colour images, a unit each"
    return Picture(FILTERS, alt, Filters(title, record.digest), _paint_filters, WIDTH + 0.7, load_weights)


def _paint_filters(figure: "Figure", content: Filters, weights: Any) -> None:
    import numpy as np

    norms = np.linalg.norm(weights, axis=1)
    largest = np.argsort(-norms, kind="stable")[: UNITS * UNITS]
    units = weights[largest] / np.maximum(np.abs(weights[largest]).max(1, keepdims=True), 1e-12)
    images = (np.round((units + 1) / 2 * LEVELS) / LEVELS).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    contact = np.ones((UNITS * 33, UNITS * 33, 3))
    for i, image in enumerate(images):
        y, x = 33 * (i // UNITS), 33 * (i % UNITS)
        contact[y : y + 32, x : x + 32] = image
    ax = figure.subplots()
    ax.axis("off")
    ax.imshow(contact, interpolation="nearest")
    figure.suptitle(content.title, x=0.01, horizontalalignment="left")


def confusion_rows(content: Confusion) -> Iterable[list[str]]:
    """The numbers of the picture, a line for each class."""
    for name, row in zip(content.classes, content.percent, strict=True):
        yield [name, *(f"{value:.1f}" for value in row)]
