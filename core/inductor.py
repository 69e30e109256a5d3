"""How inductor is to compile a step for a CPU. What is here is for speed or for the same bits with any number of
threads; the graph that comes in and the arithmetic that goes out are the step's own.
"""

import contextlib
import gc
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

OPTIONS: dict[str, Any] = {
    "aot_inductor.precompile_headers": False,  # the headers are used once: 6 s less
    "aot_inductor.compile_wrapper_opt_level": "O0",  # what calls the kernels; 2 s less
    "aot_inductor.enable_line_tables": False,
    "size_asserts": False,
    "alignment_asserts": False,
}

_library = torch.library.Library("cifar10", "FRAGMENT")
_library.define("mm(Tensor a, Tensor b) -> Tensor")
_library.impl("mm", lambda a, b: a.new_empty(a.shape[0], b.shape[1]), "Meta")


def aot_compile(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Path:
    """Compile a graph of ATen operations into a shared library in inductor's cache.

    https://docs.pytorch.org/docs/stable/torch.compiler_aot_inductor.html
    """
    import torch._inductor

    options = dict(OPTIONS)
    if prefers_onednn():
        options["post_grad_custom_pre_pass"] = use_onednn
    return Path(str(torch._inductor.aot_compile(graph, tuple(inputs), options=options)))


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """All that holds while a step is compiled, from Dynamo on."""
    collecting = gc.isenabled()
    gc.disable()  # a compiler's heap is large and stays: to search it for garbage again and again takes 2 s
    try:
        with short_draws(), no_trial_builds(), no_input_checks(), sums_on_one_thread(), parallel_builds():
            yield
    finally:
        if collecting:
            gc.enable()


def short_draws() -> Any:
    """Give each exclusive or a node of its own, which ends each round of a random draw: 11 s less.

    A round refers to the one before three times; written out in full, as inductor would, they grow without bounds. The
    nodes are fused again into one loop.
    """
    from torch._inductor import lowering

    xor = torch.ops.aten.bitwise_xor.Tensor
    lower = lowering.lowerings[xor]

    def kept(*args: Any) -> Any:
        result = lower(*args)
        result.realize()
        return result

    return mock.patch.dict(lowering.lowerings, {xor: kept})


def no_trial_builds() -> Any:
    """Believe the CPU when it reports vector instructions, rather than build and run a program for each set: 12 s
    less."""
    from torch._inductor.cpu_vec_isa import VecISA

    return mock.patch.object(VecISA, "check_build", return_value=True)


def no_input_checks() -> Any:
    """Leave out 3,000 lines of C++ that would compare each input with its example, if asked to: 2 s less."""
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

    def nothing(wrapper: Any) -> None:
        wrapper.prefix.splice_aot("static void __check_inputs_outputs(AtenTensorHandle*, AtenTensorHandle*) {}")

    return mock.patch.object(CppWrapperCpu, "generate_input_output_runtime_checks", nothing)


@contextlib.contextmanager
def sums_on_one_thread() -> Iterator[None]:
    """Each sum is left to one thread (others do other sums): shared between threads, its order would hang on their
    number."""
    from torch._inductor.codegen.cpp import LoopNest, ParallelDepth

    deepest: Any = LoopNest.max_parallel_depth

    def depth(nest: Any) -> Any:
        chosen = deepest(nest)
        shared = nest.loops and nest.loops[chosen.start_depth].is_reduction
        return ParallelDepth(parallel_depth=0, start_depth=0) if shared else chosen

    with mock.patch.object(LoopNest, "max_parallel_depth", depth):
        yield


@contextlib.contextmanager
def parallel_builds() -> Iterator[None]:
    """Compile the kernels and what calls them at the same time, rather than one after the other: 4 s less."""
    from torch._inductor.cpp_builder import CppBuilder

    build = CppBuilder.build
    objects: list[Future] = []

    with ThreadPoolExecutor() as pool:

        def concurrent(builder: Any) -> None:
            target = builder.get_target_file_path()
            if target.endswith((".wrapper.o", ".kernel.o")):
                objects.append(pool.submit(build, builder))
                return
            if target.endswith(".so"):  # which links them
                for done in objects:
                    done.result()
            build(builder)

        with mock.patch.object(CppBuilder, "build", concurrent):
            yield


def prefers_onednn() -> bool:
    """On CPUs with AVX-512, oneDNN's float32 products are faster than the MKL ones behind `aten.mm`
    (benchmarks/README.md has the figures); with AVX2 alone they are slower. The choice hangs on the CPU, never on a
    timing, so that a run repeats."""
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def use_onednn(graph: torch.fx.Graph) -> None:
    """Redirect the float32 products of an inductor graph to oneDNN, but where the left factor is transposed, which it
    is slow at."""
    _register_lowering()
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default):
        left = node.args[0].meta["val"]
        if left.dtype == torch.float32 and left.is_contiguous():
            node.target = torch.ops.cifar10.mm.default


def _register_lowering() -> None:
    from torch._inductor import lowering
    from torch._inductor.ir import ExternKernel, TensorBox
    from torch._inductor.mkldnn_ir import LinearUnary

    def product(a, b):
        # oneDNN's linear layer computes a @ weight.T from a contiguous weight.
        a, weight = ExternKernel.realize_input(a), ExternKernel.realize_input(lowering.permute(b, [1, 0]))
        return TensorBox.create(LinearUnary.create(a, weight, None, "none", [], ""))

    if torch.ops.cifar10.mm.default not in lowering.lowerings:
        lowering.register_lowering(torch.ops.cifar10.mm.default, type_promotion_kind=None)(product)
