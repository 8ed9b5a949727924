"""Training steps to be timed: with everything prepared that the paper's protocol leaves out."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from salnb import models
from salnb.augment import AUGMENTATIONS, Augmentation
from salnb.objective import Objective
from salnb.objective.precision import tf32
from salnb.timing.cases import Case

__all__ = [
    "AUGMENTATION",
    "NUM_CLASSES",
    "BaselineStep",
    "Prepared",
    "SaliencyStep",
    "TimedStep",
    "arithmetic",
    "count_flops",
    "step_of",
]

NUM_CLASSES = 1000
AUGMENTATION = "affine"  # that of the paper's ImageNet experiments

Mark = Callable[[str], object]


def unmarked(part: str) -> None:
    """Takes no note of the parts of a step."""


class Prepared(Augmentation):
    """An augmentation that was applied beforehand, so that a step does not pay for it.

    Args:
        augmentation: what to apply.
        images: (N, C, H, W), the only images that it will be asked to augment.
        mark: told when the maps are there, as the losses begin.
    """

    def __init__(self, augmentation: Augmentation, images: Tensor, mark: Mark = unmarked):
        super().__init__()
        self.augmentation, self.mark = augmentation, mark
        self.params = augmentation.make_params(images)
        self.new_images = augmentation.images(images, self.params)

    def make_params(self, images: Tensor, generator: torch.Generator | None = None) -> Any:
        """What was drawn beforehand."""
        return self.params

    def images(self, images: Tensor, params: Any) -> Tensor:
        """What was augmented beforehand."""
        return self.new_images

    def targets(self, target: Tensor, params: Any, num_classes: int | None = None) -> Tensor:
        """As the augmentation does it."""
        return self.augmentation.targets(target, params, num_classes)

    def align(self, maps: Tensor, new_maps: Tensor, params: Any) -> tuple[Tensor, Tensor, Tensor]:
        """As the augmentation does it, in the step: the paper counts the way back."""
        self.mark("loss")
        return self.augmentation.align(maps, new_maps, params)


class TimedStep:
    """A training step without optimiser: forward pass, losses, gradients of the parameters.

    Args:
        case: what to run.
        device: on what.
        mark: told the name of each part as it begins: "forward", "input gradient" (with a saliency method),
            "loss" and "backward". Compiled steps have no parts.
        model: of the case's network; None draws one.

    Attributes:
        held_bytes: memory of parameters, buffers and the batch.
    """

    after_forward: ClassVar[str]  # the part that begins where the network ends

    def __init__(
        self, case: Case, device: torch.device, mark: Mark = unmarked, model: nn.Module | None = None
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
        inner = unmarked if case.compiled else mark
        batch = self.prepare(Prepared(AUGMENTATIONS[AUGMENTATION](), self.images, inner))
        if not case.compiled:
            after = self.after_forward
            self.model.register_forward_pre_hook(lambda module, args: _tell(mark, "forward"))
            self.model.register_forward_hook(lambda module, args, output: _tell(mark, after))
        tensors = [*self.model.parameters(), *self.model.buffers(), *batch]
        self.held_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def prepare(self, augmentation: Prepared) -> list[Tensor]:
        """Make what `run` needs; gives the batch that lies on the device."""
        raise NotImplementedError

    def run(self) -> None:
        """The passes, forward and backward."""
        raise NotImplementedError

    def __call__(self) -> None:
        """Run it once."""
        self.model.zero_grad()
        self.run()

    def autocast(self) -> torch.autocast:
        """The context of the forward pass and the losses."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.case.precision == "bf16")


class BaselineStep(TimedStep):
    """The paper's baseline: cross-entropy over originals and augmented images."""

    after_forward = "loss"

    def prepare(self, augmentation: Prepared) -> list[Tensor]:
        """Originals and augmented images in one tensor, and the network."""
        self.pixels = torch.cat([self.images, augmentation.new_images])
        if self.case.channels_last:
            self.pixels = self.pixels.contiguous(memory_format=torch.channels_last)
        self.labels = torch.cat([self.target, augmentation.targets(self.target, augmentation.params)])
        self.network = torch.compile(self.model, dynamic=False) if self.case.compiled else self.model
        return [self.pixels, self.labels]

    def run(self) -> None:
        """Forward pass, cross-entropy, backward pass."""
        with self.autocast():
            loss = F.cross_entropy(self.network(self.pixels), self.labels)
        self.mark("backward")
        loss.backward()


class SaliencyStep(TimedStep):
    """A step of `Objective` with the case's saliency method."""

    after_forward = "input gradient"

    def prepare(self, augmentation: Prepared) -> list[Tensor]:
        """The objective."""
        case = self.case
        assert case.method is not None
        with self.device:  # where the scales of float16 belong
            self.objective = Objective(
                self.model,
                augmentation,
                method=case.method,
                method_options=case.method_options,
                every=case.every,
            )
        if case.compiled:
            self.objective.compile()
        return [self.images, augmentation.new_images, self.target]

    def run(self) -> None:
        """The objective, backward pass."""
        with self.autocast():
            losses = self.objective(self.images, self.target)
        self.mark("backward")
        losses.total.backward()


def step_of(
    case: Case, device: torch.device, mark: Mark = unmarked, model: nn.Module | None = None
) -> TimedStep:
    """The step of a case: a `BaselineStep` where it has no saliency method, else a `SaliencyStep`."""
    return (SaliencyStep if case.method else BaselineStep)(case, device, mark, model)


def _tell(mark: Mark, part: str) -> None:
    mark(part)  # what a hook returns would replace the module's input or output


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
    """Floating-point operations of a step on average, and those of its convolutions, by torch's counter.

    Products of matrices and convolutions are counted, two operations for each multiplication with addition.
    Nothing is computed: tensors have shapes only.
    """
    base = _count(case.network, None, case.size, 0)
    each = base
    if case.method:
        each = _count(case.network, case.method, case.size, min(case.samples, 1))
    if case.samples > 1:  # every further noisy copy takes as much again
        two = _count(case.network, case.method, case.size, 2)
        each = tuple(a + (case.samples - 1) * (b - a) for a, b in zip(each, two, strict=True))  # type: ignore
    total, convolutions = (
        case.batch * (a + (case.every - 1) * b) // (2 * case.every) for a, b in zip(each, base, strict=True)
    )
    return total, convolutions


def _without_values(network: str) -> nn.Module:
    """The network with fake tensors in it; some draw their weights in ways that fake tensors do not bear."""
    with torch.device("meta"):
        model = models.build(network, NUM_CLASSES)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module.register_parameter(name, nn.Parameter(torch.empty(parameter.shape)))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
    return model


class _NoModules(ModuleTracker):
    """Counts for the whole only: hooks that tell modules apart do not bear a gradient inside a model."""

    def __enter__(self) -> "_NoModules":
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass


@cache
def _count(network: str, method: str | None, size: int, samples: int) -> tuple[int, int]:
    """Of a batch of 2 + 2."""
    case = Case(network, method, batch=2, size=size, samples=samples)
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _NoModules()
    # of the attention kernels only the one that is written out is counted whole
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), counter:
        step_of(case, torch.device("cpu"), model=_without_values(network))()
    by_operator = counter.get_flop_counts()["Global"]
    return counter.get_total_flops(), sum(n for op, n in by_operator.items() if "convolution" in str(op))
