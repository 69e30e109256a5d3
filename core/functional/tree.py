"""Nested dicts of tensors."""

from collections.abc import Iterator

from torch import Tensor


def leaves(tree: dict) -> Iterator[Tensor]:
    """The tensors of nested dicts, in order."""
    for value in tree.values():
        if isinstance(value, dict):
            yield from leaves(value)
        else:
            yield value
