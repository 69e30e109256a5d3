"""Processes that build: forked, cut off from their parent, and ended with it, however it ends.

While another process compiles, this one can do something else, can be stopped at once, and never holds the compiler's
300 MB.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import NamedTuple, NoReturn

import torch

CAN_FORK = sys.platform == "linux"
CANNOT_DIFFERENTIATE = 2  # the exit status of a builder


class BuildError(Exception):
    """A library could not be built; the message is one line."""


class ForkError(BuildError):
    """Forks of this process cannot build."""


class Builder(NamedTuple):
    """A process that builds a library. It sends the reason if it fails, and ends when its parent closes the channel."""

    process: int
    channel: socket.socket


_builders: dict[str, Builder] = {}  # by the name of what they build


def is_at_work(name: str) -> bool:
    """Whether a builder of this name was started and not yet waited for."""
    return name in _builders


def start(name: str, work: Callable[[], None]) -> None:
    """Start to do some work in another process, which has what this one has imported.

    Raises:
        OSError: no process can be started.
    """
    _builders[name] = _fork(work)


def wait(name: str) -> None:
    """Wait until a builder has finished; end it if this process is to stop.

    Raises:
        ForkError: it has to be done in this process. BuildError: it has failed.
    """
    _wait(_builders.pop(name))


def _fork(work: Callable[[], None]) -> Builder:
    channel, far_end = socket.socketpair()
    # Block signals so that the child never runs our handlers.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        process = os.fork()
        if not process:
            channel.close()
            _run(work, far_end)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    far_end.close()
    with contextlib.suppress(OSError):  # The child has ended. It does this too; whoever comes first, both can go on.
        os.setpgid(process, process)
    return Builder(process, channel)


def _run(work: Callable[[], None], channel: socket.socket) -> NoReturn:
    """What the forked process does."""
    status = 1
    try:
        _isolate(channel)
        if _can_differentiate():
            work()
            status = 0
        else:
            status = CANNOT_DIFFERENTIATE
    except BaseException as error:
        channel.send(first_line(error).encode())
    finally:
        os._exit(status)


def _can_differentiate() -> bool:
    """Whether autograd works in this process. It does not in a fork of a process where it has started its threads, one
    for each GPU, with the first gradient (https://github.com/pytorch/pytorch/wiki/Autograd-and-Fork)."""
    try:
        torch.zeros((), requires_grad=True).backward()
    except RuntimeError:
        return False
    return True


def _isolate(channel: socket.socket) -> None:
    """Cut a forked process off from its parent: a process group, signals, files and output of its own; only the channel
    is left. It uses one thread, as a fork does not copy the threads of torch's pool."""
    os.setpgid(0, 0)
    threading.Thread(target=_end_with_parent, args=(channel,), daemon=True).start()
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    sys.stdin = sys.stdout = sys.stderr = open(os.devnull, "r+")  # noqa: SIM115
    # Let go of all open files: among them is the lock of a run, which would stay locked after the end of the run. They
    # are replaced, not closed: else whatever is opened next gets the number of, say, a log that torch still writes to.
    for descriptor in {0, 1, 2, *map(int, os.listdir("/proc/self/fd"))}:
        if descriptor not in (channel.fileno(), sys.stdin.fileno()):
            os.dup2(sys.stdin.fileno(), descriptor, inheritable=descriptor < 3)
    torch.set_num_threads(1)


def _end_with_parent(channel: socket.socket) -> None:
    """End this process and the C++ compilers that it has started as soon as the parent closes the channel, or ends,
    however it ends: then the system closes it."""
    with contextlib.suppress(OSError):
        channel.recv(1)
    os.killpg(0, signal.SIGKILL)


def _wait(builder: Builder) -> None:
    with builder.channel:
        try:
            status = _status(builder)
        except BaseException:
            with contextlib.suppress(OSError):
                os.killpg(builder.process, signal.SIGKILL)
            _status(builder)
            raise
        if os.WIFSIGNALED(status):
            raise BuildError(f"the compiling process was ended by signal {os.WTERMSIG(status)}")
        if os.waitstatus_to_exitcode(status) == CANNOT_DIFFERENTIATE:
            raise ForkError("autograd does not work in forks of this process")
        reason = b""
        with contextlib.suppress(OSError):  # There is none.
            reason = builder.channel.recv(1000, socket.MSG_DONTWAIT)
        if reason:
            raise BuildError(reason.decode())


def _status(builder: Builder) -> int:
    try:
        return os.waitpid(builder.process, 0)[1]
    except ChildProcessError:  # Already reaped.
        return 0


def _forget_builders() -> None:
    """In a fork of this process: they are not its children. And while it held copies of their channels, they would not
    notice the end of their parent."""
    for builder in _builders.values():
        builder.channel.close()
    _builders.clear()


if CAN_FORK:
    os.register_at_fork(after_in_child=_forget_builders)


def first_line(error: BaseException) -> str:
    """The first line of an error's message and the first error that a C++ compiler names in it: at most 200 characters,
    none of them a control character."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    says = [line for line in lines[1:] if "error:" in line][:1]
    return "".join(c for c in ": ".join([lines[0], *says]) if c.isprintable())[:200]
