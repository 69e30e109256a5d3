"""JSON that a person can read and that Git can compare: short lines, and a line for each column or row of numbers. Also
the small files of that kind that a command writes for the report."""

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from core.store import StoreError, atomic_write, read_file

WIDTH = 120  # characters of a line that holds several values
MAX_BYTES = 1 << 20  # of a file that `read` takes

T = TypeVar("T", bound=Struct)
R = TypeVar("R")

log = logging.getLogger(__name__)


def read(path: Path, kind: type[T], what: str) -> T:
    """The content of a small file that a command has written for the report.

    Args:
        what: the file in a message, such as "a question that `compare` has written".

    Raises:
        StoreError: the file cannot be read, or is another one.
    """
    try:
        return msgspec.json.decode(read_file(path, MAX_BYTES), type=kind)
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(f"{path} is not {what}: {str(error)[:200]!r}") from None


def read_each(paths: Iterable[Path], read_one: Callable[[Path], R]) -> Iterator[R]:
    """What `read_one` returns for each of these files. Skips a file that it refuses, with a warning in the log."""
    for path in paths:
        try:
            yield read_one(path)
        except StoreError as error:
            log.warning("%s; it is skipped and stays as it is", error)


def read_all(paths: Iterable[Path], kind: type[T], what: str) -> list[T]:
    """The contents of such files, in the order of their names; see `read_each`."""
    return list(read_each(sorted(paths), lambda path: read(path, kind, what)))


def write(path: Path, content: Struct, what: str) -> None:
    """Write such a file. Raises StoreError if it cannot be written, or another file is there."""
    if path.exists():
        read(path, type(content), what)
    atomic_write(path, dumps(msgspec.to_builtins(content)).encode())


def dumps(value: dict[str, Any]) -> str:
    """A dict as JSON. A list is one line, a matrix has a line for each row, and the plain values of a dict share lines.
    Keys are sorted, so equal values give equal text."""
    return _dict(value, "") + "\n"


def _dict(value: dict[str, Any], indent: str) -> str:
    inner, lines, shared = indent + " ", [""], False
    for key in sorted(value):
        item = value[key]
        plain = not isinstance(item, dict | list)
        entry = f"{json.dumps(key)}: {_item(item, inner)}"
        if shared and plain and len(lines[-1]) + len(entry) + 2 < WIDTH:
            lines[-1] += f", {entry}"
        else:
            lines.append(inner + entry)
        shared = plain
    return "{" + ",\n".join(lines)[1:] + f"\n{indent}}}"


def _item(item: Any, indent: str) -> str:
    if isinstance(item, dict) and len(json.dumps(item)) > 2 * WIDTH:
        return _dict(item, indent)
    if isinstance(item, list) and item and isinstance(item[0], dict | list):
        return "[\n" + ",\n".join(f"{indent} {_compact(row)}" for row in item) + f"\n{indent}]"
    return _compact(item)


def _compact(item: Any) -> str:
    return json.dumps(item, sort_keys=True, allow_nan=False, ensure_ascii=False)
