"""run_experiment: one run, from a notebook or a script of your own.

This module joins what trains a run (core.session) with what shows it (core.listeners.progress, core.report.display).
"""

import contextlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

import core.report.display  # noqa: F401  # gives the records their looks
from core.data.tensors import Data
from core.events import Listener, Stopped
from core.listeners.progress import Display
from core.runs.record import Record
from core.runs.run import Run
from core.session import run_cohort
from core.signals import Stop
from core.spec import Spec
from core.tally import Tally

AGAIN = "the same call goes on from its last resume point"


def run_experiment(
    name: str,
    spec: Spec,
    out: str | Path,
    data: Data,
    device: str | torch.device = "auto",
    listeners: Iterable[Listener] = (),
    should_stop: Callable[[], bool] = lambda: False,
    *,
    progress: bool | None = None,
    **options: Any,
) -> Record | Stopped:
    """Train an experiment to its end. A run in progress is resumed; a finished run is not trained again.

    Args:
        name: of the experiment. The files go to the folder `out`/checkpoints/`name`.
        spec: the keys of the spec that differ from the defaults.
        progress: show a line for each epoch. By default in a notebook or another interactive session, not in a script.
        The other arguments: see `core.session.run_cohort`.

    Returns:
        The record, which is also on disk: Finished, Failed if the run diverged or memory ran out, or Partial if it fell
        behind. `Stopped` if `should_stop` returned true.

    Raises:
        KeyboardInterrupt: after Ctrl-C, or the stop button of a notebook. The step is saved first; the message is one
            sentence. What `core.session.run_cohort` raises.
    """
    run, stop = Run(name, spec, Path(out)), Stop()
    with contextlib.ExitStack() as stack:
        listeners = list(listeners)
        if hasattr(sys, "ps1") if progress is None else progress:
            listeners.append(stack.enter_context(Display(Tally([run]), verbose=True, first=False)))
        stack.enter_context(stop.during_call())
        try:
            [result] = run_cohort(
                [run], data, device, [*listeners, stop.listen], lambda: stop() or should_stop(), **options
            )
        except KeyboardInterrupt:
            again = AGAIN if run.resume_points() else "the same call starts from the beginning"
            raise _interrupted(f"{run.label} stopped before it could save a step; {again}") from None
    if stop():
        if isinstance(result, Stopped):
            where = f"after step {result.step} of {result.total}, which is saved"
            raise _interrupted(f"{run.label} stopped {where}; {AGAIN}")
        raise _interrupted(f"{run.label} has ended, and its record is on disk")
    return result


def _interrupted(sentence: str) -> KeyboardInterrupt:
    """An exception, not a value, so that a loop over several runs ends too. IPython shows it as one sentence."""
    error: Any = KeyboardInterrupt(sentence)
    error._render_traceback_ = lambda: [sentence]
    return error
