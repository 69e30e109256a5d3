"""Nested dicts of tensors. The state, the data and the hyper-parameters of a train step are such trees."""

from collections.abc import Callable, Iterator

from torch import Tensor

Tree = dict  # {"params": {"1.weight": tensor, ...}, "step": tensor, ...}


def leaves(tree: Tree) -> Iterator[Tensor]:
    """All tensors, in the order of the dicts."""
    for value in tree.values():
        if isinstance(value, dict):
            yield from leaves(value)
        else:
            yield value


def tree_map(function: Callable[..., Tensor], *trees: Tree) -> Tree:
    """A tree of the results of `function`, called with the tensors under the same names in all `trees`."""
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
