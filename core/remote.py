"""Trains runs on a Ray cluster: Ray sends them to workers, this process writes their files."""

import contextlib
import functools
import itertools
import tempfile
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from msgspec.structs import replace

from core import cluster
from core.cluster import ClusterError
from core.code_hash import CODE, core_bytes_hash
from core.data import loader
from core.data.identity import data_identity
from core.data.tensors import Data
from core.events import Ended, Listener, OnCluster, Started
from core.mode import Mode
from core.runs import checkpoint
from core.runs import record as records
from core.runs.checkout import keep_diff
from core.runs.files import in_progress
from core.runs.provenance import environment
from core.runs.record import Failed, Finished, Partial, Record
from core.runs.run import InProgress, Run
from core.schedule import Group, Skipped
from core.session import TooLarge, run_cohort
from core.spec import DataInfo, Spec
from core.store import Held, atomic_write, delete, reserve

AHEAD = 2  # tasks in the cluster for each one that it runs at once: enough to keep it busy
DEATHS = 3  # after so many lost workers, a run has failed


class NodeLost(Exception):
    """A task ended because its node did. The run is not the cause."""


class WorkerLost(Exception):
    """A task ended because its worker did; the message says why that may be."""


class Software(NamedTuple):
    """Versions that a worker must share with the process that started it. The data comes from that process."""

    code: str
    torch: str


class Trained(NamedTuple):
    """A run that a worker has trained: the bytes of its record and of its file of weights (empty if it failed)."""

    record: bytes
    weights: bytes


SOFTWARE = Software(core_bytes_hash(), str(torch.__version__))


def by_value() -> Callable[..., list[Trained] | str]:
    """The task that Ray sends to a worker. Ray sends an inner function with its code. It sends every other function by
    name, which a worker without this project could not import."""

    def task(software: tuple[str, ...], *arguments: Any) -> Any:
        """The result of `work`, or a sentence that says why this worker cannot call it."""
        import platform

        worker = f"a worker on {platform.node()}"
        remedy = "every node needs this project in the same folder, at the same commit, with its environment"
        try:
            from core import remote

            software_here = tuple(remote.SOFTWARE)
        except Exception as error:
            return f"{worker} cannot import this project ({type(error).__name__}: {error}): {remedy}"
        if software_here != software:
            pairs = zip(software_here, software, strict=False)
            different = [f"{a[:12]} (here {b[:12]})" for a, b in pairs if a != b]
            return f"{worker} has other code or another torch, {', '.join(different)}: {remedy}"
        return remote.work(*arguments)

    return task


def work(group: list[tuple[str, Spec]], stored: list[Any], device: str, compiled: bool) -> list[Trained]:
    """Train a group in a temporary folder. Workers call this.

    Args:
        group: the names and specs of runs that are trained together.
        stored: a reference to the four tensors of the data, as NumPy arrays in Ray's object store, and its `info`. It
            is in a list, because Ray replaces a bare reference by the data.

    Raises:
        core.session.TooLarge: as `run_cohort`.
    """
    torch.set_num_threads(1)
    data = _mapped(*stored, device)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as out:
        runs = [Run(name, spec, Path(out)) for name, spec in group]
        run_cohort(runs, data, device, compiled=compiled, checkpoint_every=10**9)
        return [
            Trained(run.record.read_bytes(), run.weights.read_bytes() if run.weights.exists() else b"") for run in runs
        ]


@functools.lru_cache(maxsize=1)  # the runs of a worker share the images, and so what core.data.whitening caches
def _mapped(stored: Any, info: DataInfo, device: str) -> Data:
    """The data in the object store: mapped into this process, or copied to its GPU."""
    import ray

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nobody writes into the images
        return Data._make([*map(torch.from_numpy, ray.get(stored)), info]).to(torch.device(device))


def train(
    groups: Iterable[Group],
    data: Data,
    address: str = cluster.LOCAL,
    device: str = "auto",
    compiled: bool = True,
    force: bool = False,
    listener: Listener = lambda run, event: None,
    on_notice: Callable[[str], None] = lambda notice: None,
) -> Iterator[Record | Skipped]:
    """Train groups of runs on a cluster, each as a task of one CPU core, or of one GPU if the cluster has any. Yields
    their records as they come, and `Skipped` for a run that another process is training.

    A task that loses its node is done again. So is a task that loses its worker, but a run that loses `DEATHS` workers
    has failed: it may need more memory than a node has. This process writes the record and the weights of a run;
    there are no resume points. A finished run is not trained again.

    Args:
        data: on the CPU. It is put into the object store once, and each node maps it from there.
        force: train finished runs again.
        listener: called when a run is handed to the cluster, while the cluster has it, and with its record. No other
            event comes from a worker.
        on_notice: called with a sentence when the runs wait for the cluster.

    Raises:
        ClusterError: there is no cluster, it lacks the device, it was lost, or a worker has other software or returned
            a result of another run.
        core.store.StoreError: a file cannot be written.
    """
    data_name, coming = data_identity(data), iter(groups)
    waiting = deque(itertools.islice(coming, 1))
    started = in_progress(waiting[0][0].out) if waiting else frozenset()
    sizes = functools.cache(functools.partial(split_sizes, data))  # thousands of runs may end at once
    tasks: dict[Any, tuple[list[Run], contextlib.ExitStack]] = {}  # with the locks of their runs
    deaths: Counter[Run] = Counter()  # of workers that were training the run

    def more() -> bool:
        waiting.extend(itertools.islice(coming, 0 if waiting else 1))
        return bool(waiting)

    def end(run: Run, record: Record) -> Record:
        listener(run, Ended(record))
        return record

    with cluster.connected(address) as ray, contextlib.ExitStack() as held:
        chosen = _device(device, ray.cluster_resources())
        task = ray.remote(num_cpus=1, num_gpus=int(chosen == "cuda"), max_retries=0)(by_value())
        stored = [ray.put([t.numpy() for t in data.tensors.values()]), data.info]
        watch = cluster.Watch(ray, chosen, on_notice)
        while tasks or more():
            at_once = watch.at_once()
            while len(tasks) < AHEAD * at_once and more():
                locks, group = held.enter_context(contextlib.ExitStack()), []
                for run in waiting.popleft():
                    try:
                        locks.enter_context(run.lock())
                    except Held as error:
                        yield Skipped(run, error)
                        continue
                    # Asked with the lock held: another process may have finished the run by now.
                    if not force and (result := run.finished(data_name, started)):
                        yield end(run, result)
                    else:
                        group.append(run)
                for run in group:
                    listener(run, Started(len(group)))
                if group:
                    specs = [(run.name, run.spec) for run in group]
                    tasks[task.remote(tuple(SOFTWARE), specs, stored, chosen, compiled)] = group, locks
                else:
                    locks.close()
            if in_cluster := [run for group, _ in tasks.values() for run in group]:
                listener(in_cluster[0], OnCluster(len(in_cluster)))
            if not at_once or not tasks:
                time.sleep(cluster.LOOK)
                continue
            for ended in ray.wait(list(tasks), timeout=1)[0]:
                group, locks = tasks.pop(ended)
                with locks:
                    try:
                        trained = _result(ray, ended)
                    except NodeLost:
                        waiting.appendleft(group)
                        continue
                    except (TooLarge, WorkerLost) as error:
                        if isinstance(error, WorkerLost) and len(group) == 1:
                            deaths[group[0]] += 1
                            if deaths[group[0]] == DEATHS:
                                failed = _failed(group[0], data_name, data.info, chosen, compiled, str(error))
                                yield end(group[0], keep(group[0], failed, b"", started))
                                continue
                        # One by one, and at the end, when other tasks have freed their memory.
                        waiting.extend([run] for run in group)
                        continue
                    checked = [check(run, each, data_name, sizes) for run, each in zip(group, trained, strict=True)]
                    for run, record, each in zip(group, checked, trained, strict=True):
                        yield end(run, keep(run, record, each.weights, started))


def _result(ray: Any, ended: Any) -> list[Trained]:
    """What a task returned.

    Raises:
        NodeLost, WorkerLost: it did not end. ClusterError: its worker has other software, or Ray failed. Whatever
        `work` raised.
    """
    errors = ray.exceptions
    try:
        result = ray.get(ended)
    except errors.RayTaskError as error:
        raise error.cause from None
    except (errors.NodeDiedError, errors.ObjectLostError):
        raise NodeLost from None
    except errors.OutOfMemoryError:
        raise WorkerLost("its node had too little memory") from None
    except errors.WorkerCrashedError:
        raise WorkerLost("it may need more memory than a node has") from None
    except errors.RayError as error:
        raise ClusterError(f"the Ray cluster has failed: {cluster.reason(error)}") from None
    if isinstance(result, str):
        raise ClusterError(result)
    return result


def _failed(run: Run, data: str, info: DataInfo, device: str, compiled: bool, reason: str) -> Failed:
    """The record of a run that has lost `DEATHS` workers. Their machines are not known here."""
    here = environment(torch.device("cpu"), Mode("compiled" if compiled else "eager"))
    unknown = replace(here, device=device, hardware="unknown", device_name="unknown", threads=1)
    error = f"the worker died {DEATHS} times while it trained this run; {reason}"
    return Failed(**run.about(data, info, unknown), error=error)


def _device(asked: str, resources: dict[str, float]) -> str:
    gpus = resources.get("GPU", 0)
    if asked == "mps" or (asked == "cuda" and not gpus):
        raise ClusterError(f"the cluster has no {'GPU' if asked == 'cuda' else 'device mps'}")
    return "cuda" if gpus and asked != "cpu" else "cpu"


def split_sizes(data: Data, train_on: str) -> list[int | None]:
    """How many images a run trains on, validates with (None: with none), and is tested on."""
    examples, validation = loader.to_train_on(data.train_labels, train_on, data.info)
    return [len(examples), None if validation is None else len(validation), len(data.test_labels)]


def check(run: Run, trained: Trained, data: str, sizes: Callable[[str], list[int | None]]) -> Finished | Failed:
    """The record that a worker returned, if it belongs to this run.

    Args:
        data: the identity of the data; see core.data.identity.
        sizes: from `train_on` to what `split_sizes` returns.

    Raises:
        ClusterError: it belongs to another run, or its digest is not that of the weights.
    """
    try:
        record = records.decode(trained.record)
        if isinstance(record, Partial):
            raise ValueError("it is not trained to its end")
        pairs: dict[str, tuple[Any, Any]] = {  # what was returned, and what is expected
            "name": (record.name, run.name),
            "id": (record.spec_id, run.id),
            **{f"spec.{key}": (record.spec[key], value) for key, value in run.spec.items()},
            "code": (record.environment.code, CODE),
            "torch": (record.environment.torch, SOFTWARE.torch),
            "data": (record.data, data),
        }
        if isinstance(record, Finished):
            splits = record.metrics.train, record.metrics.validation, record.metrics.test
            pairs["images"] = [split and split.n for split in splits], sizes(run.spec["train_on"])
            pairs["digest"] = record.digest, checkpoint.digest(safetensors.torch.load(trained.weights))
    except (ValueError, KeyError, safetensors.SafetensorError) as error:
        raise ClusterError(f"a worker returned no result of {run.label} ({error}); it is not kept") from None
    for key, (returned, expected) in pairs.items():
        if returned != expected:
            raise ClusterError(
                f"a worker returned {run.label} with {key} {returned}, expected {expected}; it is not kept"
            )
    return record


def keep(run: Run, record: Record, weights: bytes, started: InProgress = frozenset()) -> Record:
    """Write the files of a run that a worker has trained, and return the record.

    Args:
        weights: the bytes of the file; empty if the run failed.
        started: the runs that have resume points. A result replaces them.

    Raises:
        core.store.StoreError: it cannot be written, or would replace one that cannot be read.
    """
    had = run.result()  # refuses to replace a record that cannot be read
    if isinstance(record, Failed) and had:  # it does not replace an earlier result
        return record
    points = run.resume_points() if run.is_in_progress(started) else []
    run = run.target
    if isinstance(record, Finished):
        if run.record.exists():  # it belongs to the old weights, so it must not stand beside the new ones
            reserve(run.weights, len(weights), 1)
            delete(run.record)
        atomic_write(run.weights, weights)
    keep_diff(run, record.environment)
    records.write_record(run.record, record)
    if isinstance(record, Finished):
        delete(*points)
    return record
