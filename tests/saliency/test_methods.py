"""The six methods: against definitions, against other libraries, and their second derivatives."""

import copy
import inspect
from collections import OrderedDict
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from salnb import saliency
from salnb._common.catalog import METHODS
from tests.helpers.finite_differences import assert_gradient
from tests.helpers.methods import WITH_RULE, cheap
from tests.helpers.networks import FunctionalReLUs, conv_bn, without_inplace
from tests.helpers.tolerances import FROM_FLOAT64, assert_close, relative_difference

GRADIENT_METHODS = ["vanilla_gradient", "deconvnet", "guided_backprop"]
# what all methods have, and `reduce`, which those that look at pixels have
SHARED = ["model", "images", "target", "create_graph", "score", "output", "model_kwargs"]

# dense, residual, plain, mobile; the layer is where Grad-CAM is compared
ARCHITECTURES = {
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=7), "layer4.1.conv2"),
    "vgg11_bn": (lambda: narrow_vgg(), "features.25"),
    "densenet121": (lambda: modular_densenet(), "0.norm5"),
    "mobilenet_v3": (lambda: torchvision.models.mobilenet_v3_small(num_classes=7), "features.11"),
}


def modular_densenet():
    """DenseNet-121 with its one functional ReLU, which Captum would miss, as a module."""
    network = torchvision.models.densenet121(num_classes=7)
    return nn.Sequential(
        network.features, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), network.classifier
    )


def narrow_vgg():
    """VGG-11 with 64 instead of 4096 columns in its classifier."""
    layers = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["A"], batch_norm=True)
    classifier = nn.Sequential(nn.Linear(512 * 49, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 7))
    parts = {
        "features": layers,
        "avgpool": nn.AdaptiveAvgPool2d(7),
        "flat": nn.Flatten(),
        "classifier": classifier,
    }
    return nn.Sequential(OrderedDict(parts))


@pytest.fixture(params=ARCHITECTURES, scope="module")
def architecture(request):
    torch.manual_seed(1)
    make, layer = ARCHITECTURES[request.param]
    return make().double().eval(), layer


def _hooks_warning():
    return pytest.warns(UserWarning, match="backward hooks")


def images(n=2, size=64, dtype=torch.float64):
    return torch.rand(n, 3, size, size, dtype=dtype)


def explain(method, model, x, target=None, **kwargs):
    """Run a method with few, repeatable samples."""
    if "generator" in parameters(method):
        kwargs.update(generator=torch.Generator().manual_seed(5))
    return saliency.METHODS[method](model, x, target, **cheap(method, 3), **kwargs)


def parameters(method):
    return inspect.signature(saliency.METHODS[method]).parameters


# --- the catalogue ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", saliency.METHODS)
def test_the_catalogue_knows_what_a_method_takes(method):
    spec, function = METHODS[method], saliency.METHODS[method]
    assert function.__name__ == method
    assert getattr(saliency, method) is function
    assert method in saliency.__all__
    options = [name for name in parameters(method) if name not in (*SHARED, "reduce", "generator")]
    assert options == list(spec.options)
    assert spec.repeats in (None, *options)
    assert [name for name in SHARED if name in parameters(method)] == SHARED
    assert ("reduce" in parameters(method)) == spec.pixels
    assert ("layer" in options) == spec.layer


DEFAULTS = {"target": None, "create_graph": False, "reduce": "max", "score": "logit", "output": None}
DEFAULTS |= {"model_kwargs": None, "layer": None, "reshape": None, "generator": None}
DEFAULTS |= {"n_samples": 25, "noise_level": 0.15}


@pytest.mark.parametrize("method", saliency.METHODS)
def test_what_is_not_given_has_the_value_that_users_rely_on(method):
    given = {name: p.default for name, p in parameters(method).items() if p.default is not p.empty}
    assert given == {name: DEFAULTS[name] for name in given}
    assert set(parameters(method)) - set(given) == {"model", "images"}


# --- against others -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_agrees_with_captum(architecture, method, dtype):
    attr = pytest.importorskip("captum.attr")
    model = without_inplace(copy.deepcopy(architecture[0]).to(dtype))
    x, target = images(dtype=dtype), torch.tensor([2, 5])
    ours = saliency.METHODS[method](model, x, target, reduce=None)
    captum = {
        "vanilla_gradient": attr.Saliency,
        "deconvnet": attr.Deconvolution,
        "guided_backprop": attr.GuidedBackprop,
    }[method]
    options = {"abs": False} if method == "vanilla_gradient" else {}
    with _hooks_warning() if method != "vanilla_gradient" else nullcontext():
        theirs = captum(model).attribute(x.clone().requires_grad_(), target, **options)
    assert_close(ours, theirs)


def test_smoothgrad_agrees_with_captum():
    attr = pytest.importorskip("captum.attr")
    model, x, target = without_inplace(conv_bn().double().eval()), images(size=12), torch.tensor([1, 3])
    x = (x - x.amin((1, 2, 3), keepdim=True)) / (
        x.amax((1, 2, 3), keepdim=True) - x.amin((1, 2, 3), keepdim=True)
    )
    ours = saliency.smoothgrad(model, x, target, n_samples=1500, noise_level=0.1, reduce=None)
    tunnel = attr.NoiseTunnel(attr.Saliency(model))
    theirs = tunnel.attribute(
        x.clone().requires_grad_(), nt_type="smoothgrad", nt_samples=1500, nt_samples_batch_size=100, stdevs=0.1,
        target=target, abs=False,
    )  # fmt: skip
    plain = saliency.vanilla_gradient(model, x, target, reduce=None)
    # two means over independent noise: they agree far better than either agrees with the plain gradient
    assert (ours - theirs).norm() < 0.25 * (ours - plain).norm()


def test_grad_cam_agrees_with_captum(architecture):
    attr = pytest.importorskip("captum.attr")
    model, name = copy.deepcopy(architecture[0]), architecture[1]
    model = without_inplace(model)
    layer = model.get_submodule(name)
    x, target = images(), torch.tensor([2, 5])
    coarse = attr.LayerGradCam(model, layer).attribute(x, target, relu_attributions=True)
    theirs = F.interpolate(coarse, x.shape[-2:], mode="bilinear", align_corners=False)
    assert theirs.max() > 0
    assert_close(saliency.grad_cam(model, x, target, layer=name), theirs)
    with _hooks_warning():
        guided = attr.GuidedGradCam(model, layer).attribute(x, target, interpolate_mode="bilinear")
    assert_close(saliency.guided_grad_cam(model, x, target, layer=layer, reduce=None), guided)


def test_grad_cam_agrees_with_pytorch_grad_cam(architecture):
    cams = pytest.importorskip("pytorch_grad_cam")
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model, name = without_inplace(copy.deepcopy(architecture[0])), architecture[1]
    layer, x, classes = model.get_submodule(name), images(), [2, 5]
    targets = [ClassifierOutputTarget(c) for c in classes]
    with cams.GradCAM(model=model, target_layers=[layer]) as cam:
        cam(input_tensor=x, targets=targets)
        seen = cam.activations_and_grads
        # the map before that library scales it to [0, 1] in float32
        coarse = cam.get_cam_image(x, layer, targets, seen.activations[0].numpy(), seen.gradients[0].numpy())
    theirs = F.interpolate(torch.from_numpy(coarse).clamp(min=0)[:, None], x.shape[-2:], mode="bilinear")
    assert theirs.max() > 0
    assert_close(saliency.grad_cam(model, x, torch.tensor(classes), layer=name), theirs)


def slow_relu_rule(weights, x, target, rule):
    """eq. 3 and 4 by hand for FunctionalReLUs: every layer's transpose written out, no autograd through ReLU."""
    activations, signal = [], x
    convolutions = [weights.first, weights.second, weights.third, weights.fourth]
    for convolution in convolutions:
        signal = F.conv2d(signal, convolution.weight, convolution.bias, padding=1).clamp(min=0)
        activations.append(signal)
    area = signal.shape[-2] * signal.shape[-1]
    back = weights.head.weight[target][:, :, None, None].expand_as(signal) / area
    for convolution, activation in zip(reversed(convolutions), reversed(activations), strict=True):
        if rule != "deconvnet":
            back = back * (activation > 0)
        if rule != "vanilla_gradient":
            back = back * (back > 0)
        back = F.conv_transpose2d(back, convolution.weight, padding=1)
    return back


@pytest.mark.parametrize("method", GRADIENT_METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_functional_relus_follow_the_definition(method, dtype, device):
    model = FunctionalReLUs().to(device, dtype).eval()
    x, target = images(3, 16, dtype).to(device), torch.tensor([0, 4, 2], device=device)
    ours = saliency.METHODS[method](model, x, target, reduce=None)
    tolerance = FROM_FLOAT64 if device.type == "cuda" and dtype == torch.float32 else None
    assert_close(ours, slow_relu_rule(model, x, target, method).detach(), tolerance)


@pytest.mark.parametrize("in_place", [False, True], ids=["new", "in-place"])
@pytest.mark.parametrize("spelling", ["module", "functional", "hardtanh"])
@pytest.mark.parametrize(
    ("rule", "allowed"), [("guided_backprop", [0, 1, 0, 0]), ("deconvnet", [1, 1, 0, 1])]
)
def test_relu6_has_a_mask_of_its_own(rule, allowed, spelling, in_place, device):
    """Below 0, inside, inside with a negative gradient, above 6."""

    relu6 = {
        "module": nn.ReLU6(in_place),
        "functional": lambda x: F.relu6(x, in_place),
        "hardtanh": lambda x: F.hardtanh(x, 0, 6, inplace=in_place),
    }[spelling]

    class Probe(nn.Module):
        def forward(self, x):
            return (relu6(x * 1).flatten(1) * torch.tensor([1.0, 1.0, -1.0, 1.0], device=device)).sum(
                1, keepdim=True
            )

    x = torch.tensor([-1.0, 3.0, 3.0, 7.0], device=device).view(1, 1, 2, 2)
    found = saliency.METHODS[rule](Probe(), x, 0, reduce=None).flatten()
    assert found.tolist() == [float(a) for a in allowed]


# --- second derivatives -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", saliency.METHODS)
@pytest.mark.parametrize("network", ["modules", "inplace", "relu6", "functional"])
def test_gradient_of_a_loss_on_the_map(method, network, device):
    """Finite differences in float64; two batch norms in train mode wherever the network has them."""
    networks = {
        "modules": conv_bn,
        "inplace": lambda: conv_bn(lambda: nn.ReLU(inplace=True)),
        "relu6": lambda: conv_bn(nn.ReLU6),
        "functional": FunctionalReLUs,
    }
    torch.manual_seed(3)
    model = networks[network]().double().train().to(device)
    x, target = images(4, 8).to(device), torch.tensor([0, 1, 2, 3], device=device)
    pattern = torch.randn(4, 1, 8, 8, dtype=torch.float64).to(device)

    def loss():
        return (explain(method, model, x, target, create_graph=True) * pattern).sum()

    parameters = [p for p in model.parameters() if p.ndim == 4]
    assert assert_gradient(loss, parameters) > 1e-4


# --- targets, shapes, side effects --------------------------------------------------------------------------


@pytest.mark.parametrize("method", saliency.METHODS)
def test_shapes_and_dtypes(method):
    model, x = conv_bn().eval(), images(3, 12, torch.float32)
    assert explain(method, model, x).shape == (3, 1, 12, 12)
    assert explain(method, model, x).dtype == torch.float32
    assert not explain(method, model, x).requires_grad
    if METHODS[method].pixels:
        signed = explain(method, model, x, reduce=None)
        assert signed.shape == x.shape
        assert_close(signed.abs().amax(1, keepdim=True), explain(method, model, x))


@pytest.mark.parametrize("method", saliency.METHODS)
def test_targets(method):
    model, x = conv_bn().double().eval(), images(3, 12)
    predicted = model(x).argmax(1)
    default = explain(method, model, x)
    assert_close(default, explain(method, model, x, predicted))
    assert_close(
        explain(method, model, x, 2), explain(method, model, x, torch.tensor([2, 2, 2], dtype=torch.int32))
    )
    one_hot = F.one_hot(predicted, 4).double()
    assert_close(default, explain(method, model, x, one_hot))
    if method == "vanilla_gradient":
        mixed = explain(method, model, x, 0.25 * F.one_hot(torch.tensor([0] * 3), 4).double()
                        + 0.75 * F.one_hot(torch.tensor([3] * 3), 4).double(), reduce=None)  # fmt: skip
        parts = [explain(method, model, x, c, reduce=None) for c in (0, 3)]
        assert_close(mixed, 0.25 * parts[0] + 0.75 * parts[1])


@pytest.mark.parametrize("method", saliency.METHODS)
def test_a_batch_gives_what_each_image_gives_alone(method):
    model, x = conv_bn().double().eval(), images(3, 12)
    function, options = saliency.METHODS[method], cheap(method, still=True)
    together = function(model, x, 1, **options)
    for i in range(3):
        assert_close(together[i : i + 1], function(model, x[i : i + 1], 1, **options))


@pytest.mark.parametrize("create_graph", [False, True], ids=["map", "map-with-graph"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("method", saliency.METHODS)
def test_the_model_is_left_as_it_was(method, training, create_graph):
    model = conv_bn(lambda: nn.ReLU(inplace=True)).train(training)
    model[0].weight.grad = torch.full_like(model[0].weight, 7.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    versions = {name: value._version for name, value in model.state_dict().items()}
    x = images(3, 12, torch.float32)
    copy_of_x = x.clone()
    explain(method, model, x, 1, create_graph=create_graph)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert {name: value._version for name, value in after.items()} == versions
    assert model.training == training
    assert all(len(module._forward_hooks) + len(module._backward_hooks) == 0 for module in model.modules())
    assert torch.equal(model[0].weight.grad, torch.full_like(model[0].weight, 7.0))
    assert all(p.grad is None for p in list(model.parameters())[1:])
    assert torch.equal(x, copy_of_x)
    assert not x.requires_grad


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", saliency.METHODS)
def test_works_where_gradients_are_off(method, context):
    model = conv_bn().eval().requires_grad_(False)
    x = images(2, 12, torch.float32)
    expected = explain(method, model, x, 1)
    with context():
        found = explain(method, model, x.clone(), 1)
    assert_close(found, expected)


@pytest.mark.parametrize("method", WITH_RULE)
def test_a_compiled_model_is_run_as_written(method):
    """Compiled, its ReLUs could not be seen, and the plain gradient would come out without a word."""
    model, x = conv_bn().eval(), images(2, 12, torch.float32)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(x)
    assert_close(explain(method, compiled, x, 1, **({"layer": model[3]} if METHODS[method].layer else {})),
                 explain(method, model, x, 1))  # fmt: skip


def test_grad_cam_finds_the_last_convolution_and_takes_names_and_modules():
    model, x = conv_bn().double().eval(), images(2, 12)
    expected = saliency.grad_cam(model, x, 1)
    assert_close(saliency.grad_cam(model, x, 1, layer="3"), expected)
    assert_close(saliency.grad_cam(model, x, 1, layer=model[3]), expected)
    assert relative_difference(saliency.grad_cam(model, x, 1, layer="0"), expected) > 0.01


def test_grad_cam_uses_values_from_before_an_inplace_relu():
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)
    ).double()
    inplace = copy.deepcopy(plain)
    inplace[1].inplace = True
    x = images(2, 12)
    assert_close(saliency.grad_cam(inplace, x, 1, layer="0"), saliency.grad_cam(plain, x, 1, layer="0"))


def test_smoothgrad_repeats_with_a_generator_and_without_noise_is_the_gradient():
    model, x = conv_bn().double().eval(), images(2, 12)
    assert torch.equal(explain("smoothgrad", model, x, 1), explain("smoothgrad", model, x, 1))
    for reduce in ("max", None):
        still = saliency.smoothgrad(model, x, 1, n_samples=2, noise_level=0.0, reduce=reduce)
        assert_close(still, saliency.vanilla_gradient(model, x, 1, reduce=reduce))


@pytest.mark.parametrize("method", WITH_RULE)
def test_warns_where_no_relu_is_met(method):
    model = conv_bn(nn.SiLU).eval()
    with pytest.warns(UserWarning, match="no ReLU"):
        explain(method, model, images(2, 12, torch.float32), 1)


def test_bfloat16_autocast():
    model, x = conv_bn().eval(), images(2, 12, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = saliency.vanilla_gradient(model, x, 1)
    assert found.dtype == torch.float32
    # a rounded activation can change its sign, and with it single pixels: compare the maps as a whole
    assert (
        F.cosine_similarity(found.flatten(), saliency.vanilla_gradient(model, x, 1).flatten(), dim=0) > 0.99
    )


def test_runs_on_the_accelerator(device):
    model, x = conv_bn().eval(), images(2, 12, torch.float32)
    for method in saliency.METHODS:
        kwargs = cheap(method, still=True)
        expected = saliency.METHODS[method](model, x, 1, **kwargs)
        found = saliency.METHODS[method](copy.deepcopy(model).to(device), x.to(device), 1, **kwargs)
        assert relative_difference(found.cpu(), expected) < 1e-4
