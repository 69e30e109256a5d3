"""What runs leave on disk, so that it survives anything: atomic writes, one lock a run, records, resume points.

A run of an experiment NAME whose spec has the id ID owns checkpoints/NAME/ID.*: ID.safetensors (weights), ID.json (the
record), and while it is under way ID.step-N.safetensors (resume points), ID.lock and ID.owner.
"""

import contextlib
import errno
import json
import os
import platform
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


class StoreError(Exception):
    """Something cannot be written or read; the message is one sentence with the path."""


class Held(Exception):
    """Another process is at work on this run; the message says which."""


def atomic_write(path: Path, data: bytes) -> None:
    """Replace a file by `data`, or leave it exactly as it was: written beside it, fsynced, renamed, the folder fsynced.

    Raises:
        StoreError: it cannot be written (no space, no permission); nothing is left behind.
    """
    with _temporary(path) as temporary:
        with open(temporary, "wb") as file:
            file.write(data)
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
        free = shutil.disk_usage(path.parent).free
        if free < copies * size:
            raise OSError(errno.ENOSPC, f"{copies * size:,} bytes are needed for resume points, {free:,} are free")
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
    delete(*folder.glob(f"{prefix}*.tmp"))


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


class Run:
    """The files of one run."""

    def __init__(self, out: Path, name: str, spec_id: str) -> None:
        self.folder = out / "checkpoints" / name
        self.spec_id = spec_id
        self.weights = self.folder / f"{spec_id}.safetensors"
        self.record = self.folder / f"{spec_id}.json"

    def lock(self):
        """The run for this process alone. Raises Held at once if another has it."""
        return locked(self.folder / f"{self.spec_id}.lock", self.folder / f"{self.spec_id}.owner", timeout=0)

    def resume_point(self, step: int) -> Path:
        return self.folder / f"{self.spec_id}.step-{step:010d}.safetensors"

    def resume_points(self) -> list[Path]:
        """The newest first."""
        return sorted(self.folder.glob(f"{self.spec_id}.step-*.safetensors"), reverse=True)

    def clear(self) -> None:
        """Delete all that the run has, so that it starts anew; its lock is held."""
        delete(self.record, self.weights, *self.resume_points())

    def finished(self) -> dict[str, Any] | None:
        """The record of the finished run, if there is one and its weights are there too.

        Raises:
            StoreError: there is a record, but damaged.
        """
        record = read_record(self.record) if self.record.exists() and self.weights.exists() else None
        return record if record and record["status"] == "finished" else None


def sweep_all(out: Path) -> None:
    """Delete what killed processes left under `out`: temporary files, and resume points of finished runs.

    A run that another process is at work on is left alone.

    Raises:
        StoreError: `out` cannot be written.
    """
    with locked(out / "checkpoints" / "results.lock"):
        sweep(out, "results.md")
        sweep(out / "checkpoints", "learning-curves")
    left = [p for p in (out / "checkpoints").glob("*/*") if p.suffix == ".tmp" or ".step-" in p.name]
    for folder, run_id in sorted({(path.parent, path.name.split(".")[0]) for path in left}):
        run = Run(out, folder.name, run_id)
        with contextlib.suppress(Held), run.lock():
            sweep(folder, f"{run_id}.")
            if run.finished():
                delete(*run.resume_points())


# What every record holds, and what that of a finished run holds besides.
ALWAYS = {"name", "spec", "spec_id", "status", "seed", "environment"}
FINISHED = {"metrics", "history", "parameters", "digest", "bitwise", "first_step_seconds"}


def read_record(path: Path) -> dict[str, Any]:
    """The record in a file.

    Raises:
        StoreError: it cannot be read or is not a record.
    """
    try:
        record = json.loads(path.read_bytes())
        expected = ALWAYS | (FINISHED if record["status"] == "finished" else {"error"})
        if not expected <= record.keys():
            raise ValueError(f"it lacks {', '.join(sorted(expected - record.keys()))}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = str(error)[:200]
        raise StoreError(f"{path} is damaged or not a record ({reason}); delete it and run that experiment") from None
    return record


def records(out: Path) -> list[dict[str, Any]]:
    """Every record under `out`, in the order of their paths; a damaged one raises StoreError."""
    paths = sorted((out / "checkpoints").glob("*/*.json"))
    return [read_record(path) for path in paths if re.fullmatch(r"[0-9a-f]{12}\.json", path.name)]
