"""Grad-CAM of transformers: tokens and channels that come last, and the layer that nobody named."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torchvision import models

from salnb import Objective, saliency
from salnb.augment import HorizontalFlip
from tests.helpers.tolerances import assert_close

WITH_LAYER = pytest.mark.parametrize("method", ["grad_cam", "guided_grad_cam"])


def vit(size=32):
    torch.manual_seed(0)
    net = models.VisionTransformer(size, 8, 2, 2, 12, 24, num_classes=5).double().eval()
    nn.init.normal_(net.heads.head.weight)
    return net


def swin():
    torch.manual_seed(0)
    return models.SwinTransformer([2, 2], 8, [1, 1], [2, 2], [2, 2], num_classes=5).double().eval()


def images(height=32, width=32):
    return torch.rand(2, 3, height, width, dtype=torch.float64)


def slow(net, x, layer, arrange):
    """Grad-CAM from its definition, of features that `arrange` makes (N, C, h, w)."""
    kept = []
    handle = net.get_submodule(layer).register_forward_hook(lambda module, args, out: kept.append(out))
    logits = net(x)
    handle.remove()
    (slope,) = torch.autograd.grad(logits[:, 1].sum(), kept[0])
    features, slope = arrange(kept[0]), arrange(slope)
    cam = (slope.mean((2, 3), keepdim=True) * features).sum(1, keepdim=True).relu()
    return F.interpolate(cam, x.shape[2:], mode="bilinear", align_corners=False).detach()


def from_tokens(features):
    return torch.stack([features[:, 1 + i] for i in range(16)], -1).view(2, -1, 4, 4)


LAYERS = {
    "tokens": (vit, "encoder.layers.encoder_layer_1.ln_1", from_tokens),
    "channels_last": (swin, "features.2", lambda features: features.permute(0, 3, 1, 2)),
}


@pytest.mark.parametrize("layout", LAYERS)
def test_grad_cam_of_a_transformer(layout):
    make, layer, arrange = LAYERS[layout]
    net, x = make(), images()
    expected = slow(net, x, layer, arrange)
    assert expected.max() > 0
    assert_close(saliency.grad_cam(net, x, 1, layer=layer, reshape=layout), expected)
    assert_close(saliency.grad_cam(net, x, 1, layer=layer, reshape=arrange), expected)
    guided = saliency.guided_backprop(net, x, 1)
    assert_close(saliency.guided_grad_cam(net, x, 1, layer=layer, reshape=layout), expected * guided)


@WITH_LAYER
def test_a_loss_on_the_maps_of_a_transformer(method):
    options = {"layer": "encoder.layers.encoder_layer_1.ln_1", "reshape": "tokens"}
    net = vit()
    losses = Objective(net, HorizontalFlip(1.0), method=method, method_options=options)(
        images(), torch.tensor([0, 1])
    )
    losses.total.backward()
    assert losses.saliency_loss > 0
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)


class Tokens(nn.Module):
    """A network whose layer `tokens` gives (N, extra + hw, C)."""

    def __init__(self, extra, patch=4):
        super().__init__()
        self.patch, self.tokens = nn.Conv2d(3, 6, patch, patch), nn.Identity()
        self.extra, self.head = nn.Parameter(torch.randn(1, extra, 6)), nn.Linear(6, 4)

    def forward(self, x):
        x = self.patch(x).flatten(2).mT
        return self.head(self.tokens(torch.cat([self.extra.expand(len(x), -1, -1), x], 1)).mean(1))


@pytest.mark.parametrize("extra", [0, 1, 2, 5])
@pytest.mark.parametrize("size", [(32, 32), (24, 48), (64, 16)])
def test_tokens_of_any_ratio_with_others_before_them(extra, size):
    net, x = Tokens(extra).double(), images(*size)
    maps = saliency.grad_cam(net, x, 1, layer="tokens", reshape="tokens")
    rows, columns = size[0] // 4, size[1] // 4
    assert_close(maps, slow(net, x, "tokens", lambda f: f[:, extra:].mT.reshape(2, 6, rows, columns)))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layer": "tokens"}, ValueError, r"got \(2, 65, 6\) of .*: for tokens .* pass reshape='tokens'"),
        ({"layer": "tokens", "reshape": "token"}, ValueError, "reshape 'token' is unknown .*'tokens'"),
        (
            {"layer": "tokens", "reshape": "channels_last"},
            ValueError,
            r"is for features \(N, h, w, C\), got \(2, 65",
        ),
        (
            {"layer": "patch", "reshape": "tokens"},
            ValueError,
            r"is for features \(N, 1 \+ hw, C\).* got \(2, 6, 8, 8",
        ),
        (
            {"layer": "tokens", "reshape": lambda f: f},
            ValueError,
            r"reshape must give \(N, C, h, w\) .* got \(2, 65",
        ),
        (
            {"reshape": "tokens"},
            ValueError,
            "reshape is for the output of a layer that is named, got layer=None",
        ),
    ],
)
@WITH_LAYER
def test_what_cannot_be_rearranged_is_refused(method, options, error, message):
    with pytest.raises(error, match=message):
        saliency.METHODS[method](Tokens(1).double(), images(), 1, **options)


def test_tokens_that_make_no_grid_are_refused():
    with pytest.raises(ValueError, match=r"h:w as in the images, got \(2, 77, 6\): pass a function"):
        saliency.grad_cam(Tokens(13).double(), images(), 1, layer="tokens", reshape="tokens")


class SequenceFirst(nn.Module):
    """A network of PyTorch's encoder whose sequence is the first dimension."""

    def __init__(self):
        super().__init__()
        self.patch, self.norm, self.head = nn.Conv2d(3, 6, 4, 4), nn.LayerNorm(6), nn.Linear(6, 4)
        layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x):
        return self.head(self.norm(self.encoder(self.patch(x).flatten(2).permute(2, 0, 1))).mean(0))


@pytest.mark.parametrize("layer", ["encoder", "encoder.layers.0", "encoder.layers.0.norm2", "norm"])
def test_as_many_tokens_as_images_are_not_taken_for_them(layer):
    net, x = SequenceFirst(), torch.rand(4, 3, 8, 8)
    with pytest.raises(ValueError, match=r"\(4, 4, 6\) may be \(1 \+ hw, N, C\).*or a function"):
        saliency.grad_cam(net, x, 1, layer=layer, reshape="tokens")
    found = saliency.grad_cam(
        net, x, 1, layer=layer, reshape=lambda f: f.permute(1, 2, 0).unflatten(2, (2, 2))
    )
    assert found.shape == (4, 1, 8, 8)


def test_channels_last_is_named_as_the_cure():
    with pytest.raises(ValueError, match="reshape='channels_last'"):
        saliency.grad_cam(swin(), images(), 1, layer="features.2")


@pytest.mark.parametrize("make", [vit, swin])
@WITH_LAYER
def test_the_stem_is_not_picked_in_silence(make, method):
    with pytest.warns(
        UserWarning, match=r"before all attention: name a later layer, such as '.*(ln_1|norm1)'"
    ):
        saliency.METHODS[method](make(), images(), 1)
    with pytest.warns(UserWarning, match="before all attention"):
        Objective(make(), HorizontalFlip(1.0), method=method)


@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny", "efficientnet_b0", "maxvit_t"])
def test_convolutional_networks_are_left_alone(name):
    from salnb.saliency.layers import stem_before_attention

    options = {"input_size": (64, 64), "partition_size": 2} if name == "maxvit_t" else {}
    if name == "maxvit_t":
        options |= {
            "stem_channels": 8,
            "block_channels": [8],
            "block_layers": [2],
            "head_dim": 4,
            "stochastic_depth_prob": 0.0,
        }
        net = models.MaxVit(**options)
    else:
        net = models.get_model(name)
    assert stem_before_attention(net) == ""


def test_tokens_that_no_score_depends_on_are_told():
    """Behind the last block only the class token is read."""
    net = vit()
    with pytest.warns(UserWarning, match="the scores depend on no feature that reshape keeps"):
        saliency.grad_cam(net, images(), 1, layer="encoder.layers.encoder_layer_1", reshape="tokens")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saliency.grad_cam(net, images(), 1, layer="encoder.layers.encoder_layer_0", reshape="tokens")


def test_a_traced_map_of_tokens_is_not_looked_at():
    target, options = torch.tensor([1]), {"layer": "encoder.layers.encoder_layer_0", "reshape": "tokens"}
    net, x = vit(), images()[:1]
    traced = make_fx(lambda x: saliency.grad_cam(net, x, target, **options))(x)
    assert_close(traced(x + 1), saliency.grad_cam(net, x + 1, target, **options))


class Mix2d(nn.Module):
    """Of (N, h, w, C), as in timm's Sequencer2D, whose name says otherwise."""

    def __init__(self, channels):
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(channels), nn.Linear(channels, channels)

    def forward(self, x):
        return x + self.mix(self.norm(x))


class Shrink2d(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 2, 2)

    def forward(self, x):
        return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Sequencer(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.stem, self.first, self.shrink = nn.Conv2d(3, channels, 1), Mix2d(channels), Shrink2d(channels)
        self.second, self.head = Mix2d(channels), nn.Linear(channels, 4)

    def forward(self, x):
        x = self.first(self.stem(x).permute(0, 2, 3, 1))
        return self.head(self.second(self.shrink(x)).mean((1, 2)))


@pytest.mark.parametrize("layer", ["first", "shrink", "second"])
@pytest.mark.parametrize("size", [(8, 8), (8, 12)])
@pytest.mark.parametrize("channels", [4, 16])
def test_channels_last_under_a_name_of_images_is_asked_about(channels, size, layer):
    net, x = Sequencer(channels), torch.rand(2, 3, *size)
    if (channels, layer, size) != (4, "shrink", (8, 8)):  # as many channels as columns, and no other sign
        with pytest.raises(ValueError, match="reshape='channels_last'"):
            saliency.grad_cam(net, x, 1, layer=layer)
    assert saliency.grad_cam(net, x, 1, layer=layer, reshape="channels_last").shape == (2, 1, *size)
