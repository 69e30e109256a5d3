"""Trains runs, from their specs to their files. The command line, core.interactive and workers all enter here."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import msgspec
import torch

from core.compile import cache
from core.compile.device import emulates_bfloat16, pick_device
from core.compile.fused import CompileError
from core.compile.isolation import check_threads, isolated
from core.data import identity, loader
from core.data.tensors import Data
from core.errors import UserError
from core.events import (
    Diverged,
    Ended,
    EpochDone,
    Event,
    FirstStep,
    Listener,
    Listeners,
    ModeChanged,
    Notice,
    Resumed,
    Started,
    Stopped,
)
from core.functional import augment, step
from core.functional.tree import flatten
from core.mode import Mode
from core.runs import checkpoint, resume
from core.runs.checkout import keep_diff
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
    Partial,
    Progress,
    Record,
    ResumePoint,
    Splits,
    Weights,
    write_record,
)
from core.runs.resume import KEEP, REMEDY, ResumeError
from core.runs.run import Run
from core.spec import SpecError, reads_bfloat16, static_key
from core.store import delete, reserve
from core.train import NotFinite, Training, fit


class TooLarge(UserError):
    """There is not enough memory for these runs together. One by one, they may fit."""


class ForkError(UserError):
    """This process is a fork of one that has used a GPU, or gradients beside one; the message says what to do."""


def prepare(device: str, load_data: Callable[[], Data]) -> tuple[Data, torch.device]:
    """Load the data onto a device; returns both.

    Raises:
        core.compile.device.DeviceError: the device is not available. Whatever `load_data` raises.
    """
    chosen = pick_device(device)
    with _failing([]):
        return load_data().to(chosen), chosen


@isolated()
def run_cohort(
    runs: Sequence[Run],
    data: Data,
    device: str | torch.device = "auto",
    listeners: Iterable[Listener] = (),
    should_stop: Callable[[], bool] = lambda: False,
    *,
    compiled: bool = True,
    checkpoint_every: int | None = None,
    force: bool = False,
    exact: bool = True,
    falls_behind: Callable[[Run, Sequence[Epoch]], bool] = lambda run, history: False,
) -> list[Record | Stopped]:
    """Train runs together: each step is one call for all of them. Every run has the files that it would have alone, and
    the numbers within rounding (tests/test_cohort.py). One that diverges does not stop the others.

    The caller's settings of torch change nothing; see core.compile.isolation.

    Args:
        runs: their specs agree on core.spec.static and on `epochs`.
        data: images and labels. They are not copied if they are on `device` already. The record has their identity
            (core.data.identity).
        device: auto, cpu, cuda or mps.
        listeners: each is called with (run, event); see core.events.
        should_stop: asked between steps; the runs are then saved.
        compiled: fuse the step with torch.compile, or run it eager.
        checkpoint_every: epochs between resume points. By default, after each epoch, unless saving has taken more
            than a twentieth of the time.
        force: train from the start. A result stays until it is replaced.
        exact: refuse to go on from a resume point if the bits would differ from those of an uninterrupted run. Without
            it, the run goes on and its record says so. A run that was in another cohort does the same even with
            `exact`.
        falls_behind: asked after each epoch with the history so far. If it returns true before the last epoch, the runs
            that are trained together end there, each with a `Partial` record and one resume point.

    Returns:
        The records, in the order of `runs`; `Stopped` in place of the record of a run that was stopped.

    Raises:
        core.spec.SpecError: the specs cannot be trained together, or an augmentation cannot take the images.
        core.data.tensors.DataError: the data cannot be trained on.
        core.compile.device.DeviceError: the device is not available.
        core.store.Held: another process is training one of the runs.
        core.runs.record.RecordError: a run has a record that cannot be read. It is never replaced.
        core.store.StoreError: files cannot be written or read.
        core.runs.run.OtherData, core.runs.run.OtherCode: a run is finished already, but with other data, or by code
            that gives other numbers; with `force` it is trained again.
        core.runs.resume.ResumeError: a run cannot go on exactly, or was started with other data.
        core.compile.isolation.SettingError: the caller has changed a setting of torch that changes the bits and cannot
            be set back.
        TooLarge: there is not enough memory for all runs of a cohort.
        core.errors.UserError: there is not enough memory for the data.
        ForkError: torch does not work in this fork of a process.
    """
    check_threads()
    device = pick_device(device) if isinstance(device, str) else device
    identity.check(data)
    data_name, mode = identity.data_identity(data), Mode("compiled" if compiled else "eager")
    with _failing([]):
        data = data.to(device)
    listener = Listeners(listeners)
    sessions = []
    for run in runs:
        loader.check(data, run.spec)
        augment.check(run.spec, data.info)
        sessions.append(Session(run, data, data_name, device, listener, mode))
    shapes = {(static_key(run.spec), run.spec["epochs"]) for run in runs}
    if len(shapes) > 1 or len({run.record for run in runs}) < len(runs):
        raise SpecError("these runs cannot be trained together: they differ in shape or epochs, or one is given twice")
    with contextlib.ExitStack() as locks:
        for run in sorted(runs, key=lambda run: run.record):  # in one order in all processes
            locks.enter_context(run.lock())
        for session in sessions:
            if force:
                session.run.result()  # refuses to replace a record that cannot be read
                delete(*session.run.resume_points())
            elif result := session.run.finished(data_name):
                session.end(result)
        todo: dict[tuple[int, str], list[Session]] = defaultdict(list)
        left = [session for session in sessions if session.result is None]
        last = _last_common_step(left)
        with _failing(left):
            for session in left:
                at = session.begin(exact, last, len(left))
                todo[at, session.training.mode.kind].append(session)
            for together in todo.values():
                _train(together, should_stop, checkpoint_every, exact, falls_behind)
        return [cast(Record | Stopped, session.result) for session in sessions]


def _last_common_step(sessions: list["Session"]) -> int | None:
    """Latest step that every run has a resume point for: a kill may leave some runs of a cohort one point ahead.

    Without such a step: 0, the start, if no run has more than one point; else None, and each run goes on from its own
    newest point.
    """
    steps = [{resume.step_of(path) for path in session.run.resume_points()} for session in sessions]
    common = set.intersection(*steps) if steps else set()
    if common:
        return max(common)
    return 0 if all(len(each) <= 1 for each in steps) else None


@contextlib.contextmanager
def _failing(sessions: list["Session"]) -> Iterator[None]:
    """Handle an error of memory: a single run has failed.

    Raises:
        TooLarge: there are several runs. UserError: there is no run, only data. ForkError: torch does not work in a
            fork.
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
            raise  # where the CPU has too little memory, torch raises a RuntimeError: only its message shows it
        if not sessions:
            raise UserError("there is not enough memory for the data") from error
        if len(sessions) > 1:
            raise TooLarge(f"{len(sessions)} runs together are out of memory on {sessions[0].device}") from error
        for session in sessions:
            session.fail(f"out of memory on {session.device}")


def _train(
    sessions: list["Session"],
    should_stop: Callable[[], bool],
    checkpoint_every: int | None,
    exact: bool,
    falls_behind: Callable[[Run, Sequence[Epoch]], bool],
) -> None:
    """Train runs that are at the same step to their ends."""
    pace = resume.Pace(checkpoint_every)
    for session in sessions:
        session.join(len(sessions))
    by_training = {id(session.training): session for session in sessions}
    resumed = any(session.saved for session in sessions)

    def should_end() -> bool:
        return sessions[0].behind or should_stop()

    try:
        trainings = [session.training for session in sessions]
        for training, event in fit(trainings, should_end, may_change_mode=not (exact and resumed)):
            session = by_training[id(training)]
            try:
                session.handle(event, pace)
                if isinstance(event, EpochDone) and falls_behind(session.run, session.history):
                    for each in sessions:
                        each.behind = True
            except NotFinite as error:
                session.fail(str(error))
    except CompileError as error:
        raise ResumeError(f"{error}; {REMEDY}") from None
    for session in sessions:
        if session.result is None:
            try:
                session.finish()
            except NotFinite as error:
                session.fail(str(error))


class Session:
    """One run, while its lock is held: saves what happens in files, and tells the listeners.

    Attributes:
        saved: the step of the newest resume point.
        behind: whether the run ends now, without a result.
        result: the record, or `Stopped`; None while the run is trained.
    """

    def __init__(
        self, run: Run, data: Data, data_name: str, device: torch.device, listener: Listener, mode: Mode
    ) -> None:
        """`data_name`: the identity of `data`."""
        self.run, self.spec = run, run.spec
        self.data, self.data_name, self.device = data, data_name, device
        self.mode, self.environment = mode, environment(device, mode, reads_bfloat16(run.spec))
        self.listener = listener
        self.history: list[Epoch] = []
        self.progress = Progress()
        self.saved, self.behind = 0, False
        self.result: Record | Stopped | None = None

    def tell(self, event: Event) -> None:
        self.listener(self.run, event)

    def about(self) -> dict[str, Any]:
        """See `Run.about`."""
        return self.run.about(self.data_name, self.data.info, self.environment)

    def begin(self, exact: bool, last: int | None, count: int) -> int:
        """Prepare to train from the newest undamaged resume point, or from the start; returns the step.

        Args:
            last: ignore resume points after this step.
            count: how many runs are prepared together.
        """
        self.started = time.perf_counter()
        self.tell(Started(count))
        self.training = training = Training(self.spec, self.data, self.device, self.mode)
        if reads_bfloat16(self.spec) and emulates_bfloat16(self.device):
            faster = "float32" if self.spec["precision"] == "bfloat16" else "another optimizer than Muon"
            self.notice(f"this CPU has neither AVX512_BF16 nor AMX and emulates bfloat16: {faster} is faster here")
        state = flatten(training.state)
        about = About(**self.about())
        point = resume.newest(self.run, about, state, training.steps_per_epoch, exact, self.notice, last)
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
        self.progress.exact &= not point.inexact
        self.tell(Resumed(point.step, training.epoch_of(point.step), point.inexact))
        return point.step

    def join(self, count: int) -> None:
        """Join a cohort of `count` runs."""
        if self.training.step == self.training.total:  # nothing is left to be trained
            return
        mode = self.training.mode._replace(cohort=count)
        if self.saved and mode != self.training.mode:
            self.notice(f"{self.run.label} goes on {mode}, was {self.training.mode}: not exact")
            self.progress.exact = False
        self.set_mode(mode)

    def set_mode(self, mode: Mode) -> None:
        self.training.mode = mode
        self.environment = msgspec.structs.replace(self.environment, mode=str(mode))

    def notice(self, reason: str) -> None:
        self.tell(Notice(reason))

    def handle(self, event: Event, pace: resume.Pace) -> None:
        """Save what happened, then tell the listeners.

        Raises:
            core.train.NotFinite: the run was stopped, and what would be saved is NaN or infinite.
        """
        training = self.training
        match event:
            case ModeChanged():
                self.set_mode(event.mode)
                self.progress.exact &= not self.saved
            case FirstStep():
                seconds = round(time.perf_counter() - self.started, 3)
                self.progress.first_step_seconds = self.progress.first_step_seconds or seconds
                if training.mode.kind != "eager" and (problem := cache.problem()):
                    self.notice(problem)
            case EpochDone():
                self.history.append(Epoch(**{key: getattr(event, key) for key in Epoch.__struct_fields__}))
                if pace.allows(len(self.history)) or training.step == training.total:
                    with pace.counted():
                        self.save()
            case Diverged():
                self.tell(event)
                self.fail(event.reason)
                return
            case Stopped():
                if training.step > self.saved:
                    training.check_finite()
                    self.save()
                if self.behind:
                    self.end_without_result(Partial(**self.about(), history=self.history))
                    delete(*self.run.resume_points()[1:])
                    return
                self.result = event
        self.tell(event)

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
            core.train.NotFinite: a loss is NaN or infinite.
        """
        training = self.training
        # In evaluation mode, unlike the train numbers of the history. No other code reads the test split.
        answers = {split: training.answers(split) for split in training.splits}
        metrics = {split: Metrics(**step.summary(answer)) for split, answer in answers.items()}
        flipped = {s: Metrics(**step.summary(training.answers(s, "flip"))) for s in answers if s != "train"}
        shifted = {}
        if self.spec["train_on"] == "all" and self.spec["augment"] == "flip+shift":
            shifted["test"] = Metrics(**step.summary(training.answers("test", "shifts")))
        losses = [(split, measured.loss) for each in (metrics, flipped, shifted) for split, measured in each.items()]
        training.check_finite({f"{split} loss": torch.tensor(loss) for split, loss in losses})
        splits = Splits(metrics["train"], metrics.get("validation"), metrics["test"])
        weights = training.weights
        digest = checkpoint.digest(weights)
        checkpoint.save(self.run.target.weights, weights, Weights(**self.about(), digest=digest, test=splits.test))
        record = Finished(
            **self.about(),
            parameters=sum(p.numel() for p in training.state["params"].values()),
            history=self.history,
            first_step_seconds=self.progress.first_step_seconds,
            metrics=splits,
            digest=digest,
            exact=self.progress.exact,
            answers=msgspec.convert(step.details(answers["test"]), Answers),
            flipped=Flipped(flipped.get("validation"), flipped["test"]),
            shifted=shifted.get("test", UNSET),
            whitening=checkpoint.digest(training.whitening) if training.whitening else UNSET,
        )
        self.write(record)
        delete(*self.run.resume_points())
        self.end(record)

    def fail(self, reason: str) -> None:
        """End with a record of the failure."""
        self.end_without_result(Failed(**self.about(), error=reason))

    def end_without_result(self, record: Failed | Partial) -> None:
        """End with a record that does not replace an earlier result."""
        if not self.run.result():
            self.write(record)
        self.end(record)

    def write(self, record: Record) -> None:
        keep_diff(self.run, record.environment)
        write_record(self.run.target.record, record)

    def end(self, record: Record) -> None:
        self.result = record
        self.tell(Ended(record))
