"""The runs that train on all images, beside published fully connected networks: accuracy, time and arithmetic."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from core.report import plots, stats
from core.report.stats import Group
from core.runs.record import Finished
from core.spec import Spec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURE = "checkpoints/best-by-time.svg"
TIME = "checkpoints/accuracy-against-time.svg"
TICKS = {1: "1 s", 10: "10 s", 60: "1 min", 600: "10 min", 3600: "1 h", 36_000: "10 h"}


class Published(NamedTuple):
    """A fully connected network on CIFAR-10 in a paper. None: the paper does not give it, or there was pre-training."""

    network: str
    accuracy: float  # on test, in percent
    parameters: int | None
    epochs: int | None
    source: str

    @property
    def petaflop(self) -> float:
        """0 if it is unknown."""
        return petaflop(self.parameters, 50_000 * self.epochs) if self.parameters and self.epochs else 0.0


LIN = "[Lin, Memisevic and Konda 2015](https://arxiv.org/abs/1511.02580)"
NEYSHABUR = "[Neyshabur 2020](https://arxiv.org/abs/2007.13657)"
PUBLISHED = [
    Published("linear bottlenecks, no augmentation", 69.62, None, None, LIN),
    Published("3-FC, SGD", 75.12, None, 4000, NEYSHABUR),
    Published("linear bottlenecks, pre-trained, deformations", 78.62, None, None, LIN),
    Published("S-FC, SGD", 78.63, 256_000_000, 4000, NEYSHABUR),
    Published("S-FC, beta-lasso", 85.19, 256_000_000, 4000, NEYSHABUR),
]


def petaflop(parameters: int, examples: float, products: int = 0) -> float:
    """10**15 operations of training: for each example and parameter two forward and four backward (Kaplan et al. 2020),
    and the products of each image with so many vectors, which whiten it."""
    return (6 * parameters + 2 * 3072 * products) * examples / 1e15


def whitened(spec: Spec) -> int:
    """The number of products with vectors that whiten an image: for local layers, there and back."""
    return spec["whiten"] * (2 if spec["locality"] else 1)


def work(record: Finished) -> float:
    """The petaFLOP of a run."""
    return petaflop(record.parameters, record.spec["epochs"] * record.metrics.train.n, whitened(record.spec))


def flipped(group: Group) -> list[float]:
    """The test accuracies with mirror images averaged in, of the runs that were evaluated with them."""
    return [record.flipped.test.accuracy for record in group if record.flipped]


def shifted(group: Group) -> list[float]:
    """The test accuracies with nine shifts and their mirror images averaged in, of the runs that have them."""
    return [record.shifted.accuracy for record in group if record.shifted]


def recipe(group: Group) -> str:
    """Its name; of networks with a local prior, "minute (local)"."""
    return f"{group.label} (local)" if group[0].spec["locality"] else group.label


# Tables


def _evaluated(group: Group, accuracies: list[float], bold: str = "") -> str:
    """Mean and deviation, with the number of runs if not all of them have such an accuracy."""
    if not accuracies:
        return "not evaluated"
    n = f" (n = {len(accuracies)})" if len(accuracies) < len(group) else ""
    return f"{bold}{stats.spread(accuracies)}{bold}{n}"


SHIFTED = "test, with shifts and mirror images"
RUNS: dict[str, Callable[[Group], str]] = {
    "recipe": recipe,
    "n": lambda g: str(len(g)),
    "test": lambda g: stats.spread(stats.accuracies(g, "test")),
    "test, with mirror images": lambda g: _evaluated(g, flipped(g), "**"),
    SHIFTED: lambda g: _evaluated(g, shifted(g)),
    "parameters": lambda g: f"{g[0].parameters:,}",
    "epochs": lambda g: str(g[0].spec["epochs"]),
    "training": lambda g: f"{stats.training(g):.0f} s",
    # The longest time to a first step is that of the run that compiled, if one did.
    "with compilation": lambda g: f"{stats.training(g) + max(r.first_step_seconds for r in stats.timed(g)):.0f} s",
    "petaFLOP": lambda g: f"{work(g[0]):.3g}",
    "on": stats.where,
}
PAPERS: dict[str, Callable[[Published], str]] = {
    "network": lambda p: p.network,
    "test": lambda p: f"{p.accuracy:.2f}%",
    "parameters": lambda p: f"{p.parameters:,}" if p.parameters else "",
    "epochs": lambda p: f"{p.epochs:,}" if p.epochs else "",
    "petaFLOP": lambda p: f"{p.petaflop:.3g}" if p.petaflop else "",
    "source": lambda p: p.source,
}


def columns(groups: list[Group]) -> dict[str, Callable[[Group], str]]:
    """RUNS; without SHIFTED where no run was evaluated in that way."""
    return {head: cell for head, cell in RUNS.items() if head != SHIFTED or any(map(shifted, groups))}


# The pictures


class Point(NamedTuple):
    label: str
    cost: float  # in petaFLOP, 0 if it is unknown; or in seconds
    accuracy: float  # in percent


def against_time(groups: Iterable[Group]) -> plots.Picture:
    """Accuracy on test against time, with a colour for each machine; of very many groups, the most accurate."""
    best = sorted(groups, key=lambda group: -stats.accuracy(group, "test"))[: plots.MAX_BARS]
    by_machine: dict[str, list[Point]] = defaultdict(list)
    for group in sorted(best, key=stats.training):
        seconds, accuracy = stats.training(group), 100 * stats.accuracy(group, "test")
        point = Point(f"{plots.short(recipe(group))} {accuracy:.1f}%", round(seconds, 3), round(accuracy, 3))
        by_machine[stats.where(group)].append(point)
    numbers = (
        f"{name}: {', '.join(f'{p.label} after {p.cost:.0f} s' for p in points)}" for name, points in by_machine.items()
    )
    alt = f"Test accuracy against seconds of training. {'; '.join(numbers)}"
    title = "test accuracy against training time,\nwithout compilation and without mirror images"
    return plots.Picture(TIME, title, by_machine, _paint_times, 5.4, alt)


def _paint_times(figure: "Figure", content: dict[str, list[Point]], _: Any) -> None:
    ax = figure.subplots()
    ax.set_xscale("log")
    for i, (name, points) in enumerate(content.items()):
        _scatter(ax, points, "osD^v"[i % 5], f"C{i}", name)
    ax.margins(0.18, 0.16)
    low, high = ax.get_xlim()
    if sum(low <= seconds <= high for seconds in TICKS) < 2:
        low = max((seconds for seconds in TICKS if seconds < low), default=low)
        high = min((seconds for seconds in TICKS if seconds > high), default=high)
        ax.set_xlim(low, high)
    ticks = {seconds: label for seconds, label in TICKS.items() if low <= seconds <= high}
    ax.set_xticks([*ticks], [*ticks.values()])
    ax.xaxis.set_minor_formatter("")
    ax.set(xlabel="training time", ylabel="test accuracy (%)")
    ax.grid(alpha=0.3)
    plots.legend(figure, ax, columns=1)
    _name(figure, ax, [p for points in content.values() for p in points])


# Where the name of a point may stand: to the right of it and above it, in points, and its alignment.
PLACES = (
    (0, 7, "center"),
    (0, -17, "center"),
    (-9, -4, "right"),
    (9, -4, "left"),
    (0, 22, "center"),
    (0, -32, "center"),
)


def _scatter(ax: Any, points: list[Point], marker: str, color: str, label: str) -> None:
    ax.plot([p.cost for p in points], [p.accuracy for p in points], marker, color=color, label=label)


def _name(figure: "Figure", ax: Any, points: list[Point]) -> None:
    """Write the name of each point beside it, and begin with the highest point. A name takes the first place that is
    inside the axes and covers no point and no other text; if there is none, the last place."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # the layout: names do not change it
    marks = ax.transData.transform([(p.cost, p.accuracy) for p in points])
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in marks]
    taken += [text.get_window_extent() for text in ax.texts]
    for p in sorted(points, key=lambda p: -p.accuracy):
        name = ax.annotate(p.label, (p.cost, p.accuracy), (0, 0), textcoords="offset points", in_layout=False)
        for right, above, side in PLACES:
            name.set(position=(right, above), ha=side)
            box = name.get_window_extent()
            is_inside = ax.bbox.containsx(box.x0) and ax.bbox.containsx(box.x1) and ax.bbox.containsy(box.y1)
            if is_inside and not box.count_overlaps(taken):
                break
        taken.append(box)


def picture(groups: list[Group]) -> plots.Picture:
    """Accuracy against arithmetic, with published results; of very many groups, the most accurate."""
    points = [
        Point(plots.short(recipe(group)), round(work(group[0]), 6), round(100 * fmean(accuracies), 3))
        for group in groups
        if (accuracies := flipped(group))
    ]
    best = sorted(points, key=lambda p: -p.accuracy)[: plots.MAX_BARS]
    ours = sorted(best, key=lambda p: p.cost)
    papers = [Point(p.network, p.petaflop, p.accuracy) for p in PUBLISHED]
    numbers = ", ".join(f"{p.label} {p.accuracy:.1f}% for {p.cost:.3g} petaFLOP" for p in ours)
    alt = f"Test accuracy against petaFLOP of training, with published fully connected networks: {numbers}"
    title = "test accuracy against arithmetic; dotted: papers\nthat do not say the arithmetic of all their training"
    return plots.Picture(PICTURE, title, (ours, papers), _paint, 6, alt)


def _paint(figure: "Figure", content: tuple[list[Point], list[Point]], _: Any) -> None:
    ours, papers = content
    ax = figure.subplots()
    known = [p for p in papers if p.cost]
    _scatter(ax, ours, "o", "C0", "here, with mirror images")
    _scatter(ax, known, "D", "C1", "published")
    for label, _cost, accuracy in (p for p in papers if not p.cost):
        ax.axhline(accuracy, color="C1", linestyle=":")
        corner, units = (0.99, accuracy), ax.get_yaxis_transform()
        ax.annotate(label, corner, (0, -13), units, "offset points", ha="right", fontsize=11)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.margins(0.16, 0.1)
    ax.set(xlabel="petaFLOP of training", ylabel="test accuracy (%)")
    ax.grid(alpha=0.3)
    plots.legend(figure, ax)
    _name(figure, ax, [*ours, *known])
