"""Interleaved measurement: contestants take turns, so that what the machine does meanwhile hits them all alike."""

import importlib.util
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import limits, peers, peers_jax
from core.compile.device import pick_device
from core.data import archive, cifar10

DATA = archive.ROOT / "data"
OURS, JAX, NAIVE, PRODUCTS, LIMIT = "ours", "jax", "naive", "products", "products + Adam"
KINDS: dict[str, type[peers.Contestant]] = {
    OURS: peers.Ours,
    JAX: peers_jax.Jax,
    "keras": peers_jax.Keras,
    "eager": peers.Eager,
    "compiled": peers.Compiled,
    NAIVE: peers.Naive,
    PRODUCTS: limits.Products,
    LIMIT: limits.ProductsAdam,
}
PEERS = (JAX, "keras", "eager", "compiled", NAIVE)
NEEDS = {JAX: ("jax", "optax"), "keras": ("jax", "keras")}  # packages of the group `peers`
PRECISIONS = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "tf32", "bfloat16")}


class Entry(NamedTuple):
    """A contestant: what it is, and in which precision it multiplies."""

    kind: str
    precision: str


def contestants(device: str) -> dict[str, Entry]:
    """Name -> entry of all that take part on a kind of device; the naive one multiplies in float32 only."""
    pairs = [(kind, precision) for precision in PRECISIONS[device] for kind in KINDS]
    return {f"{k} {p}": Entry(k, p) for k, p in pairs if k != NAIVE or p == "float32"}


def missing(kind: str, device: str = "cpu") -> str | None:
    """Why contestants of a kind cannot take part, or None."""
    needs = NEEDS.get(kind, ())
    if absent := [name for name in needs if not importlib.util.find_spec(name)]:
        return f"skipped: {' and '.join(absent)} not installed (`uv sync --group peers`)"
    if needs and device == "cuda" and not any(importlib.util.find_spec(f"jax_cuda{v}_plugin") for v in (12, 13)):
        return "skipped: JAX is installed without CUDA (`uv pip install 'jax[cuda13]'`)"
    return None


def build(entry: Entry, data: cifar10.Data, batch: int, folder: Path = DATA) -> peers.Contestant:
    """A contestant for the images on the device of `data`; the mode of float32 products is the process's."""
    torch.set_float32_matmul_precision("high" if entry.precision == "tf32" else "highest")
    return KINDS[entry.kind](peers.Work(data, batch, entry.precision, folder))


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


def fastest_peer(results: Mapping[str, Result], precision: str | None = None) -> str | None:
    """The name of the fastest peer, of one precision or of any; None if none took part."""
    entries = {name: Entry(*name.rsplit(" ", 1)) for name in results}
    names = [name for name, e in entries.items() if e.kind in PEERS and precision in (None, e.precision)]
    return max(names, key=lambda name: results[name].samples_per_second, default=None)


def ratios(results: Mapping[str, Result], name: str) -> dict[str, float]:
    """How many times as fast a contestant was as naive PyTorch, as JAX in float32, as the fastest peer of its
    precision and of any, and as the limit of its precision; those of them that took part."""
    precision = name.rsplit(" ", 1)[1]
    against = {
        "to_naive": f"{NAIVE} float32",
        "to_jax": f"{JAX} float32",
        "to_peer": fastest_peer(results, precision),
        "to_any_peer": fastest_peer(results),
        "to_limit": f"{LIMIT} {precision}",
    }
    return {key: results[name].ratio(results[other]) for key, other in against.items() if other in results}


def turns(plays: Mapping[str, Callable[[], float]], rounds: int) -> Iterator[dict[str, list[float]]]:
    """Let the contestants take turns, after a warm-up round that compiles and does not count. Yields the seconds of all
    their rounds so far, after each round.

    Args:
        plays: name -> a function that does one round and returns its seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in plays}
    for counted in range(rounds + 1):
        for name, play in plays.items():
            seconds[name].append(play())
        if counted:
            yield {name: values[1:] for name, values in seconds.items()}


def interleave(plays: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """The seconds of each contestant's rounds; see `turns`."""
    *_, seconds = turns(plays, rounds)
    return seconds


def timed(play: Callable[[], Any]) -> Callable[[], float]:
    """A function that calls `play` and returns the seconds that it took."""

    def run() -> float:
        start = time.perf_counter()
        play()
        return time.perf_counter() - start

    return run


Build = Callable[[Entry, cifar10.Data, int, Path], peers.Contestant]


def serve(pipe: Any, entry: Entry, device: str, folder: Path, build: Build) -> None:
    """The body of a worker: builds a contestant for the batch size that it is told, and runs it round by round."""
    data = cifar10.load(folder).to(pick_device(device))
    contestant = None
    while (request := pipe.recv()) is not None:
        command, value = request
        if command == "build":
            contestant = None  # before the next one takes its memory
            contestant = build(entry, data, value, folder)
            pipe.send(None)
        else:
            assert contestant is not None
            seconds = timed(lambda c=contestant, n=value: c.run(n))()
            pipe.send((seconds, contestant.loss()))


class Worker:
    """A contestant in a process of its own, so that none inherits another's threads, heap or settings."""

    def __init__(self, entry: Entry, device: str, folder: Path = DATA, build: Build = build) -> None:
        """
        Args:
            build: makes the contestant from the entry, the data, a batch size or another number, and the folder.
        """
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, entry, device, folder, build), daemon=True)
        self.process.start()
        theirs.close()
        self.name = " ".join(entry)
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


def prepare(workers: Mapping[str, Worker], values: Mapping[str, int], seconds: float) -> dict[str, str]:
    """Build contestants at the same time, and let each take two steps, which compile it.

    Args:
        values: name -> the batch size, or what else the worker's `build` takes.

    Returns:
        Name -> why a contestant cannot take part: it failed, or took longer than so many seconds and was ended.
    """

    def first(name: str) -> None:
        workers[name].build(values[name])
        workers[name].run(2)

    with ThreadPoolExecutor(max(len(workers), 1)) as pool:
        futures = {name: pool.submit(first, name) for name in workers}
        not_done = wait(futures.values(), seconds).not_done
        late = {name for name, future in futures.items() if future in not_done}
        for name in late:
            workers[name].process.kill()  # its thread then ends, with an error
    errors = {name: future.exception() for name, future in futures.items()}
    return {name: f"not ready after {seconds:g} s" if name in late else str(e) for name, e in errors.items() if e}


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
