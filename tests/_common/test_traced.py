"""Which tensors have values that a check can look at."""

import pytest
import torch
from torch._functorch.aot_autograd import aot_function
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode
from torchvision import tv_tensors

from salnb._common.checks import check_finite, is_traced

X = torch.rand(2, 3)


class Mine(torch.Tensor):
    """A subclass that changes nothing."""


def seen_by(transform):
    """What `is_traced` says of the tensor that reaches a function through a transform of it."""
    said = []

    def function(tensor):
        said.append(is_traced(tensor))
        return (tensor * tensor).sum()

    transform(function)
    assert said
    return set(said)


def fake(function):
    with FakeTensorMode() as mode:
        function(mode.from_tensor(X))
    function(mode.from_tensor(X))  # and where its mode is over


def watched(function):
    with FlopCounterMode(display=False):
        function(X)


class Call(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, tensor):
        return self.function(tensor)


TRACED = {
    "make_fx": lambda f: make_fx(f)(X),
    "make_fx, fake": lambda f: make_fx(f, tracing_mode="fake")(X),
    "make_fx, symbolic": lambda f: make_fx(f, tracing_mode="symbolic")(X),
    "make_fx before dispatch": lambda f: make_fx(f, pre_dispatch=True)(X),
    "functionalize": lambda f: torch.func.functionalize(f)(X),
    "aot_autograd": lambda f: aot_function(f, fw_compiler=lambda graph, _: graph)(X),
    "export": lambda f: torch.export.export(Call(f), (X,), strict=False),
    "a fake tensor": fake,
    "meta": lambda f: f(X.to("meta")),
    "vmap": lambda f: torch.vmap(f)(X),
    "vmap of grad": lambda f: torch.vmap(torch.func.grad(f))(X),
    "grad of vmap": lambda f: torch.func.grad(lambda x: torch.vmap(f)(x).sum())(X),
}
WITH_VALUES = {
    "a plain tensor": lambda f: f(X),
    "a parameter": lambda f: f(torch.nn.Parameter(X)),
    "a subclass of torchvision's": lambda f: f(tv_tensors.Image(torch.rand(3, 2, 2))),
    "a user's subclass": lambda f: f(X.as_subclass(Mine)),
    "a mode that watches": watched,
    "torch.func.grad": lambda f: torch.func.grad(f)(X),
    "forward derivatives": lambda f: torch.func.jvp(f, (X,), (X,)),
    "inference mode": torch.inference_mode()(lambda f: f(X)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("transform", TRACED.values(), ids=TRACED)
def test_a_tensor_of_a_trace_has_no_values(transform):
    assert seen_by(transform) == {True}


@pytest.mark.parametrize("transform", WITH_VALUES.values(), ids=WITH_VALUES)
def test_any_other_tensor_has(transform):
    assert seen_by(transform) == {False}


def test_torch_compile_looks_at_no_values():
    @torch.compile(fullgraph=True, backend="eager")
    def function(tensor):
        check_finite(tensor, name="values")  # would break the graph
        return tensor + is_traced(tensor)

    assert torch.equal(function(X), X + 1)


@pytest.mark.parametrize("wrap", [tv_tensors.Image, lambda x: x.as_subclass(Mine)], ids=["Image", "a user's"])
def test_subclasses_are_checked(wrap):
    with pytest.raises(ValueError, match=r"values must be finite, got 1 NaN or infinite values"):
        check_finite(wrap(torch.tensor([[[1.0, torch.nan]]])), name="values")
