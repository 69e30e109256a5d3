"""The border between the pure step and the machine: compilation, donation, CUDA graphs.

The step stays pure; only here is it turned into one that writes its new state over the old one.
"""

import os
import platform
import shlex
import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core.code_hash import CODE
from core.compile import cache, inductor, worker
from core.compile.cache import first_line
from core.functional import prng
from core.functional.step import State, make_train_step
from core.functional.tree import leaves
from core.mode import Mode
from core.spec import CIFAR10, DataInfo, Spec, static, static_key

Trees = tuple[State, dict, dict]  # state, data, hyper

_compiled: dict[tuple[str, DataInfo, int], Callable[..., None]] = {}  # on CUDA: static key, data, cohort


class Step(NamedTuple):
    """A train step bound to its buffers.

    Attributes:
        advance: advances the state by one step.
        mode: how it was made.
        problem: why it is unpatched, in one line; otherwise empty.
    """

    advance: Callable[[], None]
    mode: Mode
    problem: str = ""


class CompileError(Exception):
    """The step could not be compiled; the message is one line that says why."""


def compiler_problem(device: torch.device) -> str | None:
    """Why no step can be compiled for this device, or None. A step that was compiled earlier needs no compiler."""
    if device.type == "cpu" and _compiler() is None:
        return "no C++ compiler (g++ or clang++) was found"
    if device.type == "mps":
        return "the step is not compiled for MPS"
    return None


def _compiler() -> str | None:
    """The C++ compiler as a shell would take it: $CXX, such as "ccache g++ -O1", if there is such a program, else g++
    or clang++."""
    own = os.environ.get("CXX", "")
    candidates = (shlex.quote(own) if shutil.which(own) else own, "g++", "clang++")
    return next((text for text in candidates if _are_programs(text)), None)


def _are_programs(command: str) -> bool:
    """Whether all words of a command before its first option are programs."""
    try:
        words = shlex.split(command)
    except ValueError:  # a quote without its other half
        return False
    count = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    return count > 0 and all(shutil.which(word) for word in words[:count])


def _compiler_options() -> list[str]:
    """The options of the C++ compiler that the user has set."""
    return [word for word in shlex.split(_compiler() or "") if word.startswith("-")]


def make_step(spec: Spec, state: State, data: dict, info: DataInfo = CIFAR10) -> Callable[[State, dict, dict], None]:
    """The train step of a resolved spec, in place. A state with a leading axis is that of a cohort: its members, which
    share all data but the order, take the step independently of each other."""
    step = make_train_step(static(spec), info)
    if state["step"].ndim:
        step = torch.func.vmap(step, in_dims=(0, {key: 0 if key == "order" else None for key in data}, 0))
    return in_place(step)


def in_place(step: Callable[[State, dict, dict], State]) -> Callable[[State, dict, dict], None]:
    """The pure step as one that writes the new state into the buffers of the old one."""

    def donated(state: State, data: dict, hyper: dict) -> None:
        for old, new in zip(leaves(state), leaves(step(state, data, hyper)), strict=True):
            old.copy_(new)

    # Dynamo keeps what it has compiled with the code object, and only for so many shapes.
    return types.FunctionType(
        donated.__code__.replace(), donated.__globals__, donated.__name__, None, donated.__closure__
    )


def fuse(spec: Spec, state: State, data: dict, hyper: dict, compiled: bool = True, info: DataInfo = CIFAR10) -> Step:
    """The train step of a resolved spec and a data set, bound to standing buffers.

    Compiled, it is one graph; specs that differ only in what reaches the step as a tensor share one compilation.

    Raises:
        CompileError: the step could not be compiled.
    """
    device = state["step"].device
    # "high" lets float32 products run in TF32 where the hardware has it (NVIDIA, since Ampere).
    torch.set_float32_matmul_precision("high" if spec["precision"] == "tf32" else "highest")
    if not compiled:
        cache.repair_environment()
        inductor.load()
        step = make_step(spec, state, data, info)
        return Step(lambda: step(state, data, hyper), Mode("eager", _cohort(state)))
    try:
        return (_ahead_of_time if device.type == "cpu" else _cuda_graph)(spec, (state, data, hyper), info)
    except (CompileError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # Dynamo, inductor, Triton and the loader each raise their own.
        raise CompileError(first_line(error)) from error


def _ahead_of_time(spec: Spec, trees: Trees, info: DataInfo) -> Step:
    """The step as a shared library, compiled by the first process that needs it."""
    recipe = _recipe(spec, trees, info)
    if (problem := compiler_problem(trees[0]["step"].device)) and not cache.find(recipe):
        raise CompileError(problem)
    library = cache.get_or_build(recipe)
    advance = cache.bind(library, [t for tree in trees for t in leaves(tree)])
    return Step(advance, Mode("unpatched" if library.problem else "compiled", _cohort(trees[0])), library.problem)


def _recipe(spec: Spec, trees: Trees, info: DataInfo = CIFAR10) -> cache.Recipe:
    """The library of a step: Dynamo traces one full graph, inductor turns it into C++ and that into a library."""
    tensors = [t for tree in trees for t in leaves(tree)]
    threads = torch.get_num_threads()
    signature = [(str(t.dtype), list(t.shape)) for t in tensors]
    capability = torch.backends.cpu.get_cpu_capability()  # the instructions of this CPU that torch uses
    machine = [torch.__version__, threads, platform.machine(), capability, dict(torch.cpu.get_capabilities())]
    compiler_options = _compiler_options()

    def build(scratch: Path) -> cache.Built:
        from torch._inductor import config

        check = worker.checker()
        compiler = {"cpp.cxx": (None, _compiler())}  # Inductor itself would try only $CXX or g++.
        with inductor.quiet():
            try:
                with inductor.pinned(), config.patch(compiler), inductor.patched(scratch):
                    return compile_step(inductor.options() | {"cpp.threads": threads}, "")
            except Exception as error:  # Another version of torch may not have what is patched, or use it otherwise.
                check()
                if cache.is_temporary(error):
                    raise
                with config.patch(compiler):
                    return compile_step({"cpp.threads": threads}, first_line(error))

    def compile_step(options: dict[str, Any], problem: str) -> cache.Built:
        graphs: list[torch.fx.GraphModule] = []
        order: list[int] = []

        def capture(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Callable[..., tuple]:
            graphs.append(graph)

            def note_order(*inputs: Tensor) -> tuple:
                # Dynamo chooses which tensors are inputs, and their order; `is` finds each among the caller's.
                order.extend(next(i for i, t in enumerate(tensors) if t is x) for x in inputs)
                return ()

            return note_order

        with inductor.without_collection():
            torch.compiler.allow_in_graph(prng.bits)  # 160 operations that Dynamo need not follow one by one
            step = make_step(spec, *trees[:2], info)
            torch.compile(step, fullgraph=True, dynamic=False, backend=capture)(*trees)
            library = inductor.aot_compile(graphs[0], [tensors[i] for i in order], options).read_bytes()
        return cache.Built(library, order, problem)

    key = [CODE, static_key(spec), repr(info), signature, machine, compiler_options]
    return cache.Recipe(cache.name_of(key), len(tensors), build)


def _cuda_graph(spec: Spec, trees: Trees, info: DataInfo) -> Step:
    """The compiled step recorded into a CUDA graph, which is replayed without any work of the host.

    Before the recording come warm-up steps, of which the first compiles; the state is put back afterwards.
    https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """
    state, data, _ = trees
    if problem := compiler_problem(state["step"].device):
        raise CompileError(problem)
    cache.export_folder()
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
