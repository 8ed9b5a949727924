"""Every argument of every augmentation: what is no number, or none that makes sense, is refused by its name."""

import inspect
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from salnb import augment

# of each class of the face, the names that its constructor takes
CLASSES = {make for make in vars(augment).values() if isinstance(make, type)}
ARGUMENTS = [
    (make, name)
    for make in sorted(CLASSES, key=lambda make: make.__name__)
    if issubclass(make, augment.Augmentation)
    for name, argument in inspect.signature(make).parameters.items()
    if argument.kind is argument.POSITIONAL_OR_KEYWORD
]
every_argument = pytest.mark.parametrize(
    ("make", "name"), ARGUMENTS, ids=[f"{make.__name__}.{name}" for make, name in ARGUMENTS]
)

numbers = st.one_of(
    st.floats(-3, 3),
    st.integers(-3, 3),
    st.floats(allow_nan=False),
    st.sampled_from([1e-300, 1e-12, 1e-3, 0.01, 1.0, 45.0, 1e3, 1e6, 1e300, 10**400]),
)
as_scalar = st.sampled_from(
    [np.float64, np.float32, lambda x: np.asarray(float(x)), lambda x: torch.tensor(x)]
)
scalars = st.builds(lambda kind, x: kind(x), as_scalar, st.floats(-3, 3)) | st.builds(
    np.int64, st.integers(-3, 3)
)
strange = st.sampled_from(
    [None, "0.5", "", b"ab", True, False, np.bool_(True), math.nan, math.inf, -math.inf]
)
strange |= st.sampled_from(
    [1j, object, {}, {0.8, 1.2}, {0.8: 1}, [], [[1, 2], [3, 4]], np.eye(2), torch.eye(2)]
)
parts = numbers | scalars | strange
values = parts | st.tuples(parts) | st.tuples(parts, parts) | st.lists(parts, max_size=4)
values |= st.builds(np.asarray, st.lists(st.floats(-2, 2), min_size=2, max_size=3))


def batch():
    images = torch.rand(4, 3, 9, 7, generator=torch.Generator().manual_seed(0))
    return images, torch.arange(4)


def kept(aug):
    """The arguments as they are in force, as plain numbers."""
    names = inspect.signature(type(aug)).parameters
    values = [getattr(aug, name) for name in names if hasattr(aug, name)]
    return [number for value in values for number in (value if isinstance(value, tuple) else (value,))]


@every_argument
@settings(max_examples=150, deadline=None, derandomize=True)
@given(value=values)
def test_an_argument_is_taken_and_works_or_is_refused_by_name(make, name, value):
    aug, refusal = None, ""
    try:
        aug = make(**{name: value})
    except (TypeError, ValueError) as error:
        refusal = str(error)
    if aug is None:  # what is wrong, what is allowed, what was given
        assert re.match(rf"{name} must (be|lie in) .*[\[(].*, got ", refusal, re.DOTALL), refusal
        return
    assert all(type(number) in (int, float) and math.isfinite(number) for number in kept(aug))
    images, labels = batch()
    generator = torch.Generator().manual_seed(1)
    new = aug(images, labels, num_classes=4, generator=generator)
    assert new.images.isfinite().all()
    assert new.images.min() >= 0
    assert new.images.max() <= 1 + 1e-5
    assert new.targets.isfinite().all()
    maps, new_maps, _ = new.align(images[:, :1], new.images[:, :1])
    assert maps.isfinite().all()
    assert new_maps.isfinite().all()


@every_argument
def test_scalars_of_numpy_and_of_torch_are_numbers(make, name):
    """The default, written as NumPy or PyTorch gives it, makes the same augmentation."""
    default = inspect.signature(make).parameters[name].default
    for convert in (np.asarray, torch.tensor, lambda x: np.asarray(x).tolist()):
        assert kept(make(**{name: convert(default)})) == pytest.approx(kept(make()), rel=1e-6)
    if not isinstance(default, tuple):
        kind = np.int64 if isinstance(default, int) else np.float64
        assert kept(make(**{name: kind(default)})) == kept(make())


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            lambda: augment.Affine(translate=0.1),
            TypeError,
            r"translate must be a pair \(across, down\), within \[0, 1\], got 0\.1",
        ),
        (
            lambda: augment.Affine(translate=(0.1, 0.1, 0.1)),
            ValueError,
            r"translate must be a pair .* got \(0\.1, 0\.1, 0\.1\)",
        ),
        (
            lambda: augment.Rescale(1.2),
            TypeError,
            r"scale must be a pair \(from, to\) in this order, within \[0\.001, 1000\], got 1\.2",
        ),
        (
            lambda: augment.Rescale((0.8, math.inf)),
            ValueError,
            r"scale must lie in \[0\.001, 1000\], got inf",
        ),
        (
            lambda: augment.Rescale(("a", 1)),
            TypeError,
            r"scale must be a number in \[0\.001, 1000\], got 'a'",
        ),
        (
            lambda: augment.Rotation("30"),
            TypeError,
            r"degrees must be a pair \(from, to\) in this order or one number, within \[-360, 360\], got '30'",
        ),
        (
            lambda: augment.Rotation(-30),
            ValueError,
            r"degrees must be a pair \(from, to\) in this order or one number, got -30",
        ),
        (lambda: augment.HorizontalFlip(p=True), TypeError, r"p must be a number in \[0, 1\], got True"),
        (lambda: augment.HorizontalFlip(p=None), TypeError, r"p must be a number in \[0, 1\], got None"),
        (
            lambda: augment.ColorJitter(hue="red"),
            TypeError,
            r"hue must be a pair .* or one number, within \[-0\.5, 0\.5\], got 'red'",
        ),
        (
            lambda: augment.AugMix(width=2.5),
            TypeError,
            r"width must be a whole number in \[1, 100\], got 2\.5",
        ),
        (lambda: augment.AugMix(depth=-2), ValueError, r"depth must lie in \[-1, 100\], got -2"),
        (lambda: augment.MixUp(alpha=1e-6), ValueError, r"alpha must lie in \[0\.01, 1e\+06\], got 1e-06"),
        (
            lambda: augment.SimCLR(scale=(0.5, 0.1)),
            ValueError,
            r"scale must be a pair \(from, to\) in this order, got \(0\.5, 0\.1\)",
        ),
        (lambda: augment.Sequential([augment.MixUp()]), TypeError, "must be salnb augmentations, got list"),
    ],
)
def test_what_the_errors_say(build, error, message):
    with pytest.raises(error, match=message):
        build()


TWO = augment.Sequential(augment.VerticalFlip(), augment.Contrast())
IMAGES, _ = batch()


@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        (augment.ResizedCrop(), TypeError, "params of Sequential must be SequentialParams, got CropParams"),
        (
            augment.SimCLR(),
            ValueError,
            "params of Sequential must have one for each of its 2 steps, got 4",
        ),
        (
            augment.Sequential(*reversed(TWO.steps)),
            TypeError,
            "params of VerticalFlip must be FlipParams, got ContrastParams",
        ),
    ],
    ids=["one", "more", "reversed"],
)
def test_params_of_another_sequence_are_refused(other, error, message):
    params = other.make_params(IMAGES)
    for call in (TWO.images, TWO.inverse, TWO.carry):
        with pytest.raises(error, match=message):
            call(IMAGES, params)
    with pytest.raises(ValueError, match="must have one for each of its 2 steps, got 0"):
        TWO.images(IMAGES, augment.SequentialParams(()))
