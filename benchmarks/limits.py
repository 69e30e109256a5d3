"""What a training step cannot do without: its matrix products, row-major as torch.nn.Linear has them, and one pass of
Adam over its parameters. Every operand stands ready, and every result has its buffer.

In bfloat16 the products read and write bfloat16; Adam's parameters, gradients and moments are float32.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.peers import Contestant, Work, sequential
from core.compile.device import synchronize


def operands(work: Work, batch: int) -> tuple[list[Tensor], list[Tensor]]:
    """Weights [out, in] and activations [batch, size] of every layer, in the precision of the work."""
    dtype = torch.bfloat16 if work.precision == "bfloat16" else torch.float32
    weights = [p.detach().to(dtype) for p in sequential(work).parameters() if p.ndim == 2]
    return weights, [torch.randn(batch, size, dtype=dtype, device=work.device) for size in work.sizes]


class Products(Contestant):
    """The matrix products of a step alone: forward, weight gradients, and input gradients but the first layer's."""

    def __init__(self, work: Work) -> None:
        self.device = work.device
        weights, acts = operands(work, work.batch)
        self.grads = [torch.empty_like(w) for w in weights]
        self.products = []  # (a, b, out)
        for i, (w, grad) in enumerate(zip(weights, self.grads, strict=True)):
            x, y = acts[i], acts[i + 1]  # or their gradients
            self.products += [(x, w.t(), torch.empty_like(y)), (y.t(), x, grad)]
            if i:
                self.products.append((y, w, torch.empty_like(x)))

    def run(self, steps: int) -> None:
        for _ in range(steps):
            for a, b, out in self.products:
                torch.mm(a, b, out=out)
        synchronize(self.device)


class ProductsAdam(Products):
    """The products, then Adam(fused=True) on all the parameters."""

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        parameters = list(sequential(work).parameters())
        for p in parameters:
            p.requires_grad_(False)
            p.grad = torch.randn_like(p)
        for p, grad in zip((p for p in parameters if p.ndim == 2), self.grads, strict=True):
            if grad.dtype == p.dtype:
                p.grad = grad  # what the products have just written
        self.adam = torch.optim.Adam(parameters, lr=1e-6, fused=True)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            for a, b, out in self.products:
                torch.mm(a, b, out=out)
            self.adam.step()
        synchronize(self.device)


def evaluation_products(work: Work, images: int, batch: int = 1000) -> Callable[[], None]:
    """The products of an evaluation, in batches."""
    weights, acts = operands(work, batch)

    def run() -> None:
        for _ in range(images // batch):
            for x, w, y in zip(acts[:-1], weights, acts[1:], strict=True):
                torch.mm(x, w.t(), out=y)
        synchronize(work.device)

    return run
