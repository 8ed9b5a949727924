"""The objective inside training code that others wrote: the functions of chapter 17, where the packages are installed."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from salnb import Objective, saliency
from salnb.augment import Rotation
from tests.helpers.networks import conv_bn

CHAPTER = Path(__file__).resolve().parents[2] / "notebooks" / "17-your-own-training-loop.ipynb"


def recipe(cell_id, objective=Objective):
    """The function that a cell of the chapter defines."""
    cells = json.loads(CHAPTER.read_text(encoding="utf-8"))["cells"]
    source = "".join(next(cell["source"] for cell in cells if cell["id"] == cell_id))
    given = {"Objective": objective, "augmentation": Rotation(20), "torch": torch}
    names = dict(given)
    exec(source, names)
    (function,) = names.keys() - given.keys() - {"__builtins__"}
    return names[function]


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
    pytest.importorskip("accelerate")
    net, (x, target) = vit(), images(8)
    data = [{"pixel_values": one, "labels": label} for one, label in zip(x, target.tolist(), strict=True)]
    before = snapshot(net)
    objective = recipe("recipe-trainer", partial(Objective, every=2))(
        net, data, tmp_path, per_device_train_batch_size=2, max_steps=4, gradient_accumulation_steps=2,
        use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    assert moved(before, net)
    assert objective.steps_done == 4


def test_accelerate():
    pytest.importorskip("accelerate")
    net, loader = conv_bn(), torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*images(8)), 4)
    before = snapshot(net)
    recipe("recipe-accelerate")(net, loader, cpu=True)
    assert len(moved(before, net)) == len(before)


def test_lora_of_peft():
    pytest.importorskip("peft")
    net, (x, target) = vit(), images()
    linear = {name.rpartition(".")[2] for name, m in net.named_modules() if isinstance(m, nn.Linear)}
    before = snapshot(net)
    adapted = recipe("recipe-peft")(net, x, target, sorted(linear - {"classifier"}), "classifier")
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
    seconds = [p for name, p in trained.items() if "lora_B" in name]  # which begin at zero
    assert seconds
    assert all(p.any() for p in seconds)
    for name, p in adapted.named_parameters():
        if name not in trained:
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(p, before[plain.replace(".original_module", "")]), name


def test_timm_with_mixup_an_average_of_weights_and_groups_of_parameters():
    timm = pytest.importorskip("timm")
    if not hasattr(pytest.importorskip("timm.optim"), "param_groups_weight_decay"):
        pytest.skip(f"timm {timm.__version__} has the recipe's groups of parameters elsewhere")
    net = timm.create_model("resnet18", num_classes=4)
    before = snapshot(net)
    average = recipe("recipe-timm")(net, [images() for _ in range(2)], 4)
    assert moved(before, average)
