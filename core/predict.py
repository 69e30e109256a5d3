"""A trained network, from its checkpoint."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core.functional import augment, model, step
from core.runs import checkpoint
from core.runs.checkpoint import Shapes
from core.spec import Spec, resolve


def template(meta: dict[str, Any]) -> Shapes:
    """What a file of weights must hold, by the spec in its metadata."""
    params, stats = model.shapes(resolve(meta["spec"]))
    shapes = {name: (shape, torch.float32) for name, shape in (params | stats).items()}
    return {n: (s, torch.int64 if n.endswith("num_batches_tracked") else d) for n, (s, d) in shapes.items()}


class Network(NamedTuple):
    """Weights with what is needed to use them. Calling it classifies images."""

    params: dict[str, Tensor]
    stats: dict[str, Tensor]
    spec: Spec
    meta: dict[str, Any]

    def __call__(self, images: Tensor) -> Tensor:
        """Logits, float32 [n, 10], of images: uint8 [n, 3, 32, 32] or [n, 3072], the red plane first."""
        x = augment.normalise(images.flatten(1))
        return model.forward(self.params, self.stats, x, self.spec)[0]

    def digest(self) -> str:
        """The sha256 of the weights; see core.runs.checkpoint.digest."""
        return checkpoint.digest({**self.params, **self.stats})

    def evaluate(self, images: Tensor, labels: Tensor) -> dict[str, Any]:
        """Loss and accuracy over all the images; see core.functional.step.evaluate."""
        return step.evaluate(self.params, self.stats, images, labels, self.spec)


def load(path: str | Path, device: str | torch.device = "cpu") -> Network:
    """The network in a checkpoint.

    Raises:
        core.runs.checkpoint.CheckpointError: the file is missing, damaged or does not hold such a network.
    """
    tensors, meta = checkpoint.load(Path(path), template)
    spec = resolve(meta["spec"])
    params, _ = model.shapes(spec)
    moved = {name: t.to(device) for name, t in tensors.items()}
    return Network(
        {name: moved[name] for name in params}, {n: t for n, t in moved.items() if n not in params}, spec, meta
    )
