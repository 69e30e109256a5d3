"""A cache of compiled steps: each is a shared library with a JSON file beside it.

Loading a library needs neither Dynamo nor inductor, which saves each process 5 s. All processes run the same machine
code.
"""

import atexit
import contextlib
import ctypes
import errno
import getpass
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import platformdirs
import psutil
import torch
from torch import Tensor

from core import store
from core.code_hash import CODE
from core.compile import worker
from core.spec import canonical

PROJECT = Path(__file__).resolve().parents[2]
VARIABLE = "TORCHINDUCTOR_CACHE_DIR"  # where torch keeps its own compiled files
COMPILER_VARIABLES = ("TORCH", "AOT", "INDUCTOR")  # the prefixes of variables that set up torch's compilers
# What messages say where the system lacked something, or a compiler was killed.
LACKING = "Killed|No space left|allocate memory|out of memory|temporarily unavailable|can't start new thread"
# For each tool that is missing: words of a message, what is missing, the commands that install it on macOS and Debian.
COMPILER = "xcode-select --install", "apt install g++"
MISSING = (
    ("No working C", "no C++ compiler works", *COMPILER),
    (r"'omp\.h' file not found", "clang++ finds no omp.h", "brew install libomp", "apt install libomp-dev"),
    (r"-std=c\+\+20", "torch needs g++ 10 or newer", COMPILER[0], "apt install g++-10; export CXX=g++-10"),
)
LIBRARY_LIMIT, DESCRIPTION_LIMIT = 1 << 28, 1 << 16  # bytes, far above what is written


class CompileError(Exception):
    """A step cannot be compiled; the message is one line."""


class Library(NamedTuple):
    """A compiled step on disk."""

    path: Path
    inputs: list[int]  # the indices of its input tensors among the caller's
    problem: str  # why it was compiled without patches, in one line; otherwise empty


class Recipe(NamedTuple):
    """How to build a library."""

    name: str  # a hash of everything that the library depends on
    tensors: int  # the number of the caller's tensors
    build: Callable[[Path], Library]  # from an empty folder


_chosen: tuple[Path, str | None] | None = None  # what `folder` and `problem` return
_failed: dict[str, str] = {}  # why a library cannot be built, by its name
one_at_a_time = threading.Lock()  # torch's compilers do not work in two threads at once


# Folders


def folder() -> Path:
    """The folder for new libraries, chosen once: the first of the candidates that can be used, else a temporary one.

    Raises:
        OSError: there is not even a temporary folder.
    """
    global _chosen
    _chosen = _chosen or _choose()
    return _chosen[0]


def problem() -> str | None:
    """Why the preferred folder is not used, in one line; None if it is, or if no folder was needed so far."""
    return _chosen[1] if _chosen else None


def _candidates() -> list[Path]:
    """The user's choice or else the project's .cache; then the user's cache folder."""
    choice = os.environ.get(VARIABLE, "")
    if choice.startswith(os.path.join(tempfile.gettempdir(), "torchinductor_")):
        choice = ""  # It is torch's default, which the import of Dynamo exports.
    candidates = [Path(choice).absolute() if choice else PROJECT / ".cache"]
    with contextlib.suppress(RuntimeError):  # There is no home folder; some versions return a relative path then.
        candidates.append(Path(platformdirs.user_cache_dir("cifar10-mlp")))
    return [path for path in candidates if path.is_absolute()]


def _choose() -> tuple[Path, str | None]:
    failure = None
    for candidate in _candidates():
        try:
            with contextlib.suppress(FileExistsError):  # It is a file, in which no file can be created.
                candidate.mkdir(mode=0o755, parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=candidate) as file:
                _check_trusted(file.fileno())
            return candidate, failure and f"{failure}: compiled steps are kept in {candidate}"
        except OSError as error:
            failure = failure or f"cannot use {candidate} ({error.strerror or error})"
    temporary = tempfile.TemporaryDirectory(prefix="cifar10-mlp-", ignore_cleanup_errors=True)
    atexit.register(temporary.cleanup)
    return Path(temporary.name), f"{failure}: compiled steps are kept in {temporary.name} until this process ends"


def _check_trusted(descriptor: int) -> None:
    """Raise PermissionError if a file cannot be loaded as a library, or if anybody but this user, root and the owner of
    this code can change it. Some network drives show all files as another user's, or as writable by everybody."""
    status = os.fstat(descriptor)
    if not hasattr(os, "geteuid"):  # on Windows, the mode says nothing
        return
    if status.st_uid not in (os.geteuid(), 0, os.stat(__file__).st_uid) or status.st_mode & 0o022:
        raise PermissionError(errno.EPERM, "other users can change the files there")
    statvfs = getattr(os, "fstatvfs", None)
    if statvfs and statvfs(descriptor).f_flag & getattr(os, "ST_NOEXEC", 0):
        raise PermissionError(errno.EACCES, "it is mounted noexec, so no compiled step can be loaded from there")


@contextlib.contextmanager
def environment(changes: Mapping[str, str | None] | None = None) -> Iterator[None]:
    """Hide the variables that set up torch's compilers, so that what is compiled depends on none of them. Torch keeps
    its files in `folder`: the import of Dynamo fails if it cannot create its folder.

    Args:
        changes: More variables to set; None removes one.
    """
    variables: dict[str, str | None] = {name: None for name in os.environ if name.startswith(COMPILER_VARIABLES)}
    try:
        getpass.getuser()
    except (KeyError, ImportError, OSError):  # Dynamo asks for the name when it is imported.
        variables["USER"] = "nobody"
    variables |= changes or {}
    variables.setdefault(VARIABLE, str(folder()))
    with contextlib.ExitStack() as stack:
        for name, value in variables.items():
            stack.callback(_set, name, os.environ.get(name))
            _set(name, value)
        yield


def _set(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


# Building


def find(recipe: Recipe) -> Library | None:
    """The library from the first folder that has it undamaged and out of other users' reach; None without one."""
    for place in _candidates() + ([_chosen[0]] if _chosen else []):
        path = place / f"{recipe.name}.so"
        # It may be missing, damaged or not trusted.
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
            description = json.loads(_read(path.with_suffix(".json"), DESCRIPTION_LIMIT))
            library = Library(path, description["inputs"], description["problem"])
            is_valid = sorted(library.inputs) == sorted(set(library.inputs) & set(range(recipe.tensors)))
            if is_valid and description["sha256"] == _hash(recipe.name, _read(path, LIBRARY_LIMIT), library):
                return library
    return None


def _hash(name: str, content: bytes, library: Library) -> str:
    """sha256 of a library and its name and inputs, so that no file can take the place of another library's."""
    return hashlib.sha256(content + canonical([name, library.inputs, library.problem]).encode()).hexdigest()


def _read(path: Path, limit: int) -> bytes:
    with store.open_file(path, limit) as file:
        _check_trusted(file.fileno())
        return file.read()


def get_or_build(recipe: Recipe) -> Library:
    """The library, built if it does not exist. This process does not repeat a failed build, unless the system only
    lacked something for a moment.

    Raises:
        CompileError: It cannot be built.
    """
    if library := find(recipe):
        return library
    if recipe.name in _failed:
        raise CompileError(_failed[recipe.name])
    try:
        path = folder() / f"{recipe.name}.so"
        _sweep_scratch(path.parent)
        with store.locked(path.with_suffix(".lock")):
            if not find(recipe):  # Else another process or thread has just built it.
                _build(recipe, path)
    except Exception as error:  # Dynamo, inductor and the C++ compiler raise their own types.
        reason = first_line(error)
        if not is_temporary(error):
            _failed[recipe.name] = reason
        raise CompileError(reason) from error
    if library := find(recipe):
        return library
    raise CompileError(f"the library that was built in {folder()} cannot be read")


def _build(recipe: Recipe, path: Path) -> None:
    """Build a library and write its files; the caller holds its lock."""
    store.sweep(path.parent, path.stem)
    place, middle = _scratch_place(path.parent)
    scratch = Path(tempfile.mkdtemp(prefix=f"{path.stem}.{middle}.", suffix=".scratch", dir=place))
    library, content = worker.wait_for(lambda: _build_in(scratch, recipe), lambda: _abandon(scratch))
    digest = _hash(recipe.name, content, library)
    about = {"inputs": library.inputs, "problem": library.problem, "sha256": digest, "code": CODE}
    description = json.dumps(about).encode()
    for file, data in ((path, content), (path.with_suffix(".json"), description)):
        store.atomic_write(file, data)
        file.chmod(file.stat().st_mode & ~0o022)  # Whatever the umask, only its owner can write it.


def _build_in(scratch: Path, recipe: Recipe) -> tuple[Library, bytes]:
    """Build a library, with all files of torch and of the compiler in the scratch folder; return its content too."""
    check = worker.checker()
    with one_at_a_time:
        check()
        tempfile.gettempdir()  # Python keeps its first answer, which must not be the scratch folder.
        try:
            with environment({VARIABLE: str(scratch), "TMPDIR": str(scratch)}):
                library = recipe.build(scratch)
            return library, library.path.read_bytes()
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _scratch_place(cache: Path) -> tuple[Path, str]:
    """Where the scratch folders of a cache folder are, and the middle of their names. They are in it or, if its path
    needs quotes in a command line, in a temporary folder: torch writes no quotes."""
    places = (cache, *map(Path, (tempfile.gettempdir(), "/tmp", "/var/tmp")))
    place = next(place for place in places if re.fullmatch(r"[\w./+-]+", str(place)))
    return place, hashlib.sha256(os.fsencode(cache)).hexdigest()[:16]


def _scratch_folders(cache: Path) -> Iterator[store.Leftover]:
    """All scratch folders, 130 MB each. Where a process is still compiling, it holds the lock."""
    place, middle = _scratch_place(cache)
    for scratch in place.glob(f"*.{middle}.*.scratch"):
        lock = cache / f"{scratch.name.split('.')[0]}.lock"
        yield store.Leftover([scratch], "scratch folder of a killed compilation", lock)


def _sweep_scratch(cache: Path) -> None:
    """Remove the scratch folders of killed processes."""
    for scratch in _scratch_folders(cache):
        with contextlib.suppress(store.Held, store.StoreError), store.locked(scratch.lock, timeout=0):
            shutil.rmtree(scratch.paths[0], ignore_errors=True)


def leftovers() -> Iterator[store.Leftover]:
    """Scratch folders of killed processes, and libraries of other code that no process has loaded."""
    for cache in _candidates():
        yield from _scratch_folders(cache)
        libraries = (path for path in cache.glob("*.so") if re.fullmatch("[0-9a-f]{32}", path.stem))
        others = [path for path in libraries if _code(path) != CODE]
        loaded = _loaded() if others else set()
        for path in others:
            if os.path.realpath(path) not in loaded:
                files = [path, *cache.glob(f"{path.stem}.json")]
                yield store.Leftover(files, "compiled step of other code", path.with_suffix(".lock"))


def _code(path: Path) -> str | None:
    """The code of a library; None where its description does not say it."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        return json.loads(store.read_file(path.with_suffix(".json"), DESCRIPTION_LIMIT))["code"]
    return None


def _loaded() -> set[str]:
    """The files that processes of this machine have mapped into their memory; empty on macOS, which does not say."""
    paths = set[str]()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, AttributeError, OSError):  # another user's, or it has ended
            paths.update(mapped.path for mapped in process.memory_maps())
    return paths


def _abandon(scratch: Path) -> None:
    """Kill the processes that compile in a scratch folder, and remove it."""
    for _ in range(2):  # One may just have been started.
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):  # It has ended.
                    if any(str(scratch) in word for word in process.cmdline()):
                        process.kill()
        time.sleep(0.05)
    shutil.rmtree(scratch, ignore_errors=True)


def is_temporary(error: BaseException) -> bool:
    """Whether the next try may succeed: the system lacked something, or a compiler was killed."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, subprocess.CalledProcessError):
            return cause.returncode < 0
        if isinstance(cause, OSError | MemoryError | store.StoreError) or re.search(LACKING, str(cause)):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def first_line(error: BaseException) -> str:
    """The first line of a message and the first error of a C++ compiler in it: at most 200 printable characters. If
    something is not installed, that and its remedy."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    errors = [line for line in lines[1:] if "error:" in line][:1]
    text = "".join(c for c in ": ".join([lines[0], *errors]) if c.isprintable())
    known = (with_remedy(*found) for sign, *found in MISSING if re.search(sign, text))
    return next(known, text[:200])


def with_remedy(problem: str, macos: str, debian: str) -> str:
    """A problem, and the command against it on this system, which one of its own programs tells."""
    commands = {"xcode-select": macos, "apt": debian}
    return next((f"{problem} (try: {commands[name]})" for name in commands if shutil.which(name)), problem)


# Loading


def bind(library: Library, tensors: list[Tensor]) -> Callable[[], None]:
    """The function of a library, bound to the caller's tensors, which it changes in place."""
    _keep_freed_memory()
    runner = torch._C._aoti.AOTIModelContainerRunnerCpu(str(library.path), 1)
    inputs = [tensors[i] for i in library.inputs]

    def call() -> None:
        runner.run(inputs)

    return call


def _keep_freed_memory() -> None:
    """Make glibc keep the buffers that a step frees. Otherwise the next step maps them again: 7,000 page faults, up to
    a fifth of the time at batch 512."""
    trim_threshold, mmap_threshold = -1, -3  # parameters of mallopt(3)
    with contextlib.suppress(AttributeError, OSError, TypeError):  # It is another C library, or Windows.
        libc = ctypes.CDLL(None)
        libc.malloc_trim(0)  # gives back the 80 MB that reading the data has left
        libc.mallopt(trim_threshold, 1 << 30)
        libc.mallopt(mmap_threshold, 1 << 25)  # the largest value that it accepts
