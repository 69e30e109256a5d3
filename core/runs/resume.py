"""Resume points: all that a run needs to go on exactly, and the cases in which it must not go on.

A resume point holds the flat state of a run, {"opt/exp_avg/1.weight": tensor, ...}, and its history.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch
from torch import Tensor

from core.errors import UserError
from core.mode import COMPILED, Mode
from core.runs import checkpoint
from core.runs.checkpoint import CheckpointError, OtherVersion
from core.runs.provenance import difference
from core.runs.record import About, Epoch, Progress, ResumePoint, check_history
from core.runs.run import Run
from core.spec import canonical
from core.store import delete

KEEP = 2
REMEDY = "the rest would not be the same bits; --resume-anyway goes on all the same, --force starts anew"
NONE = -1.0  # stands for None in the history, which has no negative numbers
COLUMNS = Epoch.__struct_fields__  # of the history, which is a tensor: the header has no room for that of a long run


class ResumeError(UserError):
    """A run cannot go on exactly; the message says why."""


class Restored(NamedTuple):
    """The contents of a resume point.

    Attributes:
        mode: of the step with which the run goes on.
        inexact: what decides the bits and has changed since, in words; None if nothing.
    """

    step: int
    state: dict[str, Tensor]
    history: list[Epoch]
    progress: Progress
    mode: Mode
    inexact: str | None


class Pace:
    """Decides after which epochs resume points are written: every `every` epochs or, with None, after each epoch unless
    saving has taken more than SHARE of the time so far. It decides once for all runs of a cohort: they go on from a
    common step."""

    SHARE = 0.05
    LONGEST = 600.0  # seconds without a resume point; without this limit, a pause during a save would stop all saving

    def __init__(self, every: int | None) -> None:
        self.every, self.allowed = every, dict[int, bool]()
        self.started = self.last = time.perf_counter()
        self.saving = 0.0

    def allows(self, epoch: int) -> bool:
        """Whether a run is saved after this epoch."""
        if self.every is not None:
            return epoch % self.every == 0
        now = time.perf_counter()
        enough = self.saving <= self.SHARE * (now - self.started) or now - self.last > self.LONGEST
        return self.allowed.setdefault(epoch, enough)  # the first run of a cohort decides

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count the time of the block as saving."""
        started = time.perf_counter()
        yield
        self.last = time.perf_counter()
        self.saving += self.last - started


def save(run: Run, state: dict[str, Tensor], history: list[Epoch], about: ResumePoint) -> None:
    """Write a resume point of a flat state, and delete all but the newest two. Raises core.store.StoreError."""
    values = [[NONE if v is None else v for v in msgspec.structs.astuple(entry)] for entry in history]
    rows = torch.tensor(values, dtype=torch.float64)
    tensors = {**state, "history": rows.view(-1, len(COLUMNS))}
    checkpoint.save(run.resume_point(int(state["step"])), tensors, about)
    delete(*run.resume_points()[KEEP:])


def newest(
    run: Run,
    about: About,
    state: dict[str, Tensor],
    steps_per_epoch: int,
    exact: bool,
    on_damage: Callable[[str], None],
    last: int | None = None,
) -> Restored | None:
    """The newest resume point that is not damaged; None if there are no resume points.

    Args:
        about, state: of the run that is to go on; `state` is flat.
        exact: refuse to go on if the bits would differ from those of an uninterrupted run.
        on_damage: called with a sentence for each damaged resume point.
        last: ignore resume points after this step.

    Raises:
        ResumeError: it belongs to other data or to another version of this program; with `exact`, to another spec, or
            to a machine or software with other bits; or all resume points are damaged.
    """
    damaged = []
    for path in run.resume_points():
        if last is not None and step_of(path) > last:
            continue
        try:
            point = _load(path, about, state, steps_per_epoch)
        except OtherVersion as error:  # that version may still go on from it
            raise ResumeError(f"{error}; go on with that version, or start anew with --force") from None
        except CheckpointError as error:
            on_damage(f"{error}; looking for the one before")
            damaged.append(path)
            continue
        if point.inexact and exact:
            raise ResumeError(f"{path} was made with {point.inexact}: {REMEDY}")
        delete(*damaged)  # else `save` would count a damaged one among the two that it keeps
        return point
    if damaged:
        raise ResumeError(f"every resume point of {about.name} is damaged; --force starts anew")
    return None


def step_of(path: Path) -> int:
    """The step in the name of a resume point; -1 if there is none."""
    digits = path.name.split(".step-")[1].split(".")[0]
    return int(digits) if digits.isdecimal() and len(digits) <= 10 else -1


def _load(path: Path, about: About, state: dict[str, Tensor], steps_per_epoch: int) -> Restored:
    step = step_of(path)
    shape = step // steps_per_epoch, len(COLUMNS)
    shapes = {**checkpoint.shapes_of(state), "history": (shape, torch.float64)}
    tensors, saved = checkpoint.load(path, ResumePoint, lambda _: shapes)
    rows = tensors.pop("history").tolist()
    steps, timed = (step - 1) % steps_per_epoch + 1, saved.progress.timed  # of the epoch in progress
    loss, correct = tensors["metrics/loss"].item(), tensors["metrics/correct"].item()
    try:
        if int(tensors["step"]) != step or step > about.spec["epochs"] * steps_per_epoch:
            raise ValueError(f"it holds step {int(tensors['step'])}")
        if not (0 <= loss <= 1e300 and 0 <= correct <= steps * about.spec["batch_size"] and timed <= steps):
            raise ValueError(f"its sums are not those of {steps} steps")
        entries = [{k: None if v == NONE else v for k, v in zip(COLUMNS, row, strict=True)} for row in rows]
        history = msgspec.convert(entries, list[Epoch], strict=False)
        check_history(history, len(history), about.spec)
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    if saved.data != about.data:
        raise ResumeError(f"{path} was made with other data ({saved.data}, now {about.data}): --force starts anew")
    mode, now = Mode.parse(saved.environment.mode), about.environment
    if mode.kind == "eager" or Mode.parse(now.mode) == COMPILED:
        # An eager run can go on in any mode. Only compiling shows whether the patches can be applied.
        now = msgspec.structs.replace(now, mode=saved.environment.mode)
    changed = ["another spec"] if canonical(saved.spec) != canonical(about.spec) else []
    changed += filter(None, [difference(saved.environment, now)])
    return Restored(step, tensors, history, saved.progress, Mode.parse(now.mode), ", ".join(changed) or None)
