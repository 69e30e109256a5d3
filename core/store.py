"""Files: read with a limit, written whole or not at all, under locks that end with their process."""

import contextlib
import errno
import logging
import os
import platform
import re
import shutil
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from core.errors import UserError

PATIENCE = 1.0  # seconds to wait for a lock before it is said who holds it
# What file systems answer that have no locks, or none between machines.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)

log = logging.getLogger(__name__)


class StoreError(UserError):
    """A file or folder cannot be written or read; the message names it."""


class Held(UserError):
    """Another process holds the lock; the message names that process."""


def open_file(path: Path, limit: int) -> int:
    """A file descriptor of a regular file of at most `limit` bytes, to read from; whoever calls closes it.

    Raises:
        OSError: it cannot be opened. ValueError: it is a pipe, a device, a folder, or larger.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would else wait for a writer
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("it is not a regular file")
        if found.st_size > limit:
            raise ValueError(f"it has {found.st_size:,} bytes, expected at most {limit:,}")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read_file(path: Path, limit: int) -> bytes:
    """The bytes of a regular file; raises as `open_file` does, before anything is read."""
    with open(open_file(path, limit), "rb") as file:
        return file.read(min(limit, os.fstat(file.fileno()).st_size))  # a file that is growing is cut off


def atomic_write(path: Path, *parts: bytes | memoryview, check: Callable[[Path], None] = lambda written: None) -> None:
    """Make `parts` the content of a file, or leave it exactly as it was: they are written beside it, fsynced, renamed,
    the folder fsynced.

    Args:
        check: called with the file under its temporary name; what it raises leaves `path` as it was.

    Raises:
        StoreError: it cannot be written (no space, no permission); nothing is left behind.
    """
    with _temporary(path) as temporary:
        with open(temporary, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        check(temporary)
        os.replace(temporary, path)
        _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # file systems that cannot sync a folder
            raise
    finally:
        os.close(folder)


def reserve(path: Path, size: int, copies: int) -> None:
    """Make sure, before the work starts, that `copies` files of `size` bytes can be written at `path`.

    Raises:
        StoreError: there is no room, or no permission; nothing is left behind.
    """
    with _temporary(path) as temporary:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "Is a directory")
        if _is_kept(path):
            raise PermissionError(errno.EPERM, "it belongs to another user, in a folder with the sticky bit")
        free = shutil.disk_usage(path.parent).free
        if free < copies * size:
            raise OSError(errno.ENOSPC, f"{copies * size:,} bytes are needed, {free:,} are free")
        with open(temporary, "wb") as file:  # a limit on the size of files or a quota is not in the free space
            try:
                getattr(os, "posix_fallocate", lambda *_: None)(file.fileno(), 0, size)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):  # file systems without it
                    raise


def _is_kept(path: Path) -> bool:
    """Whether there is a file that only its owner may replace: the folder has the sticky bit, as /tmp has."""
    if not path.exists() or not hasattr(os, "geteuid"):
        return False
    folder = path.parent.stat()
    return bool(folder.st_mode & stat.S_ISVTX) and os.geteuid() not in (0, folder.st_uid, path.lstat().st_uid)


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


def local(path: str | Path) -> Path:
    """The path that a user means: a ~ at its start is a home folder."""
    return Path(os.path.expanduser(path))


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
        owner: where to say who holds it. Whoever waits for longer than PATIENCE then logs a warning that names the
            holder.
        timeout: seconds to wait, -1 without end.

    Raises:
        Held: it was not had in time. StoreError: the lock file cannot be made, or its file system has no locks.
    """
    # Without locks of the file system FileLock would make do with a file, which two processes can hold at once.
    lock = FileLock(path, fallback_to_soft=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=PATIENCE if timeout < 0 and owner else timeout)
        except Timeout:
            if timeout >= 0:
                raise Held(_owner(owner)) from None
            log.warning("%s", _waiting(path, _owner(owner)))
            lock.acquire()
    except OSError as error:
        reason = error.strerror or error
        if error.errno in NO_LOCKS:
            raise StoreError(
                f"the file system of {path.parent} has no locks ({reason}), without which two processes may write the "
                "same files: choose a folder on another file system"
            ) from None
        raise StoreError(f"cannot write under {path.parent}: {reason}") from None
    try:
        if owner is not None:
            with _temporary(owner) as temporary:  # not synced: it says nothing after a power cut
                temporary.write_text(f"process {os.getpid()} on {platform.node()}\n")
                os.replace(temporary, owner)
        yield
    finally:
        if owner is not None:
            with contextlib.suppress(OSError):
                owner.unlink()
        lock.release()


def _owner(path: Path | None) -> str:
    said = ""
    if path:
        with contextlib.suppress(OSError, ValueError):  # it let go, or has not yet said who it is
            said = read_file(path, 1000).decode().strip()
    return said if said and said.isprintable() else "another process"


def _waiting(path: Path, holder: str) -> str:
    process = re.match("process ([0-9]+) on ", holder) if hasattr(signal, "SIGCONT") else None
    remedy = f"; if it is stopped, `kill -CONT {process[1]}` lets it go on" if process else ""
    return f"waiting for {holder}, which holds {path}{remedy}"
