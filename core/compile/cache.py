"""Compiled steps as shared libraries: kept in a folder of the project's, whole or not at all, and made in a process of
their own.

Loading one takes neither Dynamo nor inductor, whose imports and tracing would cost 5 s in each process, and every
process runs the same machine code.
"""

import contextlib
import ctypes
import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.runs import store
from core.spec import canonical

# Inductor's own cache and the libraries made with it.
CACHE = Path(os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(__file__).resolve().parents[2] / ".cache")))

# Compiles, in an empty folder: the bytes of a library, and which tensors of the caller's are its inputs, in order.
Make = Callable[[Path], tuple[bytes, list[int]]]

_makers: dict[Path, int] = {}  # the processes that compile, by what they make


def path_of(key: Any) -> Path:
    """Where the library of a key is kept; the key is all that it depends on."""
    return CACHE / f"{hashlib.sha256(canonical(key).encode()).hexdigest()[:32]}.so"


def inputs_of(path: Path) -> list[int] | None:
    """Which tensors are the inputs of a library; None unless it is there, and as it was written."""
    try:
        kept = json.loads(path.with_suffix(".json").read_bytes())
        return kept["inputs"] if kept["sha256"] == _hash(path.read_bytes(), kept["inputs"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _hash(library: bytes, inputs: list[int]) -> str:
    return hashlib.sha256(library + canonical(inputs).encode()).hexdigest()


def start(path: Path, make: Make) -> None:
    """Start to make a library in another process, if it is not kept already.

    That process has this one's imports, so meanwhile this one can do something else, can be stopped at once, and never
    holds the compiler's 300 MB. Where processes cannot be forked, nothing happens before `obtain`.
    """
    if sys.platform != "linux" or path in _makers or inputs_of(path) is not None:
        return
    stops = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, stops)  # so that none finds the new process with the old one's handlers
    try:
        _makers[path] = os.fork()
        if not _makers[path]:
            try:
                _seclude()
                _make_and_keep(path, make)
            finally:
                os._exit(0)  # if it has failed, `obtain` tries again, and says why
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stops)


def _seclude() -> None:
    """Make a forked process one that shares nothing: no signal but at the death of its parent, no files, no output, and
    none of torch's threads, which did not come along."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    os.closerange(3, 1024)  # among them the lock of a run, which else would outlive its holder
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nothing, stream)
    torch.set_num_threads(1)


def obtain(path: Path, make: Make) -> list[int]:
    """See to it that a library is there; returns which tensors are its inputs. Raises whatever `make` raises."""
    if inputs := inputs_of(path):
        return inputs
    start(path, make)
    if maker := _makers.pop(path, None):
        with contextlib.suppress(ChildProcessError):  # it has ended, and somebody else was told
            os.waitpid(maker, 0)
    return inputs_of(path) or _make_and_keep(path, make)


def _make_and_keep(path: Path, make: Make) -> list[int]:
    with store.locked(path.with_suffix(".lock")):
        if found := inputs_of(path):  # another process has made it meanwhile
            return found
        scratch = path.with_suffix(".scratch")
        shutil.rmtree(scratch, ignore_errors=True)  # where a process was killed, 130 MB
        store.sweep(path.parent, path.stem)
        try:
            scratch.mkdir()
            library, inputs = make(scratch)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        store.atomic_write(path, library)
        store.write_json(path.with_suffix(".json"), {"inputs": inputs, "sha256": _hash(library, inputs)})
    return inputs


def bind(path: Path, inputs: list[Tensor]) -> Callable[[], None]:
    """The function of a library that is there, bound to its inputs, which it changes in place."""
    _keep_freed_memory()
    runner = torch._C._aoti.AOTIModelContainerRunnerCpu(str(path), 1)

    def call() -> None:
        runner.run(inputs)

    return call


def _keep_freed_memory() -> None:
    """Have glibc keep the buffers that a step frees for the next one. Given back to the system, they are mapped anew in
    each step, 7,000 page faults and up to a fifth of the time at batch 512."""
    trim_threshold, mmap_threshold = -1, -3  # parameters of mallopt(3)
    with contextlib.suppress(AttributeError, OSError):  # another C library
        libc = ctypes.CDLL(None)
        libc.malloc_trim(0)  # what reading the data has left, 80 MB
        libc.mallopt(trim_threshold, 1 << 30)
        libc.mallopt(mmap_threshold, 1 << 25)  # the largest that it takes
