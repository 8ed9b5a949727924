"""Where and on what saliency methods run: networks that overwrite, move or cut; threads; inference mode."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from salnb import saliency, trust
from tests.helpers.methods import cheap
from tests.helpers.networks import conv_bn
from tests.helpers.tolerances import assert_close

METHODS = pytest.mark.parametrize("method", saliency.METHODS)
GRAPH = pytest.mark.parametrize("create_graph", [False, True], ids=["map", "map-with-graph"])
TRAINING = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


def images(n=2, size=8):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def explain(method, model, x, target=1, **kwargs):
    return saliency.METHODS[method](model, x, target, **cheap(method, still=True), **kwargs)


class First(nn.Module):
    """A network that begins with a function of the images."""

    def __init__(self, first):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.rest = first, conv_bn()

    def forward(self, x):
        return self.rest(self.first(x))


# --- works in place on its input ----------------------------------------------------------------------------


def set_item(x):
    x[:, 0] = 0.5
    return x


IN_PLACE = {
    "relu": nn.ReLU(inplace=True),
    "add_": lambda x: x.add_(0.1),
    "mul_": lambda x: x.mul_(2),
    "clamp_": lambda x: x.clamp_(0.2, 0.8),
    "normalise": lambda x: x.sub_(0.5).div_(0.2),
    "set-item": set_item,
    "part": lambda x: (x[:, 1:].mul_(3), x)[1],
    "data": lambda x: (x.data.mul_(1.5), x)[1],
    "no-grad": lambda x: (x.detach().add_(0.3), x)[1],
}


@TRAINING
@GRAPH
@METHODS
@pytest.mark.parametrize("first", IN_PLACE)
def test_the_images_never_change(first, method, create_graph, training):
    model = First(IN_PLACE[first]).train(training)
    outside = First(lambda x: IN_PLACE[first](x * 1)).train(training)
    x = images()
    before = x.clone()
    found = explain(method, model, x, create_graph=create_graph)
    assert torch.equal(x, before)
    assert x._version == 0
    assert_close(found, explain(method, outside, x))


@METHODS
def test_images_that_need_a_gradient_or_share_memory_are_left_alone(method):
    model = First(nn.ReLU(inplace=True)).eval()
    x = images().requires_grad_()
    found = explain(method, model, x)
    assert x.grad is None
    assert x.requires_grad
    assert_close(explain(method, model, x[:1].detach().expand(2, -1, -1, -1))[:1], found[:1])


def test_curves_leave_the_images_alone():
    model, x, maps = First(lambda x: x.mul_(2)).eval(), images(), torch.rand(2, 1, 8, 8)
    grey = torch.full((2, 3, 8, 8), 0.5)
    before = x.clone(), grey.clone()
    trust.deletion_curve(model, x, maps, replacement=grey, steps=3)
    trust.insertion_curve(model, x, maps, replacement=grey, steps=3)
    assert torch.equal(x, before[0])
    assert torch.equal(grey, before[1])


# --- has a state that moves ---------------------------------------------------------------------------------


class Moving(nn.Module):
    """All the state that a forward pass may move, in train and in eval mode, and which its result depends on."""

    def __init__(self):
        super().__init__()
        self.register_buffer("counter", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("replaced", torch.zeros(3))
        self.register_buffer("later", None)
        self.alias = self.mean
        self.plain = torch.ones(1)
        self.calls = 0
        self.cached = None

    def forward(self, x):
        self.counter += 1
        self.mean.mul_(0.9).add_(x.detach().mean((0, 2, 3)))
        self.replaced = self.replaced + self.mean
        self.later = x.detach().amax()
        self.plain.add_(0.25)
        self.calls += 1
        self.cached = x.detach()
        return x * (1 + self.replaced.view(1, 3, 1, 1)) * self.plain + self.calls


def state_of(model):
    """Tensors and plain values of all modules, and which objects they are."""
    tensors = {
        (name, key): value
        for name, module in model.named_modules()
        for key, value in (*vars(module).items(), *module._buffers.items(), *module._parameters.items())
        if value is None or isinstance(value, torch.Tensor | int | float)
    }
    values = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in tensors.items()}
    return tensors, values


def assert_as_found(model, before):
    now = state_of(model)[0]
    identical, values = before
    assert now.keys() == identical.keys()
    for key, value in now.items():
        assert value is identical[key], key
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, values[key]), key
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    assert not any(getattr(module, name) for module in model.modules() for name in hooks)


@TRAINING
@GRAPH
@METHODS
def test_state_is_left_as_it_was_found(method, create_graph, training):
    model = First(Moving()).train(training)
    model.rest[0].weight.grad = torch.ones_like(model.rest[0].weight)
    before, mode = state_of(model), [module.training for module in model.modules()]
    first = explain(method, model, images(), create_graph=create_graph)
    second = explain(method, model, images(), create_graph=create_graph)
    assert torch.equal(first, second)
    if create_graph:  # the graph has what the pass has seen
        first.square().sum().backward()
        model.rest[0].weight.grad = None
        model.zero_grad()
    assert_as_found(model, before)
    assert [module.training for module in model.modules()] == mode


@TRAINING
@METHODS
def test_state_is_left_as_it_was_found_by_an_error(method, training):
    def fail(x):
        raise RuntimeError("from the network")

    model = First(Moving()).train(training)
    model.rest[8].forward = fail
    before = state_of(model)
    with pytest.raises(RuntimeError, match="from the network"):
        explain(method, model, images())
    assert_as_found(model, before)
    assert torch.is_grad_enabled()
    assert torch._C._len_torch_function_stack() == 0


@METHODS
def test_a_model_that_changes_its_mode_is_left_in_the_one_it_had(method):
    model = First(lambda x: (model.rest.train(), x)[1]).eval()
    explain(method, model, images())
    assert not any(module.training for module in model.modules())


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@METHODS
def test_scripted_buffers_are_left_as_they_were(method):
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("n", torch.zeros(1))

        def forward(self, x):
            self.n += 1
            return x * self.n

    model = First(torch.jit.script(Counter())).eval()
    explain(method, model, images())
    assert model.first.n.item() == 0


@TRAINING
def test_curves_leave_the_model_as_it_was(training):
    model, x, maps = First(Moving()).train(training), images(), torch.rand(2, 1, 8, 8)
    before = state_of(model)
    for target in (None, 1):
        trust.deletion_curve(model, x, maps, target, replacement=torch.tensor(0.5), steps=3)
        assert_as_found(model, before)


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


class Meanwhile(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


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


# --- inference mode -----------------------------------------------------------------------------------------


@GRAPH
@METHODS
@pytest.mark.parametrize(
    "target", [None, 1, torch.tensor([1, 2]), torch.rand(2, 4)], ids=lambda t: str(t)[:6]
)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_what_was_made_in_inference_mode_is_used(method, target, context, create_graph):
    model = First(Moving()).eval()
    expected = explain(method, model, images(), target)
    with context():
        made = target.clone() if isinstance(target, torch.Tensor) else target
        x = images().clone()
        inside = explain(method, model, x, made, create_graph=create_graph)
    outside = explain(method, model, x, made, create_graph=create_graph)
    for found in (inside, outside):
        assert_close(found.detach(), expected)
        assert found.requires_grad == create_graph
        assert not found.is_inference()


def test_curves_take_what_was_made_in_inference_mode():
    model = First(Moving()).eval()
    with torch.inference_mode():
        x, maps, target, grey = images(), torch.rand(2, 1, 8, 8), torch.tensor([1, 2]), torch.tensor(0.5)
        inside = trust.deletion_curve(model, x, maps, target, replacement=grey, steps=3)
        masks = maps > 0.5
        trust.share_on_object(maps, masks)
    assert_close(trust.deletion_curve(model, x, maps, target, replacement=grey, steps=3), inside)
    trust.share_on_object(maps, masks)


@METHODS
@pytest.mark.parametrize("what", ["parameter", "buffer"])
def test_a_model_made_in_inference_mode_is_refused(method, what):
    model = conv_bn().eval()
    with torch.inference_mode():
        if what == "parameter":
            model[3] = nn.Conv2d(5, 6, 3, padding=1)
        else:
            model[1].running_mean = torch.zeros(5)
    name = "Conv2d whose weight" if what == "parameter" else "BatchNorm2d whose running_mean"
    with pytest.raises(ValueError, match=rf"outside of torch.inference_mode\(\), got a {name}"):
        explain(method, model, images())
    explain(method, copy.deepcopy(model), images())


@METHODS
def test_transforms_of_functions_are_refused_in_plain_words(method):
    model, x = conv_bn().eval(), images()
    with pytest.raises(RuntimeError, match=r"torch.vmap .* call this outside of them, with the whole batch"):
        torch.vmap(lambda image: explain(method, model, image[None])[0])(x)
    with pytest.raises(RuntimeError, match=r"transforms of torch.func do not work here"):
        torch.func.grad(lambda x: explain(method, model, x).sum())(x)


def test_transforms_of_curves_are_refused_in_plain_words():
    model, x, maps = conv_bn().eval(), images(), torch.rand(2, 1, 8, 8)
    with pytest.raises(RuntimeError, match="call this outside of them, with the whole batch"):
        torch.vmap(lambda i, m: trust.deletion_curve(model, i[None], m[None], replacement=x[:1]))(x, maps)
    with pytest.raises(RuntimeError, match="call this outside of them, with the whole batch"):
        torch.vmap(lambda m: trust.rank_correlation(m[None], m[None]))(maps)


# --- targets ------------------------------------------------------------------------------------------------


@METHODS
@pytest.mark.parametrize(
    "target", [np.int64(2), np.uint8(2), np.array(2), torch.tensor(2), torch.tensor(2, dtype=torch.uint8)], ids=repr
)  # fmt: skip
def test_all_that_is_an_integer_is_a_class(method, target):
    model, x = conv_bn().eval(), images()
    assert torch.equal(explain(method, model, x, target), explain(method, model, x, 2))
    options = {"replacement": torch.tensor(0.5), "steps": 2}
    maps = torch.arange(128.0).view(2, 1, 8, 8)
    assert_close(trust.deletion_curve(model, x, maps, target, **options), trust.deletion_curve(model, x, maps, 2, **options))  # fmt: skip


@METHODS
@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (np.int64(9), ValueError, r"target must lie in 0 … 3, got 9"),
        (torch.tensor(-1), ValueError, r"target must lie in 0 … 3, got -1"),
        (True, TypeError, "got bool"),
        (np.bool_(True), TypeError, "got bool"),
        (1.0, TypeError, "got float"),
        (np.float64(1), TypeError, "got float64"),
        (np.array([1, 2]), TypeError, "got ndarray"),
        ([1, 2], TypeError, "got list"),
        (torch.tensor(True), TypeError, "torch.bool"),
        (torch.tensor(1.0), ValueError, r"target weights must have shape \(2, 4\)"),
    ],
    ids=repr,
)
def test_all_else_is_not(method, target, error, message):
    with pytest.raises(error, match=message):
        explain(method, conv_bn().eval(), images(), target)


# --- half precision -----------------------------------------------------------------------------------------


class Steep(nn.Module):
    """Scores whose gradient is the same everywhere, and large."""

    def __init__(self, slope):
        super().__init__()
        self.slope = slope
        self.features = nn.Conv2d(3, 64, 1, bias=False)
        nn.init.constant_(self.features.weight, 4.0)

    def forward(self, x):
        return (self.features(x) * self.slope).sum((2, 3))[:, :4] + 0 * self.features(x).sum((2, 3))[:, 4:8]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_many_samples_are_summed_in_float32(dtype):
    model = Steep(1000.0).to(dtype)
    x = images(1, 4).to(dtype)
    found = saliency.smoothgrad(model, x, 0, n_samples=25)
    assert found.dtype is dtype
    assert_close(found, torch.full_like(found, 4000.0))


def test_a_wide_range_of_values_has_a_finite_noise():
    x = torch.linspace(-60000, 60000, 48).view(1, 3, 4, 4).half()
    assert saliency.smoothgrad(Steep(1.0).half(), x, 0, noise_level=0.0, n_samples=2).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_channels_are_summed_in_float32(dtype):
    """A hundred channels of 100, each with a weight of 100, are too much for float16 on the way only."""

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Conv2d(3, 100, 1, bias=False)
            nn.init.constant_(self.features.weight, 100 / 3)
            self.sign = torch.ones(100)
            self.sign[1::2] = -0.99

        def forward(self, x):
            out = self.features(x)
            return (
                (out * self.sign.to(out)[None, :, None, None] * 100)
                .sum((2, 3), dtype=torch.float32)
                .sum(1, keepdim=True)
                .expand(-1, 2)
            )

    model, x = Wide().to(dtype), torch.ones(1, 3, 4, 4, dtype=dtype)
    found = saliency.grad_cam(model, x, 0)
    assert found.dtype is dtype
    assert_close(found.float(), saliency.grad_cam(model.float(), x.float(), 0), 0.05)


@METHODS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_maps_have_the_images_dtype(method, dtype):
    model, x = conv_bn().eval().to(dtype), images().to(dtype)
    assert explain(method, model, x).dtype is dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert explain(method, conv_bn().eval(), images()).dtype is torch.float32


# --- no gradient --------------------------------------------------------------------------------------------


def without_grad(x):
    with torch.no_grad():
        return x * 2


def in_inference_mode(x):
    with torch.inference_mode():
        x = x * 2
    return x.clone()


CUT = {
    "detach": lambda x: x.detach(),
    "no_grad": without_grad,
    "inference_mode": in_inference_mode,
    "data": lambda x: x.data,
    "integers": lambda x: (255 * x).byte().float(),
    "argmax": lambda x: F.one_hot((x * 4).long().clamp(0, 3).amax(1), 4).permute(0, 3, 1, 2)[:, :3].float(),
    "numpy": lambda x: torch.from_numpy(x.detach().numpy()),
    "constant": lambda x: torch.ones_like(x),
}


@METHODS
@pytest.mark.parametrize("cut", CUT)
def test_where_no_gradient_flows_to_the_images_it_says_so(cut, method):
    """Before the layer, Grad-CAM does not need it."""
    model = First(CUT[cut]).eval()
    pixels = method != "grad_cam"
    with pytest.raises(ValueError, match=r"no gradient flows .* images") if pixels else nullcontext():
        explain(method, model, images())


@METHODS
@pytest.mark.parametrize("cut", ["detach", "no_grad", "numpy"])
def test_where_no_gradient_flows_from_the_scores_it_says_so(cut, method):
    model = nn.Sequential(conv_bn(), Meanwhile(CUT[cut])).eval()
    with pytest.raises(ValueError, match="no gradient flows from the model's scores"):
        explain(method, model, images())


def test_a_layer_beside_the_way_is_named():
    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.aside = conv_bn(), nn.Conv2d(3, 4, 3)

        def forward(self, x):
            self.aside(x)
            return self.main(x)

    model = Aside().eval()
    with pytest.raises(ValueError, match="no gradient flows from the model's scores to its layer"):
        saliency.grad_cam(model, images(), layer="aside")


@pytest.mark.parametrize("switch", [torch.enable_grad, lambda: torch.set_grad_enabled(True)])
def test_a_network_that_switches_gradients_around_the_layer(switch):
    """The pass that stores nothing before the layer does not fit such a network; another does."""

    class Switching(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = conv_bn()

        def forward(self, x):
            with switch():
                x = self.net[:4](x)
            return self.net[4:](x)

    model = Switching().eval()
    assert_close(saliency.grad_cam(model, images(), 1), saliency.grad_cam(model.net, images(), 1))


@METHODS
def test_recomputed_activations_change_nothing(method):
    from torch.utils.checkpoint import checkpoint

    class Recomputing(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = conv_bn()

        def forward(self, x):
            x = checkpoint(self.net[:2], x, use_reentrant=False)
            x = checkpoint(self.net[2:6], x, use_reentrant=False)
            return self.net[6:](x)

    model = Recomputing().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert_close(explain(method, model, images()), explain(method, model.net, images()))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
