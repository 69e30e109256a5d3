"""Files: read with a limit, written completely or not at all, under locks that end with their process."""

import contextlib
import errno
import functools
import logging
import os
import platform
import re
import shutil
import signal
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from filelock import FileLock, Timeout

from core.errors import UserError

PATIENCE = 1.0  # seconds to wait for a lock before a warning names its holder, or for a file that is open elsewhere
OPEN_ELSEWHERE = (5, 32, 33)  # of Windows: ERROR_ACCESS_DENIED, ERROR_SHARING_VIOLATION, ERROR_LOCK_VIOLATION
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)
# What file systems answer that cannot sync a folder, or reserve room.
NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)
NO_RESERVE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)

NONBLOCK = getattr(os, "O_NONBLOCK", 0)  # Windows has neither this nor pipes in folders

log = logging.getLogger(__name__)


class StoreError(UserError):
    """A file or folder cannot be written or read; the message names it."""


class Held(UserError):
    """Another process holds the lock; the message names that process."""


class Leftover(NamedTuple):
    """Files or a folder that nothing needs.

    Attributes:
        reason: Why, in a few words.
        lock: A process that uses the files holds this lock; they are deleted under it.
    """

    paths: Sequence[Path]
    reason: str
    lock: Path


@contextlib.contextmanager
def open_file(path: Path, limit: int) -> Iterator[IO[bytes]]:
    """Open a regular file of at most `limit` bytes, to read it.

    Raises:
        OSError: It cannot be opened. ValueError: It is no regular file, or larger.
    """
    # A pipe would wait for a writer.
    with open(path, "rb", opener=lambda path, flags: os.open(path, flags | NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        if status.st_size > limit:
            raise ValueError(f"it has {status.st_size:,} bytes, expected at most {limit:,}")
        yield file


def read_file(path: Path, limit: int) -> bytes:
    """The bytes of a regular file; raises as `open_file` does, before it reads."""
    with open_file(path, limit) as file:
        return file.read()


def atomic_write(path: Path, *parts: bytes | memoryview, check: Callable[[Path], None] = lambda written: None) -> None:
    """Make `parts` the content of a file, or leave the file as it was. They are written beside it and synced; then the
    new file takes the name of the old one.

    Args:
        check: Called with the path of the new file. If it raises an error, the old file stays.

    Raises:
        StoreError: It cannot be written (no space, no permission); nothing is left behind.
    """
    with _temporary(path) as temporary:
        with open(temporary, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        check(temporary)
        replace(temporary, path)
        _sync_folder(path.parent)


def replace(source: Path, target: Path) -> None:
    """Give a file the name of another, which it replaces. Raises OSError."""
    _until_closed(lambda: os.replace(source, target))


def _until_closed(call: Callable[[], None]) -> None:
    """Replace or delete a file. Windows refuses that while a program has the file open, and a virus scanner opens every
    new file for a moment: it is tried again until PATIENCE is over."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            return call()
        except PermissionError as error:
            if getattr(error, "winerror", None) not in OPEN_ELSEWHERE:
                raise
            if time.monotonic() > end:
                reason = "another program has it open, or it is read-only"
                raise PermissionError(errno.EACCES, reason) from None
        time.sleep(0.02)


def _sync_folder(path: Path) -> None:
    """Make the new name of a file survive a power cut, where folders can be opened: on Windows they cannot."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        with _unless(NO_SYNC):
            os.fsync(folder)
    finally:
        os.close(folder)


def reserve(path: Path, size: int, count: int) -> None:
    """Check, before the work starts, that `count` files of `size` bytes can be written at `path`.

    Raises:
        StoreError: There is no room, or no permission; nothing is left behind.
    """
    with _temporary(path) as temporary:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "Is a directory")
        if _is_protected(path):
            raise PermissionError(errno.EPERM, "it belongs to another user, in a folder with the sticky bit")
        free = shutil.disk_usage(path.parent).free
        if free < count * size:
            raise OSError(errno.ENOSPC, f"{count * size:,} bytes are needed, {free:,} are free")
        # The free space takes no account of a quota, or of a limit on the size of files.
        with open(temporary, "wb") as file, _unless(NO_RESERVE):
            getattr(os, "posix_fallocate", lambda *_: None)(file.fileno(), 0, size)


def _is_protected(path: Path) -> bool:
    """Whether only its owner may replace a file: its folder has the sticky bit, as /tmp has."""
    if not path.exists() or not hasattr(os, "geteuid"):
        return False
    folder = path.parent.stat()
    return bool(folder.st_mode & stat.S_ISVTX) and os.geteuid() not in (0, folder.st_uid, path.lstat().st_uid)


@contextlib.contextmanager
def _unless(codes: tuple[int, ...]) -> Iterator[None]:
    """Ignore an OSError with one of these codes."""
    try:
        yield
    except OSError as error:
        if error.errno not in codes:
            raise


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A path beside `path`, removed afterwards; an OSError becomes a StoreError that names `path`."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            _until_closed(temporary.unlink)


def local(path: str | Path) -> Path:
    """The path that a user means: ~ at its start is a home folder."""
    return Path(os.path.expanduser(path))


def delete(*paths: Path) -> None:
    """Delete those of the files that exist; StoreError if one cannot be deleted."""
    for path in paths:
        try:
            _until_closed(functools.partial(path.unlink, missing_ok=True))
        except OSError as error:
            raise StoreError(f"cannot delete {path}: {error.strerror or error}") from None


def sweep(folder: Path, prefix: str) -> None:
    """Delete the temporary files of killed processes; the caller holds the lock that guards `prefix`."""
    delete(*folder.glob(f"{prefix}*.[0-9]*.tmp"))


@contextlib.contextmanager
def locked(path: Path, owner: Path | None = None, timeout: float = -1) -> Iterator[None]:
    """Hold a lock of the operating system; the end of the process frees it.

    Args:
        owner: A file that names the holder. If the lock is not free after PATIENCE, a warning names the holder.
        timeout: Seconds to wait; -1 waits without end.

    Raises:
        Held: The time is over. StoreError: The lock file cannot be made, or its file system has no locks.
    """
    # Without locks of the file system FileLock would use a plain file, which two processes can hold at once.
    lock = FileLock(path, fallback_to_soft=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=PATIENCE if timeout < 0 and owner else timeout)
        except Timeout:
            if timeout >= 0:
                raise Held(_holder(owner)) from None
            log.warning("%s", _waiting(path, _holder(owner)))
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
            with _temporary(owner) as temporary:  # It is not synced: after a power cut nobody holds the lock.
                temporary.write_text(f"process {os.getpid()} on {platform.node()}\n", encoding="utf-8")
                replace(temporary, owner)
        yield
    finally:
        if owner is not None:
            with contextlib.suppress(OSError):
                _until_closed(owner.unlink)
        lock.release()


def _holder(owner: Path | None) -> str:
    text = ""
    if owner:
        with contextlib.suppress(OSError, ValueError):  # The holder has let go, or has not yet written its name.
            text = read_file(owner, 1000).decode().strip()
    return text if text and text.isprintable() else "another process"


def _waiting(path: Path, holder: str) -> str:
    process = re.match("process ([0-9]+) on ", holder) if hasattr(signal, "SIGCONT") else None
    remedy = f"; if it is stopped, `kill -CONT {process[1]}` lets it go on" if process else ""
    return f"waiting for {holder}, which holds {path}{remedy}"
