"""Losses on maps: networks of all kinds have the right gradient, or are refused."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision import ops
from torchvision.models.swin_transformer import SwinTransformer

from salnb import Objective, saliency
from salnb.augment import HorizontalFlip
from tests.helpers.finite_differences import assert_gradient
from tests.helpers.methods import cheap
from tests.helpers.networks import conv_bn

METHODS = pytest.mark.parametrize("method", saliency.METHODS)
pytestmark = pytest.mark.filterwarnings("ignore:no ReLU was met", "error:ReLUs that no rule reaches")


def vision_transformer():
    model = torchvision.models.VisionTransformer(
        image_size=8, patch_size=2, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=12, num_classes=3
    )
    nn.init.normal_(model.heads.head.weight)  # zeros, as they come
    return model


def swin():
    return SwinTransformer(
        patch_size=[2, 2], embed_dim=4, depths=[2], num_heads=[2], window_size=[2, 2], num_classes=3
    )


def timm_vision_transformer():
    timm = pytest.importorskip("timm")
    return timm.models.VisionTransformer(
        img_size=8, patch_size=2, embed_dim=8, depth=2, num_heads=2, num_classes=3, mlp_ratio=1.5
    )


def transformer_layer():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = nn.Conv2d(3, 8, 2, 2)
            self.encoder = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.encoder(self.patches(x).flatten(2).mT).mean(1))

    return Tokens()


def mobile():
    from torchvision.ops.misc import SqueezeExcitation

    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Hardswish(inplace=True),
        SqueezeExcitation(8, 4, scale_activation=nn.Hardsigmoid), nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Hardswish(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip


def convnext_block():
    from torchvision.models.convnext import CNBlock

    return nn.Sequential(
        nn.Conv2d(3, 8, 2, 2), CNBlock(8, 1.0, 0.0), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )


# network: what makes it, and the layer where Grad-CAM looks
NETWORKS = {
    "vit": (vision_transformer, "conv_proj"),
    "swin": (swin, "features.0.0"),
    "timm": (timm_vision_transformer, "patch_embed.proj"),
    "transformer": (transformer_layer, "patches"),
    "mobile": (mobile, "4"),
    "convnext": (convnext_block, "1"),
}


@METHODS
@pytest.mark.parametrize("network", NETWORKS)
def test_a_loss_on_the_map_has_the_right_gradient(network, method):
    torch.manual_seed(2)
    make, layer = NETWORKS[network]
    model = make().double().eval()
    x, target = torch.rand(2, 3, 8, 8).double(), torch.tensor([0, 2])
    pattern = torch.randn(2, 1, 8, 8).double()
    options = cheap(method, still=True) | ({"layer": layer} if "cam" in method else {})

    def loss():
        return (saliency.METHODS[method](model, x, target, create_graph=True, **options) * pattern).sum()

    assert assert_gradient(loss, model.parameters(), 1e-5) > 1e-4


@METHODS
def test_attention_in_low_precision_has_a_gradient(method):
    """Where fused kernels would be chosen first."""
    model = vision_transformer().to(torch.bfloat16)
    options = cheap(method, still=True) | ({"layer": "conv_proj"} if "cam" in method else {})
    maps = saliency.METHODS[method](model, torch.rand(2, 3, 8, 8).bfloat16(), 1, create_graph=True, **options)
    maps.float().square().sum().backward()
    assert model.conv_proj.weight.grad.isfinite().all()


class NoSecond(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].exp()


class With(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.net, self.function = conv_bn(), function

    def forward(self, x):
        return self.net[3:](self.function(self.net[:3](x)))


REFUSED = {
    "once_differentiable": NoSecond.apply,
    "ctc": lambda x: x * F.ctc_loss(
        x.permute(2, 0, 1, 3).mean(3).log_softmax(2), torch.ones(len(x), 2).long(),
        torch.full((len(x),), x.shape[2]), torch.full((len(x),), 2),
    ),
    "deform_conv2d": lambda x: ops.deform_conv2d(
        x, x.new_zeros(len(x), 18, *x.shape[2:]), torch.eye(x.shape[1])[..., None, None].expand(-1, -1, 3, 3),
        padding=1,
    ),
    "roi_align": lambda x: ops.roi_align(x, [x.new_tensor([[0, 0, 4, 4]])] * len(x), x.shape[2:]),
    "roi_pool": lambda x: ops.roi_pool(x, [x.new_tensor([[0, 0, 4, 4]])] * len(x), x.shape[2:]),
}  # fmt: skip


@pytest.mark.parametrize("method", [name for name in saliency.METHODS if name != "grad_cam"])
@pytest.mark.parametrize("operation", REFUSED)
def test_an_operation_without_a_second_derivative_is_refused(operation, method):
    model, x = With(REFUSED[operation]).eval(), torch.rand(2, 3, 8, 8)
    saliency.METHODS[method](model, x, 1, **cheap(method))
    with pytest.raises(RuntimeError, match=r"create_graph=True differentiates .* no second derivative"):
        saliency.METHODS[method](model, x, 1, create_graph=True, **cheap(method))
    with pytest.raises(RuntimeError, match=r"no second derivative"):
        Objective(model, HorizontalFlip(), method=method)(x, torch.arange(2))


class AtTheEnd(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = conv_bn()

    def forward(self, x):
        return NoSecond.apply(self.net(x))


class BehindAFrozenHead(AtTheEnd):
    """The gradient that reaches the operation is a constant, as at the end."""

    def forward(self, x):
        head = self.net[-1].requires_grad_(False)
        return head(NoSecond.apply(self.net[:-1](x)))


@pytest.mark.parametrize("network", [AtTheEnd, BehindAFrozenHead])
@pytest.mark.parametrize("method", saliency.METHODS)
def test_so_is_one_that_only_constants_reach(network, method):
    model, x = network().eval(), torch.rand(2, 3, 8, 8)
    with pytest.raises(RuntimeError, match=r"create_graph=True differentiates .* no second derivative"):
        saliency.METHODS[method](model, x, 1, create_graph=True, **cheap(method))
    with pytest.raises(RuntimeError, match=r"no second derivative"):
        Objective(model, HorizontalFlip(), method=method)(x, torch.arange(2))


class OfWeights(nn.Module):
    """Between the weights and the score only: what is differentiated twice does not pass it."""

    def __init__(self):
        super().__init__()
        self.net, self.scale = conv_bn(), nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return self.net(x) * NoSecond.apply(self.scale)


def test_an_operation_on_weights_alone_needs_none():
    model, x = OfWeights().eval(), torch.rand(2, 3, 8, 8)
    maps = saliency.vanilla_gradient(model, x, 1, create_graph=True)
    (gradient,) = torch.autograd.grad(maps.square().sum(), model.scale)
    plain = OfWeights().eval()
    plain.load_state_dict(model.state_dict())
    plain.forward = lambda x: plain.net(x) * plain.scale.exp()
    maps = saliency.vanilla_gradient(plain, x, 1, create_graph=True)
    (expected,) = torch.autograd.grad(maps.square().sum(), plain.scale)
    torch.testing.assert_close(gradient, expected)


@METHODS
def test_a_compiled_network_has_the_right_gradient(method):
    model, x = conv_bn().eval(), torch.rand(2, 3, 8, 8)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(x)
    options = cheap(method, still=True)
    gradients = []
    for network in (model, compiled):
        kwargs = options | ({"layer": model[3]} if "cam" in method else {})
        loss = saliency.METHODS[method](network, x, 1, create_graph=True, **kwargs).square().sum()
        gradients.append(torch.autograd.grad(loss, model[0].weight)[0])
    assert torch.equal(*gradients)


class Functional(nn.Module):
    """A convolution by its function, of a kind that is asked for."""

    def __init__(self, function):
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.rand(6, 6, 3, 3)), function

    def forward(self, x):
        return self.function(x, self.weight)


BEHIND = {
    "function": (lambda: Functional(F.conv2d), True),
    "scripted": (lambda: torch.jit.script(nn.Sequential(nn.Conv2d(6, 6, 3), nn.Tanh())), True),
    "transposed": (lambda: nn.ConvTranspose2d(6, 6, 3), True),
    "one dimension": (
        lambda: Functional(lambda x, w: F.conv1d(x.flatten(2), w[..., 0], padding=1).view_as(x)),
        False,
    ),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated", "error:layer=None takes")
@pytest.mark.parametrize("create_graph", [False, True], ids=["map", "map-with-graph"])
@pytest.mark.parametrize("method", ["grad_cam", "guided_grad_cam"])
@pytest.mark.parametrize("behind", BEHIND)
def test_a_last_convolution_that_is_no_module_is_told(behind, method, create_graph):
    make, told = BEHIND[behind]
    network, x = conv_bn(), torch.rand(2, 3, 8, 8)
    model = nn.Sequential(*network[:6], make(), *network[6:]).eval()
    explain = partial(saliency.METHODS[method], model, x, 1, create_graph=create_graph)
    explain(layer="3")
    for _ in range(3):  # scripted code becomes a graph of its own after some passes
        with pytest.warns(UserWarning, match="layer=None takes .* runs after it") if told else nullcontext():
            explain()


@pytest.mark.parametrize("method", ["grad_cam", "guided_grad_cam"])
def test_so_is_one_behind_a_module_that_is_not_the_last_by_name(method):
    network = conv_bn()
    model = nn.Sequential(*network[:6], Functional(F.conv2d), *network[6:]).eval()
    model[-1].unused = nn.Conv2d(1, 1, 1)
    with pytest.warns(UserWarning, match="layer=None takes .* runs after it"):
        saliency.METHODS[method](model, torch.rand(2, 3, 8, 8), 1)
