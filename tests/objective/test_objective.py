"""The objective: gradients, what must come out as zero, what must cost nothing, and bad input."""

import copy
import warnings
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from salnb import Objective, losses, saliency
from salnb._common.catalog import METHODS
from salnb.augment import AUGMENTATIONS, Affine, HorizontalFlip, Identity, MixUp, Rotation
from salnb.augment.base import everywhere
from salnb.losses import DISTANCES, NORMALIZATIONS
from tests.helpers.finite_differences import assert_gradient
from tests.helpers.methods import ONE_PASS, WITH_RULE, cheap
from tests.helpers.networks import conv_bn
from tests.helpers.tolerances import assert_close

TARGET = torch.tensor([0, 1, 2, 3])


def images(n=4, size=8, dtype=torch.float64):
    return torch.rand(n, 3, size, size, dtype=dtype)


def objective_of(method="vanilla_gradient", augmentation=None, model=None, **kwargs):
    """An objective on a small float64 network with batch norm in train mode."""
    return Objective(
        model or conv_bn().double(),
        augmentation or Rotation(20),
        method=method,
        method_options=cheap(method),
        **kwargs,
    )


def repeatable(objective, x, target=TARGET):
    """A function that computes the losses with the same random numbers each time."""

    def call():
        torch.manual_seed(11)
        return objective(x, target.to(x.device), torch.Generator().manual_seed(7))

    return call


# --- gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", sorted(DISTANCES))
@pytest.mark.parametrize("normalize", sorted(NORMALIZATIONS))
@pytest.mark.parametrize("method", saliency.METHODS)
def test_gradient_of_every_combination(method, normalize, distance, device):
    """Finite differences of the saliency term alone: nothing else can hide an error in it."""
    objective = objective_of(method, normalize=normalize, distance=distance).to(device)
    call = repeatable(objective, images().to(device))
    assert assert_gradient(lambda: call().saliency_loss, objective.parameters()) > 1e-4


@pytest.mark.parametrize("layer_distance", ["l1", "l2"])
@pytest.mark.parametrize("layers", [["2"], {"0": 2.0, "4": 0.5, "8": 3.0}], ids=["one", "weighted"])
def test_gradient_of_the_invariance_term(layers, layer_distance, device):
    objective = objective_of(beta=0.7, gamma=0.0, layers=layers, layer_distance=layer_distance).to(device)
    call = repeatable(objective, images().to(device))
    assert assert_gradient(lambda: call().invariance_loss, objective.parameters()) > 1e-4


@pytest.mark.parametrize("target", ["labels", "mixed"])
@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_gradient_of_the_total_with_every_augmentation(augmentation, target, device):
    objective = objective_of(
        augmentation=AUGMENTATIONS[augmentation](), alpha=0.3, beta=0.5, gamma=2.0, layers=["3"]
    ).to(device)
    labels = TARGET if target == "labels" else torch.rand(4, 4, dtype=torch.float64).softmax(1)
    call = repeatable(objective, images().to(device), labels.to(device))
    assert assert_gradient(lambda: call().total, objective.parameters()) > 1e-4


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("detach_original", [False, True], ids=["both-move", "original-held"])
def test_agrees_with_the_equations_written_out(detach_original, mode, device):
    model = conv_bn().double().train(mode == "train").to(device)
    augmentation, x = Affine(20, translate=(0.1, 0.1)), images().to(device)
    target = TARGET.to(device)
    objective = Objective(
        copy.deepcopy(model), augmentation, alpha=0.3, beta=0.5, gamma=2.0, layers={"3": 1.5}, normalize="l2",
        distance="l1", detach_original=detach_original,
    )  # fmt: skip
    found = objective(x, target, torch.Generator().manual_seed(7))
    found.total.backward()

    params = augmentation.make_params(x, torch.Generator().manual_seed(7))
    pixels = torch.cat([x, augmentation.images(x, params)]).requires_grad_()
    targets = torch.cat([target, target])
    features = model[:4](pixels)
    logits = model[4:](features)
    score = logits.gather(1, targets[:, None]).sum()
    (gradient,) = torch.autograd.grad(score, pixels, create_graph=True)
    maps, new_maps = gradient.abs().max(1, keepdim=True).values.chunk(2)
    maps, new_maps, valid = augmentation.align(maps.detach() if detach_original else maps, new_maps, params)
    expected = (
        F.cross_entropy(logits, targets),
        1.5 * (features[:4] - features[4:]).square().mean(),
        losses.saliency_loss(maps, new_maps, valid, normalize="l2", distance="l1"),
    )
    total = 0.3 * expected[0] + 0.5 * expected[1] + 2.0 * expected[2]
    total.backward()

    for value, by_hand in zip(
        (found.class_loss, found.invariance_loss, found.saliency_loss), expected, strict=True
    ):
        assert_close(value, by_hand)
    assert_close(found.total, total)
    assert_close(found.logits, logits)
    assert not found.logits.requires_grad
    # all parameters in one vector: the true gradient of a bias in front of batch norm is zero
    assert_close(*(torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (objective.model, model)))
    for buffer, by_hand in zip(objective.model.buffers(), model.buffers(), strict=True):
        assert_close(buffer.double(), by_hand.double())


# --- what must be zero or stay the same ---------------------------------------------------------------------


@pytest.mark.parametrize("method", ONE_PASS)
def test_nothing_to_compare_under_the_identity(method):
    objective = objective_of(method, Identity(), beta=1.0, layers=["0", "6"])
    found = objective(images(), TARGET)
    assert found.invariance_loss < 1e-25
    assert found.saliency_loss < 1e-25


@pytest.mark.parametrize("augmentation", ["horizontal_flip", "vertical_flip"])
def test_flips_of_a_network_that_flips_along(augmentation):
    model = conv_bn().double()
    dims = [3] if augmentation == "horizontal_flip" else [2]
    for layer in (model[0], model[3]):
        layer.weight.data = layer.weight.data + layer.weight.data.flip(dims)
    flip = AUGMENTATIONS[augmentation](p=1.0)
    assert objective_of(augmentation=flip, model=model)(images(), TARGET).saliency_loss < 1e-25
    assert objective_of(augmentation=flip)(images(), TARGET).saliency_loss > 1e-3


@pytest.mark.parametrize("normalize", sorted(NORMALIZATIONS - {"none"}))
@pytest.mark.parametrize("factor", [1e-6, 1e4])
def test_a_factor_on_the_scores_changes_nothing(factor, normalize):
    objective = objective_of(normalize=normalize)
    call = repeatable(objective, images())
    expected = call().saliency_loss
    with torch.no_grad():
        objective.model[8].weight *= factor
    assert_close(call().saliency_loss, expected, 1e-9)


class NowhereValid(Identity):
    def align(self, maps, new_maps, params):
        return maps, new_maps, ~everywhere(maps)


class Zero(nn.Sequential):
    """A network whose scores hang on the pixels by nothing."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.extend([nn.Flatten(), nn.Linear(2, 4)])
        nn.init.zeros_(self[5].weight)


DEGENERATE = {
    "zero-maps": (Zero, Rotation(20)),
    "constant-maps": (lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)), Rotation(20)),
    "no-valid-pixel": (conv_bn, NowhereValid()),
    "all-out-of-frame": (conv_bn, Affine(0, translate=(1, 1))),
    "black-images": (conv_bn, Rotation(20)),
}  # fmt: skip


@pytest.mark.parametrize("distance", sorted(DISTANCES))
@pytest.mark.parametrize("normalize", sorted(NORMALIZATIONS))
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_maps_give_finite_gradients(case, normalize, distance):
    make, augmentation = DEGENERATE[case]
    objective = Objective(make(), augmentation, normalize=normalize, distance=distance, gamma=3.0)
    x = images(dtype=torch.float32) * (case != "black-images")
    found = objective(x, TARGET)
    found.total.backward()
    assert found.total.isfinite()
    assert all(p.grad.isfinite().all() for p in objective.parameters())
    if normalize != "none":
        assert max(p.grad.abs().max() for p in objective.parameters()) < 1e3
    if case == "no-valid-pixel":
        assert found.saliency_loss == 0


# --- what it costs, and what it leaves behind ---------------------------------------------------------------


class Spy(nn.Sequential):
    """Notes in what surroundings it was called."""

    def forward(self, x):
        self.seen = {
            "pixels": x.requires_grad,
            "modes": torch._C._len_torch_function_stack(),
            "hooks": sum(len(module._forward_hooks) for module in self.modules()),
        }
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x)


@pytest.mark.parametrize("method", ["vanilla_gradient", "guided_grad_cam", "smoothgrad"])
def test_weights_of_zero_cost_nothing(method):
    objective = objective_of(method, model=Spy(*conv_bn().double()), beta=0.0, gamma=0.0)
    with mock.patch("torch.autograd.grad", side_effect=AssertionError("a gradient was taken")):
        found = objective(images(), TARGET)
    assert objective.model.seen == {"pixels": False, "modes": 0, "hooks": 0}
    assert objective.model.calls == 1
    assert found.saliency_loss == 0
    assert found.invariance_loss == 0
    assert_close(found.total, F.cross_entropy(found.logits, torch.cat([TARGET, TARGET])))


@pytest.mark.parametrize("method", ONE_PASS)
def test_one_forward_pass_serves_all_terms(method):
    objective = objective_of(method, model=Spy(*conv_bn().double()), beta=1.0, layers=["3"])
    objective(images(), TARGET).total.backward()
    assert objective.model.calls == 1
    # for Grad-CAM one on its layer, and one on each convolution: which runs last is to be seen
    assert objective.model.seen["hooks"] == 1 + METHODS[method].layer * (1 + 2)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("method", saliency.METHODS)
def test_the_model_is_left_as_one_forward_pass_leaves_it(method, mode):
    objective = objective_of(method, Identity(), beta=1.0, layers=["3"])
    objective.train(mode == "train")
    x, plain = images(), copy.deepcopy(objective.model)
    plain(torch.cat([x, x]))
    objective(x, TARGET)
    for (name, buffer), expected in zip(objective.model.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(buffer, expected), name
    assert all(p.grad is None for p in objective.parameters())
    assert not any(module._forward_hooks for module in objective.modules())
    assert not x.requires_grad


def test_hooks_are_removed_after_an_error():
    objective = objective_of("grad_cam", beta=1.0, layers=["3"])
    with pytest.raises(RuntimeError):
        objective(torch.rand(4, 5, 8, 8), TARGET)
    assert not any(module._forward_hooks for module in objective.modules())
    assert torch._C._len_torch_function_stack() == 0


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", saliency.METHODS)
def test_validation_without_a_graph(method, context):
    objective = objective_of(method, beta=1.0, layers=["3"]).eval()
    call = repeatable(objective, images())
    expected = call()
    with context():
        found = call()
        objective(images(), TARGET)  # images made in this context
    for field in ("total", "class_loss", "invariance_loss", "saliency_loss", "logits"):
        assert_close(getattr(found, field), getattr(expected, field).detach())
        assert not getattr(found, field).requires_grad
    assert expected.total.requires_grad


def test_batches_made_in_inference_mode_can_be_trained_on():
    x = images()
    with torch.inference_mode():
        made, target = x.clone(), TARGET.clone()
    gradients = []
    for batch in ((x, TARGET), (made, target)):
        torch.manual_seed(0)
        objective = objective_of()
        objective(*batch).total.backward()
        gradients.append([p.grad for p in objective.parameters()])
    for expected, found in zip(*gradients, strict=True):
        assert_close(found, expected)


def test_a_second_derivative_is_looked_for_once(monkeypatch):
    """To go through the graph takes a moment, and it is the same in each step."""
    looked = mock.Mock()
    monkeypatch.setattr("salnb.objective.terms.check_second_derivative", looked)
    objective = objective_of()
    with torch.no_grad():
        objective(images(), TARGET)
    assert looked.call_count == 0
    for _ in range(3):
        objective(images(), TARGET)
    assert looked.call_count == 1


# --- when the saliency term enters --------------------------------------------------------------------------


def weights_of(objective, steps):
    seen = []
    for _ in range(steps):
        seen.append(objective.current_gamma())
        found = objective(images(), TARGET)
        assert (
            (found.saliency_loss > 0) == found.has_saliency == found.detach().has_saliency == (seen[-1] > 0)
        )
        assert_close(found.total, found.class_loss + seen[-1] * found.saliency_loss)
    return seen


def test_every_and_warmup():
    objective = objective_of(every=3, warmup=2, gamma=0.5)
    assert weights_of(objective, 3) == [0, 0, 1.5]
    resumed = objective_of(every=3, warmup=2, gamma=0.5)
    resumed.load_state_dict(objective.state_dict())
    assert weights_of(resumed, 4) == [0, 0, 1.5, 0]
    # validation always looks, and is no step of the training
    resumed.eval()
    assert weights_of(resumed, 2) == [0.5, 0.5]
    resumed.train()
    assert weights_of(resumed, 2) == [0, 1.5]


def test_repeats_with_a_generator():
    objective = objective_of(augmentation=MixUp())
    x = images()
    first, again, other = (objective(x, TARGET, torch.Generator().manual_seed(s)).total for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_changed_weights_act_at_once():
    objective = objective_of(gamma=0.0)
    objective.gamma = 2.0
    found = objective(images(), TARGET)
    assert found.saliency_loss > 0
    assert_close(found.total, found.class_loss + 2 * found.saliency_loss)


def test_images_may_carry_a_graph():
    """An adversary, say, that moves the images to make the saliency term large."""
    objective, x = objective_of(), images()
    shift = torch.zeros(1, 3, 1, 1, dtype=torch.float64, requires_grad=True)
    call = repeatable(objective, x)
    expected = call().saliency_loss
    found = objective(x + shift, TARGET, torch.Generator().manual_seed(7)).saliency_loss
    assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found, shift)
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("method", WITH_RULE)
def test_warns_where_a_rule_meets_no_relu(method):
    with pytest.warns(UserWarning, match="no ReLU was met"):
        Objective(conv_bn(nn.SiLU), Identity(), method=method)(images(dtype=torch.float32), TARGET)


def test_copies_are_independent():
    objective = objective_of(augmentation=HorizontalFlip(), every=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twin = copy.deepcopy(objective)
    objective(images(), TARGET)
    assert (objective.steps_done, twin.steps_done) == (1, 0)


def test_shuffled_pairs_compare_each_map_with_another_image():
    model, images, labels = conv_bn().double().eval(), torch.rand(4, 3, 8, 8).double(), torch.arange(4)
    objective = Objective(model, HorizontalFlip(p=1), shuffle_pairs=True)
    maps, new_maps = (saliency.vanilla_gradient(model, x, labels) for x in (images, images.flip(-1)))
    expected = losses.saliency_loss(maps, new_maps.flip(-1).roll(1, 0))
    assert_close(objective(images, labels).saliency_loss, expected, 1e-9)


def test_relative_layers():
    model, images, labels = conv_bn().double().eval(), torch.rand(4, 3, 8, 8).double(), torch.arange(4)
    options = {"beta": 1.0, "gamma": 0.0, "layers": ["2"], "layer_distance": "l1"}
    objective = Objective(model, HorizontalFlip(p=1), layer_relative=True, **options)
    old, new = model[:3](images), model[:3](images.flip(-1))
    expected = (new - old).abs().mean() / (new.roll(1, 0) - old).abs().mean()
    assert_close(objective(images, labels).invariance_loss, expected, 1e-5)
