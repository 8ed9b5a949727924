"""Training steps to be timed: with everything prepared that the paper's protocol leaves out."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from salnb import models
from salnb.augment import AUGMENTATIONS, Augmentation
from salnb.objective import Objective
from salnb.objective.precision import tf32
from salnb.timing.cases import Case

__all__ = ["AUGMENTATION", "NUM_CLASSES", "SaliencyStep", "TimedStep", "arithmetic", "count_flops", "step_of"]

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
            "loss" and "backward". Compiled steps have no parts.
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
        inner = _unmarked if case.compiled else mark
        self.prepared = _Prepared(AUGMENTATIONS[AUGMENTATION](), self.images, inner)
        if not case.compiled:
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
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.case.precision == "bf16"):
            loss = self.loss()
        self.mark("backward")
        loss.backward()


class BaselineStep(TimedStep):
    """The paper's baseline: cross-entropy over originals and augmented images, which lie in one tensor."""

    after_forward = "loss"

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        pixels = torch.cat([self.images, self.prepared.new_images])
        if self.case.channels_last:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        labels = self.prepared.targets(self.target, self.prepared.params)
        self.batch = pixels, torch.cat([self.target, labels])
        self.network = torch.compile(self.model, dynamic=False) if self.case.compiled else self.model

    def loss(self) -> Tensor:
        """The cross-entropy."""
        pixels, labels = self.batch
        return F.cross_entropy(self.network(pixels), labels)


class SaliencyStep(TimedStep):
    """A step of `Objective` with the case's saliency method."""

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
        if case.compiled:
            self.objective.compile()

    def loss(self) -> Tensor:
        """The objective."""
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


def count_flops(case: Case) -> tuple[int, int]:
    """Floating-point operations of a step on average, and those of its convolutions, by torch's formulas.

    Products of matrices and convolutions are counted, two operations for each multiplication with addition.
    Nothing is computed: tensors have shapes only.
    """
    plain = Case(case.network, case.method, batch=2, size=case.size, samples=min(case.samples, 1))

    def per_step(part: int) -> int:
        base, each = _count(plain.baseline)[part], _count(plain)[part]
        if case.samples > 1:  # every further noisy copy takes as much again
            each += (case.samples - 1) * (_count(replace(plain, samples=2))[part] - each)
        return case.batch * (each + (case.every - 1) * base) // (2 * case.every)

    return per_step(0), per_step(1)


class _FlopCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.total = self.convolutions = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            flops = formula(*args, **(kwargs or {}), out_val=out)
            self.total += flops
            self.convolutions += flops * ("convolution" in str(func))
        return out


def _without_values(model: nn.Module) -> nn.Module:
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module.register_parameter(name, nn.Parameter(torch.empty(parameter.shape)))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
    return model


@cache
def _count(case: Case) -> tuple[int, int]:
    with torch.device("meta"):  # some draw their weights in ways that fake tensors do not bear
        model = models.build(case.network, NUM_CLASSES)
    # of the attention kernels only the one that is written out is counted whole
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), _FlopCounter() as counter:
        step_of(case, torch.device("cpu"), model=_without_values(model))()
    return counter.total, counter.convolutions
