"""How many operators a step with the saliency loss dispatches: on a GPU each costs the host a launch."""

import pytest
import torch
import torch.nn.functional as F

from salnb import Objective
from salnb.augment import Affine, HorizontalFlip
from salnb.double_backward import fused
from salnb.models import build
from tests.helpers.double_backward import Calls

# they allocate, or hand out parts of a memory, and start nothing on a device
NO_WORK = {"aten::unsafe_split_with_sizes", "aten::promote_types", "aten::empty", "aten::empty_like"}


def computes(operator):
    """Whether an operator makes or changes values: views do not."""
    aliases = [result.alias_info for result in operator._schema.returns]
    is_view = any(alias is not None and not alias.is_write for alias in aliases)
    return not is_view and operator._schema.name not in NO_WORK


def operators(network, with_maps):
    """Of a training step; the flip is nothing beside the network."""
    torch.manual_seed(0)
    model = build(network, 1000)
    images, target = torch.rand(2, 3, 32, 32), torch.tensor([3, 5])
    objective = Objective(model, HorizontalFlip(), gamma=float(with_maps))

    def step():
        if with_maps:
            return objective(images, target).total
        return F.cross_entropy(model(torch.cat([images, images])), torch.cat([target, target]))

    step().backward()  # which looks at what is looked at once
    model.zero_grad()
    with Calls() as calls:
        step().backward()
    return sum(computes(operator) for operator, _ in calls.seen)


@pytest.mark.parametrize(
    ("network", "written_out", "in_kernels"),
    [("resnet50", 5.1, 2.4), ("densenet121", 3.9, 2.4)],
)
def test_operators_over_the_baseline(network, written_out, in_kernels, monkeypatch):
    """With batch norm's derivatives written out, as by default, and with each as one operator."""
    baseline = operators(network, with_maps=False)
    assert operators(network, with_maps=True) / baseline <= written_out
    monkeypatch.setattr(fused, "applies", lambda x: True)
    assert operators(network, with_maps=True) / baseline <= in_kernels


def test_operators_of_affine_alignment():
    """Matrices are small, and launched all the same."""
    maps, augmentation = torch.rand(2, 1, 32, 32), Affine()
    params = augmentation.make_params(maps)
    with Calls() as calls:
        augmentation.align(maps, maps, params)
    assert sum(computes(operator) for operator, _ in calls.seen) <= 56
