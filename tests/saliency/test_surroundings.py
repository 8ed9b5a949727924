"""Where saliency methods run, and with what: inference mode, transforms, targets, half precision, no gradient."""

import copy
import inspect
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from salnb import saliency, trust
from tests.helpers.networks import conv_bn
from tests.helpers.surroundings import (
    GRAPH,
    METHODS,
    First,
    Meanwhile,
    Moving,
    explain,
    images,
)
from tests.helpers.tolerances import assert_close

# --- inference mode -----------------------------------------------------------------------------------------


@GRAPH
@METHODS
@pytest.mark.parametrize(
    "target", [None, 1, torch.tensor([1, 2]), torch.rand(2, 4)], ids=lambda t: str(t)[:6]
)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_what_was_made_in_inference_mode_is_used(method, target, context, create_graph):
    model = First(Moving()).eval()
    expected = explain(method, model, images(), target)
    with context():
        made = target.clone() if isinstance(target, torch.Tensor) else target
        x = images().clone()
        inside = explain(method, model, x, made, create_graph=create_graph)
    outside = explain(method, model, x, made, create_graph=create_graph)
    for found in (inside, outside):
        assert_close(found.detach(), expected)
        assert found.requires_grad == create_graph
        assert not found.is_inference()


def test_curves_take_what_was_made_in_inference_mode():
    model = First(Moving()).eval()
    with torch.inference_mode():
        x, maps, target, grey = images(), torch.rand(2, 1, 8, 8), torch.tensor([1, 2]), torch.tensor(0.5)
        inside = trust.deletion_curve(model, x, maps, target, replacement=grey, steps=3)
        masks = maps > 0.5
        trust.share_on_object(maps, masks)
    assert_close(trust.deletion_curve(model, x, maps, target, replacement=grey, steps=3), inside)
    trust.share_on_object(maps, masks)


@METHODS
@pytest.mark.parametrize("what", ["parameter", "buffer"])
def test_a_model_made_in_inference_mode_is_refused(method, what):
    model = conv_bn().eval()
    with torch.inference_mode():
        if what == "parameter":
            model[3] = nn.Conv2d(5, 6, 3, padding=1)
        else:
            model[1].running_mean = torch.zeros(5)
    name = "Conv2d whose weight" if what == "parameter" else "BatchNorm2d whose running_mean"
    with pytest.raises(ValueError, match=rf"outside of torch.inference_mode\(\), got a {name}"):
        explain(method, model, images())
    explain(method, copy.deepcopy(model), images())


@METHODS
def test_transforms_of_functions_are_refused_in_plain_words(method):
    model, x = conv_bn().eval(), images()
    with pytest.raises(RuntimeError, match=r"torch.vmap .* call this outside of them, with the whole batch"):
        torch.vmap(lambda image: explain(method, model, image[None])[0])(x)
    with pytest.raises(RuntimeError, match=r"transforms of torch.func do not work here"):
        torch.func.grad(lambda x: explain(method, model, x).sum())(x)


def test_transforms_of_curves_are_refused_in_plain_words():
    model, x, maps = conv_bn().eval(), images(), torch.rand(2, 1, 8, 8)
    with pytest.raises(RuntimeError, match="call this outside of them, with the whole batch"):
        torch.vmap(lambda i, m: trust.deletion_curve(model, i[None], m[None], replacement=x[:1]))(x, maps)
    with pytest.raises(RuntimeError, match="call this outside of them, with the whole batch"):
        torch.vmap(lambda m: trust.rank_correlation(m[None], m[None]))(maps)


# --- targets ------------------------------------------------------------------------------------------------


@METHODS
@pytest.mark.parametrize(
    "target", [np.int64(2), np.uint8(2), np.array(2), torch.tensor(2), torch.tensor(2, dtype=torch.uint8)], ids=repr
)  # fmt: skip
def test_all_that_is_an_integer_is_a_class(method, target):
    model, x = conv_bn().eval(), images()
    assert torch.equal(explain(method, model, x, target), explain(method, model, x, 2))
    options = {"replacement": torch.tensor(0.5), "steps": 2}
    maps = torch.arange(128.0).view(2, 1, 8, 8)
    assert_close(trust.deletion_curve(model, x, maps, target, **options), trust.deletion_curve(model, x, maps, 2, **options))  # fmt: skip


@METHODS
@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (np.int64(9), ValueError, r"target must lie in 0 … 3, got 9"),
        (torch.tensor(-1), ValueError, r"target must lie in 0 … 3, got -1"),
        (True, TypeError, "got bool"),
        (np.bool_(True), TypeError, "got bool"),
        (1.0, TypeError, "got float"),
        (np.float64(1), TypeError, "got float64"),
        (np.array([1, 2]), TypeError, "got ndarray"),
        ([1, 2], TypeError, "got list"),
        (torch.tensor(True), TypeError, "torch.bool"),
        (torch.tensor(1.0), ValueError, r"target weights must have shape \(2, 4\)"),
    ],
    ids=repr,
)
def test_all_else_is_not(method, target, error, message):
    with pytest.raises(error, match=message):
        explain(method, conv_bn().eval(), images(), target)


# --- half precision -----------------------------------------------------------------------------------------


class Steep(nn.Module):
    """Scores whose gradient is the same everywhere, and large."""

    def __init__(self, slope):
        super().__init__()
        self.slope = slope
        self.features = nn.Conv2d(3, 64, 1, bias=False)
        nn.init.constant_(self.features.weight, 4.0)

    def forward(self, x):
        return (self.features(x) * self.slope).sum((2, 3))[:, :4] + 0 * self.features(x).sum((2, 3))[:, 4:8]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_many_samples_are_summed_in_float32(dtype):
    model = Steep(1000.0).to(dtype)
    x = images(1, 4).to(dtype)
    found = saliency.smoothgrad(model, x, 0, n_samples=25)
    assert found.dtype is dtype
    assert_close(found, torch.full_like(found, 4000.0))


def test_a_wide_range_of_values_has_a_finite_noise():
    x = torch.linspace(-60000, 60000, 48).view(1, 3, 4, 4).half()
    assert saliency.smoothgrad(Steep(1.0).half(), x, 0, noise_level=0.0, n_samples=2).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_channels_are_summed_in_float32(dtype):
    """A hundred channels of 100, each with a weight of 100, are too much for float16 on the way only."""

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Conv2d(3, 100, 1, bias=False)
            nn.init.constant_(self.features.weight, 100 / 3)
            self.sign = torch.ones(100)
            self.sign[1::2] = -0.99

        def forward(self, x):
            out = self.features(x)
            return (
                (out * self.sign.to(out)[None, :, None, None] * 100)
                .sum((2, 3), dtype=torch.float32)
                .sum(1, keepdim=True)
                .expand(-1, 2)
            )

    model, x = Wide().to(dtype), torch.ones(1, 3, 4, 4, dtype=dtype)
    found = saliency.grad_cam(model, x, 0)
    assert found.dtype is dtype
    assert_close(found.float(), saliency.grad_cam(model.float(), x.float(), 0), 0.05)


@METHODS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_maps_have_the_images_dtype(method, dtype):
    model, x = conv_bn().eval().to(dtype), images().to(dtype)
    assert explain(method, model, x).dtype is dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert explain(method, conv_bn().eval(), images()).dtype is torch.float32


# --- no gradient --------------------------------------------------------------------------------------------


def without_grad(x):
    with torch.no_grad():
        return x * 2


def in_inference_mode(x):
    with torch.inference_mode():
        x = x * 2
    return x.clone()


CUT = {
    "detach": lambda x: x.detach(),
    "no_grad": without_grad,
    "inference_mode": in_inference_mode,
    "data": lambda x: x.data,
    "integers": lambda x: (255 * x).byte().float(),
    "argmax": lambda x: F.one_hot((x * 4).long().clamp(0, 3).amax(1), 4).permute(0, 3, 1, 2)[:, :3].float(),
    "numpy": lambda x: torch.from_numpy(x.detach().numpy()),
    "constant": lambda x: torch.ones_like(x),
}


@METHODS
@pytest.mark.parametrize("cut", CUT)
def test_where_no_gradient_flows_to_the_images_it_says_so(cut, method):
    """Before the layer, Grad-CAM does not need it."""
    model = First(CUT[cut]).eval()
    pixels = method != "grad_cam"
    with pytest.raises(ValueError, match=r"no gradient flows .* images") if pixels else nullcontext():
        explain(method, model, images())


@METHODS
@pytest.mark.parametrize("cut", ["detach", "no_grad", "numpy"])
def test_where_no_gradient_flows_from_the_scores_it_says_so(cut, method):
    model = nn.Sequential(conv_bn(), Meanwhile(CUT[cut])).eval()
    with pytest.raises(ValueError, match="no gradient flows from the model's scores"):
        explain(method, model, images())


@pytest.mark.parametrize("create_graph", [False, True], ids=["map", "map-with-graph"])
def test_a_layer_behind_which_all_is_cut_off(create_graph):
    """What follows it is all that Grad-CAM looks at, and the images are what guided Grad-CAM needs, too."""
    model = First(nn.Conv2d(3, 3, 1)).eval()
    expected = explain("grad_cam", model, images(), layer="first")
    plain = model.first.forward
    model.first.forward = torch.no_grad()(plain)
    found = explain("grad_cam", model, images(), layer="first", create_graph=create_graph)
    assert_close(found, expected)
    assert found.requires_grad is create_graph
    with pytest.raises(ValueError, match="no gradient flows from the model's scores to its images"):
        explain("guided_grad_cam", model, images(), layer="first", create_graph=create_graph)


def test_a_layer_beside_the_way_is_named():
    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.aside = conv_bn(), nn.Conv2d(3, 4, 3)

        def forward(self, x):
            self.aside(x)
            return self.main(x)

    model = Aside().eval()
    with pytest.raises(ValueError, match="no gradient flows from the model's scores to its layer"):
        saliency.grad_cam(model, images(), layer="aside")


@pytest.mark.parametrize("switch", [torch.enable_grad, lambda: torch.set_grad_enabled(True)])
def test_a_network_that_switches_gradients_around_the_layer(switch):
    """The pass that stores nothing before the layer does not fit such a network; another does."""

    class Switching(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = conv_bn()

        def forward(self, x):
            with switch():
                x = self.net[:4](x)
            return self.net[4:](x)

    model = Switching().eval()
    assert_close(saliency.grad_cam(model, images(), 1), saliency.grad_cam(model.net, images(), 1))


@METHODS
def test_recomputed_activations_change_nothing(method):
    from torch.utils.checkpoint import checkpoint

    class Recomputing(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = conv_bn()

        def forward(self, x):
            x = checkpoint(self.net[:2], x, use_reentrant=False)
            x = checkpoint(self.net[2:6], x, use_reentrant=False)
            return self.net[6:](x)

    model = Recomputing().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert_close(explain(method, model, images()), explain(method, model.net, images()))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- torch.compile ------------------------------------------------------------------------------------------


@GRAPH
@METHODS
def test_inside_a_compiled_function(method, create_graph):
    """They run as they are there."""
    model = First(nn.Identity()).eval()
    compiled = torch.compile(
        lambda x: 2 * explain(method, model, x + 1, create_graph=create_graph), backend="eager"
    )
    expected = 2 * explain(method, model, images() + 1, create_graph=create_graph)
    found = compiled(images())
    assert_close(found, expected)
    if create_graph:
        weights = list(model.parameters())[:-1]  # on the last bias no map depends
        pairs = (torch.autograd.grad(maps.square().sum(), weights) for maps in (found, expected))
        for a, b in zip(*pairs, strict=True):
            assert_close(a, b)


def test_signatures_are_those_that_were_written():
    for name, method in saliency.METHODS.items():
        assert [*inspect.signature(method).parameters][:3] == ["model", "images", "target"]
        assert (method.__name__, method.__module__) == (name, "salnb.saliency.methods")
        assert method.__doc__
