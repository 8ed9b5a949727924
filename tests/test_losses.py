"""The three losses: eq. 5, 6 and 7 against their definitions, and what must not break them."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.fx.experimental.proxy_tensor import make_fx

from salnb.losses import (
    DISTANCES,
    NORMALIZATIONS,
    class_loss,
    invariance_loss,
    normalize_maps,
    saliency_loss,
)
from tests.helpers.tolerances import assert_close

EVERY = list(itertools.product(sorted(NORMALIZATIONS), sorted(DISTANCES)))
SCALED = sorted(NORMALIZATIONS - {"none"})


def maps_like(*shape, dtype=torch.float64, device="cpu"):
    return (torch.rand(*shape, dtype=dtype) + 0.1).to(device)


def half_valid(n=4, h=5, w=6, device="cpu"):
    valid = torch.rand(n, 1, h, w) < 0.5
    valid[:, :, 0, :2] = True
    return valid.to(device)


# ---------------------------------------------------------------------------------------------------------
# eq. 5


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_class_loss_is_the_mean_negative_log_probability(dtype, device):
    logits, target = torch.randn(6, 4).double().to(device), torch.tensor([0, 1, 2, 3, 0, 1], device=device)
    expected = -sum(logits[i].softmax(0)[c].log() for i, c in enumerate(target)) / 6
    assert_close(class_loss(logits, target.to(dtype)), expected)
    assert_close(class_loss(logits, F.one_hot(target)), expected)


def test_class_loss_of_mixed_labels(device):
    drawn = torch.randn(6, 4).double(), torch.randint(0, 4, (6,)), torch.randint(0, 4, (6,))
    logits, a, b = (tensor.to(device) for tensor in drawn)
    weights = 0.3 * F.one_hot(a, 4).double() + 0.7 * F.one_hot(b, 4).double()
    assert_close(class_loss(logits, weights), 0.3 * class_loss(logits, a) + 0.7 * class_loss(logits, b))


@pytest.mark.parametrize(
    ("logits", "target"),
    [
        (torch.zeros(3), torch.zeros(3, dtype=torch.long)),
        (torch.zeros(3, 4), torch.zeros(2, dtype=torch.long)),
        (torch.zeros(3, 4), torch.zeros(3, 5)),
        (torch.zeros(3, 4), torch.zeros(3)),
        (torch.zeros(3, 4), torch.zeros(3, dtype=torch.bool)),
    ],
    ids=["logits of one sample", "too few labels", "too many weights", "float labels", "bool labels"],
)
def test_class_loss_refuses(logits, target):
    with pytest.raises(ValueError, match=r"must be .*got \("):
        class_loss(logits, target)


@pytest.mark.parametrize(("labels", "wrong"), [([0, -100, 1], -100), ([-100] * 3, -100), ([0, 4, 1], 4)])
def test_class_loss_leaves_no_label_out(labels, wrong):
    with pytest.raises(ValueError, match=f"target must lie in 0 … 3, got {wrong}"):
        class_loss(torch.randn(3, 4), torch.tensor(labels))


def test_what_is_no_tensor_is_named():
    maps, labels = torch.rand(2, 1, 3, 3), torch.zeros(2).long()
    for call, name in (
        (lambda: class_loss([[0.0, 1.0]] * 2, labels), "logits must be a torch.Tensor, got list"),
        (lambda: class_loss(torch.zeros(2, 2), [0, 1]), "target must be a torch.Tensor, got list"),
        (lambda: saliency_loss(maps.numpy(), maps.numpy()), "maps must be a torch.Tensor, got ndarray"),
        (lambda: saliency_loss(maps, maps.numpy()), "new_maps must be a torch.Tensor, got ndarray"),
        (lambda: normalize_maps(maps, [True]), "valid must be a torch.Tensor, got list"),
        (
            lambda: invariance_loss([maps], [None]),
            r"new_features\['0'\] must be a torch.Tensor, got NoneType",
        ),
        (
            lambda: invariance_loss([maps], [maps], weights=["a"]),
            r"weights\['0'\] must be a number .*got 'a'",
        ),
    ):
        with pytest.raises(TypeError, match=name):
            call()


def test_class_loss_inside_of_transforms():
    logits, target = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    expected = (logits.softmax(1) - F.one_hot(target, 4)) / 6
    assert_close(torch.func.grad(class_loss)(logits, target), expected)
    pairs = torch.func.vmap(class_loss)(logits.view(3, 2, 4), target.view(3, 2))
    assert_close(pairs.mean(), class_loss(logits, target))


# ---------------------------------------------------------------------------------------------------------
# eq. 6


def features(device="cpu"):
    return {"a": torch.randn(2, 3, 4, 4).double().to(device), "b.c": torch.randn(2, 7).double().to(device)}


@pytest.mark.parametrize(("distance", "power"), [("l1", 1), ("l2", 2)], ids=["l1", "l2"])
def test_invariance_loss_is_a_sum_over_layers_of_means(distance, power, device):
    old, new = features(device), features(device)
    means = {k: ((old[k] - new[k]).abs() ** power).mean() for k in old}
    assert_close(invariance_loss(old, new, distance=distance), means["a"] + means["b.c"])
    assert_close(
        invariance_loss(old, new, distance=distance, weights={"b.c": 3.0, "a": 0.5}),
        0.5 * means["a"] + 3 * means["b.c"],
    )


def test_invariance_loss_takes_sequences_and_any_order_of_names():
    old, new = features(), features()
    expected = invariance_loss(old, new, weights={"a": 1, "b.c": 2})
    assert_close(invariance_loss(list(old.values()), tuple(new.values()), weights=[1, 2]), expected)
    assert_close(invariance_loss(old, dict(reversed(new.items())), weights={"b.c": 2, "a": 1}), expected)


def test_invariance_loss_is_zero_for_equal_features(device):
    old = {k: v.requires_grad_() for k, v in features(device).items()}
    loss = invariance_loss(old, {k: v.detach() for k, v in old.items()})
    assert loss == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, list(old.values())))


def test_invariance_loss_of_half_precision_does_not_overflow():
    old, new = torch.full((2, 3), 300.0).half(), torch.full((2, 3), -300.0).half()
    assert invariance_loss([old], [new]) == 600.0**2


@pytest.mark.parametrize(
    ("old", "new", "options", "message"),
    [
        ({}, {}, {}, "at least one layer"),
        ({"a": torch.ones(2)}, {"b": torch.ones(2)}, {}, r"new_features must have the layers \['a'\]"),
        ([torch.ones(2)], [torch.ones(2)] * 2, {}, "new_features must have the layers"),
        ([torch.ones(2)], [torch.ones(2)], {"weights": [1, 2]}, "weights must have the layers"),
        (
            {"a": torch.ones(2)},
            {"a": torch.ones(3)},
            {},
            r"new_features\['a'\] must have the shape .*, \(2,\)",
        ),
        (
            [torch.ones(2)],
            [torch.ones(2)],
            {"weights": [float("nan")]},
            r"weights\['0'\] must lie in .* got nan",
        ),
        ([torch.ones(2)], [torch.ones(2)], {"distance": "cosine"}, r"distance must be one of \['l1', 'l2'\]"),
        (torch.ones(2, 3), [torch.ones(3)] * 2, {}, "features must be a dict or a sequence, got Tensor"),
    ],
    ids=["none", "names", "number", "weights", "no number", "shapes", "distance", "one tensor"],
)
def test_invariance_loss_refuses(old, new, options, message):
    with pytest.raises(ValueError, match=message):
        invariance_loss(old, new, **options)


# ---------------------------------------------------------------------------------------------------------
# eq. 7


def normalised_slowly(pixels, how):
    """One map's valid pixels, straight from the definition."""
    scale = {
        "max": lambda: max(abs(p) for p in pixels),
        "sum": lambda: sum(abs(p) for p in pixels),
        "l2": lambda: sum(p * p for p in pixels) ** 0.5,
        "none": lambda: 1,
    }
    if how != "zscore":
        return [p / scale[how]() for p in pixels]
    mean = sum(pixels) / len(pixels)
    deviation = (sum((p - mean) ** 2 for p in pixels) / len(pixels)) ** 0.5
    return [(p - mean) / deviation for p in pixels]


def compared_slowly(a, b, distance):
    """The distance of two normalised maps, pixel by pixel."""
    if distance == "cosine":
        dot = sum(p * q for p, q in zip(a, b, strict=True))
        return 1 - dot / (sum(p * p for p in a) * sum(q * q for q in b)) ** 0.5
    power = {"mse": 2, "l1": 1}[distance]
    return sum(abs(p - q) ** power for p, q in zip(a, b, strict=True)) / len(a)


@pytest.mark.parametrize("channels", [1, 3], ids=["one channel", "three channels"])
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "everywhere"])
@pytest.mark.parametrize(("normalize", "distance"), EVERY)
def test_saliency_loss_by_its_definition(normalize, distance, masked, channels, device):
    maps, new = torch.randn(2, 4, channels, 5, 6).double().to(device)
    valid = half_valid(device=device) if masked else None
    total = 0
    for i in range(4):
        where = valid[i].expand_as(maps[i]) if masked else torch.ones_like(maps[i], dtype=torch.bool)
        a, b = (normalised_slowly(m[i][where].tolist(), normalize) for m in (maps, new))
        total += compared_slowly(a, b, distance) / 4
    actual = saliency_loss(maps, new, valid, normalize=normalize, distance=distance)
    assert_close(actual, torch.tensor(total, dtype=torch.float64, device=device))


def test_the_paper_s_loss_is_the_default(device):
    maps, new = maps_like(2, 4, 1, 5, 6, device=device)
    expected = ((maps / maps.amax((2, 3), keepdim=True) - new / new.amax((2, 3), keepdim=True)) ** 2).mean()
    assert_close(saliency_loss(maps, new), expected)
    assert_close(saliency_loss(maps, new, normalize=None), ((maps - new) ** 2).mean())


@pytest.mark.parametrize(("normalize", "distance"), EVERY)
def test_saliency_loss_gradient(normalize, distance, device):
    maps, new = (m.requires_grad_() for m in maps_like(2, 3, 1, 3, 4, device=device))
    valid = half_valid(3, 3, 4, device)
    assert gradcheck(
        lambda a, b: saliency_loss(a, b, valid, normalize=normalize, distance=distance), (maps, new)
    )


@pytest.mark.parametrize("distance", sorted(DISTANCES))
@pytest.mark.parametrize("normalize", SCALED)
def test_a_constant_factor_changes_nothing(normalize, distance, device):
    maps, new = maps_like(2, 4, 1, 5, 6, device=device)
    expected = saliency_loss(maps, new, normalize=normalize, distance=distance)
    factors = torch.logspace(-6, 6, 4).double().view(4, 1, 1, 1).to(device)  # each sample has its own
    assert_close(saliency_loss(factors * maps, new, normalize=normalize, distance=distance), expected)
    assert_close(saliency_loss(maps, new / factors, normalize=normalize, distance=distance), expected)


@pytest.mark.parametrize("factor", [1e-25, 2.0**-14, 1.0, 6e4, 1e25], ids=str)
@pytest.mark.parametrize("normalize", SCALED)
def test_a_constant_factor_scales_the_gradient_inversely(normalize, factor, device):
    """Also for factors whose squares leave the range of float32."""
    maps, new = maps_like(2, 4, 1, 5, 6, dtype=torch.float32, device=device)

    def gradient(scale):
        scaled = (scale * maps).requires_grad_()
        return torch.autograd.grad(saliency_loss(scaled, new, normalize=normalize), scaled)[0] * scale

    assert_close(gradient(factor), gradient(1.0), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("normalize", SCALED)
def test_half_precision_is_compared_in_single(normalize, dtype, device):
    maps, new = (m.to(dtype) for m in maps_like(2, 4, 1, 64, 64, dtype=torch.float32, device=device) * 200)
    loss = saliency_loss(maps, new, normalize=normalize)
    assert loss.dtype == torch.float32
    assert_close(loss, saliency_loss(maps.float(), new.float(), normalize=normalize))


DEGENERATE = {
    "zero": lambda m: torch.zeros_like(m),
    "constant": lambda m: torch.full_like(m, 0.3),
    "constant, tiny": lambda m: torch.full_like(m, 1e-20),
    "constant up to rounding": lambda m: 0.3 + 1e-7 * m,
    "smaller than can be divided by": lambda m: m * torch.finfo(m.dtype).tiny,
    "one pixel": lambda m: torch.zeros_like(m).index_fill_(-1, torch.tensor(2, device=m.device), 1.0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("normalize", "distance"), EVERY)
@pytest.mark.parametrize("make", DEGENERATE.values(), ids=DEGENERATE)
def test_degenerate_maps_have_finite_losses_and_gradients(make, normalize, distance, dtype, device):
    ordinary = maps_like(3, 1, 5, 6, dtype=dtype, device=device)
    degenerate = make(ordinary)
    largest = degenerate.abs().max()
    for a, b in itertools.permutations([ordinary, degenerate]):
        a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
        loss = saliency_loss(a, b, normalize=normalize, distance=distance)
        assert loss.isfinite()
        gradients = torch.autograd.grad(loss, (a, b))
        assert all(g.isfinite().all() for g in gradients)
        if largest > 1e-3:  # in proportion to the map: no gradients of 1e8
            assert all(g.abs().max() < 1e4 for g in gradients)
    same = saliency_loss(degenerate, degenerate.clone(), normalize=normalize, distance=distance)
    assert same == 0


@pytest.mark.parametrize(("normalize", "distance"), EVERY)
def test_no_valid_pixel(normalize, distance, device):
    """A sample without one does not count; a batch without one has a loss of zero, and gradients of zero."""
    maps, new = (m.requires_grad_() for m in maps_like(2, 3, 1, 5, 6, device=device))
    valid = torch.ones(3, 1, 5, 6, dtype=torch.bool, device=device)
    valid[1] = False
    options = {"normalize": normalize, "distance": distance}
    loss = saliency_loss(maps, new, valid, **options)
    assert_close(loss, saliency_loss(maps[[0, 2]], new[[0, 2]], **options))
    for mask in (valid, torch.zeros_like(valid)):
        loss = saliency_loss(maps, new, mask, **options)
        gradients = torch.autograd.grad(loss, (maps, new))
        assert all((g[1] == 0).all() and g.isfinite().all() for g in gradients)
    assert loss == 0


@pytest.mark.parametrize("rubbish", [1e30, float("inf"), float("nan")], ids=str)
@pytest.mark.parametrize(("normalize", "distance"), EVERY)
def test_pixels_that_are_not_valid_have_no_say(normalize, distance, rubbish, device):
    maps, new = maps_like(2, 4, 1, 5, 6, device=device)
    valid = half_valid(device=device)
    expected = saliency_loss(maps, new, valid, normalize=normalize, distance=distance)
    spoilt = torch.where(valid, maps, rubbish).requires_grad_()
    loss = saliency_loss(spoilt, new, valid, normalize=normalize, distance=distance)
    assert torch.equal(loss.detach(), expected)
    (gradient,) = torch.autograd.grad(loss, spoilt)
    assert gradient.isfinite().all()
    assert (gradient[~valid] == 0).all()


@pytest.mark.parametrize(("normalize", "distance"), EVERY)
def test_saliency_loss_traces_without_branches(normalize, distance):
    """One graph serves every batch, the degenerate ones included."""

    def loss_and_gradient(a, b, valid):
        a = a.detach().requires_grad_()
        loss = saliency_loss(a, b, valid, normalize=normalize, distance=distance)
        return loss, *torch.autograd.grad(loss, a)

    maps, new = maps_like(2, 4, 1, 5, 6)
    graph = make_fx(loss_and_gradient, tracing_mode="fake")(maps, new, half_valid())
    for a, valid in ((maps, half_valid()), (torch.zeros_like(maps), torch.zeros(4, 1, 5, 6).bool())):
        for actual, expected in zip(graph(a, new, valid), loss_and_gradient(a, new, valid), strict=True):
            assert_close(actual, expected)


def test_torch_compile_sees_one_graph():
    maps, new = (m.requires_grad_() for m in maps_like(2, 4, 1, 5, 6))
    old, logits = features(), torch.randn(4, 3).double()

    def total(a, b, valid, target):
        return (
            saliency_loss(a, b, valid, normalize="zscore")
            + saliency_loss(a, b, valid, distance="cosine")
            + invariance_loss(old, {k: v.flip(0) for k, v in old.items()})
            + class_loss(logits, target)
        )

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    arguments = maps, new, half_valid(), torch.tensor([0, 1, 2, 0])
    assert_close(compiled(*arguments), total(*arguments))
    for actual, expected in zip(
        torch.autograd.grad(compiled(*arguments), (maps, new)),
        torch.autograd.grad(total(*arguments), (maps, new)),
        strict=True,
    ):
        assert_close(actual, expected)


def test_normalize_maps_uses_the_valid_pixels_only():
    maps = torch.tensor([[[[1.0, -2.0, 8.0]]]])
    valid = torch.tensor([[[[True, True, False]]]])
    assert normalize_maps(maps, valid).tolist() == [[[[0.5, -1.0, 0.0]]]]
    assert normalize_maps(maps, valid, "zscore").tolist() == [[[[1.0, -1.0, 0.0]]]]
    assert torch.equal(normalize_maps(maps, how=None), maps)


@pytest.mark.parametrize(("deviation", "divisor"), [(4e-3, 4e-3), (2.5e-4, 1e-3)], ids=["kept", "flat"])
def test_zscores_divide_by_no_less_than_a_thousandth_of_the_peak(deviation, divisor):
    signs = torch.tensor([[[[1.0, -1.0], [1.0, -1.0]]]], dtype=torch.float64)
    scores = normalize_maps(5 * (1 - deviation + deviation * signs), how="zscore")  # the peak is 5
    assert_close(scores, deviation / divisor * signs)


ONES = torch.ones(2, 1, 3, 3)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((ONES, ONES), {"normalize": "maximum"}, r"normalize must be one of \['l2', 'max', .*got 'maximum'"),
        ((ONES, ONES), {"distance": "l2"}, r"distance must be one of \['cosine', 'l1', 'mse'\], got 'l2'"),
        ((ONES, ONES), {"distance": "mes"}, r"got 'mes' \(did you mean 'mse'\?\)"),
        ((ONES, ONES[:1]), {}, r"new_maps must have the shape of maps, \(2, 1, 3, 3\), got \(1, 1, 3, 3\)"),
        ((ONES[0], ONES[0]), {}, r"maps must be floating-point \(N, C, H, W\), got \(1, 3, 3\)"),
        ((ONES.long(), ONES.long()), {}, r"maps must be floating-point .* of torch.int64"),
        ((ONES, ONES, ONES), {}, r"valid must be bool .*got \(2, 1, 3, 3\) of torch.float32"),
        ((ONES, ONES, ONES[:1].bool()), {}, r"valid must be bool of \(2, 1, 3, 3\) .*got \(1, 1, 3, 3\)"),
    ],
    ids=["normalize", "distance", "near", "shapes", "dimensions", "integers", "mask type", "mask shape"],
)
def test_saliency_loss_refuses(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        saliency_loss(*arguments, **options)
