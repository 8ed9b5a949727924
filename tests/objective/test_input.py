"""Bad settings, batches and models: each is named in one clear error."""

import math
import warnings

import pytest
import torch
from torch import nn

from salnb import Objective
from salnb.augment import HorizontalFlip, Identity, MixUp
from tests.helpers.networks import conv_bn
from tests.helpers.tolerances import assert_close

TARGET = torch.tensor([0, 1, 2, 3])


def images():
    return torch.rand(4, 3, 8, 8)


SMOOTH = {"method": "smoothgrad", "warmup": 1000}
BAD_SETTINGS = {
    "alpha-negative": ({"alpha": -1.0}, ValueError, "alpha must be a finite number of at least 0, got -1"),
    "gamma-nan": ({"gamma": math.nan}, ValueError, "gamma must be .* got nan"),
    "beta-infinite": ({"beta": math.inf, "layers": ["0"]}, ValueError, "beta must be .* got inf"),
    "method": ({"method": "gradcam"}, ValueError, r"method 'gradcam' is unknown \(did you mean 'grad_cam'\?\)"),
    "normalize": ({"normalize": "min"}, ValueError, "normalize 'min' is unknown"),
    "distance": ({"distance": "l3"}, ValueError, "distance 'l3' is unknown"),
    "layer-distance": ({"layer_distance": "l0"}, ValueError, "layer_distance 'l0' is unknown"),
    "alpha-word": ({"alpha": "1"}, TypeError, "alpha must be a finite number of at least 0, got '1'"),
    "alpha-several": ({"alpha": torch.ones(2)}, TypeError, "alpha must be a finite number of at least 0, got tensor"),
    "gamma-none": ({"gamma": None}, TypeError, "gamma must be .* got None"),
    "balance-none": ({"balance": None}, TypeError, "balance must be .* got None"),
    "confidence-none": ({"confidence": None}, TypeError, "confidence must be .* got None"),
    "consistency-word": ({"consistency": "1"}, TypeError, "consistency must be .* got '1'"),
    "every-none": ({"every": None}, TypeError, "every must be a whole number in .* got None"),
    "every-float": ({"every": 2.5}, TypeError, "every must be a whole number in .* got 2.5"),
    "warmup-float": ({"warmup": 1.5}, TypeError, "warmup must be a whole number in .* got 1.5"),
    "pool-float": ({"pool": 2.5}, TypeError, "pool must be a whole number in .* got 2.5"),
    "layers-word": ({"beta": 1.0, "layers": "03"}, TypeError, "layers must be a sequence of names, .* got '03'"),
    "layers-number": ({"beta": 1.0, "layers": 3}, TypeError, "layers must be a sequence of names, .* got 3"),
    "layers-numbers": ({"beta": 1.0, "layers": [3]}, TypeError, "layers must hold names of modules, got 3"),
    "layer-nan": ({"beta": 1.0, "layers": {"3": math.nan}}, ValueError, r"layers\['3'\] must lie in \[0, .* got nan"),
    "layer-negative": ({"beta": 1.0, "layers": {"3": -1.0}}, ValueError, r"layers\['3'\] must lie in \[0, .* got -1"),
    "layer-weight-word": ({"beta": 1.0, "layers": {"3": "a"}}, TypeError, r"layers\['3'\] must be a number .* got 'a'"),
    "num-classes": ({"num_classes": "4"}, TypeError, "num_classes must be a whole number in .* got '4'"),
    "output": ({"output": "logits"}, TypeError, "output must be a function .* got 'logits'"),
    "class-loss": ({"class_loss": nn.CrossEntropyLoss}, TypeError, "class_loss must be .* got the class CrossEntropyLoss"),
    "every": ({"every": 0}, ValueError, "every must be at least 1, got 0"),
    "warmup": ({"warmup": -1}, ValueError, "warmup must be at least 0, got -1"),
    "layer": ({"beta": 1.0, "layers": ["conv"]}, ValueError, "layers 'conv' is unknown; known: 0, 1"),
    "beta-alone": ({"beta": 1.0}, ValueError, "beta and layers go together"),
    "layers-alone": ({"layers": ["0"]}, ValueError, "beta and layers go together"),
    "option": ({"method_options": {"layer": "3"}}, ValueError, "method_options of vanilla_gradient 'layer' is unknown"),
    "n_samples-0": ({**SMOOTH, "method_options": {"n_samples": 0}}, ValueError, r"n_samples must lie in \[1, 1e\+09\], got 0"),
    "n_samples-float": ({**SMOOTH, "method_options": {"n_samples": 2.5}}, TypeError, "n_samples must be a whole number in .* got 2.5"),
    "n_samples-word": ({**SMOOTH, "method_options": {"n_samples": "3"}}, TypeError, "n_samples must be a whole number in .* got '3'"),
    "noise_level": ({**SMOOTH, "method_options": {"noise_level": -1}}, ValueError, "noise_level must lie in .* got -1"),
    "noise_level-nan": ({**SMOOTH, "method_options": {"noise_level": math.nan}}, ValueError, "noise_level must lie in .* got nan"),
    "cam-layer": ({"method": "grad_cam", "method_options": {"layer": "33"}}, ValueError, "layer '33' is unknown"),
    "augmentation": ({"augmentation": torch.nn.Identity()}, TypeError, "augmentation must be one of salnb.augment, got Identity"),
    "model": ({"model": lambda x: x}, TypeError, "model must be an nn.Module, got function"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_bad_settings_are_named(case):
    settings, error, message = BAD_SETTINGS[case]
    with pytest.raises(error, match=message):
        Objective(**{"model": conv_bn(), "augmentation": Identity(), **settings})


BAD_BATCHES = {
    "integers": (lambda x: ((x * 255).byte(), TARGET), TypeError, r"images must be .* floating-point"),
    "three-dimensions": (lambda x: (x[0], TARGET), ValueError, "images must have four dimensions"),
    "no-target": (
        lambda x: (x, None),
        ValueError,
        r"target must be a tensor \(4,\) or \(4, K\), got NoneType",
    ),
    "target-too-short": (
        lambda x: (x, TARGET[:3]),
        ValueError,
        r"target must be a tensor \(4,\).*got \(3,\)",
    ),
    "target-floats": (
        lambda x: (x, TARGET.double()),
        TypeError,
        "must hold integer labels, got torch.float64",
    ),
    "label-too-high": (lambda x: (x, TARGET + 1), ValueError, "target must lie in 0 … 3, got 4"),
    "label-negative": (lambda x: (x, TARGET - 1), ValueError, "target must lie in 0 … 3, got -1"),
    "target-complex": (lambda x: (x, TARGET.cfloat()), TypeError, "integer labels, got torch.complex64"),
    "weights-complex": (
        lambda x: (x, torch.eye(4).cfloat()),
        TypeError,
        "weights of classes, got torch.complex64",
    ),
    "unsigned-too-high": (lambda x: (x, (TARGET + 1).to(torch.uint16)), ValueError, "lie in 0 … 3, got 4"),
    "weights-misfit": (
        lambda x: (x, torch.full((4, 7), 1 / 7)),
        ValueError,
        r"weights must be \(4, 4\), got \(4, 7\)",
    ),
}


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_bad_batches_are_named(case):
    change, error, message = BAD_BATCHES[case]
    with pytest.raises(error, match=message):
        Objective(conv_bn(), Identity(), num_classes=4)(*change(images()))


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"model_kwargs": [1]}, TypeError, r"model_kwargs must be a mapping from names, or None, got \[1\]"),
        ({"partners": [1]}, TypeError, "partners must be a tensor like images, got list"),
        ({"partners": images().double()}, TypeError, "partners must have the dtype .*float32, got .*float64"),
        ({"masks": [1]}, TypeError, r"masks must be a tensor of booleans \(4, 1, 8, 8\), got list"),
    ],
    ids=["model_kwargs", "partners", "partners of another dtype", "masks"],
)
def test_what_comes_beside_a_batch_is_named(kwargs, error, message):
    with pytest.raises(error, match=message):
        Objective(conv_bn(), Identity())(images(), TARGET, **kwargs)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64], ids=str)
@pytest.mark.parametrize("augmentation", [HorizontalFlip(1), MixUp()], ids=["flip", "mixup"])
def test_labels_of_every_integer_type(augmentation, dtype):
    x, model = images(), conv_bn().eval()

    def total(target):
        return Objective(model, augmentation)(x, target, torch.Generator().manual_seed(1)).total

    assert_close(total(TARGET.to(dtype)), total(TARGET))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("augmentation", [HorizontalFlip(1), MixUp()], ids=["flip", "mixup"])
def test_one_hot_integers_are_weights(augmentation, dtype):
    x, model = images(), conv_bn().eval()

    def total(target):
        return Objective(model, augmentation)(x, target, torch.Generator().manual_seed(1)).total

    assert_close(total(torch.eye(4).to(dtype)), total(torch.eye(4)))


class Unused(nn.Sequential):
    def forward(self, x):
        return self[8](x.mean((2, 3)).repeat(1, 2))


def test_bad_models_are_named():
    x = images()
    with pytest.raises(ValueError, match=r"model must return logits \(2N, K\) = \(8, 7\), got \(8, 4\)"):
        Objective(conv_bn(), Identity(), num_classes=7)(x, TARGET)
    with pytest.raises(ValueError, match=r"model must return logits \(2N, K\).*got \(8, 3, 8, 8\)"):
        Objective(nn.Identity(), Identity())(x, TARGET)
    with pytest.raises(ValueError, match="the forward pass of the model never calls its module '3'"):
        Objective(Unused(*conv_bn()), Identity(), beta=1.0, layers=["3"])(x, TARGET)
    with pytest.raises(TypeError, match="'0' must return a tensor, got tuple"):
        Objective(nn.Sequential(Pair(), First(), *conv_bn()), Identity(), beta=1.0, layers=["0"])(x, TARGET)


class Pair(nn.Module):
    def forward(self, x):
        return x, x


class First(nn.Module):
    def forward(self, pair):
        return pair[0]


@pytest.mark.parametrize("cut", ["frozen", "no_grad"])
def test_features_that_cannot_be_trained_are_told(cut):
    model = conv_bn()
    if cut == "frozen":
        model[0].requires_grad_(False)
    else:
        plain = model[0].forward
        model[0].forward = lambda x: torch.no_grad()(plain)(x)
    objective = Objective(model, HorizontalFlip(1.0), beta=1.0, gamma=0.0, layers=["0", "3"])
    with pytest.warns(UserWarning, match="layers: '0' gives features without a gradient") as told:
        objective(images(), TARGET).total.backward()
    assert len(told) == 1
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        objective(images(), TARGET)
