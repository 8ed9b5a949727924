"""What the key of a compiled step's graph tells apart."""

import array
import collections
import copy
import itertools
import random
import types
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from salnb import Objective
from salnb.augment import HorizontalFlip
from salnb.objective.graph_key import graph_key, refuse_what_a_graph_forgets
from tests.helpers.networks import conv_bn

SETTINGS = types.SimpleNamespace(model_kwargs=())


def key_of(step):
    return graph_key(step, SETTINGS, [torch.zeros(4, 3, 8, 8)], pytree.tree_flatten([])[1])


def step_with(value):
    step = nn.ModuleDict({"model": nn.Sequential(nn.Linear(2, 2))})
    step["model"].looked_at = value
    return step


def test_many_objects_that_do_not_lie_deep_are_all_looked_into():
    values = [types.SimpleNamespace(scale=1.0) for _ in range(300)]
    step = step_with(values)
    before = key_of(step)
    values[-1].scale = 2.0
    assert key_of(step) != before


def test_where_parameters_lie_matters_only_where_it_is_asked_for():
    step, given = step_with(None), ([torch.zeros(4, 3, 8, 8)], pytree.tree_flatten([])[1])
    before = [graph_key(step, SETTINGS, *given), graph_key(step, SETTINGS, *given, places=True)]
    assert graph_key(step, SETTINGS, *given, places=True) == before[1]
    weight = step["model"][0].weight
    weight.data = weight.data.clone()
    after = [graph_key(step, SETTINGS, *given), graph_key(step, SETTINGS, *given, places=True)]
    assert [a == b for a, b in zip(after, before, strict=True)] == [True, False]


WRAPPERS = {
    "object": (lambda value: types.SimpleNamespace(inner=value), 51),
    "dictionary": (lambda value: {"inner": value}, 51),
    "list": (lambda value: [0, value], 51),
    "tuple": (lambda value: (value, None), 51),
    "deque": (lambda value: collections.deque([value]), 51),
}


@pytest.mark.parametrize(("wrap", "deepest"), WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize(("beyond", "seen"), [(None, True), (0, True), (1, False)])
def test_how_deep_an_object_is_looked_into(wrap, deepest, beyond, seen):
    """Beyond, an object is told by which one it is."""
    of_objects = isinstance(wrap(None), types.SimpleNamespace)
    innermost = value = types.SimpleNamespace(scale=1.0) if of_objects else {"scale": 1.0}
    for _ in range(0 if beyond is None else deepest + beyond - 1):
        value = wrap(value)
    step = step_with(value)
    before = key_of(step)
    store = innermost if isinstance(innermost, dict) else vars(innermost)
    store["scale"] = 2.0
    assert (key_of(step) != before) == seen
    store["scale"] = 1.0
    step["model"].looked_at = copy.deepcopy(value)
    assert (key_of(step) == before) == seen


@pytest.mark.parametrize(("number", "seen"), [(0, True), (150, True), (250, False)])
def test_of_many_objects_that_lie_deep_the_first_are_looked_into(number, seen):
    """An object may lead to all the rest of a program."""
    value = many = [types.SimpleNamespace(scale=1.0) for _ in range(300)]
    for _ in range(4):
        value = types.SimpleNamespace(inner=value)
    value = {"deep": value, "beside": {"scale": 1.0}}
    step = step_with(value)
    before = key_of(step)
    many[number].scale = 2.0
    assert (key_of(step) != before) == seen
    before = key_of(step)
    value["beside"]["scale"] = 2.0  # what is not deep is looked into nonetheless
    assert key_of(step) != before


def config():
    class Config:
        scale = 1.0
        sizes = (1, 2)

        class Inner:
            depth = 1

    Config.itself = Config()  # a cycle
    return Config


@dataclass(slots=True)
class Slots:
    scale: float = 1.0


class Dict(dict):
    pass


class Steer:
    """Something of a program's own, with a method that a model calls."""

    k = 1.0

    def __init__(self):
        self.eps, self.by_name, self.steps, self.models = 0.1, 0.2, 0, [nn.Linear(2, 2)]

    @property
    def strength(self):
        return self.eps

    def inner(self, x):
        return x * self.strength + getattr(self, "by_name")  # noqa: B009

    def hook(self, module, args, output):
        return [self.inner(x) * self.k for x in output]


class Elsewhere(Steer):
    """Looks up what it does not have by a name made on the way."""

    def __init__(self):
        self.found_width = 1.0

    def __getattr__(self, name):
        return vars(self)["_".join(("found", name))]

    def wide(self, x):
        return x * self.width


def with_scale(value):
    value.scale = 1.0
    return value


def changed(value, name="scale"):
    setattr(value, name, 2.0)


def objects():
    held = np.empty(1, dtype=object)
    held[0] = [1.0]
    return held


def hooked():
    steer = Steer()
    module = nn.Tanh()
    module.register_forward_hook(steer.hook)
    return module


CHANGES = {
    "class of an object": (lambda: config()(), lambda v: changed(type(v))),
    "class": (config, changed),
    "class in a class": (config, lambda v: changed(v.Inner, "depth")),
    "module of Python": (lambda: with_scale(types.ModuleType("settings")), changed),
    "function": (lambda: with_scale(lambda x: x), changed),
    "slots": (Slots, changed),
    "attribute of a dict": (lambda: with_scale(Dict(a=1)), changed),
    "method": (lambda: Steer().hook, lambda v: changed(v.__self__, "k")),
    "method's class": (
        lambda: type("Own", (Steer,), {"k": 3.0})().hook,
        lambda v: changed(type(v.__self__), "k"),
    ),
    "method in a method": (lambda: Steer().hook, lambda v: changed(v.__self__, "eps")),
    "by name": (lambda: Steer().hook, lambda v: changed(v.__self__, "by_name")),
    "method that finds more": (lambda: Elsewhere().wide, lambda v: changed(v.__self__, "found_width")),
    "hook": (hooked, lambda v: changed(next(iter(v._forward_hooks.values())).__self__, "eps")),
    "partial of a method": (lambda: partial(Steer().hook), lambda v: changed(v.func.__self__, "eps")),
    "deque": (lambda: collections.deque([1.0]), lambda v: v.append(2.0)),
    "hyper-parameters of lightning": (
        lambda: type("AttributeDict", (dict,), {"__module__": "lightning.fabric"})(a=1),
        lambda v: v.update(a=2),
    ),
    "bytearray": (lambda: bytearray([1]), lambda v: v.append(2)),
    "array": (lambda: array.array("d", [1.0]), lambda v: v.append(2.0)),
    "array of objects": (objects, lambda v: v[0].append(2.0)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_an_attribute_leads_to(name):
    make, change = CHANGES[name]
    value = make()
    step = step_with(value)
    before = key_of(step)
    assert key_of(step) == before
    change(value)
    assert key_of(step) != before


def test_slots_of_a_module():
    class Part(nn.Module):
        __slots__ = ("scale", "unset")

    part = with_scale(Part())
    step = nn.ModuleDict({"model": part})
    before = key_of(step)
    assert key_of(step) == before
    part.scale = 2.0
    assert key_of(step) != before


def test_what_a_method_does_not_look_at():
    """A trainer counts its steps and trains the model; for its loss no new graph is needed."""
    step = step_with(None)
    steer = Steer()
    step["model"].looked_at, step["model"].layers, steer.eps = steer.hook, [step["model"][0]], step["model"]
    before = key_of(step)
    steer.steps += 1
    with torch.no_grad():
        step["model"][0].weight.add_(1)
        steer.models[0].weight.add_(1)
    assert key_of(step) == before


def generator():
    yield from (1.0, 2.0, 3.0)


FORGOTTEN = {
    "RandomState": (lambda: np.random.RandomState(1), lambda v: v.randn()),
    "the second of two normal numbers": (lambda: drawn_once(), lambda v: v.randn()),
    "BitGenerator": (lambda: np.random.PCG64(1), lambda v: v.random_raw()),
    "count": (itertools.count, next),
    "iterator": (lambda: iter([1.0, 2.0]), next),
    "zip": (lambda: zip([1], [2], strict=True), next),
    "cycle": (lambda: itertools.cycle([1, 2]), next),
    "generator": (generator, next),
    "deque": (collections.deque, lambda v: v.append(1)),
    "slots": (Slots, changed),
}


def drawn_once():
    source = np.random.RandomState(1)
    source.randn()
    return source


@pytest.mark.parametrize("name", FORGOTTEN)
def test_what_goes_on_with_each_pass_is_refused(name):
    make, use = FORGOTTEN[name]
    value = make()
    step = step_with(value)
    with (
        pytest.raises(RuntimeError, match=r"a forward pass changes model.looked_at: make it a buffer"),
        refuse_what_a_graph_forgets(step, lambda: key_of(step)),
    ):
        use(value)


def test_what_may_be_counted_outside():
    """A class that numbers its objects, and sources that no pass draws from."""
    numbered = type("Numbered", (), {"numbers": itertools.count(3)})
    step = step_with([numbered(), np.random.RandomState(1), iter([1.0]), itertools.repeat(2)])
    with refuse_what_a_graph_forgets(step, lambda: key_of(step)):
        pass


@pytest.mark.parametrize(
    "draw",
    [lambda source: np.random.default_rng().random(), lambda source: source.random()],
    ids=["numpy.random.default_rng", "random.SystemRandom"],
)
def test_entropy_of_the_system_is_refused(draw):
    source = random.SystemRandom()
    step = step_with(source)
    with (
        pytest.raises(RuntimeError, match=r"draws its random numbers with PyTorch, .* leave compile"),
        refuse_what_a_graph_forgets(step, lambda: key_of(step)),
    ):
        draw(source)
    with refuse_what_a_graph_forgets(step, lambda: key_of(step)):
        np.random.default_rng(1).random()


class Configured(nn.Module):
    """A network with two configurations, one of its own and one that is given, and their scales."""

    def __init__(self):
        super().__init__()
        self.network, self.own = conv_bn(), nested(1.0)

    def forward(self, x, given):
        scale = given["blocks"][0]["layers"][1].settings["scale"]
        return self.network(x) * self.own["blocks"][0]["layers"][1].settings["scale"] * scale


def nested(scale):
    layers = [None, types.SimpleNamespace(settings={"scale": scale})]
    return {"blocks": [{"layers": layers}]}


@pytest.mark.usefixtures("traced")
def test_what_changes_deep_inside_is_seen_by_a_compiled_step():
    eager = Objective(Configured(), HorizontalFlip())
    compiled, images, given = copy.deepcopy(eager), torch.rand(4, 3, 8, 8), nested(1.0)
    compiled.compile(backend="eager")
    for own, scale in ((1.0, 1.0), (1.0, 3.0), (0.5, 3.0)):
        totals = []
        for objective in (eager, compiled):
            for config, value in ((objective.model.own, own), (given, scale)):
                config["blocks"][0]["layers"][1].settings["scale"] = value
            draw = torch.Generator().manual_seed(0)
            totals.append(objective(images, torch.arange(4), draw, model_kwargs={"given": given}).total)
        torch.testing.assert_close(*totals)


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rows, self.head = kind(24, 5, batch_first=True), nn.Linear(5, 4)

    def forward(self, x):
        return self.head(self.rows(x.transpose(1, 2).flatten(2))[0].mean(1))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_networks_are_compiled_once(kind, traced):
    """They keep their parameters in a list as well, which each step of the optimiser changes."""
    eager = Objective(Recurrent(kind).double(), HorizontalFlip())
    compiled, images = copy.deepcopy(eager), torch.rand(4, 3, 8, 8, dtype=torch.float64)
    compiled.compile(backend="eager")
    for _ in range(3):
        totals = []
        for objective in (eager, compiled):
            total = objective(images, torch.arange(4), torch.Generator().manual_seed(0)).total
            gradients = torch.autograd.grad(total, list(objective.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(objective.parameters(), gradients, strict=True):
                    parameter -= 0.5 * gradient
            totals.append(total.detach())
        torch.testing.assert_close(*totals)
    assert len(traced) == 1
