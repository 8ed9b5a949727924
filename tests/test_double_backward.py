"""The fast double backward is PyTorch's own, faster: values, first and second derivatives, side effects."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from salnb.double_backward import fast_double_backward
from tests.tolerances import assert_close

aten = torch.ops.aten


class Calls(TorchDispatchMode):
    """Records the operators that reach the dispatcher, with their arguments."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append((func, args))
        return func(*args, **(kwargs or {}))

    def arguments(self, operator):
        return [args for func, args in self.seen if func is operator]


def random(*shape, dtype=torch.float64, grad=True):
    return torch.randn(*shape, dtype=dtype).requires_grad_(grad)


def second_order(function, inputs):
    """Value, first and second derivatives of a nonlinear functional of ``function(*inputs)``."""
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    y = function(*inputs)
    first = torch.autograd.grad(y.sin().sum(), wanted, create_graph=True)
    penalty = sum((g * g.detach().cos() + g.square()).sum() for g in first)
    second = torch.autograd.grad(penalty, wanted)
    return y, *first, *second


def agree(actual, expected, tolerance=None):
    """The tensors are equal up to the tolerance, those that are zero but for rounding only zero as well."""
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        zero = 100 * torch.finfo(e.dtype).eps
        if e.abs().max() > zero:
            assert_close(a, e, tolerance)
        else:
            assert a.abs().max() <= zero


def check(function, inputs):
    """Plain and fast agree in everything ``second_order`` returns."""
    expected = second_order(function, inputs)
    with fast_double_backward():
        actual = second_order(function, inputs)
    agree(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["convolution", "batch norm", "batch norm with float32 weights"])
def test_as_near_to_double_precision_as_plain_pytorch(name, dtype):
    """Rounding is different, not larger: in single and half precision, and where the two are mixed."""
    shape = (16, 3, 3, 3) if name == "convolution" else (8,)
    other = torch.float32 if "float32" in name else dtype
    inputs = random(4, *(shape[1:2] or shape), 9, 9, dtype=dtype), random(*shape, dtype=other)

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
    "same, even kernel": {"padding": "same", "kernel": (2, 4)},
    "same, dilated": {"padding": "same", "dilation": 2, "kernel": (2, 3)},
    "valid": {"padding": "valid"},
    "pointwise": {"kernel": (1, 1)},
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # PyTorch's own
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolution(options, bias):
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
def test_batch_norm(options, affine, shape):
    options = dict(options)
    mean, var = torch.randn(3).double(), torch.rand(3).double() + 0.5
    left = []  # the running statistics that each run leaves behind

    def function(x, w, b):
        statistics = (mean.clone(), var.clone()) if options.get("statistics", True) else (None, None)
        left.append(statistics)
        given = {k: v for k, v in options.items() if k != "statistics"}
        return F.batch_norm(2 * x + 5, *statistics, w, b, **given)

    weight = None if affine == "neither" else random(3)
    check(function, (random(*shape), weight, random(3) if affine == "weight and bias" else None))
    for plain, fast in zip(*left, strict=True):
        assert plain is fast is None or torch.equal(plain, fast)


def test_batch_norm_with_a_weight_of_zero():
    """Residual networks start there: nothing may be divided by the weight."""
    check(
        lambda x, w: F.batch_norm(x, None, None, w, None, True),
        (random(4, 3, 5, 5), torch.zeros(3).double().requires_grad_()),
    )


FUNCTIONS = {
    "linear": (F.linear, (5, 3), (4, 3)),
    "convolution": (lambda x, w: F.conv2d(x, w, padding=1), (2, 3, 4, 4), (4, 3, 3, 3)),
    "batch norm": (lambda x, w: F.batch_norm(x, None, None, w, None, True), (3, 3, 2, 2), (3,)),
    "batch norm of vectors": (lambda x, w: F.batch_norm(x, None, None, w, None, True), (5, 3), (3,)),
    "relu": (lambda x, w: F.relu(x * w) * x, (2, 3, 4, 4), (3, 1, 1)),
    "max pooling": (lambda x, w: F.max_pool2d(x * w, 2) ** 2, (2, 3, 4, 4), (3, 1, 1)),
    "concatenation": (lambda x, w: torch.cat([x * w, w.expand_as(x), x], 1) ** 3, (2, 3, 4, 4), (3, 1, 1)),
}


@pytest.mark.parametrize(
    "needs", [(True, True), (True, False), (False, True)], ids=["both", "input", "weight"]
)
@pytest.mark.parametrize(("function", "shape", "weight"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_finite_differences(function, shape, weight, needs):
    inputs = random(*shape, grad=needs[0]), random(*weight, grad=needs[1])
    with fast_double_backward():
        assert gradcheck(function, inputs)
        assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("name", ["convolution", "linear", "batch norm"])
def test_second_derivatives_of_some_first_derivatives(name, wanted):
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
def test_max_pooling(options):
    check(lambda x: F.max_pool2d(x.sin(), **options), (random(2, 3, 7, 8),))


@pytest.mark.parametrize("dim", [0, 1, -1], ids=str)
def test_concatenation(dim):
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
def test_relu(relu):
    changed = []

    def function(x):
        x = x**3
        y = relu(x)
        changed.append(x.detach().clone())
        return y * x

    check(lambda x: function(x).sum(), (random(2, 3, 4, 4),))
    assert torch.equal(*changed)  # an in-place ReLU still changes its input, the others do not


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


# ---------------------------------------------------------------------------------------------------------
# Whole networks


class Residual(nn.Module):
    """A bit of everything: strides, groups, a residual sum, concatenation, ReLU in place, pooling."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.deep = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding="same", groups=2),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, 1),
        )
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.last = nn.BatchNorm2d(16, affine=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.pool(F.relu(self.norm(self.stem(x))))
        x = torch.cat([x, torch.relu(x + self.deep(x))], 1)
        x = F.avg_pool2d(F.silu(self.last(x)), 2)
        return self.head(x.mean((2, 3)))


def saliency_step(model, images, target, context=contextlib.nullcontext):
    """Logits, and the gradient of cross-entropy and saliency loss with respect to the parameters."""
    parameters = list(model.parameters())
    images = images.detach().requires_grad_()
    with context():
        logits = model(images)
        score = logits.gather(1, target[:, None]).sum()
        (gradient,) = torch.autograd.grad(score, images, create_graph=True)
        a, b = gradient.abs().amax(1).div(gradient.abs().amax((1, 2, 3)).view(-1, 1, 1)).chunk(2)
        loss = F.cross_entropy(logits, target) + (a - b).square().mean()
    return logits, gradient, *torch.autograd.grad(loss, parameters)


def batch(dtype=torch.float64):
    return torch.randn(6, 3, 16, 16).to(dtype), torch.randint(0, 5, (6,))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_network(dtype, training, device):
    model = Residual().to(device, dtype).train(training)
    other = copy.deepcopy(model)
    images, target = (t.to(device) for t in batch(dtype))
    expected = saliency_step(model, images, target)
    actual = saliency_step(other, images, target, fast_double_backward)
    agree(actual, expected, 5e-6 if dtype is torch.float32 else None)  # twelve layers of float32 rounding
    for a, e in zip(other.buffers(), model.buffers(), strict=True):
        assert torch.equal(a, e)


def test_the_gradient_against_finite_differences():
    """The oracle that shares no code: perturb each parameter of a network in training."""
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3), nn.Softplus(), nn.Flatten(), nn.Linear(12, 2)
    ).double()  # fmt: skip
    images, names = random(4, 2, 4, 4), [n for n, _ in model.named_parameters()]

    def loss(*values):
        with fast_double_backward():
            score = (
                torch.func.functional_call(model, dict(zip(names, values, strict=True)), images)
                .square()
                .sum()
            )
            return torch.autograd.grad(score, images, create_graph=True)[0].square().sum()

    assert gradcheck(loss, tuple(model.parameters()))


def test_channels_last_is_kept():
    model = Residual().to(memory_format=torch.channels_last)
    images, target = batch(torch.float32)
    images = images.contiguous(memory_format=torch.channels_last)
    expected = saliency_step(copy.deepcopy(model), images, target)
    with fast_double_backward():
        features = model.norm(model.stem(images))
    assert features.is_contiguous(memory_format=torch.channels_last)
    actual = saliency_step(model, images, target, fast_double_backward)
    agree(actual, expected, 5e-6)


def test_autocast():
    """Convolutions run in bfloat16 where autocast runs them so, in both backwards too."""
    model = Residual()
    images, target = batch(torch.float32)

    @contextlib.contextmanager
    def fast():
        with torch.autocast("cpu", torch.bfloat16), fast_double_backward():
            yield

    expected = saliency_step(
        copy.deepcopy(model), images, target, lambda: torch.autocast("cpu", torch.bfloat16)
    )
    with Calls() as calls:
        actual = saliency_step(copy.deepcopy(model), images, target, fast)
    exact = saliency_step(model, images, target)
    for a, e, x in zip(actual, expected, exact, strict=True):
        assert a.dtype == e.dtype
        if x.abs().max() > 1e-5:  # as near to the float32 result as plain autocast is
            assert (a - x).norm() <= 1.5 * (e - x).norm() + 2e-2 * x.norm()
    for operator in (aten.convolution.default, aten.convolution_backward.default):
        assert {args[0].dtype for args in calls.arguments(operator)} == {torch.bfloat16}


@pytest.mark.parametrize("tracing_mode", ["real", "fake"])
def test_make_fx_traces_the_whole_step(tracing_mode):
    """The compiled path: one graph of forward, inner gradient, losses and parameter gradients."""
    model = Residual().double()
    images, target = batch()
    names = [n for n, _ in model.named_parameters()]
    buffers = {n: b.clone() for n, b in model.named_buffers()}

    def step(parameters, buffers, images, target):
        images = images.detach().requires_grad_()
        values = dict(zip(names, parameters, strict=True)) | buffers
        with fast_double_backward():
            logits = torch.func.functional_call(model, values, images)
            score = logits.gather(1, target[:, None]).sum()
            (gradient,) = torch.autograd.grad(score, images, create_graph=True)
            loss = F.cross_entropy(logits, target) + gradient.square().mean()
        return torch.autograd.grad(loss, parameters)

    parameters = [p.detach().clone().requires_grad_() for p in model.parameters()]
    fresh = lambda: {n: b.clone() for n, b in buffers.items()}  # noqa: E731
    graph = make_fx(step, tracing_mode=tracing_mode)(parameters, fresh(), images, target)
    other = torch.randn_like(images)
    for given in (images, other):
        used, left = fresh(), fresh()
        expected = step(parameters, left, given, target)
        agree(graph(parameters, used, given, target), expected)
        for name, value in left.items():
            assert torch.equal(used[name], value)

    # PyTorch's own double backward convolves with kernels as large as the feature map
    with Calls() as calls:
        graph(parameters, fresh(), images, target)
    assert {tuple(args[1].shape[2:]) for args in calls.arguments(aten.convolution.default)} == {
        (3, 3),
        (1, 1),
    }


# ---------------------------------------------------------------------------------------------------------
# What it costs, what it refuses, what it leaves alone


def test_the_inner_gradient_computes_no_weight_gradients():
    """With respect to the images only, the weights' gradients would cost as much again for nothing."""
    model, (images, target) = Residual().double(), batch()
    with fast_double_backward():
        score = model(images.requires_grad_()).gather(1, target[:, None]).sum()
        with Calls() as recorded:
            torch.autograd.grad(score, images, create_graph=True)
    masks = recorded.arguments(aten.convolution_backward.default)
    assert len(masks) == 3
    assert not any(args[-1][1] for args in masks)


def test_each_second_weight_gradient_is_one_ordinary_weight_gradient():
    model, (images, target) = Residual().double(), batch()
    with Calls() as recorded:
        saliency_step(model, images, target, fast_double_backward)
    backward = recorded.arguments(aten.convolution_backward.default)
    assert sum(args[-1][1] for args in backward) == 2 * 3  # of the class path and of the saliency path
    assert sum(args[-1][0] for args in backward) == 2 * 3 - 1  # the images need no gradient of the loss
    kernels = {tuple(args[1].shape[2:]) for args in recorded.arguments(aten.convolution.default)}
    assert kernels == {(3, 3), (1, 1)}


def test_no_gradients_are_computed_for_frozen_parameters():
    model, (images, target) = Residual().double().requires_grad_(False), batch()
    model.head.requires_grad_(True)
    images.requires_grad_()
    with Calls() as recorded:
        with fast_double_backward():
            score = model(images).gather(1, target[:, None]).sum()
        (gradient,) = torch.autograd.grad(score, images, create_graph=True)
        gradient.square().sum().backward()
    assert not any(args[-1][1] for args in recorded.arguments(aten.convolution_backward.default))
    assert model.head.weight.grad is not None


THIRD = {
    "linear": lambda x, w: F.linear(x.flatten(1), w.flatten(1).repeat(1, 16)) ** 4,
    "convolution": lambda x, w: F.conv2d(x, w) ** 4,
    "batch norm": lambda x, w: F.batch_norm(F.conv2d(x, w), None, None, training=True) ** 4,
    "batch norm, evaluation": lambda x, w: F.batch_norm(x * w.mean(), x.new_zeros(3), x.new_ones(3)) ** 4,
    "relu": lambda x, w: F.relu(x * w.mean()) ** 4,
    "max pooling": lambda x, w: F.max_pool2d(x * w.mean(), 2) ** 4,
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
        (lambda x: F.max_pool2d(x, 2, return_indices=True)[0], (random(2, 3, 4, 4),)),
        (lambda x, y: torch.cat([x, y]), (random(2, 3), random(2, 3, dtype=torch.float32))),
        (lambda x: torch.cat([x, x.new_zeros(0)], axis=1), (random(2, 3),)),
    ],
    ids=["conv1d", "conv3d", "unbatched", "sequences", "transposed", "instance norm", "3-d batch norm",
         "unbatched pooling", "pooling with indices", "mixed types", "empty"],
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


def test_a_graph_can_be_differentiated_twice_and_accumulated():
    model, (images, target) = Residual().double(), batch()
    expected = saliency_step(copy.deepcopy(model).eval(), images, target)
    model.eval()
    images.requires_grad_()
    with fast_double_backward():
        logits = model(images)
        (gradient,) = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), images, create_graph=True)
    assert_close(gradient, expected[1])
    loss = gradient.square().sum()
    once = torch.autograd.grad(loss, model.stem.weight, retain_graph=True)[0]
    assert torch.equal(once, torch.autograd.grad(loss, model.stem.weight)[0])
