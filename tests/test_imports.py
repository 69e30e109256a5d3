"""The directions of the imports, read from the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = sorted(path.stem for path in (ROOT / "core").glob("*.py") if path.stem != "__init__")

# From each room to those below it that it may use. A line that is added here is a decision about the design.
ALLOWED = {
    "spec": set(),
    "random": set(),
    "store": set(),
    "dataset": set(),
    "optim": set(),
    "inductor": set(),
    "runs": {"store"},
    "library": {"spec", "store"},
    "provenance": set(),
    "model": {"spec"},
    "loader": {"random"},
    "checkpoint": {"spec", "store"},
    "report": {"spec", "store", "runs"},
    "step": {"spec", "random", "loader", "model", "optim"},
    "jit": {"spec", "random", "dataset", "inductor", "library", "provenance", "step"},
    "network": {"spec", "checkpoint", "loader", "model", "step"},
    "resume": {"spec", "store", "runs", "checkpoint", "provenance"},
    "train": {
        "spec",
        "store",
        "checkpoint",
        "dataset",
        "jit",
        "loader",
        "optim",
        "provenance",
        "resume",
        "runs",
        "step",
    },
}
COMPILER = {"jit", "inductor"}  # inductor is a part of jit: only jit may import it
MAIN = {"spec", "store", "runs", "dataset", "report", "jit", "network", "train", "provenance"}


def tree(path):
    return ast.parse(path.read_text(), str(path))


def imported(path):
    """Every module that a file imports, at its top or inside a function; "from core import x" is core.x."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "core":
                yield from (f"core.{alias.name}" for alias in node.names)
            else:
                yield node.module or ""


def rooms(path):
    return {name.split(".")[1] for name in imported(path) if name.startswith("core.")}


def dotted(node):
    """ "torch.cuda.graph" of such an expression."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id if isinstance(node, ast.Name) else "", *reversed(parts)])


def test_every_room_is_in_the_table():
    assert set(ROOMS) == set(ALLOWED)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_downward_only(room):
    assert rooms(ROOT / "core" / f"{room}.py") <= ALLOWED.get(room, set())


def test_the_table_has_no_circle():
    left = dict(ALLOWED)
    while left:
        bottom = {room for room, below in left.items() if not below & left.keys()}
        assert bottom, f"a circle among {sorted(left)}"
        left = {room: below for room, below in left.items() if room not in bottom}


def test_main_uses_the_upper_rooms_only():
    assert rooms(ROOT / "main.py") <= MAIN


def test_nothing_imports_main():
    files = [*(ROOT / "core").glob("*.py"), *(ROOT / "experiments").glob("*.py")]
    assert not any(name.split(".")[0] == "main" for path in files for name in imported(path))


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*.py")), ids=lambda path: path.stem)
def test_experiments_import_nothing_but_each_other(path):
    assert {name.split(".")[0] for name in imported(path)} <= {"experiments", "typing"}


@pytest.mark.parametrize("room", sorted(set(ROOMS) - COMPILER))
def test_only_jit_names_the_compiler(room):
    path = ROOT / "core" / f"{room}.py"
    names = {dotted(node) for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute)} | set(imported(path))
    machinery = ("torch.compile", "torch.compiler", "torch._dynamo", "torch._inductor", "torch.func.vmap", "torch.vmap")
    graphs = ("torch.cuda.CUDAGraph", "torch.cuda.graph", "torch.cuda.make_graphed_callables")
    assert not {name for name in names if name.startswith((*machinery, *graphs))}


def test_only_jit_uses_its_part():
    assert {room for room in ROOMS if "inductor" in rooms(ROOT / "core" / f"{room}.py")} <= {"jit"}


def test_jit_does_name_the_compiler():
    """What the test above looks for is found where it belongs."""
    names = {dotted(node) for node in ast.walk(tree(ROOT / "core" / "jit.py")) if isinstance(node, ast.Attribute)}
    assert {"torch.compile", "torch.cuda.CUDAGraph"} <= names


@pytest.mark.parametrize("room", ROOMS)
def test_core_prints_nothing(room):
    calls = [node.func for node in ast.walk(tree(ROOT / "core" / f"{room}.py")) if isinstance(node, ast.Call)]
    assert "print" not in [call.id for call in calls if isinstance(call, ast.Name)]


def test_what_answers_at_once_imports_no_torch():
    """`main.py list` and a refused argument need not wait for it."""
    top = {
        name.split(".")[0]
        for path in ("main.py", "core/spec.py", "core/store.py", "core/runs.py", "core/report.py", "core/dataset.py")
        for node in tree(ROOT / path).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""])
    }
    assert not top & {"torch", "torchvision", "dvc", "matplotlib", "safetensors"}
