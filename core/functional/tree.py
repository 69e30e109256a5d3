"""Nested dicts of tensors: the state of a run, its data and its hyper-parameters are trees of this kind."""

from collections.abc import Callable, Iterator

from torch import Tensor

Tree = dict  # {"params": {"1.weight": tensor, ...}, "step": tensor, ...}


def leaves(tree: Tree) -> Iterator[Tensor]:
    """The tensors, in order."""
    for value in tree.values():
        if isinstance(value, dict):
            yield from leaves(value)
        else:
            yield value


def tree_map(function: Callable[..., Tensor], *trees: Tree) -> Tree:
    """A tree of what `function` gives for the tensors at the same place in each of `trees`."""
    return {
        key: tree_map(function, *(tree[key] for tree in trees))
        if isinstance(value, dict)
        else function(*(tree[key] for tree in trees))
        for key, value in trees[0].items()
    }


def flatten(tree: Tree, prefix: str = "") -> dict[str, Tensor]:
    """One flat dict: {"opt/exp_avg/1.weight": tensor, ...}."""
    flat: dict[str, Tensor] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
