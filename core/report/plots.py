"""The picture of a report: the learning curves."""

import hashlib
import io
import logging
from collections.abc import Callable
from statistics import fmean
from typing import Any, NamedTuple

import msgspec

from core.report import stats

PICTURE = "checkpoints/learning-curves.svg"
CURVES = 10  # at most: matplotlib has ten colours
POINTS = 100  # of a curve, at most: more cannot be seen, and make a large file

STYLE: dict[str, Any] = {
    "svg.hashsalt": "cifar10-mlp",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
}


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


class Content(NamedTuple):
    """All that is drawn; equal contents give equal pictures."""

    title: str
    curves: list[Curve]


def content(groups: list[stats.Group]) -> Content:
    """What to draw of these groups: a curve of each, or of the best by validation where they are too many."""
    shown = groups if len(groups) <= CURVES else stats.ranked(groups)[:CURVES]
    title = "solid: validation · dotted: train, while training"
    if any(len(group) > 1 for group in shown):
        title += " · means over seeds, bands from least to greatest"
    if len(shown) < len(groups):
        title += f" · the best {CURVES} of {len(groups):,} by validation"
    return Content(title, [_curve(group) for group in shown])


def _curve(group: stats.Group) -> Curve:
    histories = [record.history for record in group]
    last = len(histories[0]) - 1
    indices = sorted({round(i * last / (POINTS - 1)) for i in range(POINTS)})  # evenly spaced, with both ends

    def lines(quantity: str, factor: int) -> Lines:
        def over_seeds(statistic: Callable[[list[float]], float], key: str) -> list[float]:
            return [factor * statistic([getattr(history[i], key) for history in histories]) for i in indices]

        val, train = f"val_{quantity}", f"train_{quantity}"
        return Lines(over_seeds(fmean, val), over_seeds(min, val), over_seeds(max, val), over_seeds(fmean, train))

    epochs = [histories[0][i].epoch for i in indices]
    return Curve(group[0].name, epochs, lines("accuracy", 100), lines("loss", 1))


def identifier(content: Content) -> str:
    """The hash of what is drawn. A picture carries it, so that it need not be drawn again to compare it."""
    return hashlib.sha256(msgspec.json.encode(content)).hexdigest()


def draw(content: Content) -> bytes:
    """The picture as SVG; equal contents give equal bytes."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns where it cannot write to HOME
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # From matplotlib's own defaults: a matplotlibrc on this machine changes no byte, and the background is white.
    with style.context(STYLE, after_reset=True):
        figure = Figure(figsize=(10, 4), layout="constrained")
        axes = figure.subplots(1, 2)
        for ax, quantity, label in zip(axes, ("accuracy", "loss"), ("accuracy (%)", "cross-entropy"), strict=True):
            for curve in content.curves:
                lines: Lines = getattr(curve, quantity)
                marker = "." if len(curve.epochs) == 1 else None
                (drawn,) = ax.plot(curve.epochs, lines.validation, label=curve.label, marker=marker)
                color = drawn.get_color()
                ax.plot(curve.epochs, lines.train, color=color, linestyle=":", alpha=0.7)
                if lines.low != lines.high:
                    ax.fill_between(curve.epochs, lines.low, lines.high, color=color, alpha=0.1, linewidth=0)
            ax.set(xlabel="epoch", ylabel=label)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
            ax.grid(alpha=0.3)
        figure.suptitle(content.title, fontsize=9, x=0.01, horizontalalignment="left")
        if content.curves:
            axes[1].legend(fontsize=8)
        out = io.BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Identifier": identifier(content)})
    return out.getvalue()
