"""One recorded forward pass, and the maps taken from it: the common ground of all saliency methods."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from salnb._common.catalog import METHODS
from salnb._common.checks import at_least_float32, check_several_classes, is_channels_last, is_traced
from salnb._common.outputs import AS_IT_IS, ModelCall, check_real, described
from salnb._common.warning import warn_caller
from salnb.double_backward.recomputation import (
    again_in_recomputation,
    is_recomputing,
    model_of_the_forward_pass,
    reentrant_explained,
)
from salnb.saliency.layers import (
    LastConvolution,
    OnLastDimension,
    Reshape,
    check_layout,
    check_tokens,
    convolution_behind,
    find_layer,
    rearranged,
    stem_before_attention,
)
from salnb.saliency.relu_rules import ReLURule
from salnb.saliency.relu_unreached import relus_unreached

__all__ = [
    "ForwardRecorder",
    "NoGradientError",
    "class_scores",
    "logits_of",
    "recorded_outputs",
    "reduce_channels",
    "scores_of_all",
]


class NoGradientError(ValueError):
    """No gradient flows where a map needs one."""


def logits_of(model: nn.Module, images: Tensor, call: ModelCall = AS_IT_IS) -> Tensor:
    """The model's logits of a copy of the images, which it may overwrite.

    Raises:
        ValueError: it does not return (N, K) logits.
    """
    with model_of_the_forward_pass(model):
        logits = call(model, images.clone())
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[0] != images.shape[0]:
        wanted = f"logits of shape (N, K) with N = {images.shape[0]}"
        raise ValueError(f"model must return {wanted}, got {described(logits)}")
    check_real(logits)
    return logits


def class_scores(logits: Tensor, target: Tensor | int | None, score: str = "logit") -> Tensor:
    """The score of each sample's target: one logit, or a weighted sum of them for mixed labels.

    Args:
        logits: (N, K).
        target: as in `vanilla_gradient`.
        score: "logit", or "log_prob" for the logarithm of the softmax, as in `vanilla_gradient`.

    Returns:
        (N,), in float32 at least.

    Raises:
        ValueError: "log_prob" of one logit, which is zero whatever the image.

    Values of `target` are not looked at, so that no device is waited for.
    """
    scores = scores_of_all(logits, score)
    if target is None:
        target = scores.detach().argmax(1)
    if isinstance(target, int):
        target = torch.full(scores.shape[:1], target, device=scores.device)
    if target.ndim == 2:
        return (scores * target).sum(1)
    return scores.gather(1, target.long().unsqueeze(1)).squeeze(1)


def scores_of_all(logits: Tensor, score: str) -> Tensor:
    """The scores of all classes (N, K), in float32 at least; see `class_scores`."""
    logits = at_least_float32(logits)
    if score != "log_prob":
        return logits
    check_several_classes(logits, name="score='log_prob' needs")
    return logits.log_softmax(1)


def reduce_channels(gradient: Tensor, reduce: str | None = "max") -> Tensor:
    """One channel from a signed gradient (N, C, H, W): "max" is eq. 2, None changes nothing."""
    if reduce is None:
        return gradient
    magnitude = gradient.abs()
    # max passes its gradient to one channel; amax, which is faster, would split it among ties
    if magnitude.requires_grad:
        if is_channels_last(magnitude):  # whose gradient is to lie in memory as it does
            return magnitude.permute(0, 2, 3, 1).max(-1).values.unsqueeze(1)
        return magnitude.max(1, keepdim=True).values  # eq. 2
    return magnitude.amax(1, keepdim=True)  # eq. 2


@contextmanager
def recorded_outputs(
    layers: Mapping[str, nn.Module], accept: Callable[[str, Any], Tensor]
) -> Iterator[dict[str, Tensor]]:
    """Collects the outputs of layers, by name, in the forward pass that runs inside.

    Args:
        layers: modules of the network, by name. Of a layer that runs several times, the last output counts.
        accept: given name and output, returns what is recorded and passed on, or says what is wrong with it.

    Passes in other threads, and those that recompute activations for a gradient, are not recorded.
    """
    outputs: dict[str, Tensor] = {}
    here = _place()

    def record(name: str, module: nn.Module, args: Any, output: Any) -> Tensor | None:
        if is_recomputing():
            return None
        place = _place()
        if place[0] != here[0]:
            return None
        accepted = accept(name, output)
        if place == here:
            outputs[name] = accepted
        # what follows may work in place (VGG's ReLU does): let it work on a copy
        return accepted.clone()

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


def _place() -> tuple[int, int]:
    """The thread, and the gradient that is being taken in it (-1: none)."""
    return threading.get_ident(), torch._C._current_graph_task_id()


class ForwardRecorder:
    """Records one forward pass, then takes the maps of a method from it.

    A context manager: run the forward pass and call `maps` inside. `salnb.Objective` uses it to take
    saliency maps from the same pass that its other losses use.

    Args:
        model: the network that will be run.
        method: a key of `METHODS`, of those that do not repeat the pass.
        layer: for the methods with Grad-CAM, see `grad_cam`.
        frozen_stem: no gradient is needed for anything before the layer, so nothing is stored for it.
        reshape: for the methods with Grad-CAM, see `grad_cam`.
    """

    def __init__(
        self,
        model: nn.Module,
        method: str,
        layer: nn.Module | str | None = None,
        *,
        frozen_stem: bool = False,
        reshape: Reshape = None,
    ):
        self.model, self.spec, self.reshape = model, METHODS[method], reshape
        self.layer = find_layer(model, layer, reshape) if self.spec.layer else None
        if self.spec.layer and layer is None and (better := stem_before_attention(model)):
            warn_caller(better)
        self.last_convolution = LastConvolution(model) if self.spec.layer and layer is None else None
        self.on_last = (
            OnLastDimension(model) if self.spec.layer and layer is not None and reshape is None else None
        )
        self.frozen_stem = frozen_stem
        self.outputs: dict[str, Tensor] = {}
        self.relu_rule = ReLURule(self.spec.rule) if self.spec.rule else None
        self._stack, self._stem = ExitStack(), ExitStack()

    def __enter__(self) -> "ForwardRecorder":
        if self.frozen_stem:
            self._stack.enter_context(self._stem).enter_context(torch.no_grad())
        if self.relu_rule is not None:
            self._stack.enter_context(self.relu_rule)
        if self.last_convolution is not None:
            self._stack.enter_context(self.last_convolution)
        if self.on_last is not None:
            self._stack.enter_context(self.on_last)
        layers = {} if self.layer is None else {"layer": self.layer}
        self.outputs = self._stack.enter_context(recorded_outputs(layers, self._accept))
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def _accept(self, name: str, output: Any) -> Tensor:
        tensor = isinstance(output, Tensor)
        if not tensor or not output.is_floating_point() or (output.ndim != 4 and self.reshape is None):
            got = f"{tuple(output.shape)} of {output.dtype}" if tensor else type(output).__name__
            way = ": for tokens (N, 1 + hw, C), pass reshape='tokens'" if tensor and output.ndim == 3 else ""
            raise ValueError(f"{name} must be one whose output has shape (N, C, h, w), got {got}{way}")
        # a gradient that the model takes itself is to find its way through the layer
        if output.requires_grad or not (self.frozen_stem or torch.is_grad_enabled()):
            return output
        self._stem.close()  # from here on a graph is needed
        return output.detach().requires_grad_()

    @reentrant_explained()
    def maps(
        self, images: Tensor, scores: Tensor, *, create_graph: bool, reduce: str | None = "max"
    ) -> Tensor:
        """The maps of `scores` (N,) with respect to `images`, both from the pass that was recorded."""
        score = scores.sum()
        # while the graph is there, and before Grad-CAM's own rectifier
        unreached = relus_unreached(score, self.relu_rule.unreached) if self.relu_rule else []
        no_relu = self.relu_rule is not None and not self.relu_rule.relu_count
        maps: list[Tensor] = []
        if self.layer is not None:
            activation, keep = self._activation(images, score), create_graph or self.spec.pixels
            slope = _gradient(score, activation, "layer", retain_graph=keep, create_graph=create_graph)
            activation = activation if create_graph else activation.detach()
            if self.reshape is not None:
                activation, slope = (rearranged(x, self.reshape, images) for x in (activation, slope))
                if not (create_graph or is_traced(slope) or slope.any()):
                    warn_caller("the scores depend on no feature that reshape keeps: name an earlier layer")
            maps.append(_class_activation(activation, slope, images.shape[-2:]).to(images.dtype))
        if self.spec.pixels:
            with self.relu_rule.active() if self.relu_rule else nullcontext():
                gradient = _gradient(score, images, "images", create_graph=create_graph)  # eq. 1
            maps.append(reduce_channels(gradient, reduce))
        if unreached:
            warn_caller(
                "ReLUs that no rule reaches, as they run in another thread, where PyTorch is not called from "
                "Python, or are made of other operations: "
                f"{', '.join(unreached)}; there the map has the plain gradient"
            )
        elif no_relu:
            warn_caller("no ReLU was met in the forward pass: without one, the map is the plain gradient")
        return maps[0] * maps[1] if len(maps) == 2 else maps[0]

    def _activation(self, images: Tensor, score: Tensor) -> Tensor:
        """The output of the layer that was asked for, or of the last convolution that ran."""
        layer, activation = self.layer, self.outputs.get("layer")
        if self.last_convolution is not None and self.last_convolution.module is not layer:
            layer, activation = self.last_convolution.untouched(as_default=not self.frozen_stem)
        if layer is None or activation is None:
            raise ValueError(
                "layer is a module of the model that its forward pass never calls, or calls in another thread"
            )
        by_default = self.last_convolution is not None and not is_traced(score)
        if by_default and (behind := convolution_behind(self.model, score, activation)):
            warn_caller(f"layer=None takes the last nn.Conv2d, but {behind} runs after it: name a layer")
        if self.reshape is None:
            check_layout(self.model, layer, activation, images, self.on_last)
        elif self.reshape == "tokens":
            check_tokens(self.model, layer, activation, images)
        return activation


def _gradient(
    score: Tensor, source: Tensor, name: str, *, create_graph: bool, retain_graph: bool | None = None
) -> Tensor:
    """The gradient of a score with respect to `source`."""
    gradient = None
    if score.requires_grad and source.requires_grad:
        # a gradient that needs none itself would pass by a `once_differentiable` without a word
        seed = torch.ones_like(score).requires_grad_(create_graph)
        (gradient,) = torch.autograd.grad(
            score, source, seed, retain_graph=retain_graph, create_graph=create_graph, allow_unused=True
        )
    if gradient is None:
        raise NoGradientError(
            f"no gradient flows from the model's scores to its {name}: between them or there it works under "
            "torch.no_grad() or inference_mode(), detaches a tensor, makes integers or an argmax of it, or "
            f"does not use the {name} at all"
        )
    return gradient


def _class_activation(activation: Tensor, slope: Tensor, size: torch.Size) -> Tensor:
    activation, slope = at_least_float32(activation), at_least_float32(slope)
    weights = slope.mean((2, 3), keepdim=True)
    cam = (weights * activation).sum(1, keepdim=True).clamp(min=0)
    return F.interpolate(cam, size=size, mode="bilinear", align_corners=False)
