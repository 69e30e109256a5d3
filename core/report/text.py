"""What results.md is written with: tables and lists."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

ROWS = 30  # of a table, at most
LINES = 10  # of a list, at most
Row = TypeVar("Row")


def grid(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of Markdown."""
    headings = list(headings)
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def table(columns: Mapping[str, Callable[[Row], str]], rows: Sequence[Row]) -> str:
    """A table of the first rows. `columns` are the headings, each with the function that makes a cell."""
    cells = ([cell(row) for cell in columns.values()] for row in rows[:ROWS])
    rest = f"\n{len(rows) - ROWS:,} more rows are left out.\n" if len(rows) > ROWS else ""
    return grid(columns, cells) + rest


def folded(summary: str, content: str) -> str:
    """A block that shows its summary. A click opens the content."""
    return f"\n<details><summary>{summary}</summary>\n\n{content}\n</details>\n"


def limited(lines: list[str], rest: str, most: int = LINES) -> list[str]:
    """At most `most` lines; if there are more, the last one says how many are left out."""
    return lines if len(lines) <= most else [*lines[: most - 1], rest.format(f"{len(lines) - most + 1:,}")]


def listed(names: list[str]) -> str:
    """'a, b and c'; of many the first, and how many others."""
    names = limited(names, "{} others")
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
