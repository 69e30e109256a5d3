"""The border between the pure step and the machine: compilation, donation, CUDA graphs, where compiled code is kept.

The step stays pure; only here is it turned into one that writes its new state over the old one.
"""

import contextlib
import ctypes
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core import inductor, store
from core.dataset import Cifar10
from core.spec import Spec, canonical, static_key
from core.step import State, make_train_step

# Inductor's own cache and the libraries made with it.
CACHE = Path(os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(__file__).resolve().parent.parent / ".cache")))

# The code that a compiled step is made of, as it is when this process imports it.
SOURCES = ("inductor", "jit", "loader", "model", "optim", "random", "step")
CODE = hashlib.sha256(b"".join((Path(__file__).parent / f"{name}.py").read_bytes() for name in SOURCES)).hexdigest()

Advance = Callable[[], None]

_compiled: dict[str, Callable[..., None]] = {}


class CompileError(Exception):
    """The step could not be compiled; the message is the first line of why."""


def leaves(tree: dict) -> Iterator[Tensor]:
    """The tensors of nested dicts, in order."""
    for value in tree.values():
        if isinstance(value, dict):
            yield from leaves(value)
        else:
            yield value


def to_device(tree: dict, device: torch.device) -> dict[str, Any]:
    """Nested dicts of tensors, copied to a device; float64 becomes float32 on MPS, which has none."""

    def move(value: Tensor) -> Tensor:
        return value.to(device, torch.float32 if device.type == "mps" and value.dtype == torch.float64 else None)

    return {key: to_device(value, device) if isinstance(value, dict) else move(value) for key, value in tree.items()}


def place(data: Cifar10, device: torch.device) -> Cifar10:
    """The images and labels on a device, where they stay."""
    return Cifar10(*(t.to(device) for t in data))


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA, then MPS, then the CPU.

    Raises:
        ValueError: it is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, present in there.items() if present)
    if not there[name]:
        raise ValueError(f"device {name} is not there; present: {', '.join(kind for kind in there if there[kind])}")
    return torch.device(name)


def compiler_problem(device: torch.device) -> str | None:
    """Why the step cannot be compiled on this machine, or None."""
    compilers = [name for name in (os.environ.get("CXX"), "g++", "clang++") if name]
    if device.type == "cpu" and not any(map(shutil.which, compilers)):
        return "no C++ compiler (g++ or clang++) was found"
    if device.type == "mps":
        return "the step is not compiled for MPS"
    return None


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def in_place(step: Callable[[State, dict, dict], State]) -> Callable[[State, dict, dict], None]:
    """The pure step as one that writes the new state into the old one's buffers."""

    def donated(state: State, data: dict, hyper: dict) -> None:
        for old, new in zip(leaves(state), leaves(step(state, data, hyper)), strict=True):
            old.copy_(new)

    return donated


def fuse(spec: Spec, state: State, data: dict, hyper: dict, compiled: bool = True) -> Advance:
    """The train step of a resolved spec, bound to standing buffers: each call advances `state` by one step.

    Compiled, it is one graph; specs that differ only in what reaches the step as a tensor share one compilation.

    Raises:
        CompileError: the compilation failed.
    """
    device = state["step"].device
    # "high" lets float32 products run in TF32 where the hardware has it (NVIDIA, since Ampere).
    torch.set_float32_matmul_precision("high" if spec["precision"] == "tf32" else "highest")
    step = in_place(make_train_step(spec))
    if not compiled:
        return lambda: step(state, data, hyper)
    try:
        return (_library if device.type == "cpu" else _cuda_graph)(spec, step, (state, data, hyper))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Dynamo, inductor, the C++ compiler and the loader each raise their own
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CompileError(reason[:200]) from error


def _library(spec: Spec, step: Callable[[State, dict, dict], None], trees: tuple[State, dict, dict]) -> Advance:
    """The step as a shared library under CACHE, compiled by the first process that needs it.

    Loading it takes neither Dynamo nor inductor, whose imports and tracing would cost 5 s in each process, and every
    process runs the same machine code.
    """
    tensors = [t for tree in trees for t in leaves(tree)]
    path = CACHE / f"{_fingerprint(spec, tensors)}.so"
    if not path.exists():
        _build(path, step, trees, tensors)
    _keep_freed_memory()
    runner = torch._C._aoti.AOTIModelContainerRunnerCpu(str(path), 1)
    order = json.loads(path.with_suffix(".inputs").read_text())
    inputs = [tensors[i] for i in order]

    def advance() -> None:
        runner.run(inputs)

    return advance


def _keep_freed_memory() -> None:
    """Have glibc keep the buffers that a step frees for the next one. Given back to the system, they are mapped anew in
    each step, 7,000 page faults and up to a fifth of the time at batch 512."""
    trim_threshold, mmap_threshold = -1, -3  # parameters of mallopt(3)
    with contextlib.suppress(AttributeError, OSError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(trim_threshold, 1 << 30)
        mallopt(mmap_threshold, 1 << 25)  # the largest that it takes


def _fingerprint(spec: Spec, tensors: list[Tensor]) -> str:
    """A hash of all that the compiled step depends on: the code, the spec's graph, the tensors, torch, the machine."""
    signature = [(str(t.dtype), list(t.shape)) for t in tensors]
    machine = [torch.__version__, torch.get_num_threads(), platform.machine(), dict(torch.cpu.get_capabilities())]
    return hashlib.sha256(canonical([CODE, static_key(spec), signature, machine]).encode()).hexdigest()[:32]


def _build(path: Path, step: Callable[..., None], trees: tuple[State, dict, dict], tensors: list[Tensor]) -> None:
    """Compile the step into `path`, and beside it, as JSON, which of `tensors` are its inputs, in order.

    Dynamo traces one full graph, inductor turns it into C++ and that into a shared library.
    """
    graphs: list[torch.fx.GraphModule] = []
    order: list[int] = []

    def capture(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Callable[..., tuple]:
        graphs.append(graph)

        def note_order(*inputs: Tensor) -> tuple:
            # Dynamo chooses which tensors are inputs, and their order; they are told by identity.
            order.extend(next(i for i, t in enumerate(tensors) if t is x) for x in inputs)
            return ()

        return note_order

    with inductor.compiling():
        from torch._subclasses import FakeTensorMode
        from torch.fx.experimental.proxy_tensor import make_fx

        torch.compile(step, fullgraph=True, dynamic=False, backend=capture)(*trees)
        with FakeTensorMode() as fake:
            inputs = [fake.from_tensor(tensors[i], static_shapes=True) for i in order]
            lowered = make_fx(graphs[0])(*inputs)  # torch.func's transforms become the operations that they stand for
        library = inductor.aot_compile(lowered, inputs)
    store.atomic_write(path.with_suffix(".inputs"), json.dumps(order).encode())
    store.atomic_write(path, library.read_bytes())


def _cuda_graph(spec: Spec, step: Callable[..., None], trees: tuple[State, dict, dict]) -> Advance:
    """The compiled step recorded into a CUDA graph, whose replay needs no work of the host.

    Recording wants a warm-up, which compiles and takes steps; the state is put back afterwards.
    https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """
    state = trees[0]
    compiled = _compiled.setdefault(static_key(spec), torch.compile(step, fullgraph=True, dynamic=False))
    before = [t.clone() for t in leaves(state)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            compiled(*trees)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        compiled(*trees)
    for t, old in zip(leaves(state), before, strict=True):
        t.copy_(old)
    return graph.replay
