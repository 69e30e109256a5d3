"""The pictures of the best experiment: its confusion matrix, its mistakes, its first layer."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from core.report import plots, text
from core.report.plots import Picture
from core.report.stats import Group
from core.runs.record import UNSET, Finished, Mistake

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONFUSION = "checkpoints/best-confusion.svg"
MISTAKES = "checkpoints/best-mistakes.png"
FILTERS = "checkpoints/best-first-layer.png"
LOCAL = "checkpoints/local-first-layer.png"
FIRST_LAYERS = {FILTERS: "best experiment", LOCAL: "an experiment with `locality`"}
MAX_MISTAKES, COLUMNS = 12, 4
MAX_CLASSES = 20  # of a confusion matrix that can be read
UNITS = 8  # rows and columns of the picture of the first layer
LEVELS = 15  # of a colour there: more cannot be seen, and make a large file


def confusion(group: Group, classes: Sequence[str]) -> Picture | None:
    """The confusion matrix of an experiment on test, over all seeds that have one, in percent of each true class."""
    matrices = [record.answers.confusion for record in group if record.answers is not UNSET]
    if not matrices or len(classes) > MAX_CLASSES:
        return None
    counts = [[sum(cell) for cell in zip(*rows, strict=True)] for rows in zip(*matrices, strict=True)]
    percent = [[100 * count / max(1, sum(row)) for count in row] for row in counts]
    worst, true, predicted = max((v, i, j) for i, row in enumerate(percent) for j, v in enumerate(row) if i != j)
    seeds = f", mean of {len(matrices)} seeds" if len(matrices) > 1 else ""
    title = f"{plots.short(group.label)}{seeds}: of 100 test images of a\nclass, how many are predicted as each class"
    alt = (
        f"Confusion matrix of {group.label} on test. The most frequent mistake: {worst:.0f}% of class "
        f"{classes[true]} are predicted as {classes[predicted]}"
    )
    rows = ([name, *(f"{value:.1f}" for value in row)] for name, row in zip(classes, percent, strict=True))
    summary = "The numbers: of 100 images of a class (row), how many are predicted as each class (column)"
    table = text.folded(summary, text.grid(("", *classes), rows))
    return Picture(CONFUSION, title, (classes, percent), _paint_confusion, 6.6, alt, table=table)


def _paint_confusion(figure: "Figure", content: tuple[Sequence[str], list[list[float]]], _: Any) -> None:
    classes, percent = content
    ax = figure.subplots()
    ax.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    for i, row in enumerate(percent):
        for j, value in enumerate(row):
            color = "white" if value > 50 else "black" if value >= 0.5 else "lightgrey"
            ax.text(j, i, f"{value:.0f}", color=color, ha="center", va="center")
    ax.set_xticks(range(len(classes)), classes, rotation=90)
    ax.set_yticks(range(len(classes)), classes)
    ax.set(xlabel="prediction", ylabel="true class")
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)


def mistakes(record: Finished, classes: Sequence[str], load_images: Callable[[list[int]], Any]) -> Picture | None:
    """The test images that a run gets most confidently wrong.

    Args:
        load_images: from indices of the test split to images, uint8 [n, 3072]; None if there are no data.
    """
    if record.answers is UNSET or not record.answers.mistakes:
        return None
    shown = record.answers.mistakes[:MAX_MISTAKES]
    title = f"{plots.short(record.name)}, seed {record.seed}: the true class,\nthen the prediction and its probability"
    alt = f"The {len(shown)} test images that {record.name} gets most confidently wrong; the table below names them"
    columns: dict[str, Callable[[Mistake], str]] = {
        "test image": lambda m: str(m.index),
        "true class": lambda m: classes[m.label],
        "prediction": lambda m: classes[m.predicted],
        "probability": lambda m: f"{100 * m.probability:.4f}%",
    }
    table = text.folded("The numbers", text.table(columns, shown))
    height = 0.7 + 2.05 * math.ceil(len(shown) / COLUMNS)
    load = partial(load_images, [mistake.index for mistake in shown])
    return Picture(MISTAKES, title, (classes, shown), _paint_mistakes, height, alt, load, table)


def _paint_mistakes(figure: "Figure", content: tuple[Sequence[str], list[Mistake]], images: Any) -> None:
    classes, mistakes = content
    axes = figure.subplots(math.ceil(len(mistakes) / COLUMNS), COLUMNS, squeeze=False).ravel()
    for ax in axes:
        ax.axis("off")
    for ax, mistake, image in zip(axes, mistakes, images, strict=False):
        ax.imshow(image.reshape(3, 32, 32).transpose(1, 2, 0))
        prediction = f"{classes[mistake.predicted]} {100 * mistake.probability:.0f}%"
        ax.set_title(f"{classes[mistake.label]}\n{prediction}", fontsize=12)


def filters(path: str, record: Finished, load_weights: Callable[[], Any]) -> Picture:
    """The weights of the first layer of a run as images: of the units with the largest norms.

    Args:
        path: FILTERS or LOCAL.
        load_weights: the weights of the first layer, float [units, 3072]; None if they are not available.
    """
    title = f"{plots.short(record.name)}, seed {record.seed}: what units of the first layer\nrespond to (grey: nothing)"
    alt = f"The weights of the first layer of {record.name} as small colour images, a unit each"
    return Picture(path, title, record.digest, _paint_filters, plots.WIDTH + 0.7, alt, load_weights)


def _paint_filters(figure: "Figure", _: str, weights: Any) -> None:
    import numpy as np

    largest = np.argsort(-np.linalg.norm(weights, axis=1), kind="stable")[: UNITS * UNITS]
    units = weights[largest] / np.maximum(np.abs(weights[largest]).max(1, keepdims=True), 1e-12)
    images = (np.round((units + 1) / 2 * LEVELS) / LEVELS).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    canvas = np.ones((UNITS * 33, UNITS * 33, 3))  # a white line between the images
    for i, image in enumerate(images):
        y, x = 33 * (i // UNITS), 33 * (i % UNITS)
        canvas[y : y + 32, x : x + 32] = image
    ax = figure.subplots()
    ax.axis("off")
    ax.imshow(canvas, interpolation="nearest")
