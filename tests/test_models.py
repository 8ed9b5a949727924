"""Networks by name: what the catalogue says of them is true."""

import json
import urllib.error

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import salnb
from salnb import models
from salnb._common import catalog as _catalog
from salnb._common.files import DamagedFileError
from tests.helpers.defaults import DTYPES, default_dtype
from tests.helpers.tolerances import assert_close


def on_paper(name, num_classes=7):
    """A network without memory for its weights: shapes are computed, numbers are not."""
    with torch.device("meta"):
        return models.build(name, num_classes)


def last_pixels(model, size):
    """Height and width of the last convolution's output."""
    seen = []
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    handle = convolutions[-1].register_forward_hook(lambda *args: seen.append(args[2].shape[-2:]))
    model(torch.zeros(2, 3, size, size, device="meta"))
    handle.remove()
    return tuple(seen[0])


@pytest.mark.parametrize("name", _catalog.NETWORKS)
def test_networks_give_logits_from_their_smallest_size_on(name):
    model, known = on_paper(name), _catalog.NETWORKS[name]
    for size in {known.smallest, known.smallest_for_cam, known.largest or 64, 224}:
        assert model(torch.zeros(2, 3, size, size, device="meta")).shape == (2, 7)
    assert model.training


@pytest.mark.parametrize("name", _catalog.NETWORKS)
def test_the_last_convolution_keeps_pixels_from_the_size_on_that_the_catalogue_names(name):
    model, known = on_paper(name), _catalog.NETWORKS[name]
    assert min(last_pixels(model, known.smallest_for_cam)) > 1
    if known.smallest_for_cam > known.smallest:
        assert last_pixels(model, known.smallest_for_cam - 1) == (1, 1)


@pytest.mark.parametrize("name", ["vgg16", "densenet121"])
def test_networks_cannot_take_less_than_their_smallest_size(name):
    size = _catalog.NETWORKS[name].smallest
    on_paper(name)(torch.zeros(2, 3, size, size, device="meta"))
    with pytest.raises(RuntimeError):
        on_paper(name)(torch.zeros(2, 3, 15, 15, device="meta"))


@pytest.mark.parametrize("size", [192, 256])
def test_a_network_of_one_size_takes_no_other(size):
    with pytest.raises(AssertionError, match="Wrong image"):
        on_paper("vit_b_16")(torch.zeros(2, 3, size, size, device="meta"))
    with pytest.raises(ValueError, match=f"size must be 224 for vit_b_16, got {size}"):
        _catalog.check_size("vit_b_16", size)


@pytest.mark.parametrize("name", _catalog.NETWORKS)
def test_the_layers_to_compare_are_there(name):
    modules = dict(on_paper(name).named_modules())
    assert _catalog.NETWORKS[name].layers
    assert set(_catalog.NETWORKS[name].layers) <= set(modules)


def test_images_are_standardised_before_the_network_sees_them():
    model = models.build("small", 10)
    seen = []
    model.network.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    model((mean + std).view(1, 3, 1, 1).expand(2, 3, 32, 32))
    torch.testing.assert_close(seen[0], torch.ones(2, 3, 32, 32))


def test_the_seed_decides_the_weights():
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(models.build("small", 10).network.head.weight)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_the_small_network_is_small():
    model = models.build("small", 10)
    assert sum(parameter.numel() for parameter in model.parameters()) < 100_000


def test_without_batch_norm_an_image_does_not_depend_on_its_neighbours():
    images = torch.rand(6, 3, 32, 32)
    for name, alike in (("small_groupnorm", True), ("small", False)):
        model = models.build(name, 10)
        assert torch.allclose(model(images)[:2], model(images[:2]), atol=1e-5) is alike


def test_the_small_network_with_silu_is_the_small_one_but_for_its_activation():
    small, smooth = models.build("small", 10), models.build("small_silu", 10)
    smooth.load_state_dict(small.state_dict())
    kinds = [[type(m) for m in network.modules()] for network in (small, smooth)]
    assert [nn.SiLU if kind is nn.ReLU else kind for kind in kinds[0]] == kinds[1]
    assert nn.ReLU not in kinds[1]


def test_small_network_has_second_derivatives_in_float64():
    model = models.SmallResNet(3, norm=lambda channels: nn.GroupNorm(2, channels), width=2).double()
    image = torch.rand(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: model(x).sum(1), image)


def test_networks_of_timm():
    pytest.importorskip("timm")
    model = models.build("timm:resnet10t", 5)
    assert model(torch.rand(2, 3, 64, 64)).shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("resnet81", "'resnet18'"), ("vgg16bn", "'vgg16_bn'"), ("timm:resnett18", "'timm:resnet18'")],
)
def test_unknown_networks_are_answered_with_the_nearest(name, hint):
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    with pytest.raises(ValueError, match=rf"model '{name}' is unknown \(did you mean {hint}\?\); known: "):
        models.build(name, 10)


@pytest.mark.parametrize("default", [torch.float32, *DTYPES], ids=str)
@pytest.mark.parametrize("images", [torch.float32, *DTYPES], ids=str)
@pytest.mark.parametrize("name", ["small", "small_groupnorm"])
def test_networks_of_any_default_dtype_take_images_of_any_dtype(name, images, default):
    """A data set's images are float32 whatever the default, which the network's parameters follow."""
    torch.manual_seed(0)
    expected = models.build(name, 5).eval()
    with default_dtype(default):
        torch.manual_seed(0)
        model = models.build(name, 5).eval()
        batch = torch.rand(3, 3, 16, 16, dtype=torch.float32)
        logits = model(batch.to(images))
    assert logits.dtype == next(model.parameters()).dtype == default
    if default == images == torch.float32:
        assert torch.equal(logits, expected(batch))
    assert_close(logits.float().detach(), model.float()(batch).detach(), 0.1)


def test_images_of_the_networks_dtype_are_not_converted():
    model = models.build("small", 5)
    graph = make_fx(model)(torch.rand(2, 3, 16, 16)).graph
    assert not [node for node in graph.nodes if "_to_copy" in str(node.target)]
    compiled = torch.compile(models.build("small", 5), fullgraph=True, backend="eager")
    assert compiled(torch.rand(2, 3, 16, 16)).shape == (2, 5)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A place for downloaded weights, and no network."""

    def unreachable(*args, **options):
        raise urllib.error.URLError(ConnectionRefusedError(111, "Connection refused"))

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    monkeypatch.setattr("torch.hub._hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


def test_weights_without_network(hub):
    with pytest.raises(
        ConnectionError, match=rf"of resnet18 could not be downloaded; fetch https://.* into {hub}$"
    ):
        models.pretrained("resnet18")


PLACES = {
    "below a file": lambda path, patch: patch.setenv("TORCH_HOME", str(path / "file")),
    "a device": lambda path, patch: patch.setenv("TORCH_HOME", "/dev/null"),
    "the home of nobody": lambda path, patch: patch.setenv("TORCH_HOME", "~nobody-of-this-name/torch"),
    "a home that is none": lambda path, patch: (
        patch.delenv("TORCH_HOME"),
        patch.setenv("HOME", "/dev/null"),
    ),
}


@pytest.mark.parametrize("change", PLACES.values(), ids=PLACES)
def test_a_place_for_weights_that_cannot_be_used(change, hub, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    change(tmp_path, monkeypatch)
    message = r"^the weights of resnet18 cannot be kept[^\n]*: set TORCH_HOME to a folder that can be written[^\n]*$"
    with pytest.raises(OSError, match=message):
        models.pretrained("resnet18")


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied"), OSError(28, "No space left on device")], ids=str
)
def test_weights_that_cannot_be_written(error, hub, monkeypatch):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr("torch.hub.download_url_to_file", fail)
    with pytest.raises(OSError, match=rf"cannot be kept or read \(.*{error.strerror}.*: set TORCH_HOME"):
        models.pretrained("resnet18")


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 and no more", b"<html>not found</html>"], ids=["empty", "cut", "a page"]
)
def test_damaged_weights_are_named(content, hub):
    hub.mkdir(parents=True)
    file = hub / "resnet18-f37072fd.pth"
    file.write_bytes(content)
    with pytest.raises(DamagedFileError, match=rf"^{file} is truncated or altered \([^\n]*\): remove it$"):
        models.pretrained("resnet18")


def test_weights_that_are_there_are_only_read(hub):
    import torchvision

    hub.mkdir(parents=True)
    network = torchvision.models.resnet18()
    torch.save(network.state_dict(), hub / "resnet18-f37072fd.pth")
    before = {path: path.stat().st_mtime_ns for path in hub.parent.rglob("*")}
    model = models.pretrained("resnet18")
    assert torch.equal(model.network.fc.weight, network.fc.weight)
    assert {path: path.stat().st_mtime_ns for path in hub.parent.rglob("*")} == before


@pytest.mark.parametrize("num_classes", [2.5, "10", None, True, float("nan")])
def test_classes_that_are_no_number(num_classes):
    with pytest.raises(TypeError, match=r"num_classes must be a whole number in \[2, 1e\+06\], got"):
        models.build("small", num_classes)


def test_too_few_classes():
    with pytest.raises(ValueError, match=r"num_classes must lie in \[2, 1e\+06\], got 1"):
        models.build("small", 1)


def test_a_name_that_is_none():
    with pytest.raises(TypeError, match="name of a network must be a string, got 5"):
        models.build(5, 3)


GOOD = {"network": "small", "classes": ["a", "b"], "size": 32, "mean": [0.5] * 3, "std": [0.2] * 3}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((field, None) for field in GOOD),
        ("network", 3),
        ("classes", "ab"),
        ("classes", ["a"]),
        ("classes", ["a", "a"]),
        ("size", "32"),
        ("size", True),
        ("mean", [0.5]),
        ("std", [0.2, 0.2, 0]),
    ],
)
def test_a_damaged_description_is_told_by_file_and_field(field, value, tmp_path):
    (tmp_path / "model.json").write_text(json.dumps(GOOD))
    assert models.read_description(tmp_path) == GOOD
    (tmp_path / "model.json").write_text(json.dumps(GOOD | {field: value}))
    with pytest.raises(ValueError, match=rf"model\.json is damaged: {field} must be "):
        salnb.load(tmp_path)
