"""How inductor compiles a step for a CPU: settings, patches, and the form of each matrix product.

The table lists all private names of torch that the project uses, in this folder alone. `patched` replaces four of them.
Without the patches a step compiles too, in three times the time.

name                                            what it buys
replaced by `patched`:
  cpp_builder.CppBuilder.build                  kernels and wrapper compile at the same time: 4 s; a stop ends them
  codecache._precompile_header                  one precompiled header instead of two: 6 s
  CppWrapperCpu.generate_input_output_runtime_checks   3,000 lines less of C++: 2 s
  codegen.cpp.LoopNest.max_parallel_depth       the bits do not depend on the number of threads
used:
  _inductor.aot_compile                         a step as a library, which runs without the compilers
  _C._aoti.AOTIModelContainerRunnerCpu          runs the library
  _inductor.config, _dynamo.config              OPTIONS; the C++ compiler; no collection of garbage
  utils._config_module.ConfigModule             finds all settings of torch's compilers, to pin them
  _inductor.decomposition.select_decomp_table   lowers the step to operations that inductor has code for
  _subclasses.FakeTensorMode                    traces the step without computing it
  fx.experimental.proxy_tensor.make_fx          records the operations
  cpp_builder.CppBuilder._sources_args          compiles a copy of a source that torch still writes to
  cpp_builder.CppTorchDeviceOptions, cpu_vec_isa.pick_vec_isa   the flags of the precompiled header
  codegen.cpp.ParallelDepth                     says that threads do not share a loop
  overrides._get_current_function_mode_stack, _pop_mode, _push_mode, utils._python_dispatch._disable_current_modes
                                                core.compile.isolation: the caller's modes change no number
  _inductor.lowering, ir.ExternKernel, ir.TensorBox, mkldnn_ir.LinearUnary   products by oneDNN: 10% of a step
"""

import contextlib
import gc
import importlib
import importlib.util
import logging
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from core.compile import cache, worker
from core.functional import prng
from core.functional.tree import leaves

OPTIONS: dict[str, Any] = {
    "aot_inductor.compile_wrapper_opt_level": "O0",  # of the code that calls the kernels: saves 2 s
    "aot_inductor.enable_line_tables": False,
    "pattern_matcher": False,
    # A result of more operations than this gets a buffer of its own until loops are fused. Each round of a random draw
    # uses the round before three times, and by default inductor repeats that expression each time. Buffers save 11 s.
    "realize_opcount_threshold": 10,
    "cpp.vec_isa_ok": True,  # on x86, build no program to try each of the CPU's vector instructions: saves 10 s
    "size_asserts": False,
    "alignment_asserts": False,
}

_operators = torch.library.Library("cifar10", "FRAGMENT")
for _name in ("mm", "flipped_mm"):
    _operators.define(f"{_name}(Tensor a, Tensor b) -> Tensor")
    _operators.impl(_name, lambda a, b: a.new_empty(a.shape[0], b.shape[1]), "Meta")


def load() -> None:
    """Import Dynamo, out of reach of signals and of the environment. An eager step imports it, too."""
    if "torch._dynamo" not in sys.modules:
        with cache.one_at_a_time, cache.environment():
            worker.wait_for(lambda: importlib.import_module("torch._dynamo"))


def build(
    make_step: Callable[[], Callable[..., None]], trees: Sequence[dict], settings: dict[str, Any], scratch: Path
) -> cache.Library:
    """Compile a step into a shared library in inductor's cache: with patches or, if one fails, without.

    Args:
        make_step: Makes the step: a function of `trees`, which changes their tensors and nothing else.
        settings: Of inductor.
    """
    from torch._inductor import config

    check = worker.checker()
    quiet = [logging.NullHandler()]  # Torch logs, for example, that it finds no CUDA.
    with mock.patch.object(logging.getLogger("torch"), "handlers", quiet):
        try:
            with pinned(), config.patch(settings), patched(scratch):
                return _compile(make_step(), trees, options(), "")
        except Exception as error:  # Another version of torch may have other names, or use them in another way.
            check()
            if cache.is_temporary(error):
                raise
            with config.patch(settings):
                return _compile(make_step(), trees, {}, cache.first_line(error))


def _compile(step: Callable[..., None], trees: Sequence[dict], options: dict[str, Any], problem: str) -> cache.Library:
    """Trace a step into one graph, lower it to ATen operations without transforms of torch.func, and compile it.
    https://docs.pytorch.org/docs/stable/torch.compiler_aot_inductor.html
    """
    import torch._inductor
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    tensors = [t for tree in trees for t in leaves(tree)]
    graphs: list[torch.fx.GraphModule] = []
    inputs: list[int] = []

    def capture(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Callable[..., tuple]:
        graphs.append(graph)

        def note_inputs(*arguments: Tensor) -> tuple:
            # Dynamo chooses which tensors are inputs, and their order; `is` finds each among the caller's.
            inputs.extend(next(i for i, t in enumerate(tensors) if t is x) for x in arguments)
            return ()

        return note_inputs

    with without_collection():
        torch.compiler.allow_in_graph(prng.bits)  # 160 operations that Dynamo need not follow one by one
        torch.compile(step, fullgraph=True, dynamic=False, backend=capture)(*trees)
        with FakeTensorMode() as fake:
            examples = [fake.from_tensor(tensors[i], static_shapes=True) for i in inputs]
            lowered = make_fx(graphs[0], select_decomp_table())(*examples)
        path = torch._inductor.aot_compile(lowered, tuple(examples), options=options)
    return cache.Library(Path(str(path)), inputs, problem)


def options() -> dict[str, Any]:
    """The entries of OPTIONS that this version of torch has, and the choice of the matrix products."""
    from torch._inductor import config

    known = config.get_config_copy()
    is_x86 = platform.machine() in ("x86_64", "AMD64")  # Elsewhere nobody has tried whether the flags work.
    supported = {key: OPTIONS[key] for key in OPTIONS if key in known and (is_x86 or key != "cpp.vec_isa_ok")}
    return {**supported, "post_grad_custom_pre_pass": choose_products}


@contextlib.contextmanager
def pinned() -> Iterator[None]:
    """Compile with torch's own settings, whatever the environment or the caller has set. Otherwise one spec would get
    different bits, which the cache would keep."""
    import torch._inductor.config
    from torch.utils._config_module import ConfigModule

    with contextlib.ExitStack() as stack:
        for config in [module for module in sys.modules.values() if isinstance(module, ConfigModule)]:
            default, now = _defaults(config), config.get_config_copy()
            stack.enter_context(config.patch({key: default[key] for key in default if default[key] != now.get(key)}))
        stack.enter_context(torch.compiler.set_stance("default"))
        yield


def _defaults(config: Any) -> dict[str, Any]:
    """The settings of a configuration module of torch without variables, which it reads while it is imported."""
    name = f"defaults of {config.__name__}"
    spec: Any = importlib.util.spec_from_file_location(name, config.__file__)
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with cache.environment(dict.fromkeys(set(os.environ) - {"PATH", "USER"})):
            spec.loader.exec_module(module)
        return module.get_config_copy()
    finally:
        del sys.modules[name]


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Collect no garbage: saves 2 s, as the heap of a compiler is large and little of it becomes garbage."""
    from torch._dynamo import config

    collects = gc.isenabled()
    gc.disable()
    try:
        with config.patch(run_gc_after_compile=False):
            yield
    finally:
        if collects:
            gc.enable()


@contextlib.contextmanager
def patched(scratch: Path) -> Iterator[None]:
    """Apply all patches while a step is compiled. AttributeError if this version of torch lacks what one replaces."""
    # The first one starts to compile headers, which goes on during the imports of the others.
    with parallel_builds(scratch), no_input_checks(), sums_on_one_thread():
        yield


def no_input_checks() -> Any:
    """Leave out 3,000 lines of C++ that can compare each input with its example, on request: saves 2 s."""
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

    def nothing(wrapper: Any) -> None:
        splice = getattr(wrapper.prefix, "splice_aot", wrapper.prefix.splice)
        splice("static void __check_inputs_outputs(AtenTensorHandle*, AtenTensorHandle*) {}")

    return mock.patch.object(CppWrapperCpu, "generate_input_output_runtime_checks", nothing)


def sums_on_one_thread() -> Any:
    """Compute each sum on one thread, different sums on different threads. If threads shared a sum, its order would
    depend on their number."""
    from torch._inductor.codegen.cpp import LoopNest, ParallelDepth

    deepest: Any = LoopNest.max_parallel_depth

    def depth(nest: Any) -> Any:
        chosen = deepest(nest)
        is_shared = nest.loops and nest.loops[chosen.start_depth].is_reduction
        return ParallelDepth(parallel_depth=0, start_depth=0) if is_shared else chosen

    return mock.patch.object(LoopNest, "max_parallel_depth", depth)


@contextlib.contextmanager
def parallel_builds(scratch: Path) -> Iterator[None]:
    """Compile the kernels and their wrapper, the code that calls them, at the same time: saves 4 s. The wrapper takes
    longer, so its headers are compiled while Dynamo and inductor are still at work: saves 1 s."""
    from torch._inductor import codecache, config, cpp_builder, cpu_vec_isa
    from torch._inductor.cpp_builder import CppBuilder

    build_now, check = CppBuilder.build, worker.checker()
    jobs: list[Future] = []

    def build(builder: Any, after: Future | None = None) -> None:
        if after is not None:
            after.exception()  # If the headers failed, the compiler reads the header files themselves.
        check()
        build_now(builder)

    header = scratch / "wrapper.h"
    header.write_text("#include <torch/csrc/inductor/aoti_include/cpu.h>\n", encoding="utf-8")
    with config.patch(options()):
        isa = cpu_vec_isa.pick_vec_isa()
        flags = cpp_builder.CppTorchDeviceOptions(
            precompiling=True, min_optimize=True, aot_mode=True, device_type="cpu", vec_isa=isa
        )
        headers = worker.start(partial(build, CppBuilder(str(header), str(header), flags)))

    def precompiled(name: str, *_: Any, **__: Any) -> str | None:
        return str(header) if "aoti_include" in name else None

    def build_or_start(builder: Any) -> None:
        target = builder.get_target_file_path()
        if target.endswith((".wrapper.o", ".kernel.o")):
            # Torch appends a comment to the source meanwhile. Clang maps the file, and would read half of it as code.
            builder._sources_args = shutil.copy(builder._sources_args, f"{target}.cpp")
            jobs.append(worker.start(partial(build, builder, headers if target.endswith(".wrapper.o") else None)))
            return
        if target.endswith(".so"):  # links the objects
            for job in jobs:
                job.result()
        build(builder)

    try:
        with (
            mock.patch.object(CppBuilder, "build", build_or_start),
            mock.patch.object(codecache, "_precompile_header", precompiled),
        ):
            yield
    finally:
        wait([headers, *jobs])


def prefers_onednn() -> bool:
    """Whether to compute float32 products with oneDNN instead of MKL, which `aten.mm` uses. With AVX-512 oneDNN is
    faster, with AVX2 alone it is slower. The CPU decides, never a timing, so that a run repeats bit for bit."""
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def choose_products(graph: torch.fx.Graph) -> None:
    """Give each matrix product of a graph its fastest form (figures: benchmarks/README.md)."""
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
