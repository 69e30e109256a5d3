"""Trains many runs, one after the other, in cohorts or on a cluster, as one generator of results."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

from core.events import Listener, Listeners, Stopped
from core.runs.run import Run
from core.session import TooLarge
from core.spec import static_key
from core.store import Held

Group = Sequence[Run]  # runs that are trained together
ShouldStop = Callable[[], bool]


class Skipped(NamedTuple):
    """A run that another process is training."""

    run: Run
    reason: Held


class Interrupted(NamedTuple):
    """The last result of `train_all` after a stop.

    Attributes:
        runs: were stopped and are saved. Empty if the stop came between two runs, before the first step, or on a
            cluster.
        step, total: the last step of these runs, and their number of steps.
    """

    runs: Sequence[Run] = ()
    step: int = 0
    total: int = 0


T = TypeVar("T")  # what an executor makes of a run: its record, or a core.verify.Verification
Result: TypeAlias = T | Skipped | Interrupted
Executor: TypeAlias = Callable[[Iterable[Group], Listener, ShouldStop], Iterator[Result[T]]]


def train_all(
    runs: Iterable[Run],
    executor: Executor[T],
    listeners: Iterable[Listener] = (),
    should_stop: ShouldStop = lambda: False,
    cohort: int = 1,
) -> Iterator[Result[T]]:
    """Train runs and yield a result for each, as they end.

    Args:
        runs: without cohorts, each is taken when there is room for it, so it may depend on earlier results.
        executor: trains groups of runs: `one_after_another`, or core.remote.train with its options.
        listeners: called with (run, event) for whatever happens; see core.events.
        should_stop: asked between two steps.
        cohort: the most runs of one shape that are trained together.

    Yields:
        What the executor makes of each run; `Skipped` for a run that another process is training; `Interrupted`, as the
        last, after a stop.
    """
    try:
        yield from executor(groups(runs, cohort), Listeners(listeners), should_stop)
    except KeyboardInterrupt:  # a signal came while there was nothing to save
        yield Interrupted()


def one_after_another(train: Callable[..., Sequence[T | Stopped]]) -> Executor[T]:
    """The executor that trains one group after the other in this process.

    Args:
        train: called with a group, `listeners` and `should_stop`, as core.session.run_cohort is; returns a result for
            each run.
    """

    def execute(groups: Iterable[Group], listener: Listener, should_stop: ShouldStop) -> Iterator[Result[T]]:
        alone, waiting = deque[Group](), iter(groups)
        while group := alone.popleft() if alone else next(waiting, ()):
            try:
                ended = train(group, listeners=[listener], should_stop=should_stop)
            except (Held, TooLarge) as error:
                if len(group) > 1:  # some of them may succeed alone
                    alone.extendleft([run] for run in reversed(group))
                elif isinstance(error, Held):
                    yield Skipped(group[0], error)
                else:
                    raise
                continue
            stopped = [(run, end) for run, end in zip(group, ended, strict=True) if isinstance(end, Stopped)]
            yield from (end for end in ended if not isinstance(end, Stopped))
            if stopped:
                yield Interrupted([run for run, _ in stopped], *stopped[0][1])
                return
            if should_stop():  # the stop came after the last step of this group
                yield Interrupted()
                return

    return execute


def groups(runs: Iterable[Run], size: int) -> Iterable[Group]:
    """The runs in groups of at most `size` that can be trained together (see core.session.run_cohort), in the order of
    the first run of each. With the size 1, a run is not taken before its group is."""
    if size == 1:
        return ([run] for run in runs)
    result: list[list[Run]] = []
    growing: dict[Any, list[Run]] = {}
    for run in runs:
        key = static_key(run.spec), run.spec["epochs"]
        if len(growing.get(key, [])) % size == 0:
            growing[key] = []
            result.append(growing[key])
        growing[key].append(run)
    return [*result]
