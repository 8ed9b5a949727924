"""`Objective.compile()`: the numbers of the eager objective, whatever changes between steps.

Most tests run the traced graph as it is (`traced`): PyTorch's compiler takes its time, and is tried in a few.
"""

import copy
import pickle
import re

import pytest
import torch
from torch import nn
from torch.torch_version import TorchVersion

from salnb import Objective, saliency
from salnb.augment import AUGMENTATIONS, Identity, Rotation
from tests.helpers.methods import cheap
from tests.helpers.networks import conv_bn
from tests.helpers.tolerances import assert_close, relative_difference

TARGET = torch.tensor([0, 1, 2, 3])


class Backend:
    """Runs graphs as they are, and counts."""

    def __init__(self):
        self.graphs = self.runs = 0

    def __call__(self, graph, *args, **kwargs):
        self.graphs += 1

        def run(*tensors):
            self.runs += 1
            return graph(*tensors)

        return run


@pytest.fixture
def traced(monkeypatch):
    """Puts a counting backend in the place of PyTorch's compiler."""
    backend = Backend()
    monkeypatch.setattr(torch, "compile", backend)
    return backend


def images(n=4, dtype=torch.float64):
    return torch.rand(n, 3, 8, 8, dtype=dtype)


def pair(model=None, augmentation=None, backend="eager", device="cpu", **kwargs):
    """The same objective eager and compiled, on models of their own."""
    eager = Objective(model or conv_bn().double(), augmentation or Rotation(20), **kwargs).to(device)
    compiled = copy.deepcopy(eager)
    compiled.compile(backend=backend)
    return eager, compiled


def step(objective, x, target=TARGET, backward=lambda losses: losses.total.backward()):
    """One step with repeatable random numbers: the losses, and all gradients in one vector."""
    objective.zero_grad()
    torch.manual_seed(11)
    losses = objective(x, target.to(x.device), torch.Generator().manual_seed(7))
    backward(losses)
    gradients = [p.grad for p in objective.parameters()]
    assert all(g is not None for g in gradients)
    return losses, torch.cat([g.flatten() for g in gradients])


def assert_same(eager, compiled, x, target=TARGET, tolerance=None):
    """Losses, gradients and buffers after one step of each."""
    (expected, gradient), (found, found_gradient) = (step(o, x, target) for o in (eager, compiled))
    for field in ("total", "class_loss", "invariance_loss", "saliency_loss", "logits"):
        assert_close(getattr(found, field).detach(), getattr(expected, field).detach(), tolerance)
    assert found.has_saliency == expected.has_saliency
    assert_close(found_gradient, gradient, tolerance)
    for buffer, other in zip(compiled.buffers(), eager.buffers(), strict=True):
        assert_close(buffer.double(), other.double(), tolerance)
    assert gradient.abs().max() > 0
    return expected


TERMS = {"class": (1.0, 0.0, 0.0), "invariance": (0.0, 1.0, 0.0), "saliency": (0.0, 0.0, 1.0)}


@pytest.mark.parametrize("term", TERMS)
def test_each_term_alone(term, device):
    """Alone, because a term that is dropped without a word hides behind the cross-entropy."""
    alpha, beta, gamma = TERMS[term]
    backend = Backend()
    eager, compiled = pair(
        alpha=alpha, beta=beta, gamma=gamma, layers=["3"] if beta else [], backend=backend, device=device
    )
    for _ in range(2):
        assert getattr(assert_same(eager, compiled, images().to(device)), f"{term}_loss") > 0
    assert (backend.graphs, backend.runs) == (1, 2)


@pytest.mark.parametrize("method", saliency.METHODS)
@pytest.mark.usefixtures("traced")
def test_every_method(method, device):
    """A ReLU rule acts while the map's gradient is traced and does not while the parameters' are."""
    eager, compiled = pair(alpha=0.0, method=method, method_options=cheap(method), device=device)
    assert assert_same(eager, compiled, images().to(device)).saliency_loss > 0


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
@pytest.mark.usefixtures("traced")
def test_every_augmentation(augmentation, device):
    eager, compiled = pair(
        Small(), augmentation=AUGMENTATIONS[augmentation](), normalize="l2", distance="cosine", device=device
    )
    assert_same(eager, compiled, images().to(device))


def test_a_graph_for_each_kind_of_step(traced):
    """Shapes, modes, settings, the term's coming and going: each is met with its own graph."""
    eager, compiled = pair(Small(), every=2, warmup=1)
    both = (eager, compiled)
    for graphs in (1, 2, 2, 2):  # without the term, with, without, with
        assert_same(eager, compiled, images())
        assert traced.graphs == graphs
    assert_same(eager, compiled, images(3), TARGET[:3])
    assert_same(eager, compiled, images(), torch.rand(4, 4, dtype=torch.float64).softmax(1))
    for objective in both:
        objective.eval()
    assert_same(eager, compiled, images())
    for objective in both:
        objective.train()
        objective.model[1].eval()
    assert_same(eager, compiled, images())
    for objective in both:
        objective.distance = "l1"
        objective.steps_done = 1
    assert_same(eager, compiled, images())
    assert traced.graphs == 7
    assert traced.runs == 9


def test_changed_weights_need_no_new_graph(traced):
    eager, compiled = pair(Small())
    for gamma in (0.5, 0.7, 2.0):
        eager.gamma = compiled.gamma = gamma
        assert_same(eager, compiled, images())
    assert traced.graphs == 1


def test_frozen_parameters(traced):
    eager, compiled = pair()
    assert_same(eager, compiled, images())
    x = images()
    for objective in (eager, compiled):
        objective.model[0].requires_grad_(False)
        objective.zero_grad()
        objective(x, TARGET, torch.Generator().manual_seed(1)).total.backward()
        assert objective.model[0].weight.grad is None
    assert_close(compiled.model[3].weight.grad, eager.model[3].weight.grad)
    assert traced.graphs == 2


@pytest.mark.usefixtures("traced")
def test_training_stays_the_same():
    eager, compiled = pair(beta=0.5, layers=["3"])
    optimizers = [torch.optim.SGD(o.parameters(), lr=0.1, momentum=0.9) for o in (eager, compiled)]
    for _ in range(4):
        x = images()
        assert_same(eager, compiled, x)
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(eager.parameters(), compiled.parameters(), strict=True):
        assert_close(q, p, 1e-8)


@pytest.mark.usefixtures("traced")
def test_accumulation_and_scaling():
    _, compiled = pair(Small())
    x = images()
    _, once = step(compiled, x)
    _, thrice = step(compiled, x, backward=lambda losses: (3 * losses.total).backward())
    assert_close(thrice, 3 * once)
    torch.manual_seed(11)
    compiled(x, TARGET, torch.Generator().manual_seed(7)).total.backward()
    assert_close(torch.cat([p.grad.flatten() for p in compiled.parameters()]), 4 * once)


class Small(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 4))
        self.double()


class Noisy(nn.Sequential):
    def __init__(self):
        super().__init__(
            *conv_bn()[:6], nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)
        )


def test_dropout_is_drawn_anew_in_each_step():
    """With the seed of the eager step its numbers come out, with another seed others; half is dropped."""
    eager, compiled = pair(Noisy().double())
    x = images()
    assert_same(eager, compiled, x)
    generator = torch.Generator()
    torch.manual_seed(1)
    first, second = (compiled(x, TARGET, generator.manual_seed(7)).logits for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(compiled(x, TARGET, generator.manual_seed(7)).logits, first)


def test_validation_is_eager(traced):
    eager, compiled = pair()
    x = images()
    with torch.no_grad():
        totals = [o.eval()(x, TARGET, torch.Generator().manual_seed(1)).total for o in (eager, compiled)]
    assert traced.graphs == 0
    assert torch.equal(*totals)
    assert not totals[1].requires_grad


def test_bfloat16_autocast_is_traced(traced):
    eager, compiled = pair(conv_bn())
    x = images(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # gradients are summed up in another order
        assert_same(eager, compiled, x, tolerance=1e-2)
        assert compiled(x, TARGET).logits.dtype == torch.bfloat16
    step(compiled, x)
    assert compiled(x, TARGET).logits.dtype == torch.float32
    assert traced.graphs == 2


@pytest.mark.usefixtures("traced")
def test_float16_gradients_do_not_underflow_inside_the_graph():
    """A `GradScaler` multiplies the total, which is too late for a graph that has computed its gradients."""
    _, compiled = pair(conv_bn())
    x = images(dtype=torch.float32)

    def gradient(weight, exponent):
        compiled.alpha = compiled.gamma = weight
        with torch.autocast("cpu", dtype=torch.float16):
            compiled.gradient_scale.exponent.fill_(exponent)
            return step(compiled, x)[1] / weight

    expected = gradient(1.0, 0)
    assert relative_difference(gradient(2.0**-14, 14), expected) < 1e-3
    assert relative_difference(gradient(2.0**-14, 0), expected) > 0.5


@pytest.mark.usefixtures("traced")
def test_images_in_channels_last():
    eager, compiled = pair()
    for objective in (eager, compiled):
        objective.to(memory_format=torch.channels_last)
    assert_same(eager, compiled, images().contiguous(memory_format=torch.channels_last))


@pytest.mark.usefixtures("traced")
def test_only_the_total_carries_a_graph_and_only_once():
    _, compiled = pair(Small(), beta=0.5, layers=["2"])
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
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient.sum().backward()


@pytest.mark.usefixtures("traced")
def test_copies_compile_for_themselves():
    (_, compiled), x = pair(Small()), images()
    step(compiled, x)
    twin = pickle.loads(pickle.dumps(compiled))
    with torch.no_grad():
        twin.model[0].weight.mul_(2)
    eager = Objective(copy.deepcopy(twin.model), Rotation(20))
    assert_same(eager, twin, x)


class Data(nn.Sequential):
    """A network that looks at the values it computes."""

    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


class Shifted(Identity):
    """An augmentation with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))

    def _transform(self, images, params):
        return images + self.shift


@pytest.mark.usefixtures("traced")
def test_what_cannot_be_compiled_says_so():
    x = images(dtype=torch.float32)
    _, compiled = pair(model=Data(*conv_bn()))
    with pytest.raises(
        RuntimeError, match=r"compile\(\) needs a model whose operations do not depend on the values"
    ):
        compiled(x, TARGET)
    _, compiled = pair(model=conv_bn())
    with pytest.raises(ValueError, match="images must not require a gradient after compile"):
        compiled(x.requires_grad_(), TARGET)
    for given, name in [(x.detach(), "what the augmentation returns"), (x, "images")]:
        _, compiled = pair(model=conv_bn(), augmentation=Shifted())
        with pytest.raises(ValueError, match=f"^{name} must not require a gradient after compile"):
            compiled(given, TARGET)
    x = images(dtype=torch.float32)
    _, compiled = pair(model=conv_bn())
    for _ in range(2):  # when the graph is new, and when it is not
        with pytest.raises(ValueError, match="target must lie in 0 … 3, got 4"):
            compiled(x, TARGET + 1)


@pytest.mark.parametrize("method", ["vanilla_gradient", "guided_backprop"])
def test_torch_compile_of_the_objective_is_equal(method):
    """It runs the objective uncompiled."""
    eager, _ = pair(alpha=0.0, method=method, beta=0.5, layers=["3"])
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


def refusal(version):
    return pytest.raises(
        RuntimeError, match=rf"on a CPU needs torch 2\.9 or newer: Inductor of torch {version}"
    )


@pytest.mark.parametrize("options", [{}, {"backend": "inductor"}, {"mode": "max-autotune"}], ids=str)
@pytest.mark.parametrize(
    ("version", "refused"), [("2.6.0", 1), ("2.8.0+cu128", 1), ("2.9.0", 0), ("2.10.0", 0), ("2.15.0+cpu", 0)]
)
def test_an_inductor_that_writes_beyond_its_buffers_is_refused(
    version, refused, options, traced, monkeypatch
):
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    eager, compiled = pair(Small())
    compiled.compile(**options)
    if refused:
        with refusal(re.escape(version)):
            compiled(images(), TARGET)
        assert traced.graphs == 0
        compiled.compile(backend="aot_eager")
    assert_same(eager, compiled, images())


def inductor(*args, **options):
    """A pair that runs, or the refusal of what this version cannot do."""
    eager, compiled = pair(*args, backend="inductor", **options)
    if torch.__version__ < "2.9":
        with refusal("2"):
            compiled(images(), TARGET)
        pytest.skip("Inductor is refused")
    return eager, compiled


@pytest.mark.slow
@pytest.mark.parametrize("term", TERMS)
def test_inductor(term):
    alpha, beta, gamma = TERMS[term]
    layers = ["3"] if beta else []
    eager, compiled = inductor(alpha=alpha, beta=beta, gamma=gamma, layers=layers)
    for _ in range(2):
        assert getattr(assert_same(eager, compiled, images()), f"{term}_loss") > 0


@pytest.mark.slow
def test_inductor_draws_dropout_anew():
    _, compiled = inductor(Noisy().double())
    x = images()
    first, second = (compiled(x, TARGET, torch.Generator().manual_seed(7)).logits for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(11)
    _, gradient = step(compiled, x)
    _, again = step(compiled, x)
    assert torch.equal(gradient, again)
