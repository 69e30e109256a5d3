"""Overrides on the command line: words such as lr=3e-4, widths=512,256 or activation=relu,gelu."""

import re
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from core.errors import UserError
from core.spec import FIELDS, Integers, nearest

KEY = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)


class Words(NamedTuple):
    """The words of a command line, sorted.

    Attributes:
        names: names of experiments, grids and suites.
        values: the keys with one value.
        axes: the keys with several values; together they make a grid.
    """

    names: list[str]
    values: dict[str, Any]
    axes: dict[str, list[Any]]


def split(words: Iterable[str], known: Collection[str]) -> Words:
    """Tell overrides from names. A word that starts with a key of a spec and "=" is an override.

    Args:
        known: all names that may be asked for; the names of the members of a grid contain "=", too.

    Raises:
        UserError: A key is unknown or is there twice.
    """
    found = Words([], {}, {})
    for word in words:
        match = KEY.fullmatch(word)
        if match is None or word in known:
            found.names.append(word)
            continue
        key, text = match.groups()
        if key not in FIELDS:
            raise UserError(f"unknown key {key!r} in {word!r}{nearest(key, list(FIELDS))}")
        if key in found.values or key in found.axes:
            raise UserError(f"{key} is given twice")
        values = parse(key, text)
        if len(values) == 1:
            found.values[key] = values[0]
        else:
            found.axes[key] = values
    return found


def parse(key: str, text: str) -> list[Any]:
    """The values of a key in a word: "1e-3,5e-4" are two learning rates, "512,256/1024" two lists of widths.

    A text that is no value stays a text; core.spec.resolve refuses it in its own words.
    """
    allowed = FIELDS[key].values
    return [allowed.parse(each) for each in text.split("/" if isinstance(allowed, Integers) else ",")]
