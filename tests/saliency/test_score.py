"""Whose gradient a map is: a logit's, or that of the logarithm of the class's probability."""

import pytest
import torch
from torch import nn

from salnb import Objective, saliency
from salnb.augment import HorizontalFlip
from tests.helpers.methods import cheap
from tests.helpers.networks import conv_bn
from tests.helpers.tolerances import assert_close


def run(method, *args, **options):
    return saliency.METHODS[method](*args, **cheap(method, 3, still=True), **options)


class Shifted(nn.Module):
    """A network with a function of the image added to all its logits, which changes no probability."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        logits = self.network(x)
        return logits + 5 * (x[:, :1] ** 2).sum((1, 2, 3))[:, None] * (1 + logits[:, :1])


@pytest.mark.parametrize("method", ["vanilla_gradient", "smoothgrad", "grad_cam"])
def test_maps_of_the_log_probability_do_not_change_with_what_is_added_to_all_logits(method):
    network = conv_bn(nn.SiLU).double().eval()
    images, labels = torch.rand(3, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 3, 1])
    options = {"layer": "3"} if method == "grad_cam" else {}
    maps = {}
    for score in ("logit", "log_prob"):
        plain = run(method, network, images, labels, score=score, **options)
        prefix = {"layer": "network.3"} if method == "grad_cam" else {}
        maps[score] = plain, run(method, Shifted(network), images, labels, score=score, **prefix)
    assert_close(*maps["log_prob"], 1e-8)
    assert (maps["logit"][0] - maps["logit"][1]).abs().max() > 0.1 * maps["logit"][0].max()


def test_the_map_of_the_log_probability_is_its_gradient():
    network = conv_bn().double().eval()
    images, weights = (
        torch.rand(2, 3, 8, 8, dtype=torch.float64, requires_grad=True),
        torch.rand(2, 4).double(),
    )
    score = (network(images).log_softmax(1) * weights).sum()
    (expected,) = torch.autograd.grad(score, images)
    found = saliency.vanilla_gradient(network, images.detach(), weights, reduce=None, score="log_prob")
    assert_close(found, expected, 1e-10)


@pytest.mark.parametrize("method", saliency.METHODS)
def test_an_unknown_score_is_named(method):
    with pytest.raises(ValueError, match=r"score 'logits' is unknown.*did you mean 'logit'"):
        run(method, conv_bn(), torch.rand(1, 3, 8, 8), 0, score="logits")


@pytest.mark.parametrize("score", ["logit", "log_prob"])
@pytest.mark.parametrize("method", ["vanilla_gradient", "smoothgrad"])
def test_the_objective_takes_its_maps_of_the_score(method, score):
    network = conv_bn().double().eval()
    images, labels = torch.rand(4, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 3, 1, 1])
    augmentation = HorizontalFlip(p=1)
    options = {"method": method, "method_options": cheap(method, 3, still=True), "score": score}
    objective = Objective(network, augmentation, normalize="none", **options)
    maps = [run(method, network, x, labels, score=score) for x in (images, images.flip(-1))]
    expected = (maps[0] - maps[1].flip(-1)).square().mean()
    assert_close(objective(images, labels).saliency_loss, expected, 1e-8)


@pytest.mark.parametrize("method", saliency.METHODS)
def test_the_log_probability_of_one_logit_is_refused(method):
    network, images = conv_bn(num_classes=1).eval(), torch.rand(2, 3, 8, 8)
    assert run(method, network, images, 0).any()
    with pytest.raises(ValueError, match=r"'log_prob' needs logits of two classes or more, .* torch.cat"):
        run(method, network, images, 0, score="log_prob")


def test_the_objective_names_an_unknown_score():
    with pytest.raises(ValueError, match="score 'probability' is unknown"):
        Objective(conv_bn(), HorizontalFlip(), score="probability")
