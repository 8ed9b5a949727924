"""`Objective`: a module that owns the model and turns a batch into losses.

Here are its arguments, their checks, the schedule of the saliency term and the call; the losses themselves
are in `salnb.objective.terms`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from salnb._common.catalog import check_options
from salnb._common.checks import (
    as_labels,
    check_images,
    check_no_transform,
    check_normalized,
    is_channels_last,
    is_traced,
    unknown,
)
from salnb._common.limits import check_integer
from salnb._common.outputs import check_model_kwargs, given_twice
from salnb._common.warning import warn_caller
from salnb.augment import Augmentation
from salnb.objective.arguments import NO_PARTS, check_batch, check_state, checked_settings, snapshot
from salnb.objective.balance import EVERY, Balance
from salnb.objective.captured import CapturedStep
from salnb.objective.class_terms import ClassTerm
from salnb.objective.compiled import CompiledStep
from salnb.objective.parallel import check_parallel, check_unwrapped, sharing_processes
from salnb.objective.precision import LossScale, full_precision
from salnb.objective.terms import Losses, StepInputs, StepModules, TermSettings, step_losses
from salnb.saliency.isolation import alone, check_usable

__all__ = ["Objective"]


class Objective(nn.Module):
    """Class, invariance and saliency loss of a model under an augmentation (eq. 5 to 8).

    Args:
        model: maps images (N, C, H, W) to logits (N, K), or to an object whose `.logits` these are. It is
            used as it is and not changed.
        augmentation: one of `salnb.augment`.
        alpha: weight of the class loss.
        beta: weight of the invariance loss; 0 takes no activations.
        gamma: weight of the saliency loss; 0 takes no maps, and no second backward pass.
        layers: names of the modules whose outputs (2N, ...) eq. 6 compares, as a sequence, or as a mapping to
            weights. Of a module that runs more than once in a forward pass, the last output counts.
        layer_distance: "l2" (mean of squares) or "l1", for eq. 6.
        layer_relative: divide eq. 6 in each layer by the distance between different images of the batch.
        method: a key of `salnb.saliency.METHODS`.
        method_options: keyword arguments of the method: `layer` and `reshape` for the methods with Grad-CAM,
            `n_samples` and `noise_level` for SmoothGrad.
        score: whose gradient the maps are: "logit" (eq. 1) or "log_prob", the logarithm of the class's
            probability, whose maps stay as they are when a function of the image is added to all logits.
        normalize: how each map is normalised on its own: a member of `salnb.losses.NORMALIZATIONS` or None.
        distance: how maps are compared: a member of `salnb.losses.DISTANCES`.
        pool: side of the blocks of pixels whose means are compared; 1 compares pixels.
        every: the saliency term enters every k-th training step, k times as strong.
        warmup: training steps before the saliency term first enters.
        balance: ρ above 0 chooses gamma in training: the length of the saliency term's gradient is kept at ρ
            times that of the (weighted) class loss, both moving averages, measured at the first and each
            tenth step with the term; see `salnb.objective.balance`. 0 leaves gamma as it is.
        detach_original: hold the originals' maps fixed, so that only the augmented images' maps move.
        shuffle_pairs: compare each original's map with *another* image's of the batch, as a control.
        confidence: above 0, `target` may hold -1 for images without a label. They have no part in the class
            loss; where the network's probability of its own class of the original is at least this, that
            class is the one whose maps are compared. 0: every image has a label.
        consistency: weight, for those images, of the cross-entropy between that class and the prediction on
            the augmented image; `balance` counts it to the class loss.
        originals_only: the class loss is that of the originals; the augmented images have maps only.
        num_classes: K; None reads it from the logits.
        class_loss: takes the place of the cross-entropy of eq. 5: a function or module from logits (2N, K),
            in float32 at least, and targets of both halves to a scalar, such as
            `nn.CrossEntropyLoss(label_smoothing=0.1)` or `nn.BCEWithLogitsLoss()`.
        output: gives the logits from what the model returns, such as `lambda out: out[0]` of a tuple.

    Raises:
        TypeError, ValueError: an argument is not allowed; the message names it.

    Called with `images` (N, C, H, W), `target` ((N,) integer labels or (N, K) weights that sum to one in each
    row) and optionally a `generator` for the augmentation, it returns `Losses`. The values of a target on a
    GPU are looked at in the first call only, as they would have to be waited for. `model_kwargs` are given to
    the model beside the images; tensors (N, ...) among them are given for both halves, unaugmented.

    Two more arguments, for data that know more than labels. `partners`, (N, C, H, W), are augmented in the
    originals' place: images of the same classes, whose maps are to agree with the originals' pixel by pixel.
    `masks`, (N, 1, H, W) booleans, say where the objects are: the saliency term is then the square of the
    originals' maps outside them (`salnb.losses.outside_loss`) instead of eq. 7, and the maps are those of the
    sum of all classes' scores: log-probabilities, if `score` says so.

    A `class_loss` gets labels (2N,) as they are, or weights (2N, K) where the target has them, and always
    from MixUp, CutMix and sequences with them, so that it must take weights there, as PyTorch's cross-entropy
    does (but for `ignore_index`). The target may then hold several labels, (N, K) of 0 and 1, whose rows need
    not sum to one. Maps explain the label, not its smoothing: the logit of the class, or the weighted sum of
    logits. A sample without a label, or with one that is no class, as `ignore_index` is, is left out of the
    saliency loss. For distillation and other terms beside `total` there is `Losses.logits_with_graph`.

    Batch norm sees originals and augmented images as one batch; in train mode its running statistics are
    updated once per call, as by any forward pass, and the maps are gradients of the batch's summed score
    *through* the batch statistics. Call `eval()` on the model inside to take the maps of single images.

    A training step is a call in train mode; with gradient accumulation `every` and `warmup` count these
    calls. To have them count optimiser steps, there or where an optimiser calls more than once a step (SAM,
    L-BFGS), pass the step's number, `step=n`, from 0; a generator that is seeded with it draws alike in all
    calls of a step. Parameter groups (`no_weight_decay`, a decay by layers) are made of `model`, as ever. In
    eval mode the saliency term is always there. Settings may be changed between steps, under the names that
    they have here: the next call checks them. Under `torch.no_grad()` or `torch.inference_mode()` the
    terms are computed without a graph, for validation.

    Wrap the objective, not the model: `DistributedDataParallel(objective)`. Autocast applies to the network;
    augmentation, maps and losses are computed in float32 at least. With float16 use a `GradScaler` as ever.
    `compile()` makes a step faster on GPUs; `torch.compile(objective)` runs it as it is.

    Refused, as their gradient would be wrong, are `nn.SyncBatchNorm` in train mode, operations without a
    second derivative, custom Functions that lose it or write a `.grad`, reentrant and selective activation
    checkpointing (any other has the gradient of the network without), shards of FSDP inside the objective and
    `DistributedDataParallel(static_graph=True)`, each with an error that says what to do instead.

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
        layer_relative: bool = False,
        method: str = "vanilla_gradient",
        method_options: Mapping[str, Any] | None = None,
        score: str = "logit",
        normalize: str | None = "max",
        distance: str = "mse",
        pool: int = 1,
        every: int = 1,
        warmup: int = 0,
        balance: float = 0.0,
        detach_original: bool = False,
        shuffle_pairs: bool = False,
        confidence: float = 0.0,
        consistency: float = 0.0,
        originals_only: bool = False,
        num_classes: int | None = None,
        class_loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        output: Callable[[Any], Tensor] | None = None,
    ):
        super().__init__()
        self.model = model
        self.augmentation = augmentation
        self.alpha, self.beta, self.gamma = alpha, beta, gamma
        self.layers: Any = layers
        self.layer_distance, self.layer_relative = layer_distance, layer_relative
        self.method_options: Any = method_options
        self.method, self.score, self.normalize, self.distance = method, score, normalize, distance
        self.pool, self.every, self.warmup = pool, every, warmup
        self.detach_original, self.shuffle_pairs = detach_original, shuffle_pairs
        self.confidence, self.consistency, self.originals_only = confidence, consistency, originals_only
        self.num_classes, self.output = num_classes, output
        self.class_term, self.steps_done = ClassTerm(class_loss), 0
        # for float16: of the score whose gradient makes the maps, and of the total in a compiled step
        self.score_scale, self.gradient_scale = LossScale(12, top=12), LossScale(14, top=24)
        self.balance = Balance(balance)
        self._compiled: CompiledStep | None = None
        self._second_derivative_checked, self._target_checked = (0, ""), False  # of a model, with a method
        self._checked: tuple[Any, Any] = ((), ())
        self._check_settings()
        self._place_buffers(next(model.parameters(), None))

    def __setattr__(self, name: str, value: Any) -> None:
        """Settings that are assigned later are those of the next call, and checked there."""
        if name == "balance" and not isinstance(value, Balance):
            self.balance.share = value
        elif name in NO_PARTS:
            vars(self)[name] = value
        elif name == "class_loss":
            super().__setattr__("class_term", ClassTerm(value))
        else:
            super().__setattr__(name, value)

    # the number of steps decides when the saliency term enters: a resumed training needs it
    def get_extra_state(self) -> Tensor:
        """The number of training steps done, for `state_dict`: a tensor, as what saves weights expects.

        With `balance` the two lengths that it has measured follow.
        """
        steps, lengths = torch.tensor(self.steps_done, device="cpu"), self.balance.lengths
        if not self.balance.share:
            return steps
        if lengths.is_meta:
            return lengths.new_empty(3).double()
        return torch.cat([steps.view(1), lengths.cpu()]).double()

    def set_extra_state(self, state: Tensor | Mapping[str, int]) -> None:
        """Continue from the number of steps in `state_dict`; older ones have it in a dictionary."""
        steps = state["steps_done"] if isinstance(state, Mapping) else state
        if isinstance(steps, Tensor):
            if steps.is_meta:
                return
            check_state(steps)
            if steps.ndim:
                self.balance.resume(steps[1:])
                steps = steps[0]
        self.steps_done = round(float(steps))  # an average of weights may have made it a fraction

    def compile(self, **options: Any) -> None:
        """Run each later step that takes gradients as one compiled graph; see `salnb.objective.compiled`.

        Args:
            **options: for `torch.compile`, for example `backend` or `mode`. With `mode="cuda-graphs"` alone
                a step is not compiled: its kernels are captured as they are, in seconds, and started at once,
                batch norm's derivatives fused. Experimental: one GPU has run it; on a CPU it changes nothing.

        Values and gradients stay the same. The gradients are computed along with the losses and handed out by
        `losses.total.backward()`, so that gradient accumulation, `GradScaler` and `DistributedDataParallel`
        work as ever; the other fields of `Losses` carry no graph. Each new shape of a batch is compiled anew
        when it is first met: drop the last, smaller batch of an epoch. The same holds for whatever a step
        depends on: modules, their hyper-parameters and other attributes, hooks, modes, PyTorch's switches.
        A checkpointed segment is stored; the compiler decides what is recomputed.

        Refused with a `RuntimeError` are models (and augmentations) that a graph would not repeat: those
        that look at values or at a `.grad`, change their own attributes, draw random numbers from Python,
        NumPy or an own generator, or seed PyTorch's. What a model takes from global variables, files or
        clocks is not noticed, nor what is written by `.data`, nor what changes in one of many objects deep
        within others.

        Nothing is gained on a CPU. Below torch 2.9 Inductor is refused there: it writes beyond its buffers.
        A graph has the memory format of model and images: convolutions in half precision want channels_last.
        """
        captured = options.get("mode") == "cuda-graphs"
        if captured and len(options) > 1:
            raise ValueError(f'mode="cuda-graphs" goes without other options, got {sorted(options)}')
        self._compiled = CapturedStep() if captured else CompiledStep(**options)

    @torch.compiler.disable(recursive=True)
    def forward(
        self,
        images: Tensor,
        target: Tensor,
        generator: torch.Generator | None = None,
        *,
        step: int | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        partners: Tensor | None = None,
        masks: Tensor | None = None,
    ) -> Losses:
        """The losses of a batch; see the class."""
        self._check_call(images)
        check_batch(self.model, images, target, partners, masks)
        check_model_kwargs(model_kwargs)
        target = as_labels(target)
        step = self.steps_done if step is None else check_integer("step", step, 0, 2**62)
        keep_graph = torch.is_grad_enabled()
        with alone(self.model.modules()), torch.inference_mode(False), torch.set_grad_enabled(keep_graph):
            # what inference mode made can take part in no graph
            images, target, partners, masks = map(_normal, (images, target, partners, masks))
            self._place_buffers(images)
            with full_precision(images):
                params = self.augmentation.make_params(images, generator)
                new_images = self.augmentation.images(images if partners is None else partners, params)
            if is_channels_last(images):  # here, so that none of the graphs of compile() has to change it
                new_images = new_images.contiguous(memory_format=torch.channels_last)
            scales = (self.score_scale, self.gradient_scale)
            modules = StepModules(self.model, self.augmentation, *scales, self.balance, self.class_term)
            kwargs = given_twice(model_kwargs or {}, len(images))
            tensors = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
            given_masks = () if masks is None else (masks,)
            inputs = StepInputs(images, new_images, target, params, tensors, given_masks)
            weights = (self.alpha, self.beta, self._scheduled_gamma(step))
            settings = self._term_settings(step, kwargs)
            if self._compiled and keep_graph and self._compiled.applies(images):
                losses = self._compiled(modules, inputs, weights, settings)
            else:
                checked = id(self.model), self.method
                check = settings.measured or self._second_derivative_checked != checked
                losses = step_losses(modules, inputs, weights, settings, check_derivative=check)
                if losses.has_saliency and keep_graph:
                    self._second_derivative_checked = checked
        if not self._target_checked and self.class_term.own is None:  # on a CPU it has looked already
            check_normalized(target, wait=True)
        self._target_checked = True
        if self.training:
            self.steps_done = step + 1
        return losses

    def current_gamma(self, step: int | None = None) -> float:
        """The weight of the saliency term in a step, or the coming one: gamma, `every` times it, or zero.

        With `balance` it is what the steps so far have chosen; a step that is measured chooses anew.
        """
        chosen = self.balance.weight.item() if self.balance.share else 1.0
        return self._scheduled_gamma(step) * chosen

    def _scheduled_gamma(self, step: int | None = None) -> float:
        if not self.training:
            return self.gamma
        since = (self.steps_done if step is None else step) - self.warmup
        return self.gamma * self.every if since >= 0 and since % self.every == 0 else 0.0

    def _term_settings(
        self, step: int | None = None, kwargs: Mapping[str, Any] | None = None
    ) -> TermSettings:
        """The terms of a step, or of the coming one."""
        plain = {name: value for name, value in (kwargs or {}).items() if not isinstance(value, Tensor)}
        has_saliency, balanced = bool(self._scheduled_gamma(step)), bool(self.balance.share)
        measured = balanced and has_saliency and self.training and torch.is_grad_enabled()
        since = (self.steps_done if step is None else step) - self.warmup
        measured = measured and since // self.every % EVERY == 0
        return TermSettings(
            has_invariance=bool(self.beta),
            has_saliency=has_saliency,
            balanced=balanced and has_saliency,
            measured=measured,
            processes=sharing_processes() if measured else None,
            layers=tuple(self.layers.items()),
            layer_distance=self.layer_distance,
            layer_relative=self.layer_relative,
            method=self.method,
            method_options=tuple(self.method_options.items()),
            score=self.score,
            normalize=self.normalize,
            distance=self.distance,
            pool=self.pool,
            detach_original=self.detach_original,
            shuffle_pairs=self.shuffle_pairs,
            confidence=self.confidence,
            consistency=self.consistency,
            originals_only=self.originals_only,
            num_classes=self.num_classes,
            output=self.output,
            model_kwargs=tuple(plain.items()),
        )

    def _place_buffers(self, like: Tensor | None) -> None:
        """Keep what is measured where model and images are: it would be waited for on another device."""
        for module in (self.score_scale, self.gradient_scale, self.balance):
            if like is not None and like.device != next(module.buffers()).device and not is_traced(like):
                module.to_empty(device=like.device)  # which these fill in, from the meta device as well

    def _arguments(self) -> dict[str, Any]:
        """The settings as they are, under the names of the arguments."""
        own = {"model": self.model, "augmentation": self.augmentation, "class_loss": self.class_term.own}
        return vars(self) | own | {"balance": self.balance.share}

    def _check_settings(self) -> None:
        """Look at the arguments again if any is another than it was."""
        given = self._arguments()
        if snapshot(given) == self._checked:
            return
        vars(self).update(checked_settings(given))
        weights, others = snapshot(self._arguments())
        if others != self._checked[1]:
            self._check_model()
        self._checked = weights, others

    def _check_model(self) -> None:
        """What can be told from the model and the arguments together."""
        names = [name for name, _ in self.model.named_modules(remove_duplicate=False) if name]
        for name in self.layers:
            if name not in names:
                raise unknown("layers", name, names)
        if bool(self.beta) != bool(self.layers):
            raise ValueError(
                f"beta and layers go together, got beta={self.beta} and layers={list(self.layers)}"
            )
        check_unwrapped(self.model)
        check_options(self.method, self.method_options)
        if self.gamma:
            check_usable(self.model)
            self._term_settings().recorder(self.model)  # finds the layer, or says that there is none

    def _check_call(self, images: Tensor) -> None:
        self._check_settings()
        check_images(images)
        if self.gamma:
            check_no_transform()
        if self.gamma and torch.is_grad_enabled():
            check_parallel(self, training=self.training, balanced=bool(self.balance.share))
            if self.training and not any(p.requires_grad for p in self.parameters()):
                warn_caller(
                    "no parameter requires a gradient: the backward pass of the losses trains nothing"
                )


def _normal(tensor: Any) -> Any:
    return tensor.clone() if tensor is not None and tensor.is_inference() else tensor
