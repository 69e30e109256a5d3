"""Fixtures, the check that the machine was idle, and the comparison table at the end of the run."""

import datetime
import platform
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from core.data import cifar10

IDLE = 0.05  # of the processors' time may be used by others
BATCHES = (128, 512)


class Board:
    """What the benchmarks found, for the table: results of the epoch by batch size, then lines and warnings."""

    def __init__(self) -> None:
        self.epochs: dict[int, dict[str, Any]] = {}
        self.lines: list[str] = []
        self.warnings: list[str] = []


board_key = pytest.StashKey[Board]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[board_key] = Board()


def pytest_xdist_auto_num_workers() -> int:
    """None: a second process would spoil every measurement."""
    return 0


@pytest.fixture(scope="session")
def board(request: pytest.FixtureRequest) -> Board:
    return request.config.stash[board_key]


@pytest.fixture(scope="module", autouse=True)
def idle(request: pytest.FixtureRequest, board: Board) -> None:
    """Warn if something else was running before the measurements of a file."""
    from benchmarks.harness import busy_share

    share = busy_share()
    if share is not None and share > IDLE:
        board.warnings.append(f"the machine was {share:.0%} busy before {request.node.name}: do not trust its figures")


@pytest.fixture(scope="session")
def data() -> cifar10.Cifar10:
    """CIFAR-10 on the device that main.py would take."""
    from core.compile.device import pick_device
    from core.data.loader import place

    if cifar10.missing(cifar10.ROOT / "data"):
        pytest.skip("CIFAR-10 is not in data/; `uv run dvc pull` fetches it")
    return place(cifar10.load(cifar10.ROOT / "data"), pick_device("auto"))


@pytest.fixture(scope="module")
def epochs(data: cifar10.Cifar10, board: Board) -> Iterator[Callable[[int], dict[str, Any]]]:
    """A function from a batch size to the result of every contestant, over an epoch in interleaved rounds."""
    from benchmarks import harness, peers

    rounds = 9  # of 39 steps at batch 128: the whole epoch of 45,000 images
    workers: dict[str, harness.Worker] = {}

    def measure(batch: int) -> dict[str, Any]:
        if batch not in board.epochs:
            steps = 45_000 // batch // rounds
            for name in harness.CONTESTANTS:
                if peers.missing(name):
                    continue
                if name not in workers:
                    workers[name] = harness.Worker(name)
                workers[name].build(batch)
            plays = {name: lambda w=worker: w.run(steps) for name, worker in workers.items()}
            seconds = harness.interleave(plays, rounds)
            board.epochs[batch] = {
                name: harness.Result(seconds[name], steps * batch, worker.loss) for name, worker in workers.items()
            }
        return board.epochs[batch]

    yield measure
    for worker in workers.values():
        worker.close()


def fastest_peer(results: dict[str, Any]) -> str:
    from benchmarks.peers import PEERS

    return max((name for name in PEERS if name in results), key=lambda name: results[name].samples_per_second)


def ratios(results: dict[str, Any], name: str) -> dict[str, float]:
    """How many times as fast a contestant was as naive PyTorch, the fastest peer and the limit."""
    from benchmarks import limits, peers

    against = {"to_naive": peers.NAIVE, "to_fastest_peer": fastest_peer(results), "to_limit": limits.LIMIT}
    return {key: results[name].ratio(results[other]) for key, other in against.items()}


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    board = config.stash[board_key]
    if not (board.epochs or board.lines or board.warnings):
        return
    write = terminalreporter.write_line
    today = datetime.date.today().isoformat()
    terminalreporter.section(f"comparison, {today}, {platform.processor() or platform.machine()}")
    for batch, results in board.epochs.items():
        from benchmarks import harness, peers

        write(f"Epoch at batch {batch}; the fastest peer is {fastest_peer(results)}, the limit is products + Adam:")
        write(f"  {'':<16} {'samples/s':>10} {'to seed':>9} {'to peer':>9} {'to limit':>9} {'loss':>7}")
        for name in harness.CONTESTANTS:
            if name not in results:
                write(f"  {name:<16} {peers.missing(name)}")
                continue
            cells = "".join(f" {ratio:>9.2f}" for ratio in ratios(results, name).values())
            loss = "" if results[name].loss is None else f"{results[name].loss:.3f}"
            write(f"  {name:<16} {results[name].samples_per_second:>10,.0f}{cells} {loss:>7}")
    for line in board.lines:
        write(line)
    for warning in board.warnings:
        write(f"WARNING: {warning}", yellow=True)
