"""The terms of the objective for one batch, from one forward pass of originals and augmented images.

* class loss (eq. 5): cross-entropy of both halves
* invariance loss (eq. 6): distance between the activations of the halves
* saliency loss (eq. 7): distance between the saliency maps of the halves, brought into one frame
* total (eq. 8): alpha · class loss + beta · invariance loss + gamma · saliency loss
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from salnb import saliency
from salnb._common.catalog import METHODS, MethodSpec
from salnb._common.checks import at_least_float32, at_least_float32_dtype, check_several_classes, is_traced
from salnb._common.outputs import ModelCall, check_real, described
from salnb._common.warning import warn_caller
from salnb.augment import Augmentation
from salnb.double_backward.mode import differentiable_twice
from salnb.double_backward.recomputation import model_of_the_forward_pass
from salnb.double_backward.refusals import (
    check_second_derivative,
    gradients_put_back,
    second_derivatives_kept,
)
from salnb.losses import invariance_loss, outside_loss, saliency_loss, with_other_images
from salnb.objective.balance import Balance
from salnb.objective.class_terms import ClassTerm
from salnb.objective.precision import LossScale, autocast_dtype, full_precision
from salnb.objective.unlabelled import class_and_consistency, own_classes
from salnb.saliency.layers import is_sequence_first
from salnb.saliency.recording import ForwardRecorder, class_scores, recorded_outputs, scores_of_all

__all__ = ["Losses", "StepInputs", "StepModules", "TermSettings", "step_losses", "weighted_sum"]


@dataclass
class Losses:
    """What one call of the objective found.

    Attributes:
        total: eq. 8, to call `backward()` on.
        class_loss: eq. 5, unweighted.
        invariance_loss: eq. 6, unweighted; zero where beta is zero.
        saliency_loss: eq. 7, unweighted; zero in steps without it.
        logits: (2N, K), of the originals and then of the augmented images, detached.
        has_saliency: whether this step had the saliency term.
        gamma: the weight that the saliency term had in this step, which `balance` may have chosen; zero in
            steps without it.
        consistency_loss: of the predictions on unlabelled images, unweighted; zero without `confidence`.

    After `Objective.compile()` only `total` carries a graph.
    """

    total: Tensor
    class_loss: Tensor
    invariance_loss: Tensor
    saliency_loss: Tensor
    logits: Tensor
    has_saliency: bool = False
    gamma: float | Tensor = 0.0
    consistency_loss: float | Tensor = 0.0
    attached_logits: Tensor | None = field(default=None, repr=False)

    @property
    def logits_with_graph(self) -> Tensor:
        """The logits (2N, K) with their graph, for distillation and other terms of one's own beside `total`.

        Raises:
            RuntimeError: a compiled step made them.
        """
        if self.attached_logits is None:
            raise RuntimeError("logits_with_graph: a compiled step hands out none, leave compile() out")
        return self.attached_logits

    def detach(self) -> "Losses":
        """The same values without a graph."""
        tensors = {name: value.detach() for name, value in vars(self).items() if isinstance(value, Tensor)}
        return Losses(**vars(self) | tensors)


class StepModules(NamedTuple):
    """The modules that a step runs through."""

    model: nn.Module
    augmentation: Augmentation
    score_scale: LossScale  # for float16: of the score whose gradient makes the maps
    gradient_scale: LossScale  # for float16: of the total in a compiled step, and of what balance measures
    balance: Balance
    class_term: ClassTerm


class StepInputs(NamedTuple):
    """A batch and what the augmentation made of it."""

    images: Tensor  # (N, C, H, W)
    new_images: Tensor  # (N, C, H, W), augmented
    target: Tensor  # (N,) labels or (N, K) weights, of the originals
    params: Any  # what the augmentation drew
    model_kwargs: dict[str, Tensor]  # what the model gets beside the 2N images
    masks: tuple[Tensor, ...] = ()  # (N, 1, H, W), where the objects are, if maps are to be there


@dataclass(frozen=True)
class TermSettings:
    """Which terms a step has, and how they are computed: all but their weights.

    Attributes:
        has_invariance: whether beta is above zero.
        has_saliency: whether gamma is above zero in this step.
        balanced: whether the weight is the product of gamma and what `Balance` has chosen.
        measured: whether `Balance` looks at this step.
        processes: name and number of those that share this step; None: this one alone.

    The others are arguments of `salnb.Objective`, its mappings as pairs.
    """

    has_invariance: bool
    has_saliency: bool
    balanced: bool
    measured: bool
    processes: tuple[str, int] | None
    layers: tuple[tuple[str, float], ...]
    layer_distance: str
    layer_relative: bool
    method: str
    method_options: tuple[tuple[str, Any], ...]
    score: str
    normalize: str | None
    distance: str
    pool: int
    detach_original: bool
    shuffle_pairs: bool
    confidence: float
    consistency: float
    originals_only: bool
    num_classes: int | None
    output: Callable[[Any], Tensor] | None = None
    model_kwargs: tuple[tuple[str, Any], ...] = ()  # those that are no tensors

    @property
    def spec(self) -> MethodSpec:
        """What the saliency method is."""
        return METHODS[self.method]

    def recorder(self, model: nn.Module) -> ForwardRecorder | None:
        """What takes the maps from the one forward pass; None where the method runs passes of its own."""
        options = dict(self.method_options)
        return None if self.spec.repeats else ForwardRecorder(model, self.method, **options)

    def call(self, tensors: dict[str, Tensor]) -> ModelCall:
        """How the model is called, with tensors beside the images."""
        return ModelCall(self.output, dict(self.model_kwargs) | tensors)


def step_losses(
    modules: StepModules,
    inputs: StepInputs,
    weights: tuple[float | Tensor, float | Tensor, float | Tensor],
    settings: TermSettings,
    *,
    check_derivative: bool = True,
) -> Losses:
    """The losses of a batch, from one forward pass.

    Args:
        modules: what the step runs through.
        inputs: the batch.
        weights: alpha, beta and, of this step, gamma.
        settings: which terms there are, and how they are computed.
        check_derivative: raise if an operation of the model has no second derivative.
    """
    images, new_images, target, params, model_kwargs, _ = inputs
    model, augmentation, class_term = modules.model, modules.augmentation, modules.class_term
    call = settings.call(model_kwargs)
    n, keep_graph = len(images), torch.is_grad_enabled()
    pixels = torch.cat([images, new_images])
    with ExitStack() as stack:
        recorder = None
        if settings.has_saliency:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(differentiable_twice())
            if recorder := settings.recorder(model):
                stack.enter_context(recorder)
                pixels.requires_grad_()
        features = stack.enter_context(_features(model, settings, 2 * n)) if settings.has_invariance else {}
        # a model may work in place on its input, which a leaf of the graph does not allow
        with model_of_the_forward_pass(model):
            logits = call(model, pixels.clone() if settings.has_saliency else pixels)
        k = _num_classes(logits, 2 * n, settings.num_classes)
        own = own_classes(logits[:n], target, settings.confidence) if settings.confidence else None
        target = own.target if own else target
        targets = class_term.targets(target, augmentation.targets(target, params, k), logits)
        if settings.has_saliency:
            explained, known = class_term.explained(targets, k)
            known = own.known if own else known
            if inputs.masks:  # as in the paper that this is from, of all classes at once
                explained = torch.ones_like(logits)
            with _watched(logits, model, keep_graph, check_derivative):
                maps = _maps(
                    modules, recorder, pixels, logits, explained, settings, call, create_graph=keep_graph
                )
            if keep_graph and check_derivative:
                check_second_derivative(maps)
    with full_precision(images):
        seen = n if settings.originals_only else 2 * n
        zero = logits.new_zeros((), dtype=at_least_float32_dtype(logits.dtype))
        classes, consistent = (
            class_and_consistency(logits, own) if own else (class_term(logits[:seen], targets[:seen]), zero)
        )
        invariance = _invariance(features, n, settings) if settings.has_invariance else zero
        salience = _saliency(augmentation, maps, inputs, known, settings) if settings.has_saliency else zero
        losses = weighted_sum(modules, (classes, consistent, invariance, salience), weights, logits, settings)
    return losses if keep_graph else losses.detach()


def weighted_sum(
    modules: StepModules,
    terms: tuple[Tensor, Tensor, Tensor, Tensor],
    weights: tuple[float | Tensor, float | Tensor, float | Tensor],
    logits: Tensor,
    settings: TermSettings,
) -> Losses:
    """The terms of a step and their weighted sum.

    Args:
        modules: what the step runs through.
        terms: class, consistency, invariance and saliency loss, scalars.
        weights: alpha, beta and, of this step, gamma, which `balance` is a factor of.
        logits: (2N, K), with their graph.
        settings: which terms there are.
    """
    classes, consistent, invariance, salience = terms
    alpha, beta, gamma = weights
    predicted = alpha * classes + settings.consistency * consistent
    if settings.balanced:
        gamma = gamma * _balanced(modules, predicted, salience, settings)
    total = predicted + beta * invariance + gamma * salience  # eq. 8
    found = (total, classes, invariance, salience, logits.detach(), settings.has_saliency, gamma, consistent)
    return Losses(*found, attached_logits=logits)


def _balanced(modules: StepModules, classes: Tensor, salience: Tensor, settings: TermSettings) -> Tensor:
    """The balance's weight after this step, where float16 would round to zero measured enlarged."""
    if not settings.measured:
        return modules.balance.weight
    trained = [p for p in modules.model.parameters() if p.requires_grad]
    scale = modules.gradient_scale
    half = torch.float16 in (autocast_dtype(classes), *(p.dtype for p in trained))
    factor = scale.value if half else 1.0
    finite = modules.balance.measure(classes, salience, trained, settings.processes, factor)
    if half:
        scale.update(finite)
    return modules.balance.weight


def _maps(
    modules: StepModules,
    recorder: ForwardRecorder | None,
    pixels: Tensor,
    logits: Tensor,
    targets: Tensor,
    settings: TermSettings,
    call: ModelCall,
    *,
    create_graph: bool,
) -> Tensor:
    """The saliency maps of all 2N images, each for its own target."""
    half = torch.float16 in (autocast_dtype(pixels), logits.dtype)
    scale = modules.score_scale.value if half else 1.0
    if recorder is None:
        method, options = saliency.METHODS[settings.method], dict(settings.method_options)
        options |= {"create_graph": create_graph, "model_kwargs": call.kwargs}
        output = partial(_scaled_scores, scale, settings.score, call)
        maps = method(modules.model, pixels.detach(), targets, output=output, **options)
    else:
        with full_precision(pixels):
            scores = scale * class_scores(logits, targets, settings.score)
            maps = recorder.maps(pixels, scores, create_graph=create_graph)
    maps = at_least_float32(maps)
    if half:
        modules.score_scale.update(maps.isfinite().all())
        # each gradient among the factors of a map carries the scale once
        maps = maps / scale ** (settings.spec.pixels + settings.spec.layer)
    return maps


def _scaled_scores(scale: Tensor | float, score: str, call: ModelCall, returned: Any) -> Tensor:
    """The scores of all classes (N, K), times `scale`, from what the network returns."""
    return scale * scores_of_all(call.logits(returned), score)


def _watched(logits: Tensor, model: nn.Module, keep_graph: bool, check: bool) -> AbstractContextManager[None]:
    """Context for the gradients that make the maps, as far as custom Functions need watching."""
    if not keep_graph:
        return gradients_put_back(logits, model.parameters())
    return second_derivatives_kept(logits, parameters=model.parameters()) if check else nullcontext()


def _features(
    model: nn.Module, settings: TermSettings, samples: int
) -> AbstractContextManager[dict[str, Tensor]]:
    """Collects the outputs of the layers that eq. 6 compares, in the forward pass that runs inside."""
    layers = {name: model.get_submodule(name) for name, _ in settings.layers}

    def accept(name: str, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise TypeError(f"layers: {name!r} must return a tensor, got {type(output).__name__}")
        sequence_first = is_sequence_first(model, layers[name], output, samples)
        if not output.is_floating_point() or output.shape[:1] != (samples,) or sequence_first:
            raise ValueError(
                f"layers: {name!r} must return floating-point features whose first dimension is the batch of "
                f"originals and augmented images, ({samples}, ...), got {tuple(output.shape)} of "
                f"{output.dtype}: name a layer behind which the batch comes first (batch_first=True)"
            )
        return output

    return recorded_outputs(layers, accept)


def _invariance(features: dict[str, Tensor], n: int, settings: TermSettings) -> Tensor:
    weights = dict(settings.layers)
    for name in weights:
        if name not in features:
            raise ValueError(f"layers: the forward pass of the model never calls its module {name!r}")
        if torch.is_grad_enabled() and not (features[name].requires_grad or is_traced(features[name])):
            warn_caller(
                f"layers: {name!r} gives features without a gradient, as it works under torch.no_grad() or "
                "all parameters up to it are frozen: the invariance loss cannot train them"
            )
    halves = ({name: out[half] for name, out in features.items()} for half in (slice(n), slice(n, None)))
    return invariance_loss(
        *halves, distance=settings.layer_distance, weights=weights, relative=settings.layer_relative
    )


def _saliency(
    augmentation: Augmentation, maps: Tensor, inputs: StepInputs, known: Tensor | None, settings: TermSettings
) -> Tensor:
    """The loss of eq. 7 of the 2N maps, of the pairs (N,) whose class is known; None: all."""
    n = len(maps) // 2
    if inputs.masks:
        return outside_loss(maps[:n], inputs.masks[0], known)
    first = maps[:n].detach() if settings.detach_original else maps[:n]
    first, second, valid = augmentation.align(first, maps[n:], inputs.params)
    if known is not None:  # a pair without a class has no valid pixel, and so no part in the mean
        valid = valid & known.view(-1, 1, 1, 1)
    if settings.shuffle_pairs:
        first, second, valid = with_other_images(first, second, valid)
    return saliency_loss(
        first,
        second,
        valid,
        normalize=settings.normalize,
        distance=settings.distance,
        pool=settings.pool,
    )


def _num_classes(logits: Any, samples: int, num_classes: int | None) -> int:
    """K, which the logits (2N, K) have."""
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else ()
    if len(shape) != 2 or shape[0] != samples or num_classes not in (None, shape[1]):
        raise ValueError(
            f"model must return logits (2N, K) = ({samples}, {num_classes or 'K'}), got {described(logits)}"
        )
    check_real(logits)
    check_several_classes(logits, name="model must return")
    return shape[1]
