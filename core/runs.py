"""What runs leave on disk.

A run of an experiment NAME whose spec has the id ID owns checkpoints/NAME/ID.*: ID.safetensors (weights), ID.json (the
record), and while it is under way ID.step-N.safetensors (resume points), ID.lock and ID.owner.
"""

import contextlib
import json
import re
from pathlib import Path
from typing import Any

from core.store import Held, StoreError, locked, reserve, sweep


class Run:
    """The files of one run."""

    def __init__(self, out: Path, name: str, spec_id: str) -> None:
        self.folder = out / "checkpoints" / name
        self.spec_id = spec_id
        self.weights = self.folder / f"{spec_id}.safetensors"
        self.record = self.folder / f"{spec_id}.json"

    def lock(self):
        """The run for this process alone. Raises Held if another has it for longer than a sweep takes."""
        return locked(self.folder / f"{self.spec_id}.lock", self.folder / f"{self.spec_id}.owner", timeout=1)

    def resume_point(self, step: int) -> Path:
        return self.folder / f"{self.spec_id}.step-{step:010d}.safetensors"

    def resume_points(self) -> list[Path]:
        """The newest first."""
        return sorted(self.folder.glob(f"{self.spec_id}.step-*.safetensors"), reverse=True)

    def result(self) -> dict[str, Any] | None:
        """The record of a finished run, if its weights are there too.

        Raises:
            StoreError: there is a record, but damaged.
        """
        record = read_record(self.record) if self.record.exists() and self.weights.exists() else None
        return record if record and record["status"] == "finished" else None

    def finished(self) -> dict[str, Any] | None:
        """The result, unless the run is being trained again."""
        return None if self.resume_points() else self.result()


def sweep_all(out: Path) -> None:
    """Delete the temporary files that killed processes left under `out`, but for runs that another process is at work
    on.

    Raises:
        StoreError: `out` cannot be written.
    """
    with locked(out / "checkpoints" / "results.lock"):
        reserve(out / "results.md", 1, 1)
        sweep(out, "results.md")
        sweep(out / "checkpoints", "learning-curves")
    left = (out / "checkpoints").glob("*/*.tmp")
    for folder, run_id in sorted({(path.parent, path.name.split(".")[0]) for path in left}):
        with contextlib.suppress(Held), locked(folder / f"{run_id}.lock", timeout=0):
            sweep(folder, f"{run_id}.")


# What a record must hold for others to rely on: a type, a dict of such keys, or a list of one such item or more.
METRICS = {"accuracy": float, "loss": float, "n": int, "correct": [int], "count": [int]}
ALWAYS: dict[str, Any] = {
    "name": str,
    "spec": {"widths": list, "norm": str, "activation": str, "lr": float, "epochs": int, "batch_size": int},
    "spec_id": str,
    "seed": int,
    "data": str,
    "environment": dict.fromkeys(("torch", "device", "hardware", "mode", "device_name", "python", "git"), str)
    | {"threads": int},
}
FINISHED = {
    "metrics": dict.fromkeys(("train", "validation", "test"), METRICS),
    "history": [
        dict.fromkeys(("train_loss", "train_accuracy", "val_loss", "val_accuracy", "seconds"), float)
        | {"epoch": int, "samples_per_second": int}
    ],
    "parameters": int,
    "digest": str,
    "bitwise": bool,
    "first_step_seconds": float,
}


def check(value: Any, expected: Any, where: str = "") -> None:
    """Raise ValueError where a value of JSON is not as expected: see METRICS."""
    if isinstance(expected, dict) and isinstance(value, dict):
        for key, inner in expected.items():
            if key not in value:
                raise ValueError(f"it lacks {where}{key}")
            check(value[key], inner, f"{where}{key}.")
    elif isinstance(expected, list) and isinstance(value, list) and value:
        for item in value:
            check(item, expected[0], where)
    elif expected is float and type(value) is int:
        pass
    elif type(value) is not expected:
        raise ValueError(f"{where[:-1]} is {str(value)[:40]}")


def read_record(path: Path) -> dict[str, Any]:
    """The record in a file.

    Raises:
        StoreError: it cannot be read or is not a record.
    """

    def not_a_number(constant: str) -> Any:
        raise ValueError(f"it holds {constant}")

    try:
        record = json.loads(path.read_bytes(), parse_constant=not_a_number)
        check(record, ALWAYS | (FINISHED if record["status"] == "finished" else {"error": str}))
        for metrics in record.get("metrics", {}).values():
            if not (0 <= metrics["accuracy"] <= 1 and metrics["n"] > 0):
                raise ValueError(f"accuracy is {metrics['accuracy']} of {metrics['n']}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = str(error)[:200]
        raise StoreError(f"{path} is damaged or not a record ({reason}); delete it and run that experiment") from None
    return record


def records(out: Path) -> list[dict[str, Any]]:
    """Every record under `out`, in the order of their paths; a damaged one raises StoreError."""
    paths = sorted((out / "checkpoints").glob("*/*.json"))
    return [read_record(path) for path in paths if re.fullmatch(r"[0-9a-f]{12}\.json", path.name)]
