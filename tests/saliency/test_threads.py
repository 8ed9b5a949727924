"""Threads that share a model, and modules that run in threads of their own."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from salnb import Objective, saliency
from salnb.augment import HorizontalFlip
from tests.helpers.networks import conv_bn
from tests.helpers.surroundings import (
    METHODS,
    TRAINING,
    First,
    Meanwhile,
    Moving,
    assert_as_found,
    explain,
    images,
    state_of,
)
from tests.helpers.tolerances import assert_close

# --- threads ------------------------------------------------------------------------------------------------


@TRAINING
@pytest.mark.parametrize("create_graph", [False, True], ids=["map", "map-with-graph"])
def test_threads_may_share_a_model(training, create_graph):
    model = First(Moving()).train(training)
    whole = nn.Sequential(nn.Identity(), model)  # another model with the same modules
    batches = [torch.rand(2, 3, 8, 8) + i for i in range(12)]
    methods = [name for name in saliency.METHODS for _ in batches]

    def run(i):
        return explain(methods[i], model if i % 2 else whole, batches[i % 12], create_graph=create_graph)

    before = state_of(model)
    expected = [run(i).detach() for i in range(len(methods))]
    with ThreadPoolExecutor(4) as pool:
        found = [f.detach() for f in pool.map(run, range(len(methods)))]
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    assert_as_found(model, before)


def test_threads_do_not_wait_for_other_models():
    """Both are inside at once: else neither would go on."""
    barrier = threading.Barrier(2, timeout=60)
    models = [First(lambda x: (barrier.wait(), x)[1]).eval() for _ in range(2)]
    plain = First(nn.Identity()).eval()
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda model: explain("guided_backprop", model, images()), models))
    for map_ in found:
        assert torch.equal(map_, explain("guided_backprop", plain, images()))


def test_a_training_step_beside_a_map_keeps_its_statistics():
    """It waits for the map, which lends the model copies."""
    done, model = threading.Event(), First(nn.Identity())
    expected = copy.deepcopy(model)
    Objective(expected, HorizontalFlip(1.0))(images(), torch.tensor([0, 1]))

    def train():
        Objective(model, HorizontalFlip(1.0))(images(), torch.tensor([0, 1]))
        done.set()

    training = threading.Thread(target=train)

    def first(x):
        training.start()
        done.wait(0.5)  # a step that did not wait would be through by then
        return x

    whole = nn.Sequential(Meanwhile(first), model)
    explain("vanilla_gradient", whole, images())
    training.join()
    for found, wanted in zip(model.rest.buffers(), expected.rest.buffers(), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("first", ["a map", "a step"])
def test_threads_that_wait_for_one_another_are_told(first):
    class Both(nn.Module):
        """Takes a map of a part of another model, once that is running, too."""

        def __init__(self):
            super().__init__()
            self.net = conv_bn()

        def forward(self, x):
            barrier.wait()
            return self.net(x * saliency.vanilla_gradient(self.others[0], x, 0))

    barrier = threading.Barrier(2, timeout=60)
    one, other = Both().eval(), Both().eval()
    one.others, other.others = [other.net], [one.net]

    def run(model):
        if first == "a map":
            return saliency.grad_cam(model, images(), 1, layer="net.3")
        return Objective(model, HorizontalFlip(), gamma=0.0)(images(), torch.tensor([0, 1])).total

    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(run, model) for model in (one, other)]
    refused = [run.exception() for run in runs if run.exception()]
    assert len(refused) == 1
    assert "threads wait for one another" in str(refused[0])


def test_a_model_may_explain_itself():
    """The pass inside the pass does not wait for the one around it."""

    class Attentive(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.deep = conv_bn(), False

        def forward(self, x):
            if self.deep:
                return self.net(x)
            self.deep = True
            maps = saliency.guided_backprop(self, x, 0)
            self.deep = False
            return self.net(x * maps)

    model = Attentive().eval()
    maps = saliency.guided_backprop(model.net, images(), 0)
    assert_close(
        saliency.vanilla_gradient(model, images(), 1, reduce=None),
        maps * saliency.vanilla_gradient(model.net, images() * maps, 1, reduce=None),
    )


def test_other_threads_keep_their_attention_kernels():
    """What is switched for a second derivative, for the whole process, is switched back by the last to leave."""
    from torch.backends import cuda

    def switches():
        return cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()

    before, barrier = switches(), threading.Barrier(2, timeout=60)
    inside = []

    def first(x):
        barrier.wait()
        inside.append(switches())
        return x

    models = [First(first).eval() for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda model: explain("vanilla_gradient", model, images(), create_graph=True), models))
    assert switches() == before
    assert inside == [(False, False, True)] * 2


def test_threads_run_compiled_models_as_written():
    barrier = threading.Barrier(2, timeout=60)
    models = [First(nn.Identity()).eval() for _ in range(2)]
    expected = explain("guided_backprop", models[0], images())
    compiled = [torch.compile(model.rest, backend="eager") for model in models]
    for model, rest in zip(models, compiled, strict=True):
        model.rest = nn.Sequential(Meanwhile(lambda x: (barrier.wait(), x)[1]), rest)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda model: explain("guided_backprop", model, images()), models))
    assert all(torch.equal(map_, expected) for map_ in found)
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_a_pass_in_another_thread_is_not_recorded():
    """Someone else uses the network while a map is made: that one's features are not ours."""
    x, others = images(), torch.rand(5, 3, 16, 16)

    def meanwhile(x):
        if len(x) == 2:
            thread = threading.Thread(target=lambda: plain(others))
            thread.start()
            thread.join()
        return x

    plain = conv_bn().eval()
    model = nn.Sequential(plain, Meanwhile(meanwhile))
    assert torch.equal(saliency.grad_cam(model, x, 1), saliency.grad_cam(plain, x, 1))
    assert torch.equal(saliency.grad_cam(model, x, 1, layer="0.3"), saliency.grad_cam(plain, x, 1))


# --- parallel modules ---------------------------------------------------------------------------------------


@TRAINING
@METHODS
def test_data_parallel_on_one_device_or_none_is_the_module(method, training):
    model = conv_bn().train(training)
    wrapped = nn.DataParallel(copy.deepcopy(model)).train(training)
    if len(wrapped.device_ids) > 1:
        wrapped = nn.DataParallel(wrapped.module, device_ids=[0])
    assert_close(explain(method, wrapped, images()), explain(method, model, images()))


@METHODS
@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: nn.Sequential(m)], ids=["outside", "inside"])
def test_data_parallel_on_several_devices_is_refused(method, wrap):
    parallel = nn.DataParallel(conv_bn().eval())
    parallel.device_ids = [0, 1]
    with pytest.raises(TypeError, match=r"nn.DataParallel on 2 devices.*\.module"):
        explain(method, wrap(parallel), images())
