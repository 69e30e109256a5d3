"""Compiled steps as shared libraries: found in a cache folder, or else built there.

Loading a library needs neither Dynamo nor inductor, whose imports and tracing cost 5 s in each process, and every
process runs the same machine code.
"""

import atexit
import contextlib
import ctypes
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import msgspec
import platformdirs
import torch
from torch import Tensor

from core.compile import builder
from core.compile.builder import BuildError, first_line
from core.runs import store
from core.spec import canonical

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"  # where torch keeps its own compiled files
PROJECT = Path(__file__).resolve().parents[2]

# Limits on what is read, in bytes: far above what is written.
LIBRARY_LIMIT, DESCRIPTION_LIMIT = 1 << 28, 1 << 16


class Built(NamedTuple):
    """What a build function returns: the bytes of the library, the indices of its input tensors among the caller's, and
    why it could not be built in the best way, or an empty text."""

    library: bytes
    inputs: list[int]
    problem: str


Build = Callable[[Path], Built]  # from an empty scratch folder


class Recipe(NamedTuple):
    """A library, there or not.

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


def name_of(key: Any) -> str:
    """The name of a library from its key: JSON values, all that the library depends on."""
    return hashlib.sha256(canonical(key).encode()).hexdigest()[:32]


# Folders


def folder() -> Path:
    """Where this process keeps what it builds, chosen once: the folder in TORCHINDUCTOR_CACHE_DIR if the user has set
    it, else the project's .cache, else one in the user's cache folder, else a temporary one. It is the first of these
    that can be written.

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


def _candidates() -> list[Path]:
    """The folders where libraries may be, the preferred one first: the user's choice takes the place of .cache."""
    candidates = (_users_choice() or PROJECT / ".cache", Path(platformdirs.user_cache_dir("cifar10-mlp")))
    # Without a home folder, the last one is a relative path.
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
            failure = failure or f"cannot write {candidate} ({error.strerror or error})"
    temporary = Path(tempfile.mkdtemp(prefix="cifar10-mlp-"))
    atexit.register(_remove, temporary, os.getpid())
    return temporary, f"{failure}: compiled steps are kept in {temporary} until this process ends"


def _check_writable(path: Path) -> None:
    """Create a folder, and for a moment a file in it.

    Raises:
        OSError: it cannot be done, or other users can change what is written there.
    """
    with contextlib.suppress(FileExistsError):  # It is a file; then nothing can be created in it.
        path.mkdir(mode=0o755, parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path) as file:
        # Some network drives show all files as another user's, or as writable by everybody.
        if not _is_trusted(file.fileno()):
            raise PermissionError(errno.EPERM, "other users can change the files there")


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
        return file.read(limit)


def _is_trusted(descriptor: int) -> bool:
    """Whether nobody can change a file but this user, root, and the owner of this code, who could change the code."""
    found = os.fstat(descriptor)
    return found.st_uid in (os.geteuid(), 0, os.stat(__file__).st_uid) and not found.st_mode & 0o022


def _build_and_keep(recipe: Recipe, path: Path) -> None:
    """Build a library in this process, unless another process has just built it."""
    with store.locked(path.with_suffix(".lock")):
        if find(recipe):
            return
        scratch = path.with_suffix(".scratch")
        shutil.rmtree(scratch, ignore_errors=True)  # A killed process leaves 130 MB.
        store.sweep(path.parent, path.stem)
        try:
            scratch.mkdir(mode=0o700)
            # All other files that torch and the compiler write go to the scratch folder too.
            with mock.patch.dict(os.environ, {VARIABLE: str(scratch), "TMPDIR": str(scratch)}):
                built = recipe.build(scratch)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        description = Description(built.inputs, built.problem, _hash(recipe.name, built))
        for file, content in ((path, built.library), (path.with_suffix(".json"), msgspec.json.encode(description))):
            store.atomic_write(file, content)
            file.chmod(file.stat().st_mode & ~0o022)  # Whatever the umask, only its owner can write it.


# Building


def build_ahead(recipe: Recipe) -> None:
    """Start to build a library in another process, unless it is there.

    The other process has this one's imports. Meanwhile this one can do something else, can be stopped at once, and
    never holds the compiler's 300 MB. Where processes cannot be forked, nothing happens before `get_or_build`.

    Raises:
        OSError: no process can be started, or there is no folder for the library.
    """
    if builder.CAN_FORK and not builder.is_at_work(recipe.name) and not find(recipe):
        _start(recipe)


def get_or_build(recipe: Recipe) -> Library:
    """The library, built if it is not there.

    Raises:
        BuildError: it cannot be built. OSError: as `build_ahead`.
    """
    if not builder.is_at_work(recipe.name) and (library := find(recipe)):
        return library
    if builder.CAN_FORK:
        if not builder.is_at_work(recipe.name):
            _start(recipe)
        try:
            builder.wait(recipe.name)
        except builder.ForkError:
            _build_here(recipe)
    else:
        _build_here(recipe)
    if library := find(recipe):
        return library
    raise BuildError(f"the library that was built in {folder()} cannot be read")


def _build_here(recipe: Recipe) -> None:
    try:
        _build_and_keep(recipe, folder() / f"{recipe.name}.so")
    except Exception as error:  # Dynamo, inductor and the C++ compiler each raise their own.
        raise BuildError(first_line(error)) from error


def _start(recipe: Recipe) -> None:
    path = folder() / f"{recipe.name}.so"
    builder.start(recipe.name, lambda: _build_and_keep(recipe, path))


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
