"""Which examples and in which order: the check of the data, the split, the order of an epoch."""

import hashlib

import torch
from torch import Tensor

from core.data import datasets
from core.data.tensors import Data, DataError
from core.spec import CIFAR10, DataInfo, Spec


def check(data: Data, spec: Spec) -> None:
    """Refuse data that a run of this spec cannot be trained on.

    Raises:
        core.data.tensors.DataError: It is another data set, its images have fewer values than `whiten`, or there are
            too few for the validation split or for one step.
    """
    datasets.check(data, spec["dataset"])
    info, counts = data.info, data.train_labels.bincount().tolist()
    if spec["whiten"] > info.inputs:
        raise DataError(f"whiten = {spec['whiten']}, expected at most {info.inputs}, the number of values of an image")
    smallest = min(filter(None, counts))
    if spec["train_on"] != "all" and smallest <= info.held_out:
        raise DataError(
            f"the smallest class has {smallest:,} training images, expected more than {info.held_out}, which "
            "are for validation"
        )
    held_out = 0 if spec["train_on"] == "all" else info.held_out * sum(map(bool, counts))
    if (left := len(data.train_labels) - held_out) < spec["batch_size"]:
        raise DataError(f"there are {left:,} images to train on, expected at least batch_size = {spec['batch_size']:,}")


def split(labels: Tensor, info: DataInfo = CIFAR10) -> tuple[Tensor, Tensor]:
    """Indices of the training and the validation examples: fixed, with every class equally often in the validation.

    Args:
        labels: int64 [n].

    Returns:
        int64 [n - validation] and int64 [validation], sorted; of CIFAR-10 45,000 and 5,000.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    rank = torch.empty_like(labels)
    for label in range(len(info.classes)):
        members = order[labels[order] == label]
        rank[members] = torch.arange(len(members))
    return (rank >= info.held_out).nonzero()[:, 0], (rank < info.held_out).nonzero()[:, 0]


def to_train_on(labels: Tensor, which: str, info: DataInfo = CIFAR10) -> tuple[Tensor, Tensor | None]:
    """Indices of the examples to train on and of those to validate with: of the `split`, or of "all", which leaves
    none to validate with."""
    return (torch.arange(len(labels)), None) if which == "all" else split(labels, info)


def epoch_order(examples: Tensor, batch_size: int, seed: int, epoch: int) -> Tensor:
    """The shuffled examples of one epoch, a function of (seed, epoch); what does not fill a batch is left out.

    Args:
        examples: int64 [n], on the CPU.

    Returns:
        int64 [n // batch_size, batch_size].
    """
    # Neighbouring seeds and epochs must not share a permutation, so the generator is seeded with a hash of both.
    mixed = int.from_bytes(hashlib.sha256(f"epoch order {seed} {epoch}".encode()).digest()[:8], "little", signed=True)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(mixed))
    steps = len(examples) // batch_size
    return examples[order[: steps * batch_size]].view(steps, batch_size)
