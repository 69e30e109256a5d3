"""The border between the pure step and the machine: compilation, donation, CUDA graphs, and where compiled code is kept.

The step stays pure; only here is it turned into one that writes its new state over the old one.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.dataset import Cifar10
from core.spec import Spec, static_key
from core.step import State, make_train_step

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "inductor"

Advance = Callable[[], None]

_compiled: dict[str, Callable[..., None]] = {}


def leaves(tree: dict) -> Iterator[Tensor]:
    """The tensors of nested dicts, in order."""
    for value in tree.values():
        if isinstance(value, dict):
            yield from leaves(value)
        else:
            yield value


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


def compiler_problem(device: torch.device) -> str | None:
    """Why torch.compile cannot work on this machine, or None."""
    compilers = [name for name in (os.environ.get("CXX"), "g++", "clang++") if name]
    if device.type == "cpu" and not any(map(shutil.which, compilers)):
        return "no C++ compiler (g++ or clang++) was found"
    return None


def compile_errors() -> tuple[type[Exception], ...]:
    """What a failing compilation raises."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    return TorchDynamoException, InductorError


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def in_place(step: Callable[[State, dict, dict], State]) -> Callable[[State, dict, dict], None]:
    """The pure step as one that writes the new state into the old one's buffers."""

    def donated(state: State, data: dict, hyper: dict) -> None:
        for old, new in zip(leaves(state), leaves(step(state, data, hyper)), strict=True):
            old.copy_(new)

    return donated


def fuse(spec: Spec, state: State, data: dict, hyper: dict, compiled: bool = True) -> Advance:
    """The train step of a resolved spec, bound to standing buffers: each call advances `state` by one step.

    Compiled, it is one graph; specs that differ only in what reaches the step as a tensor share one compilation.
    """
    device = state["step"].device
    # "high" lets float32 products run in TF32 where the hardware has it (NVIDIA, since Ampere).
    torch.set_float32_matmul_precision("high" if spec["precision"] == "tf32" else "highest")
    step = in_place(make_train_step(spec))
    if compiled:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHE))
        key = f"{static_key(spec)} {device.type}"
        step = _compiled.setdefault(key, torch.compile(step, fullgraph=True, dynamic=False))
        if device.type == "cuda":
            return _cuda_graph(lambda: step(state, data, hyper), state)
    return lambda: step(state, data, hyper)


def _cuda_graph(advance: Advance, state: State) -> Advance:
    """Record one step into a CUDA graph, whose replay needs no work of the host.

    Recording wants a warm-up, which compiles and takes steps; the state is put back afterwards.
    https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """
    before = [t.clone() for t in leaves(state)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            advance()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        advance()
    for t, old in zip(leaves(state), before, strict=True):
        t.copy_(old)
    return graph.replay
