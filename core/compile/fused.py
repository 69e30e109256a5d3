"""The border between the pure step and the machine: compilation, donation, CUDA graphs.

The step stays pure; only here is it turned into one that writes its new state over the old one.
"""

import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from core.compile import cache, inductor
from core.functional import prng
from core.functional.step import State, make_train_step
from core.functional.tree import leaves
from core.runs.provenance import CODE
from core.spec import Spec, static_key

Advance = Callable[[], None]
Trees = tuple[State, dict, dict]  # state, data, hyper

_compiled: dict[str, Callable[..., None]] = {}


class CompileError(Exception):
    """The step could not be compiled; the message is the first line of why."""


def compiler_problem(device: torch.device) -> str | None:
    """Why the step cannot be compiled on this machine, or None."""
    compilers = [name for name in (os.environ.get("CXX"), "g++", "clang++") if name]
    if device.type == "cpu" and not any(map(shutil.which, compilers)):
        return "no C++ compiler (g++ or clang++) was found"
    if device.type == "mps":
        return "the step is not compiled for MPS"
    return None


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
    if not compiled:
        step = in_place(make_train_step(spec))
        return lambda: step(state, data, hyper)
    try:
        return (_ahead_of_time if device.type == "cpu" else _cuda_graph)(spec, (state, data, hyper))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Dynamo, inductor, the C++ compiler and the loader each raise their own
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CompileError(reason[:200]) from error


def compile_ahead(spec: Spec, state: State, data: dict, hyper: dict) -> None:
    """Start to compile, in another process, what `fuse` will be asked for on a CPU."""
    cache.start(*_recipe(spec, (state, data, hyper)))


def _ahead_of_time(spec: Spec, trees: Trees) -> Advance:
    """The step as a shared library, compiled by the first process that needs it."""
    path, make = _recipe(spec, trees)
    tensors = [t for tree in trees for t in leaves(tree)]
    return cache.bind(path, [tensors[i] for i in cache.obtain(path, make)])


def _recipe(spec: Spec, trees: Trees) -> tuple[Path, cache.Make]:
    """Where the library of a step is kept, and how it is made: Dynamo traces one full graph, inductor turns it into C++
    and that into a library."""
    tensors = [t for tree in trees for t in leaves(tree)]
    threads = torch.get_num_threads()
    signature = [(str(t.dtype), list(t.shape)) for t in tensors]
    capability = torch.backends.cpu.get_cpu_capability()  # what torch makes use of, of what the CPU has
    machine = [torch.__version__, threads, platform.machine(), capability, dict(torch.cpu.get_capabilities())]

    def make(scratch: Path) -> tuple[bytes, list[int]]:
        graphs: list[torch.fx.GraphModule] = []
        order: list[int] = []

        def capture(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Callable[..., tuple]:
            graphs.append(graph)

            def note_order(*inputs: Tensor) -> tuple:
                # Dynamo chooses which tensors are inputs, and their order; they are told by identity.
                order.extend(next(i for i, t in enumerate(tensors) if t is x) for x in inputs)
                return ()

            return note_order

        with inductor.compiling(scratch):
            torch.compiler.allow_in_graph(prng.bits)  # 160 operations that Dynamo need not follow one by one
            step = in_place(make_train_step(spec))
            torch.compile(step, fullgraph=True, dynamic=False, backend=capture)(*trees)
            return inductor.aot_compile(graphs[0], [tensors[i] for i in order], threads).read_bytes(), order

    return cache.path_of([CODE, static_key(spec), signature, machine]), make


def _cuda_graph(spec: Spec, trees: Trees) -> Advance:
    """The compiled step recorded into a CUDA graph, whose replay needs no work of the host.

    Recording wants a warm-up, which compiles and takes steps; the state is put back afterwards.
    https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """
    state = trees[0]
    step = in_place(make_train_step(spec))
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
