"""Which data a run really had: a name for the tensors themselves, and a check of them before they are used."""

import hashlib
import threading
import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from core.data.archive import DIRECTORY_HASH
from core.data.tensors import Data, DataError

# The sha256 of the tensors of a data set, as `_hash` has it, and the name that records have for that data set.
PUBLISHED = {"a60161292f99d29e8462346dd2f3a7ca9c6f009e9749bb7883422f6d8b3d91d3": DIRECTORY_HASH}
SAMPLE = 16  # one image in so many is hashed each time


class _Known(NamedTuple):
    tensors: list[weakref.ref]
    sample: str
    identity: str


_known: dict[tuple[int, ...], _Known] = {}  # by the ids of the tensors; nothing here keeps a tensor alive
_lock = threading.Lock()


def data_identity(data: Data) -> str:
    """The name of the data in these tensors, on any device: that of the published data set, or "tensors-" and 24
    hexadecimal digits.

    The bytes are hashed once for the same tensors, in about 0.2 s. Later calls take milliseconds: they hash the labels
    and every sixteenth image again, and ask torch whether it has written into a tensor. They miss only a few pictures
    that NumPy has changed in place.
    """
    tensors, sample = data.tensors.values(), _hash(data, SAMPLE)
    key = tuple(map(id, tensors))
    with _lock:
        known = _known.get(key)
        if known and known.sample == sample and all(ref() is t for ref, t in zip(known.tensors, tensors, strict=True)):
            return known.identity
    digest = _hash(data)
    identity = PUBLISHED.get(digest, f"tensors-{digest[:24]}")
    _remember(data, sample, identity)
    return identity


def note_published(data: Data, name: str) -> None:
    """Note that these tensors are the published data set with this name in records. A reader calls this after it has
    checked every byte, so that they are not hashed again."""
    _remember(data, _hash(data, SAMPLE), name)


def _remember(data: Data, sample: str, identity: str) -> None:
    with _lock:
        for key in [key for key, known in _known.items() if any(ref() is None for ref in known.tensors)]:
            del _known[key]
        tensors = data.tensors.values()
        _known[tuple(map(id, tensors))] = _Known([weakref.ref(t) for t in tensors], sample, identity)


def _hash(data: Data, every: int = 1) -> str:
    """sha256 of names, dtypes, shapes and bytes. With `every` above 1, it takes one image in so many, and also the
    number of times that torch has written into each tensor."""
    total = hashlib.sha256()
    for name, t in data.tensors.items():
        version = 0 if every == 1 or t.is_inference() else t._version
        total.update(repr((name, str(t.dtype), list(t.shape), version)).encode())
        part = t[::every] if name.endswith("images") else t
        total.update(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def check(data: Data) -> None:
    """Refuse data whose tensors are not images and labels as in `Data`.

    Raises:
        core.data.tensors.DataError: a tensor has another dtype or shape, a label is out of range, or a split is empty.
    """
    for name, t in data.tensors.items():
        dtype, shape = (torch.uint8, f"[n, {data.info.inputs}]") if name.endswith("images") else (torch.int64, "[n]")
        if not isinstance(t, Tensor):
            raise DataError(f"{name} is of the type {type(t).__name__}, expected a tensor: {dtype} {shape}")
        fits = t.ndim == 2 and t.shape[1] == data.info.inputs if name.endswith("images") else t.ndim == 1
        if not fits or t.dtype != dtype or t.layout != torch.strided:
            raise DataError(f"{name} is {t.dtype} {list(t.shape)}, expected {dtype} {shape}")
    for split in ("train", "test"):
        images, labels = (getattr(data, f"{split}_{what}") for what in ("images", "labels"))
        if len(images) != len(labels) or not len(labels):
            raise DataError(
                f"there are {len(images):,} {split}_images and {len(labels):,} {split}_labels, expected as many of "
                "both, and at least one"
            )
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= len(data.info.classes):
            raise DataError(f"{split}_labels are from {low} to {high}, expected from 0 to {len(data.info.classes) - 1}")
