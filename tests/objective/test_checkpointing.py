"""Recomputation in the backward pass (activation checkpointing): the numbers and statistics of a network without.

Every test compares a network with a copy of itself that stores its activations.
"""

import copy
import gc
import threading
import weakref
from functools import partial
from unittest import mock

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import (
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)
from torchvision import models

from salnb import Objective, saliency
from salnb.augment import HorizontalFlip, Rotation
from salnb.double_backward import recomputation
from salnb.saliency.recording import recorded_outputs
from tests.helpers.checkpointing import LAYERS, Segment, network, stored
from tests.helpers.methods import cheap
from tests.helpers.tolerances import assert_close

TARGET = torch.tensor([0, 1, 2, 3])


def images(n=4, size=8, dtype=torch.float64):
    return torch.rand(n, 3, size, size, dtype=dtype)


def step(objective, x, target=TARGET):
    """One step with repeatable random numbers: the losses and all gradients in one vector."""
    objective.zero_grad()
    torch.manual_seed(11)
    losses = objective(x, target, torch.Generator().manual_seed(7))
    losses.total.backward()
    return losses, torch.cat([p.grad.flatten() for p in objective.parameters()])


def assert_same(recomputed, plain, x=None, tolerance=1e-12, **options):
    """Two steps of each: losses, gradients and buffers."""
    options = {"alpha": 0.5, "gamma": 2.0} | options
    objectives = [Objective(model, HorizontalFlip(), **options) for model in (recomputed, plain)]
    x = images() if x is None else x
    for _ in range(2):
        (found, gradient), (expected, expected_gradient) = (step(o, x) for o in objectives)
        assert expected.saliency_loss > 0
        assert_close(found.saliency_loss, expected.saliency_loss, tolerance)
        assert_close(found.invariance_loss, expected.invariance_loss, tolerance)
        assert_close(gradient, expected_gradient, tolerance)
        for buffer, other in zip(recomputed.buffers(), plain.buffers(), strict=True):
            assert_close(buffer.double(), other.double(), tolerance)


@pytest.mark.parametrize("kind", LAYERS)
def test_what_a_segment_may_be_made_of(kind):
    model = network(Segment(*LAYERS[kind]()))
    assert_same(model, stored(model))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_segment_behind_scripted_code():
    """Of which nothing can be swapped."""
    plain = network(torch.jit.script(nn.Tanh()), Segment(*LAYERS["its own buffer"](), recompute=False))
    model = copy.deepcopy(plain)
    model[3].recompute = True
    assert_same(model, plain)


@pytest.mark.parametrize("options", [{"preserve_rng_state": False}, {"early_stop": False}, {"determinism_check": "none"}],
                         ids=str)  # fmt: skip
def test_options_of_checkpoint(options):
    if "early_stop" in options:
        pytest.importorskip("torch", minversion="2.9")
    model = network(*(Segment(*LAYERS["convolution"](), **options) for _ in range(3)))
    assert_same(model, stored(model))


@pytest.mark.parametrize("method", saliency.METHODS)
@pytest.mark.parametrize("layer", ["0", "2.layers.0", "2.layers.1"])
def test_every_method_and_layers_inside_a_segment(method, layer):
    """Grad-CAM's layer and that of eq. 6 belong to the forward pass, not to its repetition."""
    options = cheap(method)
    if method in ("grad_cam", "guided_grad_cam"):
        options["layer"] = layer
    model = network(Segment(*LAYERS["convolution"]()), Segment(nn.Sigmoid(), nn.ReLU(inplace=True)))
    assert_same(
        model, stored(model), method=method, method_options=options, beta=0.7, layers=[layer, "3.layers.0"]
    )


def test_a_repetition_is_not_looked_at():
    model, x = network(Segment(*LAYERS["convolution"]())), images().requires_grad_()
    accept = mock.Mock(side_effect=lambda name, output: output)
    with recorded_outputs({"layer": model[2].layers[0]}, accept):
        torch.autograd.grad(model(x).sum(), x)
    assert accept.call_count == 1


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("method", saliency.METHODS)
def test_saliency_methods_by_themselves(method, create_graph):
    model = network(Segment(*LAYERS["convolution"](), nn.ReLU6()), Segment(*LAYERS["its own buffer"]()))
    plain, x = stored(model), images()
    before = [buffer.clone() for buffer in model.buffers()]
    found, expected = (
        getattr(saliency, method)(m, x, TARGET, create_graph=create_graph, **cheap(method, still=True))
        for m in (model, plain)
    )
    assert_close(found.detach(), expected.detach(), 1e-12)
    if create_graph:
        for maps in (found, expected):
            maps.square().sum().backward()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            if q.grad is not None and q.grad.abs().max() > 1e-12:
                assert_close(p.grad, q.grad, 1e-9)
    for buffer, old in zip(model.buffers(), before, strict=True):
        assert torch.equal(buffer, old)


def test_without_the_saliency_term_statistics_move_once_as_well():
    model = network(Segment(*LAYERS["convolution"]()))
    plain, x = stored(model), images()
    for m in (model, plain):
        step(Objective(m, HorizontalFlip(), gamma=0.0), x)
    for buffer, other in zip(model.buffers(), plain.buffers(), strict=True):
        assert torch.equal(buffer, other)


# --- how others ask for it ----------------------------------------------------------------------------------


class Sequence(nn.Module):
    def __init__(self, recompute):
        super().__init__()
        self.layers, self.recompute = network(*LAYERS["convolution"](), nn.Conv2d(6, 6, 1)), recompute

    def forward(self, x):
        return (
            checkpoint_sequential(self.layers, 3, x, use_reentrant=False)
            if self.recompute
            else self.layers(x)
        )


def test_checkpoint_sequential():
    model = Sequence(recompute=True).double()
    plain = copy.deepcopy(model)
    plain.recompute = False
    assert_same(model, plain)


def test_checkpoint_wrapper():
    plain = network(nn.Sequential(*LAYERS["convolution"]()), nn.Sequential(*LAYERS["linear"]()))
    model = copy.deepcopy(plain)
    for i in (2, 3):
        model[i] = checkpoint_wrapper.checkpoint_wrapper(model[i])
    assert_same(model, plain)


class HuggingFace(nn.Module):
    """What `gradient_checkpointing_enable` of transformers does to a model."""

    def __init__(self, *layers):
        super().__init__()
        self.layers, self.call = nn.ModuleList(layers), None

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None):
        self.call = partial(checkpoint, **(gradient_checkpointing_kwargs or {"use_reentrant": True}))

    def forward(self, x):
        for layer in self.layers:
            x = self.call(layer.__call__, x) if self.call and self.training else layer(x)
        return x


def test_the_trainers_gradient_checkpointing():
    plain = network(
        HuggingFace(nn.Sequential(*LAYERS["convolution"]()), nn.Sequential(*LAYERS["attention"]()))
    )
    model = copy.deepcopy(plain)
    model[2].gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(model, plain)


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_timm(name):
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 32} if name[:3] == "vit" else {}
    plain = timm.create_model(name, num_classes=4, **sizes).double()
    model = copy.deepcopy(plain)
    model.set_grad_checkpointing()
    if hasattr(timm.layers, "set_reentrant_ckpt"):
        assert_same(model, plain, images(size=32), 1e-9)
    else:  # an older one knows reentrant checkpointing only
        with pytest.raises(RuntimeError, match=r"reentrant checkpointing: .*timm, from 1\.0\.13 on"):
            assert_same(model, plain, images(size=32), 1e-9)


def test_torchvision_densenet():
    plain = models.DenseNet(4, (2, 2), 8, num_classes=4).double()
    model = models.DenseNet(4, (2, 2), 8, num_classes=4, memory_efficient=True).double()
    model.load_state_dict(plain.state_dict())
    assert_same(model, plain, images(size=32), 1e-9)


# --- with what else is going on -----------------------------------------------------------------------------


class Counting(TorchFunctionMode):
    """A mode of the user's, from a `context_fn`."""

    calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        type(self).calls += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "contexts", [noop_context_fn, lambda: (Counting(), Counting())], ids=["none", "modes"]
)
def test_contexts_of_the_user(contexts):
    Counting.calls = 0
    model = network(Segment(*LAYERS["convolution"](), context_fn=contexts))
    assert_same(model, stored(model), method="guided_backprop")
    assert (Counting.calls > 0) == (contexts is not noop_context_fn)


def halved():
    return saved_tensors_hooks(
        lambda t: (t.to(torch.float32), t.dtype), lambda packed: packed[0].to(packed[1])
    )


@pytest.mark.parametrize("recompute", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize("hooks", [save_on_cpu, halved])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_saved_tensor_hooks_of_the_user(hooks, recompute, memory_format):
    model = network(
        Segment(*LAYERS["convolution"](), recompute=recompute), nn.MaxPool2d(2), nn.Conv2d(6, 6, 1)
    )
    model.to(memory_format=memory_format)
    x = images().contiguous(memory_format=memory_format)
    _, expected = step(Objective(stored(model), HorizontalFlip()), x)
    with hooks():
        _, found = step(Objective(model, HorizontalFlip()), x)
    assert_close(found, expected, 1e-12 if hooks is save_on_cpu else 1e-4)


def test_autocast():
    model = network(Segment(*LAYERS["convolution"]())).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(model, stored(model), images(dtype=torch.float32), 0.0)


def test_a_backward_pass_in_another_thread():
    model = network(Segment(*LAYERS["linear"]()))
    objective, x = Objective(model, HorizontalFlip()), images()
    _, expected = step(Objective(stored(model), HorizontalFlip()), x)
    total = objective(x, TARGET, torch.Generator().manual_seed(7)).total
    thread = threading.Thread(target=total.backward)
    thread.start()
    thread.join()
    assert_close(torch.cat([p.grad.flatten() for p in objective.parameters()]), expected, 1e-12)


def test_parameters_of_the_moment():
    """With `functional_call` the network of the recomputation is the one of the forward pass."""
    model = network(Segment(*LAYERS["convolution"]()))
    x, gradients = images(), []
    others = {name: p.detach() + 0.1 for name, p in model.named_parameters()}
    for m in (model, stored(model)):
        names = {f"model.{name}": p.clone().requires_grad_() for name, p in others.items()}
        objective = Objective(m, HorizontalFlip(1.0))
        total = torch.func.functional_call(objective, names, (x, TARGET)).total
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(total, list(names.values()))]))
    assert_close(*gradients, 1e-12)


class Remembers(nn.Module):
    """Keeps a mean of this pass, with its graph, in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("last", torch.zeros(()))

    def forward(self, x):
        self.last = x.mean()
        return x


def test_graphs_of_former_passes_are_let_go():
    """Also where no backward pass frees what was saved in them."""
    model = network(Segment(*LAYERS["linear"]()), Remembers(), Segment(*LAYERS["linear"]()))
    objective = Objective(model, HorizontalFlip())
    objective(images(), TARGET)

    def of_this_graph(gradient):
        return None

    model[3].last.register_hook(of_this_graph)
    reference = weakref.ref(of_this_graph)
    del of_this_graph
    objective(images(), TARGET)
    gc.collect()
    assert reference() is None


def test_pytorch_is_left_as_it_was():
    model, before = network(Segment(*LAYERS["nested"]())), vars(saved_tensors_hooks).copy()
    objective = Objective(model, HorizontalFlip())
    step(objective, images())
    with pytest.raises(RuntimeError):
        objective(torch.rand(4, 5, 8, 8), TARGET)
    assert vars(saved_tensors_hooks) == before
    assert torch._C._len_torch_function_stack() == 0
    # plain checkpointing goes on as ever
    total = model(images()).sum()
    total.backward()
    assert vars(saved_tensors_hooks) == before


@pytest.mark.parametrize("kind", ["convolution", "dropout", "attention", "nested"])
@pytest.mark.usefixtures("traced")
def test_compiled(kind):
    """Traced, a segment is stored: the compiler decides what is recomputed."""
    model = network(Segment(*LAYERS[kind]()))
    plain = Objective(stored(model), HorizontalFlip(), beta=0.5, layers=["3"])
    compiled = Objective(model, HorizontalFlip(), beta=0.5, layers=["3"])
    compiled.compile(backend="eager")
    for _ in range(2):
        x = images()
        (found, gradient), (expected, expected_gradient) = step(compiled, x), step(plain, x)
        assert_close(found.total.detach(), expected.total.detach(), 1e-12)
        assert_close(gradient, expected_gradient, 1e-12)
        for buffer, other in zip(compiled.buffers(), plain.buffers(), strict=True):
            assert_close(buffer.double(), other.double(), 1e-12)
    assert not recomputation._thread.not_entered  # hooks, which would keep what a segment was given


# --- what cannot work says so -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", saliency.METHODS)
def test_reentrant_checkpointing(method):
    model = network(nn.SiLU(), Segment(*LAYERS["convolution"](), use_reentrant=True))
    options = cheap(method) | ({"layer": "0"} if "cam" in method else {})
    objective = Objective(model, HorizontalFlip(), method=method, method_options=options)
    for call in (objective, partial(saliency.METHODS[method], **options, create_graph=True)):
        arguments = (images(), TARGET) if call is objective else (model, images())
        with pytest.raises(RuntimeError, match=r"reentrant checkpointing: .* use_reentrant=False \(transf"):
            call(*arguments)


def test_selective_checkpointing():
    contexts = partial(create_selective_checkpoint_contexts, [torch.ops.aten.convolution.default])
    model = network(Segment(*LAYERS["convolution"](), context_fn=contexts))
    objective = Objective(model, HorizontalFlip())
    with pytest.raises(
        RuntimeError, match="selective checkpointing keeps what it saved for one backward pass"
    ):
        objective(images(), TARGET).total.backward()


def test_rotation_of_recomputed_maps_has_the_right_gradient():
    """All of it at once, against a network that stores its activations."""
    model = network(*(Segment(*LAYERS[kind]()) for kind in ("convolution", "attention", "linear")))
    recomputed, plain = (
        Objective(m, Rotation(20), beta=0.5, layers=["3.layers.1"], pool=2) for m in (model, stored(model))
    )
    x = images()
    assert_close(step(recomputed, x)[1], step(plain, x)[1], 1e-12)
