"""What the parts of results.md are written with: tables, lists, pictures."""

from collections.abc import Iterable

from core.report import plots

ROWS = 30  # of a table, at most
LINES = 10  # of a list, at most


def grid(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of Markdown."""
    headings = list(headings)
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def first(lines: list[str], rest: str, most: int = LINES) -> list[str]:
    """At most `most` lines: where there are more, the last says how many are left out."""
    return lines if len(lines) <= most else [*lines[: most - 1], rest.format(f"{len(lines) - most + 1:,}")]


def listed(names: list[str]) -> str:
    """'a, b and c'; of many the first, and how many others."""
    names = first(names, "{} others")
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def seeds(n: int) -> str:
    """'1 seed', '5 seeds'."""
    return f"{n:,} seed{'s' * (n != 1)}"


def picture(picture: plots.Picture) -> str:
    """The line that shows a picture, with its alternative text."""
    return f"![{picture.alt}]({picture.path})\n"


def folded(heading: str, table: str) -> str:
    """A table that a click on its heading opens."""
    return f"\n<details><summary>{heading}</summary>\n\n{table}\n</details>\n"
