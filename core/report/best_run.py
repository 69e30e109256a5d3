"""The pictures of one experiment, the best: what it takes for what, its mistakes, its first layer."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from core.report import plots, stats
from core.runs.record import UNSET, Finished, Mistake

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONFUSION, MISTAKES, FILTERS = (
    f"checkpoints/best-{what}" for what in ("confusion.svg", "mistakes.png", "first-layer.png")
)
SHOWN, COLUMNS = 12, 4  # mistakes, and how many of them in a row
UNITS = 8  # rows and columns of a contact sheet
LEVELS = 15  # of a colour in a contact sheet: more cannot be seen, and make a large file


class Confusion(NamedTuple):
    """In percent of the images of each class (a row), how many are taken for each class (a column)."""

    title: str
    classes: Sequence[str]
    percent: list[list[float]]


def confusion(group: stats.Group, classes: Sequence[str]) -> plots.Picture | None:
    """The confusion matrix of an experiment on test, over all its seeds that have one."""
    found = [record.answers.confusion for record in group if record.answers is not UNSET]
    if not found:
        return None
    counts = [[sum(matrix[i][j] for matrix in found) for j in range(10)] for i in range(10)]
    percent = [[100 * count / max(1, sum(row)) for count in row] for row in counts]
    worst = max((percent[i][j], i, j) for i in range(10) for j in range(10) if i != j)
    seeds = f", mean of {len(found)} seeds" if len(found) > 1 else ""
    title = f"{plots.short(group.label)}{seeds}: of 100 test images of a\nclass, how many are taken for each class"
    content = Confusion(title, classes, percent)
    alt = (
        f"Confusion matrix of {group.label} on test. The most frequent mistake: {worst[0]:.0f}% of class "
        f"{classes[worst[1]]} are taken for {classes[worst[2]]}"
    )
    return plots.Picture(CONFUSION, alt, content, _paint_confusion, 6.6)


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
    plots.heading(figure, content.title)


def confusion_rows(content: Confusion) -> Iterable[list[str]]:
    """The numbers of the picture, a line for each class."""
    for name, row in zip(content.classes, content.percent, strict=True):
        yield [name, *(f"{value:.1f}" for value in row)]


class Mistakes(NamedTuple):
    title: str
    classes: Sequence[str]
    mistakes: list[Mistake]


def mistakes(record: Finished, classes: Sequence[str], load_images: Callable[[list[int]], Any]) -> plots.Picture | None:
    """The test images that a run gets most confidently wrong.

    Args:
        load_images: from indices of the test split to images, uint8 [n, 3072]; None where the data is not there.
    """
    if record.answers is UNSET or not record.answers.mistakes:
        return None
    found = record.answers.mistakes[:SHOWN]
    title = (
        f"{plots.short(record.name)}, seed {record.seed}: what the image shows,\nthen the answer and its probability"
    )
    alt = f"The {len(found)} test images that {record.name} gets most confidently wrong; the table below names them"
    rows = math.ceil(len(found) / COLUMNS)
    return plots.Picture(
        MISTAKES,
        alt,
        Mistakes(title, classes, found),
        _paint_mistakes,
        0.7 + 2.05 * rows,
        lambda: load_images([mistake.index for mistake in found]),
    )


def _paint_mistakes(figure: "Figure", content: Mistakes, images: Any) -> None:
    rows = math.ceil(len(content.mistakes) / COLUMNS)
    axes = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for ax in axes:
        ax.axis("off")
    for ax, mistake, image in zip(axes, content.mistakes, images, strict=False):
        ax.imshow(image.reshape(3, 32, 32).transpose(1, 2, 0))
        said = content.classes[mistake.predicted]
        ax.set_title(
            f"{content.classes[mistake.label]}\n{said} {100 * mistake.probability:.0f}%", fontsize=12, loc="center"
        )
    plots.heading(figure, content.title)


class Filters(NamedTuple):
    title: str
    digest: str  # of the weights


def filters(record: Finished, load_weights: Callable[[], Any]) -> plots.Picture:
    """The weights of the first layer of a run as images: of the units with the largest norms.

    Args:
        load_weights: the first layer's weights, float [units, 3072]; None where they are not there.
    """
    title = f"{plots.short(record.name)}, seed {record.seed}: what units of the first layer\nrespond to (grey: nothing)"
    alt = f"The weights of the first layer of {record.name} as small colour images, a unit each"
    return plots.Picture(FILTERS, alt, Filters(title, record.digest), _paint_filters, plots.WIDTH + 0.7, load_weights)


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
    plots.heading(figure, content.title)
