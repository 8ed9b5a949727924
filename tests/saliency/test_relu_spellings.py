"""Every spelling of a ReLU follows its rule; those that no rule reaches are named."""

import contextlib
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from salnb import saliency
from salnb.saliency.recording import ForwardRecorder
from salnb.saliency.relu_masks import refuse_what_values_tell
from salnb.saliency.relu_rules import ReLURule
from tests.helpers.finite_differences import assert_gradient
from tests.helpers.methods import WITH_RULE
from tests.helpers.relus import BY_VALUES, OTHERS, SPELLINGS, mask_times_in_place, zeros
from tests.helpers.tolerances import assert_close


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
    with refuse_what_values_tell():  # a graph would not have them
        found = saliency.METHODS[method](model, x, 1, reduce=None)
    assert_close(found, slow_map(model, x, 1, method, upper))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("method", ["deconvnet", "guided_backprop"])
@pytest.mark.parametrize("spelling", BY_VALUES)
def test_values_tell_where_nothing_else_does(spelling, method):
    model, x = Rectified(BY_VALUES[spelling]), images() * 5
    found = saliency.METHODS[method](model, x, 1, reduce=None)
    assert_close(found, slow_map(model, x, 1, method, float("inf")))


@pytest.mark.parametrize("places", [31, 32])
def test_from_so_many_places_on_it_is_no_coincidence(places):
    x = torch.zeros(80, dtype=torch.float64)
    x[:places] = torch.arange(places) - 3.5
    with ReLURule("guided_backprop") as rule:
        y = x.requires_grad_() * torch.from_numpy(x.detach().numpy() > 0)
    assert torch.equal(y, x.relu())
    assert rule.relu_count == (places == 32)


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
    assert method not in WITH_RULE or rule.relu_count == 1


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
    "magnitude": (lambda: lambda x: (x + x.abs()) / 2, "AddBackward0 of a tensor and its magnitude"),
    "halves": (lambda: lambda x: 0.5 * x + abs(x) / 2, "AddBackward0 of a tensor and its magnitude"),
    "root": (lambda: lambda x: x + x.pow(2).sqrt(), "AddBackward0 of a tensor and its magnitude"),
    "x * sign": (lambda: lambda x: x + x * x.sign(), "AddBackward0 of a tensor and its magnitude"),
    "x + relu(-x)": (lambda: lambda x: x + torch.relu(-x), "AddBackward0 of a tensor and its magnitude"),
    "lerp": (lambda: lambda x: x.lerp(x.abs(), 0.5), "LerpBackward0 of a tensor and its magnitude"),
    "stack.amax": (lambda: lambda x: torch.stack([x, zeros(x)], -1).amax(-1), "AmaxBackward0 over a stack"),
    "stack.max": (lambda: lambda x: torch.stack([zeros(x), x]).max(0).values, "MaxBackward0 over a stack"),
    "stack.sort": (lambda: lambda x: torch.stack([zeros(x), x]).sort(0).values[1], "SortBackward0 over a stack"),
    "stack.topk": (lambda: lambda x: torch.stack([x, zeros(x)]).topk(1, 0).values[0], "TopkBackward0 over a"),
    "cat.amax": (lambda: lambda x: torch.cat([x[None], zeros(x)[None]]).amax(0), "AmaxBackward0 over a stack"),
    "amin": (lambda: lambda x: -torch.stack([zeros(x), -x]).amin(0), "AminBackward0 over a stack"),
    "fmin": (lambda: lambda x: -torch.fmin(-x, zeros(x)), "FminBackward0"),
    "mask in vmap": (lambda: torch.vmap(lambda x: x * (x > 0)), r"mul in torch\.vmap"),
    "where in vmap": (lambda: torch.vmap(lambda x: torch.where(x > 0, x, 0.0)), r"where in torch\.vmap"),
    "else in vmap": (lambda: torch.vmap(lambda x: torch.where(x < 0, 0.0, x)), r"where in torch\.vmap"),
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
