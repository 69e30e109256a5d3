"""Which code gives which numbers: hashes of core/, and the list of those that give the same."""

import ast
import hashlib
import re
from pathlib import Path
from typing import Any

CORE = Path(__file__).resolve().parent
LIST = CORE / "same_numbers.txt"

# The parts of core/ that cannot decide a bit of the weights: files, reports, the terminal, what is done with a trained
# network. Everything else counts, so a file that is added counts from its first day.
NOT_HASHED = (
    "runs",
    "report",
    "cli.py",
    "commands",
    "code_hash.py",
    "estimate.py",
    "events.py",
    "export.py",
    "images.py",
    "listeners",
    "mode.py",
    "plan.py",
    "predict.py",
    "remote.py",
    "schedule.py",
    "session.py",
    "signals.py",
    "store.py",
    "tally.py",
    "terminal.py",
    "verify.py",
    "errors.py",
)


def code_hash(core: Path) -> str:
    """Twelve hexadecimal digits of the code in a folder that decides bits: of its syntax trees without docstrings, so
    that comments, layout and docstrings count for nothing."""
    total = hashlib.sha256()
    for path in sorted(core.rglob("*.py")):
        place = path.relative_to(core)
        if place.parts[0] not in NOT_HASHED:
            tree = ast.parse(path.read_bytes())
            for node in ast.walk(tree):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
                    del node.body[0]
            total.update(repr((place.as_posix(), _plain(tree))).encode())
    return total.hexdigest()[:12]


def _plain(node: Any) -> Any:
    """A syntax tree as tuples, the same on every version of Python: ast.dump is not."""
    if isinstance(node, ast.AST):
        fields = ((name, _plain(value)) for name, value in ast.iter_fields(node))
        return type(node).__name__, *((name, value) for name, value in fields if value not in ("None", ()))
    return tuple(map(_plain, node)) if isinstance(node, list) else repr(node)


CODE = code_hash(CORE)
SAME_NUMBERS = frozenset(re.findall(r"^[0-9a-f]{12}\b", LIST.read_text(), re.MULTILINE))


def same_numbers(code: str, other: str = CODE) -> bool:
    """Whether two hashes of code stand for the same numbers: they are equal, or both are in the list.

    Old records may have no hash; what code made them is unknown, so it is never the same as any code.
    """
    return bool(code) and (code == other or {code, other} <= SAME_NUMBERS)


def core_bytes_hash(core: Path = CORE) -> str:
    """sha256 of the names and bytes of all Python files of a folder. The list does not count: the golden test writes
    it, and a worker does not read it."""
    total = hashlib.sha256()
    for path in sorted(core.rglob("*.py")):
        total.update(repr((path.relative_to(core).as_posix(), path.read_bytes())).encode())
    return total.hexdigest()
