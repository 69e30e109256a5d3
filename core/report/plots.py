"""What a picture is and how it is drawn, and the pictures that compare experiments. Each is as wide as a phone can
show: one column, few elements, large letters."""

import hashlib
import io
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Collection
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from core.errors import UserError
from core.report import sheet, stats

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVES, CURVES_TABLE = "checkpoints/learning-curves.svg", "checkpoints/learning-curves.csv"
SHOWN = 6  # curves, at most: more lie on one another
POINTS = 100  # of a curve, at most: more cannot be seen, and make a large file
ROWS = 50_000  # of the table of curves, about: curves have fewer points where there are very many
BARS = 20  # rows of a picture of intervals, at most
LABEL = 26  # letters of a label, at most
WIDTH = 6.4  # inches

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


# What matplotlib reads from the environment when it is imported. A notebook sets the first, for all processes that it
# starts, to a module that only the notebook's own environment has.
SETTINGS = ("MPLBACKEND", "MATPLOTLIBRC", "MPLCONFIGDIR")


class PictureError(UserError):
    """matplotlib cannot be imported, so that no picture can be drawn."""


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


def is_picture(data: bytes) -> bool:
    """Whether the content of a file is a picture that `draw` made: it has an identifier."""
    return re.search(rb"(<dc:identifier>|Identifier\0)[0-9a-f]{64}", data) is not None


def draw(picture: Picture) -> bytes | None:
    """The picture as SVG or PNG, equal bytes for equal contents; None where what it shows is not there.

    Raises:
        PictureError: matplotlib cannot be imported.
    """
    loaded = picture.load()
    if loaded is None:
        return None
    _import_matplotlib()
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


def _import_matplotlib() -> None:
    """Import matplotlib; without the settings of the environment where it refuses them, as no picture uses any."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns where it cannot write to HOME
    try:
        import matplotlib
    except Exception:  # whatever it raises for such a setting
        for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
            del sys.modules[name]  # the half that was imported
        refused = {name: os.environ.pop(name) for name in SETTINGS if name in os.environ}
        try:
            import matplotlib  # noqa: F401
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise PictureError(
                f"no picture can be drawn, since matplotlib cannot be imported ({type(error).__name__}: {reason}); "
                "mend its installation or its settings (a file matplotlibrc), then `uv run main.py report` draws them"
            ) from None
        finally:
            os.environ.update(refused)


def short(label: str) -> str:
    """A label without its middle where it is too long."""
    half = LABEL // 2
    return label if len(label) <= LABEL else f"{label[:half]}…{label[1 - half :]}"


def heading(figure: "Figure", text: str) -> None:
    """A title over the whole picture, from its left edge."""
    figure.suptitle(text, x=0.01, horizontalalignment="left")


def legend(figure: "Figure", ax: Any) -> None:
    """What the lines and points of `ax` are, below the whole picture."""
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)


def _whole_numbers(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))


# Learning curves


class Lines(NamedTuple):
    """One quantity of a group of runs, for each epoch: its means over the seeds, and the range of validation. A number
    that the runs do not have is NaN."""

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


def curves(groups: list[stats.Group], default: Collection[str] = ()) -> Picture:
    """The curves of the experiments with the names `default`; of all where none of these is there. The best by
    validation where they are too many."""
    groups = [group for group in groups if group[0].name in default] or groups
    shown = stats.ranked(groups)[:SHOWN]
    title = "solid: validation, dotted: train while training"
    if any(len(group) > 1 for group in shown):
        title += "\nmeans over seeds; bands from least to greatest"
    if len(shown) < len(groups):
        title += f"\nthe best {SHOWN} of {len(groups):,} experiments by validation"
    content = Curves(title, [_curve(group, POINTS) for group in shown])
    alt = f"Accuracy and loss of every epoch, on train and validation, of {', '.join(c.label for c in content.curves)}"
    return Picture(CURVES, alt, content, _paint_curves, 8)


def _curve(group: stats.Group, points: int) -> Curve:
    histories = [record.history for record in group]
    last = len(histories[0]) - 1
    indices = sorted({round(i * last / (points - 1)) for i in range(points)})  # evenly spaced, with both ends

    def lines(quantity: str) -> Lines:
        def over_seeds(statistic: Callable[[list[float]], float], key: str) -> list[float]:
            found = [[getattr(history[i], key) for history in histories] for i in indices]
            return [math.nan if None in values else statistic(values) for values in found]

        val, train = f"val_{quantity}", f"train_{quantity}"
        return Lines(over_seeds(fmean, val), over_seeds(min, val), over_seeds(max, val), over_seeds(fmean, train))

    return Curve(group.label, [histories[0][i].epoch for i in indices], lines("accuracy"), lines("loss"))


def points(groups: int) -> int:
    """How many epochs of each of so many groups are in the table of curves, at most."""
    return max(2, min(POINTS, ROWS // max(1, groups)))


def curves_as_table(groups: list[stats.Group]) -> str:
    """The curves of all groups as CSV: of each `points` epochs, evenly spaced, with the first and the last. `epochs` is
    how many there were. A number that the runs do not have is an empty cell."""
    whats = [f"{quantity}_{what}" for quantity in ("accuracy", "loss") for what in Lines._fields]
    drawn = ((group, _curve(group, points(len(groups)))) for group in groups)
    rows = (
        (curve.label, epoch, len(group[0].history), *("" if math.isnan(x) else round(x, 6) for x in numbers))
        for group, curve in drawn
        for epoch, *numbers in zip(curve.epochs, *curve.accuracy, *curve.loss, strict=True)
    )
    return sheet.write(("experiment", "epoch", "epochs", *whats), rows)


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
        legend(figure, axes[0])


# Intervals


class Bar(NamedTuple):
    """An experiment; mean and both ends of its interval, in percent, of both splits."""

    label: str
    validation: tuple[float, float, float]
    test: tuple[float, float, float]


class Intervals(NamedTuple):
    title: str
    bars: list[Bar]


def suite_path(suite: str) -> str:
    return f"checkpoints/suite-{suite}.svg"


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
    return Picture(suite_path(suite), alt, Intervals(title, bars), _paint_intervals, height)


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
    heading(figure, content.title)
    legend(figure, ax)
