"""Tensors to safetensors files and back. A damaged or hostile file is refused before a tensor of it is used.

The safetensors library writes and reads the tensors. One metadata key holds sorted JSON, in which `sha256` is the hash
of the whole file with that field full of zeros: of every tensor, of the metadata and of every other byte.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeVar

import msgspec
import psutil
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from core.runs.record import About
from core.spec import canonical
from core.store import StoreError, atomic_write, open_file

KEY, ZEROS = "cifar10-mlp", "0" * 64
MAX_HEADER, MAX_BYTES = 1 << 18, 1 << 40
MEMORY = psutil.virtual_memory().total  # bytes
NEVER_NEGATIVE = {"running_var", "num_batches_tracked", "exp_avg_sq"}  # parts of the names of tensors
DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64", torch.int32: "I32", torch.bfloat16: "BF16"}

Tensors = dict[str, Tensor]
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]
Schema = TypeVar("Schema", bound=About)


class CheckpointError(StoreError):
    """A checkpoint cannot be used; the message names its path."""


class OtherVersion(CheckpointError):
    """A checkpoint is whole, but its metadata is that of another version of this program."""


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


def save(path: Path, tensors: Tensors, about: About) -> None:
    """Write tensors and metadata as one file, whole or not at all.

    Raises:
        core.store.StoreError: it cannot be written.
    """
    host = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    data = safetensors.torch.save(host, {KEY: canonical({**msgspec.to_builtins(about), "sha256": ZEROS})})
    unsigned, signed = _signature(ZEROS), _signature(hashlib.sha256(data).hexdigest())
    start = data.index(unsigned)
    atomic_write(path, data[:start], signed, memoryview(data)[start + len(unsigned) :])


def _signature(total: str) -> bytes:
    """The hash as it stands in the header, which is JSON in JSON."""
    return f'\\"sha256\\":\\"{total}\\"'.encode()


def load(path: Path, schema: type[Schema], template: Callable[[Schema], Shapes]) -> tuple[Tensors, Schema]:
    """Read a file that `save` wrote, of at most half of the memory: its bytes and tensors are there at the same time.

    Args:
        schema: what the metadata must be.
        template: from the metadata to the names, shapes and dtypes that the file must hold; it may raise ValueError.

    Returns:
        Tensors on the CPU, in the order of the template, which share no memory with the file; the metadata.

    Raises:
        CheckpointError: the file is missing, too large, damaged, not a checkpoint of this program, or does not fit the
            template.
        OtherVersion: it is whole, but its metadata is not `schema`.
    """
    try:
        with open_file(path, MAX_BYTES) as file:
            data, meta = _read(file)
        try:
            about = msgspec.convert(meta, schema)
        except ValueError as error:
            reason = str(error)[:300]
            raise OtherVersion(f"{path} is a checkpoint of another version of this program: {reason}") from None
        return _tensors(data, template(about)), about
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    except MemoryError:
        raise CheckpointError(f"{path} needs more memory than there is") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__} {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{path} is damaged or not a checkpoint of this program: {reason[:300]}") from None


def _read(file: IO[bytes]) -> tuple[bytes, dict[str, Any]]:
    """The bytes of a file and our metadata in them, if every byte is as it was written."""
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if not 2 <= length <= min(MAX_HEADER, size - 8):
        raise ValueError(f"{size:,} bytes with a header of {length:,}")
    head = start + file.read(length)
    header = json.loads(head[8:], object_pairs_hook=_unique)
    outer = header.pop("__metadata__", {})
    if list(outer) != [KEY]:
        raise ValueError("metadata of another program")
    meta = json.loads(outer[KEY], object_pairs_hook=_unique)
    expected = len(head) + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != expected:
        raise ValueError(f"it is truncated or too long: {size:,} bytes, expected {expected:,}")
    if size > MEMORY // 2:
        raise MemoryError
    file.seek(0)
    data = file.read(size)  # once: the bytes that are hashed are used, even if the file changes meanwhile
    total = hashlib.sha256(data[: len(head)].replace(_signature(meta["sha256"]), _signature(ZEROS), 1))
    total.update(memoryview(data)[len(head) :])
    if total.hexdigest() != meta["sha256"]:
        raise ValueError("its sha256 is not the one that was written")
    return data, meta


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object with no name twice: another program might read the other value."""
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("duplicate names")
    return dict(pairs)


def _tensors(data: bytes, expected: Shapes) -> Tensors:
    """The tensors in the bytes of a file, if they are those expected and no number is impossible."""
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, KeyError, TypeError, RuntimeError) as error:
        # The message may quote the file, which may hold control characters.
        raise ValueError(f"safetensors cannot read it: {str(error)!r}") from None
    actual = shapes_of(tensors)
    for name in sorted(actual.keys() | expected.keys()):
        if actual.get(name) != expected.get(name):
            raise ValueError(f"tensor {name[:60]!r} is {actual.get(name)}, expected {expected.get(name)}")
    for name, t in tensors.items():
        if not t.isfinite().all():
            raise ValueError(f"NaN or infinity in {name}")
        if NEVER_NEGATIVE.intersection(re.split("[./]", name)) and (t < 0).any():
            raise ValueError(f"a negative number in {name}")
    return {name: tensors[name] for name in expected}
