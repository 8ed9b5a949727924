"""The cost of a training in advance, against what torch counts while a step is made."""

import contextlib
import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from salnb import Objective, augment, data, models
from salnb._common.catalog import METHODS
from salnb.data.paper import HUB
from salnb.study.cost import forward_flops, markdown, steps, training_flops
from salnb.study.grids import UNCHOSEN, trainings
from salnb.study.scale import load_scale
from salnb.train.config import Config

CONFIG = Config(out="runs", train_images=64, batch_size=8, epochs=3, gamma=0.0)


def with_(**settings):
    return dataclasses.replace(CONFIG, **settings)


class NoModules(contextlib.nullcontext):
    """The counter's view of modules, which does not allow for gradients inside a forward pass."""

    parents = frozenset({"Global"})


def counted(config):
    """What torch counts in one step."""
    torch.manual_seed(0)
    repeats = METHODS[config.method].repeats
    options = {repeats: config.samples} if repeats else None
    objective = Objective(
        models.build(config.model, 10),
        augment.AUGMENTATIONS[config.augmentation](),
        gamma=config.gamma,
        method=config.method,
        method_options=options,
    )
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = NoModules()
    images, labels = torch.rand(config.batch_size, 3, config.size, config.size), torch.arange(8)
    with counter:
        objective(images, labels).total.backward()
    return counter.get_total_flops()


def test_forward_pass_is_what_torch_counts():
    model = models.build("small", 10).eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.rand(1, 3, 32, 32))
    assert forward_flops("small", 32, 10) == counter.get_total_flops()


@pytest.mark.parametrize("gamma", [0.0, 1.0])
@pytest.mark.parametrize("method", METHODS)
def test_step_is_what_torch_counts(method, gamma):
    config = with_(method=method, gamma=gamma, samples=2)
    one = dataclasses.replace(config, train_images=8, epochs=1)
    assert training_flops(one) == pytest.approx(counted(config), rel=0.03)


def test_a_step_without_augmentation_costs_the_same():
    assert training_flops(with_(train_images=8, epochs=1)) == pytest.approx(
        counted(with_(augmentation="identity")), rel=0.03
    )


def test_steps_are_whole_batches():
    assert steps(CONFIG) == 24
    assert steps(with_(batch_size=7)) == 3 * 9


@pytest.mark.parametrize(
    ("every", "warmup", "active"), [(1, 0, 24), (4, 0, 6), (1, 20, 4), (3, 4, 7), (1, 99, 0)]
)
def test_only_steps_with_a_saliency_loss_pay_for_it(every, warmup, active):
    """As the objective's own counter says."""
    objective = Objective(torch.nn.Identity(), augment.Affine(), gamma=1.0, every=every, warmup=warmup)
    seen = 0
    for _ in range(24):
        seen += objective.current_gamma() > 0
        objective.steps_done += 1
    assert seen == active
    ours = training_flops(with_(gamma=1.0, every=every, warmup=warmup))
    assert ours == pytest.approx(training_flops(CONFIG) * (24 + active) / 24)


@pytest.mark.parametrize("name", [*HUB, "imagenet-streamed"])
def test_published_sets_have_a_known_size(name):
    assert steps(with_(data=name, train_images=None, batch_size=256, epochs=1)) > 100


def test_digit_scenes_are_counted():
    config = with_(train_images=None, epochs=1)
    assert steps(config) == len(data.load(config.data, 32).train) // 8


def test_the_table_counts_trainings_and_hours():
    header, _, row = (
        line.strip("| ").split(" | ") for line in markdown("table3", {"smoke": 1e9}).splitlines()
    )
    cells = dict(zip(header, row, strict=True))
    planned = trainings("table3", load_scale("smoke"), *UNCHOSEN)
    flops = sum(training_flops(training.config("runs")) for training in planned)
    assert cells["runs"] == "10"
    assert float(cells["operations, 10¹⁵"]) == pytest.approx(flops / 1e15, rel=0.05)
    assert float(cells["hours"]) == pytest.approx(flops / 1e9 / 3600, rel=0.1)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="rates must be positive, got 0 for smoke"):
        markdown("table1", {"smoke": 0})
    with pytest.raises(ValueError, match="'huge' is unknown"):
        forward_flops("huge", 32, 10)
