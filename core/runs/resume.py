"""Resume points: all that a run needs to go on bit by bit, and the refusal to go on otherwise."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core.runs import checkpoint
from core.runs.checkpoint import CheckpointError
from core.runs.files import Run
from core.runs.provenance import difference
from core.runs.record import check
from core.runs.store import delete
from core.spec import canonical

KEEP = 2
REMEDY = "the rest would not be the same bits; go on all the same with --resume-anyway, or start anew with --force"
# What an epoch leaves in the history. It is kept as a tensor, so that the header stays small in a run of many epochs.
COLUMNS = {
    "epoch": int,
    "train_loss": float,
    "train_accuracy": float,
    "val_loss": float,
    "val_accuracy": float,
    "seconds": float,  # of the steps, without the one that compiles
    "samples_per_second": int,
}
History = list[dict[str, Any]]
# What a resume point carries besides. `seconds` and `timed` (steps) belong to the epoch under way.
PROGRESS = {"seconds": float, "timed": int, "first_step_seconds": float, "bitwise": bool}


class ResumeError(Exception):
    """A resume point cannot be gone on from bit by bit; the message says why."""


class Point(NamedTuple):
    """Where a run was left, and the mode in which it goes on. `different` says what decides the bits and has changed
    since."""

    step: int
    state: dict[str, Tensor]
    history: History
    progress: dict[str, Any]
    mode: str
    different: str | None


def save(run: Run, state: dict[str, Tensor], history: History, meta: dict[str, Any]) -> None:
    """Write the resume point of a flat state, and delete all but the newest two; raises core.runs.store.StoreError."""
    rows = torch.tensor([[entry[key] for key in COLUMNS] for entry in history], dtype=torch.float64)
    tensors = {**state, "history": rows.view(-1, len(COLUMNS))}
    checkpoint.save(run.resume_point(int(state["step"])), tensors, meta)
    delete(*run.resume_points()[KEEP:])


def newest(
    run: Run,
    meta: dict[str, Any],
    state: dict[str, Tensor],
    steps_per_epoch: int,
    loosely: bool,
    listen: Callable[[str, dict[str, Any]], None],
) -> Point | None:
    """The newest good resume point, if there are any.

    Args:
        meta, state: those of the run that wants to go on, as `save` took them.
        loosely: go on even where the bits will differ.
        listen: called with the event damaged for each one that is.

    Raises:
        ResumeError: it belongs to another spec, other data, or a machine or software whose bits differ, unless
            `loosely`; or all of them are damaged.
    """
    bad = []
    for path in run.resume_points():
        try:
            point = _load(path, meta, state, steps_per_epoch)
        except CheckpointError as error:
            listen("damaged", {"reason": f"{error}; looking for the one before"})
            bad.append(path)
            continue
        if point.different and not loosely:
            raise ResumeError(f"{path} was made with {point.different}: {REMEDY}")
        delete(*bad)  # so that the two that are kept are good
        return point
    if bad:
        raise ResumeError(f"every resume point of {meta['name']} is damaged; start anew with --force")
    return None


def _load(path: Path, meta: dict[str, Any], state: dict[str, Tensor], steps_per_epoch: int) -> Point:
    step = -1

    def template(found: dict[str, Any]) -> checkpoint.Shapes:
        nonlocal step
        check(found, {"spec": dict, "data": str, "environment": {"mode": str}, "progress": PROGRESS})
        step = int(path.name.split(".step-")[1].split(".")[0])
        rows = step // steps_per_epoch, len(COLUMNS)
        return {**checkpoint.shapes_of(state), "history": (rows, torch.float64)}

    tensors, found = checkpoint.load(path, template)
    if int(tensors["step"]) != step:
        raise CheckpointError(f"{path} holds step {int(tensors['step'])}")
    rows = tensors.pop("history").tolist()
    history = [{key: kind(x) for (key, kind), x in zip(COLUMNS.items(), row, strict=True)} for row in rows]
    now = meta["environment"]
    if found["environment"]["mode"] == "eager":  # which can be gone on with anywhere, as where compiling had failed
        now = {**now, "mode": "eager"}
    changed = [f"another {key}" for key in ("spec", "data") if canonical(found[key]) != canonical(meta[key])]
    changed += filter(None, [difference(found["environment"], now)])
    return Point(step, tensors, history, found["progress"], now["mode"], ", ".join(changed) or None)
