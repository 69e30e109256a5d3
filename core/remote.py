"""Trains runs on many machines: Ray (https://docs.ray.io) sends them to workers, this process writes their files."""

import contextlib
import functools
import itertools
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
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

from core.code_hash import CODE, core_bytes_hash
from core.data import loader
from core.data.identity import data_identity
from core.data.tensors import Data
from core.errors import UserError
from core.events import Ended, Listener, Started
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
FIRST_ANSWER = 10.0  # seconds in which the head of a cluster must answer
LOOK = 1.0  # seconds between two checks of the cluster
QUIET = 10.0  # seconds for which runs wait for a node, or for the head, before a message says so
GONE = 45.0  # seconds after which a silent head is lost. After 60, Ray would kill this process without a message
LOCAL = "local"  # instead of an address: a cluster of this machine alone, for this call
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # send no statistics
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # send no environment: each node has the project and its own
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # else a node that dies prints pages of its state here
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # a task without a GPU leaves CUDA_VISIBLE_DEVICES as it is
}
HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))  # what a client sends first


class ClusterError(UserError):
    """Ray is not installed, there is no cluster, or the cluster has other code."""


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
        stored: a reference to the four tensors of the data, as NumPy arrays in Ray's object store, and its `info`. In a
            list, Ray hands over the reference itself.

    Raises:
        core.session.TooLarge: as `run_cohort`.
    """
    torch.set_num_threads(1)
    data = _mapped(*stored, device)
    with tempfile.TemporaryDirectory() as out:
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
        return loader.place(Data.of(map(torch.from_numpy, ray.get(stored)), info), torch.device(device))


@contextlib.contextmanager
def connected(address: str) -> Iterator[Any]:
    """The module ray, connected to the cluster at an address. "local" starts one on this machine and ends it at exit.

    Raises:
        ClusterError: Ray is not installed, or there is no cluster that this process can use.
    """
    if not address.strip() or "://" in address:
        raise ClusterError(f"--ray {address!r}, expected HOST:PORT, auto, or nothing for this machine alone")
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    _choose_token(address)
    try:
        import ray
    except ImportError:
        raise ClusterError("Ray is not installed: `uv run --group ray main.py ...` has it") from None
    handler = signal.getsignal(signal.SIGTERM)
    try:
        head = ray._private.services.canonicalize_bootstrap_address(address)  # resolves "auto"; None for "local"
        if head and (problem := _silent(head, FIRST_ANSWER)):  # else ray.init waits for minutes
            raise ConnectionError(problem)
        with _quiet():
            ray.init(address, log_to_driver=False, include_dashboard=False, configure_logging=False)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        ray.shutdown()
        raise ClusterError(f"no Ray cluster at {address}: {_reason(error)}") from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray has set its own, which exits at once
    try:
        yield ray
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Discard stderr. While Ray cannot connect, its C++ code writes a line there each second."""
    sys.stderr.flush()
    stderr, devnull = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(devnull, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(devnull)


def _choose_token(address: str) -> None:
    """Choose the token by which the processes of Ray trust each other. By default, Ray writes one into the home folder
    for a local cluster. From then on `ray start` demands it, but a process that names an address does not send it.
    """
    variables = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    known = bool(variables) or os.path.exists(os.path.expanduser("~/.ray/auth_token"))
    if address == LOCAL and not known:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # for this process and its cluster
    elif known:
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # a cluster without tokens ignores it


def _silent(address: str, timeout: float) -> str | None:
    """Why the head of a cluster does not answer at HOST:PORT; None if it does. The head is a gRPC server: it answers
    the first bytes of HTTP/2 with its settings. A stopped process, or another kind of server, does not."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout) as connection:
            if os.environ.get("RAY_USE_TLS") == "1":
                return None
            connection.sendall(HTTP2)
            return None if connection.recv(9)[3:4] == b"\x04" else "what answers there is no Ray cluster"
    except TimeoutError:
        return f"no answer within {timeout:g} s"
    except OSError as error:
        return error.strerror or str(error)


def _reason(error: BaseException) -> str:
    """The message of Ray in one line, with a remedy if there is a known one."""
    message = " ".join(str(error).split())
    if "InvalidAuthToken" in f"{error} {error.__cause__}":
        return "it demands a token: copy ~/.ray/auth_token of its head; set RAY_AUTH_MODE=token before Ray is imported"
    if "ersion mismatch" in message:
        message += ": every node needs the Ray and the Python of this one"
    return message


class Watch:
    """Checks a cluster every `LOOK` seconds, and reports what the runs wait for."""

    def __init__(self, ray: Any, device: str, on_notice: Callable[[str], None]) -> None:
        self.ray, self.what, self.on_notice = ray, "GPU" if device == "cuda" else "CPU", on_notice
        self.head = ray.get_runtime_context().gcs_address
        self.looked = -1.0
        self.answered = self.able = time.monotonic()  # when the head last answered, and had a node for a run
        self.noticed = False
        self.count = 1

    def at_once(self) -> int:
        """How many runs the cluster trains at once. At least 1: a cluster that can grow does so only for waiting tasks.
        0 while the head does not answer, since most calls of Ray would then not return.

        Raises:
            ClusterError: the head has not answered for `GONE` seconds.
        """
        now = time.monotonic()
        if now - self.looked < LOOK:
            return self.count
        problem = _silent(self.head, timeout=2)
        count = 0 if problem else int(self.ray.cluster_resources().get(self.what, 0))
        self.looked = now = time.monotonic()
        self.answered = self.answered if problem else now
        if count:
            self.able, self.noticed = now, False
        if now - self.answered > GONE:
            raise ClusterError(f"the head of the Ray cluster, {self.head}, is gone ({problem})")
        if now - self.able > QUIET and not self.noticed:
            self.noticed = True
            why = f"the head of the cluster, {self.head}, does not answer ({problem})"
            self.on_notice(f"{why if problem else f'the cluster has no {self.what}'}; the runs wait for it")
        self.count = 0 if problem else max(1, count)
        return self.count


def train(
    groups: Iterable[Group],
    data: Data,
    address: str = LOCAL,
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
        listener: called when a run is handed to the cluster, and with its record. No other event comes from a worker.
        on_notice: called with a sentence when the runs wait for the cluster.

    Raises:
        ClusterError: there is no cluster, it lacks the device, it was lost, or a worker has other software or returned
            a result of another run.
        core.store.StoreError: a file cannot be written.
    """
    data_name, coming = data_identity(data), iter(groups)
    waiting = deque(itertools.islice(coming, 1))
    started = in_progress(waiting[0][0].out) if waiting else frozenset()
    sizes = functools.cache(functools.partial(split_sizes, data))
    tasks: dict[Any, tuple[list[Run], contextlib.ExitStack]] = {}  # with the locks of their runs
    deaths: Counter[Run] = Counter()  # of workers that were training the run

    def more() -> bool:
        waiting.extend(itertools.islice(coming, 0 if waiting else 1))
        return bool(waiting)

    def end(run: Run, record: Record) -> Record:
        listener(run, Ended(record))
        return record

    with connected(address) as ray, contextlib.ExitStack() as held:
        chosen = _device(device, ray.cluster_resources())
        task = ray.remote(num_cpus=1, num_gpus=int(chosen == "cuda"), max_retries=0)(by_value())
        stored = [ray.put([t.numpy() for t in data.tensors.values()]), data.info]
        watch = Watch(ray, chosen, on_notice)
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
            if not at_once or not tasks:
                time.sleep(LOOK)
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
        raise ClusterError(f"the Ray cluster has failed: {_reason(error)}") from None
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
        returned: dict[str, Any] = {
            "name": record.name,
            "id": record.spec_id,
            **{f"spec.{key}": value for key, value in record.spec.items()},  # `decode` has checked the number of epochs
            "code": record.environment.code,
            "torch": record.environment.torch,
            "data": record.data,
        }
        expected: dict[str, Any] = {
            "name": run.name,
            "id": run.id,
            **{f"spec.{key}": value for key, value in run.spec.items()},
            "code": CODE,
            "torch": SOFTWARE.torch,
            "data": data,
        }
        if isinstance(record, Finished):
            splits = record.metrics.train, record.metrics.validation, record.metrics.test
            returned["images"] = [split and split.n for split in splits]
            returned["digest"] = record.digest
            expected["images"] = sizes(run.spec["train_on"])
            expected["digest"] = checkpoint.digest(safetensors.torch.load(trained.weights))
    except (ValueError, KeyError, safetensors.SafetensorError) as error:
        raise ClusterError(f"a worker returned no result of {run.label} ({error}); it is not kept") from None
    for key, value in expected.items():
        if returned[key] != value:
            raise ClusterError(
                f"a worker returned {run.label} with {key} {returned[key]}, expected {value}; it is not kept"
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
