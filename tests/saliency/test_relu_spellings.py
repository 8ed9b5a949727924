"""Every spelling of a ReLU follows its rule; those that no rule reaches are named."""

import contextlib
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from salnb import saliency
from salnb.saliency.recording import ForwardRecorder
from salnb.saliency.relu_rules import ReLURule
from tests.helpers.finite_differences import assert_gradient
from tests.helpers.methods import WITH_RULE
from tests.helpers.tolerances import assert_close

zeros = torch.zeros_like
aten = torch.ops.aten
INF = float("inf")


def setitem(x):
    x[x < 0] = 0
    return x


def times_in_place(x):
    x *= x > 0
    return x


def mask_times_in_place(x):
    mask = (x > 0).to(x.dtype)
    mask *= x
    return mask


def mask_turned(x):
    mask = x > 0
    mask.logical_not_()
    return x * mask


def mask_of_inference(x):
    with torch.inference_mode():
        mask = x > 0
    return x * 1 if mask.any() else x


def half_in_place(x):
    x[:, 2:].relu_()
    return torch.cat([x[:, :2].relu(), x[:, 2:]], 1)


# name: (what is called on a tensor that may be overwritten, the upper bound)
SPELLINGS = {
    "nn.ReLU": (nn.ReLU(), INF),
    "nn.ReLU(inplace)": (nn.ReLU(inplace=True), INF),
    "F.relu": (F.relu, INF),
    "F.relu(inplace)": (lambda x: F.relu(x, inplace=True), INF),
    "F.relu_": (F.relu_, INF),
    "torch.relu": (torch.relu, INF),
    "torch.relu_": (torch.relu_, INF),
    "Tensor.relu": (lambda x: x.relu(), INF),
    "Tensor.relu_": (lambda x: x.relu_(), INF),
    "relu=": (lambda x: F.relu(input=x), INF),
    "nn.ReLU6": (nn.ReLU6(), 6),
    "F.relu6(inplace)": (lambda x: F.relu6(x, True), 6),
    "F.hardtanh": (lambda x: F.hardtanh(x, 0, 6), 6),
    "F.hardtanh_": (lambda x: F.hardtanh_(x, 0, 2), 2),
    "nn.Hardtanh": (nn.Hardtanh(0, INF), INF),
    "nn.Threshold": (nn.Threshold(0, 0), INF),
    "F.threshold(inplace)": (lambda x: F.threshold(x, 0, 0, True), INF),
    "torch.threshold": (lambda x: torch.threshold(x, 0, 0), INF),
    "F.threshold_": (lambda x: F.threshold_(x, 0.0, 0.0), INF),
    "clamp(min)": (lambda x: x.clamp(min=0), INF),
    "clamp(0)": (lambda x: torch.clamp(x, 0.0), INF),
    "clamp(0, 6)": (lambda x: x.clamp(0, 6), 6),
    "clamp_": (lambda x: x.clamp_(min=0), INF),
    "clamp(tensor)": (lambda x: x.clamp(min=torch.zeros(())), INF),
    "clip": (lambda x: torch.clip(x, 0), INF),
    "clip_": (lambda x: x.clip_(min=0), INF),
    "clamp_min": (lambda x: x.clamp_min(0), INF),
    "clamp_min_": (lambda x: torch.clamp_min_(x, 0), INF),
    "clamp_min(tensor)": (lambda x: torch.clamp_min(x, zeros(x)), INF),
    "maximum": (lambda x: torch.maximum(x, zeros(x)), INF),
    "maximum(0, x)": (lambda x: torch.maximum(torch.zeros(()), x), INF),
    "fmax": (lambda x: x.fmax(torch.zeros(())), INF),
    "torch.max": (lambda x: torch.max(x, torch.zeros(())), INF),
    "Tensor.max": (lambda x: zeros(x).max(x), INF),
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.0), INF),
    "nn.LeakyReLU(inplace)": (nn.LeakyReLU(0, inplace=True), INF),
    "rrelu": (lambda x: F.rrelu(x, 0.0, 0.0), INF),
    "elu": (lambda x: F.elu(x, 0.0), INF),
    "prelu": (lambda x: F.prelu(x, torch.zeros(1, dtype=x.dtype)), INF),
    "where": (lambda x: torch.where(x > 0, x, 0.0), INF),
    "where(x >= 0)": (lambda x: torch.where(x >= 0, x, zeros(x)), INF),
    "where(x < 0)": (lambda x: torch.where(x < 0, zeros(x), x), INF),
    "where(not)": (lambda x: torch.where(~(x <= 0), x, 0), INF),
    "where(0 < x)": (lambda x: torch.where(torch.lt(zeros(x), x), x, 0), INF),
    "Tensor.where": (lambda x: x.where(x.gt(0), 0), INF),
    "x * (x > 0)": (lambda x: x * (x > 0), INF),
    "(x > 0) * x": (lambda x: (x > 0) * x, INF),
    "x * mask.float": (lambda x: torch.mul(x, (x.detach() > 0).to(x.dtype)), INF),
    "mask.clone": (lambda x: x * (x > 0).clone().contiguous(), INF),
    "mask.reshape": (lambda x: x * (x > 0).reshape(x.shape).view(x.shape).double(), INF),
    "mask.view_as": (lambda x: x * (x > 0).view_as(x).expand_as(x).reshape_as(x), INF),
    "x *= x > 0": (times_in_place, INF),
    "mul_": (lambda x: x.mul_(torch.gt(x, other=0).type_as(x)), INF),
    "mask *= x": (mask_times_in_place, INF),
    "mask.mul_(x)": (lambda x: (x > 0).type_as(x).mul_(x), INF),
    "mask.multiply_(x)": (lambda x: (x > 0).type_as(x).multiply_(other=x), INF),
    "masked_fill": (lambda x: x.masked_fill(x < 0, 0), INF),
    "masked_fill_": (lambda x: x.masked_fill_(torch.le(x, 0), 0.0), INF),
    "x[x < 0] = 0": (setitem, INF),
    "aten.relu": (aten.relu, INF),
    "aten.relu.default": (aten.relu.default, INF),
    "aten.relu_.default": (aten.relu_.default, INF),
    "aten.clamp.default": (lambda x: aten.clamp.default(x, 0), INF),
    "aten.hardtanh.default": (lambda x: aten.hardtanh.default(self=x, min_val=0, max_val=6), 6),
    "view": (lambda x: x.view(len(x), -1).relu_().view_as(x), INF),
    "part": (lambda x: torch.cat([x[:, :2].clone().relu_(), x[:, 2:].relu()], 1), INF),
    "half in place": (half_in_place, INF),
}  # fmt: skip

# what looks like a ReLU and is none
OTHERS = {
    "nn.LeakyReLU": nn.LeakyReLU(0.1),
    "clamp(min=-1)": lambda x: x.clamp(min=-1),
    "clamp(max)": lambda x: x.clamp(max=0.1),
    "hardtanh": F.hardtanh,
    "maximum": lambda x: torch.maximum(x, torch.full((), -0.1, dtype=x.dtype)),
    "elu": F.elu,
    "where": lambda x: torch.where(x > 0.1, x, 0),
    "where else": lambda x: torch.where(x > 0, x, x * 0.1),
    "mask": lambda x: x * torch.ones_like(x),
    "mask of another": lambda x: x * (x - 0.1 > 0),
    "mask turned": mask_turned,
    "mask of inference": mask_of_inference,
    "masked_fill": lambda x: x.masked_fill(x > 0.5, 0),
    "dimension": lambda x: x.max(1, keepdim=True).values + x,
    "dimension 0": lambda x: torch.max(x, 0).values + x,
    "prelu": nn.PReLU(init=0.1).double(),
}


class Rectified(nn.Module):
    """Two convolutions, each rectified; the first in a form that may be overwritten."""

    def __init__(self, relu):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)
        self.relu = relu
        self.double().eval()

    def forward(self, x):
        for convolution in (self.first, self.second):
            x = self.relu(convolution(x) * 1)  # a multiplication does not need its result
        return self.head(x.mean((2, 3)))


def slow_map(model, x, target, rule, upper):
    """eq. 3 and 4 by hand, without autograd."""
    activations, signal = [], x
    for convolution in (model.first, model.second):
        signal = F.conv2d(signal, convolution.weight, convolution.bias, padding=1).clamp(0, upper)
        activations.append(signal)
    area = signal.shape[-2] * signal.shape[-1]
    back = model.head.weight[target][None, :, None, None].expand_as(signal) / area
    for convolution, activation in ((model.second, activations[1]), (model.first, activations[0])):
        if rule != "deconvnet":
            back = back * ((activation > 0) & (activation < upper))
        if rule != "vanilla_gradient":
            back = back * (back > 0)
        back = F.conv_transpose2d(back, convolution.weight, padding=1)
    return back.detach()


def images():
    return torch.rand(2, 3, 6, 6, dtype=torch.float64)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("method", ["vanilla_gradient", "deconvnet", "guided_backprop"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_each_spelling_follows_the_definition(spelling, method):
    relu, upper = SPELLINGS[spelling]
    model, x = Rectified(relu), images() * 5
    found = saliency.METHODS[method](model, x, 1, reduce=None)
    assert_close(found, slow_map(model, x, 1, method, upper))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_each_spelling_keeps_its_values_and_derivatives(spelling):
    """Without a rule nothing has changed, not even at zero and at the upper bound."""
    relu, upper = SPELLINGS[spelling]
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    x[:, :, 0] = 0
    x[:, :, 1] = min(upper, 6)
    weights = torch.randn_like(x)

    def run(*contexts):
        leaf = x.clone().requires_grad_()
        with torch.enable_grad(), contexts[0] if contexts else torch.enable_grad():
            out = relu(leaf * 1)
        (gradient,) = torch.autograd.grad((out * weights).sum(), leaf)
        return out.detach(), gradient

    rule = ReLURule("guided_backprop")
    for found, expected in zip(run(rule), run(), strict=True):
        assert torch.equal(found, expected)
    assert rule.relu_count > 0


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_at_zero_a_rule_lets_nothing_pass(spelling):
    """Whatever PyTorch takes for the derivative there: eq. 4 asks for inputs above zero."""
    leaf, rule = torch.zeros(2, 4, 6, 6, dtype=torch.float64, requires_grad=True), ReLURule("guided_backprop")
    with rule:
        out = SPELLINGS[spelling][0](leaf * 1)
    with rule.active():
        (gradient,) = torch.autograd.grad(out.sum(), leaf)
    assert not gradient.any()


@pytest.mark.parametrize("spelling", ["clamp(min)", "maximum", "x * (x > 0)", "where", "half in place"])
@pytest.mark.parametrize("method", WITH_RULE)
def test_second_derivatives_of_spellings(spelling, method):
    model, x, pattern = Rectified(SPELLINGS[spelling][0]), images(), torch.randn(2, 1, 6, 6).double()

    def loss():
        return (saliency.METHODS[method](model, x, 1, create_graph=True) * pattern).sum()

    assert assert_gradient(loss, [model.first.weight, model.second.weight]) > 1e-4


@pytest.mark.parametrize("method", WITH_RULE)
@pytest.mark.parametrize("other", OTHERS)
def test_what_is_no_relu_is_left_alone(other, method):
    model, x = Rectified(OTHERS[other]), images()
    with pytest.warns(UserWarning, match="no ReLU was met"):
        found = saliency.METHODS[method](model, x, 1)
    plain = saliency.vanilla_gradient(model, x, 1)
    assert_close(found, plain * saliency.grad_cam(model, x, 1) if "cam" in method else plain)


@pytest.mark.parametrize("method", WITH_RULE)
@pytest.mark.parametrize(
    "act", [torch.relu, lambda x: (x > 0).type_as(x).mul_(x), mask_times_in_place], ids=["relu", "mul_", "*="]
)
def test_rules_leave_the_logits_alone(act, method):
    model = Rectified(act)
    with ForwardRecorder(model, method):
        found = model(x := images().requires_grad_())
    assert torch.equal(found, model(x))


def clipped_in_place(x, alpha):
    return (x * 1).clamp_(torch.zeros(()), alpha)


@pytest.mark.parametrize("method", ["vanilla_gradient", "deconvnet", "guided_backprop"])
@pytest.mark.parametrize(
    "clip",
    [
        lambda x, alpha: torch.clamp(x, torch.zeros(()), alpha),
        lambda x, alpha: x.clip(min=torch.zeros(()), max=alpha),
        lambda x, alpha: torch.minimum(F.relu(x), alpha),
        clipped_in_place,
    ],
    ids=["clamp", "clip", "minimum", "clamp_"],
)
@pytest.mark.parametrize("bound", [0.5, -0.5])
def test_a_bound_that_is_learned_keeps_its_gradient(clip, method, bound):
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor(bound, dtype=torch.float64, requires_grad=True)
    weights = torch.randn_like(x)
    expected = (weights * torch.minimum(torch.relu(x), alpha)).sum()
    rule = ReLURule(method) if method in WITH_RULE else contextlib.nullcontext()
    with rule:
        found = (weights * clip(x, alpha)).sum()
    assert torch.equal(found, expected)
    expected, found = (torch.autograd.grad(y, (x, alpha), retain_graph=True) for y in (expected, found))
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b)
    assert found[1] != 0


# --- those that no rule reaches -----------------------------------------------------------------------------


class MyReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, grad):
        return grad * (ctx.saved_tensors[0] > 0)


class ClampBlock(nn.Module):
    def forward(self, x):
        return torch.clamp(x * 2, min=0.0)


def in_a_thread(function):
    def call(x):
        results = []
        thread = threading.Thread(target=lambda: results.append(function(x)))
        thread.start()
        thread.join()
        return results[0]

    return call


UNREACHED = {
    "scripted": (lambda: torch.jit.script(nn.ReLU()), "ReluBackward0"),
    "scripted clamp": (lambda: torch.jit.script(ClampBlock()), r"Clamp\w*Backward|scripted code"),
    "traced": (lambda: torch.jit.trace(ClampBlock(), torch.randn(2, 4, 6, 6).double()), r"Clamp\w*Backward"),
    "function": (lambda: MyReLU.apply, "the Function MyReLU"),
    "thread": (lambda: in_a_thread(torch.relu), "ReluBackward0"),
    "hardtanh in a thread": (lambda: in_a_thread(lambda x: F.hardtanh(x, 0, 6)), "HardtanhBackward0"),
    "maximum in a thread": (lambda: in_a_thread(lambda x: x.maximum(torch.zeros_like(x))), "MaximumBackward0"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("method", WITH_RULE)
@pytest.mark.parametrize("case", UNREACHED)
def test_a_relu_that_no_rule_reaches_is_named(case, method):
    make, words = UNREACHED[case]
    relu = make()
    model = Rectified(lambda x: torch.relu(relu(x)))  # one that is reached does not hide it
    for _ in range(3):  # scripted code is compiled after a while
        with pytest.warns(UserWarning, match=rf"ReLUs that no rule reaches.*({words}|scripted code)"):
            saliency.METHODS[method](model, images(), 1)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "other",
    [
        F.leaky_relu,
        F.hardtanh,
        lambda x: x.clamp(-1, 1),
        lambda x: x.maximum(torch.ones(()).double()),
        lambda x: x.maximum(torch.arange(x.shape[-1]).double()),  # zero in places
    ],
)
def test_what_is_no_relu_is_not_named(other):
    saliency.guided_backprop(Rectified(lambda x: torch.relu(in_a_thread(other)(x))), images(), 1)


@pytest.mark.filterwarnings("error")
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_methods_without_a_rule_do_not_ask():
    model = Rectified(in_a_thread(torch.relu))
    saliency.vanilla_gradient(model, images(), 1)
    saliency.grad_cam(model, images(), 1)


@pytest.mark.parametrize("method", ["deconvnet", "guided_backprop"])
def test_exported_networks_follow_the_rules(method):
    model, x = Rectified(torch.relu), images()
    exported = torch.export.export(model, (x,)).module()
    with torch.no_grad():
        exported(x)
    assert_close(saliency.METHODS[method](exported, x, 1), saliency.METHODS[method](model, x, 1))


def test_warnings_point_at_the_caller():
    with pytest.warns(UserWarning, match="no ReLU") as caught:
        saliency.guided_backprop(Rectified(F.silu), images(), 1)
    assert caught[0].filename == __file__
