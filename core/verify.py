"""Trains a finished run again, to compare the bits."""

import dataclasses
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from core.data.identity import data_identity
from core.data.tensors import Data
from core.errors import UserError
from core.events import Listener, Stopped
from core.mode import Mode
from core.runs.provenance import difference
from core.runs.record import Finished, Record
from core.runs.run import OtherData, Run
from core.session import run_cohort


class Verification(NamedTuple):
    """A finished run beside the same run trained again.

    Attributes:
        recorded, again: the two records; the second may be that of a failure.
        same: whether the bits of the weights are the same.
        reason: a known reason for different bits, in words; None if there is none.
    """

    run: Run
    recorded: Finished
    again: Record
    same: bool
    reason: str | None


def verify(
    run: Run,
    data: Data,
    device: str | torch.device = "auto",
    listeners: Iterable[Listener] = (),
    should_stop: Callable[[], bool] = lambda: False,
    compiled: bool = True,
) -> Verification | Stopped:
    """Train a finished run again, in a temporary folder, and compare the bits with its record. Eager runs stay eager.

    Raises:
        core.errors.UserError: as `check_finished`. Whatever `run_cohort` raises.
    """
    recorded = check_finished(run, data_identity(data))
    compiled = compiled and Mode.parse(recorded.environment.mode).kind != "eager"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        copy = dataclasses.replace(run, out=Path(folder))
        [again] = run_cohort([copy], data, device, listeners, should_stop, compiled=compiled, checkpoint_every=10**9)
    if isinstance(again, Stopped):
        return again
    if not isinstance(again, Finished):
        return Verification(run, recorded, again, False, None)
    reason = difference(recorded.environment, again.environment)
    if not recorded.exact:
        reason = "been resumed, and not exactly"
    return Verification(run, recorded, again, recorded.digest == again.digest, reason)


def check_finished(run: Run, data: str | None) -> Finished:
    """The record of a run that is finished, can be trained again alone, and had data of this identity (None: any).

    Raises:
        core.errors.UserError: it is not, cannot, or had not.
    """
    record = run.read()
    if not isinstance(record, Finished):
        train = f"`uv run main.py run {run.name}`, with the same options, trains it"
        raise UserError(f"{run.name} has no finished run under {run.out}; {train}")
    if data is not None and record.data != data:
        raise OtherData(f"{run.name} was trained with other data ({record.data}, now {data}): it cannot be verified")
    if Mode.parse(record.environment.mode).cohort > 1:
        raise UserError(f"{run.name} was trained in a cohort, whose bits no run alone has: it cannot be verified")
    return record
