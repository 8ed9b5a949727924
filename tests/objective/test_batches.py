"""Targets, logits and features that the losses were not made for; layers that run several times."""

import re

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import nn

from salnb import Objective, saliency
from salnb.augment import CutMix, HorizontalFlip, MixUp
from salnb.double_backward import second_derivatives_of_pytorch
from salnb.losses import class_loss
from tests.helpers.networks import conv_bn
from tests.helpers.tolerances import assert_close

TARGET = torch.tensor([0, 1, 2, 3])
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def images(n=4):
    return torch.rand(n, 3, 8, 8)


def calls(target, logits=None):
    """The ways to a class loss: the function, and an objective with and without the other terms, compiled too."""
    yield lambda: class_loss(torch.zeros(4, 4) if logits is None else logits, target)
    for options in ({"gamma": 0.0}, {}, {"augmentation": MixUp()}, {"compile": True}):
        model = conv_bn(num_classes=4 if logits is None else logits.shape[1])
        objective = Objective(
            model, options.get("augmentation", HorizontalFlip()), gamma=options.get("gamma", 1.0)
        )
        if "compile" in options:
            objective.compile(backend="eager")
        yield lambda objective=objective: objective(images(), target)


# --- one logit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target", [TARGET[:, None].float() / 3, torch.zeros(4, dtype=torch.long)], ids=["floats", "labels"]
)
def test_one_logit_is_refused(target):
    for call in calls(target, torch.zeros(4, 1)):
        if target.ndim == 1 or call.__defaults__ is None:
            with pytest.raises(
                ValueError, match=r"logits of two classes or more, got \(\d, 1\), .* torch.cat\(\["
            ):
                call()


def test_the_way_out_is_the_binary_cross_entropy():
    z = torch.randn(6, 1, requires_grad=True)
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    loss = class_loss(torch.cat([torch.zeros_like(z), z], 1), labels)
    expected = F.binary_cross_entropy_with_logits(z[:, 0], labels.float())
    assert_close(loss, expected)
    assert_close(*(torch.autograd.grad(value, z)[0] for value in (loss, expected)))


# --- weights of classes -------------------------------------------------------------------------------------


BAD = {
    "multi-hot": torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
    "none": torch.zeros(4, 4),
    "percent": torch.eye(4) * 100,
    "not normalised": torch.full((4, 4), 0.3),
    "negative": torch.eye(4) + torch.tensor([[0.5, -0.5, 0, 0]]),
    "not a number": torch.full((4, 4), float("nan")),
    "integers": torch.ones(4, 4, dtype=torch.long),
}  # fmt: skip


@pytest.mark.parametrize("target", BAD.values(), ids=BAD)
def test_weights_that_are_no_distribution_are_refused(target):
    for call in calls(target):
        with pytest.raises(
            (ValueError, TypeError), match=r"sum to one in each row, got a sum of|integer labels \(N,\)"
        ):
            call()


def test_the_row_is_named():
    with pytest.raises(ValueError, match=r"got a sum of 2 and a least weight of 0 in row 1: .* softmax"):
        class_loss(torch.zeros(4, 4), BAD["multi-hot"])


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 1000), st.sampled_from(DTYPES), st.floats(0, 0.5), st.integers(0, 2**31))
def test_distributions_are_taken_in_every_precision(k, dtype, smoothing, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, k, generator=generator)
    labels = torch.randint(k, (3,), generator=generator)
    smooth = (F.one_hot(labels, k) * (1 - smoothing) + smoothing / k).to(dtype)
    assert class_loss(logits, smooth).isfinite()
    assert class_loss(logits, torch.randn(3, k, generator=generator).softmax(1).to(dtype)).isfinite()
    assert_close(class_loss(logits, F.one_hot(labels, k)), class_loss(logits, labels))


@pytest.mark.parametrize("augmentation", [MixUp(), CutMix()], ids=["mixup", "cutmix"])
def test_mixed_targets_are_taken(augmentation):
    smooth = F.one_hot(TARGET, 4) * 0.9 + 0.025
    for target in (TARGET, smooth):
        assert Objective(conv_bn(), augmentation)(images(), target).total.isfinite()


def test_maps_are_of_any_weighted_sum():
    """Of scores, no distribution is asked for."""
    assert saliency.vanilla_gradient(conv_bn(), images(), BAD["multi-hot"]).isfinite().all()


def test_on_other_devices_only_the_first_target_is_looked_at(monkeypatch):
    seen = []
    monkeypatch.setattr("salnb.objective.objective.check_normalized", lambda target, wait: seen.append(wait))
    objective = Objective(conv_bn(), HorizontalFlip())
    for _ in range(3):
        objective(images(), TARGET)
    assert seen == [True]


# --- features of eq. 6 --------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Rows of the image as a sequence, (L, N, C) or (N, L, C)."""

    def __init__(self, encoder, *, batch_first):
        super().__init__()
        self.encoder, self.batch_first = encoder, batch_first
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 4)

    def forward(self, x):
        rows = x.permute(0, 2, 1, 3).flatten(2)
        rows = rows if self.batch_first else rows.transpose(0, 1)
        out = self.encoder(rows)
        out = self.norm(out[0] if isinstance(out, tuple) else out)
        return self.head(out.mean(1 if self.batch_first else 0))


def transformer(batch_first):
    return nn.TransformerEncoderLayer(24, 2, 8, batch_first=batch_first, dropout=0.0)


@pytest.mark.parametrize(
    "n", [3, 4]
)  # with four, a sequence is as long as the batch of originals and augmented
@pytest.mark.parametrize("layers", [1, 2])
def test_sequences_that_come_first_are_refused(layers, n):
    for batch_first in (True, False):
        encoder = transformer(batch_first)
        if layers == 2:
            encoder = nn.TransformerEncoder(encoder, 2, enable_nested_tensor=False)
        objective = Objective(
            Encoder(encoder, batch_first=batch_first), HorizontalFlip(), beta=1.0, layers=["encoder"]
        )
        if batch_first:
            assert objective(images(n), TARGET[:n]).invariance_loss > 0
            continue
        message = (
            f"layers: 'encoder' must return .* ({2 * n}, ...), got (8, {2 * n}, 24) of torch.float32: name"
        )
        with pytest.raises(ValueError, match=re.escape(message).replace(r"\.\*", ".*")):
            objective(images(n), TARGET[:n])


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("part", ["norm2", "linear1", "linear2", "dropout2", None])
def test_so_are_parts_of_them_and_what_follows(part, layers):
    for batch_first in (True, False):
        encoder = transformer(batch_first)
        if layers == 2:
            encoder = nn.TransformerEncoder(encoder, 2, enable_nested_tensor=False)
        place = "encoder" if layers == 1 else "encoder.layers.0"
        name = "norm" if part is None else f"{place}.{part}"
        model = Encoder(encoder, batch_first=batch_first)
        objective = Objective(model, HorizontalFlip(), gamma=0.0, beta=1.0, layers=[name])
        if batch_first:
            assert objective(images(), TARGET).invariance_loss > 0
            continue
        with pytest.raises(ValueError, match=f"layers: '{name}' must return .*batch_first=True"):
            objective(images(), TARGET)


def test_a_recurrent_network_beside_the_layer_is_no_matter():
    model = Encoder(nn.GRU(24, 24), batch_first=False)
    model.norm, model.first = nn.Identity(), nn.Conv2d(3, 3, 1)
    model.register_forward_pre_hook(lambda module, args: module.first(args[0]))
    objective = Objective(model, HorizontalFlip(), gamma=0.0, beta=1.0, layers=["first"])
    assert objective(images(), TARGET).invariance_loss > 0


def test_what_is_no_tensor_of_numbers_is_refused():
    model = Encoder(nn.GRU(24, 24, batch_first=True), batch_first=True)
    with pytest.raises(TypeError, match="layers: 'encoder' must return a tensor, got tuple"):
        Objective(model, HorizontalFlip(), gamma=0.0, beta=1.0, layers=["encoder"])(images(), TARGET)


class Scalar(nn.Module):
    def forward(self, x):
        return x.mean()


class Means(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + self.scalar(x)


@pytest.mark.parametrize("layer", ["scalar", "flips"])
def test_features_of_another_batch_are_refused(layer):
    model = Means(*conv_bn())
    model.scalar = Scalar()
    if layer == "flips":
        model[0] = nn.Sequential(Stacked(), model[0], Unstacked())
        layer = "0.1"
    objective = Objective(model, HorizontalFlip(), gamma=0.0, beta=1.0, layers=[layer])
    with pytest.raises(ValueError, match=rf"layers: '{layer}' must return .* \(8, \.\.\.\), got \("):
        objective(images(), TARGET)


class Stacked(nn.Module):
    def forward(self, x):
        return torch.cat([x, x.flip(3)])


class Unstacked(nn.Module):
    def forward(self, x):
        return x[: len(x) // 2]


class Twice(nn.Module):
    """One module under two names and in two places."""

    def __init__(self):
        super().__init__()
        self.first, self.act, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Tanh(), nn.Linear(192, 4)
        self.again = self.first

    def forward(self, x):
        self.calls = [self.first(x)]
        self.calls.append(self.again(self.act(self.calls[0])))
        return self.head(self.act(self.calls[1]).flatten(1))


@pytest.mark.parametrize("layer", ["first", "again"])
def test_of_a_layer_that_runs_twice_the_last_call_counts(layer):
    model = Twice()
    found = Objective(model, HorizontalFlip(1.0), beta=1.0, layers=[layer])(images(), TARGET)
    a, b = model.calls[1].chunk(2)
    assert_close(found.invariance_loss, (a - b).square().mean())
    found.total.backward()
    assert model.first.weight.grad.abs().max() > 0


# --- derivatives and transforms -----------------------------------------------------------------------------


def test_a_third_derivative_is_told_in_the_users_terms():
    objective = Objective(conv_bn().double(), HorizontalFlip())
    x = images().double()
    loss = objective(x, TARGET).saliency_loss
    gradients = torch.autograd.grad(loss, list(objective.parameters()), create_graph=True, allow_unused=True)
    with pytest.raises(RuntimeError, match=r"a loss of salnb.Objective can be differentiated once"):
        sum(g.square().sum() for g in gradients if g is not None).backward()


class Energy(nn.Module):
    """Looks at the gradient of an energy."""

    def __init__(self):
        super().__init__()
        self.energy, self.rest = nn.Conv2d(3, 4, 3), conv_bn()

    def forward(self, x):
        (force,) = torch.autograd.grad(self.energy(x).tanh().sum(), x, create_graph=True)
        return self.rest(force)


def test_a_model_that_takes_a_gradient_needs_the_derivatives_of_pytorch():
    model, x = Energy().double().eval(), images().double()
    both = torch.cat([x, x.flip(-1)]).requires_grad_()
    objective = Objective(model, HorizontalFlip(1.0), normalize=None)
    with pytest.raises(RuntimeError, match=r"takes a gradient .*second_derivatives_of_pytorch\(\)"):
        objective(x, TARGET).total.backward()
    with second_derivatives_of_pytorch():
        loss = objective(x, TARGET).saliency_loss
        found = torch.autograd.grad(loss, list(model.energy.parameters()))
    score = model(both).gather(1, TARGET.repeat(2)[:, None]).sum()
    (gradient,) = torch.autograd.grad(score, both, create_graph=True)
    maps = gradient.abs().amax(1, keepdim=True)
    expected = (maps[:4] - maps[4:].flip(-1)).square().mean()
    assert_close(loss, expected)
    for a, b in zip(found, torch.autograd.grad(expected, list(model.energy.parameters())), strict=True):
        assert_close(a, b)


def test_transforms_are_told():
    objective = Objective(conv_bn().eval(), HorizontalFlip(1.0)).eval()
    parameters, x = dict(objective.named_parameters()), images()

    def total(parameters, x):
        return torch.func.functional_call(objective, parameters, (x, TARGET)).total

    for call in (
        lambda: torch.vmap(total, (None, 0))(parameters, x[None]),
        lambda: torch.func.grad(total)(parameters, x),
        lambda: torch.func.jvp(lambda z: total(parameters, z), (x,), (x,)),
    ):
        with pytest.raises(RuntimeError, match=r"transforms of torch.func do not work here"):
            call()
    objective.gamma = 0.0
    gradient = torch.func.grad(total)(parameters, x)["model.0.weight"]
    objective(x, TARGET).total.backward()
    assert_close(gradient, objective.model[0].weight.grad, 1e-5)


@pytest.mark.parametrize("method", ["smoothgrad", "vanilla_gradient", "grad_cam"])
def test_a_network_that_works_in_place_on_its_input(method):
    x = images()
    before, first = x.clone(), conv_bn(nn.ReLU)
    options = {
        "method": method,
        "method_options": {"n_samples": 2, "noise_level": 0.0} if method == "smoothgrad" else {},
    }
    plain = nn.Sequential(nn.LeakyReLU(0.3), first)
    in_place = nn.Sequential(nn.LeakyReLU(0.3, inplace=True), first)
    losses = [
        Objective(m.eval(), HorizontalFlip(1.0), **options)(x - 0.5, TARGET).saliency_loss
        for m in (plain, in_place)
    ]
    assert_close(*losses)
    assert torch.equal(x, before)


class Detached(nn.Sequential):
    def forward(self, x):
        return super().forward(x.detach())


class Frozen(nn.Sequential):
    def forward(self, x):
        with torch.no_grad():
            x = self[0](x)
        return super().forward(x.tile(1, 1, 1, 1)[:, :3])


@pytest.mark.parametrize("method", sorted(saliency.METHODS))
@pytest.mark.parametrize("network", [Detached, Frozen])
def test_a_network_through_which_no_gradient_flows(network, method):
    model = network(*conv_bn())
    if network is Frozen:
        model[0] = nn.Conv2d(3, 3, 1)
        model[1], model[3] = nn.BatchNorm2d(3), nn.Conv2d(3, 6, 3)
    options = {"layer": "0"} if "cam" in method and network is Frozen else {}
    objective = Objective(model, HorizontalFlip(), method=method, method_options=options)
    if method == "grad_cam":
        objective(images(), TARGET).total.backward()
        return
    with pytest.raises((ValueError, RuntimeError), match="no gradient") as error:
        objective(images(), TARGET)
    assert "allow_unused" not in str(error.value)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_model_made_in_inference_mode(context):
    with context():
        model = conv_bn()
        if context is torch.inference_mode:
            with pytest.raises(ValueError, match=r"model must be made outside of torch.inference_mode\(\)"):
                Objective(model, HorizontalFlip())
        else:
            Objective(model, HorizontalFlip())(images(), TARGET)


class Auxiliary(nn.Sequential):
    """Its last convolution never runs, as that of GoogLeNet's auxiliary head in eval mode."""

    def __init__(self):
        super().__init__(*conv_bn())
        self.auxiliary = nn.Conv2d(6, 6, 1)

    def forward(self, x):
        for layer in list(self)[:-1]:
            x = layer(x)
        return x


def test_the_default_layer_is_the_last_convolution_that_ran():
    model, x = Auxiliary(), images()
    objectives = (
        Objective(model.eval(), HorizontalFlip(1.0), method="grad_cam", method_options=options)
        for options in ({}, {"layer": "3"})
    )
    assert_close(*(objective(x, TARGET).saliency_loss for objective in objectives))
