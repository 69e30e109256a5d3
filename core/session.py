"""One run from its spec to its record: the one door for the command line, a notebook, a sweep or another machine."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import msgspec
import torch

from core.compile import cache
from core.compile.device import emulates_bfloat16, pick_device
from core.compile.fused import CompileError
from core.compile.isolation import check_threads, isolated
from core.data import identity, loader
from core.data.cifar10 import Cifar10
from core.errors import UserError
from core.functional import step
from core.functional.tree import flatten
from core.mode import Mode
from core.runs import checkpoint, resume
from core.runs.checkout import keep_diff
from core.runs.files import Run
from core.runs.provenance import environment
from core.runs.record import (
    UNSET,
    About,
    Answers,
    Epoch,
    Failed,
    Finished,
    Flipped,
    Metrics,
    Progress,
    Record,
    ResumePoint,
    Splits,
    Weights,
    check_name,
    write_record,
)
from core.runs.resume import KEEP, REMEDY, ResumeError
from core.spec import Spec, SpecError, reads_bfloat16, resolve, spec_id, static_key
from core.store import delete, reserve
from core.train import Diverged, Event, Training, fit

OnEvent = Callable[[Event], None]


class TooLarge(UserError):
    """There is not enough memory for these runs together; one by one they may have it."""


class ForkError(UserError):
    """This process is a fork of one that has used a GPU, or gradients beside one; the message says what to do."""


class Interrupted(UserError):
    """A run was asked to stop; everything is saved, and the message says after which step."""


def prepare(device: str, load_data: Callable[[], Cifar10]) -> tuple[Cifar10, torch.device]:
    """The data, on its device.

    Raises:
        core.compile.device.DeviceError: the device is not there. Whatever `load_data` raises.
    """
    found = pick_device(device)
    return loader.place(load_data(), found), found


def run_experiment(
    name: str,
    spec: Spec,
    out: str | Path,
    data: Cifar10,
    device: str | torch.device = "auto",
    on_event: OnEvent = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
    **options: Any,
) -> Record:
    """Train an experiment to its end, from wherever it was left, unless it is finished already.

    Args:
        name: of the experiment, a folder under `out`/checkpoints.
        spec: its spec; what is left out has its default.
        on_event: called with the events of core.train.fit, and with
            notice {reason}: something is not as it should be, and the run goes on.
            resumed {step, epoch, different}: it goes on from there; `different` says why not bit for bit, or None.
        The others, among them all `options`: as `run_cohort` takes them.

    Returns:
        The record, which is then on disk: Finished, or Failed where the run diverged or memory ran out.

    Raises:
        What `run_cohort` raises.
    """
    [record] = run_cohort([(name, spec)], out, data, device, [on_event], should_stop, **options)
    return record


@isolated()
def run_cohort(
    runs: Sequence[tuple[str, Spec]],
    out: str | Path,
    data: Cifar10,
    device: str | torch.device = "auto",
    on_events: Sequence[OnEvent] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    *,
    compiled: bool = True,
    checkpoint_every: int = 1,
    force: bool = False,
    allow_inexact: bool = False,
) -> list[Record]:
    """Train experiments together: each step is one call for all of them. Every run has the files that it would have
    alone, and the numbers within rounding (tests/test_cohort.py). One that diverges does not stop the others.

    The caller's settings of torch change nothing; see core.compile.isolation.

    Args:
        runs: names and specs; the specs agree on core.spec.static and on `epochs`.
        out: where checkpoints/NAME/ID.json (the record) and ID.safetensors (the weights) go.
        data: images and labels as `Cifar10` describes them; on `device` already, they are not copied. The record names
            what is in them; see core.data.identity.
        device: auto, cpu, cuda or mps.
        on_events: for each run what is called with its events; see `run_experiment`.
        should_stop: asked between steps; the runs then save and Interrupted is raised.
        compiled: fuse the step with torch.compile, or run it eager.
        checkpoint_every: epochs between resume points.
        force: train from the start. What is finished stays until it is replaced.
        allow_inexact: go on from a resume point even where the bits will differ; the record says so. In another cohort
            than before a run always goes on, and its record says so too.

    Returns:
        The records, in the order of `runs`.

    Raises:
        core.spec.SpecError: a spec cannot be run, or not together with the others.
        core.data.tensors.DataError: the data cannot be trained on.
        core.compile.device.DeviceError: the device is not there.
        core.store.Held: another process is at work on one of the runs.
        core.runs.record.RecordError: a run has a record that cannot be read, and that it does not replace.
        core.store.StoreError: files cannot be written or read.
        core.runs.files.OtherData, core.runs.files.OtherCode: a run is finished already, but with other data, or by code
            that gives other numbers; with `force` it is trained anew.
        core.runs.resume.ResumeError: a run cannot go on bit for bit, or has begun with other data.
        core.compile.isolation.SettingError: the caller has changed torch in a way that changes bits for ever.
        TooLarge: memory does not suffice for more than one run.
        ForkError: torch does not work in this fork of a process.
        Interrupted: `should_stop` said so.
    """
    check_threads()
    device = pick_device(device) if isinstance(device, str) else device
    identity.check(data)
    named, mode = identity.data_identity(data), Mode("compiled" if compiled else "eager")
    with _failing([]):
        data = loader.place(data, device)
    sessions = []
    for (name, spec), on_event in zip(runs, on_events or [lambda event: None] * len(runs), strict=True):
        check_name(name)
        spec = resolve(spec)
        loader.check(data.train_labels, spec)
        sessions.append(Session(Run(out, name, spec_id(spec)), name, spec, data, named, device, on_event, mode))
    shapes = {(static_key(session.spec), session.spec["epochs"]) for session in sessions}
    if len(shapes) > 1 or len({session.run.record for session in sessions}) < len(sessions):
        raise SpecError("these runs cannot be trained together: they differ in shape or epochs, or one is there twice")
    with contextlib.ExitStack() as locks:
        for session in sorted(sessions, key=lambda session: session.run.record):  # in one order in all processes
            locks.enter_context(session.run.lock())
        for session in sessions:
            if force:
                session.run.result()  # refuses to replace a record that cannot be read
                delete(*session.run.resume_points())
            else:
                session.record = session.run.finished(named)
        todo: dict[tuple[int, str], list[Session]] = defaultdict(list)
        left = [session for session in sessions if session.record is None]
        last = _last_common_step(left)
        with _failing(left):
            for session in left:
                at = session.begin(allow_inexact, last, len(left))
                todo[at, session.training.mode.kind].append(session)
            for together in todo.values():
                with _failing(together):
                    _train(together, should_stop, checkpoint_every, allow_inexact)
        return cast(list[Record], [session.record for session in sessions])


def _last_common_step(sessions: list["Session"]) -> int | None:
    """The latest step that every run has a resume point for: after a kill, some runs of a cohort may be a point ahead.
    0 where those ahead have only their first point; None where each run goes on by itself."""
    steps = [{resume.step_of(path) for path in session.run.resume_points()} for session in sessions]
    common = set.intersection(*steps) if steps else set()
    return max(common) if common else 0 if all(len(each) <= 1 for each in steps) else None


@contextlib.contextmanager
def _failing(sessions: list["Session"]) -> Iterator[None]:
    """Where memory runs out, a run has failed, and a cohort is too large.

    Raises:
        ForkError: torch refuses to work in a fork.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "fork" in str(error):
            raise ForkError(
                "torch does not work in a fork of a process that has used a GPU, or gradients beside one: start the "
                "workers with the method 'spawn' of multiprocessing"
            ) from error
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise  # a CPU allocator raises a RuntimeError, and says only in its message what it is
        if len(sessions) > 1:
            raise TooLarge(f"{len(sessions)} runs together are out of memory on {sessions[0].device}") from error
        for session in sessions:
            session.fail(f"out of memory on {session.device}")


def _train(
    sessions: list["Session"], should_stop: Callable[[], bool], checkpoint_every: int, allow_inexact: bool
) -> None:
    """Train runs that have come to the same step to their ends."""
    for session in sessions:
        session.join(len(sessions))
    by_training = {id(session.training): session for session in sessions}
    resumed = any(session.saved for session in sessions)
    interrupted = []
    try:
        events = fit([s.training for s in sessions], should_stop, may_change_mode=allow_inexact or not resumed)
        for training, event in events:
            session = by_training[id(training)]
            try:
                session.handle(event, checkpoint_every)
            except Interrupted as error:
                interrupted.append(str(error))
            except Diverged as error:
                session.fail(str(error))
    except CompileError as error:
        raise ResumeError(f"{error}; {REMEDY}") from None
    if interrupted:
        raise Interrupted(interrupted[0] + f"; so did {len(interrupted) - 1} with it" * (len(interrupted) > 1))
    for session in sessions:
        if session.record is None:
            try:
                session.finish()
            except Diverged as error:
                session.fail(str(error))


class Session:
    """One run under its lock: it listens to `fit`, and keeps what happens in files."""

    def __init__(
        self,
        run: Run,
        name: str,
        spec: Spec,
        data: Cifar10,
        named: str,
        device: torch.device,
        on_event: OnEvent,
        mode: Mode,
    ) -> None:
        """`named`: the identity of `data`."""
        self.run, self.name, self.spec, self.on_event = run, name, spec, on_event
        self.data, self.named, self.device = data, named, device
        self.mode, self.environment = mode, environment(device, mode, reads_bfloat16(spec))
        self.history: list[Epoch] = []
        self.progress = Progress()
        self.saved = 0  # the step that the newest resume point holds
        self.record: Record | None = None

    def about(self) -> dict[str, Any]:
        """What every file of the run says of it."""
        return {
            "name": self.name,
            "spec": self.spec,
            "spec_id": self.run.spec_id,
            "seed": self.spec["seed"],
            "data": self.named,
            "environment": self.environment,
        }

    def begin(self, allow_inexact: bool, last: int | None, count: int) -> int:
        """Prepare the training, one of `count`, from the newest good resume point up to the step `last`, if there is
        one; returns the step at which it stands."""
        self.started = time.perf_counter()
        self.training = training = Training(self.spec, self.data, self.device, self.mode)
        if reads_bfloat16(self.spec) and emulates_bfloat16(self.device):
            faster = "float32" if self.spec["precision"] == "bfloat16" else "another optimizer than Muon"
            self.notice(f"this CPU has neither AVX512_BF16 nor AMX and emulates bfloat16: {faster} is faster here")
        state = flatten(training.state)
        point = resume.newest(
            self.run, About(**self.about()), state, training.steps_per_epoch, allow_inexact, self.notice, last
        )
        size = sum(t.nbytes for t in state.values())
        reserve(self.run.resume_point(training.total), size, count * max(1, KEEP + 1 - len(self.run.resume_points())))
        if point is None:
            return 0
        for name, value in state.items():
            value.copy_(point.state[name])
        training.step = self.saved = point.step
        training.seconds, training.timed = point.progress.seconds, point.progress.timed
        self.history, self.progress = point.history, point.progress
        self.set_mode(point.mode)
        self.progress.bitwise &= not point.different
        details = {"step": point.step, "epoch": training.epoch_of(point.step), "different": point.different}
        self.on_event(Event("resumed", details))
        return point.step

    def join(self, count: int) -> None:
        """Become one of a cohort of so many."""
        if self.training.step == self.training.total:  # nothing is left to be trained
            return
        mode = self.training.mode._replace(cohort=count)
        if self.saved and mode != self.training.mode:
            self.notice(f"{self.name} seed {self.spec['seed']} goes on {mode}, was {self.training.mode}: not bitwise")
            self.progress.bitwise = False
        self.set_mode(mode)

    def set_mode(self, mode: Mode) -> None:
        self.training.mode = mode
        self.environment = msgspec.structs.replace(self.environment, mode=str(mode))

    def notice(self, reason: str) -> None:
        self.on_event(Event("notice", {"reason": reason}))

    def handle(self, event: Event, checkpoint_every: int) -> None:
        """Keep what happened; then tell it.

        Raises:
            Interrupted: the run was stopped, and everything is saved.
            core.train.Diverged: it was stopped, and what would be saved is NaN or infinite.
        """
        training, (kind, details) = self.training, event
        due = False
        if kind == "mode":
            self.set_mode(details["mode"])
            self.progress.bitwise &= not self.saved
        elif kind == "first_step":
            seconds = round(time.perf_counter() - self.started, 3)
            self.progress.first_step_seconds = self.progress.first_step_seconds or seconds
            if training.mode.kind != "eager" and (problem := cache.problem()):
                self.notice(problem)
        elif kind == "epoch":
            self.history.append(Epoch(**details))
            due = len(self.history) % checkpoint_every == 0 or training.step == training.total
        elif kind == "diverged":
            self.fail(details["reason"])
        elif kind == "stopped" and training.step > self.saved:
            training.check_finite()
            due = True
        if due:
            self.save()
        self.on_event(event)
        if kind == "stopped":
            where = f"after step {training.step} of {training.total}, which is saved"
            raise Interrupted(f"{self.name} stopped {where if training.step else 'before its first step'}")

    def save(self) -> None:
        """Write a resume point."""
        training = self.training
        self.progress.seconds, self.progress.timed = training.seconds, training.timed
        about = ResumePoint(**self.about(), progress=self.progress)
        resume.save(self.run, flatten(training.state), self.history, about)
        self.saved = training.step

    def finish(self) -> None:
        """Evaluate on all splits, write weights and record, delete the resume points.

        Raises:
            core.train.Diverged: a loss is NaN or infinite.
        """
        training = self.training
        # All in evaluation mode, unlike the train numbers of the history. The test split is used here alone.
        answers = {split: training.answers(split) for split in training.splits}
        metrics = {split: Metrics(**step.summary(found)) for split, found in answers.items()}
        flipped = {s: Metrics(**step.summary(training.answers(s, flip=True))) for s in answers if s != "train"}
        losses = [(split, found.loss) for each in (metrics, flipped) for split, found in each.items()]
        training.check_finite({f"{split} loss": torch.tensor(loss) for split, loss in losses})
        splits = Splits(metrics["train"], metrics.get("validation"), metrics["test"])
        weights = training.weights
        digest = checkpoint.digest(weights)
        checkpoint.save(self.run.weights, weights, Weights(**self.about(), digest=digest, test=splits.test))
        self.record = Finished(
            **self.about(),
            parameters=sum(p.numel() for p in training.state["params"].values()),
            history=self.history,
            first_step_seconds=self.progress.first_step_seconds,
            metrics=splits,
            digest=digest,
            bitwise=self.progress.bitwise,
            answers=msgspec.convert(step.details(answers["test"]), Answers),
            flipped=Flipped(flipped.get("validation"), flipped["test"]),
            whitening=checkpoint.digest(training.whitening) if training.whitening else UNSET,
        )
        self.write(self.record)
        delete(*self.run.resume_points())

    def fail(self, reason: str) -> None:
        """Leave the record of a run that failed. The result that it had another time stays."""
        self.record = Failed(**self.about(), error=reason)
        if not self.run.result():
            self.write(self.record)

    def write(self, record: Record) -> None:
        keep_diff(self.run, record.environment)
        write_record(self.run.record, record)
