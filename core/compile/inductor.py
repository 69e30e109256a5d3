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
    "aot_inductor.compile_wrapper_opt_level": "O0",  # what calls the kernels; 2 s less
    "aot_inductor.enable_line_tables": False,
    "pattern_matcher": False,
    "size_asserts": False,
    "alignment_asserts": False,
}

_operators = torch.library.Library("cifar10", "FRAGMENT")
_operators.define("mm(Tensor a, Tensor b) -> Tensor")
_operators.impl("mm", lambda a, b: a.new_empty(a.shape[0], b.shape[1]), "Meta")


def known_options() -> dict[str, Any]:
    """Those of OPTIONS that this version of torch has."""
    from torch._inductor import config

    known = config.get_config_copy()
    return {key: value for key, value in OPTIONS.items() if key in known}


def _patch(owner: Any, name: str, new: Any) -> Any:
    """Replace something that only costs time; a version of torch that lacks it does not mind."""
    return mock.patch.object(owner, name, new, create=True)


def aot_compile(graph: torch.fx.GraphModule, inputs: Sequence[Tensor], threads: int) -> Path:
    """Compile a graph of Dynamo's, for a number of threads, into a shared library in inductor's cache.

    The graph changes nothing but its inputs, and those at its end. It becomes one of the ATen operations that inductor
    has code for: torch.func's transforms become what they stand for.
    https://docs.pytorch.org/docs/stable/torch.compiler_aot_inductor.html
    """
    import torch._inductor
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    options = known_options() | {"cpp.threads": threads}
    if prefers_onednn():
        options["post_grad_custom_pre_pass"] = use_onednn
    with FakeTensorMode() as fake:
        examples = [fake.from_tensor(t, static_shapes=True) for t in inputs]
        lowered = make_fx(graph, select_decomp_table())(*examples)
    return Path(str(torch._inductor.aot_compile(lowered, tuple(examples), options=options)))


@contextlib.contextmanager
def compiling(scratch: Path) -> Iterator[None]:
    """All that holds while a step is compiled, from Dynamo on; `scratch` is an empty folder."""
    collecting = gc.isenabled()
    gc.disable()  # a compiler's heap is large and stays: to search it for garbage again and again takes 2 s
    try:
        with contextlib.ExitStack() as stack:
            # First what starts to compile headers, so that it goes on during the imports.
            stack.enter_context(parallel_builds(scratch))
            for each in (one_lowering, short_draws, needed_buffers, no_idle_work, no_input_checks, sums_on_one_thread):
                stack.enter_context(each())
            yield
    finally:
        if collecting:
            gc.enable()


@contextlib.contextmanager
def one_lowering() -> Iterator[None]:
    """Take the graph as `aot_compile` makes it, rather than lower it once more: 1 s less."""
    from torch._inductor import compile_fx

    with (
        _patch(compile_fx, "run_pre_grad_passes", lambda graph, _: graph),
        _patch(compile_fx, "aot_export_module", lambda graph, *_, **__: (graph, None)),
        _patch(compile_fx, "_unlift_graph", lambda graph, *_: graph),
    ):
        yield


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


def needed_buffers() -> Any:
    """Before a tensor is written, save only what was computed from its old value and is still to be used: 1 s less.

    Inductor would make a buffer of everything that was, as if it did not know that a graph is walked in order.
    """
    from torch._inductor.graph import GraphLowering
    from torch._inductor.ir import TensorBox

    def mark_mutated(graph: Any, name: str) -> None:
        graph.mutated_buffers.add(name)
        for value in graph.env.values():  # the interpreter forgets what has no further use
            if isinstance(value, TensorBox) and name in value.get_read_names():
                value.realize()

    return _patch(GraphLowering, "mark_buffer_mutated", mark_mutated)


def _believed(isa: Any, *_: Any) -> bool:
    """Whether a set of vector instructions can be used, of those that the CPU has: AMX, which float32 does not need, is
    unknown to many compilers."""
    return "AMX" not in type(isa).__name__.upper()


@contextlib.contextmanager
def no_idle_work() -> Iterator[None]:
    """Leave out what comes to nothing on a CPU that reports its vector instructions: 13 s less."""
    from torch._dynamo import config
    from torch._inductor import codecache
    from torch._inductor.cpu_vec_isa import VecISA
    from torch._inductor.fx_passes import joint_graph

    with (
        _patch(VecISA, "check_build", _believed),  # builds and runs a program for each set of them
        _patch(codecache, "triton_key", lambda: None),  # hashes all of Triton
        _patch(joint_graph, "lazy_init", lambda *_: None),  # makes patterns of attention, to look for in the graph
        config.patch(run_gc_after_compile=False),
    ):
        yield


def no_input_checks() -> Any:
    """Leave out 3,000 lines of C++ that would compare each input with its example, if asked to: 2 s less."""
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

    def nothing(wrapper: Any) -> None:
        splice = getattr(wrapper.prefix, "splice_aot", wrapper.prefix.splice)
        splice("static void __check_inputs_outputs(AtenTensorHandle*, AtenTensorHandle*) {}")

    return _patch(CppWrapperCpu, "generate_input_output_runtime_checks", nothing)


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
def parallel_builds(scratch: Path) -> Iterator[None]:
    """Compile the kernels and what calls them at the same time, rather than one after the other, 4 s less; and the
    headers of the latter, which takes longer, already while the graph is made, 1 s less."""
    from torch._inductor import config, cpp_builder, cpu_vec_isa
    from torch._inductor.cpp_builder import CppBuilder

    build = CppBuilder.build
    objects: list[Future] = []

    with ThreadPoolExecutor() as pool:
        header = scratch / "wrapper.h"
        header.write_text("#include <torch/csrc/inductor/aoti_include/cpu.h>\n")
        with config.patch(known_options()), _patch(cpu_vec_isa.VecISA, "check_build", _believed):
            isa = cpu_vec_isa.pick_vec_isa()
            flags = cpp_builder.CppTorchDeviceOptions(
                precompiling=True, min_optimize=True, aot_mode=True, device_type="cpu", vec_isa=isa
            )
            headers = pool.submit(build, CppBuilder(str(header), str(header), flags))

        def precompiled(name: str, *_: Any, **__: Any) -> str | None:
            return str(header) if "aoti_include" in name else None

        def after_headers(builder: Any) -> None:
            headers.exception()  # without them, the compiler reads what they were made from
            build(builder)

        def concurrent(builder: Any) -> None:
            target = builder.get_target_file_path()
            if target.endswith(".wrapper.o"):
                objects.append(pool.submit(after_headers, builder))
            elif target.endswith(".kernel.o"):
                objects.append(pool.submit(build, builder))
            else:
                if target.endswith(".so"):  # which links them
                    for done in objects:
                        done.result()
                build(builder)

        from torch._inductor import codecache

        with (
            _patch(CppBuilder, "build", concurrent),
            _patch(codecache, "_precompile_header", precompiled),
        ):
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
