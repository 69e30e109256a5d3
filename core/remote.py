"""Runs on many machines: Ray (https://docs.ray.io) hands them to workers, and this process alone writes their files."""

import contextlib
import functools
import os
import signal
import tempfile
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from core.code_hash import CODE
from core.data import loader
from core.data.cifar10 import DIRECTORY_HASH, Cifar10
from core.data.identity import data_identity
from core.errors import UserError
from core.runs import record as records
from core.runs.files import Begun, Run, under_way
from core.runs.record import Finished, Record
from core.runs.store import Held, StoreError, atomic_write, delete, reserve
from core.session import TooLarge, run_cohort
from core.spec import Spec, spec_id

Group = list[tuple[str, Spec]]  # runs that are trained together, as core.session.run_cohort takes them

AHEAD = 2  # tasks handed over for each one that the cluster runs at once: enough to keep it busy
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


def work(group: Group, stored: list[Any], software: Software, device: str, compiled: bool) -> list[Trained]:
    """Train a group in a folder of its own: what a worker does.

    Args:
        stored: one reference to the tensors of core.data.cifar10.Cifar10, as NumPy arrays in Ray's object store; in a
            list, so that Ray hands over the reference itself.

    Raises:
        ClusterError: this worker has other software. core.session.TooLarge: as `run_cohort`.
    """
    different = [
        f"{key} {mine}" for key, mine, other in zip(Software._fields, SOFTWARE, software, strict=True) if mine != other
    ]
    if different:
        raise ClusterError(f"a worker on {os.uname().nodename} has another {', another '.join(different)}: update it")
    torch.set_num_threads(1)
    data = _mapped(stored[0], device)
    with tempfile.TemporaryDirectory() as out:
        ended = run_cohort(group, out, data, device, compiled=compiled, checkpoint_every=10**9)
        files = [Run(Path(out), record.name, record.spec_id).weights for record in ended]
        return [
            Trained(records.encode(r), f.read_bytes() if f.exists() else b"") for r, f in zip(ended, files, strict=True)
        ]


@functools.lru_cache(maxsize=1)  # the runs of a worker share the images, and with them what core.data.whitening keeps
def _mapped(stored: Any, device: str) -> Cifar10:
    """The data in the object store, mapped into this process, or a copy on its GPU."""
    import ray

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nobody writes into the images
        return loader.place(Cifar10(*map(torch.from_numpy, ray.get(stored))), torch.device(device))


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
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address, log_to_driver=False, include_dashboard=False, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(f"no Ray cluster at {address}: {str(error).splitlines()[0]}") from None
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # Ray has put its own there, which exits at once
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
    on_held: Callable[[tuple[str, Spec], Held], None] = lambda run, held: None,
) -> Iterator[Record]:
    """Train groups of runs on a cluster, each as a task of one CPU core, or of one GPU where the cluster has any, and
    yield their records as they come.

    A task that loses its worker or its node is done again, as often as it takes: for ever, where it is the run that
    kills its worker, as one does that needs more memory than a node has. Of a run, nothing is written but its end: the
    record and the weights, by this process; what is already finished under `out` is not trained again.

    Args:
        data: on the CPU. It goes into the object store once, from where each node maps it.
        force: train even what is finished.
        on_held: called for a run that another process is at work on, which is left out.

    Raises:
        ClusterError: there is no cluster, it lacks the device, or a worker has other software.
        core.runs.store.StoreError: a file cannot be written.
    """
    named, begun, waiting = data_identity(data), under_way(out), deque(groups)
    tasks: dict[Any, tuple[Group, contextlib.ExitStack]] = {}  # with the locks of their runs
    with connected(address) as ray, contextlib.ExitStack() as held:
        chosen = _device(device, ray.cluster_resources())
        task = ray.remote(num_cpus=1, num_gpus=int(chosen == "cuda"), max_retries=-1)(work)
        stored = [ray.put([t.numpy() for t in data])]
        while waiting or tasks:
            while waiting and len(tasks) < AHEAD * _at_once(ray.cluster_resources(), chosen):
                locks = held.enter_context(contextlib.ExitStack())
                mine = [run for run in waiting.popleft() if _lock(run, out, locks, on_held)]
                # Asked with the locks held: another process may have finished one by now.
                done = [None if force else _files(out, run).finished(named, begun) for run in mine]
                yield from filter(None, done)
                if group := [run for run, record in zip(mine, done, strict=True) if record is None]:
                    tasks[task.remote(group, stored, SOFTWARE, chosen, compiled)] = group, locks
                else:
                    locks.close()
            for ended in ray.wait(list(tasks), timeout=1)[0] if tasks else ():
                group, locks = tasks.pop(ended)
                with locks:
                    try:
                        yield from [keep(out, trained, begun) for trained in ray.get(ended)]
                    except ray.exceptions.RayTaskError as error:
                        if not isinstance(error.cause, TooLarge):
                            raise error.cause from None
                        waiting.extendleft([run] for run in reversed(group))  # one by one


def _files(out: Path, run: tuple[str, Spec]) -> Run:
    name, spec = run
    return Run(out, name, spec_id(spec))


def _device(asked: str, resources: dict[str, float]) -> str:
    gpus = resources.get("GPU", 0)
    if asked == "mps" or (asked == "cuda" and not gpus):
        raise ClusterError(f"the cluster has no {'GPU' if asked == 'cuda' else 'device mps'}")
    return "cuda" if gpus and asked != "cpu" else "cpu"


def _at_once(resources: dict[str, float], device: str) -> int:
    """How many tasks a cluster with these resources runs at once."""
    return max(1, int(resources.get("GPU" if device == "cuda" else "CPU", 1)))


def _lock(
    run: tuple[str, Spec],
    out: Path,
    locks: contextlib.ExitStack,
    on_held: Callable[[tuple[str, Spec], Held], None],
) -> bool:
    """Keep a run for this process; False where another one has it."""
    try:
        locks.enter_context(_files(out, run).lock())
    except Held as error:
        on_held(run, error)
        return False
    return True


def keep(out: Path, trained: Trained, begun: Begun = frozenset()) -> Record:
    """Write what a worker has made, and return the record.

    Args:
        begun: the runs of which there are resume points, which a result makes useless.

    Raises:
        core.runs.store.StoreError: it cannot be written, is no record, or would replace one that cannot be read.
    """
    try:
        record = records.decode(trained.record)
    except ValueError as error:
        raise StoreError(f"a worker returned no record ({error})") from None
    run = Run(out, record.name, spec_id(record.spec))
    had = run.result()  # refuses to replace a record that cannot be read
    if isinstance(record, Finished):
        if run.record.exists():  # of other weights: between the two writes there must be none
            reserve(run.weights, len(trained.weights), 1)
            delete(run.record)
        atomic_write(run.weights, trained.weights)
        atomic_write(run.record, trained.record)
        if (record.name, run.spec_id) in begun:
            delete(*run.resume_points())
    elif not had:  # the result that it had another time stays
        atomic_write(run.record, trained.record)
    return record
