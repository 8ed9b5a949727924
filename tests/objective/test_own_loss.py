"""A class loss of one's own, terms beside the total, networks that return or ask for more, optimisers that call twice."""

import functools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from salnb import Objective, saliency
from salnb.augment import CutMix, HorizontalFlip, Rotation
from salnb.losses import saliency_loss
from salnb.objective.class_terms import ClassTerm
from tests.helpers.methods import cheap
from tests.helpers.networks import conv_bn
from tests.helpers.tolerances import assert_close

TARGET = torch.tensor([0, 1, 2, 3])


@pytest.fixture(params=["eager", "traced"])
def step(request, traced):
    """Calls an objective as it is, or as the graph that is traced of it."""

    def call(objective, *args, **options):
        if request.param == "traced":
            objective.compile(backend="eager")
        return objective(*args, **options)

    return call


def images(n=4):
    return torch.rand(n, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def model():
    torch.manual_seed(3)
    return conv_bn().double().eval()


def seeded():
    return torch.Generator().manual_seed(1)


def focal(logits, target):
    one_hot = F.one_hot(target, logits.shape[1]) if target.ndim == 1 else target
    p = logits.log_softmax(1)
    return -(one_hot * (1 - p.exp()) ** 2 * p).sum(1).mean()


LOSSES = {
    "smoothing": nn.CrossEntropyLoss(label_smoothing=0.1),
    "class weights": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0, 4.0]).double()),
    "focal": focal,
    "partial": functools.partial(F.cross_entropy, label_smoothing=0.2),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_of_ones_own_gets_logits_and_labels_of_both_halves(name, step):
    loss, net, x = LOSSES[name], model(), images()
    losses = step(Objective(net, HorizontalFlip(1.0), class_loss=loss), x, TARGET)
    plain = Objective(net, HorizontalFlip(1.0))(x, TARGET)
    expected = loss(net(torch.cat([x, x.flip(-1)])), TARGET.repeat(2))
    assert_close(losses.class_loss, expected.detach())
    assert_close(losses.saliency_loss, plain.saliency_loss)  # the map explains the label, not its smoothing
    assert_close(losses.total, expected + plain.saliency_loss)
    losses.total.backward()
    mine = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    (expected + Objective(net, HorizontalFlip(1.0), alpha=0)(x, TARGET).total).backward()
    for gradient, p in zip(mine, net.parameters(), strict=True):
        assert_close(gradient, p.grad)


def test_several_labels_of_an_image(step):
    net, x = model(), images()
    target = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 0], [1, 1, 1, 1], [0, 1, 0, 1]]).double()
    losses = step(Objective(net, HorizontalFlip(1.0), class_loss=nn.BCEWithLogitsLoss()), x, target)
    maps, new = (saliency.vanilla_gradient(net, images, target) for images in (x, x.flip(-1)))
    assert_close(losses.saliency_loss, saliency_loss(maps, new.flip(-1)))
    both = net(torch.cat([x, x.flip(-1)]))
    assert_close(losses.class_loss, F.binary_cross_entropy_with_logits(both, target.repeat(2, 1)))


@pytest.mark.parametrize("method", ["vanilla_gradient", "smoothgrad"])
@pytest.mark.parametrize("ignored", [-100, 4, 255])
def test_what_the_loss_ignores_has_no_map(ignored, method, step):
    net, x = model(), images()
    loss = nn.CrossEntropyLoss(ignore_index=ignored)
    options = {"method": method, "method_options": cheap(method, still=True)}
    objective = Objective(net, HorizontalFlip(1.0), class_loss=loss, **options)
    losses = step(objective, x, torch.tensor([0, ignored, 2, ignored]))
    known = Objective(net, HorizontalFlip(1.0), **options)(x[::2], TARGET[::2])
    assert_close(losses.class_loss, known.class_loss)
    assert_close(losses.saliency_loss, known.saliency_loss)


def test_samples_without_any_label_have_no_map():
    net, x, target = model(), images(), torch.eye(4).double()
    target[1] = 0
    losses = Objective(net, HorizontalFlip(1.0), class_loss=nn.BCEWithLogitsLoss())(x, target)
    others = Objective(net, HorizontalFlip(1.0), class_loss=nn.BCEWithLogitsLoss())(
        x[[0, 2, 3]], target[[0, 2, 3]]
    )
    assert_close(losses.saliency_loss, others.saliency_loss)


def test_mixing_gives_weights():
    seen = []

    def loss(logits, target):
        seen.append(target)
        return F.cross_entropy(logits, target)

    x = images()
    losses = Objective(model(), CutMix(), class_loss=loss)(x, TARGET, seeded())
    plain = Objective(model(), CutMix())(x, TARGET, seeded())
    assert seen[0].shape == (8, 4)
    assert_close(losses.total, plain.total)
    with pytest.raises(ValueError, match="target must hold labels from 0 to 3, got -100"):
        Objective(model(), CutMix(), class_loss=loss)(x, torch.tensor([0, 1, 2, -100]), seeded())


def test_state_and_parameters_of_the_loss_are_those_of_the_objective(step):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0).double())

        def forward(self, logits, target):
            return F.cross_entropy(self.scale * logits, target)

    objective = Objective(model(), HorizontalFlip(1.0), class_loss=(loss := Scaled()))
    step(objective, images(), TARGET).total.backward()
    assert loss.scale.grad is not None
    assert "class_term.own.scale" in objective.state_dict()


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        ("focal", TypeError, "class_loss must be a function of logits and targets, got str"),
        (nn.CrossEntropyLoss(reduction="none"), ValueError, r"class_loss must return a scalar .* got \(8,\)"),
        (lambda logits, target: 1.0, ValueError, "class_loss must return a scalar .* got float"),
    ],
)
def test_what_is_no_loss_is_refused(loss, error, message):
    with pytest.raises(error, match=message):
        Objective(model(), HorizontalFlip(1.0), class_loss=loss)(images(), TARGET)


def test_weights_of_another_number_of_classes_are_refused():
    with pytest.raises(ValueError, match=r"target must be .*\(8, 4\), got \(8, 3\)"):
        Objective(model(), HorizontalFlip(1.0), class_loss=nn.BCEWithLogitsLoss())(
            images(), torch.zeros(4, 3)
        )


# --- terms of one's own -------------------------------------------------------------------------------------


def test_logits_with_a_graph_are_for_terms_of_ones_own():
    net, x, teacher = model(), images(), torch.rand(4, 4).double().softmax(1)
    losses = Objective(net, HorizontalFlip(1.0))(x, TARGET)
    assert not losses.logits.requires_grad
    distilled = F.kl_div(losses.logits_with_graph[:4].log_softmax(1), teacher, reduction="batchmean")
    (losses.total + distilled).backward()
    mine = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    Objective(net, HorizontalFlip(1.0))(x, TARGET).total.backward()
    F.kl_div(net(x).log_softmax(1), teacher, reduction="batchmean").backward()
    for gradient, p in zip(mine, net.parameters(), strict=True):
        assert_close(gradient, p.grad)


@pytest.mark.usefixtures("traced")
def test_logits_with_a_graph_elsewhere():
    objective = Objective(model(), HorizontalFlip(1.0))
    with torch.no_grad():
        assert not objective(images(), TARGET).logits_with_graph.requires_grad
    objective.compile(backend="eager")
    with pytest.raises(RuntimeError, match="logits_with_graph: a compiled step hands out none"):
        objective(images(), TARGET).logits_with_graph  # noqa: B018


# --- what networks return, and ask for ----------------------------------------------------------------------


class Wrapped(nn.Module):
    """A network that returns what `form` makes of its logits, and takes a factor of each image."""

    def __init__(self, form, net=None):
        super().__init__()
        self.net, self.form = net or model(), form

    def forward(self, x, factor=None, power=1):
        logits = self.net(x)
        return self.form(logits if factor is None else logits * factor[:, None] ** power)


FORMS = {
    "logits": (lambda z: SimpleNamespace(logits=z), None),
    "tuple": (lambda z: (z, z + 1), lambda out: out[0]),
    "dict": (lambda z: {"scores": z}, lambda out: out["scores"]),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", ["vanilla_gradient", "smoothgrad", "guided_grad_cam"])
def test_networks_may_return_more_than_logits(form, method, step):
    make, output = FORMS[form]
    net, x, options = model(), images(), cheap(method, still=True)
    wrapped = Wrapped(make, net)
    losses = step(
        Objective(wrapped, HorizontalFlip(1.0), method=method, method_options=options, output=output),
        x,
        TARGET,
    )
    plain = Objective(net, HorizontalFlip(1.0), method=method, method_options=options)(x, TARGET)
    assert_close(losses.total, plain.total)
    assert_close(losses.logits, plain.logits)
    maps = saliency.METHODS[method](wrapped, x, TARGET, output=output, **options)
    assert torch.equal(maps, saliency.METHODS[method](net, x, TARGET, **options))


@pytest.mark.parametrize(
    ("form", "cure"),
    [
        (lambda z: (z,), r"got tuple: say where they are, as in output=lambda out: out\[0\]"),
        (
            lambda z: {"a": z},
            r"got dict with \['a'\]: say where they are, as in output=lambda out: out\['a'\]",
        ),
        (lambda z: z[:, :, None], r"got \((4|8), 4, 1\)$"),
    ],
)
def test_the_error_says_where_the_logits_may_be(form, cure):
    for call in (
        Objective(Wrapped(form), HorizontalFlip(1.0)),
        functools.partial(saliency.grad_cam, Wrapped(form)),
    ):
        with pytest.raises(ValueError, match=rf"model must return logits .*{cure}"):
            call(images(), TARGET)


def test_networks_may_take_more_than_images(step):
    net, x, factor = Wrapped(lambda z: z), images(), torch.tensor([1.0, 2.0, 0.5, 3.0]).double()
    kwargs = {"factor": factor, "power": 2}
    losses = step(Objective(net, HorizontalFlip(1.0)), x, TARGET, model_kwargs=kwargs)
    maps, new = (saliency.vanilla_gradient(net, x, TARGET, model_kwargs=kwargs) for x in (x, x.flip(-1)))
    assert_close(losses.saliency_loss, saliency_loss(maps, new.flip(-1)))
    assert_close(losses.logits, net(torch.cat([x, x.flip(-1)]), factor.repeat(2), 2).detach())
    losses.total.backward()


def test_a_compiled_step_takes_the_kwargs_of_each_call(traced):
    net, x = Wrapped(lambda z: z), images()
    objective = Objective(net, HorizontalFlip(1.0))
    objective.compile(backend="eager")
    for factor, power in ((1.0, 1), (2.0, 1), (2.0, 2)):
        kwargs = {"factor": torch.full((4,), factor).double(), "power": power}
        logits = objective(x, TARGET, model_kwargs=kwargs).logits
        assert_close(logits[:4], net(x, **kwargs).detach())
    assert len(traced) == 2  # a tensor is an input of the graph, another power is another graph


class Overwriting(Wrapped):
    """Works in place on the factors, one after the other, which a list may hold."""

    def forward(self, x, factors, seen=None):
        logits = self.net(x)
        for factor in factors if isinstance(factors, list) else [factors]:
            factor *= 2
            logits = logits * (factor.repeat(2) if len(x) == 2 * len(factor) else factor)[:, None]
        if seen is not None:
            seen["batch"] = len(x)
        return logits


@pytest.mark.parametrize("listed", [False, True], ids=["tensor", "list"])
@pytest.mark.parametrize("method", saliency.METHODS)
def test_what_a_network_is_given_beside_the_images_never_changes(method, listed):
    net, x, factor = Overwriting(None), images(), torch.tensor([1.0, 2.0, 0.5, 3.0]).double()
    before, seen = factor.clone(), {}
    kwargs = {"factors": [factor] if listed else factor, "seen": seen}
    explain = functools.partial(saliency.METHODS[method], net, x, TARGET, **cheap(method, still=True))
    plain = saliency.METHODS[method](net.net, x, TARGET, **cheap(method, still=True))
    times = 2 * factor.view(-1, 1, 1, 1)
    # guided Grad-CAM is a product of two
    assert_close(explain(model_kwargs=kwargs), plain * times ** (2 if method == "guided_grad_cam" else 1))
    assert torch.equal(factor, before)
    assert seen == {"batch": 4}  # what holds no tensor is handed on as it is


@pytest.mark.parametrize("kwargs", [lambda f: f, lambda f: [f[:1]]], ids=["doubled", "list"])
def test_an_objective_leaves_what_it_hands_on_as_it_was(step, kwargs):
    net, x, factor = Overwriting(None), images(), torch.tensor([1.0, 2.0, 0.5, 3.0]).double()
    given = kwargs(factor)
    before = factor.clone()
    for _ in range(2):
        step(Objective(net, HorizontalFlip(1.0)), x, TARGET, model_kwargs={"factors": given}).total.backward()
    assert torch.equal(factor, before)


def test_a_gradient_reaches_what_a_network_is_given_beside_the_images():
    net, x = Wrapped(lambda z: z), images()
    factor = torch.ones(4).double().requires_grad_()
    saliency.vanilla_gradient(
        net, x, TARGET, create_graph=True, model_kwargs={"factor": factor}
    ).sum().backward()
    assert_close(factor.grad, saliency.vanilla_gradient(net, x, TARGET).sum((1, 2, 3)))


@pytest.mark.parametrize("listed", [False, True], ids=["tensor", "list"])
@pytest.mark.parametrize("method", saliency.METHODS)
def test_what_is_given_beside_the_images_may_be_made_in_inference_mode(method, listed):
    net, x = Overwriting(None), images()
    with torch.inference_mode():
        factor = torch.ones(1).double()
    kwargs = {"factors": [factor] if listed else factor}
    saliency.METHODS[method](net, x, TARGET, **cheap(method), model_kwargs=kwargs)
    Objective(net, HorizontalFlip(1.0))(x, TARGET, model_kwargs=kwargs).total.backward()


def test_a_loss_of_ones_own_has_no_part_for_confident_images():
    with pytest.raises(ValueError, match="confidence and class_loss do not go together"):
        Objective(model(), Rotation(20), confidence=0.9, class_loss=nn.CrossEntropyLoss())


# --- more than one call a step ------------------------------------------------------------------------------


def test_the_schedule_counts_the_steps_that_it_is_told():
    objective = Objective(model(), Rotation(20), every=2, warmup=1).train()
    found = []
    for step in range(5):
        found.append([objective(images(), TARGET, step=step).has_saliency for _ in range(2)])
    assert found == [[False] * 2, [True] * 2, [False] * 2, [True] * 2, [False] * 2]
    assert objective.steps_done == 5
    assert objective(images(), TARGET).has_saliency  # goes on from there
    objective(images(), TARGET, step=2**62)
    assert objective.steps_done == 2**62 + 1
    for step in (-1, 2**62 + 1):
        with pytest.raises(ValueError, match="step must lie in"):
            objective(images(), TARGET, step=step)


def test_lbfgs_sees_one_function_in_a_step():
    net, x = model(), images()
    objective = Objective(net, Rotation(20), every=2).train()
    optimizer = torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=4, line_search_fn="strong_wolfe")
    for step in range(2):
        totals = []

        def closure(step=step, totals=totals):
            optimizer.zero_grad()
            losses = objective(x, TARGET, torch.Generator().manual_seed(step), step=step)
            losses.total.backward()
            totals.append((losses.total.item(), losses.has_saliency))
            return losses.total

        optimizer.step(closure)
        assert len(totals) > 2
        assert {salient for _, salient in totals} == {step == 0}
        assert totals[-1][0] < totals[0][0]


def test_a_pair_is_explained_where_both_images_have_a_label():
    term = ClassTerm(nn.BCEWithLogitsLoss())
    targets = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [1.0, 0.0], [0.0, 0.0]])
    _, known = term.explained(targets, 2)
    assert known.tolist() == [False, True, False]
