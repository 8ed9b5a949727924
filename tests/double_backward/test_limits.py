"""What the fast double backward refuses, and what it leaves alone."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from salnb.double_backward import fast_double_backward
from salnb.double_backward.refusals import check_second_derivative
from tests.helpers.double_backward import agree, batch, check, random, second_order
from tests.helpers.networks import Residual
from tests.helpers.tolerances import assert_close

THIRD = {
    "linear": lambda x, w: F.linear(x.flatten(1), w.flatten(1).repeat(1, 16)) ** 4,
    "convolution": lambda x, w: F.conv2d(x, w) ** 4,
    "batch norm": lambda x, w: F.batch_norm(F.conv2d(x, w), None, None, training=True) ** 4,
    "batch norm, evaluation": lambda x, w: F.batch_norm(x * w.mean(), x.new_zeros(3), x.new_ones(3)) ** 4,
    "relu": lambda x, w: F.relu(x * w.mean()) ** 4,
    "max pooling": lambda x, w: F.max_pool2d(x * w.mean(), 2) ** 4,
    "average pooling": lambda x, w: F.avg_pool2d(x * w.mean(), 2) ** 4,
    "concatenation": lambda x, w: torch.cat([x * w.mean(), x]) ** 4,
}


@pytest.mark.parametrize("function", THIRD.values(), ids=THIRD)
def test_third_derivatives_are_refused(function):
    x, w = random(2, 3, 4, 4), random(3, 3, 1, 1)
    with fast_double_backward():
        y = function(x, w).sum()
    (first,) = torch.autograd.grad(y, x, create_graph=True)
    second = torch.autograd.grad(first.square().sum(), (x, w), create_graph=True)
    with pytest.raises(RuntimeError, match=r"third derivatives .* fast_double_backward"):
        torch.autograd.grad(sum(s.square().sum() for s in second), x)


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (F.conv1d, (random(2, 3, 5), random(4, 3, 3))),
        (F.conv3d, (random(2, 3, 3, 3, 3), random(4, 3, 1, 1, 1))),
        (F.conv2d, (random(3, 5, 5), random(4, 3, 3, 3))),
        (F.linear, (random(2, 5, 3), random(4, 3))),
        (F.conv_transpose2d, (random(2, 3, 4, 4), random(3, 4, 3, 3))),
        (F.instance_norm, (random(2, 3, 4, 4),)),
        (lambda x: F.batch_norm(x, None, None, training=True), (random(4, 3, 5),)),
        (lambda x: F.max_pool2d(x, 2), (random(3, 4, 4),)),
        (lambda x: F.avg_pool2d(x, 2), (random(3, 4, 4),)),
        (lambda x: F.max_pool2d(x, 2, return_indices=True)[0], (random(2, 3, 4, 4),)),
        (lambda x, y: torch.cat([x, y]), (random(2, 3), random(2, 3, dtype=torch.float32))),
        (lambda x: torch.cat([x, x.new_zeros(0)], axis=1), (random(2, 3),)),
    ],
    ids=["conv1d", "conv3d", "unbatched", "sequences", "transposed", "instance norm", "3-d batch norm",
         "unbatched pooling", "unbatched averages", "pooling with indices", "mixed types", "empty"],
)  # fmt: skip
def test_everything_else_is_left_alone(function, inputs):
    with fast_double_backward():
        y = function(*inputs)
    assert not hasattr(type(y.grad_fn), "_forward_cls")
    check(function, inputs)


def test_nothing_is_replaced_without_a_graph():
    model, (images, _) = Residual().double().eval(), batch()
    with torch.no_grad():
        expected = model(images)
        with fast_double_backward():
            assert torch.equal(model(images), expected)
    with fast_double_backward():
        frozen = F.conv2d(images, random(4, 3, 3, 3, grad=False))
    assert not frozen.requires_grad


@pytest.mark.parametrize(
    "call",
    [
        lambda: F.conv2d(random(1, 3, 4, 4), random(2, 5, 3, 3)),
        lambda: F.conv2d(random(1, 3, 4, 4), random(2, 3, 3, 3), padding="other"),
        lambda: F.conv2d(random(1, 3, 4, 4), random(2, 3, 3, 3), padding="same", stride=2),
        lambda: F.batch_norm(random(1, 3), None, None, training=True),
        lambda: F.batch_norm(random(4, 3), None, None, training=False),
        lambda: F.relu(torch.zeros(2, requires_grad=True), inplace=True),
    ],
    ids=["channels", "padding", "strided same", "one value per channel", "no statistics", "leaf in place"],
)
def test_errors_are_those_of_pytorch(call):
    with pytest.raises((RuntimeError, ValueError)) as plain:
        call()
    with fast_double_backward(), pytest.raises(plain.type) as fast:
        call()
    if "leaf" not in str(plain.value):
        assert str(fast.value) == str(plain.value)


def test_functorch_keeps_working():
    weight = random(4, 3, 3, 3)
    images = random(5, 2, 3, 6, 6, grad=False)

    def loss(w, x):
        return F.relu(F.conv2d(x, w)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    expected = per_sample(weight, images)
    with fast_double_backward():
        assert_close(per_sample(weight, images), expected)


class HalvedReLU(TorchFunctionMode):
    """A stand-in for the ReLU rules of the saliency methods: halves ReLU's gradient."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.clamp(min=0)

        @staticmethod
        def backward(ctx, gy):
            return gy * (ctx.saved_tensors[0] > 0) / 2

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return self.Function.apply(args[0]) if func is F.relu else func(*args, **(kwargs or {}))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["entered first", "entered last"])
def test_another_rule_for_relu_goes_first(order):
    inputs = random(2, 3, 6, 6), random(4, 3, 3, 3)

    def function(x, w):
        return F.max_pool2d(F.relu(F.conv2d(x, w)), 2)

    with HalvedReLU():
        expected = second_order(function, inputs)
    with contextlib.ExitStack() as stack:
        for i in order:
            stack.enter_context((fast_double_backward, HalvedReLU)[i]())
        actual = second_order(function, inputs)
    agree(actual, expected)


def test_the_model_and_its_hooks_are_left_alone():
    model, (images, target) = Residual().double(), batch()
    before = {n: m.__dict__.keys() for n, m in model.named_modules()}
    types = [type(m) for m in model.modules()]
    hooked = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: hooked.append(p.shape))
    with fast_double_backward():
        images.requires_grad_()
        score = model(images).gather(1, target[:, None]).sum()
        (gradient,) = torch.autograd.grad(score, images, create_graph=True)
    (score + gradient.square().sum()).backward()
    assert len(hooked) == len(list(model.parameters()))  # once each, after both paths
    assert {n: m.__dict__.keys() for n, m in model.named_modules()} == before
    assert [type(m) for m in model.modules()] == types


class OnceOnly(torch.autograd.Function):
    """A cube whose gradient has none."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 3 * grad * ctx.saved_tensors[0] ** 2


@pytest.mark.parametrize("depth", [1, 3])
def test_an_operation_without_a_second_derivative_is_found_wherever_it_is(depth):
    x = random(2, 3)
    y = OnceOnly.apply(x)
    for _ in range(depth):
        y = (y.sin() + x) * x.exp()
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"a test differentiates .*no second derivative.*, or do not"):
        check_second_derivative(first, "a test", "do not")
    check_second_derivative(torch.autograd.grad((x**3).sin().sum(), x, create_graph=True)[0])


@pytest.mark.parametrize(
    "call", [lambda x, w: F.conv2d(x, w), lambda x, w: F.linear(x[:, :, 0, 0], w[:, :, 0, 0])]
)
def test_types_that_do_not_go_together_are_told_by_pytorch(call):
    with fast_double_backward(), pytest.raises(RuntimeError, match=r"type|dtype") as found:
        call(random(2, 3, 4, 4), random(4, 3, 1, 1, dtype=torch.float32))
    with pytest.raises(RuntimeError) as expected:
        call(random(2, 3, 4, 4), random(4, 3, 1, 1, dtype=torch.float32))
    assert str(found.value) == str(expected.value)
