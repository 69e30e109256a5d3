"""What results.md says of experiments beside each other: the choice of the learning rate, the worth of each change,
the baseline."""

from collections import defaultdict
from typing import NamedTuple

from core.report import stats, text
from core.report.catalog import Catalog
from core.report.stats import Group
from core.spec import FIELDS, Spec, canonical

SETS = 5  # of experiments that are compared, at most
VERDICTS = {"helped": "Helped", "hurt": "Hurt", "unclear": "Not significant"}
BASELINE = "baseline"  # the experiment that the networks with batch norm are compared with


def _points(difference: stats.Difference) -> str:
    return f"{100 * difference.mean:+.2f} ± {100 * difference.half:.2f}"


def _compared(a: str, b: str, difference: stats.Difference, more: bool = False) -> str:
    """The sentence for a comparison, without its full stop; with `more`, also what it takes to tell two apart."""
    if difference.mean < 0:
        a, b, difference = b, a, difference._replace(mean=-difference.mean)
    how = f"{text.seeds(difference.seeds)}, paired" if difference.paired else "sampling error"
    points = f"{100 * difference.mean:.2f} ± {100 * difference.half:.2f} points ({how})"
    if difference.significant:
        return f"{a} beats {b} by {points}"
    return f"{a} and {b} cannot be told apart: {points}{_more_seeds(difference) * more}"


def _more_seeds(difference: stats.Difference) -> str:
    """What it takes to find a difference that is worth finding."""
    if not difference.paired:
        return ""
    more = stats.needed(difference.deviation) - difference.seeds
    worth = f"a difference of {100 * stats.DIFFERENCE:g} points"
    if more <= 0:
        return f"; {worth} would most likely have been seen"
    return f"; about {more:,} more seed{'s' * (more > 1)} would be needed to see {worth}"


UNPAIRED = (
    "Fewer than two seeds of both cannot be paired: there the range is the sampling error of two accuracies as if each "
    "had been measured on other images. `--seeds 5` tells more."
)


def _images(a: Group, b: Group) -> str:
    """The sentence for a comparison image by image; nothing where the records do not say which images were right."""
    found = stats.image_by_image(a, b)
    if found is None:
        return ""
    p = "p < 0.0001" if found.p < 1e-4 else f"p = {found.p:.2g}"
    return (
        f" Image by image, {a.label} alone is right on {found.first:,} of {found.n:,} and {b.label} alone on "
        f"{found.second:,} (the networks of seed {found.seed}; exact McNemar test: {p})."
    )


def choices(groups: list[Group]) -> list[str]:
    """What is to be said of each set of groups that differ in the learning rate alone, the best set first."""
    sets: dict[str, dict[float, Group]] = defaultdict(dict)
    for group in groups:
        spec = group[0].spec
        # One spec may have run under two names.
        sets[canonical({**spec, "seed": 0, "lr": 0})].setdefault(spec["lr"], group)
    rivals = sorted(
        (stats.ranked(found.values()) for found in sets.values() if len(found) > 1),
        key=lambda ranking: -stats.accuracy(ranking[0], "validation"),
    )
    return text.first(
        [_choice(ranking) for ranking in rivals], "The same was asked of {} more sets of learning rates.\n", SETS
    )


def _choice(ranking: list[Group]) -> str:
    best, others = ranking[0], ranking[1:]
    shown = others[: text.LINES]
    validation = [stats.compare(best, other, "validation") for other in shown]
    ahead = [found.significant and found.mean > 0 for found in validation]
    close = [other.label for other, is_behind in zip(shown, ahead, strict=True) if not is_behind]
    if close:
        sure = f"It is not sure: {text.listed(close)} may be as good."
    else:
        sure = "It beats all the others." if len(others) == len(shown) else f"It beats the next {len(shown)}."
    names = [group.label for group in sorted(ranking, key=lambda group: stats.order(group[0]))]
    sentences = [f"- {_compared(best.label, o.label, d, more=True)}." for o, d in zip(shown, validation, strict=True)]
    on_test = [
        f"- {_compared(best.label, other.label, stats.compare(best, other, 'test'))}.{_images(best, other)}"
        for other in shown
    ]
    return (
        "\n".join(
            [
                f"Of {text.listed(names)}, which differ in the learning rate alone, the mean validation accuracy "
                f"chooses **{best.label}** ({stats.shown(best[0].spec['lr'])}): "
                f"{stats.percent(stats.accuracy(best, 'validation'))} over {text.seeds(len(best))}. {sure}\n\n"
                "On validation:\n",
                *sentences,
                *[f"- {len(others) - len(shown):,} more are further behind."] * (len(others) > len(shown)),
                "\nOn test, which took no part in the choice, "
                f"{best.label} reaches {stats.percent(stats.accuracy(best, 'test'))}:\n",
                *on_test,
                *["\n" + UNPAIRED] * (not all(found.paired for found in validation)),
            ]
        )
        + "\n"
    )


def _one_change(a: Spec, b: Spec) -> str | None:
    """The key, but for the seed, in which two specs differ, if it is one."""
    keys = [key for key in a if key != "seed" and a[key] != b[key]]
    return keys[0] if len(keys) == 1 else None


def _verdict(worth: stats.Difference) -> str:
    if not (worth.significant and worth.paired):  # one seed says nothing of others
        return "unclear"
    return "helped" if worth.mean > 0 else "hurt"


class Worth(NamedTuple):
    """What one change of one key is worth: the network after the change against the network before it.

    Attributes:
        key: the key of the spec whose value changes.
        before, after: equal in all else but the seed.
        reference: which of the two is the plain or the full network of its suite.
    """

    key: str
    before: Group
    after: Group
    reference: Group

    @property
    def change(self) -> str:
        """'`dropout` 0 → 0.2'."""
        old, new = (stats.shown(group[0].spec[self.key]) for group in (self.before, self.after))
        return f"`{self.key}` {old} → {new}"

    def points(self, split: str) -> stats.Difference:
        return stats.compare(self.after, self.before, split)

    def summary(self) -> str:
        """'`dropout` 0 → 0.2 in lr-1e-3 (+2.39 ± 1.18)'."""
        return f"{self.change} in {self.reference.label} ({_points(self.points('validation'))})"

    def row(self) -> list[str]:
        validation = self.points("validation")
        return [
            self.change,
            self.reference.label,
            _points(validation),
            _points(self.points("test")),
            str(validation.seeds),
            VERDICTS[_verdict(validation)].lower(),
        ]


def _worths(groups: list[Group], catalog: Catalog) -> list[Worth]:
    """The changes of all ablations: what is added to a plain network, and what a full one has."""
    worths = []
    for suite, ends in catalog.ablations.items():
        plain, full = ends.get("plain"), ends.get("full")
        for reference in groups:
            if reference[0].name not in (plain, full):
                continue
            for member in groups:
                if member[0].name not in catalog.suites[suite] or member[0].name in (plain, full):
                    continue
                if key := _one_change(reference[0].spec, member[0].spec):
                    pair = (reference, member) if reference[0].name == plain else (member, reference)
                    worths.append(Worth(key, *pair, reference))
    order = list(FIELDS)
    return sorted(worths, key=lambda worth: (order.index(worth.key), worth.reference is not worth.before))


def changes(groups: list[Group], catalog: Catalog) -> str:
    """What each change of an ablation is worth, with a verdict by validation."""
    worths = _worths(groups, catalog)
    if not worths:
        return ""
    verdicts: dict[str, list[str]] = {verdict: [] for verdict in VERDICTS}
    for worth in worths:
        verdicts[_verdict(worth.points("validation"))].append(worth.summary())
    lines = [f"- {VERDICTS[verdict]}: {text.listed(found)}.\n" for verdict, found in verdicts.items() if found]
    rows = [worth.row() for worth in worths[: text.ROWS]]
    paired = all(worth.points("validation").paired for worth in worths)
    return (
        "\n## What each change is worth\n\nEach row compares two networks that differ in one key of the spec. "
        "`dropout` 0 → 0.2 stands for the accuracy with dropout 0.2 minus the accuracy with dropout 0. The difference "
        "is in points, with its 95% interval, paired over the seeds that both have. The column `in` names "
        "the network that has all the other values. A change helped, or hurt, if the interval on validation does not "
        "contain 0 and there are at least two seeds. Test has no part in the verdict.\n\n"
        + "".join(lines)
        + "\n"
        + text.grid(("change", "in", "validation", "test", "seeds", "verdict"), rows)
        + ("" if paired else f"\n{UNPAIRED}\n")
    )


def bought(groups: list[Group]) -> str:
    """What the best network with batch norm and as many epochs has over the baseline, where there is one."""
    base = next((group for group in groups if group[0].name == BASELINE), None)
    if base is None:
        return ""
    spec = base[0].spec
    others = [g for g in groups if g[0].spec["norm"] == "batch" and g[0].spec["epochs"] == spec["epochs"]]
    if not others:
        return ""
    best = stats.ranked(others)[0]
    gap, base_gap = (100 * (stats.accuracy(g, "train") - stats.accuracy(g, "test")) for g in (best, base))
    return (
        "\n## What the network bought over the baseline\n\n"
        f"{base.label} has the hidden widths {stats.shown(spec['widths'])}, the activation {spec['activation']}, the "
        f"norm {spec['norm']} and dropout {stats.shown(spec['dropout'])}. "
        f"Of the networks with batch norm that were trained for as many epochs, {best.label} is the best by "
        f"validation. On test, "
        f"{_compared(best.label, base.label, stats.compare(best, base, 'test'))}: {best.label} reaches "
        f"{stats.percent(stats.accuracy(best, 'test'))}, {base.label} {stats.percent(stats.accuracy(base, 'test'))}, "
        f"and the gap between train and test goes from {base_gap:.1f} to {gap:.1f} points.{_images(best, base)}\n"
    )
