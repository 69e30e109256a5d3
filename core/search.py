"""Searches a space: Optuna proposes the specs (its TPE), core.schedule.train_all trains them.

Every decision is by the validation accuracy of records. Nothing here reads a test number.
"""

import contextlib
import hashlib
import importlib
import json
import math
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from core.code_hash import CODE, SAME_NUMBERS, same_numbers
from core.errors import UserError
from core.events import Listener
from core.runs.record import Epoch, Failed, Finished, Partial, Record, read_records
from core.runs.run import Run
from core.schedule import Executor, Interrupted, ShouldStop, Skipped, train_all
from core.space import PREFIX, Range, Space, Trials, accuracy, read_all
from core.spec import FIELDS, Integer, SpecError, canonical
from core.store import atomic_write, locked, read_file

RUNGS = (0.25, 0.5)  # the shares of its epochs after which a trial may stop
KEPT = 3  # trials of a schedule that go on at each rung, whatever the others are
REFUSED = 1000  # proposals in a row that no spec accepts, after which a search gives up
MAX_JOURNAL = 1 << 30  # bytes


class SearchError(UserError):
    """A search cannot go on; the message says why."""


def import_optuna(name: str) -> Any:
    """The module. If it is not installed, raises SearchError with the command that has it for the search `name`."""
    try:
        return importlib.import_module("optuna")
    except ImportError:
        raise SearchError(f"Optuna is not installed: `uv run --group search main.py search {name}` has it") from None


class Search:
    """A search in progress. Use it in a `with` statement: no other process may search the same space meanwhile.

    Attributes:
        records: of this code and data that lie in the space, by their ids.
        told: the ids of the trials that Optuna knows the result of, in their order, each once.
        count: how many results Optuna was told.
    """

    def __init__(self, space: Space, out: Path, data: str | None) -> None:
        """`data`: the identity of the data; None for whatever it is."""
        self.space, self.out, self.data = space, out, data
        self.records: dict[str, Record] = {}
        self.told: list[str] = []
        self.count = 0
        self._open: dict[str, list[Any]] = {}  # trials that are trained now, by the ids of their runs

    def __enter__(self) -> "Search":
        """
        Raises:
            SearchError: Optuna is not installed, or its journal is damaged.
            core.store.Held: another process searches.
        """
        self.optuna = import_optuna(self.space.name)
        file = self.out / f"{PREFIX}{self.space.name}"
        with contextlib.ExitStack() as stack:
            lock, owner = file.with_name(f"{file.name}.lock"), file.with_name(f"{file.name}.owner")
            stack.enter_context(locked(lock, owner, timeout=1))
            self._load(file.with_name(f"{file.name}.journal"))
            self._held = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._held.close()

    def _load(self, journal: Path) -> None:
        """Read what Optuna knows, and tell it what it does not know yet."""
        kinds = self.optuna.distributions
        self._distributions = {}
        for key, axis in self.space.axes.items():
            if isinstance(axis, Range):
                kind = "IntDistribution" if isinstance(FIELDS[key].values, Integer) else "FloatDistribution"
                self._distributions[key] = getattr(kinds, kind)(axis.low, axis.high, log=axis.log)
            else:  # Optuna's choices are words and numbers, ours may be lists
                self._distributions[key] = kinds.CategoricalDistribution([canonical(value) for value in axis])
        self.optuna.logging.set_verbosity(self.optuna.logging.WARNING)
        # Another space, other data, or code that gives other numbers: another study, in the same journal.
        code = "" if CODE in SAME_NUMBERS else CODE
        about = canonical([self.space.spec, self.space.axes, self.data, code])
        storages = self.optuna.storages.journal
        try:
            _mend(journal)
            # A killed process would leave Optuna's own lock behind. The lock of the search guards the journal.
            backend = storages.JournalFileBackend(str(journal), lock_obj=threading.Lock())
            storage = storages.JournalStorage(backend)
            self._study = self.optuna.create_study(
                storage=storage,
                study_name=hashlib.sha256(about.encode()).hexdigest()[:12],
                direction="maximize",
                load_if_exists=True,
            )
        except (OSError, ValueError, KeyError) as error:
            raise SearchError(
                f"the journal of the search cannot be used ({error}): delete {journal}, then the records are told anew"
            ) from None
        for record in read_records(self.out):
            of_now = same_numbers(record.environment.code) and self.data in (None, record.data)
            if of_now and self.space.has(record.spec) and not isinstance(self.records.get(record.spec_id), Finished):
                self.records[record.spec_id] = record
        known: dict[str, Any] = {}
        for trial in self._study.get_trials(deepcopy=False):
            if trial.state == self._state("RUNNING"):
                self._bury(trial)
            elif trial.state in (self._state("COMPLETE"), self._state("PRUNED")):
                known[self._run(trial).id] = trial.state
                self._count(self._run(trial).id)
        before = next((each.trials for each in read_all(self.out) if each.name == self.space.name), [])
        in_order = {i: self.records[i] for i in before if i in self.records} | self.records  # a clone has no journal
        for run_id, record in in_order.items():
            if run_id not in known or (isinstance(record, Finished) and known[run_id] != self._state("COMPLETE")):
                self._add(record)

    def _bury(self, trial: Any) -> None:
        """Tell that the process of a trial has died, and propose it again if the run can go on."""
        with contextlib.suppress(SpecError):  # it was about to be refused
            run = self._run(trial)
            if run.id not in self.records and run.resume_points():
                self._study.enqueue_trial(trial.params)
        self._study.tell(trial.number, state=self._state("FAIL"))

    def _state(self, name: str) -> Any:
        return self.optuna.trial.TrialState[name]

    def _run(self, trial: Any) -> Run:
        """The run of a trial. Raises core.spec.SpecError if no spec accepts its combination."""
        words = trial.params.items()
        values = {k: v if isinstance(self.space.axes[k], Range) else json.loads(v) for k, v in words}
        return Run(self.space.name, self.space.at(values), self.out)

    def _count(self, run_id: str) -> None:
        self.count += 1
        if run_id not in self.told:
            self.told.append(run_id)

    def _add(self, record: Finished | Partial | Failed) -> None:
        """Tell Optuna of a run that no proposal led to."""
        ranges = {key for key, axis in self.space.axes.items() if isinstance(axis, Range)}
        params = {key: record.spec[key] if key in ranges else canonical(record.spec[key]) for key in self.space.axes}
        state, value, steps = self._outcome(record)
        self._study.add_trial(
            self.optuna.trial.create_trial(
                state=state, value=value, params=params, distributions=self._distributions, intermediate_values=steps
            )
        )
        self._count(record.spec_id)

    def _outcome(self, record: Finished | Partial | Failed) -> tuple[Any, float | None, dict[int, float]]:
        """What Optuna is told: the state, the accuracy, and for a run that fell behind the accuracy where it stopped. A
        run that failed is the worst of all: it was pruned before its first step."""
        if isinstance(record, Finished):
            return self._state("COMPLETE"), accuracy(record), {}
        steps = {len(record.history): accuracy(record)} if isinstance(record, Partial) else {}
        return self._state("PRUNED"), None, steps

    def _tell(self, trial: Any, record: Finished | Partial | Failed) -> None:
        state, value, steps = self._outcome(record)
        for step, reached in steps.items():
            trial.report(reached, step)
        self._study.tell(trial, value, state)
        self._count(record.spec_id)

    def proposals(self, trials: int, seconds: float = math.inf) -> Iterator[Run]:
        """Runs to train, until there are so many results or the time is over.

        A proposal that was trained already is answered from its record. One that no spec accepts is told as failed.

        Raises:
            SearchError: no spec accepts the proposals.
        """
        end, refused = time.monotonic() + seconds, 0
        while self.count + sum(map(len, self._open.values())) < trials and time.monotonic() < end:
            # A seed for each trial: a search that was stopped proposes what it would have proposed.
            seed = len(self._study.get_trials(deepcopy=False))
            self._study.sampler = self.optuna.samplers.TPESampler(seed=seed)
            trial = self._study.ask(self._distributions)
            try:
                run = self._run(trial)
            except SpecError as error:
                self._study.tell(trial, state=self._state("FAIL"))
                refused += 1
                if refused == REFUSED:
                    raise SearchError(
                        f"search {self.space.name}: {REFUSED:,} proposals in a row are refused: {error}"
                    ) from None
                continue
            refused = 0
            if record := self.records.get(run.id):
                self._tell(trial, record)
            elif run.id in self._open:
                self._open[run.id].append(trial)
            else:
                self._open[run.id] = [trial]
                yield run

    def train(
        self,
        executor: Executor[Any],
        trials: int,
        seconds: float = math.inf,
        listeners: Iterable[Listener] = (),
        should_stop: ShouldStop = lambda: False,
    ) -> Iterator[Record | Skipped | Interrupted]:
        """Train until there are so many results, or the time is over. Yields what train_all yields, after Optuna was
        told of it.

        Args:
            executor: see train_all. Here, its option `falls_behind` is the method of this search.
            seconds: after them, no trial starts.
        """
        for result in train_all(self.proposals(trials, seconds), executor, listeners, should_stop):
            if isinstance(result, Skipped):
                for trial in self._open.pop(result.run.id):
                    self._study.tell(trial, state=self._state("FAIL"))
            elif not isinstance(result, Interrupted):
                self.records[result.spec_id] = result
                for trial in self._open.pop(result.spec_id):
                    self._tell(trial, result)
                self.write()
            yield result
        self.write()

    def write(self, comparison: str = "") -> None:
        """Write what a report must know. Raises core.store.StoreError."""
        axes = self.space.axes
        log = [key for key, axis in axes.items() if isinstance(axis, Range) and axis.log]
        Trials(self.space.name, self.space.base, list(axes), log, self.told, comparison).write(self.out)

    def best(self, count: int) -> list[Finished]:
        """The finished trials with the highest validation accuracy."""
        finished = [record for run_id in self.told if isinstance(record := self.records.get(run_id), Finished)]
        return sorted(finished, key=accuracy, reverse=True)[:count]

    def falls_behind(self, run: Run, history: Sequence[Epoch]) -> bool:
        """Whether a run is in the worse half of the trials of its schedule, at one of RUNGS.

        Only trials of one schedule are compared: the rate of a one-cycle schedule still rises where another one falls.
        """
        reached, epochs = len(history), run.spec["epochs"]
        if reached not in {math.ceil(share * epochs) for share in RUNGS}:
            return False
        rivals = [
            record.history[reached - 1].val_accuracy or 0.0
            for record in self.records.values()
            if not isinstance(record, Failed)
            and len(record.history) >= reached
            and all(record.spec[key] == run.spec[key] for key in ("schedule", "epochs"))
        ]
        better = sum(rival > (history[-1].val_accuracy or 0.0) for rival in rivals)
        return better >= max(KEPT, math.ceil((len(rivals) + 1) / 2))


def _mend(journal: Path) -> None:
    """Cut off a last line that a killed process has not written to its end."""
    if journal.exists() and not (data := read_file(journal, MAX_JOURNAL)).endswith(b"\n"):
        atomic_write(journal, data[: data.rfind(b"\n") + 1])
