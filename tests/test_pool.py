"""Maps compared block by block: the means of the blocks, their gradients, and the loss made of them."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from salnb import Objective, saliency
from salnb.augment import Affine, Rotation
from salnb.losses import normalize_maps, pool_maps, saliency_loss
from tests.helpers.finite_differences import assert_gradient
from tests.helpers.methods import cheap
from tests.helpers.networks import conv_bn
from tests.helpers.tolerances import assert_close

TARGET = torch.tensor([0, 1, 2, 3])
# height, width, size of a block: whole blocks, smaller ones at one rim and at both, one block
SHAPES = [(6, 8, 2), (5, 8, 2), (7, 5, 3), (9, 7, 4), (5, 6, 5), (4, 4, 1)]


def slow(maps, valid, size):
    """Block by block, from the definition."""
    n, channels, height, width = maps.shape
    rows, columns = -(-height // size), -(-width // size)
    means = torch.zeros(n, channels, rows, columns, dtype=maps.dtype)
    found = torch.zeros(n, valid.shape[1], rows, columns, dtype=torch.bool)
    for i in range(n):
        for r in range(rows):
            for c in range(columns):
                block = (slice(r * size, (r + 1) * size), slice(c * size, (c + 1) * size))
                for k in range(channels):
                    mask = valid[i, min(k, valid.shape[1] - 1)][block]
                    if mask.any():
                        means[i, k, r, c] = maps[i, k][block][mask].mean()
                        found[i, min(k, valid.shape[1] - 1), r, c] = True
    return means, found


def masked(n, channels, height, width):
    """A mask with whole blocks left out: of the second sample, everything."""
    valid = torch.rand(n, channels, height, width) < 0.4
    valid[0, :, :2, :2] = False
    valid[1] = False
    return valid


@pytest.mark.parametrize("channels", [None, 1, 2], ids=["everywhere", "one mask", "a mask a channel"])
@pytest.mark.parametrize(("height", "width", "size"), SHAPES)
def test_blocks_are_averaged_over_their_valid_pixels(height, width, size, channels):
    maps = torch.randn(3, 2, height, width, dtype=torch.float64)
    valid = None if channels is None else masked(3, channels, height, width)
    means, found = pool_maps(maps, valid, size)
    expected, blocks = slow(maps, torch.ones_like(maps[:, :1]).bool() if valid is None else valid, size)
    assert_close(means, expected)
    assert torch.equal(found, blocks)
    if channels:
        assert not found[1].any()
        assert (means[1] == 0).all()


def test_what_is_not_valid_may_be_anything():
    maps = torch.rand(1, 1, 4, 4)
    valid = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    valid[..., 0, 0] = valid[..., 3, 3] = False
    expected = pool_maps(maps, valid, 2)[0]
    maps[..., 0, 0], maps[..., 3, 3] = float("inf"), float("nan")
    maps.requires_grad_()
    means, _ = pool_maps(maps, valid, 2)
    assert torch.equal(means, expected)
    (gradient,) = torch.autograd.grad(means.sum(), maps)
    assert gradient.isfinite().all()
    assert (gradient[~valid] == 0).all()


def test_half_precision_is_averaged_as_single():
    maps = torch.full((1, 1, 32, 32), 60000.0, dtype=torch.float16)
    means, _ = pool_maps(maps, None, 16)
    assert means.dtype == torch.float32
    assert (means == 60000.0).all()


@pytest.mark.parametrize("with_mask", [False, True], ids=["everywhere", "masked"])
def test_gradients_of_the_means_and_of_the_loss(with_mask):
    maps, new_maps = (torch.randn(2, 1, 3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    valid = masked(2, 1, 3, 5) if with_mask else None
    assert gradcheck(lambda x: pool_maps(x, valid, 3)[0], maps)
    for normalize, distance in (("max", "mse"), ("zscore", "cosine"), ("none", "l1")):
        options = {"normalize": normalize, "distance": distance, "pool": 2}
        assert gradcheck(lambda a, b: saliency_loss(a, b, valid, **options), (maps, new_maps))  # noqa: B023


@pytest.mark.parametrize("distance", ["mse", "l1"])
def test_the_loss_compares_normalised_means(distance):
    maps, new_maps = torch.rand(2, 3, 1, 7, 6, dtype=torch.float64)
    valid = masked(3, 1, 7, 6)
    (a, found), (b, _) = slow(maps, valid, 2), slow(new_maps, valid, 2)
    gaps = normalize_maps(a, found, "sum") - normalize_maps(b, found, "sum")
    gaps = gaps.abs() if distance == "l1" else gaps.square()
    samples = [gaps[i][found[i]].mean() for i in range(3) if found[i].any()]
    assert len(samples) == 2
    expected = torch.stack(samples).mean()
    loss = saliency_loss(maps, new_maps, valid, normalize="sum", distance=distance, pool=2)
    assert_close(loss, expected)
    assert saliency_loss(maps, new_maps, valid, normalize="sum", distance=distance) != loss
    assert saliency_loss(maps, new_maps, torch.zeros_like(valid), pool=2) == 0


def test_a_shift_within_a_block_is_no_distance():
    maps = torch.zeros(1, 1, 8, 8)
    maps[..., 2, 2] = 1
    moved = maps.roll((1, 1), (-2, -1))
    assert saliency_loss(maps, moved, pool=4) == 0
    assert saliency_loss(maps, moved, pool=2) == 0
    assert saliency_loss(maps, moved) > 0
    assert saliency_loss(maps, maps.roll(4, -1), pool=4) > 0


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (0, "pool must be between 1 and the shorter side of the maps, 5, got 0"),
        (-2, "pool must be between 1 and the shorter side of the maps, 5, got -2"),
        (6, "pool must be between 1 and the shorter side of the maps, 5, got 6"),
    ],
)
def test_a_block_fits_into_the_maps(size, message):
    maps = torch.zeros(1, 1, 5, 7)
    for call in (lambda: pool_maps(maps, None, size), lambda: saliency_loss(maps, maps, pool=size)):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_block_has_a_whole_number_of_pixels():
    maps = torch.zeros(1, 1, 5, 7)
    for call in (lambda: pool_maps(maps, None, 2.5), lambda: saliency_loss(maps, maps, pool=2.5)):
        with pytest.raises(TypeError, match=r"pool must be a whole number in .* got 2\.5"):
            call()


def test_shapes_and_types_are_checked():
    with pytest.raises(ValueError, match=r"maps must be floating-point \(N, C, H, W\)"):
        pool_maps(torch.zeros(5, 7), None, 2)
    with pytest.raises(ValueError, match="valid must be bool of"):
        pool_maps(torch.zeros(1, 1, 5, 7), torch.ones(1, 1, 5, 7), 2)


# --- in the objective --------------------------------------------------------------------------------------


def step(objective, images):
    """One step with repeatable random numbers: the losses, and all gradients in one vector."""
    objective.zero_grad()
    torch.manual_seed(11)
    losses = objective(images, TARGET, torch.Generator().manual_seed(7))
    losses.total.backward()
    return losses, torch.cat([p.grad.flatten() for p in objective.parameters()])


@pytest.mark.parametrize("method", saliency.METHODS)
def test_gradient_of_the_pooled_term(method):
    objective = Objective(
        conv_bn().double(), Rotation(20), method=method, method_options=cheap(method), pool=3
    )
    images = torch.rand(4, 3, 8, 8, dtype=torch.float64)

    def loss():
        torch.manual_seed(11)
        return objective(images, TARGET, torch.Generator().manual_seed(7)).saliency_loss

    assert assert_gradient(loss, objective.parameters()) > 1e-4


def test_eager_and_compiled_agree(traced):
    """A changed size of the blocks needs another graph."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 25, 4)).double()
    eager = Objective(model, Affine(20), alpha=0.0, pool=2)
    compiled = copy.deepcopy(eager)
    compiled.compile(backend="eager")
    for pool, graphs in ((2, 1), (2, 1), (3, 2)):
        eager.pool = compiled.pool = pool
        images = torch.rand(4, 3, 7, 7, dtype=torch.float64)
        (expected, gradient), (found, found_gradient) = step(eager, images), step(compiled, images)
        assert_close(found.total.detach(), expected.total.detach())
        assert_close(found_gradient, gradient)
        assert gradient.abs().max() > 0
        assert len(traced) == graphs


def test_the_size_of_a_block_is_checked():
    with pytest.raises(ValueError, match="pool must be at least 1, got 0"):
        Objective(conv_bn(), Rotation(20), pool=0)
    objective = Objective(conv_bn(), Rotation(20), pool=9)
    with pytest.raises(ValueError, match="pool must be between 1 and the shorter side of the maps, 8, got 9"):
        objective(torch.rand(4, 3, 8, 8), TARGET)
