"""What lies on another device than what it goes with is refused by name, before anything is computed with it."""

import pytest
import torch

from salnb import Objective, losses, saliency, trust
from salnb.augment import Affine, CutMix
from tests.helpers.networks import conv_bn

TARGET = torch.arange(4)
WEIGHTS = torch.full((4, 4), 0.25)


def elsewhere(tensor):
    return tensor.to("meta")


def images():
    return torch.rand(4, 3, 8, 8)


def maps():
    return torch.rand(4, 1, 8, 8)


def masks():
    return torch.ones(4, 1, 8, 8, dtype=torch.bool)


def objective(augmentation=None, **options):
    return Objective(conv_bn(), augmentation or Affine(), **options)


CASES = {
    "target of a step": ("target", lambda: objective()(images(), elsewhere(TARGET))),
    "target without maps": ("target", lambda: objective(gamma=0)(images(), elsewhere(TARGET))),
    "target to mix": ("target", lambda: objective(CutMix())(images(), elsewhere(TARGET))),
    "weights of a step": ("target", lambda: objective()(images(), elsewhere(WEIGHTS))),
    "partners": ("partners", lambda: objective()(images(), TARGET, partners=elsewhere(images()))),
    "masks of a step": ("masks", lambda: objective()(images(), TARGET, masks=elsewhere(masks()))),
    "class loss": ("target", lambda: losses.class_loss(torch.rand(4, 4), elsewhere(TARGET))),
    "class loss of weights": ("target", lambda: losses.class_loss(torch.rand(4, 4), elsewhere(WEIGHTS))),
    "features": ("new_features", lambda: losses.invariance_loss([images()], [elsewhere(images())])),
    "saliency loss": ("new_maps", lambda: losses.saliency_loss(maps(), elsewhere(maps()), masks())),
    "valid": ("valid", lambda: losses.saliency_loss(maps(), maps(), elsewhere(masks()))),
    "normalised": ("valid", lambda: losses.normalize_maps(maps(), elsewhere(masks()))),
    "outside": ("masks", lambda: losses.outside_loss(maps(), elsewhere(masks()))),
    "known": ("known", lambda: losses.outside_loss(maps(), masks(), elsewhere(masks()[:, 0, 0, 0]))),
    "share": ("masks", lambda: trust.share_on_object(maps(), elsewhere(masks()))),
    "hit": ("masks", lambda: trust.pointing_hit(maps(), elsewhere(masks()))),
    "correlation": ("others", lambda: trust.correlation(maps(), elsewhere(maps()))),
    "correlation, valid": ("valid", lambda: trust.correlation(maps(), maps(), elsewhere(masks()))),
    "curve": (
        "target",
        lambda: trust.deletion_curve(conv_bn(), images(), maps(), elsewhere(TARGET), replacement=images()),
    ),
    "aligned": ("new_maps", lambda: Affine().align(maps(), elsewhere(maps()), Affine().make_params(images()))),
    "carried": ("valid", lambda: Affine().carry(maps(), Affine().make_params(images()), elsewhere(masks()))),
}  # fmt: skip


@pytest.mark.parametrize(("name", "call"), CASES.values(), ids=CASES)
def test_refused_by_name(name, call):
    with pytest.raises(ValueError, match=rf"^{name}.* must be on cpu, as .* are, got meta: use "):
        call()


@pytest.mark.parametrize("target", [TARGET, WEIGHTS], ids=["labels", "weights"])
@pytest.mark.parametrize("method", saliency.METHODS)
def test_target_of_a_map(method, target):
    with pytest.raises(
        ValueError, match=r"^target must be on cpu, as the model's logits are, got meta: use "
    ):
        saliency.METHODS[method](conv_bn(), images(), elsewhere(target))


def test_a_number_goes_with_images_of_any_device():
    """It is no tensor of a batch."""
    with torch.device("meta"):
        model, x = conv_bn(), images()
    assert saliency.grad_cam(model, x, torch.tensor(2, device="cpu")).device.type == "meta"


def test_a_model_on_two_devices_has_its_labels_where_its_logits_are():
    model = conv_bn()
    model.append(torch.nn.Linear(4, 4, device="meta"))
    with pytest.raises(Exception, match="meta") as error:
        Objective(model, Affine())(images(), elsewhere(TARGET))
    assert not str(error.value).startswith("target must be on")
