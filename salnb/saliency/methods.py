"""Saliency methods: which pixels a network's decision depends on (Section 2 of the paper, eq. 1–4).

Functions with one signature. Each takes a model, a batch of images and the class that each image
is asked about, and returns one map per image:

* gradients with respect to the pixels: `vanilla_gradient`, `deconvnet`, `guided_backprop`, `smoothgrad`;
* the last feature maps weighted by their gradients: `grad_cam`, and its product with guided
  backpropagation, `guided_grad_cam`.

The model is left as it was found, after an error too: parameters, gradients (also where its forward pass
calls `backward()`), buffers, hooks, train or eval mode, and attributes of its own that are numbers or
tensors, or that it did not have; but not what it keeps in lists or dictionaries, nor what its forward pass
itself writes to parameters (as `nn.Embedding` does with `max_norm`), nor the state of the random numbers. The
images are not changed by networks that work in place on them.

Methods that change the backward pass of ReLU do so only while the map's own gradient is taken, so a loss on a
map (`create_graph=True`) has the right gradient with respect to the parameters; an operation that has no
second derivative is refused.

Several threads may ask for maps of one model, or of models with modules in common: they wait for one another.
A training step elsewhere does not wait. Sums are taken in float32 at least, and maps have the images' dtype.
In a function that `torch.compile` was given, the methods run as they are, uncompiled.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from salnb._common import catalog
from salnb._common.checks import (
    as_target,
    at_least_float32,
    check_generator,
    check_target,
)
from salnb._common.outputs import ModelCall
from salnb.double_backward.mode import as_written, differentiable_twice
from salnb.double_backward.refusals import (
    check_second_derivative,
    gradients_put_back,
    second_derivatives_kept,
)
from salnb.saliency.arguments import check_arguments
from salnb.saliency.isolation import DeadlockError, left_as_found
from salnb.saliency.layers import OtherLayerError, Reshape
from salnb.saliency.recording import (
    ForwardRecorder,
    class_scores,
    logits_of,
    reduce_channels,
)

__all__ = [
    "METHODS",
    "deconvnet",
    "grad_cam",
    "guided_backprop",
    "guided_grad_cam",
    "smoothgrad",
    "vanilla_gradient",
]


@torch.compiler.disable(recursive=True)
def vanilla_gradient(
    model: nn.Module,
    images: Tensor,
    target: Tensor | int | None = None,
    *,
    create_graph: bool = False,
    reduce: str | None = "max",
    score: str = "logit",
    output: Callable[[Any], Tensor] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """Gradient of the class score with respect to the pixels (eq. 1 and 2; Simonyan et al., 2014).

    Args:
        model: any network that maps images (N, C, H, W) to logits (N, K), or to an object whose `.logits`
            these are, as networks of transformers do.
        images: (N, C, H, W), floating point.
        target: whose score is explained. None: the predicted class of each image; an int: this class
            for all, as may be any integer, such as NumPy's; (N,) integers: one class per image; (N, K)
            floats: a weighted sum of scores.
        create_graph: keep the graph, so that a loss on the maps can be differentiated with respect to
            the model's parameters.
        reduce: "max" takes the highest absolute value over the channels (eq. 2); None keeps the signed
            gradient.
        score: "logit" explains the logit (eq. 1); "log_prob" the logarithm of the class's probability, whose
            map stays as it is when any function of the image is added to all logits, which changes no
            probability but the map of a logit at will (Srinivas & Fleuret, 2021).
        output: gives the logits from whatever else the model returns, such as `lambda out: out[0]`.
        model_kwargs: what the model is called with beside the images.

    Returns:
        Maps (N, 1, H, W) in units of score per unit of pixel value; (N, C, H, W) with `reduce=None`.

    Raises:
        TypeError: `images` are not a floating-point tensor, `target` is of a wrong type, or the model is
            spread over several devices by `nn.DataParallel`.
        ValueError: `images` are not four-dimensional or not finite, `target` is out of range or does
            not fit the batch, `reduce` or `score` is unknown, the model does not return (N, K) logits, or one
            only with "log_prob", no gradient flows from them to the images, or the model was made in
            inference mode.
        RuntimeError: an operation has no second derivative, or parameters are spread over processes by FSDP
            or as DTensors (both with `create_graph=True`), or this is inside a transform of `torch.func`.

    In train mode batch statistics tie the images of a batch together, and the map of one image is the
    gradient of the *sum* of all scores. In eval mode every map is that of its image alone.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    >>> vanilla_gradient(model, torch.rand(2, 3, 2, 2)).shape
    torch.Size([2, 1, 2, 2])
    """
    call = ModelCall(output, model_kwargs)
    return _explain("vanilla_gradient", model, images, target, call, create_graph, reduce, score)


@torch.compiler.disable(recursive=True)
def deconvnet(
    model: nn.Module,
    images: Tensor,
    target: Tensor | int | None = None,
    *,
    create_graph: bool = False,
    reduce: str | None = "max",
    score: str = "logit",
    output: Callable[[Any], Tensor] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """DeconvNet: each ReLU passes back what is positive in the *gradient* (eq. 4; Zeiler & Fergus, 2014).

    Arguments, result and errors are those of `vanilla_gradient`. A network in which no ReLU is met
    gives the plain gradient, with a warning. So does a ReLU that is not called from Python in this thread
    (in scripted code, in a thread or a C++ extension of the model), or is made of a tensor and its magnitude
    or a stack with zeros, such as `(x + x.abs()) / 2`, and the warning names it. One that is made of other
    operations, such as `x.index_fill` or a product of matrices, is not told from them and keeps the plain
    gradient.
    """
    call = ModelCall(output, model_kwargs)
    return _explain("deconvnet", model, images, target, call, create_graph, reduce, score)


@torch.compiler.disable(recursive=True)
def guided_backprop(
    model: nn.Module,
    images: Tensor,
    target: Tensor | int | None = None,
    *,
    create_graph: bool = False,
    reduce: str | None = "max",
    score: str = "logit",
    output: Callable[[Any], Tensor] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """Guided backprop: at each ReLU, input and gradient must be positive (eq. 4; Springenberg et al., 2015).

    Arguments, result and errors are those of `vanilla_gradient`. A network in which no ReLU is met
    gives the plain gradient, with a warning. So does a ReLU that is not called from Python in this thread
    (in scripted code, in a thread or a C++ extension of the model), or is made of a tensor and its magnitude
    or a stack with zeros, such as `(x + x.abs()) / 2`, and the warning names it. One that is made of other
    operations, such as `x.index_fill` or a product of matrices, is not told from them and keeps the plain
    gradient.
    """
    call = ModelCall(output, model_kwargs)
    return _explain("guided_backprop", model, images, target, call, create_graph, reduce, score)


@torch.compiler.disable(recursive=True)
def smoothgrad(
    model: nn.Module,
    images: Tensor,
    target: Tensor | int | None = None,
    *,
    n_samples: int = 25,
    noise_level: float = 0.15,
    generator: torch.Generator | None = None,
    create_graph: bool = False,
    reduce: str | None = "max",
    score: str = "logit",
    output: Callable[[Any], Tensor] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """SmoothGrad: the mean gradient over noisy copies of the image (Smilkov et al., 2017).

    The signed gradients are averaged, then reduced to one channel, as in the reference. The class is
    chosen once, on the clean images.

    Args:
        model: see `vanilla_gradient`.
        images: see `vanilla_gradient`.
        target: see `vanilla_gradient`.
        n_samples: number of noisy copies, at least 1. Time grows with it, and so does memory with
            `create_graph=True`.
        noise_level: standard deviation of the Gaussian noise as a fraction of each image's range of
            values (its maximum minus its minimum), at least 0.
        generator: source of the noise; None uses the global one.
        create_graph: see `vanilla_gradient`.
        reduce: see `vanilla_gradient`.
        score: see `vanilla_gradient`.
        output: see `vanilla_gradient`.
        model_kwargs: see `vanilla_gradient`.

    Returns:
        Maps as those of `vanilla_gradient`.

    Raises:
        TypeError, ValueError, RuntimeError: as `vanilla_gradient`, and for `n_samples` below 1 or a negative
            `noise_level`.
    """
    catalog.check_options("smoothgrad", {"n_samples": n_samples, "noise_level": noise_level})
    call = ModelCall(output, model_kwargs)
    check_arguments(model, images, call, reduce, score, create_graph=create_graph)
    check_generator(generator)
    with torch.inference_mode(False), torch.enable_grad():
        images, target = images.detach().clone(), as_target(target, len(images))
        if target is None:
            with left_as_found(model), torch.no_grad():
                target = logits_of(model, images, call).argmax(1)
        spread = at_least_float32(images).flatten(1)
        sigma = noise_level * (spread.amax(1) - spread.amin(1)).view(-1, 1, 1, 1)
        total = torch.zeros_like(images, dtype=spread.dtype)
        for _ in range(n_samples):
            noisy = images + (sigma * _gaussian_like(images, generator)).to(images.dtype)
            total = total + _map("vanilla_gradient", model, noisy, target, call, create_graph, None, score)
        return reduce_channels(total / n_samples, reduce).to(images.dtype)


@torch.compiler.disable(recursive=True)
def grad_cam(
    model: nn.Module,
    images: Tensor,
    target: Tensor | int | None = None,
    *,
    layer: nn.Module | str | None = None,
    reshape: Reshape = None,
    create_graph: bool = False,
    score: str = "logit",
    output: Callable[[Any], Tensor] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """Grad-CAM: feature maps weighted by their pooled gradients (Selvaraju et al., 2017).

    The weighted maps are summed, rectified and resized to the images.

    Args:
        model: see `vanilla_gradient`.
        images: see `vanilla_gradient`.
        target: see `vanilla_gradient`.
        layer: the layer whose output is used, as a module of `model` or by its dotted name. None is the
            `nn.Conv2d` that runs last, with a warning where all attention comes after it, or a convolution
            that is no such module. Of a layer that runs several times, the last output counts. Its output
            must have the images in their order: a model that shuffles the batch before the layer, as
            ShuffleBN does, gets maps of other images, which no shape tells.
        reshape: how a layer's output becomes (N, C, h, w). None: it is that; "tokens": from (N, 1 + hw, C),
            the grid having the images' ratio of height to width, and up to eight other tokens coming first;
            "channels_last": from (N, h, w, C); or a function, applied to the output's gradient as well.
        create_graph: see `vanilla_gradient`.
        score: see `vanilla_gradient`.
        output: see `vanilla_gradient`.
        model_kwargs: see `vanilla_gradient`.

    Returns:
        Maps (N, 1, H, W), not negative, resized bilinearly (pixel centres, `align_corners=False`).

    Raises:
        TypeError, ValueError, RuntimeError: as `vanilla_gradient`; also if `layer` is unknown or not used,
            its output is not (N, C, h, w), nor made so by `reshape`, cannot be told from (N, h, w, C), or is
            only one pixel large, or the model has no convolution to fall back on.
    """
    call = ModelCall(output, model_kwargs)
    return _explain("grad_cam", model, images, target, call, create_graph, "max", score, layer, reshape)


@torch.compiler.disable(recursive=True)
def guided_grad_cam(
    model: nn.Module,
    images: Tensor,
    target: Tensor | int | None = None,
    *,
    layer: nn.Module | str | None = None,
    reshape: Reshape = None,
    create_graph: bool = False,
    reduce: str | None = "max",
    score: str = "logit",
    output: Callable[[Any], Tensor] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """Guided Grad-CAM: the product of Grad-CAM and guided backpropagation (Selvaraju et al., 2017).

    Both factors come from one forward pass. Arguments, result and errors are those of
    `vanilla_gradient` and `grad_cam`.
    """
    call = ModelCall(output, model_kwargs)
    return _explain(
        "guided_grad_cam", model, images, target, call, create_graph, reduce, score, layer, reshape
    )


#: The methods by name: those of the catalogue, each a function of this module.
METHODS: dict[str, Callable[..., Tensor]] = {name: globals()[name] for name in catalog.METHODS}


def _explain(
    method: str,
    model: nn.Module,
    images: Tensor,
    target: Tensor | int | None,
    call: ModelCall,
    create_graph: bool,
    reduce: str | None,
    score: str,
    layer: nn.Module | str | None = None,
    reshape: Reshape = None,
) -> Tensor:
    """The map of a method that takes one forward pass."""
    check_arguments(model, images, call, reduce, score, create_graph=create_graph)
    spec = catalog.METHODS[method]
    frozen_stem = spec.layer and not spec.pixels and not create_graph
    with torch.inference_mode(False):
        target = as_target(target, len(images))
        while True:
            try:
                return _map(
                    *(method, model, images, target, call, create_graph, reduce, score, layer, reshape),
                    frozen_stem=frozen_stem,
                )
            except OtherLayerError as error:
                # with the whole graph the default may serve after all, and tells what ran behind it
                frozen_stem, layer = False, layer if frozen_stem else error.layer
            except Exception as error:
                # what takes gradients itself, or recomputes the layer, needs the whole graph
                if not frozen_stem or isinstance(error, DeadlockError):
                    raise
                frozen_stem = False


def _map(
    method: str,
    model: nn.Module,
    images: Tensor,
    target: Tensor | int | None,
    call: ModelCall,
    create_graph: bool,
    reduce: str | None,
    score: str,
    layer: nn.Module | str | None = None,
    reshape: Reshape = None,
    *,
    frozen_stem: bool = False,
) -> Tensor:
    """One forward pass of `model`, and the map of `method` from it."""
    with (
        left_as_found(model),
        torch.enable_grad(),
        differentiable_twice() if create_graph else as_written(),
        ForwardRecorder(model, method, layer, frozen_stem=frozen_stem, reshape=reshape) as recorder,
    ):
        pixels = images.clone() if images.is_inference() else images.detach()
        if not frozen_stem:
            pixels.requires_grad_()
        logits = logits_of(model, pixels, call)
        check_target(target, logits)
        scores = class_scores(logits, target, score)
        refusal = "create_graph=True", "leave create_graph out"
        parameters = model.parameters() if isinstance(model, nn.Module) else ()
        watched = (
            second_derivatives_kept(scores, *refusal, parameters)
            if create_graph
            else gradients_put_back(scores, parameters)
        )
        with watched:
            maps = recorder.maps(pixels, scores, create_graph=create_graph, reduce=reduce)
    if create_graph:
        check_second_derivative(maps, *refusal)
    return maps


def _gaussian_like(images: Tensor, generator: torch.Generator | None) -> Tensor:
    where = images.device if generator is None else generator.device
    return torch.randn(images.shape, generator=generator, device=where, dtype=images.dtype).to(images.device)
