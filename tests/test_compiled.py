"""`Objective.compile()`: the numbers of the eager objective, whatever changes between steps.

Backend "eager" runs the traced graph as it is, which tests all but the compiler; Inductor is slow to start.
"""

import copy
import pickle

import pytest
import torch
from torch import nn

from salnb import Objective, saliency
from salnb.augment import AUGMENTATIONS, Affine, Identity, Rotation
from tests.networks import conv_bn
from tests.tolerances import assert_close

TARGET = torch.tensor([0, 1, 2, 3])


class Backend:
    """Runs graphs as they are, and counts."""

    def __init__(self):
        self.graphs = self.runs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1

        def run(*tensors):
            self.runs += 1
            return graph(*tensors)

        return run


def images(n=4, dtype=torch.float64):
    return torch.rand(n, 3, 8, 8, dtype=dtype)


def pair(model=None, augmentation=None, backend="eager", **kwargs):
    """The same objective eager and compiled, on models of their own."""
    eager = Objective(model or conv_bn().double(), augmentation or Rotation(20), **kwargs)
    compiled = copy.deepcopy(eager)
    compiled.compile(backend=backend)
    return eager, compiled


def step(objective, x, target=TARGET, backward=lambda losses: losses.total.backward()):
    """One step with repeatable random numbers: the losses, and all gradients in one vector."""
    objective.zero_grad()
    torch.manual_seed(11)
    losses = objective(x, target, torch.Generator().manual_seed(7))
    backward(losses)
    gradients = [p.grad for p in objective.parameters()]
    assert all(g is not None for g in gradients)
    return losses, torch.cat([g.flatten() for g in gradients])


def assert_same(eager, compiled, x, target=TARGET, tolerance=None):
    """Losses, gradients and buffers after one step of each."""
    (expected, gradient), (found, found_gradient) = (step(o, x, target) for o in (eager, compiled))
    for field in ("total", "class_loss", "invariance_loss", "saliency_loss", "logits"):
        assert_close(getattr(found, field).detach(), getattr(expected, field).detach(), tolerance)
    assert_close(found_gradient, gradient, tolerance)
    for buffer, other in zip(compiled.buffers(), eager.buffers(), strict=True):
        assert_close(buffer.double(), other.double(), tolerance)
    assert gradient.abs().max() > 0
    return expected


TERMS = {"class": (1.0, 0.0, 0.0), "invariance": (0.0, 1.0, 0.0), "saliency": (0.0, 0.0, 1.0)}


@pytest.mark.parametrize("term", TERMS)
def test_each_term_alone(term):
    """Alone, because a term that is dropped without a word hides behind the cross-entropy."""
    alpha, beta, gamma = TERMS[term]
    backend = Backend()
    eager, compiled = pair(
        alpha=alpha, beta=beta, gamma=gamma, layers=["3"] if beta else [], backend=backend
    )
    for _ in range(2):
        assert getattr(assert_same(eager, compiled, images()), f"{term}_loss") > 0
    assert (backend.graphs, backend.runs) == (1, 2)


@pytest.mark.parametrize("method", saliency.METHODS)
def test_every_method(method):
    """A ReLU rule is open while the map's gradient is traced and closed while the parameters' are."""
    options = {"n_samples": 2} if method == "smoothgrad" else {}
    eager, compiled = pair(alpha=0.0, method=method, method_options=options)
    assert assert_same(eager, compiled, images()).saliency_loss > 0


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_every_augmentation(augmentation):
    eager, compiled = pair(augmentation=AUGMENTATIONS[augmentation](), normalize="l2", distance="cosine")
    assert_same(eager, compiled, images())


@pytest.mark.parametrize("target", ["labels", "mixed"])
def test_a_step_for_each_kind_of_batch(target):
    """Shapes, modes, the term's coming and going, freezing and unfreezing: each is met with its own graph."""
    backend = Backend()
    eager, compiled = pair(backend=backend, every=2, warmup=1)
    both = (eager, compiled)
    labels = TARGET if target == "labels" else torch.rand(4, 4, dtype=torch.float64).softmax(1)
    for graphs in (1, 2, 2, 2):  # without the term, with, without, with
        assert_same(eager, compiled, images(), labels)
        assert backend.graphs == graphs
    assert_same(eager, compiled, images(3), labels[:3])
    for objective in both:
        objective.eval()
    assert_same(eager, compiled, images(), labels)
    for objective in both:
        objective.train()
        objective.model[1].eval()
    assert_same(eager, compiled, images(), labels)
    for objective in both:
        objective.distance = "l1"
        objective.steps_done = 1
    assert_same(eager, compiled, images(), labels)
    assert backend.graphs == 6


def test_changed_weights_need_no_new_graph():
    backend = Backend()
    eager, compiled = pair(backend=backend)
    for gamma in (0.5, 0.7, 2.0):
        eager.gamma = compiled.gamma = gamma
        assert_same(eager, compiled, images())
    assert backend.graphs == 1


def test_frozen_parameters():
    eager, compiled = pair()
    assert_same(eager, compiled, images())
    for objective in (eager, compiled):
        objective.model[0].requires_grad_(False)
        objective.zero_grad()
        objective(images(), TARGET, torch.Generator().manual_seed(1)).total.backward()
        assert objective.model[0].weight.grad is None
        assert objective.model[3].weight.grad is not None


def test_training_stays_the_same():
    eager, compiled = pair(model=conv_bn().double(), beta=0.5, layers=["3"])
    optimizers = [torch.optim.SGD(o.parameters(), lr=0.1, momentum=0.9) for o in (eager, compiled)]
    for _ in range(4):
        x = images()
        assert_same(eager, compiled, x)
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(eager.parameters(), compiled.parameters(), strict=True):
        assert_close(q, p, 1e-8)


def test_accumulation_and_scaling():
    eager, compiled = pair()
    x = images()
    for objective in (eager, compiled):
        for _ in range(2):
            (objective(x, TARGET, torch.Generator().manual_seed(7)).total * 64.0 / 2).backward()
    for p, q in zip(eager.parameters(), compiled.parameters(), strict=True):
        assert_close(q.grad, p.grad, None if p.ndim > 1 else 1e-8) if p.grad.abs().max() > 1e-9 else None


class Noisy(nn.Sequential):
    def __init__(self):
        super().__init__(*conv_bn()[:6], nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))


def test_dropout_is_drawn_anew_in_each_step():
    """With the seed of the eager step its numbers come out, with another seed others; half is dropped."""
    eager, compiled = pair(model=Noisy().double())
    x = images()
    assert_same(eager, compiled, x)
    generator = torch.Generator()
    torch.manual_seed(1)
    first, second = (compiled(x, TARGET, generator.manual_seed(7)).logits for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(compiled(x, TARGET, generator.manual_seed(7)).logits, first)


def test_validation_is_eager():
    backend = Backend()
    eager, compiled = pair(backend=backend)
    for objective in (eager.eval(), compiled.eval()):
        with torch.no_grad():
            objective.found = objective(images(), TARGET, torch.Generator().manual_seed(1)).total
    assert backend.graphs == 0
    assert not compiled.found.requires_grad


def test_bfloat16_autocast_is_traced():
    backend = Backend()
    eager, compiled = pair(model=conv_bn(), backend=backend)
    x = images(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(eager, compiled, x)
        assert compiled(x, TARGET).logits.dtype == torch.bfloat16
    assert_same(eager, compiled, x)
    assert backend.graphs == 2


def test_images_in_channels_last():
    eager, compiled = pair()
    for objective in (eager, compiled):
        objective.to(memory_format=torch.channels_last)
    assert_same(eager, compiled, images().contiguous(memory_format=torch.channels_last))


def test_only_the_total_carries_a_graph_and_only_once():
    _, compiled = pair(beta=0.5, layers=["3"])
    found = compiled(images(), TARGET)
    assert found.total.requires_grad
    assert not any(
        t.requires_grad for t in (found.class_loss, found.invariance_loss, found.saliency_loss, found.logits)
    )
    found.total.backward()
    with pytest.raises(RuntimeError, match="a second time"):
        found.total.backward()
    parameter = compiled.model[0].weight
    (gradient,) = torch.autograd.grad(compiled(images(), TARGET).total, parameter, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


def test_copies_compile_for_themselves():
    _, compiled = pair(backend="eager")
    x = images()
    compiled(x, TARGET)
    for twin in (copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))):
        assert_same(copy.deepcopy(compiled), twin, x)
        with torch.no_grad():
            twin.model[0].weight.mul_(2)
        assert not torch.equal(twin.model[0].weight, compiled.model[0].weight)


class Data(nn.Sequential):
    """A network that looks at the values it computes."""

    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


def test_what_cannot_be_compiled_says_so():
    x = images(dtype=torch.float32)
    _, compiled = pair(model=Data(*conv_bn()))
    with pytest.raises(RuntimeError, match=r"compile\(\) needs a model whose operations do not depend on the values"):
        compiled(x, TARGET)
    _, compiled = pair(model=conv_bn())
    with pytest.raises(ValueError, match="images must not require a gradient after compile"):
        compiled(x.requires_grad_(), TARGET)
    x = images(dtype=torch.float32)
    for _ in range(2):  # when the graph is new, and when it is not
        with pytest.raises(ValueError, match="target must lie in 0 … 3, got 4"):
            compiled(x, TARGET + 1)


@pytest.mark.parametrize("method", ["vanilla_gradient", "guided_backprop"])
def test_torch_compile_of_the_objective_is_equal(method):
    """It runs the objective uncompiled."""
    eager, compiled = pair(alpha=0.0, method=method, beta=0.5, layers=["3"])
    compiled = torch.compile(copy.deepcopy(eager), backend="eager")
    assert assert_same(eager, compiled, images()).saliency_loss > 0


def test_a_compiled_model_inside_is_run_as_written():
    eager, _ = pair()
    inside = copy.deepcopy(eager)
    inside.model = torch.compile(inside.model, backend="aot_eager")
    with torch.no_grad():
        inside.model(images())
        eager.model(images())
    x = images()
    assert_close(step(inside, x)[1], step(eager, x)[1])


@pytest.mark.slow
@pytest.mark.parametrize("term", TERMS)
def test_inductor(term):
    alpha, beta, gamma = TERMS[term]
    augmentation = Affine(20) if gamma else Identity()
    layers = ["3"] if beta else []
    if beta:
        augmentation = Rotation(20)
    eager, compiled = pair(
        model=Noisy().double(), augmentation=augmentation, alpha=alpha, beta=beta, gamma=gamma, layers=layers,
        backend="inductor",
    )  # fmt: skip
    for objective in (eager, compiled):
        objective.model[6].p = 0.0  # its random numbers are its own
    for _ in range(2):
        assert_same(eager, compiled, images())
    torch.manual_seed(0)
    compiled.model[6].p = 0.5
    compiled.compile(backend="inductor")
    x = images()
    first, second = (compiled(x, TARGET, torch.Generator().manual_seed(7)).logits for _ in range(2))
    assert not torch.equal(first, second)
