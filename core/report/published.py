"""The runs that train on all images, beside published fully connected networks: accuracy, time and arithmetic."""

from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from core.report import plots, stats
from core.report.plots import Picture
from core.report.stats import Group
from core.runs.record import Finished

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURE = "checkpoints/records.svg"


class Published(NamedTuple):
    """What a paper reports of a fully connected network on CIFAR-10.

    Attributes:
        accuracy: on test, in percent.
        parameters, epochs: None where the paper does not say, or pre-trains too.
    """

    network: str
    accuracy: float
    parameters: int | None
    epochs: int | None
    source: str

    @property
    def petaflop(self) -> float | None:
        """Computed as for the runs here; None where the paper does not say enough."""
        return petaflop(self.parameters, 50_000 * self.epochs) if self.parameters and self.epochs else None


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
    """The test accuracies with mirror images averaged in, of the runs that have been evaluated so."""
    return [record.flipped.test.accuracy for record in group if record.flipped]


def seconds(group: Group) -> tuple[float, float]:
    """The mean time of all steps of a run; and with the longest time to a first step, which is that of the run that
    compiled, if any did."""
    training = fmean(map(stats.seconds, group))
    return training, training + max(record.first_step_seconds for record in group)


def _machine(record: Finished) -> str:
    where = record.environment
    return where.device_name + f", {where.threads} threads" * (where.device == "cpu")


HEADINGS = (
    "recipe",
    "n",
    "test",
    "test, with mirror images",
    "parameters",
    "epochs",
    "training",
    "with compilation",
    "petaFLOP",
    "on",
)


def row(group: Group) -> list[str]:
    """The cells under HEADINGS."""
    record, mirrored = group[0], flipped(group)
    return [
        group.label,
        str(len(group)),
        stats.spread(stats.accuracies(group, "test")),
        f"**{stats.spread(mirrored)}**" if mirrored else "not evaluated",
        f"{record.parameters:,}",
        str(record.spec["epochs"]),
        *(f"{value:.0f} s" for value in seconds(group)),
        f"{work(record):.3g}",
        "; ".join(sorted({_machine(record) for record in group})),
    ]


def rows() -> list[list[str]]:
    """network, test, parameters, epochs, petaFLOP, source."""
    return [
        [
            p.network,
            f"{p.accuracy:.2f}%",
            f"{p.parameters:,}" if p.parameters else "",
            f"{p.epochs:,}" if p.epochs else "",
            f"{p.petaflop:.3g}" if p.petaflop else "",
            p.source,
        ]
        for p in PUBLISHED
    ]


# The picture


class Point(NamedTuple):
    """A network: its accuracy in percent."""

    label: str
    petaflop: float
    accuracy: float


class Points(NamedTuple):
    """`lines` are published accuracies, in percent, for which no arithmetic is known."""

    ours: list[Point]
    published: list[Point]
    lines: list[tuple[str, float]]


def picture(groups: list[Group]) -> Picture:
    """Accuracy against arithmetic, with published results: of very many groups, the most accurate."""
    ours = [
        Point(group.label, round(work(group[0]), 6), round(100 * fmean(flipped(group)), 3))
        for group in groups
        if flipped(group)
    ]
    best = sorted(ours, key=lambda p: -p.accuracy)[: plots.BARS]
    ours = sorted(best, key=lambda p: p.petaflop)
    published = [Point(p.network, p.petaflop, p.accuracy) for p in PUBLISHED if p.petaflop]
    lines = [(p.network, p.accuracy) for p in PUBLISHED if not p.petaflop]
    told = ", ".join(f"{p.label} {p.accuracy:.1f}% for {p.petaflop:.3g} petaFLOP" for p in ours)
    alt = f"Test accuracy against petaFLOP of training, with published fully connected networks: {told}"
    return Picture(PICTURE, alt, Points(ours, published, lines), _paint, 6)


def _paint(figure: "Figure", content: Points, _: Any) -> None:
    ax = figure.subplots()
    for points, marker, color, label, side, step in (
        (content.ours, "o", "C0", "here, with mirror images", "center", 15),  # neighbours' labels at two heights
        (content.published, "D", "C1", "published", "right", 0),
    ):
        ax.plot([p.petaflop for p in points], [p.accuracy for p in points], marker, color=color, label=label)
        for i, p in enumerate(points):
            place, above = (p.petaflop, p.accuracy), (0, 7 + step * (i % 2))
            ax.annotate(plots.short(p.label), place, above, textcoords="offset points", ha=side)
    for label, accuracy in content.lines:
        ax.axhline(accuracy, color="C1", linestyle=":")
        ax.annotate(
            plots.short(label), (0.99, accuracy), (0, -14), ax.get_yaxis_transform(), "offset points", ha="right"
        )
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.margins(0.1)
    ax.set(xlabel="petaFLOP of training", ylabel="test accuracy (%)")
    ax.grid(alpha=0.3)
    ax.set_title("accuracy against arithmetic; dotted: without FLOP")
    plots.legend(figure, ax)
