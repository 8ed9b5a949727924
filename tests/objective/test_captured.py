"""`Objective.compile(mode="cuda-graphs")`, with a graph that is played on the CPU; tests/gpu has the real one."""

import contextlib
import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from salnb import Objective
from salnb.augment import Rotation
from salnb.double_backward.mode import second_derivatives_of_pytorch
from salnb.objective.captured import CapturedStep
from tests.helpers.networks import conv_bn
from tests.helpers.tolerances import assert_close

TARGET = torch.arange(4)


class Recorder(TorchDispatchMode):
    """Notes the operators that run, on which tensors; undone at the end, as nothing runs in a real capture."""

    def __init__(self):
        super().__init__()
        self.calls, self.before = [], {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._schema.is_mutable or "native_batch_norm" in str(func):  # whose schema does not say so
            for tensor in pytree.tree_leaves((args, kwargs)):
                if isinstance(tensor, torch.Tensor):
                    self.before.setdefault(id(tensor), (tensor, tensor.clone()))
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    def undo(self):
        for tensor, before in self.before.values():
            tensor.detach().copy_(before)


class Graph:
    """Stands for `torch.cuda.CUDAGraph`: repeats operators, into the memory that they wrote when captured."""

    captured = replayed = 0

    def __init__(self):
        self.generators = []

    def register_generator_state(self, generator):
        self.generators.append(generator)

    def replay(self):
        Graph.replayed += 1
        for func, args, kwargs, out in self.recorder.calls:
            again = func(*args, **kwargs)
            if not func.is_view:
                for old, new in zip(pytree.tree_leaves(out), pytree.tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor):
                        old.detach().copy_(new)


@contextlib.contextmanager
def capture(graph, pool, stream):
    assert not torch.is_autocast_cache_enabled()
    assert pool == (0, 1)
    Graph.captured += 1
    graph.recorder, states = Recorder(), [each.get_state() for each in graph.generators]
    with torch.random.fork_rng([]), graph.recorder:
        yield
    graph.recorder.undo()
    for each, state in zip(graph.generators, states, strict=True):
        each.set_state(state)


class Stream:
    def __init__(self, device=None):
        pass

    def wait_stream(self, other):
        pass


@pytest.fixture
def played(monkeypatch):
    """Graphs on the CPU; gives the class that counts them."""
    monkeypatch.setattr(CapturedStep, "applies", lambda self, images: True)
    for name, fake in {
        "CUDAGraph": Graph,
        "graph": capture,
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "graph_pool_handle": lambda: (0, 1),
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    Graph.captured = Graph.replayed = 0
    return Graph


def images():
    return torch.rand(4, 3, 8, 8, dtype=torch.float64)


def pair(model=None, **options):
    """The same objective eager and captured."""
    eager = Objective(model or conv_bn().double(), Rotation(20), **options)
    captured = copy.deepcopy(eager)
    captured.compile(mode="cuda-graphs")
    return eager, captured


def step(objective, x, seed=11):
    objective.zero_grad()
    torch.manual_seed(seed)
    losses = objective(x, TARGET, torch.Generator().manual_seed(7))
    losses.total.backward()
    return losses, torch.cat([p.grad.flatten() for p in objective.parameters()])


def assert_same(eager, captured, x):
    (expected, gradient), (found, found_gradient) = (step(each, x) for each in (eager, captured))
    for field in ("total", "class_loss", "saliency_loss", "logits"):
        assert_close(getattr(found, field).detach(), getattr(expected, field).detach())
    assert found.has_saliency == expected.has_saliency
    assert_close(found_gradient, gradient)
    for buffer, other in zip(captured.buffers(), eager.buffers(), strict=True):
        assert_close(buffer.double(), other.double())
    return found


def test_steps_are_those_of_the_eager_objective(played):
    """The warm-up leaves no trace in running statistics and random numbers; later batches and weights count."""
    eager, captured = pair()
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9) for each in (eager, captured)]
    for i in range(3):
        assert_same(eager, captured, images())
        for optimizer in optimizers:
            optimizer.step()
        eager.gamma = captured.gamma = 1.0 + i
    assert (played.captured, played.replayed) == (1, 3)


def test_what_is_kept_is_not_overwritten(played):
    _, captured = pair()
    first = captured(images(), TARGET)
    kept = first.total.item(), first.logits.clone()
    second = captured(images(), TARGET)
    assert (first.total.item(), first.logits.equal(kept[1])) == (kept[0], True)
    assert first.total.item() != second.total.item()
    twin = copy.deepcopy(captured)
    (first.total + second.total).backward()  # both gradients are still there
    assert all(p.grad is not None for p in captured.parameters())
    assert played.captured == 1
    assert pickle.loads(pickle.dumps(twin))(images(), TARGET).total.isfinite()


def test_each_kind_of_step_has_its_graph(played):
    eager, captured = pair(every=2)
    for graphs in (1, 2, 2):
        assert_same(eager, captured, images())
        assert played.captured == graphs
    for each in (eager, captured):
        each.model[0].weight.data = each.model[0].weight.data.clone()  # elsewhere in memory
        each.steps_done = 0
    assert_same(eager, captured, images())
    assert played.captured == 3
    for each in (eager, captured):
        each.eval()
    assert_same(eager, captured, images())
    assert played.captured == 4


def test_hooks_of_parameters_run_once(played):
    eager, captured = pair()
    for each in (eager, captured):
        each.model[0].weight.register_hook(lambda gradient: 3 * gradient)
    assert_same(eager, captured, images())


def test_what_operators_depend_on_is_in_the_key(played):
    eager, captured = pair()
    assert_same(eager, captured, images())
    with second_derivatives_of_pytorch():
        assert_same(eager, captured, images())
        assert played.captured == 2
    assert_same(eager, captured, images())
    assert (played.captured, played.replayed) == (2, 3)


class Noisy(nn.Sequential):
    """Draws from PyTorch's generator and from one of its own."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, 4))
        self.double()
        self.generator = torch.Generator().manual_seed(3)

    def __deepcopy__(self, memo):
        twin = Noisy()
        twin.load_state_dict(self.state_dict())
        return twin

    def forward(self, x):
        noise = torch.empty_like(x).normal_(generator=self.generator)
        return super().forward(x + 0.1 * noise)


def test_random_numbers_go_on(played):
    eager, captured = pair(Noisy())
    x = images()
    for _ in range(2):
        assert_same(eager, captured, x)
    assert played.captured == 1
    assert not torch.equal(step(captured, x)[1], step(captured, x)[1]), "the model's own generator goes on"


def test_on_a_cpu_steps_are_eager():
    eager, captured = pair()
    assert_same(eager, captured, images())
    assert captured._compiled._graphs == {}
    assert captured(images(), TARGET).logits_with_graph.requires_grad


def test_a_mode_of_its_own():
    eager, _ = pair()
    with pytest.raises(ValueError, match="goes without other options, got \\['backend', 'mode'\\]"):
        eager.compile(mode="cuda-graphs", backend="inductor")


def test_python_must_not_draw(played):
    import random

    class Lucky(nn.Linear):
        def forward(self, x):
            return super().forward(x.flatten(1)) * random.random()

    _, captured = pair(Lucky(192, 4).double())
    with pytest.raises(RuntimeError, match="draws its random numbers with PyTorch"):
        captured(images(), TARGET)


@pytest.mark.usefixtures("played")
def test_grad_must_not_be_read():
    class Reading(nn.Linear):
        def forward(self, x):
            return super().forward(x.flatten(1)) * (1 if self.weight.grad is None else 2)

    _, captured = pair(Reading(192, 4).double())
    with pytest.raises(RuntimeError, match=r"does not read \.grad"):
        captured(images(), TARGET)


class Masked(nn.Module):
    """A ReLU that only values tell, behind batch norm, which has seen the batch by then."""

    def forward(self, x):
        return x * (x > -x)


@pytest.mark.usefixtures("played")
def test_what_is_refused_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Masked(), nn.Flatten(), nn.Linear(144, 4))
    _, captured = pair(model.double(), method="guided_backprop")
    before = copy.deepcopy(captured.state_dict())
    with pytest.raises(RuntimeError, match=r"no values .*\) is a ReLU"):
        captured(images(), TARGET)
    for name, tensor in captured.state_dict().items():
        assert torch.equal(tensor, before[name]), name
