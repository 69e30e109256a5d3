"""The border between the pure step and the machine: compilation, writing in place, CUDA graphs."""

import contextlib
import hashlib
import itertools
import os
import platform
import shlex
import shutil
import sys
import types
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from core.code_hash import CODE
from core.compile import cache, inductor
from core.compile.cache import CompileError
from core.functional.step import State, make_train_step
from core.functional.tree import leaves
from core.mode import Mode
from core.spec import CIFAR10, DataInfo, Spec, canonical, static, static_key

Trees = tuple[State, dict, dict]  # state, data, hyper

_compiled: dict[tuple[str, DataInfo, int], Callable[..., None]] = {}  # on CUDA: static key, data, cohort


class Step(NamedTuple):
    """A train step bound to its buffers."""

    advance: Callable[[], None]  # by one step
    mode: Mode
    problem: str = ""  # why it is unpatched, in one line; otherwise empty


def compiler_problem(device: torch.device) -> str | None:
    """Why no step can be compiled for this device, or None. A step from the cache needs no compiler."""
    if device.type == "cpu" and sys.platform == "win32":
        return "the step is not compiled on Windows"
    if device.type == "cpu" and not _compiler():
        return cache.with_remedy("no C++ compiler (g++ or clang++) was found", *cache.COMPILER)
    if device.type == "mps":
        return "the step is not compiled for MPS"
    return None


def _compiler() -> list[str]:
    """The command of the C++ compiler as words: $CXX, such as "ccache g++ -O1", if it names programs, else g++ or
    clang++; empty without one."""
    own = os.environ.get("CXX", "")
    commands = [[own], ["g++"], ["clang++"]]
    with contextlib.suppress(ValueError):  # a quote without its other half
        commands.insert(1, shlex.split(own))
    for words in commands:
        programs = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
        if programs and all(map(shutil.which, programs)):
            return words
    return []


def make_step(spec: Spec, state: State, data: dict, info: DataInfo = CIFAR10) -> Callable[[State, dict, dict], None]:
    """The train step of a resolved spec, in place. If the state has a leading axis, it is that of a cohort: its members
    share all data but the order, and take the step independently of each other."""
    step = make_train_step(static(spec), info)
    if state["step"].ndim:
        step = torch.func.vmap(step, in_dims=(0, {key: 0 if key == "order" else None for key in data}, 0))
    return in_place(step)


def in_place(step: Callable[[State, dict, dict], State]) -> Callable[[State, dict, dict], None]:
    """The pure step as one that writes the new state into the buffers of the old state."""

    def donated(state: State, data: dict, hyper: dict) -> None:
        for old, new in zip(leaves(state), leaves(step(state, data, hyper)), strict=True):
            old.copy_(new)

    # Dynamo caches compilations by code object, and only a few for each. So every step has a code object of its own.
    return types.FunctionType(
        donated.__code__.replace(), donated.__globals__, donated.__name__, None, donated.__closure__
    )


def fuse(spec: Spec, state: State, data: dict, hyper: dict, compiled: bool = True, info: DataInfo = CIFAR10) -> Step:
    """The train step of a resolved spec and a data set, bound to its buffers.

    A compiled step is one graph. Specs that differ only in values that reach the step as tensors share it.

    Raises:
        CompileError: The step cannot be compiled.
    """
    device = state["step"].device
    # "high" lets float32 products run in TF32 where the hardware has it (NVIDIA, since Ampere).
    torch.set_float32_matmul_precision("high" if spec["precision"] == "tf32" else "highest")
    if not compiled:
        inductor.load()
        step = make_step(spec, state, data, info)
        return Step(lambda: step(state, data, hyper), Mode("eager", _cohort(state)))
    try:
        return (_ahead_of_time if device.type == "cpu" else _cuda_graph)(spec, (state, data, hyper), info)
    except (CompileError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # Dynamo, inductor, Triton and the loader raise their own types.
        raise CompileError(cache.first_line(error)) from error


def _ahead_of_time(spec: Spec, trees: Trees, info: DataInfo) -> Step:
    """The step as a shared library. The first process that needs it compiles it."""
    recipe = _recipe(spec, trees, info)
    if (problem := compiler_problem(trees[0]["step"].device)) and not cache.find(recipe):
        raise CompileError(problem)
    library = cache.get_or_build(recipe)
    advance = cache.bind(library, [t for tree in trees for t in leaves(tree)])
    return Step(advance, Mode("unpatched" if library.problem else "compiled", _cohort(trees[0])), library.problem)


def _recipe(spec: Spec, trees: Trees, info: DataInfo = CIFAR10) -> cache.Recipe:
    """How to build the library of a step."""
    tensors = [t for tree in trees for t in leaves(tree)]
    threads, compiler = torch.get_num_threads(), _compiler()
    signature = [(str(t.dtype), list(t.shape)) for t in tensors]
    capability = torch.backends.cpu.get_cpu_capability()  # the instructions of this CPU that torch uses
    machine = [torch.__version__, threads, platform.machine(), capability, dict(torch.cpu.get_capabilities())]
    compiler_options = [word for word in compiler if word.startswith("-")]
    key = [CODE, static_key(spec), repr(info), signature, machine, compiler_options]
    # By itself inductor would try only $CXX or g++.
    settings = {"cpp.threads": threads, "cpp.cxx": (None, shlex.join(compiler))}
    build = partial(inductor.build, partial(make_step, spec, *trees[:2], info), trees, settings)
    return cache.Recipe(hashlib.sha256(canonical(key).encode()).hexdigest()[:32], len(tensors), build)


def _cuda_graph(spec: Spec, trees: Trees, info: DataInfo) -> Step:
    """The compiled step as a CUDA graph, which the GPU replays without work of the host.

    The first warm-up step compiles. After the recording, the state is as before.
    https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """
    state, data, _ = trees
    if problem := compiler_problem(state["step"].device):
        raise CompileError(problem)
    before = [t.clone() for t in leaves(state)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with cache.one_at_a_time, cache.environment(), inductor.pinned(), torch.cuda.stream(stream):
        step = torch.compile(make_step(spec, state, data, info), fullgraph=True, dynamic=False)
        compiled = _compiled.setdefault((static_key(spec), info, _cohort(state)), step)
        for _ in range(3):
            compiled(*trees)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        compiled(*trees)
    for t, old in zip(leaves(state), before, strict=True):
        t.copy_(old)
    return Step(graph.replay, Mode("compiled", _cohort(state)))


def _cohort(state: State) -> int:
    """The number of runs in a state."""
    return len(state["step"]) if state["step"].ndim else 1
