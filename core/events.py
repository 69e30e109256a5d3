"""What happens in a run, as typed events, and who listens.

core.train.fit yields the events of a training; core.session adds those of a run and tells every listener. A listener is
a callable of (run, event).
"""

import logging
from collections.abc import Callable, Iterable
from typing import NamedTuple

from core.mode import Mode
from core.runs.record import Record
from core.runs.run import Run

log = logging.getLogger(__name__)


class Started(NamedTuple):
    """A run is about to be trained, together with `cohort` - 1 others."""

    cohort: int


class Resumed(NamedTuple):
    """A run goes on from a resume point.

    Attributes:
        inexact: why the bits will not be those of an uninterrupted run; None if they will.
    """

    step: int
    epoch: int
    inexact: str | None


class ModeChanged(NamedTuple):
    """The mode of the step is not the mode that was asked for."""

    mode: Mode
    reason: str


class FirstStep(NamedTuple):
    """The first step of this call is done; before it, the step was compiled."""

    step: int
    total: int


class StepDone(NamedTuple):
    """`step` steps are done. Comes every few steps, and for only one run of a cohort."""

    step: int


class OnCluster(NamedTuple):
    """A Ray cluster has this run and `runs` - 1 others. Comes once a second or more often, for only one of them."""

    runs: int


class EpochDone(NamedTuple):
    """An epoch is done: its numbers, as in core.runs.record.Epoch, and the learning rate of its last step."""

    epoch: int
    lr: float
    train_loss: float
    train_accuracy: float
    val_loss: float | None
    val_accuracy: float | None
    seconds: float
    samples_per_second: int


class Notice(NamedTuple):
    """Something is wrong, but the run goes on."""

    reason: str


class Diverged(NamedTuple):
    """The loss, a gradient, the validation loss or the state is NaN or infinite. The training ends; the others of its
    cohort go on."""

    reason: str


class Stopped(NamedTuple):
    """The training was stopped after this step. core.session saves it, and returns this event instead of a record."""

    step: int
    total: int


class Ended(NamedTuple):
    """A run has ended, and its record is on disk."""

    record: Record


Event = (
    Started | Resumed | ModeChanged | FirstStep | StepDone | OnCluster | EpochDone | Notice | Diverged | Stopped | Ended
)
Listener = Callable[[Run, Event], None]


class Listeners:
    """Several listeners as one. A listener that fails is reported once and switched off: it never ends a training."""

    def __init__(self, listeners: Iterable[Listener]) -> None:
        self.listeners = list(listeners)

    def __call__(self, run: Run, event: Event) -> None:
        for listener in list(self.listeners):
            try:
                listener(run, event)
            except Exception as error:
                self.listeners.remove(listener)
                name = getattr(listener, "__qualname__", type(listener).__qualname__)
                log.warning("the listener %s failed and is switched off: %s: %s", name, type(error).__name__, error)
