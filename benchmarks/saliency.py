"""The six methods against Captum's: ResNet-18, a batch of 16 at 224×224, on whatever device there is."""

import warnings
from typing import Any

import torch
import torchvision

from benchmarks._ratio import medians, print_table
from salnb import saliency


def contenders(model: torch.nn.Module, images: torch.Tensor, target: torch.Tensor) -> dict[str, dict]:
    """For each method the same computation by Captum and by salnb."""
    from captum.attr import (
        Deconvolution,
        GuidedBackprop,
        GuidedGradCam,
        LayerAttribution,
        LayerGradCam,
        NoiseTunnel,
    )
    from captum.attr import Saliency as Gradient

    layer, size = model.get_submodule("layer4.1.conv2"), images.shape[-2:]

    def with_grad() -> torch.Tensor:
        return images.detach().clone().requires_grad_()

    captum = {
        "vanilla_gradient": lambda: Gradient(model).attribute(with_grad(), target),
        "deconvnet": lambda: Deconvolution(model).attribute(with_grad(), target),
        "guided_backprop": lambda: GuidedBackprop(model).attribute(with_grad(), target),
        "smoothgrad": lambda: NoiseTunnel(Gradient(model)).attribute(
            with_grad(), nt_type="smoothgrad", nt_samples=5, stdevs=0.15, target=target, abs=False
        ),
        "grad_cam": lambda: LayerAttribution.interpolate(
            LayerGradCam(model, layer).attribute(images, target, relu_attributions=True), size, "bilinear"
        ),
        "guided_grad_cam": lambda: GuidedGradCam(model, layer).attribute(
            images, target, interpolate_mode="bilinear"
        ),
    }
    options: dict[str, Any] = {
        "smoothgrad": {"n_samples": 5},
        "grad_cam": {"layer": layer},
        "guided_grad_cam": {"layer": layer},
    }
    return {
        name: {
            "Captum": captum[name],
            "salnb": lambda name=name: saliency.METHODS[name](model, images, target, **options.get(name, {})),
        }
        for name in saliency.METHODS
    }


def main() -> None:
    """Print seconds of each and Captum's over ours."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = torchvision.models.resnet18().to(device).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.ReLU):
            module.inplace = False  # Captum's hooks need it
    images = torch.rand(16, 3, 224, 224, device=device)
    target = torch.arange(16, device=device)

    rows = []
    for name, pair in contenders(model, images, target).items():
        seconds = medians(pair, seconds=12)
        ratio = seconds["Captum"] / seconds["salnb"]
        rows.append([name, f"{seconds['Captum']:.3f}", f"{seconds['salnb']:.3f}", f"{ratio:.2f}"])
    title = f"Saliency methods, ResNet-18, 16×3×224×224, {device}, {torch.get_num_threads()} threads"
    print_table(title, ["method", "Captum, s", "salnb, s", "Captum / salnb"], rows)


if __name__ == "__main__":
    main()
