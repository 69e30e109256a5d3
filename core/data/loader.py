"""Which examples, where and in which order: images that stay on the device, the split, the order of an epoch."""

import hashlib

import torch
from torch import Tensor

from core.data.tensors import Data, DataError
from core.spec import Spec

VALIDATION_PER_CLASS = 500  # 5,000 of the 50,000


def place(data: Data, device: torch.device) -> Data:
    """The images and labels on a device, where they stay, each in one piece of memory."""
    return Data(*(t.to(device).contiguous() for t in data))


def check(labels: Tensor, spec: Spec) -> None:
    """Refuse too few training images for the validation split, or for one step.

    Raises:
        core.data.tensors.DataError: there are too few.
    """
    counts = labels.bincount().tolist()
    smallest = min(filter(None, counts))
    if spec["train_on"] != "all" and smallest <= VALIDATION_PER_CLASS:
        raise DataError(
            f"the smallest class has {smallest:,} training images, expected more than {VALIDATION_PER_CLASS}, which "
            "are for validation"
        )
    held_out = 0 if spec["train_on"] == "all" else VALIDATION_PER_CLASS * sum(map(bool, counts))
    if (left := len(labels) - held_out) < spec["batch_size"]:
        raise DataError(f"there are {left:,} images to train on, expected at least batch_size = {spec['batch_size']:,}")


def split(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the training and the validation examples: fixed, with every class equally often in the validation.

    Args:
        labels: int64 [50000].

    Returns:
        int64 [45000] and int64 [5000], sorted.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    rank = torch.empty_like(labels)
    for label in range(10):
        members = order[labels[order] == label]
        rank[members] = torch.arange(len(members))
    return (rank >= VALIDATION_PER_CLASS).nonzero()[:, 0], (rank < VALIDATION_PER_CLASS).nonzero()[:, 0]


def to_train_on(labels: Tensor, which: str) -> tuple[Tensor, Tensor | None]:
    """Indices of the examples to train on and of those to validate with: of the `split`, or of "all", which leaves
    none to validate with."""
    return (torch.arange(len(labels)), None) if which == "all" else split(labels)


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
