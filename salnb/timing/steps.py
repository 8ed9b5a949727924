"""Training steps to be timed: with everything prepared that the paper's protocol leaves out."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from salnb import models
from salnb.augment import AUGMENTATIONS, Augmentation
from salnb.double_backward import fused
from salnb.double_backward.mode import second_derivatives_of_pytorch
from salnb.objective import Objective
from salnb.objective.precision import tf32
from salnb.timing.cases import Case

__all__ = ["AUGMENTATION", "NUM_CLASSES", "SaliencyStep", "TimedStep", "arithmetic", "step_of"]

NUM_CLASSES = 1000
AUGMENTATION = "affine"  # that of the paper's ImageNet experiments

Mark = Callable[[str], None]


def _unmarked(part: str) -> None:
    pass


class _Prepared(Augmentation):
    """An augmentation that was applied beforehand, to the only images that it will be asked to augment.

    A step does not pay for it; the way back counts, as in the paper, and begins the part "loss".
    """

    def __init__(self, augmentation: Augmentation, images: Tensor, mark: Mark):
        super().__init__()
        self.augmentation, self.mark = augmentation, mark
        self.params = augmentation.make_params(images)
        self.new_images = augmentation.images(images, self.params)

    def make_params(self, images: Tensor, generator: torch.Generator | None = None) -> Any:
        return self.params

    def images(self, images: Tensor, params: Any) -> Tensor:
        return self.new_images

    def targets(self, target: Tensor, params: Any, num_classes: int | None = None) -> Tensor:
        return self.augmentation.targets(target, params, num_classes)

    def align(self, maps: Tensor, new_maps: Tensor, params: Any) -> tuple[Tensor, Tensor, Tensor]:
        self.mark("loss")
        return self.augmentation.align(maps, new_maps, params)


class TimedStep(ABC):
    """A training step without optimiser: forward pass, losses, gradients of the parameters.

    Args:
        case: what to run.
        device: on what.
        mark: told the name of each part as it begins: "forward", "input gradient" (with a saliency method),
            "loss" and "backward". Only eager steps have parts.
        model: of the case's network; None draws one.
    """

    after_forward: ClassVar[str]  # the part that begins where the network ends
    batch: Sequence[Tensor]

    def __init__(
        self, case: Case, device: torch.device, mark: Mark = _unmarked, model: nn.Module | None = None
    ):
        self.case, self.device, self.mark = case, device, mark
        torch.manual_seed(0)
        with device:
            self.model = model or models.build(case.network, NUM_CLASSES)
            self.images = torch.rand(case.batch, 3, case.size, case.size)
            self.target = torch.arange(case.batch) % NUM_CLASSES
        if case.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
            self.images = self.images.contiguous(memory_format=torch.channels_last)
        inner = mark if case.mode == "eager" else _unmarked
        self.prepared = _Prepared(AUGMENTATIONS[AUGMENTATION](), self.images, inner)
        if case.mode == "eager":
            self.model.register_forward_pre_hook(lambda module, args: mark("forward"))
            self.model.register_forward_hook(lambda module, args, output: mark(self.after_forward))

    @property
    def held_bytes(self) -> int:
        """Memory of parameters, buffers and the batch."""
        tensors = [*self.model.parameters(), *self.model.buffers(), *self.batch]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @abstractmethod
    def loss(self) -> Tensor:
        """What is differentiated, computed under autocast where the case asks for it."""

    def __call__(self) -> None:
        """Run it once."""
        self.model.zero_grad()
        with self._autocast():
            loss = self.loss()
        self.mark("backward")
        loss.backward()

    def _autocast(self, **options: Any) -> torch.autocast:
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.case.precision == "bf16", **options
        )


class BaselineStep(TimedStep):
    """The paper's baseline: cross-entropy over originals and augmented images, which lie in one tensor.

    Or over the originals alone, where the case says so.
    """

    after_forward = "loss"

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.batch = self.images, self.target
        if not self.case.originals_only:
            pixels = torch.cat([self.images, self.prepared.new_images])
            if self.case.channels_last:
                pixels = pixels.contiguous(memory_format=torch.channels_last)
            labels = self.prepared.targets(self.target, self.prepared.params)
            self.batch = pixels, torch.cat([self.target, labels])
        self.network = torch.compile(self.model, dynamic=False) if self.case.compiled else self.model
        if self.case.captured:
            # what autocast keeps of a weight would not be made anew when a graph is run again
            with self._autocast(cache_enabled=False):
                self.network = torch.cuda.make_graphed_callables(self.model, self.batch[:1])

    def loss(self) -> Tensor:
        """The cross-entropy."""
        pixels, labels = self.batch
        return F.cross_entropy(self.network(pixels), labels)


class SaliencyStep(TimedStep):
    """A step of `Objective` with the case's saliency method; plain, by the derivatives of PyTorch."""

    after_forward = "input gradient"

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        case = self.case
        assert case.method is not None
        self.batch = self.images, self.prepared.new_images, self.target
        with self.device:  # where the scales of float16 belong
            self.objective = Objective(
                self.model,
                self.prepared,
                method=case.method,
                method_options=case.method_options,
                every=case.every,
            )
        if case.captured:
            self.objective.compile(mode="cuda-graphs")
        elif case.compiled:
            self.objective.compile()

    def loss(self) -> Tensor:
        """The objective."""
        plain = second_derivatives_of_pytorch() if self.case.plain else nullcontext()
        with plain, fused.preferred(self.device) if self.case.fused else nullcontext(False) as is_fused:
            if self.case.fused and not is_fused:
                raise RuntimeError("the fused kernels cannot be used here")
            return self.objective(self.images, self.target).total


def step_of(
    case: Case, device: torch.device, mark: Mark = _unmarked, model: nn.Module | None = None
) -> TimedStep:
    """The step of a case: a `BaselineStep` where it has no saliency method, else a `SaliencyStep`."""
    return (SaliencyStep if case.method else BaselineStep)(case, device, mark, model)


@contextmanager
def arithmetic(case: Case, device: torch.device) -> Iterator[None]:
    """TF32 where the case asks for it, and cuDNN free to try its algorithms; both as they were afterwards."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        with tf32(case.precision == "tf32"), torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        torch.backends.cudnn.benchmark = before
