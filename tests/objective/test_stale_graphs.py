"""After `compile()`: whatever is changed between two steps, the next one is the eager objective's, or refused.

Each change is made to an eager and to a compiled objective that has run a step before.
"""

import copy
import logging
import random
import types
import warnings
from dataclasses import dataclass, field
from functools import partial

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn
from torch.nn.utils import prune

from salnb import Objective
from salnb.augment import Contrast, HorizontalFlip, Rotation
from tests.helpers.tolerances import assert_close

TARGET = torch.tensor([0, 1, 2, 3])


@dataclass
class Config:
    """Settings in an object, as models of transformers keep theirs."""

    scale: float = 1.0
    inner: dict = field(default_factory=lambda: {"powers": [1, 2]})


class Part(nn.Module):
    """Looks at attributes of every kind."""

    factor = 1.0  # of the class

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.act, self.act2 = nn.Tanh(), nn.Tanh()
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm2d(4)
        self.config, self.space = Config(), types.SimpleNamespace(shift=0.1)
        self.powers, self.table = [1.0, [0.5]], {"a": {"b": 2.0}}
        self.function, self.bound = partial(torch.mul, other=0.9), torch.sin
        self.constant = torch.tensor(0.3, dtype=torch.float64)
        self.outside = [nn.LeakyReLU(0.1)]
        self.array, self.log = np.array([0.5, 0.25]), logging.getLogger("tests.stale")
        self.register_buffer("offset", torch.tensor(0.2))

    def forward(self, x):
        x = self.drop(self.act(self.norm(self.conv(x)))) * self.config.scale * self.factor
        x = x + self.config.inner["powers"][1] * self.space.shift + self.constant + self.offset
        x = self.function(self.act2(x)) * self.powers[1][0] + self.table["a"]["b"] * self.bound(x)
        return self.outside[0](x) + float(self.array[1])


def network():
    torch.manual_seed(3)
    head = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 4)]
    return nn.Sequential(nn.Conv2d(3, 4, 3), Part(), *head).double()


def tie(o):
    o.model.add_module("5", nn.Linear(4, 4).double())
    o.model.add_module("6", nn.Linear(4, 4).double())
    o.model[6].weight = o.model[5].weight


def hook(module, args, output):
    return output * 1.5


def pre_hook(module, args):
    return (args[0] * 0.7,)


def backward_hook(module, grad_input, grad_output):
    return tuple(None if g is None else 2 * g for g in grad_input)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def frozen(o):
    o.model[1].norm.weight.requires_grad_(False)


MUTATIONS = {
    "hyper-parameter": lambda o: setattr(o.model[1].drop, "p", 0.9),
    "momentum": lambda o: setattr(o.model[1].norm, "momentum", 0.5),
    "eps": lambda o: setattr(o.model[1].norm, "eps", 0.5),
    "stride": lambda o: setattr(o.model[0], "stride", (2, 2)),
    "int to float": lambda o: o.model[1].powers.__setitem__(0, 1),
    "swapped module": lambda o: setattr(o.model[1], "act", nn.Softplus()),
    "swapped for its like": lambda o: setattr(o.model[1], "conv", nn.Conv2d(4, 4, 3, padding=1).double()),
    "added module": lambda o: o.model.append(nn.Tanh()),
    "removed module": lambda o: o.model.__delitem__(0) or o.model.insert(0, nn.Conv2d(3, 4, 1).double()),
    "order": lambda o: setattr(o.model[1], "_modules", dict(reversed(o.model[1]._modules.items()))),
    "shared module": lambda o: setattr(o.model[1], "act2", o.model[1].act),
    "tied weights": tie,
    "untied": lambda o: (tie(o), setattr(o.model[6], "weight", nn.Parameter(o.model[5].weight.detach() + 1))),
    "added parameter": lambda o: o.model[1].norm.register_parameter("more", nn.Parameter(torch.ones(2))),
    "new parameter": lambda o: setattr(o.model[1].conv, "bias", nn.Parameter(torch.rand(4).double())),
    "no bias": lambda o: setattr(o.model[1].conv, "bias", None),
    "added buffer": lambda o: o.model[1].register_buffer("more", torch.ones(2)),
    "buffer's type": lambda o: setattr(o.model[1], "offset", torch.tensor(0.7).double()),
    "buffer's shape": lambda o: setattr(o.model[1], "offset", torch.rand(4, 1, 1).double()),
    "buffer's values": lambda o: o.model[1].offset.fill_(0.9),
    "frozen": frozen,
    "eval": lambda o: o.model[1].eval(),
    "eval of all": lambda o: o.eval(),
    "dataclass": lambda o: setattr(o.model[1].config, "scale", 0.5),
    "nested": lambda o: o.model[1].config.inner["powers"].__setitem__(1, 5),
    "namespace": lambda o: setattr(o.model[1].space, "shift", 0.7),
    "list": lambda o: o.model[1].powers[1].__setitem__(0, 3.0),
    "dict": lambda o: o.model[1].table["a"].__setitem__("b", 0.1),
    "partial": lambda o: setattr(o.model[1], "function", partial(torch.mul, other=0.2)),
    "function": lambda o: setattr(o.model[1], "bound", torch.cos),
    "lambda": lambda o: setattr(o.model[1], "bound", lambda x: x.cos()),
    "closure": lambda o: setattr(o.model[1], "bound", (lambda k: lambda x: k * x)(o.model[1].config.scale)),
    "tensor": lambda o: o.model[1].constant.fill_(0.8),
    "other tensor": lambda o: setattr(o.model[1], "constant", torch.tensor(0.9).double()),
    "array": lambda o: o.model[1].array.__setitem__(1, 0.7),
    "scalar of NumPy": lambda o: setattr(o.model[1].space, "shift", np.float32(0.3)),
    "logger": lambda o: (o.model[1].log.setLevel("DEBUG"), logging.getLogger("tests.stale.inner")),
    "outside of the tree": lambda o: setattr(o.model[1].outside[0], "negative_slope", 0.7),
    "forward of an object": lambda o: setattr(o.model[1].act, "forward", torch.sigmoid),
    "forward hook": lambda o: o.model[1].conv.register_forward_hook(hook),
    "pre-hook": lambda o: o.model[1].register_forward_pre_hook(pre_hook),
    "backward hook": lambda o: o.model[1].conv.register_full_backward_hook(backward_hook),
    "removed hook": lambda o: o.model[1].conv.register_forward_hook(hook).remove(),
    "hook of a parameter": lambda o: o.model[1].conv.weight.register_hook(lambda g: 3 * g),
    "parametrization": lambda o: nn.utils.parametrize.register_parametrization(o.model[1].conv, "weight", Doubled()),
    "spectral norm": lambda o: nn.utils.parametrizations.spectral_norm(o.model[1].conv),
    "weight norm": lambda o: nn.utils.parametrizations.weight_norm(o.model[1].conv),
    "older spectral norm": lambda o: nn.utils.spectral_norm(o.model[1].conv),
    "older weight norm": lambda o: nn.utils.weight_norm(o.model[1].conv),
    "pruning": lambda o: prune.l1_unstructured(o.model[1].conv, "weight", 0.5),
    "memory format": lambda o: o.to(memory_format=torch.channels_last),
    "the augmentation's attributes": lambda o: setattr(o.augmentation, "p", 0.0),
    "another augmentation": lambda o: setattr(o, "augmentation", Contrast()),
    "another geometry": lambda o: setattr(o, "augmentation", Rotation(40)),
    "settings": lambda o: setattr(o, "normalize", "l2"),
    "weights": lambda o: setattr(o, "gamma", 0.3),
}  # fmt: skip


def step(objective, x):
    objective.zero_grad()
    torch.manual_seed(11)
    losses = objective(x, TARGET, torch.Generator().manual_seed(7))
    losses.total.backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in objective.parameters()]
    return losses, torch.cat([g.flatten() for g in gradients])


def pair(model=None, **options):
    eager = Objective(model or network(), HorizontalFlip(), **options)
    compiled = copy.deepcopy(eager)
    compiled.compile(backend="eager")
    return eager, compiled


def assert_same(eager, compiled, x):
    (expected, gradient), (found, found_gradient) = (step(o, x) for o in (eager, compiled))
    assert_close(found.total.detach(), expected.total.detach())
    assert_close(found.saliency_loss, expected.saliency_loss.detach())
    assert_close(found_gradient, gradient)
    for buffer, other in zip(compiled.buffers(), eager.buffers(), strict=True):
        assert_close(buffer.double(), other.double())


def images():
    return torch.rand(4, 3, 8, 8, dtype=torch.float64)


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.usefixtures("traced")
def test_a_change_acts_at_once(mutation):
    eager, compiled = pair()
    assert_same(eager, compiled, images())
    for objective in (eager, compiled):
        torch.manual_seed(5)
        MUTATIONS[mutation](objective)
    for _ in range(2):
        assert_same(eager, compiled, images())


@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(st.sampled_from(sorted(set(MUTATIONS) - {"pruning", "parametrization",*(name for name in MUTATIONS if "norm" in name and "l" in name),
                "no bias", "new parameter"})), min_size=2, max_size=4, unique=True))  # fmt: skip
@pytest.mark.usefixtures("traced")
def test_any_series_of_changes(mutations):
    eager, compiled = pair()
    for mutation in mutations:
        for objective in (eager, compiled):
            torch.manual_seed(5)
            MUTATIONS[mutation](objective)
        assert_same(eager, compiled, images())


def test_attributes_of_classes(traced, monkeypatch):
    eager, compiled = pair()
    assert_same(eager, compiled, images())
    monkeypatch.setattr(Part, "factor", 0.4)
    assert_same(eager, compiled, images())
    monkeypatch.setattr(nn.Tanh, "forward", lambda self, x: x.sigmoid())
    assert_same(eager, compiled, images())
    assert len(traced) == 3


def test_global_switches(traced):
    _, compiled = pair()
    step(compiled, images())
    torch.set_float32_matmul_precision("high")
    try:
        step(compiled, images())
    finally:
        torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        step(compiled, images())
    finally:
        torch.use_deterministic_algorithms(False)
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: None)
    step(compiled, images())
    handle.remove()
    assert len(traced) == 4
    step(compiled, images())
    assert len(traced) == 4


def test_what_stays_the_same_needs_no_new_graph(traced):
    _, compiled = pair()
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        handle = compiled.model[1].conv.register_forward_hook(hook)
        step(compiled, images())
        optimizer.step()
        handle.remove()
        compiled.load_state_dict(compiled.state_dict())
        compiled.model[1].powers = [1.0, [0.5]]
    assert len(traced) == 1


# --- what a graph would forget ------------------------------------------------------------------------------


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.calls


class Appends(Counter):
    def forward(self, x):
        self.config = getattr(self, "config", {"seen": []})
        self.config["seen"].append(1)
        return x * len(self.config["seen"])


class Keeps(Counter):
    def forward(self, x):
        self.last = x.detach().mean()
        return x + self.last


class Cached(Counter):
    table = None

    def forward(self, x):
        if self.table is None:
            self.table = torch.linspace(0, 1, x.shape[-1], dtype=x.dtype)
        return x * self.table


class PythonRandom(nn.Module):
    def forward(self, x):
        return x * random.random()


class NumPyRandom(nn.Module):
    def forward(self, x):
        return x * float(np.random.rand())  # noqa: NPY002


class OwnRandom(nn.Module):
    def __init__(self, source):
        super().__init__()
        self.source = source

    def forward(self, x):
        return x * self.source.random()


def around(module):
    head = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 4)]
    return nn.Sequential(nn.Conv2d(3, 4, 3), module, *head).double()


@pytest.mark.parametrize(
    ("module", "name"),
    [(Counter(), "model.1.calls"), (Appends(), "model.1.config"), (Keeps(), "model.1.last"),
     (OwnRandom(random.Random(1)), "model.1.source"), (OwnRandom(np.random.default_rng(1)), "model.1.source")],
    ids=["counter", "list", "tensor", "random.Random", "numpy.random.Generator"],
)  # fmt: skip
@pytest.mark.usefixtures("traced")
def test_a_model_that_changes_its_attributes_is_refused(module, name):
    _, compiled = pair(around(module))
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=rf"leaves its attributes alone, .* changes {name}: make it a buffer"
        ):
            compiled(images(), TARGET)
    assert getattr(compiled.model[1], "calls", 0) == 0
    assert not hasattr(compiled.model[1], "last")


@pytest.mark.usefixtures("traced")
def test_a_cache_is_filled_first():
    eager, compiled = pair(around(Cached()))
    with pytest.raises(RuntimeError, match=r"model.1.table: .* run the model once before"):
        compiled(images(), TARGET)
    compiled.model(images())
    assert_same(eager, compiled, images())


@pytest.mark.parametrize("module", [PythonRandom, NumPyRandom])
@pytest.mark.usefixtures("traced")
def test_randomness_of_python_is_refused(module):
    _, compiled = pair(around(module()))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"draws its random numbers with PyTorch, .* leave compile"):
            compiled(images(), TARGET)


@pytest.mark.usefixtures("traced")
def test_a_buffer_that_counts():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()).double())

        def forward(self, x):
            self.calls = self.calls + 1
            return x * self.calls

    eager, compiled = pair(around(Counts()))
    for _ in range(3):
        assert_same(eager, compiled, images())
    assert compiled.model[1].calls == 3


@pytest.mark.usefixtures("traced")
def test_many_graphs_are_told():
    _, compiled = pair(around(nn.Dropout(0.1)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(8):
            compiled.model[1].p, compiled.model[1].of_the_first_steps = i / 20, i < 4
            step(compiled, images())
        compiled.model[1].p = 0.9
        with pytest.raises(UserWarning, match=r"its graph number 9; .* have changed: model\.1\.p$"):
            step(compiled, images())


def test_another_compiler_sees_the_changes_too():
    eager, compiled = pair(around(nn.Tanh()))
    compiled.compile(backend="aot_eager")
    assert_same(eager, compiled, images())
    for objective in (eager, compiled):
        objective.model[1] = nn.Hardtanh(-0.1, 0.1)
    assert_same(eager, compiled, images())
