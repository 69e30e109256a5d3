"""A trained network, from its checkpoint: to call, to evaluate, or as a torch.nn.Sequential."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from core.data.cifar10 import Cifar10
from core.data.identity import data_identity
from core.functional import augment, model, step
from core.runs import checkpoint
from core.runs.checkpoint import Shapes
from core.runs.record import Finished, Metrics, Record, Weights, read_record
from core.runs.store import local
from core.spec import Spec


class Network(NamedTuple):
    """Weights with what is needed to use them. Calling it classifies images."""

    params: dict[str, Tensor]
    stats: dict[str, Tensor]
    about: Weights

    @property
    def spec(self) -> Spec:
        """Of the network in the checkpoint, into which a whitening is folded."""
        return model.folded(self.about.spec)

    def to(self, device: str | torch.device) -> "Network":
        """The same network on a device."""
        params, stats = ({name: t.to(device) for name, t in part.items()} for part in (self.params, self.stats))
        return Network(params, stats, self.about)

    def __call__(self, images: Tensor) -> Tensor:
        """Logits, float32 [n, 10], of images: uint8 [n, 3, 32, 32] or [n, 3072], the red plane first."""
        return model.forward(self.params, self.stats, augment.normalise(images.flatten(1)), self.spec)[0]

    def digest(self) -> str:
        """The sha256 of the weights; see core.runs.checkpoint.digest."""
        return checkpoint.digest({**self.params, **self.stats})

    def evaluate(self, images: Tensor, labels: Tensor, flip: bool = False) -> dict[str, Any]:
        """Loss and accuracy over all the images; see core.functional.step.answers."""
        return step.evaluate(self.params, self.stats, images, labels, self.spec, flip=flip)


def template(about: Weights) -> Shapes:
    """Names, shapes and dtypes of the tensors in a file of weights, from the spec in its metadata."""
    params, stats = model.template(model.folded(about.spec))
    return checkpoint.shapes_of(params | stats)


def load(path: str | Path, device: str | torch.device = "cpu") -> Network:
    """The network in a checkpoint.

    Raises:
        core.runs.checkpoint.CheckpointError: the file is missing, damaged or does not hold such a network.
    """
    tensors, about = checkpoint.load(local(path), Weights, template)
    named = model.template(model.folded(about.spec))
    params, stats = ({name: tensors[name] for name in names} for names in named)
    return Network(params, stats, about).to(device)


def likeliest(network: Network, image: Tensor, count: int = 3) -> list[tuple[int, float]]:
    """The most likely classes of one image, uint8 [3, 32, 32], and their probabilities, the most likely first."""
    found = network(image[None]).softmax(1)[0].topk(count)
    return list(zip(found.indices.tolist(), found.values.tolist(), strict=True))


class Evaluation(NamedTuple):
    """What a checkpoint reaches on the test split, beside what its run recorded.

    Attributes:
        found: as core.functional.step.evaluate returns it.
        flip: whether the probabilities were averaged over each image and its mirror image.
        recorded, digest: the test metrics, evaluated in the same way, and the digest of the weights in the record
            beside the checkpoint, or in the checkpoint itself where there is no record. `recorded` is None where
            neither has such metrics, and where they are of other data.
        other_data: the name of the data of the run, where it is not the data of this evaluation; else None.
        same: whether the weights and the right answers are those recorded, and the loss within 1e-4.
    """

    found: dict[str, Any]
    flip: bool
    recorded: Metrics | None
    digest: str
    other_data: str | None
    same: bool


def recorded(path: str | Path) -> Record | None:
    """The record beside a checkpoint, if there is one.

    Raises:
        core.runs.record.RecordError: it cannot be read.
    """
    beside = local(path).with_suffix(".json")
    return read_record(beside) if beside.exists() else None


def evaluate(path: str | Path, network: Network, data: Cifar10, flip: bool = False) -> Evaluation:
    """Evaluate the network of a checkpoint on the test split, and compare with its record, if that is of the same data.

    Raises:
        core.runs.record.RecordError: there is a record, but it cannot be read.
    """
    record = recorded(path)
    test, digest, trained_with = None if flip else network.about.test, network.about.digest, network.about.data
    if isinstance(record, Finished):
        digest, trained_with = record.digest, record.data
        test = (record.flipped.test if record.flipped else None) if flip else record.metrics.test
    other_data = None if trained_with == data_identity(data) else trained_with
    test = None if other_data else test
    found = network.evaluate(data.test_images, data.test_labels, flip)
    as_recorded = test is None or (found["correct"] == test.correct and abs(found["loss"] - test.loss) < 1e-4)
    return Evaluation(found, flip, test, digest, other_data, as_recorded and digest == network.digest())


class Residual(nn.Sequential):
    """x + f(x), where f is its modules one after the other (He et al. 2016, https://arxiv.org/abs/1512.03385)."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def as_module(spec: Spec) -> nn.Sequential:
    """The network of a resolved spec in torch.nn, with the same names: a checkpoint's tensors are its state dict, if
    it is the spec of a `Network`.

    Its input is normalised; see core.functional.augment.normalise.
    """

    def modules(stack: model.Stack) -> Iterator[nn.Module]:
        for layer in stack:
            if isinstance(layer, model.Entry):
                yield model.LAYERS[layer.kind].module(layer.inputs, layer.outputs, spec)
            else:
                yield Residual(*modules(layer))

    return nn.Sequential(*modules(model.layers(spec)))
