"""Fixtures, the check that the machine was idle, and the comparison table at the end of the run."""

import datetime
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
import torch

from benchmarks import harness
from core.data import archive, cifar10
from core.mode import COMPILED
from core.runs.provenance import environment

IDLE = 0.05  # of the processors' time may be used by others
BATCHES = (128, 512)
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))


class Board:
    """What the benchmarks found: results of the epoch by (batch size, device), lines to print, warnings."""

    def __init__(self) -> None:
        self.epochs: dict[tuple[int, str], dict[str, Any]] = {}
        self.lines: list[str] = []
        self.warnings: list[str] = []


board_key = pytest.StashKey[Board]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[board_key] = Board()


@pytest.fixture(scope="session")
def board(request: pytest.FixtureRequest) -> Board:
    return request.config.stash[board_key]


@pytest.fixture(scope="session")
def choose(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """A function from two numbers of rounds to the one that counts: the first with --long, else the second."""
    return lambda long, short: long if request.config.option.long else short


@pytest.fixture(scope="module", autouse=True)
def idle(request: pytest.FixtureRequest, board: Board) -> None:
    """Warn if something else was running before the measurements of a file."""
    share = psutil.cpu_percent(0.5) / 100
    if share > IDLE:
        board.warnings.append(f"the machine was {share:.0%} busy before {request.node.name}: do not trust its figures")


@pytest.fixture(scope="session")
def data() -> cifar10.Data:
    """CIFAR-10, in main memory."""
    if cifar10.ARCHIVE.missing(archive.ROOT / "data"):
        pytest.skip("CIFAR-10 is not in data/; `uv run dvc pull` fetches it")
    return cifar10.load(archive.ROOT / "data")


@pytest.fixture(scope="session")
def data_on(data: cifar10.Data) -> Callable[[str], cifar10.Data]:
    """CIFAR-10 on a device; without that device the test is skipped."""

    def on(device: str) -> cifar10.Data:
        if device == "cuda" and not torch.cuda.is_available():
            pytest.skip("there is no CUDA device here: NOT RUN")
        return data.to(torch.device(device))

    return on


@pytest.fixture(scope="module")
def epochs(
    data: cifar10.Data, board: Board, choose: Callable[[int, int], int]
) -> Iterator[Callable[[int, str], dict[str, Any]]]:
    """A function from (batch size, device) to the result of every contestant, in interleaved rounds."""
    rounds = choose(9, 3)  # with 9, of 39 steps at batch 128, the whole epoch of 45,000 images
    workers: dict[str, harness.Worker] = {}

    def measure(batch: int, device: str) -> dict[str, Any]:
        if (batch, device) not in board.epochs:
            steps = 45_000 // batch // 9
            for name, entry in harness.contestants(device).items():
                if harness.missing(entry.kind, device):
                    continue
                if name not in workers:
                    workers[name] = harness.Worker(entry, device)
                workers[name].build(batch)
            plays = {name: lambda w=worker: w.run(steps) for name, worker in workers.items()}
            seconds = harness.interleave(plays, rounds)
            board.epochs[batch, device] = {
                name: harness.Result(seconds[name], steps * batch, worker.loss) for name, worker in workers.items()
            }
        return board.epochs[batch, device]

    yield measure
    for worker in workers.values():
        worker.close()


COLUMNS = {
    "to_naive": "to naive",
    "to_jax": "to JAX",
    "to_peer": "to peer",
    "to_any_peer": "to any",
    "to_limit": "limit",
}


def write_epoch(write: Callable[[str], None], batch: int, device: str, results: dict[str, Any]) -> None:
    """The table of one comparison."""
    write(f"Epoch at batch {batch} on {device}; the fastest peer is {harness.fastest_peer(results)}:")
    write(f"  {'':<25} {'samples/s':>10}" + "".join(f" {head:>9}" for head in COLUMNS.values()) + f" {'loss':>7}")
    for name, entry in harness.contestants(device).items():
        if name not in results:
            write(f"  {name:<25} {harness.missing(entry.kind, device)}")
            continue
        found = harness.ratios(results, name)
        cells = "".join(f" {found[key]:>9.2f}" if key in found else f" {'':>9}" for key in COLUMNS)
        loss = "" if results[name].loss is None else f"{results[name].loss:.3f}"
        write(f"  {name:<25} {results[name].samples_per_second:>10,.0f}{cells} {loss:>7}")


def write_forms(write: Callable[[str], None]) -> None:
    """What the columns mean, and in which form each contestant took part."""
    write("How many times as fast: naive and JAX in float32; the fastest peer of the same precision, and of any;")
    write("the limit is products + Adam of the same precision.")
    for kind, contestant in harness.KINDS.items():
        write(f"  {kind:<16} {(contestant.__doc__ or '').splitlines()[0]}")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    board = config.stash[board_key]
    if "gpu" in config.option.markexpr and not torch.cuda.is_available():
        board.warnings.append("there is no CUDA device: what is marked gpu has not run, and nothing is shown about it")
    if not (board.epochs or board.lines or board.warnings):
        return
    write = terminalreporter.write_line
    terminalreporter.section(f"comparison, {datetime.date.today().isoformat()}")
    for kind in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        machine = environment(torch.device(kind), COMPILED)
        write(f"{kind}: {machine.device_name} ({machine.hardware}), {machine.threads} threads, torch {machine.torch}")
    for (batch, device), results in board.epochs.items():
        write_epoch(write, batch, device, results)
    if board.epochs:
        write_forms(write)
    for line in board.lines:
        write(line)
    for warning in board.warnings:
        write(f"WARNING: {warning}", yellow=True)
