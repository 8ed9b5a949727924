"""A step in channels_last stays in it: in what is captured for the compiler, nothing changes the layout."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from salnb import Objective
from salnb.augment import Affine
from tests.helpers.tolerances import assert_close


class Stages(nn.Module):
    """What the networks of Table 4 are made of: residual and concatenated blocks, all kinds of pooling."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.growth = nn.Conv2d(8, 4, 1)
        self.down = nn.Conv2d(12, 6, 3, stride=2, padding=1, groups=2)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = F.max_pool2d(self.stem(x), 3, 2, 1)
        x = F.relu(x + self.block(x))
        x = self.down(F.avg_pool2d(torch.cat([x, self.growth(x)], 1), 2))
        return self.head(F.adaptive_avg_pool2d(F.relu(x), 1).flatten(1))


def layout(tensor):
    """Of a tensor with several channels and pixels "last" or "first", else nothing that could be changed."""
    if not isinstance(tensor, torch.Tensor) or tensor.ndim != 4:
        return None
    if tensor.is_contiguous():
        return None if tensor.is_contiguous(memory_format=torch.channels_last) else "first"
    return "last" if tensor.is_contiguous(memory_format=torch.channels_last) else "neither"


def converting(graph):
    """The operators of a graph that leave channels_last, and those that must be changed to it first."""
    found = []
    for node in graph.graph.nodes:
        if node.op == "call_function" and not getattr(node.target, "is_view", False):
            made = node.meta.get("val")
            made = {layout(each) for each in (made if isinstance(made, list | tuple) else [made])}
            given = {layout(other.meta.get("val")) for other in node.all_input_nodes}
            heavy = any(word in str(node.target) for word in ("convolution", "batch_norm", "pool"))
            if ("last" in given and "first" in made) or (heavy and "first" in given):
                found.append(f"{node}: {node.target} of {given} makes {made}")
    return found


@pytest.mark.parametrize("method", ["vanilla_gradient", "guided_backprop"])
def test_nothing_that_is_captured_changes_the_layout(monkeypatch, method):
    graphs = []
    monkeypatch.setattr(torch, "compile", lambda graph, **options: graphs.append(graph) or graph)
    torch.manual_seed(0)
    reference = Objective(Stages().double(), Affine(), method=method)
    objective = copy.deepcopy(reference).to(memory_format=torch.channels_last)
    # only the graph is looked at, and this backend runs on a CPU with any version of torch
    objective.compile(backend="aot_eager")
    images = torch.rand(4, 3, 24, 24, dtype=torch.float64)
    last = images.contiguous(memory_format=torch.channels_last)
    for each, x in ((objective, last), (reference, images)):
        each(x, torch.arange(4), torch.Generator().manual_seed(3)).total.backward()
    found, expected = (
        torch.cat([p.grad.flatten() for p in each.parameters()]) for each in (objective, reference)
    )
    assert_close(found, expected)
    (graph,) = graphs
    assert converting(graph) == []
