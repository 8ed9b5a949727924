"""Calls that may be a ReLU, under `torch.vmap` and in `compile()`, where no values tell whether they are."""

import pytest
import torch
import torch.nn.functional as F

from salnb import Objective, saliency
from salnb.augment import HorizontalFlip
from tests.helpers.methods import WITH_RULE
from tests.helpers.relus import BY_VALUES, mask_times_in_place, zeros
from tests.helpers.tolerances import assert_close
from tests.saliency.test_relu_spellings import Rectified, images

BATCHED = {
    "where": lambda x: torch.vmap(lambda t, u: torch.where(t > 0.1, t, u))(x, torch.full_like(x, 0.1)),
    "where(t > u)": lambda x: torch.vmap(lambda t, u: torch.where(t > u, t, u))(x, torch.full_like(x, 0.1)),
    "maximum": lambda x: torch.vmap(torch.maximum)(x, torch.full_like(x, 0.1)),
    "mask of another": lambda x: torch.vmap(lambda t, u: t * (u > 0))(x, torch.ones_like(x)),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("method", WITH_RULE)
@pytest.mark.parametrize("case", BATCHED)
def test_vmap_of_what_is_no_relu_is_left_alone(case, method):
    act, x = BATCHED[case], images()
    model = Rectified(lambda x: act(torch.relu(x)))
    found = saliency.METHODS[method](model, x, 1)
    model.relu = lambda x: torch.relu(x) if "mask" in case else torch.relu(x).clamp(min=0.1)
    assert_close(found, saliency.METHODS[method](model, x, 1))


def test_a_relu_in_vmap_is_named():
    model = Rectified(lambda x: torch.vmap(torch.maximum)(torch.relu(x), zeros(x)))
    with pytest.warns(UserWarning, match="no rule reaches.*MaximumBackward0"):
        saliency.guided_backprop(model, images(), 1)


def compiled_and_eager(act, z):
    """The total of an objective in two ways, with a network that has a buffer z."""
    model = Rectified(lambda x: act(torch.relu(x), model.z))
    model.register_buffer("z", torch.tensor(z, dtype=torch.float64))
    results = []
    for compiled in (True, False):
        objective = Objective(model, HorizontalFlip(), method="guided_backprop")
        if compiled:
            objective.compile(backend="eager")
        results.append(
            objective(images_of_one_seed(), torch.arange(2), torch.Generator().manual_seed(0)).total
        )
    return results


def images_of_one_seed():
    return torch.rand(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "act",
    [
        lambda x, z: torch.where(x > 0.1, x, torch.full_like(x, 0.1)),
        lambda x, z: torch.where(x > z, torch.relu(x), 0.0),
        lambda x, z: torch.maximum(x, x * 0.5),
        lambda x, z: x + torch.maximum(x.detach(), zeros(x)),
        lambda x, z: x.clamp(min=torch.tensor(0.0)),
        lambda x, z: mask_times_in_place(x),
        lambda x, z: torch.maximum(x - 0.1, (x - 0.1) * 0.5),
    ],
    ids=["where", "x > buffer", "maxout", "detached", "constant", "mask", "leaky"],
)
@pytest.mark.usefixtures("traced")
def test_what_is_certain_compiles(act):
    compiled, eager = compiled_and_eager(act, 0.0)
    assert_close(compiled, eager)


@pytest.mark.parametrize("z", [0.0, 0.25])
@pytest.mark.parametrize(
    ("act", "name"),
    [
        (lambda x, z: torch.maximum(x, zeros(x) + z), "maximum"),
        (lambda x, z: torch.max(x, z), "maximum"),
        (lambda x, z: F.prelu(x, z.view(1)), "prelu"),
        (lambda x, z: torch.where(x > z, x, 0.0), "where"),
        (lambda x, z: x.clamp(min=z), "clamp"),
    ],
)
def test_what_may_be_a_relu_is_refused_by_name_in_a_graph(act, name, z):
    with pytest.raises(RuntimeError, match=rf"no values .* \({name}\) is a ReLU.*leave compile\(\) out"):
        compiled_and_eager(act, z)


@pytest.mark.parametrize("spelling", BY_VALUES)
@pytest.mark.usefixtures("traced")
def test_what_values_tell_is_refused_by_name_in_a_graph(spelling):
    objective = Objective(Rectified(BY_VALUES[spelling]), HorizontalFlip(), method="guided_backprop")
    objective.compile(backend="eager")
    with pytest.raises(RuntimeError, match=r"no values .*\) is a ReLU.*leave compile\(\) out"):
        objective(images_of_one_seed(), torch.arange(2))


@pytest.mark.usefixtures("traced")
def test_without_a_rule_nothing_is_refused():
    objective = Objective(Rectified(BY_VALUES["x > -x"]), HorizontalFlip())
    objective.compile(backend="eager")
    assert objective(images_of_one_seed(), torch.arange(2)).total > 0
