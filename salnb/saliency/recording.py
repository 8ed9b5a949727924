"""One recorded forward pass, and the maps taken from it: the common ground of all saliency methods."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from salnb._common.catalog import METHODS, unknown
from salnb._common.checks import at_least_float32
from salnb.double_backward.recomputation import (
    again_in_recomputation,
    is_recomputing,
    model_of_the_forward_pass,
    reentrant_explained,
)
from salnb.saliency.relu_rules import ReLURule

__all__ = ["ForwardRecorder", "class_scores", "logits_of", "recorded_outputs", "reduce_channels"]


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """The model's logits, leaving its buffers (running statistics) untouched in train mode.

    Raises:
        ValueError: it does not return (N, K) logits.
    """
    with model_of_the_forward_pass(model):
        if isinstance(model, nn.Module) and any(module.training for module in model.modules()):
            copies = {name: buffer.clone() for name, buffer in model.named_buffers()}
            logits = torch.func.functional_call(model, copies, (images,))
        else:
            logits = model(images)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[0] != images.shape[0]:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"model must return logits of shape (N, K) with N = {images.shape[0]}, got {got}")
    return logits


def class_scores(logits: Tensor, target: Tensor | int | None) -> Tensor:
    """The score of each sample's target: one logit, or a weighted sum of them for mixed labels.

    Args:
        logits: (N, K).
        target: as in `vanilla_gradient`.

    Returns:
        (N,), in float32 at least.

    Values of `target` are not looked at, so that no device is waited for.
    """
    logits = at_least_float32(logits)
    if target is None:
        target = logits.detach().argmax(1)
    if isinstance(target, int):
        target = torch.full(logits.shape[:1], target, device=logits.device)
    if target.ndim == 2:
        return (logits * target).sum(1)
    return logits.gather(1, target.long().unsqueeze(1)).squeeze(1)


def reduce_channels(gradient: Tensor, reduce: str | None = "max") -> Tensor:
    """One channel from a signed gradient (N, C, H, W): "max" is eq. 2, None changes nothing."""
    if reduce is None:
        return gradient
    magnitude = gradient.abs()
    # max passes its gradient to one channel; amax, which is faster, would split it among ties
    if magnitude.requires_grad:
        return magnitude.max(1, keepdim=True).values  # eq. 2
    return magnitude.amax(1, keepdim=True)  # eq. 2


@contextmanager
def recorded_outputs(
    layers: Mapping[str, nn.Module], accept: Callable[[str, Any], Tensor]
) -> Iterator[dict[str, Tensor]]:
    """Collects the outputs of layers, by name, in the forward pass that runs inside.

    Args:
        layers: modules of the network, by name.
        accept: given name and output, returns what is recorded and passed on, or says what is wrong with it.
    """
    outputs: dict[str, Tensor] = {}

    def record(name: str, module: nn.Module, args: Any, output: Any) -> Tensor | None:
        if is_recomputing():
            return None
        outputs[name] = accept(name, output)
        # what follows may work in place (VGG's ReLU does): let it work on a copy
        return outputs[name].clone()

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(partial(record, name)).remove)
        stack.enter_context(again_in_recomputation(lambda: partial(_cloned_outputs, list(layers.values()))))
        yield outputs


@contextmanager
def _cloned_outputs(layers: list[nn.Module]) -> Iterator[None]:
    """What `recorded_outputs` does to a pass, without recording it."""
    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(lambda module, args, output: output.clone()).remove)
        yield


class ForwardRecorder:
    """Records one forward pass, then takes the maps of a method from it.

    A context manager: run the forward pass and call `maps` inside. `salnb.Objective` uses it to take
    saliency maps from the same pass that its other losses use.

    Args:
        model: the network that will be run.
        method: a key of `METHODS`, of those that do not repeat the pass.
        layer: for the methods with Grad-CAM, see `grad_cam`.
        frozen_stem: no gradient is needed for anything before the layer, so nothing is stored for it.
    """

    def __init__(
        self,
        model: nn.Module,
        method: str,
        layer: nn.Module | str | None = None,
        *,
        frozen_stem: bool = False,
    ):
        self.spec = METHODS[method]
        self.layers = {"layer": _find_layer(model, layer)} if self.spec.layer else {}
        self.frozen_stem = frozen_stem
        self.outputs: dict[str, Tensor] = {}
        self.relu_rule = ReLURule(self.spec.rule) if self.spec.rule else None
        self._stack, self._stem = ExitStack(), ExitStack()

    def __enter__(self) -> "ForwardRecorder":
        if self.frozen_stem:
            self._stack.enter_context(self._stem).enter_context(torch.no_grad())
        if self.relu_rule is not None:
            self._stack.enter_context(self.relu_rule)
        self.outputs = self._stack.enter_context(recorded_outputs(self.layers, self._accept))
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def _accept(self, name: str, output: Any) -> Tensor:
        if not isinstance(output, Tensor) or output.ndim != 4:
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"{name} must be one whose output has shape (N, C, h, w), got {got}")
        if not self.frozen_stem:
            return output
        self._stem.close()  # from here on a graph is needed
        return output.detach().requires_grad_()

    @reentrant_explained()
    def maps(
        self, images: Tensor, scores: Tensor, *, create_graph: bool = False, reduce: str | None = "max"
    ) -> Tensor:
        """The maps of `scores` (N,) with respect to `images`, both from the pass that was recorded."""
        score = scores.sum()
        maps: list[Tensor] = []
        if self.spec.layer:
            if not self.outputs:
                raise ValueError("layer is a module of the model that its forward pass never calls")
            activation, keep = self.outputs["layer"], create_graph or self.spec.pixels
            (slope,) = torch.autograd.grad(score, activation, retain_graph=keep, create_graph=create_graph)
            activation = activation if create_graph else activation.detach()
            maps.append(_class_activation(activation, slope, images.shape[-2:]))
        if self.spec.pixels:
            with self.relu_rule.active() if self.relu_rule else nullcontext():
                (gradient,) = torch.autograd.grad(score, images, create_graph=create_graph)  # eq. 1
            maps.append(reduce_channels(gradient, reduce))
        if self.relu_rule is not None and not self.relu_rule.relu_count:
            warnings.warn(
                "no ReLU was met in the forward pass: without one, the map is the plain gradient",
                stacklevel=4,
            )
        return maps[0] * maps[1] if len(maps) == 2 else maps[0]


def _class_activation(activation: Tensor, slope: Tensor, size: torch.Size) -> Tensor:
    if activation.shape[-2:] == (1, 1):
        raise ValueError("layer must have an output of more than one pixel, got 1×1: choose an earlier layer")
    weights = slope.mean((2, 3), keepdim=True)
    cam = (weights * activation).sum(1, keepdim=True).clamp(min=0)
    return F.interpolate(cam, size=size, mode="bilinear", align_corners=False)


def _find_layer(model: nn.Module, layer: nn.Module | str | None) -> nn.Module:
    modules = dict(model.named_modules())
    if isinstance(layer, str):
        if layer not in modules:
            raise unknown("layer", layer, [name for name in modules if name])
        return modules[layer]
    if isinstance(layer, nn.Module):
        if not any(module is layer for module in modules.values()):
            raise ValueError(
                f"layer must be a module of the model, got a {type(layer).__name__} that is not part of it"
            )
        return layer
    if layer is not None:
        raise TypeError(f"layer must be a module, a dotted name or None, got {type(layer).__name__}")
    convolutions = [module for module in modules.values() if isinstance(module, nn.Conv2d)]
    if not convolutions:
        raise ValueError("layer=None takes the model's last nn.Conv2d, but the model has none: name a layer")
    return convolutions[-1]
