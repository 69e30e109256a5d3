"""Devices: which one there is, what is copied to it, and when it has finished."""

from typing import Any

import torch
from torch import Tensor

from core.data.cifar10 import Cifar10


def to_device(tree: dict, device: torch.device) -> dict[str, Any]:
    """Nested dicts of tensors, copied to a device; float64 becomes float32 on MPS, which has none."""

    def move(value: Tensor) -> Tensor:
        return value.to(device, torch.float32 if device.type == "mps" and value.dtype == torch.float64 else None)

    return {key: to_device(value, device) if isinstance(value, dict) else move(value) for key, value in tree.items()}


def place(data: Cifar10, device: torch.device) -> Cifar10:
    """The images and labels on a device, where they stay."""
    return Cifar10(*(t.to(device) for t in data))


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA, then MPS, then the CPU.

    Raises:
        ValueError: it is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, present in there.items() if present)
    if not there[name]:
        raise ValueError(f"device {name} is not there; present: {', '.join(kind for kind in there if there[kind])}")
    return torch.device(name)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
