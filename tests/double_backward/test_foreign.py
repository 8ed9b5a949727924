"""Functions (`torch.autograd.Function`) of the user's, whose second derivatives are right, or refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from salnb import Objective, saliency
from salnb.augment import HorizontalFlip
from salnb.double_backward import foreign
from tests.helpers.swish import Swish


class Detached(Swish):
    @staticmethod
    def backward(ctx, grad):
        return Swish.slope(ctx.saved_tensors[0].detach()) * grad


class UnderNoGrad(Swish):
    @staticmethod
    def backward(ctx, grad):
        with torch.no_grad():
            slope = Swish.slope(*ctx.saved_tensors)
        return slope * grad


class HalfDetached(Swish):
    @staticmethod
    def backward(ctx, grad):
        (z,) = ctx.saved_tensors
        s = torch.sigmoid(z).detach()
        return s * (1 + z * (1 - s)) * grad


class OnContext(Swish):
    @staticmethod
    def forward(ctx, z):
        ctx.z = z
        return z * torch.sigmoid(z)

    @staticmethod
    def backward(ctx, grad):
        return Swish.slope(ctx.z.data) * grad


class SetUp(Function):
    @staticmethod
    def forward(z):
        return z * torch.sigmoid(z)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def vjp(ctx, grad):
        return Swish.slope(ctx.saved_tensors[0].detach()) * grad


class ByOutput(Function):
    @staticmethod
    def forward(ctx, z):
        y = torch.tanh(z)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        return (1 - ctx.saved_tensors[0].detach() ** 2) * grad


class ReturnsMore(Swish):
    """As those do that take numbers, which have no gradient."""

    @staticmethod
    def backward(ctx, grad):
        return Swish.slope(ctx.saved_tensors[0].detach()) * grad, None


class Product(Function):
    """Of a tensor and a weight, one of which is detached."""

    @staticmethod
    def forward(ctx, z, weight):
        ctx.save_for_backward(z, weight)
        return z * weight

    @staticmethod
    def backward(ctx, grad):
        z, weight = ctx.saved_tensors
        return grad * weight.detach(), (grad * z).sum().view(1)


class WrongSecond(Swish):
    """A backward pass that is a Function again, with a derivative that is not its own."""

    class Backward(Function):
        @staticmethod
        def forward(ctx, z, grad):
            ctx.save_for_backward(z)
            return Swish.slope(z) * grad

        @staticmethod
        def backward(ctx, v):
            return torch.zeros_like(v), Swish.slope(*ctx.saved_tensors) * v

    @staticmethod
    def backward(ctx, grad):
        return WrongSecond.Backward.apply(*ctx.saved_tensors, grad)


class Weighted(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.function.apply(F.silu(x), self.weight)


class Applied(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function.apply(x)


WRONG = [Detached, UnderNoGrad, HalfDetached, OnContext, SetUp, ByOutput, ReturnsMore, Product, WrongSecond]


def network(function, dtype=torch.float32):
    torch.manual_seed(0)
    middle = Weighted(function) if issubclass(function, Product) else Applied(function)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)]
    return nn.Sequential(nn.Conv2d(3, 6, 3), middle, nn.Conv2d(6, 6, 3), nn.SiLU(), *head).to(dtype)


def batch(dtype=torch.float32):
    return torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype), torch.arange(4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("function", WRONG)
def test_what_detaches_only_what_it_saved_is_refused(function, dtype):
    model = network(function, dtype)
    said = rf"the Function {function.__name__} detaches what it saved"
    with pytest.raises(RuntimeError, match=said):
        Objective(model, HorizontalFlip())(*batch(dtype))
    with pytest.raises(RuntimeError, match=f"{said}.*leave create_graph out"):
        saliency.vanilla_gradient(model, *batch(dtype), create_graph=True)
    saliency.vanilla_gradient(model, *batch(dtype))
    Objective(model, HorizontalFlip(), gamma=0)(*batch(dtype)).total.backward()


@pytest.mark.parametrize("function", [*WRONG, "without a graph"])
def test_a_compiled_step_refuses_them_too(function):
    if isinstance(function, str):

        class NoGraph(Swish):
            @staticmethod
            def backward(ctx, grad):
                with torch.no_grad():
                    return Swish.backward(ctx, grad)

        function = NoGraph
    objective = Objective(network(function), HorizontalFlip())
    objective.compile(backend="eager")
    before = copy.deepcopy(objective.state_dict())
    with pytest.raises(RuntimeError, match=f"the Function {function.__name__} "):
        objective(*batch())
    torch.testing.assert_close(objective.state_dict(), before)


class StraightThrough(Function):
    """Rounding, and a gradient with a mask."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return (8 * z).round() / 8

    @staticmethod
    def backward(ctx, grad):
        return grad * (ctx.saved_tensors[0].detach().abs() <= 0.2)


class Rectified(Function):
    @staticmethod
    def forward(ctx, z):
        y = z.clamp(min=0)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        return grad * (ctx.saved_tensors[0].detach() > 0).to(grad)


class Surrogate(Function):
    """A spike, with the slope of a smooth function, whose derivative autograd takes."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return (z > 0).to(z)

    @staticmethod
    def backward(ctx, grad):
        return grad / (1 + ctx.saved_tensors[0].abs()) ** 2


class Reversed(Function):
    """Its backward pass saves nothing; the attributes are no tensors, and one is written."""

    @staticmethod
    def forward(ctx, z):
        ctx.strength, ctx.calls = 0.5, []
        return z.view_as(z)

    @staticmethod
    def backward(ctx, grad):
        ctx.done = True
        return -ctx.strength * grad


class Dropped(Function):
    @staticmethod
    def forward(ctx, z):
        mask = (torch.rand_like(z) > 0.5).to(z)
        ctx.save_for_backward(mask)
        return z * mask

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0]


class FrozenProduct(Product):
    @staticmethod
    def backward(ctx, grad):
        z, weight = ctx.saved_tensors
        return grad * weight, (grad * z).sum().view(1)


class Single(Swish):
    """Only one precision will do, as for a kernel."""

    @staticmethod
    def backward(ctx, grad):
        (z,) = ctx.saved_tensors
        assert z.dtype is grad.dtype is torch.float32
        return Swish.slope(z) * grad


RIGHT = [Swish, StraightThrough, Rectified, Surrogate, Reversed, Dropped, FrozenProduct, Single]


@pytest.mark.parametrize("function", RIGHT)
@pytest.mark.usefixtures("traced")
def test_what_is_right_is_not_refused(function):
    model = network(function)
    Objective(model, HorizontalFlip())(*batch()).total.backward()
    saliency.vanilla_gradient(model, *batch(), create_graph=True)
    compiled = Objective(model, HorizontalFlip())
    compiled.compile(backend="eager")
    compiled(*batch()).total.backward()


def test_a_kernel_with_one_precision():
    class DetachedSingle(Single):
        @staticmethod
        def backward(ctx, grad):
            (z,) = ctx.saved_tensors
            assert z.dtype is torch.float32
            return Swish.slope(z.detach()) * grad

    with pytest.raises(RuntimeError, match="the Function DetachedSingle detaches"):
        Objective(network(DetachedSingle), HorizontalFlip())(*batch())


def test_a_function_is_not_tried_out_for_ever(monkeypatch):
    tried = []
    compare = foreign._compare
    monkeypatch.setattr(foreign, "_compare", lambda trial: tried.append(trial) or compare(trial))

    class Another(Swish):
        pass

    model = network(Another)
    for _ in range(12):
        saliency.vanilla_gradient(model, *batch(), create_graph=True)
    assert len(tried) == 8


def test_one_that_says_so_keeps_its_message():
    class Once(Swish):
        backward = staticmethod(once_differentiable(Swish.backward))

    with pytest.raises(RuntimeError, match="once_differentiable"):
        Objective(network(Once), HorizontalFlip())(*batch())
