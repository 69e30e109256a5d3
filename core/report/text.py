"""What the parts of results.md are written with: tables, lists, pictures."""

from collections.abc import Iterable

ROWS = 30  # of a table, at most
LINES = 10  # of a list, at most


def grid(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of Markdown."""
    headings = list(headings)
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def folded(summary: str, headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table that opens with a click on its summary."""
    return f"\n<details><summary>{summary}</summary>\n\n{grid(headings, rows)}\n</details>\n"


def first(lines: list[str], rest: str, most: int = LINES) -> list[str]:
    """At most `most` lines; if there are more, the last one says how many are left out."""
    return lines if len(lines) <= most else [*lines[: most - 1], rest.format(f"{len(lines) - most + 1:,}")]


def listed(names: list[str]) -> str:
    """'a, b and c'; of many the first, and how many others."""
    names = first(names, "{} others")
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def seeds(n: int) -> str:
    """'1 seed', '5 seeds'."""
    return "1 seed" if n == 1 else f"{n:,} seeds"
