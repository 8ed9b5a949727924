"""The layer that Grad-CAM looks at: which it is, and that its output is (N, C, h, w)."""

import functools

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from salnb import Objective, saliency
from salnb.augment import HorizontalFlip
from salnb.saliency.layers import check_layout
from tests.helpers.networks import conv_bn
from tests.helpers.tolerances import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:no ReLU was met")
WITH_LAYER = pytest.mark.parametrize("method", ["grad_cam", "guided_grad_cam"])
VISION = torchvision.models


def slow_grad_cam(model, x, target, record):
    """From the definition, with the values that `record` keeps by a hook."""
    layer, kept = record(model), []
    handle = layer.register_forward_hook(lambda m, a, out: (kept.append(out), out.clone())[1])
    score = model(x)[:, target].sum()
    handle.remove()
    weights = torch.autograd.grad(score, kept[-1])[0].mean((2, 3), keepdim=True)
    coarse = (weights * kept[-1]).sum(1, keepdim=True).clamp(min=0).detach()
    return F.interpolate(coarse, x.shape[-2:], mode="bilinear")


# network: (options, side of the images, the last convolution, layers that are usual)
NETWORKS = {
    "resnet18": ({}, 64, "layer4.1.conv2", ["layer1", "layer3.0", "layer4", "layer4.1.relu", "maxpool"]),
    "resnet50": ({}, 64, "layer4.2.conv3", ["layer4", "layer4.2", "layer3.5.bn3"]),
    "vgg11_bn": ({}, 64, "features.25", ["features", "features.27", "features.28", "avgpool"]),
    "alexnet": ({}, 96, "features.10", ["features", "features.11"]),
    "squeezenet1_1": ({}, 64, "classifier.1", ["features", "features.12"]),
    "densenet121": ({}, 64, "features.denseblock4.denselayer16.conv2", ["features", "features.norm5"]),
    "mobilenet_v2": ({}, 64, "features.18.0", ["features", "features.17", "features.18"]),
    "mobilenet_v3_small": ({}, 64, "features.12.0", ["features", "features.11", "features.12"]),
    "efficientnet_b0": ({}, 64, "features.8.0", ["features", "features.7", "features.4.1.stochastic_depth"]),
    "convnext_tiny": ({}, 64, "features.7.2.block.0", [
        "features", "features.0", "features.5", "features.7", "features.7.2", "features.7.2.block", "features.7.2.block.6", "features.6.0", "features.0.1"]),
    "googlenet": ({"init_weights": False}, 64, "inception5b.branch4.1.conv", ["inception5b", "inception4e"]),
    "inception_v3": ({"init_weights": False}, 128, "Mixed_7c.branch_pool.conv", ["Mixed_7c", "Mixed_6e"]),
    "shufflenet_v2_x0_5": ({}, 64, "conv5.0", ["conv5", "stage4"]),
    "mnasnet0_5": ({}, 64, "layers.14", ["layers", "layers.13"]),
    "regnet_y_400mf": ({}, 64, "trunk_output.block4.block4-5.f.c.0", ["trunk_output", "stem"]),
    "vit_b_16": ({"image_size": 64}, 64, "conv_proj", ["conv_proj"]),
    "swin_t": ({}, 64, "features.0.0", ["permute"]),
}  # fmt: skip


@functools.lru_cache(maxsize=1)  # of the many cases of one network, which nothing changes
def small(name):
    torch.manual_seed(0)
    options, size, last, layers = NETWORKS[name]
    return getattr(VISION, name)(num_classes=5, **options).eval(), torch.rand(2, 3, size, size), last, layers


@pytest.mark.parametrize("name", NETWORKS)
def test_usual_layers_of_usual_networks(name):
    model, x, last, layers = small(name)
    for layer in [last, *layers]:
        if _side(model, x, layer) > 1:
            expected = slow_grad_cam(model, x, 1, lambda m, layer=layer: m.get_submodule(layer))
            assert_close(saliency.grad_cam(model, x, 1, layer=layer), expected, 1e-4)
    if _side(model, x, last) > 1:
        assert torch.equal(saliency.grad_cam(model, x, 1), saliency.grad_cam(model, x, 1, layer=last))


def _side(model, x, layer):
    shapes = []
    handle = model.get_submodule(layer).register_forward_hook(lambda m, a, out: shapes.append(out.shape))
    with torch.no_grad():
        model(x)
    handle.remove()
    return max(shapes[-1][2:])


# --- channels that do not come second -----------------------------------------------------------------------

NOT_CHANNELS = {
    "swin_t": ["features.0", "features.0.1", "features.1", "features.3", "features.3.0", "features.5", "norm", "features.1.0.norm1"],
    "vit_b_16": ["encoder", "encoder.layers.encoder_layer_3", "encoder.ln", "encoder.layers.encoder_layer_3.mlp",
                 "encoder.layers.encoder_layer_3.self_attention"],
    "convnext_tiny": ["features.7.2.block.1", "features.7.2.block.2", "features.5.0.block.5"],
}  # fmt: skip


@WITH_LAYER
@pytest.mark.parametrize(("name", "layer"), [(n, layer) for n in NOT_CHANNELS for layer in NOT_CHANNELS[n]])
def test_layers_with_another_layout_are_refused(name, layer, method):
    model, x, _, _ = small(name)
    with pytest.raises(ValueError, match=r"layer.* \(N, C, h, w\)"):
        saliency.METHODS[method](model, x, 1, layer=layer)
    assert torch.is_grad_enabled()


class Returns(nn.Module):
    """A network one of whose layers returns what `function` makes of features (2, 6, 8, 8)."""

    def __init__(self, function, back=lambda x: x, layer=None):
        super().__init__()
        self.features = nn.Conv2d(3, 6, 3, padding=1)
        self.layer = layer or Does(function)
        self.back, self.head = back, nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.back(self.layer(self.features(x))).mean((2, 3)))


class Does(nn.Module):
    def __init__(self, function, *inside):
        super().__init__()
        self.function, self.inside = function, nn.ModuleList(inside)

    def forward(self, x):
        return self.function(x)


def merge(x):
    return x.unflatten(0, (-1, 2)).mean(1)


OUTPUTS = {
    "tuple": (lambda x: (x, x), lambda x: x[0], r"got tuple"),
    "dictionary": (lambda x: {"out": x}, lambda x: x["out"], r"got dict"),
    "tokens": (lambda x: x.flatten(2).mT, lambda x: x.mT.unflatten(2, (8, 8)), r"got \(2, 64, 6\)"),
    "vectors": (lambda x: x.mean((2, 3)), lambda x: x[:, :, None, None], r"got \(2, 6\)"),
    "video": (lambda x: x[:, :, None], lambda x: x[:, :, 0], r"got \(2, 6, 1, 8, 8\)"),
    "integers": (lambda x: (x * 100).long(), lambda x: x.float(), r"got \(2, 6, 8, 8\) of torch.int64"),
    "channels last": (lambda x: x.permute(0, 2, 3, 1), lambda x: x.permute(0, 3, 1, 2), r"\(2, 8, 8, 6\).*looks like"),
    "batch second": (lambda x: x.transpose(0, 1), lambda x: x.transpose(0, 1), r"with N = 2.*'layer' \(Does\) is \(6, 2, 8, 8\)"),
    "flips": (lambda x: torch.cat([x, x.flip(3)]), lambda x: x.unflatten(0, (2, -1)).mean(0), r"with N = 2.*\(4, 6, 8, 8\)"),
    "windows": (lambda x: x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(0, 2),
                lambda x: x.unflatten(0, (2, 4)).mean(1), r"with N = 2.*\(8, 6, 4, 4\)"),
    "one pixel": (lambda x: x.mean((2, 3), keepdim=True), lambda x: x, r"more than one pixel"),
}  # fmt: skip


@WITH_LAYER
@pytest.mark.parametrize("case", OUTPUTS)
def test_what_a_layer_returns_is_looked_at(case, method):
    function, back, message = OUTPUTS[case]
    model = Returns(function, back).eval()
    with pytest.raises(ValueError, match=message):
        saliency.METHODS[method](model, torch.rand(2, 3, 8, 8), 1, layer="layer")


@WITH_LAYER
def test_networks_that_change_the_batch_inside(method):
    """The test-time flips of a model are no rows of the map; a layer after their mean is fine."""

    class Flips(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.mean = conv_bn(), Does(lambda x: x.unflatten(0, (2, -1)).mean(0))

        def forward(self, x):
            features = self.net[:6](torch.cat([x, x.flip(3)]))
            return self.net[6:](self.mean(features))

    model, x = Flips().eval(), torch.rand(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"N = 2, but that of 'net.3' \(Conv2d\) is \(4, 6, 8, 8\)"):
        saliency.METHODS[method](model, x, 1)
    assert saliency.METHODS[method](model, x, 1, layer="mean").shape == (2, 1, 8, 8)
    assert saliency.vanilla_gradient(model, x, 1).shape == (2, 1, 8, 8)


def layout(shape, image, layer, model=None):
    check_layout(
        model or nn.Sequential(nn.Conv2d(3, 3, 1), layer), layer, torch.empty(shape), torch.empty(image)
    )


SQUARE, WIDE = (2, 3, 32, 32), (2, 3, 32, 64)
TOKENS = nn.Sequential(nn.Conv2d(3, 3, 1), nn.LayerNorm(8), nn.Softmax(-1))
CONV_BLOCK = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())


@pytest.mark.parametrize(
    ("shape", "image", "layer", "model"),
    [
        ((2, 8, 8, 8), SQUARE, nn.Conv2d(3, 3, 1), TOKENS),  # a convolution is always right
        ((2, 8, 8, 2), SQUARE, nn.Conv2d(3, 3, 1), TOKENS),
        ((2, 8, 8, 2), SQUARE, nn.BatchNorm2d(8), TOKENS),
        ((2, 8, 8, 8), SQUARE, nn.Dropout2d(0), TOKENS),
        ((2, 8, 8, 8), SQUARE, CONV_BLOCK, TOKENS),
        ((2, 8, 8, 8), SQUARE, nn.ReLU(), None),
        ((2, 16, 8, 8), SQUARE, nn.Identity(), None),
        ((2, 16, 8, 8), SQUARE, Does(None), TOKENS),
        ((2, 16, 7, 15), WIDE, nn.ReLU(), TOKENS),
        ((2, 16, 5, 8), WIDE, nn.ReLU(), None),  # a stride of its own for each dimension
        ((2, 16, 5, 9), WIDE, CONV_BLOCK, TOKENS),
        ((2, 64, 1, 2), WIDE, nn.ReLU(), TOKENS),
    ],
)
def test_layouts_that_are_taken(shape, image, layer, model):
    layout(shape, image, layer, model)


@pytest.mark.parametrize(
    ("shape", "image", "layer", "model"),
    [
        ((2, 8, 8, 16), SQUARE, nn.ReLU(), None),  # channels last
        ((2, 8, 8, 16), SQUARE, nn.Sequential(nn.Conv2d(3, 3, 1), Does(None)), None),
        ((2, 8, 16, 96), WIDE, Does(None), None),
        ((2, 8, 8, 8), SQUARE, nn.ReLU(), TOKENS),  # not to be told
        ((2, 8, 8, 8), SQUARE, nn.Sequential(nn.Conv2d(3, 3, 1), nn.LayerNorm(8)), None),
        ((2, 4, 64, 64), SQUARE, nn.Softmax(-1), TOKENS),  # attention
        ((2, 4, 64, 64), SQUARE, nn.Dropout(), TOKENS),
        ((2, 4, 65, 16), SQUARE, nn.Identity(), TOKENS),
    ],
)
def test_layouts_that_are_not(shape, image, layer, model):
    with pytest.raises(ValueError, match=r"\(N, C, h, w\), but that of .* looks like"):
        layout(shape, image, layer, model)


class Last(nn.Module):
    """A network that works on the channels as the last dimension, of which there are as many as columns."""

    def __init__(self, on_channels):
        super().__init__()
        self.conv, self.permute = nn.Conv2d(3, 8, 3, padding=1), Does(lambda x: x.permute(0, 2, 3, 1))
        self.on_channels, self.relu, self.head = on_channels, nn.ReLU(), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.relu(self.on_channels(self.permute(self.conv(x)))).mean((1, 2)))


class CustomRMSNorm(nn.Module):
    def forward(self, x):
        return x / x.square().mean(-1, keepdim=True).sqrt()


@pytest.mark.parametrize("layer", ["permute", "on_channels", "relu"])
@pytest.mark.parametrize("on_channels", [lambda: nn.Linear(8, 8), CustomRMSNorm], ids=["linear", "norm"])
@WITH_LAYER
def test_as_many_channels_as_columns_are_asked_about(method, on_channels, layer):
    model, x = Last(on_channels()), torch.rand(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"cannot be told from it: pass reshape='channels_last'"):
        saliency.METHODS[method](model, x, 1, layer=layer)
    assert saliency.METHODS[method](model, x, 1, layer=layer, reshape="channels_last").any()
    assert not any(module._forward_hooks for module in model.modules())


@WITH_LAYER
def test_what_works_on_logits_or_pooled_features_is_no_matter(method):
    head = nn.Linear(512, 10), nn.LayerNorm(10), nn.Softmax(1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), *head)
    x = torch.rand(2, 3, 8, 8)
    expected = saliency.METHODS[method](model, x, 1, layer="1", reshape=lambda features: features)
    assert torch.equal(saliency.METHODS[method](model, x, 1, layer="1"), expected)


class OnItsSide(Last):
    def __init__(self):
        super().__init__(nn.Conv2d(8, 8, 1))

    def forward(self, x):
        return self.head(torch.relu(self.conv(x.mT)).mean((2, 3)))


class InOneLine(OnItsSide):
    def forward(self, x):
        return self.head(torch.relu(self.on_channels(self.conv(x).flatten(2).unsqueeze(-1))).mean((2, 3)))


@pytest.mark.parametrize(
    ("make", "name", "size", "back"),
    [
        (OnItsSide, "conv", (8, 16), lambda f: f.mT),
        (InOneLine, "on_channels", (6, 12), lambda f: f.flatten(2).unflatten(2, (6, 12))),
    ],
)
@WITH_LAYER
def test_convolutions_of_what_is_no_image_are_asked_about(method, make, name, size, back):
    model, x = make(), torch.rand(2, 3, *size)
    for options in ({}, {"layer": name}):
        with pytest.raises(ValueError, match=r"may have .*: name the layer, with reshape="):
            saliency.METHODS[method](model, x, 1, **options)
    assert saliency.METHODS[method](model, x, 1, layer=name, reshape=back).any()


@pytest.mark.parametrize("size", [(8, 16), (9, 16), (31, 64), (33, 97), (17, 23), (64, 20), (40, 100)])
@pytest.mark.parametrize("conv", [(3, 1, 0), (3, 2, 1), (5, 1, 0), (7, 2, 3), (2, 2, 0), (1, 1, 2)])
def test_convolutions_of_any_stride_and_padding_are_not(size, conv):
    x, layer = torch.rand(1, 3, *size), nn.Conv2d(3, 3, *conv).requires_grad_(False)
    while conv[0] <= min(x.shape[2:]) < 40 and layer(x).shape[2:] != (1, 1):
        x = layer(x)
        layout(tuple(x.shape), (1, 3, *size), layer)


def test_a_permuted_layer_is_the_way_out():
    model = Returns(lambda x: x.permute(0, 2, 3, 1), lambda x: x.permute(0, 3, 1, 2)).eval()
    x = torch.rand(2, 3, 8, 8)
    model.back = nn.Sequential(Does(model.back), nn.Dropout2d(0)).eval()
    assert_close(saliency.grad_cam(model, x, 1, layer="back.1"), saliency.grad_cam(model, x, 1), 1e-5)


# --- the default --------------------------------------------------------------------------------------------


class Order(nn.Module):
    """Convolutions that are defined in another order than they run in, and one that never does."""

    def __init__(self, after=lambda x: x):
        super().__init__()
        self.late = nn.Conv2d(6, 6, 3, padding=1)
        self.early = nn.Conv2d(3, 6, 3, padding=1)
        self.auxiliary = nn.Conv2d(6, 6, 1)
        self.head, self.after = nn.Linear(6, 4), after

    def forward(self, x):
        x = torch.relu(self.early(x))
        if self.training:
            self.auxiliary(x)
        return self.head(self.after(self.late(x)).mean((2, 3)))


@WITH_LAYER
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("after", [torch.tanh, lambda x: x.relu_()], ids=["new", "in-place"])
def test_the_default_is_the_last_convolution_that_ran(after, training, create_graph, method):
    model, x = Order(after).train(training), torch.rand(2, 3, 8, 8)
    expected = saliency.METHODS[method](model, x, 1, layer="late")
    assert torch.equal(saliency.METHODS[method](model, x, 1, create_graph=create_graph), expected)
    assert not any(module._forward_hooks for module in model.modules())


def test_the_default_of_an_objective_is_the_same_or_is_named():
    x, y = torch.rand(4, 3, 8, 8), torch.arange(4)
    losses = [
        Objective(model, HorizontalFlip(), method="grad_cam", method_options=options)(
            x, y, torch.Generator().manual_seed(0)
        ).saliency_loss
        for model in [Order(torch.tanh).eval()]
        for options in ({}, {"layer": "late"})
    ]
    assert losses[0] == losses[1] > 0
    objective = Objective(Order(lambda x: x.relu_()), HorizontalFlip(), method="grad_cam")
    with pytest.raises(ValueError, match=r"last that runs is 'late' \(Conv2d\): name it"):
        objective(x, y)


def test_where_no_convolution_runs_the_default_says_so():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    model.spare = nn.Conv2d(3, 3, 1)
    model.forward = lambda x: model[1](model[0](x))
    with pytest.raises(ValueError, match=r"last nn.Conv2d that runs, but none does: name a layer"):
        saliency.grad_cam(model, torch.rand(2, 3, 8, 8), 1)
    with pytest.raises(ValueError, match="never calls"):
        saliency.grad_cam(model, torch.rand(2, 3, 8, 8), 1, layer="spare")


# --- layers that run more than once -------------------------------------------------------------------------


class Shared(nn.Module):
    """One convolution three times."""

    def __init__(self):
        super().__init__()
        self.first, self.shared, self.head = (
            nn.Conv2d(3, 5, 1),
            nn.Conv2d(5, 5, 3, padding=1),
            nn.Linear(5, 4),
        )
        self.last = nn.Identity()  # what the last call returns
        self.again = self.shared  # a layer goes by any of its names

    def forward(self, x):
        x = self.first(x)
        for _ in range(2):
            x = torch.tanh(self.shared(x))
        return self.head(torch.tanh(self.last(self.shared(x))).mean((2, 3)))


@WITH_LAYER
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("layer", [None, "shared", "again"])
def test_the_last_call_of_a_layer_counts(layer, create_graph, method):
    model, x = Shared().double().eval(), torch.rand(2, 3, 8, 8).double()
    found = saliency.METHODS[method](model, x, 1, layer=layer, create_graph=create_graph)
    assert_close(found.detach(), saliency.METHODS[method](model, x, 1, layer="last"))


def test_the_last_call_of_a_layer_counts_in_the_invariance_loss():
    model, x = Shared().eval(), torch.rand(4, 3, 8, 8)

    def loss(name):
        objective = Objective(model, HorizontalFlip(), beta=1.0, gamma=0.0, layers=[name])
        return objective(x, torch.arange(4), torch.Generator().manual_seed(0)).invariance_loss

    assert loss("shared") == loss("last") != loss("first")
