"""Interleaved measurement: contestants take turns, so that what the machine does meanwhile hits them all alike."""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import limits, peers
from core.data import cifar10

OURS = "ours"
CONTESTANTS = {OURS: peers.Ours, **peers.PEERS, **limits.LIMITS}


class Result(NamedTuple):
    """The seconds of each round, the images of a round, and the mean training loss of the last round."""

    seconds: list[float]
    images: int
    loss: float | None

    @property
    def samples_per_second(self) -> float:
        return self.images / statistics.median(self.seconds)

    def ratio(self, other: "Result") -> float:
        """How many times as fast as the other: the median over the rounds, each against the same round."""
        return statistics.median(b / a for a, b in zip(self.seconds, other.seconds, strict=True))


def interleave(contestants: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """The seconds of each contestant's rounds, taken in turn after one warm-up round that does not count.

    Args:
        contestants: name -> a function that does one round and returns its seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds + 1):
        for name, play in contestants.items():
            seconds[name].append(play())
    return {name: values[1:] for name, values in seconds.items()}


def timed(play: Callable[[], Any]) -> Callable[[], float]:
    """A function that calls `play` and returns the seconds that it took."""

    def run() -> float:
        start = time.perf_counter()
        play()
        return time.perf_counter() - start

    return run


def serve(pipe: Any, name: str) -> None:
    """The body of a worker: builds a contestant for the batch size that it is told, and runs it round by round."""
    data = cifar10.load(cifar10.ROOT / "data")
    contestant = None
    while (request := pipe.recv()) is not None:
        command, value = request
        if command == "build":
            contestant = None  # before the next one takes its memory
            contestant = CONTESTANTS[name](peers.Work(data, value))
            contestant.run(1)
            pipe.send(None)
        else:
            assert contestant is not None
            seconds = timed(lambda c=contestant, n=value: c.run(n))()
            pipe.send((seconds, contestant.loss()))


class Worker:
    """A contestant in a process of its own, so that none inherits another's threads, heap or settings."""

    def __init__(self, name: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, name), daemon=True)
        self.process.start()
        theirs.close()
        self.name = name
        self.loss: float | None = None

    def _ask(self, command: str, value: int) -> Any:
        try:
            self.pipe.send((command, value))
            return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            raise RuntimeError(f"{self.name} ended at {command} {value}, status {self.process.exitcode}") from None

    def build(self, batch: int) -> None:
        self._ask("build", batch)

    def run(self, steps: int) -> float:
        seconds, self.loss = self._ask("run", steps)
        return seconds

    def close(self) -> None:
        if self.process.is_alive():
            self.pipe.send(None)
        self.process.join()


class Replay:
    """A clock for pytest-benchmark that shows seconds measured before: `play` is what takes them."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def report(self, benchmark: Any, seconds: list[float]) -> None:
        """Hand samples to a benchmark whose marker names this clock as its timer."""
        left = iter(seconds)

        def play() -> None:
            self.now += next(left)

        benchmark.pedantic(play, rounds=len(seconds))


replay = Replay()


def busy_share(seconds: float = 0.5) -> float | None:
    """The share of the processors' time that was used, by whomever, while this process slept; None where unknown."""

    def ticks() -> tuple[int, int]:
        values = [int(v) for v in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        return sum(values), values[3] + values[4]

    try:
        total, idle = ticks()
        time.sleep(seconds)
        total_after, idle_after = ticks()
    except OSError:
        return None
    return 1 - (idle_after - idle) / max(total_after - total, 1)
