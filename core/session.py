"""One run from its spec to its record: the one door for the command line, a notebook, a sweep or another machine."""

import contextlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch

from core.compile import cache
from core.compile.device import emulates_bfloat16, pick_device
from core.compile.fused import CompileError
from core.data import loader
from core.data.cifar10 import DIRECTORY_HASH, Cifar10
from core.errors import UserError
from core.functional.tree import flatten
from core.runs import checkpoint, resume
from core.runs.files import Run
from core.runs.provenance import difference, environment
from core.runs.record import (
    About,
    Epoch,
    Failed,
    Finished,
    Metrics,
    Progress,
    Record,
    ResumePoint,
    Splits,
    Weights,
    check_name,
    read_record,
    write_record,
)
from core.runs.resume import KEEP, REMEDY, ResumeError
from core.runs.store import delete, reserve
from core.spec import Spec, resolve, spec_id
from core.train import Diverged, Event, Training, compile_ahead, fit

OnEvent = Callable[[Event], None]


class Interrupted(UserError):
    """A run was asked to stop; everything is saved, and the message says after which step."""


def prepare(device: str, load_data: Callable[[], Cifar10], first: Spec | None = None) -> tuple[Cifar10, torch.device]:
    """The data, on its device. While `load_data` reads it, the step of the spec `first` is being compiled already.

    Raises:
        core.compile.device.DeviceError: the device is not there. Whatever `load_data` raises.
    """
    found = pick_device(device)
    if found.type == "cpu" and first is not None:
        with contextlib.suppress(RuntimeError, MemoryError, OSError):  # the run will meet it again, and say it
            compile_ahead(first)
    return loader.place(load_data(), found), found


def run_experiment(
    name: str,
    spec: Spec,
    out: str | Path,
    data: Cifar10,
    device: str | torch.device = "auto",
    on_event: OnEvent = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
    *,
    compiled: bool = True,
    checkpoint_every: int = 1,
    force: bool = False,
    allow_inexact: bool = False,
) -> Record:
    """Train an experiment to its end, from wherever it was left, unless it is finished already.

    Args:
        name: of the experiment, a folder under `out`/checkpoints.
        spec: its spec; what is left out has its default.
        out: where checkpoints/NAME/ID.json (the record) and ID.safetensors (the weights) go.
        data: CIFAR-10; on `device` already, it is not copied.
        device: auto, cpu, cuda or mps.
        on_event: called with those of core.train.fit, and with
            notice {reason}: something is not as it should be, and the run goes on.
            resumed {step, epoch, different}: it goes on from there; `different` says why not bit for bit, or None.
        should_stop: asked between steps; the run then saves and raises Interrupted.
        compiled: fuse the step with torch.compile, or run it eager.
        checkpoint_every: epochs between resume points.
        force: train from the start. What is finished stays until it is replaced.
        allow_inexact: go on from a resume point even where the bits will differ; the record says so.

    Returns:
        The record, which is then on disk: Finished, or Failed where the run diverged or memory ran out.

    Raises:
        core.spec.SpecError: the spec cannot be run. core.compile.device.DeviceError: the device is not there.
        core.runs.store.Held: another process is at work on this run.
        core.runs.store.StoreError: files cannot be written or read.
        core.runs.resume.ResumeError: the run cannot go on bit for bit.
        Interrupted: `should_stop` said so.
    """
    check_name(name)
    spec = resolve(spec)
    device = pick_device(device) if isinstance(device, str) else device
    run = Run(Path(out), name, spec_id(spec))
    with run.lock():
        if force:
            delete(*run.resume_points())
        elif record := run.finished():
            return record
        session = Session(run, name, spec, loader.place(data, device), device, on_event, compiled)
        try:
            return session.train(should_stop, checkpoint_every, allow_inexact)
        except (Diverged, torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "memory" not in str(error):
                raise  # a CPU allocator raises a RuntimeError, and says only in its message what it is
            reason = str(error) if isinstance(error, Diverged) else f"out of memory on {device}"
            return session.fail(reason)


class Session:
    """One run under its lock: it listens to `fit`, and keeps what happens in files."""

    def __init__(
        self,
        run: Run,
        name: str,
        spec: Spec,
        data: Cifar10,
        device: torch.device,
        on_event: OnEvent,
        compiled: bool,
    ) -> None:
        self.started = time.perf_counter()
        self.run, self.name, self.spec, self.on_event = run, name, spec, on_event
        self.data, self.device = data, device
        self.environment = environment(device, "compiled" if compiled else "eager", spec["precision"])
        self.history: list[Epoch] = []
        self.progress = Progress()

    def about(self) -> dict[str, Any]:
        """What every file of the run says of it."""
        return {
            "name": self.name,
            "spec": self.spec,
            "spec_id": self.run.spec_id,
            "seed": self.spec["seed"],
            "data": DIRECTORY_HASH,
            "environment": self.environment,
        }

    def train(self, should_stop: Callable[[], bool], checkpoint_every: int, allow_inexact: bool) -> Finished:
        training = Training(self.spec, self.data, self.device, self.environment.mode != "eager")
        if self.spec["precision"] == "bfloat16" and emulates_bfloat16(self.device):
            reason = "this CPU has neither AVX512_BF16 nor AMX and emulates bfloat16: float32 is faster here"
            self.on_event(Event("notice", {"reason": reason}))
        resumed = self.restore(training, allow_inexact)
        size = sum(t.nbytes for t in flatten(training.state).values())
        reserve(self.run.resume_point(training.total), size, max(1, KEEP + 1 - len(self.run.resume_points())))
        saved = training.step
        try:
            for kind, details in fit(training, should_stop, may_change_mode=allow_inexact or not resumed):
                due = False
                if kind == "mode":
                    self.environment = msgspec.structs.replace(self.environment, mode=details["mode"])
                    self.progress.bitwise &= not resumed
                elif kind == "first_step":
                    self.progress.first_step_seconds = self.progress.first_step_seconds or round(
                        time.perf_counter() - self.started, 3
                    )
                    if training.mode != "eager" and (problem := cache.problem()):
                        self.on_event(Event("notice", {"reason": problem}))
                elif kind == "epoch":
                    self.history.append(Epoch(**details))
                    due = len(self.history) % checkpoint_every == 0 or training.step == training.total
                if due or (kind == "stopped" and training.step > saved):
                    self.save(training)
                    saved = training.step
                self.on_event(Event(kind, details))
                if kind == "stopped":
                    where = f"after step {training.step} of {training.total}, which is saved"
                    raise Interrupted(f"{self.name} stopped {where if training.step else 'before its first step'}")
        except CompileError as error:
            raise ResumeError(f"{error}; {REMEDY}") from None
        return self.finish(training)

    def restore(self, training: Training, allow_inexact: bool) -> bool:
        """Put a training where the newest good resume point is; returns whether there is one."""
        state = flatten(training.state)
        point = resume.newest(
            self.run,
            About(**self.about()),
            state,
            training.steps_per_epoch,
            allow_inexact,
            lambda reason: self.on_event(Event("notice", {"reason": reason})),
        )
        if point is None:
            return False
        for name, value in state.items():
            value.copy_(point.state[name])
        training.step, training.mode = point.step, point.mode
        training.seconds, training.timed = point.progress.seconds, point.progress.timed
        self.history, self.progress = point.history, point.progress
        self.environment = msgspec.structs.replace(self.environment, mode=point.mode)
        self.progress.bitwise &= not point.different
        details = {"step": point.step, "epoch": training.epoch_of(point.step), "different": point.different}
        self.on_event(Event("resumed", details))
        return True

    def save(self, training: Training) -> None:
        training.check_finite()
        self.progress.seconds, self.progress.timed = training.seconds, training.timed
        about = ResumePoint(**self.about(), progress=self.progress)
        resume.save(self.run, flatten(training.state), self.history, about)

    def finish(self, training: Training) -> Finished:
        """Evaluate on all splits, write weights and record, delete the resume points."""
        # All in evaluation mode, unlike the train numbers of the history. Here the test split is read, once.
        metrics = {split: training.evaluate(split) for split in training.splits}
        training.check_finite({f"{split} loss": torch.tensor(m["loss"]) for split, m in metrics.items()})
        splits = Splits(**{split: Metrics(**found) for split, found in metrics.items()})
        digest = checkpoint.digest(training.weights)
        weights = Weights(**self.about(), digest=digest, test=splits.test)
        checkpoint.save(self.run.weights, training.weights, weights)
        record = Finished(
            **self.about(),
            parameters=sum(p.numel() for p in training.state["params"].values()),
            history=self.history,
            first_step_seconds=self.progress.first_step_seconds,
            metrics=splits,
            digest=digest,
            bitwise=self.progress.bitwise,
        )
        write_record(self.run.record, record)
        delete(*self.run.resume_points())
        return record

    def fail(self, reason: str) -> Failed:
        """Leave the record of a run that failed. The result that it had another time stays."""
        record = Failed(**self.about(), error=reason)
        if not self.run.result():
            write_record(self.run.record, record)
        return record


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


def verify(name: str, spec: Spec, out: str | Path, *arguments: Any, compiled: bool = True) -> Verification:
    """Train a finished run again, in a temporary folder, and compare the bits with its record under `out`.

    Args:
        arguments: data, device, on_event and should_stop, as `run_experiment` takes them.

    Raises:
        core.errors.UserError: there is no finished run. Whatever `run_experiment` raises.
    """
    recorded = read_finished(name, spec, out)
    with tempfile.TemporaryDirectory() as elsewhere:
        compiled = compiled and recorded.environment.mode != "eager"
        again = run_experiment(name, spec, elsewhere, *arguments, compiled=compiled, checkpoint_every=10**9)
    if not isinstance(again, Finished):
        return Verification(recorded, again, False, None)
    reason = difference(recorded.environment, again.environment)
    reason = reason if recorded.bitwise else "been resumed with --resume-anyway"
    return Verification(recorded, again, recorded.digest == again.digest, reason)


def read_finished(name: str, spec: Spec, out: str | Path) -> Finished:
    """The record of a finished run; UserError where there is none."""
    path = Run(Path(out), name, spec_id(resolve(spec))).record
    record = read_record(path) if path.exists() else None
    if not isinstance(record, Finished):
        raise UserError(f"{name} has no finished run under {out}; `uv run main.py run {name}` trains it")
    return record
