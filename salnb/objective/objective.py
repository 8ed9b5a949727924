"""The whole objective (eq. 8): a module that owns the model and turns a batch into losses.

One batch holds the originals and their augmented copies, and one forward pass serves all three terms:

    class_loss       eq. 5   cross-entropy of both halves
    invariance_loss  eq. 6   distance between the activations of the halves
    saliency_loss    eq. 7   distance between the saliency maps of the halves, brought into one frame
    total            eq. 8   alpha · class_loss + beta · invariance_loss + gamma · saliency_loss
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from salnb import saliency
from salnb._common.catalog import METHODS, MethodSpec
from salnb._common.checks import check_images, check_second_derivative, unknown
from salnb.augment import Augmentation
from salnb.augment.mixing import both_targets
from salnb.double_backward import fast_double_backward
from salnb.losses import (
    DISTANCES,
    FEATURE_DISTANCES,
    NORMALIZATIONS,
    class_loss,
    invariance_loss,
    saliency_loss,
)
from salnb.objective.compiled import CompiledStep
from salnb.objective.precision import LossScale, autocast_dtype, full_precision
from salnb.saliency.methods import as_written
from salnb.saliency.recording import Watch, class_scores


@dataclass
class Losses:
    """What one call of the objective found.

    Attributes:
        total: eq. 8, to call `backward()` on.
        class_loss: eq. 5, unweighted.
        invariance_loss: eq. 6, unweighted; zero where beta is zero.
        saliency_loss: eq. 7, unweighted; zero in steps without it.
        logits: (2N, K), of the originals and then of the augmented images, detached.

    After `Objective.compile()` only `total` carries a graph.
    """

    total: Tensor
    class_loss: Tensor
    invariance_loss: Tensor
    saliency_loss: Tensor
    logits: Tensor

    def detach(self) -> "Losses":
        """The same values without a graph."""
        return Losses(*(getattr(self, field.name).detach() for field in fields(self)))


class Objective(nn.Module):
    """Class, invariance and saliency loss of a model under an augmentation (eq. 5 to 8).

    Args:
        model: maps images (N, C, H, W) to logits (N, K). It is used as it is and not changed.
        augmentation: one of `salnb.augment`.
        alpha: weight of the class loss.
        beta: weight of the invariance loss; 0 takes no activations.
        gamma: weight of the saliency loss; 0 takes no maps, and no second backward pass.
        layers: names of the modules whose outputs eq. 6 compares, as a sequence, or as a mapping to weights.
        layer_distance: "l2" (mean of squares) or "l1", for eq. 6.
        method: a key of `salnb.saliency.METHODS`.
        method_options: keyword arguments of the method: `layer` for the methods with Grad-CAM, `n_samples`
            and `noise_level` for SmoothGrad.
        normalize: how each map is normalised on its own: a member of `salnb.losses.NORMALIZATIONS` or None.
        distance: how maps are compared: a member of `salnb.losses.DISTANCES`.
        pool: side of the blocks of pixels whose means are compared; 1 compares pixels.
        every: the saliency term enters every k-th training step, k times as strong.
        warmup: training steps before the saliency term first enters.
        detach_original: hold the originals' maps fixed, so that only the augmented images' maps move.
        num_classes: K; None reads it from the logits.

    Raises:
        TypeError, ValueError: an argument is not allowed; the message names it.

    Called with `images` (N, C, H, W), `target` ((N,) integer labels or (N, K) weights) and optionally a
    `generator` for the augmentation, it returns `Losses`.

    Batch norm sees originals and augmented images as one batch; in train mode its running statistics are
    updated once per call, as by any forward pass, and the maps are gradients of the batch's summed score
    *through* the batch statistics. Call `eval()` on the model inside to take the maps of single images.

    A training step is a call in train mode; with gradient accumulation `every` and `warmup` count these
    calls. In eval mode the saliency term is always there. Under `torch.no_grad()` or
    `torch.inference_mode()` the terms are computed without a graph, for validation.

    Wrap the objective, not the model: `DistributedDataParallel(objective)`. Autocast applies to the network;
    augmentation, maps and losses are computed in float32 at least. With float16 use a `GradScaler` as ever.
    `compile()` makes a step faster on GPUs; `torch.compile(objective)` runs it as it is.

    A gradient that would be wrong is refused with a `RuntimeError` instead: `nn.SyncBatchNorm` in train mode,
    an operation without a second derivative, and `DistributedDataParallel(static_graph=True)`.

    >>> from salnb import Objective
    >>> from salnb.augment import HorizontalFlip
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 14 * 14, 5))
    >>> objective = Objective(model, HorizontalFlip(), gamma=0.1)
    >>> losses = objective(torch.rand(8, 3, 16, 16), torch.arange(8) % 5)
    >>> losses.total.backward()
    """

    def __init__(
        self,
        model: nn.Module,
        augmentation: Augmentation,
        *,
        alpha: float = 1.0,
        beta: float = 0.0,
        gamma: float = 1.0,
        layers: Sequence[str] | Mapping[str, float] = (),
        layer_distance: str = "l2",
        method: str = "vanilla_gradient",
        method_options: Mapping[str, Any] | None = None,
        normalize: str | None = "max",
        distance: str = "mse",
        pool: int = 1,
        every: int = 1,
        warmup: int = 0,
        detach_original: bool = False,
        num_classes: int | None = None,
    ):
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        for name, weight in (("alpha", alpha), ("beta", beta), ("gamma", gamma)):
            if not 0 <= weight < float("inf"):
                raise ValueError(f"{name} must be a finite number of at least 0, got {weight}")
        for name, value, known in (
            ("method", method, METHODS),
            ("normalize", "none" if normalize is None else normalize, sorted(NORMALIZATIONS)),
            ("distance", distance, sorted(DISTANCES)),
            ("layer_distance", layer_distance, sorted(FEATURE_DISTANCES)),
        ):
            if value not in known:
                raise unknown(name, value, known)
        for name, count, least in (("pool", pool, 1), ("every", every, 1), ("warmup", warmup, 0)):
            if count < least:
                raise ValueError(f"{name} must be at least {least}, got {count}")
        if not isinstance(augmentation, Augmentation):
            raise TypeError(f"augmentation must be one of salnb.augment, got {type(augmentation).__name__}")
        self.model = model
        self.augmentation = augmentation
        self.alpha, self.beta, self.gamma = alpha, beta, gamma
        self.layers = dict(layers) if isinstance(layers, Mapping) else dict.fromkeys(layers, 1.0)
        self.layer_distance = layer_distance
        self.method, self.method_options = method, dict(method_options or {})
        self.normalize, self.distance, self.pool = normalize, distance, pool
        self.every, self.warmup = every, warmup
        self.detach_original = detach_original
        self.num_classes = num_classes
        self.steps_done = 0
        # for float16: of the score whose gradient makes the maps, and of the total in a compiled step
        self.score_scale, self.gradient_scale = LossScale(12, top=12), LossScale(14, top=24)
        self._compiled: CompiledStep | None = None
        self._second_derivative_checked = False
        self._check_model()

    # the number of steps decides when the saliency term enters: a resumed training needs it
    def get_extra_state(self) -> dict[str, int]:
        """The number of training steps done, for `state_dict`."""
        return {"steps_done": self.steps_done}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Continue from the number of steps in `state_dict`."""
        self.steps_done = state["steps_done"]

    def compile(self, **options: Any) -> None:
        """Run each later step that takes gradients as one compiled graph; see `salnb.objective.compiled`.

        Args:
            **options: for `torch.compile`, for example `backend` or `mode`.

        Values and gradients stay the same. The gradients are computed along with the losses and handed out by
        `losses.total.backward()`, so that gradient accumulation, `GradScaler` and `DistributedDataParallel`
        work as ever; the other fields of `Losses` carry no graph. Each new shape of a batch is compiled anew
        when it is first met: drop the last, smaller batch of an epoch.

        Nothing is gained on a CPU.
        """
        self._compiled = CompiledStep(**options)

    @torch.compiler.disable(recursive=True)
    def forward(self, images: Tensor, target: Tensor, generator: torch.Generator | None = None) -> Losses:
        """The losses of a batch; see the class."""
        self._check_call(images, target)
        keep_graph = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(keep_graph):
            images, target = (t.clone() if t.is_inference() else t for t in (images, target))
            with full_precision(images):
                params = self.augmentation.make_params(images, generator)
                new_images = self.augmentation.images(images, params)
            batch = (images, new_images, target, params, self.current_gamma())
            if self._compiled and keep_graph:
                losses = Losses(*self._compiled(self, *batch))
            else:
                losses = self.losses(*batch)
        if self.training:
            self.steps_done += 1
        return losses

    @property
    def spec(self) -> MethodSpec:
        """What the saliency method is."""
        return METHODS[self.method]

    def current_gamma(self) -> float:
        """The weight of the saliency term in the coming step: gamma, `every` times it, or zero."""
        if not self.training:
            return self.gamma
        since = self.steps_done - self.warmup
        return self.gamma * self.every if since >= 0 and since % self.every == 0 else 0.0

    def settings(self) -> tuple:
        """What the losses are computed with, apart from the strength of the terms."""
        return (
            *(bool(weight) for weight in (self.alpha, self.beta)),
            *(tuple(options.items()) for options in (self.layers, self.method_options)),
            *(self.layer_distance, self.method, self.normalize, self.distance, self.pool),
            self.detach_original,
        )

    def losses(self, images: Tensor, new_images: Tensor, target: Tensor, params: Any, gamma: float) -> Losses:
        """Eq. 5 to 8 for images and what the augmentation made of them.

        Args:
            images: (N, C, H, W), the originals.
            new_images: (N, C, H, W), augmented.
            target: (N,) labels or (N, K) weights of the originals.
            params: what the augmentation drew.
            gamma: weight of the saliency term in this step.
        """
        n = len(images)
        keep_graph = torch.is_grad_enabled()
        pixels = torch.cat([images, new_images])
        if _is_channels_last(images):
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        with ExitStack() as stack:
            watch = None
            if gamma:
                stack.enter_context(torch.enable_grad())
                stack.enter_context(_differentiable_twice())
                if not self.spec.repeats:
                    watch = stack.enter_context(self._watch())
                    pixels.requires_grad_()
            features = stack.enter_context(self._features()) if self.beta else {}
            # a model may work in place on its input, which a leaf of the graph does not allow
            logits = self.model(pixels.clone() if watch else pixels)
            k = self._num_classes(logits, 2 * n)
            targets = both_targets(target, self.augmentation.targets(target, params, k), k)
            salience = logits.new_zeros((), dtype=torch.promote_types(logits.dtype, torch.float32))
            maps = self._maps(watch, pixels, logits, targets, keep_graph) if gamma else None
        with full_precision(images):
            classes = class_loss(logits, targets)
            invariance = self._invariance(features, n) if self.beta else torch.zeros_like(salience)
            if maps is not None:
                first = maps[:n].detach() if self.detach_original else maps[:n]
                maps, new_maps, valid = self.augmentation.align(first, maps[n:], params)
                salience = saliency_loss(
                    maps,
                    new_maps,
                    valid,
                    normalize=self.normalize,
                    distance=self.distance,
                    pool=self.pool,
                )
            total = self.alpha * classes + self.beta * invariance + gamma * salience
        losses = Losses(total, classes, invariance, salience, logits.detach())
        return losses if keep_graph else losses.detach()

    def _maps(
        self, watch: Watch | None, pixels: Tensor, logits: Tensor, targets: Tensor, keep_graph: bool
    ) -> Tensor:
        """The saliency maps of all 2N images, each for its own target."""
        if watch is None:
            maps = saliency.METHODS[self.method](
                self.model, pixels.detach(), targets, create_graph=keep_graph, **self.method_options
            )
        else:
            half = torch.float16 in (autocast_dtype(pixels), logits.dtype)
            scale = self.score_scale.value if half else 1.0
            with full_precision(pixels):
                maps = watch.maps(pixels, scale * class_scores(logits, targets), create_graph=keep_graph)
            maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
            if half:
                self.score_scale.update(maps.isfinite().all())
                # each gradient among the factors of a map carries the scale once
                maps = maps / scale ** (self.spec.pixels + self.spec.layer)
        if keep_graph and not self._second_derivative_checked:
            check_second_derivative(maps)
            self._second_derivative_checked = True
        return maps

    def _watch(self) -> Watch:
        return Watch(self.model, self.method, self.method_options.get("layer"))

    def _invariance(self, features: dict[str, Tensor], n: int) -> Tensor:
        for name in self.layers:
            if name not in features:
                raise ValueError(f"layers: the forward pass of the model never calls its module {name!r}")
        halves = ({name: out[half] for name, out in features.items()} for half in (slice(n), slice(n, None)))
        return invariance_loss(*halves, distance=self.layer_distance, weights=self.layers)

    @contextmanager
    def _features(self) -> Iterator[dict[str, Tensor]]:
        """Collects the outputs of `layers` in the forward pass that runs inside."""
        features: dict[str, Tensor] = {}

        def keep(name: str) -> Callable:
            def hook(module: nn.Module, args: Any, output: Any) -> Tensor:
                if not isinstance(output, Tensor):
                    raise TypeError(f"layers: {name!r} must return a tensor, got {type(output).__name__}")
                features[name] = output
                return output.clone()  # what follows may work in place

            return hook

        handles = [self.model.get_submodule(name).register_forward_hook(keep(name)) for name in self.layers]
        try:
            yield features
        finally:
            for handle in handles:
                handle.remove()

    def _num_classes(self, logits: Any, samples: int) -> int:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else ()
        if len(shape) != 2 or shape[0] != samples or self.num_classes not in (None, shape[1]):
            got = shape or type(logits).__name__
            raise ValueError(
                f"model must return logits (2N, K) = ({samples}, {self.num_classes or 'K'}), got {got}"
            )
        return shape[1]

    def _check_model(self) -> None:
        """What can be told from model and settings before any step."""
        names = [name for name, _ in self.model.named_modules() if name]
        for name in self.layers:
            if name not in names:
                raise unknown("layers", name, names)
        if bool(self.beta) != bool(self.layers):
            raise ValueError(
                f"beta and layers go together, got beta={self.beta} and layers={list(self.layers)}"
            )
        if any(isinstance(module, DistributedDataParallel) for module in self.model.modules()):
            raise TypeError(
                "model must not be wrapped in DistributedDataParallel: wrap the objective, "
                "DistributedDataParallel(Objective(model, ...))"
            )
        for name in self.method_options:
            if name not in self.spec.options:
                raise unknown(f"method_options of {self.method}", name, sorted(self.spec.options))
        if self.gamma and not self.spec.repeats:
            self._watch()  # finds the layer, or says that there is none

    def _check_call(self, images: Tensor, target: Tensor) -> None:
        check_images(images)
        if not isinstance(target, Tensor) or target.ndim not in (1, 2) or len(target) != len(images):
            got = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
            raise ValueError(f"target must be a tensor ({len(images)},) or ({len(images)}, K), got {got}")
        if target.ndim == 1 and (target.is_floating_point() or target.dtype is torch.bool):
            raise TypeError(f"target of shape (N,) must hold integer labels, got {target.dtype}")
        if not self.gamma or not torch.is_grad_enabled():
            return
        wrapper = DistributedDataParallel._active_ddp_module
        if wrapper is not None and wrapper.static_graph:
            raise RuntimeError(
                "DistributedDataParallel(static_graph=True) would skip the averaging of gradients without a "
                "word, as the saliency term differentiates inside the forward pass: leave static_graph out"
            )
        if self.training and any(isinstance(module, nn.SyncBatchNorm) for module in self.model.modules()):
            raise RuntimeError(
                "nn.SyncBatchNorm has no second derivative, which the saliency term needs: "
                "use nn.BatchNorm2d, or gamma=0"
            )


@contextmanager
def _differentiable_twice() -> Iterator[None]:
    """Fast second derivatives, and neither compiled modules nor fused attention kernels, which have none."""
    with as_written(), sdpa_kernel(SDPBackend.MATH), fast_double_backward():
        yield


def _is_channels_last(images: Tensor) -> bool:
    return not images.is_contiguous() and images.is_contiguous(memory_format=torch.channels_last)
