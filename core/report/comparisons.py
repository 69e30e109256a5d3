"""The sections of results.md that compare experiments: the choice of the learning rate, what helped, the baseline."""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

from core import compare
from core.compare import Interval
from core.report import stats, text
from core.report.catalog import Catalog
from core.report.stats import Group
from core.spec import FIELDS, canonical

MAX_CHOICES = 5
BASELINE = "baseline"  # the experiment that the networks with batch norm are compared with


class Comparison(NamedTuple):
    """The accuracy of `a` minus that of `b`."""

    name: str
    a: Group
    b: Group
    better: str = "better"  # the verdict, if `a` is significantly better
    worse: str = "worse"
    rows: int = 1  # of its table; see stats.compare

    def difference(self, split: str) -> Interval:
        return stats.compare(self.a, self.b, split, self.rows)

    @property
    def verdict(self) -> str:
        difference = self.difference("validation")
        if not difference.significant:
            return "not significant" if difference.half < math.inf else "too few seeds"
        verdict = self.better if difference.mean > 0 else self.worse
        one_look = difference.n < compare.first_look(stats.ALPHA / self.rows)
        return f"{verdict} (one look)" if one_look else verdict

    def needed(self) -> str:
        difference = self.difference("validation")
        if difference.half == math.inf:
            return ""
        return f"{compare.needed(difference, compare.DIFFERENCE, stats.ALPHA / self.rows):,}"

    def points(self, split: str) -> str:
        """'+2.39 ± 1.18'; '+2.39' if there are too few seeds for an interval."""
        difference = self.difference(split)
        half = f" ± {difference.half:.2f}" if difference.half < math.inf else ""
        return f"{difference.mean:+.2f}{half}"

    def images(self) -> str:
        """'700 : 749, p = 0.21'; empty if the records do not say which images were right."""
        counts = stats.image_by_image(self.a, self.b)
        if counts is None:
            return ""
        only_a, only_b, p = counts
        return f"{only_a:,} : {only_b:,}, {'p < 0.0001' if p < 1e-4 else f'p = {p:.2g}'}"


COLUMNS: dict[str, Callable[[Comparison], str]] = {
    "comparison": lambda c: c.name,
    "validation": lambda c: c.points("validation"),
    "test": lambda c: c.points("test"),
    "seeds": lambda c: f"{c.difference('validation').n:,}",
    "verdict": lambda c: c.verdict,
    "seeds needed": Comparison.needed,
    "images": Comparison.images,
}


def _against(best: Group, others: list[Group]) -> list[Comparison]:
    """The best experiment against each other one. The intervals of all their pairs are valid together."""
    pairs = math.comb(len(others) + 1, 2)
    return [Comparison(f"{best.label} minus {other.label}", best, other, rows=pairs) for other in others]


def choice(groups: list[Group]) -> str:
    """Which learning rate is best? For each set of these experiments that differ in it alone, the best set first."""
    sets: dict[str, dict[float, Group]] = defaultdict(dict)
    for group in groups:
        spec = group[0].spec
        # One spec may have run under two names.
        sets[canonical({**spec, "seed": 0, "lr": 0})].setdefault(spec["lr"], group)
    rankings = [stats.ranked(members.values()) for members in sets.values() if len(members) > 1]
    if not rankings:
        return ""
    rankings.sort(key=lambda ranking: -stats.accuracy(ranking[0], "validation"))
    choices = [_choice(ranking) for ranking in rankings[:MAX_CHOICES]]
    if len(rankings) > MAX_CHOICES:
        choices.append(f"{len(rankings) - MAX_CHOICES:,} more sets of learning rates are left out.\n")
    return "\n" + "\n".join(choices)


def _choice(ranking: list[Group]) -> str:
    best, *others = ranking
    names = [group.label for group in sorted(ranking, key=lambda group: stats.order(group[0]))]
    rows = _against(best, others)
    differences = {row.b.label: row.difference("validation") for row in rows}
    close = [label for label, d in differences.items() if not (d.significant and d.mean > 0)]
    lead = f"not significantly better than {text.listed(close)}" if close else "significantly better than the others"
    validation, test = (stats.percent(stats.accuracy(best, split)) for split in ("validation", "test"))
    return (
        f"Of {text.listed(names)}, which differ in the learning rate alone, validation chooses **{best.label}**. "
        f"Its {validation} (n = {len(best)}) is {lead}; on test, which has no part in the choice, it reaches {test}.\n"
        f"{text.folded(f'The comparisons with {best.label}', text.table(COLUMNS, rows))}"
    )


def _changes(groups: list[Group], catalog: Catalog) -> list[Comparison]:
    """The changes of one key in all ablations, in the order of the keys: those of the plain, then of the full one."""
    changes = []
    groups = [group for group in groups if not group.variant]
    for suite, ends in catalog.ablations.items():
        members = [g for g in groups if g[0].name in catalog.suites[suite] and g[0].name not in ends.values()]
        for reference in (group for group in groups if group[0].name in ends.values()):
            plain = reference[0].name == ends.get("plain")
            for member in members:
                before, after = (reference, member) if plain else (member, reference)
                old, new = before[0].spec, after[0].spec
                keys = [key for key in FIELDS if key != "seed" and old[key] != new[key]]
                if len(keys) == 1:
                    values = f"{stats.shown(old[keys[0]])} → {stats.shown(new[keys[0]])}"
                    name = f"`{keys[0]}` {values} in {reference.label}"
                    change = Comparison(name, after, before, "helped", "hurt")
                    changes.append((list(FIELDS).index(keys[0]), not plain, change))
    return [change for *_, change in sorted(changes, key=lambda each: each[:2])]


def what_helped(groups: list[Group], catalog: Catalog) -> str:
    """What is each change of an ablation worth?"""
    changes = _changes(groups, catalog)
    if not changes:
        return ""
    rows = len(changes)
    changes = [change._replace(rows=rows) for change in changes]
    least = compare.first_look(stats.ALPHA / rows)
    names: dict[str, list[str]] = defaultdict(list)
    for change in changes:
        names[change.verdict].append(f"{change.name} ({change.points('validation')})")
    summary = "".join(f"- {verdict.capitalize()}: {text.listed(names[verdict])}.\n" for verdict in sorted(names))
    return (
        "## What helped\n\nA row compares two networks that differ in one key of the spec. `dropout` 0 → 0.2 in "
        "lr-1e-3 is the accuracy with dropout 0.2 minus the accuracy with dropout 0, where all other values are those "
        "of lr-1e-3. The name of a variant has a minus before what is left out and a plus before what is added: "
        "`full-dropout` has no dropout, `minute+dropout` has dropout.\n\n"
        f"With 95%, no verdict of the {rows} rows is wrong. With {least} seeds or more, that holds however often seeds "
        "were added. With fewer (one look), it holds only if their number was chosen in advance. docs/compare.md has "
        "the method.\n\n"
        f"{summary}\n{text.table(COLUMNS, changes)}"
    )


def gain(groups: list[Group]) -> str:
    """How much better than the baseline is the best network with batch norm and as many epochs?"""
    base = next((group for group in groups if group[0].name == BASELINE and not group.variant), None)
    if base is None:
        return ""
    spec = base[0].spec
    others = [g for g in groups if g[0].spec["norm"] == "batch" and g[0].spec["epochs"] == spec["epochs"]]
    if not others:
        return ""
    best = stats.ranked(others)[0]
    before, after = (stats.percent(stats.accuracy(group, "test")) for group in (base, best))
    gaps = f"{stats.gap(base):.1f} to {stats.gap(best):.1f}"
    return (
        f"## Gain over the baseline\n\nThe experiment {base.label} has the hidden widths "
        f"{stats.shown(spec['widths'])}, the activation {spec['activation']}, the norm {spec['norm']} and dropout "
        f"{stats.shown(spec['dropout'])}. Of the networks with batch norm and as many epochs, {best.label} is the best "
        f"by validation. From {base.label} to {best.label}, test accuracy goes from {before} to {after}, and the gap "
        f"between train and test from {gaps} points.\n\n{text.table(COLUMNS, _against(best, [base]))}"
    )
