"""Windows, as far as Linux can play it: runs commands of main.py in one process that is like one on Windows.

python -X warn_default_encoding tests/windows.py run demo --no-compile , report      two commands

To the modules of this project the standard library has the names that it has on Windows, as typeshed (a part of mypy)
says. For all modules, a file that is open or mapped cannot be deleted or replaced, a folder cannot be opened, and text
is in cp1252. Other libraries, torch among them, stay those of Linux. After each command its exit status is printed.
"""

import ast
import builtins
import ctypes
import errno
import functools
import io
import locale
import os
import pwd
import re
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace

import mypy

ROOT = Path(__file__).resolve().parent.parent
STUBS = Path(mypy.__file__).parent / "typeshed" / "stdlib"
PROJECT = r"(core|experiments|main)(\.|$)"
IN_USE, DENIED = 32, 5  # ERROR_SHARING_VIOLATION, ERROR_ACCESS_DENIED


def public(body: list[ast.stmt], platform: str) -> set[str]:
    """The names that the statements of a stub define on a platform, for this Python."""
    found = set()
    for node in body:
        match node:
            case ast.If():
                fake = SimpleNamespace(platform=platform, version_info=sys.version_info)
                holds = eval(compile(ast.Expression(node.test), "stub", "eval"), {"sys": fake})
                found |= public(node.body if holds else node.orelse, platform)
            case ast.FunctionDef() | ast.ClassDef():
                found.add(node.name)
            case ast.Assign(targets=[ast.Name(name)]) | ast.AnnAssign(target=ast.Name(name)):
                found.add(name)
            case ast.ImportFrom():
                found |= {each.name for each in node.names if each.name == each.asname}
    return {name for name in found if not name.startswith("_")}


@functools.cache
def lacks(module: str) -> frozenset[str] | None:
    """The names of a module that it has on Linux alone; None if nothing else is in it."""
    stub = next((path for path in (STUBS / f"{module}.pyi", STUBS / module / "__init__.pyi") if path.exists()), None)
    body = ast.parse(stub.read_text(encoding="utf-8")).body if stub else []
    linux, windows = (public(body, platform) for platform in ("linux", "win32"))
    return None if linux and not windows else frozenset(linux - windows)


@functools.cache
def on_windows(module: ModuleType) -> ModuleType:
    """A module of the standard library without the names that it lacks on Windows."""
    gone = lacks(module.__name__)
    if gone is None:
        raise ModuleNotFoundError(f"No module named {module.__name__!r}", name=module.__name__)
    extra = EXTRA.get(module.__name__, {})
    if not gone and not extra:
        return module
    result = ModuleType(module.__name__)
    vars(result).update({name: value for name, value in vars(module).items() if name not in gone} | extra)
    return result


def open_descriptor(path, flags, *rest, **options):
    if os.path.isdir(path):
        raise denied(errno.EACCES, DENIED, path)
    return os.open(path, flags, *rest, **options)


def load_library(name, *rest, **options):
    if name is None:
        raise TypeError("argument of type 'NoneType' is not iterable")
    return ctypes.CDLL(name, *rest, **options)


EXTRA = {  # what is there, but not as on Linux
    "os": {"name": "nt", "open": open_descriptor},
    "signal": {"SIGBREAK": 21},
    "ctypes": {"CDLL": load_library},
}


def denied(code: int, winerror: int, path: str | os.PathLike) -> PermissionError:
    error = PermissionError(code, "Access is denied" if winerror == DENIED else "The file is in use", os.fspath(path))
    error.winerror = winerror
    return error


def import_as_on_windows(name, globals=None, locals=None, fromlist=(), level=0, real=builtins.__import__):
    module = real(name, globals, locals, fromlist, level)
    is_ours = re.match(PROJECT, (globals or {}).get("__name__", ""))
    return on_windows(module) if is_ours and name in sys.stdlib_module_names else module


def is_open(path: str) -> bool:
    """Whether this process has a file open, or mapped into its memory."""
    path = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{descriptor}") == path:
                return True
        except FileNotFoundError:  # the descriptor of the list itself
            continue
    with real_open("/proc/self/maps", encoding="utf-8") as maps:
        return any(line.rstrip("\n").endswith(f" {path}") for line in maps)


def refuse_if_open(call):
    """A function that deletes or moves files, and refuses those that are open."""

    @functools.wraps(call)
    def wrapped(*paths, **options):
        if not options.get("dir_fd"):
            for path, winerror in zip(map(os.fspath, paths), (IN_USE, DENIED), strict=False):
                if isinstance(path, str) and is_open(path):
                    raise denied(errno.EACCES, winerror, path)
        return call(*paths, **options)

    return wrapped


real_open = builtins.open


@functools.wraps(real_open)
def open_as_on_windows(file, mode="r", buffering=-1, encoding=None, *rest, **options):
    if not isinstance(file, int) and os.path.isdir(file) and "opener" not in options:  # as tempfile has it on Linux
        raise denied(errno.EACCES, DENIED, file)
    if "b" not in mode and encoding in (None, "locale"):
        io.text_encoding(encoding, 2)  # warns where none was given
        encoding = "cp1252"
    return real_open(file, mode, buffering, encoding, *rest, **options)


def unknown_user(uid: int) -> None:
    """As `docker run --user 12345` has it."""
    raise KeyError(f"getpwuid(): uid not found: {uid}")


def install() -> None:
    """Make this process one on Windows. An encoding that the project leaves open is an error."""
    for name in ("replace", "rename", "remove", "unlink"):
        setattr(os, name, refuse_if_open(getattr(os, name)))
    builtins.open = io.open = open_as_on_windows
    locale.getpreferredencoding = lambda *_: "cp1252"
    pwd.getpwuid = unknown_user
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="cp1252")  # as of a pipe
    builtins.__import__ = import_as_on_windows
    warnings.simplefilter("ignore", EncodingWarning)
    warnings.filterwarnings("error", category=EncodingWarning, module=PROJECT)


def main(words: list[str]) -> None:
    import main

    while words:
        end = words.index(",") if "," in words else len(words)
        command, words = words[:end], words[end + 1 :]
        try:
            status = main.main(command)
        except SystemExit as error:  # of --help
            status = error.code
        print(f"[{status}]", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    install()
    main(sys.argv[1:])
