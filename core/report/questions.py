"""What the records say of the questions that `compare` was asked: sentences, a section of results.md, pictures."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from core import compare
from core.code_hash import same_numbers
from core.compare import Known, Look, Pair, Question
from core.report import plots, stats, text
from core.report.plots import Picture
from core.runs.record import Finished, Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_PAIRS = 5  # of a picture


# Sentences


def _seeds(count: int) -> str:
    return f"{count:,} seed" if count == 1 else f"{count:,} seeds"


def _quoted(label: str) -> str:
    """A label that stays one word in a sentence."""
    return f'"{label}"' if " " in label else label


def _listed(labels: Iterable[str]) -> str:
    return text.listed([*map(_quoted, labels)])


def _evidence(pair: Pair) -> str:
    return f"{_quoted(pair.better)} minus {_quoted(pair.worse)} {pair.difference}, {_seeds(pair.difference.n)}"


def line(found: Look) -> str:
    """A round: 'validation: lr-5e-4 minus lr-1e-3 0.10 ± 0.72, 8 seeds'. Of several pairs, those of the best."""
    shown = [pair for pair in found.open if found.left[0] in (pair.better, pair.worse)]
    return f"validation: {'; '.join(map(_evidence, shown or found.beaten))}"


def sentence(question: Question, found: Look) -> str:
    """The answer in a sentence, or that there is none yet. More sentences follow if there is more to know."""
    left, others = _listed(found.left), [c.label for c in question.candidates if c.label not in found.left]
    heads = {
        "winner": f"{left} beats {_listed(others or [''])} on validation",
        "within": f"{left} differ by less than {question.within:g} points on validation",
        "undecided": f"{left} cannot be told apart on validation",
        "": f"{left} cannot be told apart on validation yet",
    }
    if len(question.candidates) == 2:
        [difference] = [pair.difference for pair in found.pairs]
        evidence = f"{difference}, {_seeds(difference.n)}"
    else:
        evidence = "; ".join(map(_evidence, found.open + found.beaten))
    said = [f"{heads[found.answer]}: {evidence}, {question.confidence:g}% at every look"]
    if others and found.answer != "winner":
        said.append(f"{_listed(others)} {'is' if len(others) == 1 else 'are'} beaten")
    if found.answer in ("undecided", ""):
        seeds = max(compare.needed(pair.difference, question.within, question.alpha) for pair in found.open)
        what = "it" if len(found.open) == 1 else f"all {len(found.open)} pairs"
        decide = f"About {_seeds(seeds)} would" if seeds < compare.NEEDED else "More seeds hardly"
        said.append(f"{decide} decide {what}")
    for label, count in found.diverged.items():
        runs = (
            f"1 run of {_quoted(label)} diverged and counts"
            if count == 1
            else f"{count} runs of {_quoted(label)} diverged and count"
        )
        said.append(f"{runs} as chance")
    return ". ".join(said)


def on_test(found: Look, known: Known) -> str:
    """What test says of the pair that the answer is about; empty if there is no answer.

    Two networks that differ only in the seed differ more on the test images than on all possible images (Jordan 2023,
    arXiv:2304.01910). So the sentence has two intervals: one for other seeds, one for other images.
    """
    if found.decided is None:
        return ""
    a, b = found.decided.better, found.decided.worse
    pairs = [(known[a][seed], known[b][seed]) for seed in sorted(known[a].keys() & known[b].keys())]
    finished = [(x, y) for x, y in pairs if isinstance(x, Finished) and isinstance(y, Finished)]
    if len(finished) < 2:
        return ""
    values = [100 * (x.metrics.test.accuracy - y.metrics.test.accuracy) for x, y in finished]
    images = stats.over_images(finished)
    other_images = "" if images is None else f", ± {100 * images:.2f} for other test images"
    return (
        f"On test, which has no part in the decision, {_quoted(a)} minus {_quoted(b)} is {fmean(values):.2f} points "
        f"over {_seeds(len(values))}: ± {stats.half_width(values):.2f} for other seeds{other_images} (95% each)."
    )


# The report


class Asked(NamedTuple):
    """A question, the records that answer it, and the answer."""

    question: Question
    known: Known
    look: Look


def asked(out: Path, records: Sequence[Record], former: Mapping[str, str] = {}) -> list[Asked]:
    """The questions under `out` that have records of this code and of their data, with these records.

    Args:
        former: old names of experiments, with the new names.
    """
    found = []
    for question in compare.read_all(out, former):
        current = (r for r in records if r.data == question.data and same_numbers(r.environment.code))
        known = compare.assign(question, current)
        if any(known.values()):
            found.append(Asked(question, known, compare.look(question, known)))
    return found


def section(questions: Sequence[Asked], shown: Mapping[str, str]) -> str:
    """What was asked, and what is the answer?

    Args:
        shown: the pictures that are on disk, as Markdown, by path.
    """
    if not questions:
        return ""
    parts = []
    for question, known, look in questions:
        title = _listed(candidate.label for candidate in question.candidates)
        said = [f"**{sentence(question, look)}.**", *filter(None, [on_test(look, known)])]
        parts.append(f"### {title}\n\n{' '.join(said)}\n{shown.get(question.picture, '')}")
    return (
        "## Compared until decided\n\n`main.py compare` trains more seeds until one experiment beats the others, or "
        "until the difference is too small to matter. A difference is in points of validation accuracy, "
        "paired by seed. Its interval is valid at every look, so it is wider than that of a fixed number of seeds. "
        "docs/compare.md has the method.\n\n" + "\n".join(parts)
    )


def pictures(questions: Iterable[Asked]) -> Iterator[Picture]:
    """The intervals of each question against the number of seeds."""
    for question, known, look in questions:
        lines = [_line(question, known, pair) for pair in (look.open + look.beaten)[:MAX_PAIRS]]
        if lines := [line for line in lines if line[1]]:
            title = f"difference on validation, {question.confidence:g}% at every look"
            alt = f"Interval of the difference against the number of seeds. {sentence(question, look)}"
            yield Picture(question.picture, title, (question.within, lines), _paint, 4, alt)


Line = tuple[str, list[int], list[float], list[float]]  # label, numbers of seeds, means and half-widths


def _line(question: Question, known: Known, pair: Pair) -> Line:
    """The finite intervals of a pair, after each seed."""
    counts = range(compare.first_look(question.alpha), pair.difference.n + 1)
    looks = [compare.pair(question, known, pair.better, pair.worse, n) for n in counts]
    means = [each.difference.mean * (1 if each.better == pair.better else -1) for each in looks]
    label = f"{plots.short(pair.better)} minus {plots.short(pair.worse)}"
    return label, list(counts), means, [each.difference.half for each in looks]


def _paint(figure: "Figure", content: tuple[float, list[Line]], _: Any) -> None:
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    within, lines = content
    ax, ends = figure.subplots(), list[tuple[float, str, str]]()
    for i, (label, seeds, *numbers) in enumerate(lines):
        mean, half = map(np.array, numbers)
        ends.append((mean[-1], label.replace(" minus ", "\nminus "), f"C{i}"))
        if len(seeds) == 1:
            ax.errorbar([seeds[0] + 0.1 * i], mean, half, color=f"C{i}", marker="o", linewidth=2)  # side by side
        ax.plot(seeds, mean, color=f"C{i}", linewidth=2)
        ax.fill_between(seeds, mean - half, mean + half, color=f"C{i}", alpha=0.2, linewidth=0)
    for height, style in ((0, "-"), (within, "--"), (-within, "--")):
        ax.axhline(height, color="black", linestyle=style, linewidth=1)
    last = [abs(mean[-1]) + half[-1] for _, _, mean, half in lines]
    limit = 1.5 * max(within, *last)  # the first intervals are very wide
    first, end = min(line[1][0] for line in lines), max(line[1][-1] for line in lines)
    ax.set(xlabel="seeds", ylabel="points", ylim=(-limit, limit), xlim=(first - 0.5, end + 0.5))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.grid(alpha=0.3)
    plots.label_ends(ax, ends, figure.get_figheight() - 1.2)
