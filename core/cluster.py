"""Connects to a Ray cluster (https://docs.ray.io), and watches it while it works."""

import contextlib
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from core.errors import UserError

FIRST_ANSWER = 10.0  # seconds in which the head of a cluster must answer
LOOK = 1.0  # seconds between two checks of the cluster
QUIET = 10.0  # seconds for which runs wait for a node, or for the head, before a message says so
LOST = 45.0  # seconds after which a silent head is lost. After 60, Ray would kill this process without a message
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
        why, python = "is not installed", ""
        if sys.version_info >= (3, 14):
            why, python = "has no wheels for Python 3.14", "--python 3.13 "
        raise ClusterError(f"Ray {why}: `uv run {python}--group ray main.py ...` has it") from None
    handler = signal.getsignal(signal.SIGTERM)
    try:
        head = ray._private.services.canonicalize_bootstrap_address(address)  # resolves "auto"; None for "local"
        if head and (problem := silent(head, FIRST_ANSWER)):  # else ray.init waits for minutes
            raise ConnectionError(problem)
        with _quiet():
            ray.init(address, log_to_driver=False, include_dashboard=False, configure_logging=False)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        ray.shutdown()
        raise ClusterError(f"no Ray cluster at {address}: {reason(error)}") from None
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


def silent(address: str, timeout: float) -> str | None:
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


def reason(error: BaseException) -> str:
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
            ClusterError: the head has not answered for `LOST` seconds.
        """
        now = time.monotonic()
        if now - self.looked < LOOK:
            return self.count
        problem = silent(self.head, timeout=2)
        count = 0 if problem else int(self.ray.cluster_resources().get(self.what, 0))
        self.looked = now = time.monotonic()
        self.answered = self.answered if problem else now
        if count:
            self.able, self.noticed = now, False
        if now - self.answered > LOST:
            raise ClusterError(f"the head of the Ray cluster, {self.head}, is gone ({problem})")
        if now - self.able > QUIET and not self.noticed:
            self.noticed = True
            why = f"the head of the cluster, {self.head}, does not answer ({problem})"
            self.on_notice(f"{why if problem else f'the cluster has no {self.what}'}; the runs wait for it")
        self.count = 0 if problem else max(1, count)
        return self.count
