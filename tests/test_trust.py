"""Measures of maps against slow loops straight from their definitions, and what they refuse."""

import math

import pytest
import torch
from torch import nn

from salnb import trust
from tests.helpers.networks import conv_bn
from tests.helpers.tolerances import assert_close

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


def maps_and_masks(n=5, height=6, width=7, dtype=torch.float64):
    """Maps of few different values, so that many pixels are equal, and objects of every size but none and all."""
    maps = torch.randint(0, 4, (n, 1, height, width)).to(dtype)
    masks = torch.rand(n, 1, height, width) < torch.linspace(0.1, 0.9, n)[:, None, None, None]
    masks[..., 0, 0], masks[..., -1, -1] = True, False
    return maps, masks


def pixels(values):
    return values.flatten().tolist()


# --- the object --------------------------------------------------------------------------------------------


def slow_share(values, on):
    return sum(v for v, here in zip(values, on, strict=True) if here) / sum(values)


def slow_hit(values, on):
    tops = [here for v, here in zip(values, on, strict=True) if v == max(values)]
    return tops.count(True) / len(tops)


@DTYPES
@pytest.mark.parametrize(
    ("measure", "slow"), [(trust.share_on_object, slow_share), (trust.pointing_hit, slow_hit)]
)
def test_agrees_with_the_definition(measure, slow, dtype, device):
    maps, masks = (tensor.to(device) for tensor in maps_and_masks(dtype=dtype))
    found = measure(maps, masks)
    expected = [slow(pixels(m), pixels(o)) for m, o in zip(maps.double(), masks, strict=True)]
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    assert_close(found, torch.tensor(expected, dtype=found.dtype, device=device))


@pytest.mark.parametrize("measure", [trust.share_on_object, trust.pointing_hit])
@pytest.mark.parametrize("value", [0.0, 3.0])
def test_a_constant_map_gets_the_area(measure, value):
    maps, masks = maps_and_masks()
    assert_close(measure(torch.full_like(maps, value), masks), masks.double().mean((1, 2, 3)))


@pytest.mark.parametrize("measure", [trust.share_on_object, trust.pointing_hit])
def test_a_random_map_gets_the_area_on_average(measure):
    masks = torch.zeros(4000, 1, 8, 8, dtype=torch.bool)
    masks[..., :4, :3] = True
    mean = measure(torch.rand(4000, 1, 8, 8), masks).mean().item()
    assert mean == pytest.approx(12 / 64, abs=0.02)  # three standard errors of the coarser one


def test_a_share_of_what_is_no_number_is_none():
    maps, masks = maps_and_masks(n=3)
    maps[1, 0, -1, -1] = math.nan  # beside the object
    assert trust.share_on_object(maps, masks).isnan().tolist() == [False, True, False]


# --- two maps ----------------------------------------------------------------------------------------------


def slow_ranks(values):
    return [sum(w < v for w in values) + (values.count(v) + 1) / 2 for v in values]


@DTYPES
def test_rank_correlation_agrees_with_the_definition(dtype, device):
    maps, _ = maps_and_masks(dtype=dtype)
    others, _ = maps_and_masks(dtype=dtype)
    ranks = [
        torch.tensor([slow_ranks(pixels(a)), slow_ranks(pixels(b))])
        for a, b in zip(maps, others, strict=True)
    ]
    expected = torch.stack([torch.corrcoef(pair.double())[0, 1] for pair in ranks])
    assert_close(trust.rank_correlation(maps.to(device), others.to(device)), expected.to(device))


def test_rank_correlation_sees_the_order_only():
    maps, others = torch.rand(3, 1, 20, 20), torch.rand(3, 1, 20, 20)
    expected = trust.rank_correlation(maps, others)
    assert_close(trust.rank_correlation(maps, (5 * others).exp()), expected)
    assert_close(trust.rank_correlation(maps, 2 - others), -expected)
    assert_close(trust.rank_correlation(others, maps), expected)
    assert_close(trust.rank_correlation(maps, maps), torch.ones_like(expected))
    assert expected.abs().max() < 0.2


def test_a_constant_map_correlates_with_nothing():
    maps = torch.rand(2, 1, 4, 4)
    maps[1] = 0.5
    assert_close(trust.rank_correlation(maps, maps), torch.tensor([1.0, 0.0]).double())


@DTYPES
def test_correlation_agrees_with_the_definition(dtype, device):
    generator = torch.Generator().manual_seed(2)
    maps, others = (torch.randn(4, 1, 5, 6, generator=generator).to(dtype) for _ in range(2))
    valid = torch.rand(maps.shape, generator=generator) > 0.3
    expected = [
        torch.corrcoef(torch.stack([a[on], b[on]]).double())[0, 1]
        for a, b, on in zip(maps, others, valid, strict=True)
    ]
    maps, others, valid = (tensor.to(device) for tensor in (maps, others, valid))
    assert_close(trust.correlation(maps, others, valid), torch.stack(expected).to(device))
    assert_close(trust.correlation(maps, others), trust.correlation(maps, others, torch.ones_like(valid)))


def test_what_is_not_valid_does_not_correlate():
    maps, others = torch.rand(2, 1, 3, 3), torch.rand(2, 1, 3, 3)
    valid = torch.ones(maps.shape, dtype=torch.bool)
    valid[:, :, 0] = False
    expected = trust.correlation(maps, others, valid)
    assert_close(trust.correlation(maps, others.masked_fill(~valid, torch.nan), valid), expected)
    assert_close(trust.correlation(maps, others, torch.zeros_like(valid)), torch.zeros(2).double())
    assert_close(trust.correlation(maps, torch.full_like(maps, 0.1)), torch.zeros(2).double())


def test_expanded_maps_are_maps():
    one, others = torch.rand(1, 1, 4, 4), torch.rand(3, 1, 4, 4)
    assert_close(
        trust.rank_correlation(one.expand(3, -1, -1, -1), others),
        trust.rank_correlation(one.repeat(3, 1, 1, 1), others),
    )


# --- deletion and insertion --------------------------------------------------------------------------------


def slow_curve(model, image, values, target, replacement, steps, *, insert):
    """Pixel by pixel, for one image whose map has no two equal values."""
    height, width = image.shape[-2:]
    order = sorted(range(height * width), key=lambda i: -values[i])
    curve = []
    for step in range(steps + 1):
        mixed = (replacement if insert else image).clone()
        for place, i in enumerate(order):
            if place < step * height * width / steps:
                pixel = i // width, i % width
                mixed[:, pixel[0], pixel[1]] = (image if insert else replacement)[:, pixel[0], pixel[1]]
        with torch.no_grad():
            curve.append(model(mixed[None])[0].softmax(0)[target].item())
    return curve


def scene(n=3, height=6, width=7):
    x = torch.rand(n, 3, height, width, dtype=torch.float64)
    maps = torch.stack([torch.randperm(height * width) for _ in range(n)]).view(n, 1, height, width).double()
    return conv_bn().double().eval(), x, maps, torch.rand_like(x)


CURVES = {"deletion": trust.deletion_curve, "insertion": trust.insertion_curve}


@pytest.mark.parametrize("steps", [1, 5, 42])
@pytest.mark.parametrize("which", CURVES)
def test_curves_agree_with_the_definition(which, steps, device):
    model, x, maps, gone = (part.to(device) for part in scene())
    target = torch.tensor([0, 3, 1], device=device)
    found = CURVES[which](model, x, maps, target, replacement=gone, steps=steps)
    expected = [
        slow_curve(model, *of_image, steps, insert=which == "insertion")
        for of_image in zip(x, map(pixels, maps), target, gone, strict=True)
    ]
    assert_close(found, torch.tensor(expected, dtype=torch.float64, device=device))


@pytest.mark.parametrize("which", CURVES)
def test_targets_of_every_kind(which):
    model, x, maps, gone = scene()
    curve = CURVES[which]
    predicted = model(x).argmax(1)
    weights = nn.functional.one_hot(predicted, 4).double()
    expected = curve(model, x, maps, predicted, replacement=gone)
    assert_close(curve(model, x, maps, replacement=gone), expected)
    assert_close(curve(model, x, maps, weights, replacement=gone), expected)
    same = torch.full_like(predicted, 2)
    assert_close(curve(model, x, maps, 2, replacement=gone), curve(model, x, maps, same, replacement=gone))


def test_a_map_that_knows_the_one_pixel_is_best():
    """A model of one pixel: its own map ends deletion and completes insertion with the first step."""
    weight = torch.zeros(2, 3 * 36).double()
    weight[1, 14] = 50.0
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 36, 2, bias=False).double())
    model[1].weight.data = weight
    x = torch.ones(1, 3, 6, 6).double()
    maps = weight[1].view(1, 3, 6, 6).amax(1, keepdim=True)
    half = torch.tensor([[1.0] + [0.5] * 36], dtype=torch.float64)
    nothing = torch.tensor(0.0)
    deleted = trust.deletion_curve(model, x, maps, 1, replacement=nothing, steps=36)
    inserted = trust.insertion_curve(model, x, maps, 1, replacement=nothing, steps=36)
    assert_close(deleted, half)
    assert_close(inserted, half.roll(1, 1).where(torch.arange(37) < 1, 1.0))
    worst = trust.deletion_curve(model, x, maps.max() - maps, 1, replacement=nothing, steps=36)
    assert_close(worst[:, :-1], torch.ones(1, 36).double())


def test_equal_pixels_are_drawn():
    """A constant map gives a random order: another one for another seed, the same one for the same."""
    model, x, maps, gone = scene()

    def curve(seed):
        generator = torch.Generator().manual_seed(seed)
        return trust.deletion_curve(model, x, 0 * maps, 1, replacement=gone, generator=generator)

    assert torch.equal(curve(0), curve(0))
    assert (curve(0) - curve(1))[:, 1:-1].abs().max() > 1e-4
    # and what is unequal stays in its order
    same = trust.deletion_curve(model, x, maps, 1, replacement=gone)
    assert torch.equal(same, trust.deletion_curve(model, x, maps, 1, replacement=gone))


def test_the_model_is_left_as_it_was():
    model, x, maps, gone = scene()
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trust.deletion_curve(model, x, maps, replacement=gone)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_on_the_accelerator(device):
    model, x, maps, gone = (part.to(device) for part in scene())
    seeded = torch.Generator().manual_seed(0)
    curve = trust.deletion_curve(model, x, maps, 1, replacement=gone, generator=seeded)
    assert curve.device.type == device.type
    assert_close(
        curve.cpu(), trust.deletion_curve(model.cpu(), x.cpu(), maps.cpu(), 1, replacement=gone.cpu())
    )


# --- what is refused ---------------------------------------------------------------------------------------

M, K = torch.rand(2, 1, 4, 4), torch.ones(2, 1, 4, 4, dtype=torch.bool)
X = torch.rand(2, 3, 4, 4)
ONE = M.index_put((torch.tensor(1), torch.tensor(0), torch.tensor(2), torch.tensor(3)), torch.tensor(-0.25))
NAN = M.index_fill(3, torch.tensor(1), math.nan)


def remove(images=X, maps=M, target=0, replacement=X, **options):
    return trust.deletion_curve(conv_bn().eval(), images, maps, target, replacement=replacement, **options)


BAD = {
    "maps-list": (lambda: trust.share_on_object([1.0], K), TypeError, "maps must be a torch.Tensor .* got list"),
    "maps-channels": (lambda: trust.share_on_object(X, K), ValueError, r"maps must have one channel.*\(2, 3, 4, 4\)"),
    "maps-negative": (lambda: trust.pointing_hit(M - 1, K), ValueError, "maps must not be negative, got -.*absolute"),
    "maps-negative-once": (lambda: trust.pointing_hit(ONE, K), ValueError, "maps must not be negative, got -0.25:"),
    "maps-nan": (lambda: trust.pointing_hit(NAN, K), ValueError, "maps must be finite"),
    "masks-numbers": (lambda: trust.share_on_object(M, M), TypeError, "masks must be .* booleans, got torch.float32"),
    "masks-list": (lambda: trust.pointing_hit(M, [True]), TypeError, "masks must be .* booleans, got list"),
    "masks-misfit": (lambda: trust.pointing_hit(M, K[:1]), ValueError, r"masks .* \(2, 1, 4, 4\), got \(1, 1, 4, 4\)"),
    "others-misfit": (lambda: trust.rank_correlation(M, M[:1]), ValueError, r"others must .* got \(1, 1, 4, 4\)"),
    "correlated-misfit": (lambda: trust.correlation(M, M[:1]), ValueError, r"others must .* got \(1, 1, 4, 4\)"),
    "valid-floats": (lambda: trust.correlation(M, M, M), TypeError, "valid must be a tensor of booleans"),
    "others-nan": (lambda: trust.rank_correlation(M, NAN), ValueError, "others must be finite"),
    "images-integers": (lambda: remove(images=X.byte()), TypeError, "images must be of a floating-point"),
    "maps-misfit": (lambda: remove(maps=M[..., :2]), ValueError, r"maps must have shape \(2, 1, 4, 4\).*\(2, 1, 4, 2\)"),
    "order-nan": (lambda: remove(maps=NAN), ValueError, "maps must be finite"),
    "target": (lambda: remove(target=4), ValueError, "target must lie in 0 … 3, got 4"),
    "replacement-number": (lambda: remove(replacement=0.5), TypeError, "replacement must be a tensor, got float"),
    "replacement-misfit": (lambda: remove(replacement=X[..., :3]), ValueError, r"replacement .* got \(2, 3, 4, 3\)"),
    "replacement-nan": (lambda: remove(replacement=NAN), ValueError, "replacement must be finite"),
    "steps": (lambda: remove(steps=0), ValueError, r"steps must lie in \[1, .*\], got 0"),
    "steps-float": (lambda: remove(steps=2.5), TypeError, "steps must be a whole number in .* got 2.5"),
    "generator": (lambda: remove(generator=42), TypeError, "generator must be a torch.Generator or None, got 42"),
    "logits": (lambda: trust.insertion_curve(nn.Identity(), X, M, replacement=X), ValueError, "model must return logits"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


# --- one logit, half precision ------------------------------------------------------------------------------


@pytest.mark.parametrize("curve", [trust.deletion_curve, trust.insertion_curve])
@pytest.mark.parametrize("target", [None, 0, torch.ones(2, 1)], ids=str)
def test_one_logit_is_refused(curve, target):
    """Its softmax is one, whatever is deleted."""
    images, maps = torch.rand(2, 3, 8, 8), torch.rand(2, 1, 8, 8)
    model = conv_bn(num_classes=1).eval()
    with pytest.raises(ValueError, match=r"two classes or more, got \(2, 1\).*make two of a logit z"):
        curve(model, images, maps, target, replacement=torch.tensor(0.5))


def test_the_way_out_of_one_logit_is_the_sigmoid():
    class Two(nn.Module):
        def forward(self, x):
            z = model(x)
            return torch.cat([torch.zeros_like(z), z], 1)

    images, maps = torch.rand(2, 3, 8, 8), torch.rand(2, 1, 8, 8)
    model = conv_bn(num_classes=1).eval()
    curve = trust.deletion_curve(Two(), images, maps, 1, replacement=torch.tensor(0.5), steps=2)
    assert_close(curve[:, 0], model(images).sigmoid().flatten().detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_many_half_precision_values_are_summed_in_float32(dtype):
    maps = torch.full((1, 1, 64, 64), 1000.0, dtype=dtype)
    masks = torch.zeros(maps.shape, dtype=torch.bool)
    masks[..., :16] = True
    assert trust.share_on_object(maps, masks).item() == 0.25


# --- half of a map -----------------------------------------------------------------------------------------


def test_half_area_counts_pixels():
    maps = torch.rand(20, 1, 5, 6, generator=torch.Generator().manual_seed(0)) ** 4
    expected = []
    for map_ in maps.double():
        values, count = sorted(map_.flatten().tolist(), reverse=True), 1
        while sum(values[:count]) < sum(values) / 2:
            count += 1
        expected.append(count / 30)
    assert trust.half_area(maps).tolist() == pytest.approx(expected)


def test_half_area_of_special_maps():
    point, flat = torch.zeros(1, 1, 4, 4), torch.full((1, 1, 4, 4), 0.1)
    point[0, 0, 2, 1] = 7.0
    assert trust.half_area(torch.cat([point, flat, 0 * flat])).tolist() == [1 / 16, 0.5, 0.5]
    assert trust.half_area(flat[..., :1, :1]).tolist() == [1.0]
    with pytest.raises(ValueError, match="maps must not be negative"):
        trust.half_area(-flat)


# --- units -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "unit"),
    [(torch.float32, 8e37), (torch.float32, 1e-38), (torch.float64, 4e307), (torch.float64, 1e-307)],
)
def test_a_measure_is_the_same_in_any_unit(dtype, unit):
    maps, masks = maps_and_masks(dtype=dtype)
    others = maps.flip(-1) + masks
    large, larger = maps * unit, others * unit
    assert_close(trust.share_on_object(large, masks), trust.share_on_object(maps, masks))
    assert torch.equal(trust.half_area(large), trust.half_area(maps))
    assert_close(trust.correlation(large, larger), trust.correlation(maps, others), 1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_map_that_is_not_finite_has_no_half_area(value):
    maps = torch.ones(2, 1, 2, 2)
    maps[0, 0, 0, 1] = value
    assert trust.half_area(maps)[0].isnan()
    assert trust.half_area(maps)[1] == 0.5
