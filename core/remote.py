"""Runs on many machines: Ray (https://docs.ray.io) hands them to workers, and this process alone writes their files."""

import contextlib
import os
import tempfile
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from core.data.cifar10 import DIRECTORY_HASH, Cifar10
from core.errors import UserError
from core.runs import record as records
from core.runs.files import Run
from core.runs.provenance import CODE
from core.runs.record import Finished, Record
from core.runs.store import Held, StoreError, atomic_write, delete
from core.session import TooLarge, run_cohort
from core.spec import Spec, spec_id

Group = list[tuple[str, Spec]]  # runs that are trained together, as core.session.run_cohort takes them

WAITING = (
    2  # tasks for each one that the cluster can run at once: enough to keep it busy, few enough to forget at a stop
)
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # reports to nobody
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # nodes have the project and its environment, which are not sent to them
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # else a node that dies prints pages of its state here
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # a task without a GPU leaves CUDA_VISIBLE_DEVICES as it is
}
LOCAL = "local"  # instead of an address: a cluster of this machine alone, for this call


class ClusterError(UserError):
    """There is no Ray, no cluster, or one that has other code."""


class Software(NamedTuple):
    """What a worker must have in common with the process that started it."""

    code: str
    torch: str
    data: str


class Trained(NamedTuple):
    """A run that a worker has ended: its record as JSON, and its file of weights, if it has one."""

    record: bytes
    weights: bytes


SOFTWARE = Software(CODE, str(torch.__version__), DIRECTORY_HASH)


def work(group: Group, arrays: list[Any], software: Software, device: str, compiled: bool) -> list[Trained]:
    """Train a group in a folder of its own: what a worker does.

    Args:
        arrays: the tensors of core.data.cifar10.Cifar10, as NumPy arrays that are mapped from Ray's object store.

    Raises:
        ClusterError: this worker has other software. core.session.TooLarge: as `run_cohort`.
    """
    different = [
        f"{key} {mine}" for key, mine, other in zip(Software._fields, SOFTWARE, software, strict=True) if mine != other
    ]
    if different:
        raise ClusterError(f"a worker on {os.uname().nodename} has another {', another '.join(different)}: update it")
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nobody writes into the images
        data = Cifar10(*map(torch.from_numpy, arrays))
    with tempfile.TemporaryDirectory() as out:
        ended = run_cohort(group, out, data, device, compiled=compiled, checkpoint_every=10**9)
        files = [Run(Path(out), record.name, record.spec_id).weights for record in ended]
        return [
            Trained(records.encode(r), f.read_bytes() if f.exists() else b"") for r, f in zip(ended, files, strict=True)
        ]


@contextlib.contextmanager
def connected(address: str) -> Iterator[Any]:
    """The module ray, connected to the cluster at an address; "local" starts one on this machine and ends it again.

    Raises:
        ClusterError: Ray is not installed, or there is no cluster.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError:
        raise ClusterError("Ray is not installed: `uv run --group ray main.py ...` has it") from None
    try:
        ray.init(address, log_to_driver=False, include_dashboard=False, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(f"no Ray cluster at {address}: {str(error).splitlines()[0]}") from None
    try:
        yield ray
    finally:
        ray.shutdown()


def train(
    groups: Sequence[Group],
    out: Path,
    data: Cifar10,
    address: str = LOCAL,
    device: str = "auto",
    compiled: bool = True,
    force: bool = False,
    on_held: Callable[[str, Held], None] = lambda name, held: None,
) -> Iterator[Record]:
    """Train groups of runs on a cluster, each as a task of one CPU core, or of one GPU where the cluster has any, and
    yield their records as they come.

    A task that loses its worker or its node is done again, as often as it takes. Of a run, nothing is written but its
    end: the record and the weights, by this process; what is already finished under `out` is not trained again.

    Args:
        data: on the CPU. It goes into the object store once, from where each node maps it.
        force: train even what is finished.
        on_held: called for a run that another process is at work on, which is left out.

    Raises:
        ClusterError: there is no cluster, or a worker has other software. core.runs.store.StoreError: a file cannot be
            written.
    """
    left = deque(groups)
    with connected(address) as ray, contextlib.ExitStack() as locks:
        gpu = device == "cuda" or (device == "auto" and ray.cluster_resources().get("GPU", 0) > 0)
        task = ray.remote(num_cpus=1, num_gpus=int(gpu), max_retries=-1, max_calls=0)(work)
        arrays = ray.put([t.numpy() for t in data])
        under_way: dict[Any, tuple[Group, contextlib.ExitStack]] = {}
        while left or under_way:
            room = WAITING * max(1, int(ray.cluster_resources().get("GPU" if gpu else "CPU", 1)))
            while left and len(under_way) < room:
                group, held = left.popleft(), locks.enter_context(contextlib.ExitStack())
                group = [run for run in group if _lock(run, out, force, held, on_held)]
                if group:
                    chosen = "cuda" if gpu else "cpu"
                    under_way[task.remote(group, arrays, SOFTWARE, chosen, compiled)] = group, held
            for ended in ray.wait(list(under_way), timeout=1)[0]:
                group, held = under_way.pop(ended)
                try:
                    found = ray.get(ended)
                except ray.exceptions.RayTaskError as error:
                    if not isinstance(error.cause, TooLarge):
                        raise error.cause from None
                    left.extendleft([run] for run in reversed(group))  # one by one
                    held.close()
                    continue
                with held:
                    yield from [keep(out, trained) for trained in found]


def _lock(
    run: tuple[str, Spec], out: Path, force: bool, held: contextlib.ExitStack, on_held: Callable[[str, Held], None]
) -> bool:
    """Whether a run is now this process's to train."""
    name, spec = run
    files = Run(out, name, spec_id(spec))
    try:
        held.enter_context(files.lock())
    except Held as error:
        on_held(name, error)
        return False
    return force or not files.finished()


def keep(out: Path, trained: Trained) -> Record:
    """Write what a worker has made, and return the record.

    Raises:
        core.runs.store.StoreError: it cannot be written, or is no record.
    """
    try:
        record = records.decode(trained.record)
    except ValueError as error:
        raise StoreError(f"a worker returned no record ({error})") from None
    run = Run(out, record.name, spec_id(record.spec))
    if isinstance(record, Finished):
        atomic_write(run.weights, trained.weights)
    if isinstance(record, Finished) or not run.result():
        atomic_write(run.record, trained.record)
    if isinstance(record, Finished):
        delete(*run.resume_points())
    return record
