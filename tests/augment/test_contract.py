"""What every augmentation promises, checked for each of them."""

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from salnb import augment
from salnb.augment import AUGMENTATIONS, pieces
from tests.helpers.tolerances import assert_close

CLASSES = 5
# one of each that is registered: the cases of the tests are read from them
ONE = {name: make() for name, make in AUGMENTATIONS.items()}
every = pytest.mark.parametrize("name", AUGMENTATIONS)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(n=6, height=18, width=14, dtype=torch.float32):
    images = torch.rand(n, 3, height, width, dtype=torch.float64, generator=generator(1))
    return images.to(dtype), torch.arange(n) % CLASSES


def maps_like(images, seed=2):
    maps = torch.rand(len(images), 1, *images.shape[-2:], dtype=torch.float64, generator=generator(seed))
    return maps.to(images)


def tensors(params):
    return torch.utils._pytree.tree_leaves(params)


@every
def test_has_one_set_of_parameters_per_sample(name):
    images, _ = batch()
    params = AUGMENTATIONS[name]().make_params(images)
    assert len(params) == len(images)
    assert all(len(tensor) == len(images) for tensor in tensors(params))
    assert all(tensor.device.type == "meta" for tensor in tensors(params.to("meta")))


@every
def test_same_seed_same_result_and_replay(name):
    images, labels = batch()
    aug = AUGMENTATIONS[name]()
    once, again = (aug(images, labels, num_classes=CLASSES, generator=generator(3)) for _ in range(2))
    assert torch.equal(once.images, again.images)
    assert torch.equal(once.targets, again.targets)
    assert torch.equal(aug.images(images, once.params), once.images)
    torch.manual_seed(4)
    by_global = aug(images, labels, num_classes=CLASSES)
    torch.manual_seed(4)
    assert torch.equal(aug(images, labels, num_classes=CLASSES).images, by_global.images)


@every
def test_draws_differ_between_seeds_and_samples(name):
    if name == "identity":
        pytest.skip("nothing is drawn")
    images, _ = batch(n=32)
    aug = AUGMENTATIONS[name]()
    first, second = (aug(images, None, generator=generator(seed)) for seed in (0, 1))
    assert not torch.equal(first.images, second.images)
    assert any(len(tensor.unique(dim=0)) > 1 for tensor in tensors(first.params))


@every
@settings(max_examples=5, deadline=None, derandomize=True)
@given(changed=st.integers(0, 5), seed=st.integers(0, 1000))
def test_changing_one_sample_changes_no_other(name, changed, seed):
    images, _ = batch()
    aug = AUGMENTATIONS[name]()
    params = aug.make_params(images, generator(seed))
    other = images.clone()
    other[changed] = torch.rand(images[changed].shape, generator=generator(seed + 1))
    same = (aug.images(images, params) == aug.images(other, params)).flatten(1).all(1)
    affected = torch.arange(6) == changed
    if aug.least_samples > 1:
        affected |= params.partner == changed
    assert same[~affected].all()


@every
def test_gradient_reaches_the_images(name):
    images, _ = batch(n=3, height=6, width=5, dtype=torch.float64)
    images = (0.25 + 0.5 * images).requires_grad_()
    aug = AUGMENTATIONS[name]()
    params = aug.make_params(images, generator(5))
    (gradient,) = torch.autograd.grad(aug.images(images, params).square().sum(), images)
    assert gradient.isfinite().all()
    if name != "augmix":  # equalize and posterize are steps: a finite difference is none or infinite
        assert torch.autograd.gradcheck(lambda x: aug.images(x, params), images)
    assert gradient.abs().sum() > 0


@every
def test_loss_of_aligned_gradient_maps_trains_the_network(name):
    """The maps come from ``autograd.grad(create_graph=True)``, and align sits between them and the loss."""
    images, labels = batch(dtype=torch.float64)
    conv = torch.nn.Conv2d(3, CLASSES, 3, padding=1, dtype=torch.float64)
    augmented = AUGMENTATIONS[name]()(images, labels, num_classes=CLASSES, generator=generator(6))

    def loss():
        def saliency(x):
            x = x.detach().requires_grad_()
            score = conv(x).tanh().mean((2, 3)).square().sum()
            return torch.autograd.grad(score, x, create_graph=True)[0].sum(1, keepdim=True)

        first, second, valid = augmented.align(saliency(images), saliency(augmented.images))
        return ((first - second).square() * valid).sum()

    loss().backward()
    step, index = 1e-6, (1, 2, 0, 1)
    by_hand = []
    for sign in (1, -1):
        with torch.no_grad():
            conv.weight[index] += sign * step
        by_hand.append(loss().item())
        with torch.no_grad():
            conv.weight[index] -= sign * step
    slope = (by_hand[0] - by_hand[1]) / (2 * step)
    assert conv.weight.grad[index].item() == pytest.approx(slope, rel=1e-5, abs=1e-9)
    if name not in ("identity",):
        assert slope != 0


def everything(aug, images, maps, labels, params):
    return (
        aug.images(images, params),
        *aug.align(maps, maps.flip(0), params),
        aug.targets(labels, params, CLASSES),
    )


@every
def test_under_inference_mode(name):
    images, labels = batch()
    aug = AUGMENTATIONS[name]()
    params = aug.make_params(images, generator(7))
    expected = everything(aug, images, maps_like(images), labels, params)
    with torch.inference_mode():
        for actual, wanted in zip(
            everything(aug, images, maps_like(images), labels, params), expected, strict=True
        ):
            assert torch.equal(actual, wanted)


@every
def test_traced_by_make_fx_and_replayed_with_other_parameters(name):
    """No choice that depends on what was drawn may be frozen into the trace."""
    images, labels = batch(dtype=torch.float64)
    aug, maps = AUGMENTATIONS[name](), maps_like(images)
    first, second = (aug.make_params(images, generator(seed)) for seed in (8, 9))
    leaves, spec = torch.utils._pytree.tree_flatten(second)

    def flat(images, maps, labels, *leaves):
        return everything(aug, images, maps, labels, torch.utils._pytree.tree_unflatten(leaves, spec))

    traced = make_fx(flat)(images, maps, labels, *tensors(first))
    expected = everything(aug, images, maps, labels, second)
    for actual, wanted in zip(traced(images, maps, labels, *leaves), expected, strict=True):
        assert actual.dtype == wanted.dtype
        assert_close(actual.double(), wanted.double(), 1e-10)


@every
def test_compiles_without_a_graph_break(name):
    images, labels = batch(dtype=torch.float64)
    aug, maps = AUGMENTATIONS[name](), maps_like(images)
    params = aug.make_params(images, generator(10))
    torch._dynamo.reset()
    compiled = torch.compile(everything, fullgraph=True, backend="eager")
    for actual, wanted in zip(
        compiled(aug, images, maps, labels, params),
        everything(aug, images, maps, labels, params),
        strict=True,
    ):
        assert_close(actual.double(), wanted.double(), 1e-10)


@every
def test_the_call_compiles(name):
    images, labels = batch()
    torch._dynamo.reset()

    def call(images, labels):
        augmented = aug(images, labels, num_classes=CLASSES)
        return augmented.images, augmented.targets

    aug = AUGMENTATIONS[name]()
    new, _ = torch.compile(call, fullgraph=True, backend="eager")(images, labels)
    assert new.shape == images.shape


@every
def test_large_batches_in_pieces_give_the_same(name, monkeypatch):
    images, labels = batch(dtype=torch.float64)
    aug, maps = AUGMENTATIONS[name](), maps_like(images)
    params = aug.make_params(images, generator(11))
    whole = everything(aug, images, maps, labels, params)
    monkeypatch.setattr(pieces, "PIECE", 4 * images[0].numel())
    for actual, wanted in zip(everything(aug, images, maps, labels, params), whole, strict=True):
        assert torch.equal(actual, wanted)


def lengths_of_pieces(samples):
    seen = []
    params = augment.FlipParams(torch.ones(len(samples), dtype=torch.bool))
    pieces.in_pieces(lambda some, drawn: seen.append((len(some), len(drawn))) or some, samples, params)
    assert all(samples == params for samples, params in seen)
    return [samples for samples, _ in seen]


def test_pieces_are_cut_of_what_is_large_on_a_cpu_and_has_values(monkeypatch):
    images, _ = batch()
    monkeypatch.setattr(pieces, "PIECE", 4 * images[0].numel())
    assert lengths_of_pieces(images) == [4, 2]
    assert lengths_of_pieces(images[:4]) == [4]
    assert lengths_of_pieces(images.to("meta")) == [6]
    assert lengths_of_pieces(FakeTensorMode().from_tensor(images)) == [6]


class BatchMean(augment.Identity):
    """One of a user's own, whose images depend on the whole batch."""

    def _transform(self, images, params):
        return images.mean(0, keepdim=True).expand_as(images)


@pytest.mark.parametrize(
    ("aug", "lengths"),
    [
        (augment.ColorJitter(), [4, 2]),
        (augment.AugMix(), [1] * 6),  # which does much with each
        (augment.HorizontalFlip(), [6]),  # and which little
        (augment.SimCLR(), [4, 2]),
        (augment.Affine(), [4, 2]),
        (augment.Sequential(augment.HorizontalFlip(), augment.Contrast()), [4, 2]),
        (augment.MixUp(), [6]),
        (augment.Sequential(augment.MixUp(), augment.ColorJitter()), [6]),  # partners stay together
        (augment.Sequential(BatchMean(), augment.ColorJitter()), [6]),  # nobody knows
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, torch.nn.Module) else str(value),
)
def test_what_treats_each_image_alone_does_so_in_pieces(aug, lengths, monkeypatch):
    images, _ = batch()
    monkeypatch.setattr(pieces, "PIECE", 4 * images[0].numel())
    with mock.patch.object(aug, "_transform", wraps=aug._transform) as transform:
        aug.images(images, aug.make_params(images))
    assert [len(call.args[0]) for call in transform.call_args_list] == lengths


@every
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_pieces_keep_the_memory_format(name, memory_format, monkeypatch):
    images, _ = batch()
    images = images.contiguous(memory_format=memory_format)
    params = ONE[name].make_params(images)
    whole = ONE[name].images(images, params)
    monkeypatch.setattr(pieces, "PIECE", 4 * images[0].numel())
    assert ONE[name].images(images, params).stride() == whole.stride()


@every
def test_repr_names_every_argument_and_builds_the_same_again(name):
    aug = AUGMENTATIONS[name]()
    if isinstance(aug, augment.Sequential):
        assert all(type(step).__name__ in repr(aug) for step in aug.steps)
    else:
        assert repr(eval(repr(aug), vars(augment))) == repr(aug)


def test_what_stands_on_the_paper_is_registered():
    """Table 1 and 2, by name; others may join."""
    assert {
        *("horizontal_flip", "vertical_flip", "rescale", "rotation", "affine", "contrast", "combined"),
        *("cutout", "mixup", "cutmix", "augmix", "color_jitter", "resized_crop", "simclr", "identity"),
    } <= set(AUGMENTATIONS)
    assert {
        name
        for name in ("contrast", "color_jitter", "combined", "simclr", "augmix", "rotation")
        if ONE[name].unit_range
    } == {"contrast", "color_jitter", "combined", "simclr", "augmix"}
    assert not any(ONE[name].invertible for name in ("cutout", "mixup", "cutmix", "augmix"))


def test_repr_is_honest():
    assert repr(augment.Rotation(15)) == "Rotation(degrees=(-15.0, 15.0))"
    assert repr(augment.HorizontalFlip(p=1)) == "HorizontalFlip(p=1.0)"
    assert repr(augment.MixUp(alpha=0.2)) == "MixUp(alpha=0.2)"


@every
def test_bad_images_are_refused(name):
    aug = AUGMENTATIONS[name]()
    images, _ = batch()
    params = aug.make_params(images)
    with pytest.raises(TypeError, match=r"images must be of a floating-point dtype, got torch\.uint8"):
        aug.images((images * 255).byte(), params)
    with pytest.raises(TypeError, match=r"images must be a torch.Tensor .*, got ndarray"):
        aug(images.numpy(), None)
    with pytest.raises(ValueError, match=r"four dimensions.* got \(3, 18, 14\)"):
        aug.make_params(images[0])
    with pytest.raises(ValueError, match=r"params were drawn for 6 samples, but images has 4"):
        aug.images(images[:4], params)
    with pytest.raises(ValueError, match="new_maps must have the shape of maps"):
        aug.align(maps_like(images), maps_like(images)[..., 1:], params)
    with pytest.raises(TypeError, match=r"target must be a tensor \(N,\) or \(N, K\), got list"):
        aug.targets([0, 1, 2, 3, 4, 0], params, CLASSES)
    with pytest.raises(TypeError, match=r"generator must be a torch.Generator or None, got 5"):
        aug(images, generator=5)
    with pytest.raises(TypeError, match=r"maps must be a torch.Tensor .*, got ndarray"):
        aug(images).align(maps_like(images).numpy(), maps_like(images))
    other = AUGMENTATIONS["identity" if name == "cutout" else "cutout"]().make_params(images)
    with pytest.raises(TypeError, match=f"must be {type(params).__name__}, got {type(other).__name__}"):
        aug.images(images, other)


@pytest.mark.parametrize("name", [name for name, aug in ONE.items() if aug.unit_range])
@pytest.mark.parametrize(
    "spoil", [lambda x: x * 2, lambda x: -x, lambda x: x * torch.nan], ids=["2x", "-x", "nan"]
)
def test_images_outside_the_unit_range_are_refused_where_it_matters(name, spoil):
    images, _ = batch()
    with pytest.raises(
        ValueError, match=r"images must lie in \[0, 1\], got values from .* before normalising"
    ):
        AUGMENTATIONS[name]()(spoil(images), None)


def test_batch_refuses_maps_of_another_size():
    images, _ = batch()
    augmented = augment.Rotation()(images)
    with pytest.raises(ValueError, match=r"maps must have the images' size \(18, 14\), got \(9, 7\)"):
        augmented.align(torch.rand(6, 1, 9, 7), torch.rand(6, 1, 9, 7))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: augment.HorizontalFlip(p=1.5), r"p must lie in \[0, 1\], got 1.5"),
        (lambda: augment.VerticalFlip(p=float("nan")), r"p must lie in \[0, 1\], got nan"),
        (lambda: augment.Rescale((0, 1)), r"scale must lie in \[0.001, 1000\], got 0"),
        (lambda: augment.Rescale((1.2, 0.8)), r"scale must be a pair \(from, to\) in this order, got"),
        (lambda: augment.Rotation((10, 20, 30)), r"degrees must be a pair \(from, to\)"),
        (lambda: augment.Rotation(400), r"degrees must lie in \[-360, 360\], got -400"),
        (lambda: augment.Affine(translate=(0.1, 2)), r"translate must lie in \[0, 1\], got 2"),
        (lambda: augment.Affine(shear=60), r"shear must lie in \[-45, 45\], got -60"),
        (lambda: augment.Contrast(factor=(-1, 1)), r"factor must lie in \[0, 1000\], got -1"),
        (lambda: augment.ColorJitter(hue=0.7), r"hue must lie in \[-0.5, 0.5\], got -0.7"),
        (lambda: augment.ColorJitter(brightness=-1), r"brightness must lie in \[0, 1000\], got -1"),
        (lambda: augment.ResizedCrop(scale=(0.1, 1.5)), r"scale must lie in \(0, 1\], got 1.5"),
        (lambda: augment.SimCLR(strength=-1), r"strength must lie in \[0, 2.5\], got -1"),
        (lambda: augment.CutOut(size=0), r"size must lie in \(0, 1\], got 0"),
        (lambda: augment.MixUp(alpha=0), r"alpha must lie in \[0.01, 1e\+06\], got 0"),
        (lambda: augment.AugMix(severity=20), r"severity must lie in \[0.1, 10\], got 20"),
        (lambda: augment.AugMix(depth=0), r"depth must lie in \[1, 100\], got 0"),
        (lambda: augment.AugMix(depth=np.array(0)), r"depth must lie in \[1, 100\], got array\(0\)"),
        (lambda: augment.Sequential(), "Sequential needs at least one augmentation"),
    ],
)
def test_bad_hyperparameters_are_refused_at_construction(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_sequential_refuses_strangers():
    with pytest.raises(TypeError, match="must be salnb augmentations, got ReLU"):
        augment.Sequential(augment.Rotation(), torch.nn.ReLU())
