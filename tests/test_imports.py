"""The directions of the imports, read from the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = [*sorted((ROOT / "core").rglob("*.py")), *sorted((ROOT / "experiments").glob("*.py")), ROOT / "main.py"]

# Folder, or file, of core -> what else of core it may import. A word that is added here is a decision about the design.
RULES = {
    "functional": {"spec"},
    "data": {"errors", "store", "spec", "images"},  # images: for a folder of them
    "runs": {"code_hash", "errors", "mode", "store", "spec"},
    "compile": {"code_hash", "errors", "mode", "store", "spec", "functional"},
    "compare": {"errors", "store", "spec", "runs"},
    "space": {"errors", "store", "spec", "runs"},
    "search": {"code_hash", "errors", "events", "runs", "schedule", "space", "spec", "store"},
    "report": {"code_hash", "compare", "errors", "store", "space", "spec", "runs", "data"},  # identity, classes, images
    "events": {"mode", "runs"},
    "train": {"errors", "events", "mode", "spec", "functional", "data", "compile"},  # no files, so no runs; no terminal
    "predict": {"errors", "store", "spec", "functional", "data", "compile", "runs"},
    "images": {"errors", "store"},
    "export": {"errors", "store", "data", "compile", "predict"},
    "session": {"errors", "events", "mode", "store", "spec", "functional", "data", "compile", "runs", "train"},
    "verify": {"errors", "events", "mode", "data", "runs", "session"},
    "schedule": {"events", "spec", "store", "runs", "session"},
    "cluster": {"errors"},
    "remote": {"cluster", "code_hash", "events", "mode", "store", "spec", "data", "runs", "session", "schedule"},
    "plan": {"errors", "space", "spec", "runs", "report"},  # report: its catalog
    "estimate": {"mode", "spec", "functional", "data", "runs", "report"},
    "tally": {"spec", "runs", "estimate"},
    "terminal": {"errors", "spec", "report", "runs", "estimate", "tally"},
    "listeners": {"errors", "events", "report", "runs", "tally", "terminal"},
    "interactive": {"data", "events", "listeners", "report", "runs", "session", "signals", "spec", "tally"},
    "signals": {"events"},  # inside a function: to import the module takes no time
    "cli": {"commands", "plan", "terminal"},
    "spec": {"errors"},
    "code_hash": {"errors"},
    "store": {"errors"},
    "errors": set(),
    "mode": set(),  # on the ground floor, since train and compile import no runs
}


def tree(path):
    return ast.parse(path.read_text(), str(path))


def imported(path):
    """Every module that a file imports, at its top or inside a function; "from core import x" is core.x."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(path):
    """ "functional" of core/functional/model.py, "train" of core/train.py."""
    return path.relative_to(ROOT / "core").parts[0].removesuffix(".py")


def dotted(node):
    """ "torch.cuda.graph" of such an expression."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id if isinstance(node, ast.Name) else "", *reversed(parts)])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_down(path):
    rooms = {name.split(".")[1] for name in imported(path) if name.startswith("core.")}
    if path.parent.name == "experiments":
        assert not rooms, "experiments are plain data"
    elif path.name == "main.py" or path.parent.name == "commands":
        assert "functional" not in rooms, "main and the commands parse, call and print"
    elif path.parent != ROOT / "core" or path.name != "__init__.py":
        assert rooms - {room(path)} <= RULES[room(path)]
    assert not any(name.split(".")[0] == "main" for name in imported(path)), "nothing imports main"


def test_the_functional_part_is_torch_and_nothing_else():
    for path in (ROOT / "core" / "functional").glob("*.py"):
        outside = {name.split(".")[0] for name in imported(path)} - {"core"}
        # scipy: the quantiles of a distribution, once a run
        assert outside <= {"torch", "math", "collections", "functools", "typing"} | (
            {"scipy"} if path.name == "prng.py" else set()
        ), path


def test_only_compile_names_the_compiler():
    machinery = ("torch.compile", "torch.compiler", "torch._dynamo", "torch._inductor", "torch.func.vmap", "torch.vmap")
    graphs = ("torch.cuda.CUDAGraph", "torch.cuda.graph", "torch.cuda.make_graphed_callables")
    users = set()
    for path in FILES:
        names = {dotted(node) for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute)} | set(imported(path))
        if any(name.startswith((*machinery, *graphs)) for name in names):
            users.add(path.parent.name)
    assert users == {"compile"}


def test_only_the_terminal_and_main_print():
    for path in FILES:
        calls = [node.func for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
        if path.name not in ("main.py", "terminal.py"):
            assert "print" not in [call.id for call in calls if isinstance(call, ast.Name)], path


def test_text_is_read_and_written_in_a_named_encoding():
    """By default it is that of the system, which is not UTF-8 on Windows."""
    for path in FILES:
        for call in ast.walk(tree(path)):
            if not isinstance(call, ast.Call):
                continue
            function, named = dotted(call.func).split(".")[-1], {each.arg for each in call.keywords}
            is_text = function in ("read_text", "write_text") or "text" in named
            if function == "fdopen" or (isinstance(call.func, ast.Name) and function == "open"):
                is_text = not any("b" in str(getattr(mode, "value", "")) for mode in call.args[1:2])
            assert not is_text or "encoding" in named, f"{path}:{call.lineno}"


def test_commands_that_answer_at_once_import_no_torch():
    """`main.py --help`, `list --keys`, `report` and a refused argument need not wait for it."""
    seen, left = set(), [ROOT / "main.py"]
    while left:
        path = left.pop()
        seen.add(path)
        for node in tree(path).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                names += [f"{node.module}.{a.name}" for a in node.names] if isinstance(node, ast.ImportFrom) else []
                assert not {n.split(".")[0] for n in names} & {"torch", "torchvision", "dvc", "matplotlib"}, path
                files = [ROOT / (name.replace(".", "/") + ".py") for name in names]
                left += [file for file in files if file.exists() and file not in seen]
    assert ROOT / "core" / "spec.py" in seen
