"""The state of an objective: nothing but tensors, and older checkpoints still load."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from salnb import Objective
from salnb.augment import HorizontalFlip
from tests.helpers.networks import conv_bn

TARGET = torch.tensor([0, 1, 2, 3])


def objective_of(steps=0, **options):
    objective = Objective(conv_bn(), HorizontalFlip(), every=3, warmup=2, **options)
    for _ in range(steps):
        objective(torch.rand(4, 3, 8, 8), TARGET)
    return objective


def older(state, prefix=""):
    return state | {f"{prefix}_extra_state": {"steps_done": int(state[f"{prefix}_extra_state"])}}


def test_every_value_is_a_tensor():
    objective = objective_of(3)
    state = objective.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    # what was measured for float16 and `balance` is no entry of its own: older checkpoints have none
    assert state.keys() == {"_extra_state", *(f"model.{name}" for name in objective.model.state_dict())}
    assert state["_extra_state"] == 3


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("how", [lambda state: state, older, lambda state: state | {"_extra_state": torch.tensor(3.0)}],
                         ids=["tensor", "dictionary", "averaged"])  # fmt: skip
def test_loading(how, assign):
    saved, resumed = objective_of(3), objective_of()
    resumed.load_state_dict(how(saved.state_dict()), strict=True, assign=assign)
    assert resumed.steps_done == 3
    assert type(resumed.steps_done) is int
    assert resumed.current_gamma() == saved.current_gamma()
    with pytest.raises(RuntimeError, match="_extra_state"):
        resumed.load_state_dict({k: v for k, v in saved.state_dict().items() if k != "_extra_state"})


@pytest.mark.parametrize(
    "state", [[1.0], [1.0, 2.0], [math.inf, 1.0, 1.0], [1.0, math.nan, 1.0], math.inf, -1.0], ids=str
)
@pytest.mark.parametrize("balance", [0.0, 0.1])
def test_what_is_no_state_is_named(balance, state):
    objective = objective_of(balance=balance)
    spoilt = objective.state_dict() | {"_extra_state": torch.tensor(state)}
    with pytest.raises(ValueError, match=r"_extra_state must hold the number of steps done, .* got"):
        objective.load_state_dict(spoilt)
    assert objective.steps_done == 0


def test_through_a_file():
    saved, file = objective_of(2), io.BytesIO()
    torch.save(saved.state_dict(), file)
    file.seek(0)
    resumed = objective_of()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.steps_done == 2
    resumed.load_state_dict(older(saved.state_dict()))
    for twin in (copy.deepcopy(saved), pickle.loads(pickle.dumps(saved))):
        assert twin.steps_done == 2
        assert twin.state_dict().keys() == saved.state_dict().keys()


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    saved, resumed = objective_of(2), objective_of()
    safetensors.save_file(saved.state_dict(), tmp_path / "model.safetensors")
    resumed.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"))
    assert resumed.steps_done == 2
    safetensors.save_model(saved, str(tmp_path / "model.safetensors"))


def test_inside_of_a_wrapper():
    """As `DistributedDataParallel` saves it."""
    for change in (lambda state, prefix: state, older):
        saved, resumed = nn.ModuleDict({"module": objective_of(2)}), nn.ModuleDict({"module": objective_of()})
        resumed.load_state_dict(change(saved.state_dict(), "module."))
        assert resumed["module"].steps_done == 2


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("average", [{}, {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}], ids=["mean", "ema"])
def test_averages_of_weights(average, use_buffers):
    objective = objective_of(1)
    averaged = AveragedModel(objective, use_buffers=use_buffers, **average)
    for _ in range(2):
        objective(torch.rand(4, 3, 8, 8), TARGET)
        averaged.update_parameters(objective)
    resumed = AveragedModel(objective_of(), use_buffers=use_buffers, **average)
    resumed.load_state_dict(averaged.state_dict())
    assert resumed.module.steps_done == 1
    # those that average all values of a state
    mean = {name: 0.9 * value + 0.1 * value for name, value in objective.state_dict().items()}
    objective.load_state_dict(mean)
    assert objective.steps_done == 3


def test_without_storage():
    with torch.device("meta"):
        shapes = objective_of()
    shapes.load_state_dict(objective_of(2).state_dict(), assign=True)
    assert shapes.steps_done == 2
