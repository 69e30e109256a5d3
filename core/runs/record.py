"""The record of a run: what it must hold to be read."""

import json
import re
from pathlib import Path
from typing import Any

from core.runs.store import StoreError

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
