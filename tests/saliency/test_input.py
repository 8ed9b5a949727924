"""What the saliency methods refuse, and how they say so."""

import math

import pytest
import torch
from torch import nn

from salnb import saliency
from tests.helpers.networks import conv_bn


def images(n=2, size=12):
    return torch.rand(n, 3, size, size)


BAD = {
    "not-a-tensor": (lambda x: ([[1.0]], 0, {}), TypeError, r"images must be a torch.Tensor .* got list"),
    "integers": (lambda x: ((x * 255).byte(), 0, {}), TypeError, r"images must be .* floating-point .* torch.uint8"),
    "three-dimensions": (lambda x: (x[0], 0, {}), ValueError, r"images must have four dimensions.* \(3, 12, 12\)"),
    "empty": (lambda x: (x[:0], 0, {}), ValueError, r"images .* got \(0, 3, 12, 12\)"),
    "nan": (lambda x: (x.index_fill(3, torch.tensor(2), math.nan), 0, {}), ValueError, r"images must be finite.*NaN"),
    "class-too-high": (lambda x: (x, 4, {}), ValueError, r"target must lie in 0 … 3, got 4"),
    "class-negative": (lambda x: (x, torch.tensor([0, -1]), {}), ValueError, r"target must lie in 0 … 3, got -1"),
    "too-few-classes": (lambda x: (x, torch.tensor([0]), {}), ValueError, r"target must have shape \(2,\).*\(1,\)"),
    "weights-misfit": (lambda x: (x, torch.rand(2, 3), {}), ValueError, r"target weights .* \(2, 4\).*\(2, 3\)"),
    "target-type": (lambda x: (x, "cat", {}), TypeError, r"target must be None, an int or a tensor, got str"),
    "target-bool": (lambda x: (x, torch.tensor([True, False]), {}), TypeError, r"target .* torch.bool"),
    "target-complex": (lambda x: (x, torch.ones(2).cfloat(), {}), TypeError, r"target .* torch.complex64"),
    "unsigned": (lambda x: (x, torch.tensor([0, 4]).to(torch.uint16), {}), ValueError, "target must lie in 0 … 3, got 4"),
    "output": (lambda x: (x, 0, {"output": 0}), TypeError, r"output must be a function .* got 0"),
    "model_kwargs": (lambda x: (x, 0, {"model_kwargs": [1]}), TypeError, r"model_kwargs must be a mapping .* got \[1\]"),
    "reduce": (lambda x: (x, 0, {"reduce": "mean"}), ValueError, r"reduce must be 'max' or None, got 'mean'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    change, error, message = BAD[case]
    x, target, kwargs = change(images())
    with pytest.raises(error, match=message):
        saliency.vanilla_gradient(conv_bn().eval(), x, target, **kwargs)


def test_what_is_no_model_or_generator_is_named():
    with pytest.raises(TypeError, match=r"model must be an nn.Module, got 'resnet18'"):
        saliency.vanilla_gradient("resnet18", images(), 0)
    with pytest.raises(TypeError, match=r"generator must be a torch.Generator or None, got 42"):
        saliency.smoothgrad(conv_bn().eval(), images(), 0, generator=42)


def test_unsigned_labels():
    model, x, labels = conv_bn().eval(), images(), torch.tensor([0, 3])
    maps = saliency.vanilla_gradient(model, x, labels.to(torch.uint16))
    assert torch.equal(maps, saliency.vanilla_gradient(model, x, labels))


def test_bad_layers_are_named():
    model, x = conv_bn().eval(), images()
    with pytest.raises(ValueError, match=r"layer '33' is unknown.*known: 0, 1"):
        saliency.grad_cam(model, x, layer="33")
    with pytest.raises(ValueError, match="layer must be a module of the model"):
        saliency.grad_cam(model, x, layer=nn.Conv2d(3, 3, 1))
    with pytest.raises(TypeError, match="layer must be a module, a dotted name or None, got int"):
        saliency.grad_cam(model, x, layer=3)
    with pytest.raises(ValueError, match=r"\(N, C, h, w\), got \(2, 4\)"):
        saliency.grad_cam(model, x, layer="8")
    with pytest.raises(ValueError, match="more than one pixel"):
        saliency.grad_cam(model, x, layer="6")
    linear = nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, 4))
    with pytest.raises(ValueError, match=r"last nn.Conv2d, but the model has none"):
        saliency.grad_cam(linear, x)
    unused = conv_bn().eval()
    unused.register_forward_pre_hook(lambda *_: None)
    unused.spare = nn.Conv2d(3, 3, 1)
    unused.forward = lambda x: nn.Sequential(*list(unused)[:9])(x)
    with pytest.raises(ValueError, match="never calls"):
        saliency.grad_cam(unused, x, layer="spare")


def test_models_without_logits_are_named():
    with pytest.raises(
        ValueError, match=r"model must return logits of shape \(N, K\) with N = 2, got \(2, 3, 12, 12\)"
    ):
        saliency.vanilla_gradient(nn.Identity(), images())


@pytest.mark.parametrize(
    "kwargs", [{"n_samples": 0}, {"noise_level": -0.1}, {"noise_level": math.nan}], ids=str
)
def test_smoothgrad_checks_its_numbers(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        saliency.smoothgrad(conv_bn().eval(), images(), **kwargs)
