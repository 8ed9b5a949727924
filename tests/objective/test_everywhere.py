"""The objective on the usual architectures, in low precision, in other memory formats; what it refuses."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel
from torchvision import models
from torchvision.models import convnext, densenet, efficientnet, mobilenetv2, mobilenetv3, resnet, vgg

from salnb import Objective, saliency
from salnb.augment import Affine, HorizontalFlip, Identity, Rotation
from salnb.objective.precision import LossScale
from tests.helpers.finite_differences import assert_gradient
from tests.helpers.methods import WITH_RULE, cheap
from tests.helpers.networks import conv_bn
from tests.helpers.tolerances import assert_close, relative_difference

TARGET = torch.tensor([0, 1, 2, 3])


def images(n=4, size=32, dtype=torch.float64):
    return torch.rand(n, 3, size, size, dtype=dtype)


def gradients(objective, x, target=TARGET, scaler=None):
    """All gradients of one repeatable step in one vector."""
    objective.zero_grad()
    total = objective(x, target, torch.Generator().manual_seed(7)).total
    (total if scaler is None else scaler.scale(total)).backward()
    return torch.cat([p.grad.flatten() for p in objective.parameters()])


# --- architectures ------------------------------------------------------------------------------------------


def small_vgg():
    layers = vgg.make_layers([4, "M", 6, "M"], batch_norm=True)
    return nn.Sequential(layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5))


def small_mobilenet_v3():
    block = partial(mobilenetv3.InvertedResidualConfig, width_mult=1.0)
    setting = [block(8, 3, 8, 8, True, "RE", 2, 1), block(8, 3, 16, 8, True, "HS", 2, 1)]
    return mobilenetv3.MobileNetV3(setting, 16, num_classes=5, dropout=0.0)


def small_efficientnet():
    block = partial(efficientnet.MBConvConfig, width_mult=1.0, depth_mult=1.0)
    setting = [block(1, 3, 1, 8, 8, 1), block(4, 3, 2, 8, 8, 2)]
    return efficientnet.EfficientNet(setting, dropout=0.0, stochastic_depth_prob=0.0, num_classes=5)


# torchvision's own classes, in sizes that a finite difference can afford
ARCHITECTURES = {
    "resnet": lambda: resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=5),
    "resnet-bottleneck": lambda: resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], num_classes=5),
    "densenet": lambda: densenet.DenseNet(4, (2, 2), 8, num_classes=5),
    "vgg-bn": small_vgg,
    "mobilenet-v2": lambda: mobilenetv2.MobileNetV2(
        5, inverted_residual_setting=[[1, 8, 1, 1], [4, 8, 2, 2]], dropout=0.0
    ),
    "mobilenet-v3": small_mobilenet_v3,
    "efficientnet": small_efficientnet,
    "convnext": lambda: convnext.ConvNeXt(
        [convnext.CNBlockConfig(8, 12, 1), convnext.CNBlockConfig(12, None, 1)], num_classes=5
    ),
    "vit": lambda: models.VisionTransformer(32, 8, 2, 2, 12, 24, num_classes=5),
}


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    torch.manual_seed(4)
    model = ARCHITECTURES[request.param]().double().train()
    if request.param == "vit":
        nn.init.normal_(model.heads.head.weight)  # zero as torchvision makes it: no score, no map
    if request.param == "convnext":
        for name, parameter in model.named_parameters():
            if name.endswith("layer_scale"):
                nn.init.ones_(parameter)  # 1e-6 hides the blocks
    return model


def test_gradient_of_the_saliency_term(architecture):
    before = [type(module) for module in architecture.modules()]
    in_place = [getattr(module, "inplace", None) for module in architecture.modules()]
    objective = Objective(architecture, Affine(15, translate=(0.1, 0.1)), normalize="l2")
    x = images()

    def loss():
        return objective(x, TARGET, torch.Generator().manual_seed(7)).saliency_loss

    assert loss() > 1e-6
    assert assert_gradient(loss, architecture.parameters()) > 1e-4
    assert [type(module) for module in architecture.modules()] == before
    assert [getattr(module, "inplace", None) for module in architecture.modules()] == in_place


@pytest.mark.usefixtures("traced")
def test_compiled_is_equal(architecture):
    objective = Objective(architecture, HorizontalFlip(), alpha=0.0)
    twin = copy.deepcopy(objective)
    twin.compile(backend="eager")
    x = images()
    assert_close(gradients(twin, x), gradients(objective, x))
    for buffer, expected in zip(twin.buffers(), objective.buffers(), strict=True):
        assert_close(buffer.double(), expected.double())


# --- precision ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", saliency.METHODS)
def test_bfloat16_autocast(method):
    smooth = method not in WITH_RULE
    model = conv_bn(nn.SiLU if smooth else nn.ReLU)
    objective = Objective(model, Rotation(20), method=method, method_options=cheap(method, still=True))
    x = images(size=12, dtype=torch.float32)
    expected = gradients(objective, x)
    objective.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = objective(x, TARGET, torch.Generator().manual_seed(7))
    assert found.logits.dtype == torch.bfloat16
    assert {t.dtype for t in (found.total, found.class_loss, found.saliency_loss)} == {torch.float32}
    found.total.backward()
    gradient = torch.cat([p.grad.flatten() for p in objective.parameters()])
    # rounded, an activation or a gradient can change its sign, and a ReLU rule its mind
    assert F.cosine_similarity(gradient, expected, dim=0) > (0.99 if smooth else 0.8)


class Faint(nn.Sequential):
    """Its score hangs on each of many pixels by less than the smallest float16 number."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 6, 3, padding=1), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.append(nn.Linear(6, 4))

    def forward(self, x):
        return super().forward(x) * 3e-5


@pytest.mark.parametrize("way", ["eager", "compiled"])
@pytest.mark.usefixtures("traced")
def test_float16_does_not_underflow(way):
    model, x = Faint(), images(size=32, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.float16):
        naive = saliency.vanilla_gradient(model, x, TARGET)
    assert naive.abs().max() == 0

    objective = Objective(model, Rotation(20), alpha=0.0)
    expected = gradients(objective, x)
    if way == "compiled":
        objective.compile(backend="eager")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**5)
    with torch.autocast("cpu", dtype=torch.float16):
        for _ in range(10 if way == "compiled" else 1):  # the graph's own scale has to come down first
            found = gradients(objective, x, scaler=scaler)
    assert found.abs().max() > 0
    assert F.cosine_similarity(found, expected, dim=0) > 0.98
    assert relative_difference(found / 2**5, expected) < 0.2
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    before = model[0].weight.clone()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**5
    assert not torch.equal(model[0].weight, before)


@pytest.mark.parametrize("method", ["vanilla_gradient", "grad_cam", "guided_grad_cam"])
def test_maps_of_float16_have_the_scale_taken_out(method):
    """Of each of their factors that is a gradient: guided Grad-CAM has two."""
    model, x = conv_bn(), images(size=12, dtype=torch.float32)
    objective = Objective(model, HorizontalFlip(), method=method, normalize="none", distance="l1")
    expected = objective(x, TARGET, torch.Generator().manual_seed(7)).saliency_loss
    with torch.autocast("cpu", dtype=torch.float16):
        found = [objective(x, TARGET, torch.Generator().manual_seed(7)).saliency_loss for _ in range(4)][-1]
    assert_close(found, expected, 0.05)


@pytest.mark.parametrize("score", ["logit", "log_prob"])
def test_smoothgrad_in_float16_does_not_underflow(score):
    """Without noise it is the vanilla gradient, of faint scores too."""
    found, noiseless = {}, {"n_samples": 1, "noise_level": 0.0}
    for method, options in (("vanilla_gradient", {}), ("smoothgrad", noiseless)):
        torch.manual_seed(0)
        kind = {"method": method, "method_options": options, "score": score}
        objective = Objective(Faint(), HorizontalFlip(1.0), alpha=0.0, **kind)
        with torch.autocast("cpu", dtype=torch.float16):
            losses = objective(images(size=32, dtype=torch.float32), TARGET)
        found[method] = losses.saliency_loss
        assert objective.score_scale.steps == 1
    assert found["vanilla_gradient"] > 0
    assert_close(found["smoothgrad"], found["vanilla_gradient"])


def test_the_scale_of_float16_follows_the_gradients():
    scale = LossScale(5, top=6)
    for overflows, value in ((1, 16), (2, 4), (9, 1)):
        for _ in range(overflows):
            scale.update(torch.tensor(False))
        assert scale.value == value
    for steps, value in ((1999, 1), (1, 2), (2000, 4), (20000, 64)):
        for _ in range(steps):
            scale.update(torch.tensor(True))
        assert scale.value == value
    assert not scale.state_dict()


def test_the_scales_are_where_model_and_images_are(monkeypatch):
    """On a GPU they would be waited for otherwise, and DistributedDataParallel could not send them around."""
    monkeypatch.setattr(
        "salnb.objective.objective.is_traced", lambda tensor: False
    )  # "meta" stands for a GPU
    objective = Objective(conv_bn().to("meta"), Rotation(20))
    assert {buffer.device.type for buffer in objective.buffers()} == {"meta"}
    moved_later = Objective(conv_bn(), Rotation(20))
    moved_later.model.to("meta")
    with pytest.raises(RuntimeError):  # autocast knows no "meta"
        moved_later(images(dtype=torch.float32).to("meta"), TARGET.to("meta"))
    assert {buffer.device.type for buffer in moved_later.buffers()} == {"meta"}


def test_an_overflow_of_the_scaled_score_is_gone_in_the_next_step():
    model = conv_bn()
    nn.init.normal_(model[8].weight, std=30.0)
    objective, x = Objective(model, Rotation(20)), images(size=12, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.float16):
        seen = [objective(x, TARGET).saliency_loss.isfinite().item() for _ in range(8)]
    assert not seen[0]
    assert seen[-1]


def test_a_model_in_half_precision():
    objective = Objective(conv_bn().bfloat16(), Rotation(20))
    found = objective(images(size=12, dtype=torch.bfloat16), TARGET)
    found.total.backward()
    assert found.total.dtype == torch.float32
    assert objective.model[0].weight.grad.isfinite().all()


# --- other ways of running ----------------------------------------------------------------------------------


def test_accumulated_gradients_are_those_of_the_parts():
    objective = Objective(conv_bn().double(), Rotation(20))
    x = images(size=12)
    parts = [gradients(objective, part, TARGET[:2]) for part in x.chunk(2)]
    objective.zero_grad()
    for part in x.chunk(2):
        (objective(part, TARGET[:2], torch.Generator().manual_seed(7)).total / 2).backward()
    accumulated = torch.cat([p.grad.flatten() for p in objective.parameters()])
    assert_close(accumulated, sum(parts) / 2)


class Formats(nn.Sequential):
    def forward(self, x):
        self.seen = x.is_contiguous(memory_format=torch.channels_last)
        return super().forward(x)


@pytest.mark.parametrize(
    "augmentation", [Identity(), Affine(20), HorizontalFlip(1.0)], ids=lambda a: type(a).__name__
)
def test_channels_last(augmentation):
    objective = Objective(Formats(*conv_bn().double()), augmentation)
    x = images(size=12)
    expected = gradients(objective, x)
    assert not objective.model.seen
    objective.to(memory_format=torch.channels_last)
    assert_close(gradients(objective, x.contiguous(memory_format=torch.channels_last)), expected)
    assert objective.model.seen


# --- what cannot work says so -------------------------------------------------------------------------------


class Once(torch.autograd.Function):
    """A custom operation whose author did not think of second derivatives."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad * (1 - ctx.saved_tensors[0].tanh() ** 2)


class WithOnce(nn.Sequential):
    def forward(self, x):
        return super().forward(Once.apply(x * self[0].bias.mean()))


class WithFusedAttention(nn.Sequential):
    """Calls the fused kernel itself, past the choice that the objective makes."""

    def forward(self, x):
        rows = x.flatten(2).contiguous()[:, None]
        mixed, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(rows, rows, rows)
        return super().forward(mixed.reshape(x.shape))


@pytest.mark.parametrize("way", ["eager", "compiled"])
@pytest.mark.parametrize(
    ("network", "reason"),
    [(WithOnce, "once_differentiable"), (WithFusedAttention, "flash_attention.*is not implemented")],
    ids=["custom-function", "fused-attention"],
)
def test_an_operation_without_a_second_derivative(network, reason, way):
    objective = Objective(network(*conv_bn()), Rotation(20))
    if way == "compiled":
        objective.compile(backend="eager")
    x = images(size=8, dtype=torch.float32)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"one of its operations has no second derivative.*{reason}"):
            objective(x, TARGET)
    objective.gamma = 0.0
    if way == "eager":
        objective(x, TARGET).total.backward()


def test_synchronised_batch_norm_is_refused():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(conv_bn())
    x = images(size=8, dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"nn.SyncBatchNorm has no second derivative.*gamma=0"):
        Objective(model, Identity())(x, TARGET)
    Objective(model, Identity()).eval()(x, TARGET).total.backward()


def test_a_wrapped_model_is_refused():
    wrapped = nn.Sequential(object.__new__(DistributedDataParallel))
    nn.Module.__init__(wrapped[0])
    with pytest.raises(TypeError, match=r"wrap the objective, DistributedDataParallel\(Objective\(model"):
        Objective(wrapped, Identity())
