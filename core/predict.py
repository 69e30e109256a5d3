"""A trained network, from its checkpoint: to call, to evaluate, or as a torch.nn.Sequential."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from core.compile.isolation import is_traced, isolated
from core.data import datasets, identity
from core.data.tensors import Data
from core.errors import UserError
from core.functional import augment, model, step
from core.runs import checkpoint
from core.runs.checkpoint import Shapes
from core.runs.record import Finished, Metrics, Record, Weights, read_record
from core.spec import CIFAR10, DataInfo, Spec
from core.store import local


class InputError(UserError, ValueError):
    """A network is called with invalid images or labels; the message says what was found and what was expected."""


class Network(NamedTuple):
    """Weights with what is needed to use them. Calling it classifies images."""

    params: dict[str, Tensor]
    stats: dict[str, Tensor]
    about: Weights

    @property
    def spec(self) -> Spec:
        """The spec of this network. A whitening is folded into its weights."""
        return model.folded(self.about.spec)

    @property
    def info(self) -> DataInfo:
        """The data set that the network was trained on."""
        return self.about.data_info

    @property
    def device(self) -> torch.device:
        return next(iter(self.params.values())).device

    def __call__(self, images: Tensor | np.ndarray) -> Tensor:
        """Logits, float32 [n, classes], on the device of the network.

        Args:
            images: uint8 [n, *shape] or [n, inputs], the red plane first; a tensor on any device, or an array.

        Raises:
            InputError: the images have another type or shape.
        """
        if is_traced():  # only the arithmetic can be
            return self.logits(images)  # type: ignore[arg-type]  # an array becomes a tensor there
        with isolated(self.spec["precision"]):
            return self.logits(as_images(images, self.info).to(self.device))

    def logits(self, images: Tensor) -> Tensor:
        """The same for a tensor on the device of the network, unchecked and under the caller's settings of torch."""
        return model.forward(self.params, self.stats, augment.normalise(images.flatten(1), self.info), self.spec)[0]

    def digest(self) -> str:
        """The sha256 of the weights; see core.runs.checkpoint.digest."""
        return checkpoint.digest({**self.params, **self.stats})

    def evaluate(self, images: Tensor | np.ndarray, labels: Tensor | np.ndarray, tta: str = "none") -> dict[str, Any]:
        """Loss and accuracy over all the images; see core.functional.step.answers.

        Args:
            images: as in a call. labels: int64 [n], a class each; a tensor on any device, or an array.

        Raises:
            InputError: the images, labels or `tta` are invalid, or there are no images.
        """
        if tta not in augment.TTA:
            raise InputError(f"tta = {tta!r}, expected {', '.join(augment.TTA)}")
        with isolated(self.spec["precision"]):
            pixels = as_images(images, self.info).flatten(1).to(self.device)
            classes = as_labels(labels, len(images), self.info).to(self.device)
            return step.evaluate(self.params, self.stats, pixels, classes, self.spec, tta=tta, info=self.info)


def as_images(images: Tensor | np.ndarray, info: DataInfo = CIFAR10) -> Tensor:
    """Images as a tensor. Raises InputError if a network cannot be called with them."""
    pixels = _as_tensor(images, "images")
    if pixels.dtype != torch.uint8 or tuple(pixels.shape[1:]) not in (info.shape, (info.inputs,)):
        shape = ", ".join(map(str, info.shape))
        raise InputError(
            f"the images are {pixels.dtype} {list(pixels.shape)}, expected uint8 [n, {shape}] or [n, {info.inputs}]: "
            "the red, green and blue planes of each, with values from 0 to 255"
        )
    return pixels


def as_labels(labels: Tensor | np.ndarray, n: int, info: DataInfo = CIFAR10) -> Tensor:
    """Labels of `n` images as a tensor. Raises InputError if they are invalid."""
    classes = _as_tensor(labels, "labels")
    if not n:
        raise InputError("there are no images, expected at least one")
    if classes.dtype != torch.int64 or tuple(classes.shape) != (n,):
        raise InputError(f"the labels are {classes.dtype} {list(classes.shape)}, expected int64 [{n}]")
    low, high, last = int(classes.min()), int(classes.max()), len(info.classes) - 1
    if low < 0 or high > last:
        raise InputError(f"the labels are from {low} to {high}, expected 0 to {last}")
    return classes


def _as_tensor(values: Tensor | np.ndarray, name: str) -> Tensor:
    if isinstance(values, np.ndarray):
        try:
            return torch.from_numpy(values.copy())  # torch takes no array that is read-only, or reversed
        except TypeError:
            raise InputError(f"the {name} are an array of {values.dtype}, expected integers") from None
    if not isinstance(values, Tensor):
        raise InputError(f"the {name} are of the type {type(values).__name__}, expected a tensor or an array of NumPy")
    return values


def template(about: Weights) -> Shapes:
    """Names, shapes and dtypes of the tensors in a file of weights, from the spec in its metadata."""
    params, stats = model.template(model.folded(about.spec), about.data_info)
    return checkpoint.shapes_of(params | stats)


@isolated()
def load(path: str | Path, device: str | torch.device = "cpu") -> Network:
    """The network in a checkpoint.

    Raises:
        core.runs.checkpoint.CheckpointError: the file is missing, damaged or does not hold such a network.
    """
    tensors, about = checkpoint.load(local(path), Weights, template)
    parts = model.template(model.folded(about.spec), about.data_info)
    params, stats = ({name: tensors[name].to(device) for name in names} for names in parts)
    return Network(params, stats, about)


@isolated()
def top_k(network: Network, image: Tensor | np.ndarray, count: int = 3) -> list[tuple[int, float]]:
    """The most likely classes of one image, uint8 `shape`, and their probabilities, the most likely first.

    Raises:
        InputError: the image has another type or shape.
    """
    top = network(_as_tensor(image, "images")[None]).softmax(1)[0].topk(min(count, len(network.info.classes)))
    return list(zip(top.indices.tolist(), top.values.tolist(), strict=True))


class Evaluation(NamedTuple):
    """The evaluation of a checkpoint on the test split, and what its run recorded.

    Attributes:
        result: as core.functional.step.evaluate returns it.
        tta: over which variants of each image the probabilities were averaged; see core.functional.augment.views.
        recorded, digest: the test metrics, evaluated in the same way, and the digest of the weights in the record
            beside the checkpoint, or in the checkpoint itself where there is no record. `recorded` is None where
            neither has such metrics, and where they are of other data.
        other_data: the name of the data of the run, where it is not the data of this evaluation; else None.
        same: whether the weights and the numbers of correct predictions are those recorded, and the loss within 1e-4.
    """

    result: dict[str, Any]
    tta: str
    recorded: Metrics | None
    digest: str
    other_data: str | None
    same: bool


def recorded(path: str | Path) -> Record | None:
    """The record beside a checkpoint, if there is one.

    Raises:
        core.runs.record.RecordError: it cannot be read.
    """
    record_path = local(path).with_suffix(".json")
    return read_record(record_path) if record_path.exists() else None


def evaluate(path: str | Path, network: Network, data: Data, tta: str = "none") -> Evaluation:
    """Evaluate the network of a checkpoint on the test split, and compare with its record, if that is of the same data.

    Raises:
        core.runs.record.RecordError: there is a record, but it cannot be read.
        core.data.tensors.DataError: the data is invalid, or another data set than that of the network.
    """
    identity.check(data)
    datasets.check(data, network.about.spec["dataset"])
    record = recorded(path)
    recorded_tests, digest, trained_with = {"none": network.about.test}, network.about.digest, network.about.data
    if isinstance(record, Finished):
        digest, trained_with, recorded_tests = record.digest, record.data, {"none": record.metrics.test}
        if record.flipped:
            recorded_tests["flip"] = record.flipped.test
        if record.shifted:
            recorded_tests["shifts"] = record.shifted
    other_data = None if trained_with == identity.data_identity(data) else trained_with
    test = None if other_data else recorded_tests.get(tta)
    result = network.evaluate(data.test_images, data.test_labels, tta)
    as_recorded = test is None or (result["correct"] == test.correct and abs(result["loss"] - test.loss) < 1e-4)
    return Evaluation(result, tta, test, digest, other_data, as_recorded and digest == network.digest())


class Residual(nn.Sequential):
    """x + f(x), where f is its modules one after the other (He et al. 2016, https://arxiv.org/abs/1512.03385)."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def as_module(spec: Spec, info: DataInfo = CIFAR10) -> nn.Sequential:
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

    return nn.Sequential(*modules(model.layers(spec, info)))
