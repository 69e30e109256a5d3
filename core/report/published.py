"""The runs that train on all images, beside published fully connected networks: accuracy, time and arithmetic."""

from collections.abc import Callable
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from core.report import plots, stats
from core.report.stats import Group
from core.runs.record import Finished

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURE = "checkpoints/best-by-time.svg"


class Published(NamedTuple):
    """A fully connected network on CIFAR-10 in a paper. None: the paper does not say, or pre-trains, too."""

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


def petaflop(parameters: int, examples: float, whitened: int = 0) -> float:
    """10**15 operations of training: for each example and parameter two forward and four backward (Kaplan et al. 2020),
    and the projection of each image on `whitened` components."""
    return (6 * parameters + 2 * 3072 * whitened) * examples / 1e15


def work(record: Finished) -> float:
    """The petaFLOP of a run."""
    return petaflop(record.parameters, record.spec["epochs"] * record.metrics.train.n, record.spec["whiten"])


def flipped(group: Group) -> list[float]:
    """The test accuracies with mirror images averaged in, of the runs that were evaluated with them."""
    return [record.flipped.test.accuracy for record in group if record.flipped]


def shifted(group: Group) -> list[float]:
    """The test accuracies with nine shifts and their mirror images averaged in, of the runs that have them."""
    return [record.shifted.accuracy for record in group if record.shifted]


# Tables


def _training(group: Group) -> float:
    return fmean(map(stats.seconds, group))


def _machine(group: Group) -> str:
    where = group[0].environment
    return f"{where.device_name}, {where.threads} threads" if where.device == "cpu" else where.device_name


SHIFTED = "test, with shifts and mirror images"
RUNS: dict[str, Callable[[Group], str]] = {
    "recipe": lambda g: g.label,
    "n": lambda g: str(len(g)),
    "test": lambda g: stats.spread(stats.accuracies(g, "test")),
    "test, with mirror images": lambda g: f"**{stats.spread(flipped(g))}**" if flipped(g) else "not evaluated",
    SHIFTED: lambda g: stats.spread(shifted(g)) if shifted(g) else "not evaluated",
    "parameters": lambda g: f"{g[0].parameters:,}",
    "epochs": lambda g: str(g[0].spec["epochs"]),
    "training": lambda g: f"{_training(g):.0f} s",
    # The longest time to a first step is that of the run that compiled, if one did.
    "with compilation": lambda g: f"{_training(g) + max(r.first_step_seconds for r in g):.0f} s",
    "petaFLOP": lambda g: f"{work(g[0]):.3g}",
    "on": _machine,
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


# The picture


class Point(NamedTuple):
    label: str
    petaflop: float  # 0 if it is unknown
    accuracy: float  # in percent


def picture(groups: list[Group]) -> plots.Picture:
    """Accuracy against arithmetic, with published results; of very many groups, the most accurate."""
    points = [
        Point(group.label, round(work(group[0]), 6), round(100 * fmean(accuracies), 3))
        for group in groups
        if (accuracies := flipped(group))
    ]
    best = sorted(points, key=lambda p: -p.accuracy)[: plots.MAX_BARS]
    ours = sorted(best, key=lambda p: p.petaflop)
    papers = [Point(p.network, p.petaflop, p.accuracy) for p in PUBLISHED]
    numbers = ", ".join(f"{p.label} {p.accuracy:.1f}% for {p.petaflop:.3g} petaFLOP" for p in ours)
    alt = f"Test accuracy against petaFLOP of training, with published fully connected networks: {numbers}"
    title = "accuracy against arithmetic; dotted: without FLOP"
    return plots.Picture(PICTURE, title, (ours, papers), _paint, 6, alt)


def _paint(figure: "Figure", content: tuple[list[Point], list[Point]], _: Any) -> None:
    ours, papers = content
    ax = figure.subplots()
    for points, marker, color, label, side, step in (
        (ours, "o", "C0", "here, with mirror images", "center", 15),  # neighbours' labels at two heights
        ([p for p in papers if p.petaflop], "D", "C1", "published", "right", 0),
    ):
        ax.plot([p.petaflop for p in points], [p.accuracy for p in points], marker, color=color, label=label)
        for i, p in enumerate(points):
            offset = 0, 7 + step * (i % 2)
            ax.annotate(plots.short(p.label), (p.petaflop, p.accuracy), offset, textcoords="offset points", ha=side)
    for label, _petaflop, accuracy in (p for p in papers if not p.petaflop):
        ax.axhline(accuracy, color="C1", linestyle=":")
        corner, units = (0.99, accuracy), ax.get_yaxis_transform()
        ax.annotate(plots.short(label), corner, (0, -14), units, "offset points", ha="right")
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.margins(0.1)
    ax.set(xlabel="petaFLOP of training", ylabel="test accuracy (%)")
    ax.grid(alpha=0.3)
    plots.legend(figure, ax)
