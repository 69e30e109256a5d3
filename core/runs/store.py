"""Files that survive anything: written whole or not at all, under locks that die with their process."""

import contextlib
import errno
import json
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


class StoreError(Exception):
    """Something cannot be written or read; the message is one sentence with the path."""


class Held(Exception):
    """Another process is at work on this run; the message says which."""


def atomic_write(path: Path, *parts: bytes | memoryview) -> None:
    """Make `parts` the content of a file, or leave it exactly as it was: they are written beside it, fsynced, renamed,
    the folder fsynced.

    Raises:
        StoreError: it cannot be written (no space, no permission); nothing is left behind.
    """
    with _temporary(path) as temporary:
        with open(temporary, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def reserve(path: Path, size: int, copies: int) -> None:
    """Know before the work, rather than after it, that `copies` files of `size` bytes can be written at `path`.

    Raises:
        StoreError: there is no room, or no permission; nothing is left behind.
    """
    with _temporary(path) as temporary:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "Is a directory")
        free = shutil.disk_usage(path.parent).free
        if free < copies * size:
            raise OSError(errno.ENOSPC, f"{copies * size:,} bytes are needed, {free:,} are free")
        with open(temporary, "wb") as file:  # a limit on the size of files or a quota is not in the free space
            getattr(os, "posix_fallocate", lambda *_: None)(file.fileno(), 0, size)


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A name beside `path`, with nothing under it afterwards; an OSError becomes a StoreError that names `path`."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_json(path: Path, value: Any) -> None:
    """Write a record, readable and with sorted keys; raises as atomic_write does."""
    atomic_write(path, (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())


def delete(*paths: Path) -> None:
    """Delete files, those that exist.

    Raises:
        StoreError: one cannot be deleted.
    """
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"cannot delete {path}: {error.strerror or error}") from None


def sweep(folder: Path, prefix: str) -> None:
    """Delete temporary files that a killed process left; call it with the lock that guards `prefix` held."""
    delete(*folder.glob(f"{prefix}*.[0-9]*.tmp"))


@contextlib.contextmanager
def locked(path: Path, owner: Path | None = None, timeout: float = -1) -> Iterator[None]:
    """Hold an operating-system lock, which the death of its process frees.

    Args:
        owner: where to say who holds it. timeout: seconds to wait, -1 without end.

    Raises:
        Held: it was not had in time. StoreError: the lock file cannot be made.
    """
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=timeout)
    except Timeout:
        raise Held(_owner(owner)) from None
    except OSError as error:
        raise StoreError(f"cannot write under {path.parent}: {error.strerror or error}") from None
    try:
        if owner is not None:
            atomic_write(owner, f"process {os.getpid()} on {platform.node()}\n".encode())
        yield
    finally:
        if owner is not None:
            with contextlib.suppress(OSError):
                owner.unlink()
        lock.release()


def _owner(path: Path | None) -> str:
    try:
        return path.read_text().strip() if path else "another process"
    except (OSError, ValueError):  # it let go, or has not yet said who it is
        return "another process"
