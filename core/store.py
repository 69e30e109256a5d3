"""What runs leave on disk, so that it survives anything: atomic writes, one lock a run, records, resume points.

A run of an experiment NAME whose spec has the id ID owns checkpoints/NAME/ID.*: ID.safetensors (weights), ID.json (the
record), and while it is under way ID.step-N.safetensors (resume points), ID.lock and ID.owner.
"""

import contextlib
import json
import os
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
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
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
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise StoreError(f"cannot write {path}: {error.strerror or error}") from None


def write_json(path: Path, value: Any) -> None:
    """Write a record, readable and with sorted keys; raises as atomic_write does."""
    atomic_write(path, (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())


def sweep(folder: Path, prefix: str) -> None:
    """Delete temporary files that a killed process left; call it with the lock that guards `prefix` held."""
    for path in folder.glob(f"{prefix}*.tmp"):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path, owner: Path | None = None, timeout: float = -1) -> Iterator[None]:
    """Hold an operating-system lock, which the death of its process frees.

    Args:
        owner: where to say who holds it. timeout: seconds to wait, -1 without end.

    Raises:
        Held: it was not had in time. StoreError: the lock file cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        lock.acquire(timeout=timeout)
    except Timeout:
        who = owner.read_text().strip() if owner is not None and owner.exists() else "another process"
        raise Held(who) from None
    except OSError as error:
        raise StoreError(f"cannot write under {path.parent}: {error.strerror or error}") from None
    try:
        if owner is not None:
            owner.write_text(f"process {os.getpid()} on {os.uname().nodename}\n")
        yield
    finally:
        if owner is not None:
            owner.unlink(missing_ok=True)
        lock.release()


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
        return self.folder / f"{self.spec_id}.step-{step:08d}.safetensors"

    def resume_points(self) -> list[Path]:
        """The newest first."""
        return sorted(self.folder.glob(f"{self.spec_id}.step-*.safetensors"), reverse=True)

    def clean(self, anew: bool) -> None:
        """Delete what a killed process left, and with `anew` all that the run has; its lock is held."""
        sweep(self.folder, self.spec_id)
        if anew:
            for path in [self.record, self.weights, *self.resume_points()]:
                path.unlink(missing_ok=True)

    def finished(self) -> dict[str, Any] | None:
        """The record of the finished run, if there is one and its weights are there too."""
        record = read_record(self.record) if self.record.exists() and self.weights.exists() else None
        return record if record and record.get("status") == "finished" else None


def read_record(path: Path) -> dict[str, Any] | None:
    """A record, or None where the file is not one."""
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and {"name", "spec", "spec_id", "status"} <= record.keys() else None


def records(out: Path) -> list[dict[str, Any]]:
    """Every record under `out`, in the order of their paths."""
    found = (read_record(path) for path in sorted((out / "checkpoints").glob("*/*.json")))
    return [record for record in found if record]
