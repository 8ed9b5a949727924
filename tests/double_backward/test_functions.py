"""The fast double backward is PyTorch's own, faster: values, first and second derivatives of each operator."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from salnb.double_backward import fast_double_backward
from tests.helpers import double_backward
from tests.helpers.double_backward import Calls, agree, aten, check, same, second_order
from tests.helpers.tolerances import NONDETERMINISM, assert_close


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["convolution", "batch norm", "batch norm with float32 weights"])
def test_as_near_to_double_precision_as_plain_pytorch(name, dtype):
    """Rounding is different, not larger: in single and half precision, and where the two are mixed."""
    shape = (16, 3, 3, 3) if name == "convolution" else (8,)
    other = torch.float32 if "float32" in name else dtype
    inputs = [
        double_backward.random(4, *(shape[1:2] or shape), 9, 9, dtype=dtype),
        double_backward.random(*shape, dtype=other),
    ]

    def function(x, w):
        return F.conv2d(x, w) if name == "convolution" else F.batch_norm(x, None, None, w, None, True)

    exact = second_order(function, [t.detach().double().requires_grad_() for t in inputs])
    plain = second_order(function, inputs)
    with fast_double_backward():
        fast = second_order(function, inputs)
    for f, p, e in zip(fast, plain, exact, strict=True):
        assert f.dtype == p.dtype
        assert (f - e).norm() <= 1.5 * (p - e).norm() + torch.finfo(dtype).eps * e.norm()


CONVOLUTIONS = {
    "plain": {},
    "padded": {"padding": 1},
    "padded tuple": {"padding": (2, 1)},
    "list of one": {"padding": [1], "stride": [2]},
    "strided": {"stride": 2, "padding": 1},
    "strided past the end": {"stride": (2, 3)},
    "dilated": {"dilation": (1, 2), "padding": 2},
    "grouped": {"groups": 2, "padding": 1},
    "depthwise": {"groups": 4, "padding": 1, "stride": 2},
    "same": {"padding": "same"},
    "same, kernel of two": {"padding": "same", "kernel": (2, 2)},
    "same, even kernel": {"padding": "same", "kernel": (2, 4)},
    "same, even and odd kernel": {"padding": "same", "kernel": (3, 2)},
    "same, dilated": {"padding": "same", "dilation": 2, "kernel": (2, 3)},
    "valid": {"padding": "valid"},
    "pointwise": {"kernel": (1, 1)},
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # PyTorch's own
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolution(options, bias, random):
    options = dict(options)
    kernel = options.pop("kernel", (3, 3))
    groups = options.get("groups", 1)
    inputs = random(3, 4, 7, 8), random(8, 4 // groups, *kernel), random(8) if bias else None
    check(lambda x, w, b: F.conv2d(x, w, b, **options), inputs)


BATCH_NORMS = {
    "training": {"training": True},
    "training, no statistics": {"training": True, "statistics": False},
    "training, large eps, own momentum": {"training": True, "eps": 0.5, "momentum": 0.7},
    "evaluation": {"training": False},
}


@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 5, 2)], ids=["vectors", "images"])
@pytest.mark.parametrize("affine", ["weight and bias", "weight", "neither"])
@pytest.mark.parametrize("options", BATCH_NORMS.values(), ids=BATCH_NORMS)
def test_batch_norm(options, affine, shape, random, device):
    options = dict(options)
    mean, var = torch.randn(3).double().to(device), torch.rand(3).double().to(device) + 0.5
    left = []  # the running statistics that each run leaves behind

    def function(x, w, b):
        statistics = (mean.clone(), var.clone()) if options.get("statistics", True) else (None, None)
        left.append(statistics)
        given = {k: v for k, v in options.items() if k != "statistics"}
        return F.batch_norm(2 * x + 5, *statistics, w, b, **given)

    weight = None if affine == "neither" else random(3)
    check(function, (random(*shape), weight, random(3) if affine == "weight and bias" else None))
    for plain, fast in zip(*left, strict=True):
        assert plain is fast is None or same(plain, fast)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("weighted", [True, False], ids=["weight", "no weight"])
def test_batch_norm_gives_its_kernel_what_it_wants_on_a_gpu(weighted, training, random, device):
    """That of CUDA makes sums only beside a weight, and needs the statistics of the batch, if empty ones."""
    running = torch.randn(3).double().to(device), torch.rand(3).double().to(device) + 0.5
    inputs = random(4, 3, 5, 2), random(3) if weighted else None
    with Calls() as calls, fast_double_backward():
        second_order(lambda x, w: F.batch_norm(x, *running, w, None, training), inputs)
    made = calls.arguments(aten.native_batch_norm_backward.default)
    assert len(made) == 3
    for _, _, w, _, _, mean, spread, _, _, (_, *sums) in made:
        assert isinstance(mean, torch.Tensor)
        assert isinstance(spread, torch.Tensor)
        assert w is not None or not any(sums)


def test_batch_norm_with_a_weight_of_zero(random, device):
    """Residual networks start there: nothing may be divided by the weight."""
    check(
        lambda x, w: F.batch_norm(x, None, None, w, None, True),
        (random(4, 3, 5, 5), torch.zeros(3, device=device).double().requires_grad_()),
    )


FUNCTIONS = {
    "linear": (F.linear, (5, 3), (4, 3)),
    "convolution": (lambda x, w: F.conv2d(x, w, padding=1), (2, 3, 4, 4), (4, 3, 3, 3)),
    "batch norm": (lambda x, w: F.batch_norm(x, None, None, w, None, True), (3, 3, 2, 2), (3,)),
    "batch norm of vectors": (lambda x, w: F.batch_norm(x, None, None, w, None, True), (5, 3), (3,)),
    "relu": (lambda x, w: F.relu(x * w) * x, (2, 3, 4, 4), (3, 1, 1)),
    "max pooling": (lambda x, w: F.max_pool2d(x * w, 2) ** 2, (2, 3, 4, 4), (3, 1, 1)),
    "average pooling": (lambda x, w: F.avg_pool2d(x * w, 2) ** 2, (2, 3, 4, 4), (3, 1, 1)),
    "concatenation": (lambda x, w: torch.cat([x * w, w.expand_as(x), x], 1) ** 3, (2, 3, 4, 4), (3, 1, 1)),
}


@pytest.mark.parametrize(
    "needs", [(True, True), (True, False), (False, True)], ids=["both", "input", "weight"]
)
@pytest.mark.parametrize(("function", "shape", "weight"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_finite_differences(function, shape, weight, needs, random, device):
    inputs = random(*shape, grad=needs[0]), random(*weight, grad=needs[1])
    with fast_double_backward():
        assert gradcheck(function, inputs, nondet_tol=NONDETERMINISM[device.type])
        assert gradgradcheck(function, inputs, nondet_tol=NONDETERMINISM[device.type])


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("name", ["convolution", "linear", "batch norm"])
def test_second_derivatives_of_some_first_derivatives(name, wanted, random):
    """Each first derivative on its own, differentiated by everything: no term hides behind another."""
    if name == "convolution":
        function, inputs = F.conv2d, (random(2, 3, 5, 5), random(4, 3, 3, 3), random(4))
    elif name == "linear":
        function, inputs = F.linear, (random(6, 3), random(4, 3), random(4))
    else:
        function = lambda x, w, b: F.batch_norm(x, None, None, w, b, True)  # noqa: E731
        inputs = random(4, 3, 5, 5), random(3), random(3)

    def derivatives():
        first = torch.autograd.grad(
            function(*inputs).sin().sum(), [inputs[i] for i in wanted], create_graph=True
        )
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    expected = derivatives()
    with fast_double_backward():
        actual = derivatives()
    agree(actual, expected)


POOLS = {
    "square": {"kernel_size": 2},
    "overlapping": {"kernel_size": 3, "stride": 2, "padding": 1},
    "list of one": {"kernel_size": [2], "stride": [1]},
    "dilated, rounded up": {"kernel_size": (2, 3), "dilation": (2, 1), "ceil_mode": True},
}


@pytest.mark.parametrize("options", POOLS.values(), ids=POOLS)
def test_max_pooling(options, random):
    check(lambda x: F.max_pool2d(x.sin(), **options), (random(2, 3, 7, 8),))


AVERAGES = {
    "square": {"kernel_size": 2},
    "overlapping": {"kernel_size": 3, "stride": 2, "padding": 1},
    "without the rim": {"kernel_size": 3, "stride": 2, "padding": 1, "count_include_pad": False},
    "rounded up": {"kernel_size": (2, 3), "stride": [2], "ceil_mode": True},
    "another divisor": {"kernel_size": 2, "divisor_override": 3},
}


@pytest.mark.parametrize("options", AVERAGES.values(), ids=AVERAGES)
def test_average_pooling(options, random):
    check(lambda x: F.avg_pool2d(x.sin(), **options), (random(2, 3, 7, 8),))
    x = random(2, 3, 7, 8)
    with fast_double_backward():
        assert type(F.avg_pool2d(x, **options).grad_fn).__name__ == "AvgPool2dBackward"


def test_max_pooling_with_defaults(random):
    """Windows side by side, and none that reaches beyond the rim."""
    check(lambda x: torch.max_pool2d(x.sin(), 3), (random(2, 3, 7, 8),))


def test_the_gradients_of_what_is_concatenated_may_change_in_place(random):
    x = random(2, 3)
    with fast_double_backward():
        parts = [x * 1, x.sin()]
        for part in parts:
            part.register_hook(lambda gradient: gradient.mul_(2))
        y = torch.cat(parts).square().sum()
    (gradient,) = torch.autograd.grad(y, x, create_graph=True)
    assert_close(gradient, 2 * (2 * x + (2 * x).sin()))  # of x² + sin²(x), twice


@pytest.mark.parametrize("dim", [0, 1, -1], ids=str)
def test_concatenation(dim, random):
    sizes = [3, 3, 3]
    others = []
    for size in (1, 4):
        sizes[dim] = size
        others.append(random(*sizes))
    check(lambda x, *y: torch.cat([x, *y], dim=dim) ** 2, (random(3, 3, 3), *others))


RELUS = {
    "module": nn.ReLU(),
    "module in place": nn.ReLU(inplace=True),
    "F.relu": F.relu,
    "F.relu in place": lambda x: F.relu(x, inplace=True),
    "torch.relu": torch.relu,
    "torch.relu_": torch.relu_,
    "method": lambda x: x.relu(),
    "method in place": lambda x: x.relu_(),
    "in place on a view": lambda x: x.view(-1).relu_().view(x.shape),
}


@pytest.mark.parametrize("relu", RELUS.values(), ids=RELUS)
def test_relu(relu, random):
    changed = []

    def function(x):
        x = x**3
        y = relu(x)
        changed.append(x.detach().clone())
        return y * x

    check(lambda x: function(x).sum(), (random(2, 3, 4, 4),))
    assert torch.equal(*changed)  # an in-place ReLU still changes its input, the others do not


@pytest.mark.parametrize(
    "function", [F.relu, partial(F.max_pool2d, kernel_size=2)], ids=["relu", "max pooling"]
)
def test_a_gradient_that_depends_on_the_input_by_steps_has_no_graph_to_it(function, random):
    """Zeros would be handed to the input otherwise, and added to what it gets."""
    x = random(2, 3, 4, 4)
    with fast_double_backward():
        y = function(x)
    (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert not gradient.requires_grad


@pytest.mark.parametrize("inplace", [False, True], ids=["new", "in-place"])
def test_hardsigmoid(inplace, random):
    """PyTorch has no second derivative of it; clamp has."""
    x = (4 * random(2, 3, 4, 4, grad=False)).requires_grad_()

    def reference(x):
        return (x + 3).clamp(0, 6) / 6

    def ours(x):
        x = x.clone()
        with fast_double_backward():
            y = F.hardsigmoid(x, inplace)
        assert torch.equal(x, y) == inplace
        return y

    for a, e in zip(second_order(ours, [x]), second_order(reference, [x]), strict=True):
        assert_close(a, e)


@pytest.mark.parametrize(
    ("calls", "operator"),
    [
        (lambda x: nn.Conv2d(3, 3, 1)(x), aten.convolution.default),
        (lambda x: nn.BatchNorm2d(3)(x), aten._native_batch_norm_legit.default),
        (lambda x: torch.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, True),
         aten._native_batch_norm_legit.no_stats),
        (lambda x: nn.MaxPool2d(2)(x), aten.max_pool2d_with_indices.default),
        (lambda x: torch.max_pool2d(x, 2), aten.max_pool2d_with_indices.default),
    ],
    ids=["convolution", "batch norm", "torch.batch_norm", "max pooling", "torch.max_pool2d"],
)  # fmt: skip
def test_every_spelling_is_caught(calls, operator):
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    with fast_double_backward():
        y = calls(x)
    assert "salnb" in type(y.grad_fn)._forward_cls.__module__
    with Calls() as recorded, fast_double_backward():
        calls(x)
    assert len(recorded.arguments(operator)) == 1
