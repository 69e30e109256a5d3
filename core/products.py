"""Which library multiplies the matrices of a compiled step on a CPU.

On CPUs with AVX-512, oneDNN's float32 products are faster than the MKL ones behind `aten.mm` (benchmarks/README.md has
the figures); with AVX2 alone they are slower. The choice hangs on the CPU, never on a timing, so that a run repeats.
"""

import torch

_library = torch.library.Library("cifar10", "FRAGMENT")
_library.define("mm(Tensor a, Tensor b) -> Tensor")
_library.impl("mm", lambda a, b: a.new_empty(a.shape[0], b.shape[1]), "Meta")


def prefers_onednn() -> bool:
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
