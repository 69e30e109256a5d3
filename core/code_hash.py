"""Which code gives which numbers: hashes of core/, and the list of those that give the same."""

import ast
import hashlib
import re
from pathlib import Path
from typing import Any

CORE = Path(__file__).resolve().parent
LIST = CORE / "same_numbers.txt"

# The parts of core/ that cannot change a bit of the weights. Everything else counts, also every new file.
NOT_HASHED = (
    "runs",
    "report",
    "cli.py",
    "cluster.py",
    "commands",
    "compare.py",
    "code_hash.py",
    "estimate.py",
    "events.py",
    "export.py",
    "images.py",
    "interactive.py",
    "listeners",
    "mode.py",
    "plan.py",
    "predict.py",
    "remote.py",
    "schedule.py",
    "search.py",
    "session.py",
    "signals.py",
    "space.py",
    "store.py",
    "tally.py",
    "terminal.py",
    "verify.py",
    "errors.py",
)


def code_hash(core: Path) -> str:
    """Hash of the code in a folder that decides bits: twelve hexadecimal digits. It is made from the syntax trees, so
    comments, layout and docstrings do not count."""
    total = hashlib.sha256()
    for path in sorted(core.rglob("*.py")):
        name = path.relative_to(core)
        if name.parts[0] not in NOT_HASHED:
            tree = ast.parse(path.read_bytes())
            for node in ast.walk(tree):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
                    del node.body[0]
            total.update(repr((name.as_posix(), _plain(tree))).encode())
    return total.hexdigest()[:12]


def _plain(node: Any) -> Any:
    """A syntax tree as tuples, the same on every version of Python, unlike ast.dump."""
    if isinstance(node, ast.AST):
        fields = ((name, _plain(value)) for name, value in ast.iter_fields(node))
        return type(node).__name__, *((name, value) for name, value in fields if value not in ("None", ()))
    return tuple(map(_plain, node)) if isinstance(node, list) else repr(node)


CODE = code_hash(CORE)
SAME_NUMBERS = frozenset(re.findall(r"^[0-9a-f]{12}\b", LIST.read_text(encoding="utf-8"), re.MULTILINE))


def same_numbers(code: str, other: str = CODE) -> bool:
    """Whether two hashes of code give the same numbers: they are equal, or both are in the list. An old record may have
    no hash; its code is unknown, and so never the same."""
    return bool(code) and (code == other or {code, other} <= SAME_NUMBERS)


def core_bytes_hash(core: Path = CORE) -> str:
    """sha256 of the names and bytes of all Python files in a folder."""
    total = hashlib.sha256()
    for path in sorted(core.rglob("*.py")):
        total.update(repr((path.relative_to(core).as_posix(), path.read_bytes())).encode())
    return total.hexdigest()
