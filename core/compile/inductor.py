"""How inductor compiles a step for a CPU.

All settings and patches here make the compilation or the step faster, or its bits independent of the number of threads.
What is computed is up to the graph alone.
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
    "aot_inductor.compile_wrapper_opt_level": "O0",  # of the code that calls the kernels: saves 2 s
    "aot_inductor.enable_line_tables": False,
    "pattern_matcher": False,
    "size_asserts": False,
    "alignment_asserts": False,
}

_operators = torch.library.Library("cifar10", "FRAGMENT")
for _name in ("mm", "flipped_mm"):
    _operators.define(f"{_name}(Tensor a, Tensor b) -> Tensor")
    _operators.impl(_name, lambda a, b: a.new_empty(a.shape[0], b.shape[1]), "Meta")


def known_options() -> dict[str, Any]:
    """The entries of OPTIONS that this version of torch has."""
    from torch._inductor import config

    known = config.get_config_copy()
    return {key: value for key, value in OPTIONS.items() if key in known}


def _patch(owner: Any, name: str, new: Any) -> Any:
    """Replace a part of torch that only costs time; a version of torch without that part ignores the replacement."""
    return mock.patch.object(owner, name, new, create=True)


def aot_compile(graph: torch.fx.GraphModule, inputs: Sequence[Tensor], threads: int) -> Path:
    """Compile a graph from Dynamo into a shared library in inductor's cache.

    The graph writes only to its inputs, in its last operations. It is lowered to ATen operations that inductor has code
    for; in place of torch.func's transforms come the operations that they stand for.
    https://docs.pytorch.org/docs/stable/torch.compiler_aot_inductor.html
    """
    import torch._inductor
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    options = known_options() | {"cpp.threads": threads}
    options["post_grad_custom_pre_pass"] = choose_products
    with FakeTensorMode() as fake:
        examples = [fake.from_tensor(t, static_shapes=True) for t in inputs]
        lowered = make_fx(graph, select_decomp_table())(*examples)
    return Path(str(torch._inductor.aot_compile(lowered, tuple(examples), options=options)))


@contextlib.contextmanager
def compiling(scratch: Path) -> Iterator[None]:
    """Apply all patches of this module while a step is compiled, from Dynamo on; `scratch` is an empty folder."""
    collecting = gc.isenabled()
    gc.disable()  # saves 2 s: the heap of a compiler is large, and little of it becomes garbage
    try:
        with contextlib.ExitStack() as stack:
            # This one first: it starts to compile headers, which then goes on during the imports of the others.
            stack.enter_context(parallel_builds(scratch))
            for each in (one_lowering, short_draws, needed_buffers, no_idle_work, no_input_checks, sums_on_one_thread):
                stack.enter_context(each())
            yield
    finally:
        if collecting:
            gc.enable()


@contextlib.contextmanager
def one_lowering() -> Iterator[None]:
    """Take the graph as `aot_compile` has lowered it, and do not lower it a second time: saves 1 s."""
    from torch._inductor import compile_fx

    with (
        _patch(compile_fx, "run_pre_grad_passes", lambda graph, _: graph),
        _patch(compile_fx, "aot_export_module", lambda graph, *_, **__: (graph, None)),
        _patch(compile_fx, "_unlift_graph", lambda graph, *_: graph),
    ):
        yield


def short_draws() -> Any:
    """Make a node of each exclusive or, the last operation in a round of a random draw: saves 11 s.

    A round uses the result of the round before three times. Inductor would write that result out in full each time, so
    the expression would triple with each round. Later inductor fuses the nodes into one loop again.
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
    """Before a tensor is overwritten, make buffers only of values that were computed from it and are still needed:
    saves 1 s.

    Inductor would make a buffer of every value that was computed from it.
    """
    from torch._inductor.graph import GraphLowering
    from torch._inductor.ir import TensorBox

    def mark_mutated(graph: Any, name: str) -> None:
        graph.mutated_buffers.add(name)
        for value in graph.env.values():  # values that are no longer needed have left `env`
            if isinstance(value, TensorBox) and name in value.get_read_names():
                value.realize()

    return _patch(GraphLowering, "mark_buffer_mutated", mark_mutated)


def _believed(isa: Any, *_: Any) -> bool:
    """Whether to use a set of vector instructions that the CPU has: all but AMX, which many compilers do not know and
    float32 does not need."""
    return "AMX" not in type(isa).__name__.upper()


@contextlib.contextmanager
def no_idle_work() -> Iterator[None]:
    """Leave out work whose result is known or unused on a CPU: saves 13 s."""
    from torch._dynamo import config
    from torch._inductor import codecache
    from torch._inductor.cpu_vec_isa import VecISA
    from torch._inductor.fx_passes import joint_graph

    with (
        _patch(VecISA, "check_build", _believed),  # builds and runs a program for each set of instructions
        _patch(codecache, "triton_key", lambda: None),  # hashes all of Triton
        _patch(joint_graph, "lazy_init", lambda *_: None),  # prepares to search the graph for attention
        config.patch(run_gc_after_compile=False),
    ):
        yield


def no_input_checks() -> Any:
    """Leave out 3,000 lines of C++ that can compare each input with its example, on request: saves 2 s."""
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

    def nothing(wrapper: Any) -> None:
        splice = getattr(wrapper.prefix, "splice_aot", wrapper.prefix.splice)
        splice("static void __check_inputs_outputs(AtenTensorHandle*, AtenTensorHandle*) {}")

    return _patch(CppWrapperCpu, "generate_input_output_runtime_checks", nothing)


@contextlib.contextmanager
def sums_on_one_thread() -> Iterator[None]:
    """Compute each sum on one thread, different sums on different threads: the order of a sum that threads share would
    depend on their number."""
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
    """Compile the kernels and their wrapper, the code that calls them, at the same time: saves 4 s. The wrapper takes
    longer; compile its headers while Dynamo and inductor are still at work: saves 1 s."""
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
            headers.exception()  # if they failed, the compiler reads the header files themselves
            build(builder)

        def concurrent(builder: Any) -> None:
            target = builder.get_target_file_path()
            if target.endswith(".wrapper.o"):
                objects.append(pool.submit(after_headers, builder))
            elif target.endswith(".kernel.o"):
                objects.append(pool.submit(build, builder))
            else:
                if target.endswith(".so"):  # links the objects
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
    """Whether to compute float32 products with oneDNN rather than MKL, which is behind `aten.mm`: on CPUs with AVX-512
    oneDNN is faster, with AVX2 alone it is slower (figures: benchmarks/README.md). The CPU decides, never a timing, so
    that a run repeats bit for bit."""
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def choose_products(graph: torch.fx.Graph) -> None:
    """Give each matrix product of an inductor graph its fastest form (figures: benchmarks/README.md)."""
    _register_lowerings()
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default):
        left, right = (argument.meta["val"] for argument in node.args)
        inner, columns = right.shape
        if left.dtype == torch.float32:
            # oneDNN is slow where the left factor is transposed.
            if prefers_onednn() and left.is_contiguous():
                node.target = torch.ops.cifar10.mm.default
        elif not right.is_contiguous() and inner >= 2048 and 320 < columns < 1024:
            # For these shapes oneDNN computes the transpose of the product in half the time.
            node.target = torch.ops.cifar10.flipped_mm.default


def _register_lowerings() -> None:
    from torch._inductor import lowering
    from torch._inductor.ir import ExternKernel, TensorBox
    from torch._inductor.mkldnn_ir import LinearUnary

    def transposed(x: Any) -> Any:
        return lowering.permute(x, [1, 0])

    def onednn(a: Any, b: Any) -> Any:
        # oneDNN's linear layer computes a @ weight.T from a contiguous weight.
        a, weight = ExternKernel.realize_input(a), ExternKernel.realize_input(transposed(b))
        return TensorBox.create(LinearUnary.create(a, weight, None, "none", [], ""))

    def flipped(a: Any, b: Any) -> Any:
        product = lowering.lowerings[torch.ops.aten.mm.default](transposed(b), transposed(a))
        product.freeze_layout()
        return ExternKernel.require_contiguous(transposed(product))

    for name, lower in ((torch.ops.cifar10.mm.default, onednn), (torch.ops.cifar10.flipped_mm.default, flipped)):
        if name not in lowering.lowerings:
            lowering.register_lowering(name, type_promotion_kind=None)(lower)
