"""Tensors to safetensors and back: nothing is trusted that a damaged or hostile file could say.

One metadata key holds sorted JSON, in which `sha256` is the hash of the whole file with that field full of zeros: so any
flipped bit, in the header as in the data, is seen before a tensor is made.
"""

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from core.spec import canonical
from core.store import atomic_write

KEY, ZEROS = "cifar10-mlp", "0" * 64
MAX_HEADER = 1 << 18
DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64", torch.int32: "I32"}

Tensors = dict[str, Tensor]
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message is one sentence with the path."""


def shapes_of(tensors: Tensors) -> Shapes:
    return {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}


def digest(tensors: Tensors) -> str:
    """sha256 over names, dtypes, shapes and bytes, in the order of the names: equal for equal bits."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        total.update(canonical([name, DTYPES[t.dtype], list(t.shape)]).encode())
        total.update(t.reshape(-1).numpy().tobytes())
    return total.hexdigest()


def save(path: Path, tensors: Tensors, meta: dict[str, Any]) -> None:
    """Write tensors and metadata as one file, whole or not at all.

    Raises:
        core.store.StoreError: it cannot be written.
    """
    host = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    data = safetensors.torch.save(host, {KEY: canonical({**meta, "sha256": ZEROS})})
    del host
    total = hashlib.sha256(data).hexdigest()
    atomic_write(path, data.replace(ZEROS.encode(), total.encode(), 1))


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("duplicate names")
    return dict(pairs)


def _header(raw: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """The header's tensor entries, and our metadata."""
    header = json.loads(raw, object_pairs_hook=_no_duplicates)
    outer = header.pop("__metadata__")
    if list(outer) != [KEY]:
        raise ValueError("metadata of another program")
    meta = json.loads(outer[KEY], object_pairs_hook=_no_duplicates)
    if not (isinstance(meta, dict) and isinstance(meta["sha256"], str) and len(meta["sha256"]) == 64):
        raise ValueError("no sha256")
    return header, meta


def load(path: Path, template: Callable[[dict[str, Any]], Shapes]) -> tuple[Tensors, dict[str, Any]]:
    """Read a file that `save` wrote: tensors on the CPU, and the metadata.

    Args:
        template: from the metadata to the names, shapes and dtypes that the file must hold; it may raise ValueError.

    Raises:
        CheckpointError: the file is missing, damaged, not a checkpoint of this program, or does not fit the template.
    """
    try:
        with open(path, "rb") as file:
            size = path.stat().st_size
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(MAX_HEADER, size - 8):
                raise CheckpointError(
                    f"{path} is not a checkpoint, or is truncated: {size:,} bytes, header of {length:,}"
                )
            raw = file.read(length)
            header, meta = _header(raw)
            expected = template(meta)
            found = {
                name: (tuple(entry["shape"]), {v: k for k, v in DTYPES.items()}.get(entry["dtype"], entry["dtype"]))
                for name, entry in header.items()
            }
            if found != expected:
                odd = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))[
                    0
                ]
                raise CheckpointError(
                    f"{path} does not fit its spec: tensor {odd!r} is {found.get(odd)}, expected {expected.get(odd)}"
                )
            # Only now is a size known that the file itself did not choose.
            body = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in expected.values())
            if size != 8 + length + body:
                raise CheckpointError(
                    f"{path} is truncated or too long: {size:,} bytes, expected {8 + length + body:,}"
                )
            data = file.read(body + 1)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged or not a checkpoint of this program: {error}") from None
    blanked = raw.replace(meta["sha256"].encode(), ZEROS.encode(), 1)
    total = hashlib.sha256(start)
    total.update(blanked)
    total.update(data)
    if total.hexdigest() != meta["sha256"]:
        raise CheckpointError(f"{path} is damaged: its sha256 is not the one that was written")
    try:
        tensors = safetensors.torch.load(start + raw + data)
    except Exception as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    for name, t in tensors.items():
        if t.is_floating_point() and not t.isfinite().all():
            raise CheckpointError(f"{path} holds NaN or infinity in {name!r}")
    return tensors, meta
