"""Devices: choose one, copy to it, wait for it."""

import logging
import shutil

import torch
from torch import Tensor

from core.errors import UserError
from core.functional.tree import Tree, tree_map

NO_CUDA = (
    "there is an NVIDIA driver, but this PyTorch is built without CUDA: docs/platforms.md has the command that "
    "installs one with CUDA"
)

log = logging.getLogger(__name__)


class DeviceError(UserError):
    """The device is not available."""


def to_device(tree: Tree, device: torch.device) -> Tree:
    """A copy of the tree on a device; float64 becomes float32 on MPS, which has no float64."""

    def move(value: Tensor) -> Tensor:
        return value.to(device, torch.float32 if device.type == "mps" and value.dtype == torch.float64 else None)

    return tree_map(move, tree)


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA or else the CPU: nothing is compiled for MPS.

    Raises:
        DeviceError: It is not available.
    """
    usable = {"cuda": torch.cuda.is_available(), "cpu": True, "mps": torch.backends.mps.is_available()}
    available = [kind for kind in usable if usable[kind]]
    lacks_cuda = torch.version.cuda is None and shutil.which("nvidia-smi")  # as PyPI's build for Windows
    if name == "auto":
        if lacks_cuda:
            log.warning(NO_CUDA)
        return torch.device(available[0])
    if name not in available:
        hint = f"; {NO_CUDA}" if name == "cuda" and lacks_cuda else ""
        raise DeviceError(f"device {name} is not available; available: {', '.join(available)}{hint}")
    return torch.device(name)


def emulates_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are slower than in float32: a CPU without instructions for them emulates them."""
    known = torch.cpu.get_capabilities()
    return device.type == "cpu" and not any(known.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
