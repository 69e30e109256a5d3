"""What a training step cannot do without: its matrix products, row-major as torch.nn.Linear has them, and one pass of
Adam over its parameters. Every operand stands ready, and every result has its buffer.
"""

from collections.abc import Callable

import torch

from benchmarks.peers import Contestant, Work, sequential
from core.compile.device import synchronize


class Products(Contestant):
    """The products of one step: forward, weight gradients, and input gradients but the first layer's."""

    def __init__(self, work: Work) -> None:
        self.device = work.device
        self.parameters = list(sequential(work).parameters())
        for p in self.parameters:
            p.requires_grad_(False)
            p.grad = torch.randn_like(p)
        acts = [torch.randn(work.batch, size, device=work.device) for size in work.sizes]  # x, or dx, of each layer
        self.products = []  # (a, b, out)
        for i, w in enumerate(p for p in self.parameters if p.ndim == 2):
            x, y = acts[i], acts[i + 1]
            self.products += [(x, w.t(), torch.empty_like(y)), (y.t(), x, w.grad)]
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
        self.adam = torch.optim.Adam(self.parameters, lr=1e-6, fused=True)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            super().run(1)
            self.adam.step()
        synchronize(self.device)


def evaluation_products(work: Work, images: int, batch: int = 1000) -> Callable[[], None]:
    """The products of an evaluation, in batches."""
    weights = [p.detach() for p in sequential(work).parameters() if p.ndim == 2]
    acts = [torch.randn(batch, size, device=work.device) for size in work.sizes]

    def run() -> None:
        for _ in range(images // batch):
            for x, w, y in zip(acts[:-1], weights, acts[1:], strict=True):
                torch.mm(x, w.t(), out=y)
        synchronize(work.device)

    return run


PRODUCTS, LIMIT = "matrix products", "products + Adam"
LIMITS: dict[str, Callable[[Work], Contestant]] = {PRODUCTS: Products, LIMIT: ProductsAdam}
