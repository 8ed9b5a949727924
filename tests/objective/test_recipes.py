"""The objective inside training code that others wrote: a few lines each, where the packages are installed."""

import pytest
import torch
from torch import nn

from salnb import Objective, saliency
from salnb.augment import Rotation
from tests.helpers.networks import conv_bn


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def images(n=4, size=32):
    return torch.rand(n, 3, size, size), torch.arange(n) % 4


def vit():
    """A small vision transformer of the package transformers, which returns an object with `.logits`."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32,
        patch_size=8, num_labels=4,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def moved(before, module):
    return [name for name, p in module.named_parameters() if not torch.equal(p, before[name])]


def snapshot(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def test_networks_and_layers_of_transformers():
    net, (x, target) = vit().eval(), images()
    losses = Objective(net, Rotation(20))(x, target)
    losses.total.backward()
    assert losses.logits.shape == (8, 4)
    with pytest.warns(UserWarning, match="comes before all attention: name a later layer"):
        saliency.grad_cam(net, x, target)
    layer = [name for name, m in net.named_modules() if isinstance(m, nn.LayerNorm)][-3]
    maps = saliency.grad_cam(net, x, target, layer=layer, reshape="tokens")
    assert maps.shape == (4, 1, 32, 32)
    assert maps.amax() > 0


def test_trainer_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class SaliencyTrainer(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            losses = self.objective(inputs["pixel_values"], inputs["labels"], step=self.state.global_step)
            return (losses.total, {"logits": losses.logits}) if return_outputs else losses.total

    net, (x, target) = vit(), images(8)
    data = [{"pixel_values": one, "labels": label} for one, label in zip(x, target.tolist(), strict=True)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, max_steps=4, gradient_accumulation_steps=2, use_cpu=True,
        report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = SaliencyTrainer(net, arguments, train_dataset=data)
    trainer.objective, before = Objective(net, Rotation(20), every=2), snapshot(net)
    trainer.train()
    assert moved(before, net)
    assert trainer.objective.steps_done == 4


def test_accelerate():
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    x, target = images(8)
    objective = Objective(conv_bn(), Rotation(20))
    optimizer = torch.optim.SGD(objective.parameters(), 0.1)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, target), 4)
    objective, optimizer, loader = accelerator.prepare(objective, optimizer, loader)
    before = snapshot(objective)
    for batch, labels in loader:
        with accelerator.accumulate(objective):
            accelerator.backward(objective(batch, labels).total)
            optimizer.step()
            optimizer.zero_grad()
    assert len(moved(before, objective)) == len(before)


def test_lora_of_peft():
    peft = pytest.importorskip("peft")
    net = vit()
    linear = {name.rpartition(".")[2] for name, m in net.named_modules() if isinstance(m, nn.Linear)}
    config = peft.LoraConfig(target_modules=sorted(linear - {"classifier"}), modules_to_save=["classifier"])
    adapted, (x, target) = peft.get_peft_model(net, config), images()
    objective, before = Objective(adapted, Rotation(20)), snapshot(adapted)
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], 0.01)
    for _ in range(2):  # the second matrix of an adapter begins at zero
        objective(x, target).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    names = moved(before, adapted)
    assert names
    assert all("lora_" in name or "modules_to_save" in name for name in names)


def test_timm_with_mixup_an_average_of_weights_and_groups_of_parameters():
    timm = pytest.importorskip("timm")
    from timm.data import Mixup
    from timm.loss import SoftTargetCrossEntropy
    from timm.optim import param_groups_weight_decay
    from timm.utils import ModelEmaV3

    net = timm.create_model("resnet18", num_classes=4)
    objective = Objective(net, Rotation(20), class_loss=SoftTargetCrossEntropy())
    optimizer = torch.optim.SGD(param_groups_weight_decay(net, 0.05), 0.1)
    average, mixup = ModelEmaV3(net, decay=0.5), Mixup(mixup_alpha=0.2, label_smoothing=0.1, num_classes=4)
    before = snapshot(average.module)
    for step in range(2):
        x, target = images()
        x, target = mixup(x, target)
        losses = objective(x, target, step=step)
        losses.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update(net, step=step)
    assert losses.total.isfinite()
    assert moved(before, average.module)
