"""Compiled steps as shared libraries: found in a cache folder, or else built there.

Loading a library needs neither Dynamo nor inductor, whose imports and tracing cost 5 s in each process, and every
process runs the same machine code.
"""

import atexit
import contextlib
import ctypes
import errno
import getpass
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import platformdirs
import psutil
import torch
from torch import Tensor

from core import store
from core.compile import worker
from core.spec import canonical

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"  # where torch keeps its own compiled files
SETTINGS = ("TORCH", "AOT", "INDUCTOR")  # what the names of variables begin with that set up torch's compilers
PROJECT = Path(__file__).resolve().parents[2]

# Limits on what is read, in bytes: far above what is written.
LIBRARY_LIMIT, DESCRIPTION_LIMIT = 1 << 28, 1 << 16


class BuildError(Exception):
    """A library could not be built; the message is one line."""


class Built(NamedTuple):
    """What a build function returns: the bytes of the library, the indices of its input tensors among the caller's, and
    why it could not be built in the best way, or an empty text."""

    library: bytes
    inputs: list[int]
    problem: str


Build = Callable[[Path], Built]  # from an empty scratch folder


class Recipe(NamedTuple):
    """How to build a library, and its file name.

    Attributes:
        name: of its file; a hash of all that the library depends on.
        tensors: how many tensors the caller has; the library's inputs are some of them.
        build: makes the library.
    """

    name: str
    tensors: int
    build: Build


class Library(NamedTuple):
    """A library on disk; see Built."""

    path: Path
    inputs: list[int]
    problem: str


class Description(msgspec.Struct):
    """The JSON file beside a library; `_hash` says what the hash is of."""

    inputs: list[int]
    problem: str
    sha256: str


_descriptions = msgspec.json.Decoder(Description)  # built here: see the types in core/runs/record.py


_chosen: tuple[Path, str | None] | None = None  # what `folder` and `problem` return
_failed: dict[str, str] = {}  # why a library cannot be built, by its name
one_at_a_time = threading.Lock()  # torch's compilers are for one thread at a time


def name_of(key: Any) -> str:
    """The name of a library from its key: JSON values, all that the library depends on."""
    return hashlib.sha256(canonical(key).encode()).hexdigest()[:32]


# Folders


def folder() -> Path:
    """Where this process keeps what it builds, chosen once: the folder in TORCHINDUCTOR_CACHE_DIR if the user has set
    it, else the project's .cache, else one in the user's cache folder, else a temporary one. It is the first of these
    that can be written and that programs can be loaded from.

    Raises:
        OSError: there is no such folder.
    """
    global _chosen
    _chosen = _chosen or _choose()
    return _chosen[0]


def problem() -> str | None:
    """One line for the user if a library had to be kept elsewhere than in the preferred folder; None as long as nothing
    had to be built."""
    return _chosen[1] if _chosen else None


def export_folder() -> None:
    """Make torch keep its own compiled files in the same folder."""
    os.environ[VARIABLE] = str(folder())


def repair_environment() -> None:
    """If the user has chosen a folder that cannot be written, export another one: torch creates the folder as soon as
    Dynamo is imported, which an eager step does too, and fails if it cannot."""
    if _users_choice():
        export_folder()


@contextlib.contextmanager
def environment(changes: Mapping[str, str | None] | None = None) -> Iterator[None]:
    """Change variables of the environment for a while; None removes one. Those that set up torch's compilers are
    removed, but for the cache folder: what is compiled must not depend on them."""
    everything: dict[str, str | None] = {name: None for name in os.environ if name.startswith(SETTINGS)}
    everything.pop(VARIABLE, None)
    try:
        getpass.getuser()
    except (KeyError, ImportError, OSError):  # Dynamo asks for the name as soon as it is imported.
        everything["USER"] = "nobody"
    everything |= changes or {}
    before = {name: os.environ.get(name) for name in everything}
    _set(everything)
    try:
        yield
    finally:
        _set(before)


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _candidates() -> list[Path]:
    """The folders where libraries may be, the preferred one first: the user's choice takes the place of .cache."""
    candidates = [_users_choice() or PROJECT / ".cache"]
    with contextlib.suppress(RuntimeError):  # There is no home folder; some versions return a relative path then.
        candidates.append(Path(platformdirs.user_cache_dir("cifar10-mlp")))
    return [path for path in candidates if path.is_absolute()]


def _users_choice() -> Path | None:
    """The folder in torch's environment variable, unless torch has set it: as soon as Dynamo is imported, it exports
    its default, a temporary folder."""
    value = os.environ.get(VARIABLE)
    if value:
        with contextlib.suppress(OSError):  # There is no temporary folder.
            if value.startswith(os.path.join(tempfile.gettempdir(), "torchinductor_")):
                return None
    return Path(value).absolute() if value else None


def _choose() -> tuple[Path, str | None]:
    failure = None
    for candidate in _candidates():
        try:
            _check_writable(candidate)
            return candidate, failure and f"{failure}: compiled steps are kept in {candidate}"
        except OSError as error:
            failure = failure or f"cannot use {candidate} ({error.strerror or error})"
    temporary = Path(tempfile.mkdtemp(prefix="cifar10-mlp-"))
    atexit.register(_remove, temporary, os.getpid())
    return temporary, f"{failure}: compiled steps are kept in {temporary} until this process ends"


def _check_writable(path: Path) -> None:
    """Create a folder, and for a moment a file in it.

    Raises:
        OSError: it cannot be done, or other users can change what is written there, or no library can be loaded.
    """
    with contextlib.suppress(FileExistsError):  # It is a file; then nothing can be created in it.
        path.mkdir(mode=0o755, parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path) as file:
        # Some network drives show all files as another user's, or as writable by everybody.
        if not _is_trusted(file.fileno()):
            raise PermissionError(errno.EPERM, "other users can change the files there")
        if _is_noexec(file.fileno()):
            raise PermissionError(errno.EACCES, "it is mounted noexec, so no compiled step can be loaded from there")


def _remove(path: Path, process: int) -> None:
    if os.getpid() == process:  # A fork of the process that made the folder leaves it alone.
        shutil.rmtree(path, ignore_errors=True)


# Files


def find(recipe: Recipe) -> Library | None:
    """The library, from the first folder that has it undamaged and out of other users' reach; None without one."""
    chosen = [_chosen[0]] if _chosen else []
    for place in dict.fromkeys(_candidates() + chosen):
        path = place / f"{recipe.name}.so"
        with contextlib.suppress(OSError, ValueError, RecursionError):  # It is missing, damaged or not to be trusted.
            described = _descriptions.decode(_read(path.with_suffix(".json"), DESCRIPTION_LIMIT))
            inputs = described.inputs
            fits = len(set(inputs)) == len(inputs) and all(0 <= i < recipe.tensors for i in inputs)
            built = Built(_read(path, LIBRARY_LIMIT), inputs, described.problem)
            if fits and described.sha256 == _hash(recipe.name, built):
                return Library(path, inputs, described.problem)
    return None


def _hash(name: str, built: Built) -> str:
    """Of the library, its name and its inputs, so that no file of these can be exchanged for another library's."""
    return hashlib.sha256(built.library + canonical([name, built.inputs, built.problem]).encode()).hexdigest()


def _read(path: Path, limit: int) -> bytes:
    with open(store.open_file(path, limit), "rb") as file:
        if not _is_trusted(file.fileno()):
            raise PermissionError(errno.EPERM, "other users can change it")
        if _is_noexec(file.fileno()):
            raise PermissionError(errno.EACCES, "it is mounted noexec")
        return file.read(limit)


def _is_trusted(descriptor: int) -> bool:
    """Whether nobody can change a file but this user, root, and the owner of this code, who could change the code."""
    found = os.fstat(descriptor)
    return found.st_uid in (os.geteuid(), 0, os.stat(__file__).st_uid) and not found.st_mode & 0o022


def _is_noexec(descriptor: int) -> bool:
    """Whether a file is on a file system that no library can be loaded from; systems that cannot say so have none."""
    noexec = getattr(os, "ST_NOEXEC", 0)
    return bool(noexec and os.fstatvfs(descriptor).f_flag & noexec)


# Building


def get_or_build(recipe: Recipe) -> Library:
    """The library, built if it is not there. One that cannot be built is not tried again in this process, unless the
    reason may be gone by then.

    Raises:
        BuildError: it cannot be built.
    """
    if library := find(recipe):
        return library
    if recipe.name in _failed:
        raise BuildError(_failed[recipe.name])
    try:
        _build_and_keep(recipe, folder() / f"{recipe.name}.so")
    except Exception as error:  # Dynamo, inductor and the C++ compiler each raise their own.
        reason = first_line(error)
        if not is_temporary(error):
            _failed[recipe.name] = reason
        raise BuildError(reason) from error
    if library := find(recipe):
        return library
    raise BuildError(f"the library that was built in {folder()} cannot be read")


def _build_and_keep(recipe: Recipe, path: Path) -> None:
    """Build a library, unless another process or thread has just built it."""
    with store.locked(path.with_suffix(".lock")):
        if find(recipe):
            return
        store.sweep(path.parent, path.stem)
        _sweep_scratch(path)
        with _scratch(path) as scratch:
            built = worker.wait_for(lambda: _build(recipe, scratch), lambda: _abandon(scratch))
        description = Description(built.inputs, built.problem, _hash(recipe.name, built))
        for file, content in ((path, built.library), (path.with_suffix(".json"), msgspec.json.encode(description))):
            store.atomic_write(file, content)
            file.chmod(file.stat().st_mode & ~0o022)  # Whatever the umask, only its owner can write it.


def _build(recipe: Recipe, scratch: Path) -> Built:
    """Build a library, with all files of torch and of the compiler in the scratch folder."""
    check = worker.checker()
    with one_at_a_time:
        check()
        tempfile.gettempdir()  # Python keeps its first answer, which must not be the scratch folder.
        try:
            with environment({VARIABLE: str(scratch), "TMPDIR": str(scratch)}):
                return recipe.build(scratch)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)  # Where nobody waits any more, nobody else does it.


@contextlib.contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """An empty folder for a while, in which the library `path` is built under its lock."""
    place, prefix = _scratch_name(path)
    scratch = Path(tempfile.mkdtemp(prefix=f"{prefix}.", suffix=".scratch", dir=place))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _scratch_name(path: Path) -> tuple[Path, str]:
    """The place of a scratch folder, and what its name begins with. It is beside the library, or, as torch writes
    command lines without quotes, in a temporary folder where that has a space, a quote or the like in its path."""

    def is_plain(place: Path) -> bool:
        return re.fullmatch(r"[\w./+-]+", str(place)) is not None

    if is_plain(path.parent):
        return path.parent, path.stem
    place = next(filter(is_plain, map(Path, (tempfile.gettempdir(), "/tmp", "/var/tmp"))))
    return place, hashlib.sha256(os.fsencode(path)).hexdigest()[:32]


def _sweep_scratch(path: Path) -> None:
    """Remove what killed processes have left, 130 MB each; the caller holds the lock of `path`."""
    place, prefix = _scratch_name(path)
    for scratch in place.glob(f"{prefix}.*.scratch"):
        shutil.rmtree(scratch, ignore_errors=True)
    for scratch in path.parent.glob("*.scratch"):
        lock = path.with_name(scratch.name.split(".")[0] + ".lock")
        with contextlib.suppress(store.Held, store.StoreError), store.locked(lock, timeout=0):
            shutil.rmtree(scratch, ignore_errors=True)


def _abandon(scratch: Path) -> None:
    """End the processes that compile in a scratch folder, and remove it."""
    for _ in range(2):  # One may just have been started.
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):  # It has ended.
                    if any(str(scratch) in word for word in process.cmdline()):
                        process.kill()
        time.sleep(0.05)
    shutil.rmtree(scratch, ignore_errors=True)


LACKING = (
    "Killed",
    "No space left",
    "allocate memory",
    "out of memory",
    "temporarily unavailable",
    "can't start new thread",
)


def is_temporary(error: BaseException) -> bool:
    """Whether what failed may succeed the next time: the system lacked something, or a compiler was killed."""
    cause: BaseException | None = error
    while cause is not None:
        if any(words in str(cause) for words in LACKING):
            return True
        if isinstance(cause, subprocess.CalledProcessError):
            return cause.returncode < 0
        if isinstance(cause, OSError | MemoryError | store.StoreError):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def first_line(error: BaseException) -> str:
    """The first line of an error's message and the first error that a C++ compiler names in it: at most 200 characters,
    none of them a control character."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    says = [line for line in lines[1:] if "error:" in line][:1]
    return "".join(c for c in ": ".join([lines[0], *says]) if c.isprintable())[:200]


# Loading


def bind(library: Library, tensors: list[Tensor]) -> Callable[[], None]:
    """The function of a library, bound to its inputs among the caller's tensors, which it changes in place."""
    _keep_freed_memory()
    runner = torch._C._aoti.AOTIModelContainerRunnerCpu(str(library.path), 1)
    inputs = [tensors[i] for i in library.inputs]

    def call() -> None:
        runner.run(inputs)

    return call


def _keep_freed_memory() -> None:
    """Make glibc keep the buffers that a step frees, for the next step. If it gave them back to the system, each step
    would map them anew: 7,000 page faults, up to a fifth of the time at batch 512."""
    trim_threshold, mmap_threshold = -1, -3  # parameters of mallopt(3)
    with contextlib.suppress(AttributeError, OSError):  # It is another C library.
        libc = ctypes.CDLL(None)
        libc.malloc_trim(0)  # gives back the 80 MB that reading the data has left
        libc.mallopt(trim_threshold, 1 << 30)
        libc.mallopt(mmap_threshold, 1 << 25)  # the largest value that it accepts


def _forget_builds() -> None:
    """In a fork: another thread of the parent may have held the lock."""
    global one_at_a_time
    one_at_a_time = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_builds)
