"""Batch norm's fused kernels: the arithmetic of the closed form, and one operator each."""

import inspect
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from salnb.double_backward import batch_norm, fast_double_backward, fused, kernels, use_fused_batch_norm
from tests.helpers.double_backward import Calls, agree, batch, check, random, saliency_step, second_order
from tests.helpers.networks import Residual
from tests.helpers.tolerances import assert_close

# what is normalised
KINDS = ("images", "images channels_last", "vectors", "sequences", "volumes")


@pytest.fixture
def operators(monkeypatch):
    """The two operators take over on the CPU, where they are the closed form."""
    monkeypatch.setattr(fused, "applies", lambda x: True)


@pytest.fixture(scope="module")
def interpreted():
    """What a Python of its own says of the kernels, whether Triton interprets being decided at its import."""
    pytest.importorskip("triton", reason="the kernels are written in Triton")
    command = [sys.executable, "-m", "tests.helpers.interpreted_kernels", *KINDS]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parent.parent.parent
    return subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernels_agree_with_double_precision(interpreted, kind):
    assert f"{kind}: 6 cases" in interpreted.stdout.splitlines(), interpreted.stdout + interpreted.stderr


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("weighted", [True, False], ids=["weight", "no weight"])
@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 5, 2)], ids=["vectors", "images"])
def test_derivatives(shape, weighted, training):
    mean, var = torch.randn(3).double(), torch.rand(3).double() + 0.5

    def function(x, w):
        return F.batch_norm(2 * x + 5, mean.clone(), var.clone(), w, None, training)

    check(function, (random(*shape), random(3) if weighted else None))


@pytest.mark.usefixtures("operators")
def test_each_derivative_is_one_operator():
    """Of maps with respect to the images: twice a first derivative, and the second."""
    model, (images, target) = Residual().double(), batch()
    layers = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    expected = saliency_step(model, images, target)
    with Calls() as calls:
        actual = saliency_step(model, images, target, fast_double_backward)
    agree(actual, expected)
    assert len(calls.arguments(torch.ops.salnb.batch_norm_gradients.default)) == 2 * layers
    assert len(calls.arguments(torch.ops.salnb.batch_norm_second_gradients.default)) == layers


@pytest.mark.usefixtures("operators")
def test_maps_with_respect_to_weights_take_the_closed_form():
    """Where other cotangents come along, the operator for the second derivative is not asked."""
    x, w = random(4, 3, 5, 2), random(3)
    expected = second_order(lambda x, w: F.batch_norm(x, None, None, w, None, True), (x, w))
    with Calls() as calls, fast_double_backward():
        actual = second_order(lambda x, w: F.batch_norm(x, None, None, w, None, True), (x, w))
    agree(actual, expected)
    assert not calls.arguments(torch.ops.salnb.batch_norm_second_gradients.default)


class OnCuda:
    """As much of a tensor on a GPU as is asked for."""

    is_cuda = True


def test_off_unless_asked_for_and_on_a_cpu_always(monkeypatch):
    assert not fused.applies(OnCuda())
    use_fused_batch_norm()
    try:
        assert fused.applies(OnCuda())
        assert not fused.applies(torch.ones(2, 3))
        use_fused_batch_norm(False)
        assert not fused.applies(OnCuda())
        monkeypatch.setattr(fused.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(RuntimeError, match=r"use_fused_batch_norm\(\) needs Triton"):
            use_fused_batch_norm()
    finally:
        use_fused_batch_norm(None)


@pytest.fixture
def never_tried(monkeypatch):
    """No device was found to run the kernels, or not, so far."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    cached = fused._runs_on
    cached.cache_clear()
    yield torch.device("cuda")
    cached.cache_clear()


def test_preferred_where_a_gpu_runs_them(never_tried, monkeypatch):
    monkeypatch.setattr(fused, "_runs_on", lambda device: True)
    with fused.preferred(never_tried) as used:
        assert used
        assert fused.applies(OnCuda())
        assert not fused.applies(torch.ones(2, 3))
    assert not fused.applies(OnCuda())
    with fused.preferred(torch.device("cpu")) as used:
        assert not used
        assert not fused.applies(OnCuda())
    use_fused_batch_norm(False)
    try:
        with fused.preferred(never_tried):
            assert not fused.applies(OnCuda())
    finally:
        use_fused_batch_norm(None)


def test_preferred_but_not_to_be_had(never_tried, monkeypatch):
    """No Triton is as good as no kernels; one that fails, for want of a compiler, says so once."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch, "ones", lambda *shape, device: torch.zeros(shape))

    def fail(*args):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(kernels, "first_gradients", fail)
    with pytest.warns(UserWarning, match="cannot be used .*Failed to find C compiler"):  # noqa: SIM117
        with fused.preferred(never_tried):
            assert not fused.applies(OnCuda())
    with fused.preferred(never_tried):
        assert not fused.applies(OnCuda())


def test_preferred_where_nobody_need_try(never_tried, monkeypatch):
    def fail(*args):
        raise AssertionError("it was tried")

    monkeypatch.setattr(fused, "warn_caller", fail)
    for home, name, found in (
        (torch.cuda, "get_device_capability", (7, 5)),
        (fused.importlib.util, "find_spec", None),
    ):
        monkeypatch.setattr(home, name, lambda which, found=found: found)
        with fused.preferred(never_tried):
            assert not fused.applies(OnCuda())
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        fused._runs_on.cache_clear()


def test_what_is_traced_keeps_the_closed_form(monkeypatch):
    """The compiler fuses what it is given, if it is given operators that it knows."""
    monkeypatch.setattr(fused, "_enabled", True)
    with FakeTensorMode():
        x = torch.empty(2, 3, 4, 4, device="cuda")
    assert x.is_cuda
    assert not fused.applies(x)


def test_a_gradient_that_reaches_a_batch_norm_only_through_the_map():
    """The output has no gradient of its own in the last backward pass: what is added stands alone."""
    x, w = random(4, 3, 5, 2), random(3)

    def derivatives():
        y = F.batch_norm(x, None, None, w, None, True)
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        gy = torch.ones_like(y)
        (linear,) = torch.autograd.grad(
            F.batch_norm(x, None, None, w, None, True), x, gy * x.detach(), create_graph=True
        )
        return torch.autograd.grad(linear.square().sum() + 0 * first.sum(), (x, w))

    expected = derivatives()
    with fast_double_backward():
        actual = derivatives()
    agree(actual, expected)


def test_an_input_without_gradient_gets_none():
    x, w = random(4, 3, 5, 2, grad=False), random(3)
    with fast_double_backward():
        y = F.batch_norm(x, None, None, w, None, True)
        (first,) = torch.autograd.grad(y.square().sum(), w, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), w)
    plain = F.batch_norm(x, None, None, w, None, True)
    (first,) = torch.autograd.grad(plain.square().sum(), w, create_graph=True)
    assert_close(second, torch.autograd.grad(first.square().sum(), w)[0])
    assert not x.requires_grad


def test_the_closed_form_adds_in_place_what_comes_from_the_map():
    x, gy, more = (random(4, 3, 5, 2, grad=False) for _ in range(3))
    at = batch_norm.Forward(x, None, x.mean((0, 2, 3)), torch.ones(3).double(), True, 1e-5)
    gx, _, _ = batch_norm.first_gradients(gy, at, [True] * 3)
    assert_close(batch_norm.first_gradients(gy, at, [True] * 3, more)[0], gx + more)


KERNELS = [(kernels._sums, 6), (kernels._write_first, 11), (kernels._write_second, 12)]


def test_a_kernel_is_started_again_as_it_was_started_first(monkeypatch):
    """What Triton finds out about arguments holds for others of the kind; not for a pointer between words."""
    started = []

    class Kernel:
        def __init__(self, how):
            self.how = how

        def __getitem__(self, grid):
            return lambda *arguments: started.append((self.how, grid, arguments)) or Kernel("again")

    monkeypatch.setattr(kernels, "_compiled", lambda kernel: Kernel("first"))
    monkeypatch.setattr(kernels, "_can_be_started_again", lambda: True)
    monkeypatch.setattr(kernels, "_triton_dtype", str)
    kernels._plan.cache_clear()
    try:
        for x in (torch.randn(4, 3, 5, 2), torch.randn(4, 3, 5, 2), torch.randn(121)[1:].view(4, 3, 5, 2)):
            kernels.first_gradients(x, x, None, torch.ones(3), torch.ones(3), True, 1e-5)
            kernels.first_gradients(x, x, torch.ones(3), torch.ones(3), torch.ones(3), True, 1e-5, x)
    finally:
        kernels._plan.cache_clear()
    new = ["first", "first", "again", "first"]  # the sums of both calls are the same kernel's
    assert [how for how, *_ in started] == [*new, *["again"] * 4, *["first"] * 4]
    for first, again in zip(started[:4], started[4:8], strict=True):
        assert first[1] == again[1]
        for a, b in zip(first[2], again[2], strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype) if isinstance(a, torch.Tensor) else a == b
    for index, switches in ((1, (False, False, False)), (3, (True, True, False))):
        # whether there is a weight, and what is added to either gradient
        assert started[index][2][-7:-4] == switches


@pytest.mark.parametrize(
    ("version", "interpret", "can"),
    [("3.6.0", False, True), ("3.10.1", False, True), ("3.5.9", False, False), ("3.6.0", True, False)],
)
def test_who_can_start_a_kernel_again(monkeypatch, version, interpret, can):
    triton = pytest.importorskip("triton", minversion="3.4", reason="the kernels are written in Triton")
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", interpret)
    kernels._can_be_started_again.cache_clear()
    try:
        assert kernels._can_be_started_again() is can
    finally:
        kernels._can_be_started_again.cache_clear()


@pytest.mark.parametrize(
    ("x", "last"),
    [
        (torch.ones(2, 3, 4, 4), False),
        (torch.ones(2, 3, 4, 4).contiguous(memory_format=torch.channels_last), True),
        (torch.ones(2, 3, 4, 4, 2)[..., 0], False),
        (torch.ones(2, 3), True),
        (torch.ones(2, 3, 4), False),
    ],
    ids=["contiguous", "channels_last", "with gaps", "vectors", "sequences"],
)
def test_the_layout_of_a_plan(x, last):
    plan = kernels._plan_for(x, True, 1e-5)
    assert plan.block[2] == (32 if last else 1)  # channels of a tile
    assert plan.format == (torch.channels_last if last and x.ndim == 4 else torch.contiguous_format)


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")  # Triton's own
@pytest.mark.parametrize(("kernel", "pointers"), KERNELS, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize("blocks", [(4, 256, 1), (1, 32, 32)], ids=["contiguous", "channels_last"])
def test_the_kernels_compile_for_a_gpu(kernel, pointers, blocks):
    """For an H100, which need not be there; the interpreter takes more than the compiler does."""
    triton = pytest.importorskip("triton", minversion="3.4", reason="the kernels are written in Triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    compiled = kernels._compiled(kernel)
    names = list(inspect.signature(kernel).parameters)
    constants = {name: True for name in names if name.isupper()}
    constants |= {"ACC": triton.language.float32, "ROWS": 32}
    constants |= dict(zip(("IMAGES", "PIXELS", "CHANNELS"), blocks, strict=True))
    constants = {name: value for name, value in constants.items() if name in names}
    signature = dict.fromkeys(names, "i32") | {"eps": "fp32"} | dict.fromkeys(constants, "constexpr")
    for name in names[:pointers]:
        image = name in ("u_ptr", "gy_ptr", "x_ptr", "more_ptr", "ggy_ptr", "ggx_ptr")
        signature[name] = "*bf16" if image else "*fp32"
    source = ASTSource(compiled, signature, constexprs=constants)
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_on_a_gpu(training, layout, device):
    """A step by the kernels is a step by the closed form."""
    if device.type != "cuda":
        pytest.skip("needs a GPU: --device cuda")
    model = Residual().to(device, memory_format=layout).train(training)
    images, target = (t.to(device) for t in batch(torch.float32))
    images = images.contiguous(memory_format=layout)
    expected = saliency_step(model, images, target, fast_double_backward)
    use_fused_batch_norm()
    try:
        with Calls() as calls:
            actual = [saliency_step(model, images, target, fast_double_backward) for _ in range(2)]
    finally:
        use_fused_batch_norm(None)
    assert calls.arguments(torch.ops.salnb.batch_norm_second_gradients.default)
    for each in actual:
        agree(each, expected, 1e-5)
