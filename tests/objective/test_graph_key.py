"""What the key of a compiled step's graph tells apart."""

import copy

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from salnb.objective.graph_key import graph_key


@pytest.mark.parametrize(("levels", "seen"), [(1, True), (5, True), (6, False)])
def test_how_deep_an_object_is_looked_into(levels, seen):
    """Beyond, an object is told by which one it is."""
    innermost = value = {"scale": 1.0}
    for _ in range(levels - 1):
        value = {"inner": value}
    step = nn.ModuleDict({"model": nn.Identity()})
    step["model"].settings = value

    def key():
        structure = pytree.tree_flatten([])[1]
        return graph_key(step, None, [torch.rand(4, 3, 8, 8)], structure)

    before = key()
    innermost["scale"] = 2.0
    assert (key() != before) == seen
    innermost["scale"] = 1.0
    step["model"].settings = copy.deepcopy(value)
    assert (key() == before) == seen
