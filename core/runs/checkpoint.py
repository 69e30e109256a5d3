"""Tensors to safetensors files and back, trusting nothing that a damaged or hostile file may say.

One metadata key holds sorted JSON, in which `sha256` is the hash of the whole file with that field full of zeros. Any
flipped bit, in the header or in the data, is found before a tensor is made.
"""

import hashlib
import io
import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import safetensors.torch
import torch
from torch import Tensor

from core.runs.record import About
from core.spec import canonical
from core.store import StoreError, atomic_write, open_file

KEY, ZEROS = "cifar10-mlp", "0" * 64
MAX_HEADER, MAX_BYTES = 1 << 18, 1 << 40
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
    """Read a file that `save` wrote.

    Args:
        schema: what the metadata must be.
        template: from the metadata to the names, shapes and dtypes that the file must hold; it may raise ValueError.

    Returns:
        Tensors on the CPU, which share no memory with the file; the metadata.

    Raises:
        CheckpointError: the file is missing, damaged, not a checkpoint of this program, or does not fit the template.
        OtherVersion: it is whole, but its metadata is not `schema`.
    """
    try:
        with open(open_file(path, MAX_BYTES), "rb") as file:
            return _read(file, schema, template)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    except _NotSchema as error:
        raise OtherVersion(f"{path} is a checkpoint of another version of this program: {str(error)[:300]}") from None
    except MemoryError:
        raise CheckpointError(f"{path} needs more memory than there is") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__} {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{path} is damaged or not a checkpoint of this program: {reason[:300]}") from None


class _NotSchema(Exception):
    """A file is whole, and its metadata is not as the schema has it."""


def _read(
    file: io.BufferedReader, schema: type[Schema], template: Callable[[Schema], Shapes]
) -> tuple[Tensors, Schema]:
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 2 <= length <= min(MAX_HEADER, size - 8):
        raise ValueError(f"{size:,} bytes with a header of {length:,}")
    raw = file.read(length)
    header, meta = _header(raw)

    def verify(chunks: Iterable[bytes | bytearray]) -> None:
        total = hashlib.sha256(start + raw.replace(_signature(meta["sha256"]), _signature(ZEROS), 1))
        for chunk in chunks:
            total.update(chunk)
        if total.hexdigest() != meta["sha256"]:
            raise ValueError("its sha256 is not the one that was written")

    rest = iter(lambda: file.read(1 << 20), b"")
    try:
        about = msgspec.convert(meta, schema)
    except ValueError as error:
        verify(rest)
        raise _NotSchema(error) from None
    expected = template(about)
    ends = _fit(header, expected)
    body = max(ends.values(), default=0)
    if size != 8 + length + body:
        raise ValueError(f"it is truncated or too long: {size:,} bytes, expected {8 + length + body:,}")
    verify(rest)  # before memory is taken for it
    file.seek(8 + length)
    data = bytearray(body)
    file.readinto(data)
    verify([data])  # the bytes that are used are those that were hashed, whatever happens to the file meanwhile
    tensors = {}
    for name, (shape, dtype) in expected.items():
        count = math.prod(shape)
        begin = ends[name] - count * dtype.itemsize
        flat = torch.frombuffer(data, dtype=dtype, count=count, offset=begin) if count else torch.empty(0, dtype=dtype)
        if flat.is_floating_point() and not flat.isfinite().all():
            raise ValueError(f"NaN or infinity in {name}")
        if NEVER_NEGATIVE.intersection(re.split("[./]", name)) and (flat < 0).any():
            raise ValueError(f"a negative number in {name}")
        tensors[name] = flat.view(shape)
    return tensors, about


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("duplicate names")
    return dict(pairs)


def _header(raw: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """The header's tensor entries, and our metadata."""
    header = json.loads(raw, object_pairs_hook=_unique)
    outer = header.pop("__metadata__", {})
    if list(outer) != [KEY]:
        raise ValueError("metadata of another program")
    meta = json.loads(outer[KEY], object_pairs_hook=_unique)
    if not re.fullmatch("[0-9a-f]{64}", str(meta["sha256"])):
        raise ValueError("it has no sha256")
    return header, meta


def _fit(header: dict[str, Any], expected: Shapes) -> dict[str, int]:
    """Where in the data each tensor ends, when the header names exactly these tensors, one after another."""
    names = {code: dtype for dtype, code in DTYPES.items()}
    found = {name: (tuple(entry["shape"]), names.get(entry["dtype"])) for name, entry in header.items()}
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise ValueError(f"tensor {name[:60]!r} is {found.get(name)}, expected {expected.get(name)}")
    ends, end = {}, 0
    for name in sorted(header, key=lambda name: header[name]["data_offsets"]):
        shape, dtype = expected[name]
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        if header[name]["data_offsets"] != [begin, end] or begin % dtype.itemsize:
            raise ValueError(f"tensor {name[:60]!r} is at {header[name]['data_offsets']}, expected {[begin, end]}")
        ends[name] = end
    return ends
