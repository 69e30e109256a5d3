"""A finished run made again, to compare the bits."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from core.data.cifar10 import Cifar10
from core.data.identity import data_identity
from core.errors import UserError
from core.mode import Mode
from core.runs.files import OtherData, Run
from core.runs.provenance import difference
from core.runs.record import Finished, Record
from core.session import Interrupted, run_experiment
from core.spec import Spec, resolve, spec_id


class Verification(NamedTuple):
    """A finished run beside the same run made again.

    Attributes:
        recorded, again: the two records; the second may be that of a failure.
        same: whether the bits of the weights are the same.
        reason: what explains that they differ, in words; None where nothing does.
    """

    recorded: Finished
    again: Record
    same: bool
    reason: str | None


def verify(
    name: str,
    spec: Spec,
    out: str | Path,
    data: Cifar10,
    *arguments: Any,
    compiled: bool = True,
    former: Mapping[str, str] = {},
) -> Verification:
    """Train a finished run again, in a temporary folder, and compare the bits with its record under `out`.

    Args:
        arguments: device, on_event and should_stop, as `run_experiment` takes them.
        former: old names of experiments, with the new names.

    Raises:
        core.errors.UserError: there is no finished run, it had other data, or it was in a cohort. Whatever
            `run_experiment` raises.
    """
    recorded = read_finished(name, spec, out, data_identity(data), former)
    with tempfile.TemporaryDirectory() as elsewhere:
        compiled = compiled and Mode.parse(recorded.environment.mode).kind != "eager"
        try:
            again = run_experiment(name, spec, elsewhere, data, *arguments, compiled=compiled, checkpoint_every=10**9)
        except Interrupted:
            raise Interrupted(f"the verification of {name} was stopped and has kept nothing") from None
    if not isinstance(again, Finished):
        return Verification(recorded, again, False, None)
    reason = difference(recorded.environment, again.environment)
    reason = reason if recorded.bitwise else "gone on from a resume point with other bits"
    return Verification(recorded, again, recorded.digest == again.digest, reason)


def read_finished(name: str, spec: Spec, out: str | Path, data: str, former: Mapping[str, str] = {}) -> Finished:
    """The record of a finished run that can be made again alone, with data of this identity; UserError where there is
    none."""
    record = Run(out, name, spec_id(resolve(spec)), former).read()
    if not isinstance(record, Finished):
        train = f"`uv run main.py run {name}`, with the same options, trains it"
        raise UserError(f"{name} has no finished run under {out}; {train}")
    if record.data != data:
        raise OtherData(f"{name} was trained with other data ({record.data}, now {data}): it cannot be verified")
    if Mode.parse(record.environment.mode).cohort > 1:
        raise UserError(f"{name} was trained in a cohort, whose bits no run alone has: it cannot be verified")
    return record
