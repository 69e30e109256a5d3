"""JSON that a person can read and that Git can compare: short lines, and a line for each column or row of numbers."""

import json
from typing import Any

WIDTH = 120  # characters of a line that holds several values


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
