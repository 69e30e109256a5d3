"""One walker for all nested dicts of tensors."""

import pytest
import torch

from core.functional.tree import flatten, leaves, tree_map

TREE = {"b": {"y": torch.tensor(1), "x": torch.tensor(2)}, "a": torch.tensor(3), "c": {}}


def test_flat_names_and_leaves_come_in_the_same_order():
    """The order of the dicts, not that of the names: the compiled step takes its tensors by their place."""
    assert list(flatten(TREE)) == ["b/y", "b/x", "a"]
    assert [int(t) for t in leaves(TREE)] == [int(t) for t in flatten(TREE).values()] == [1, 2, 3]


def test_map_keeps_the_tree_and_goes_by_name():
    other = {"a": torch.tensor(30), "c": {}, "b": {"x": torch.tensor(20), "y": torch.tensor(10)}}
    total = tree_map(torch.add, TREE, other)
    assert {name: int(t) for name, t in flatten(total).items()} == {"b/y": 11, "b/x": 22, "a": 33}
    assert list(total) == list(TREE)
    assert total["c"] == {}
    with pytest.raises(KeyError):
        tree_map(torch.add, TREE, {"a": torch.tensor(0)})
