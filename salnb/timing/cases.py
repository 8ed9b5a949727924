"""Which steps a timing study measures, in which order; free of torch, to answer mistakes at once."""

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from salnb._common import catalog
from salnb._common.devices import check_device_name
from salnb._common.limits import check_integer, check_number

__all__ = ["MODES", "PAPER", "PRECISIONS", "TABLE_4", "TIMED_METHODS", "Case", "Settings", "counted", "plan"]

# Table 4 of the paper: milliseconds of an iteration on an RTX 2080 Ti, without and with the saliency loss
PAPER = {
    "vgg16": (152.23, 1176.71),
    "vgg19": (163.73, 1194.62),
    "resnet50": (307.57, 2156.14),
    "densenet121": (312.52, 2685.33),
    "densenet169": (406.54, 3789.62),
}
TABLE_4 = tuple(PAPER)
PRECISIONS = ("32", "tf32", "bf16")
MODES = ("eager", "compiled", "captured")
# what a study takes where it is not told: on a CPU, elsewhere
_USUAL = {"budget": (55.0, 570.0), "batch": (2, 32), "size": (64, 224), "iterations": (8, 200)}
_MOST, _LONGEST = 10**9, 1e9  # of anything that is counted, and of seconds
# the methods whose cost is compared, the dearest last
TIMED_METHODS = sorted(catalog.METHODS, key=lambda method: catalog.METHODS[method].repeats is not None)


@dataclass(frozen=True)
class Case:
    """One kind of training step, a row of the study.

    Attributes:
        network: a name of `salnb.models.build`.
        method: the saliency method; None is the baseline, a step without a saliency loss.
        every: steps from one saliency loss to the next.
        precision: "32", "tf32" or "bf16" (autocast).
        compiled: `Objective.compile()`, or `torch.compile` of the baseline's network.
        channels_last: memory format of network and images.
        batch: originals in a step; there are as many augmented images.
        size: height and width of the images.
        samples: noisy copies, for SmoothGrad only; 0 with the other methods.
        plain: with the second derivatives that PyTorch has, instead of those of `salnb.double_backward`.
        originals_only: a baseline whose batch lacks the augmented images.
        captured: `Objective.compile(mode="cuda-graphs")`, or the baseline's network as CUDA graphs.
        fused: an eager step with the fused kernels of batch norm's derivatives, which a captured one has
            anyway.
    """

    network: str
    method: str | None = "vanilla_gradient"
    every: int = 1
    precision: str = "32"
    compiled: bool = False
    channels_last: bool = False
    batch: int = 32
    size: int = 224
    samples: int = 0
    plain: bool = False
    originals_only: bool = False
    captured: bool = False
    fused: bool = False

    @property
    def baseline(self) -> "Case":
        """The step that this one is compared with."""
        return replace(self, method=None, every=1, samples=0, plain=False, originals_only=False, fused=False)

    @property
    def mode(self) -> str:
        """Whether the step is "eager", "compiled" or "captured"."""
        return "captured" if self.captured else MODES[self.compiled]

    @property
    def arithmetic(self) -> str:
        """The precision in words: "fp32", "tf32" or "bf16"."""
        return "fp32" if self.precision == "32" else self.precision

    @property
    def label(self) -> str:
        """The case in words."""
        words = [self.network, self.arithmetic, self.mode]
        words += ["channels_last"] * self.channels_last + [f"{self.batch}+{self.batch}"]
        words += [self.method.replace("_", " ") if self.method else "baseline"]
        words += [f"every {self.every}"] * (self.every > 1)
        words += ["plain PyTorch"] * self.plain + ["originals only"] * self.originals_only
        words += ["fused"] * self.fused
        return ", ".join(words)

    @property
    def method_options(self) -> dict[str, int]:
        """Options of the saliency method: how often it repeats a pass, where it does."""
        repeats = catalog.METHODS[self.method].repeats if self.method else None
        return {repeats: self.samples} if repeats and self.samples else {}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a study measures; None takes what suits the device.

    Attributes:
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        budget: seconds that the study may take. None: 55 on a CPU, 570 elsewhere.
        batch: originals in a step. None: 2 on a CPU, 32 elsewhere.
        size: height and width of the images. None: 64 on a CPU, 224 elsewhere.
        iterations: of each row, the second half of which counts. None: 8 on a CPU, elsewhere the paper's 200.
        networks, precisions, modes: only rows of these.

    Raises:
        TypeError: a setting is of the wrong type; the message names it.
        ValueError: a setting is not allowed; the message names it.
    """

    device: str = "auto"
    budget: float | None = None
    batch: int | None = None
    size: int | None = None
    iterations: int | None = None
    networks: Sequence[str] | None = None
    precisions: Sequence[str] | None = None
    modes: Sequence[str] | None = None

    def __post_init__(self) -> None:
        """Check every setting, before anything is loaded."""
        check_device_name(self.device)
        if self.budget is not None:
            budget = check_number("budget", self.budget, 0, _LONGEST, above=True)
            object.__setattr__(self, "budget", budget)
        for name, least in (("batch", 2), ("size", 1), ("iterations", 4)):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, check_integer(name, value, least, _MOST))
        choices = {"networks": catalog.NETWORKS, "precisions": PRECISIONS, "modes": MODES}
        for name, known in choices.items():
            _check_names(name, getattr(self, name), known)
        if self.device == "cpu" and "tf32" in (self.precisions or ()):
            raise ValueError("precisions: tf32 is for GPUs: with device cpu, take 32 or bf16")
        if self.device in ("cpu", "mps") and "captured" in (self.modes or ()):
            raise ValueError(
                f"modes: captured is for NVIDIA's GPUs: with device {self.device}, take eager or compiled"
            )
        size = self.size or int(_USUAL["size"][self.device != "cpu"])
        for network in self.networks or ():
            catalog.check_size(network, size)

    def on(self, kind: str) -> "Settings":
        """These settings with all that is None filled in for a kind of device, "cpu" or another."""
        usual = {name: values[kind != "cpu"] for name, values in _USUAL.items()}
        missing: dict[str, Any] = {name: usual[name] for name in usual if getattr(self, name) is None}
        return replace(self, device=kind if self.device == "auto" else self.device, **missing)


def _check_names(what: str, names: Any, known: Collection[str]) -> None:
    if names is not None and (isinstance(names, str) or not isinstance(names, Sequence)):
        raise TypeError(f"{what} must be a list of names, got {names!r}")
    for name in names or ():
        if name not in list(known):  # which asks nothing of a name
            raise catalog.unknown(what, name, known)


def plan(settings: Settings) -> list[Case]:
    """The rows of a study, the most important first; each baseline comes before what is compared with it.

    Args:
        settings: with nothing missing (`Settings.on`).
    """
    cases: list[Case] = []
    for case in (_cpu_cases if settings.device == "cpu" else _gpu_cases)(settings):
        if _wanted(case, settings):
            cases += [case.baseline, case]
    return list(dict.fromkeys(cases))


def _wanted(case: Case, settings: Settings) -> bool:
    known = catalog.NETWORKS[case.network]
    uses_layer = case.method is not None and catalog.METHODS[case.method].layer
    smallest = known.smallest_for_cam if uses_layer else known.smallest
    return (
        (settings.precisions is None or case.precision in settings.precisions)
        and (settings.modes is None or case.mode in settings.modes)
        and smallest <= case.size <= (known.largest or case.size)
    )


def _cpu_cases(settings: Settings) -> Iterator[Case]:
    """Table 4, then each question with a small network; what takes longest comes last.

    A CPU's speed wanders: the step with PyTorch's own derivatives comes right after the one beside it.
    """
    networks = settings.networks or ("resnet18", "resnet50", "densenet121")
    first = Case(networks[0], batch=settings.batch or 0, size=settings.size or 0)
    yield first
    yield from _beside(first)
    yield from _each(first, network=networks)
    yield from _each(first, every=(1, 4, 16))
    yield from _each(first, batch=[factor * first.batch for factor in (2, 4, 8)])
    *cheap, repeated = _methods(first, samples=5)
    yield from cheap
    yield replace(first, channels_last=True)
    if not settings.networks:
        yield from _each(first, network=("densenet169", "vgg16", "vgg19"))
    yield repeated
    if settings.precisions and "bf16" in settings.precisions:  # most CPUs have to emulate it
        yield from _each(first, network=networks, precision=["bf16"])
    # minutes, and nothing gained on a CPU: all networks only where it is asked for
    yield from _each(first, network=networks if settings.modes else networks[:1], compiled=[True])


def _gpu_cases(settings: Settings) -> Iterator[Case]:
    """The paper's table as it is, then in faster arithmetic and captured, then each further question.

    A captured step is cheap to measure after the eager one, whose algorithms cuDNN has chosen by then.
    """
    chosen = settings.networks
    networks, more = (chosen, ()) if chosen else (TABLE_4, ("resnet18", "convnext_tiny", "vit_b_16"))
    network = "resnet50" if "resnet50" in networks else networks[0]
    first = Case(network, batch=settings.batch or 0, size=settings.size or 0)
    fast = replace(first, precision="bf16")
    yield from _each(first, network=networks)
    yield from _each(fast, network=networks, captured=(False, True))
    yield from _each(fast, network=networks, channels_last=[True], captured=[True])
    yield from _each(first, precision=["tf32"], network=networks)
    for case in (first, fast):
        yield from _beside(case)
        yield replace(case, fused=True)
    yield from _each(fast, every=(1, 4, 16))
    yield replace(fast, channels_last=True)
    for case in (fast, replace(first, precision="tf32")):
        yield replace(case, compiled=True)
        yield replace(case, captured=True)
    yield from _each(fast, batch=(8, 16, 32, 64, 128, 256))
    yield from _methods(fast, samples=25)
    yield from _each(fast, network=more)
    for network in networks:
        yield from _beside(replace(first, network=network))
    yield from _each(first, precision=("bf16", "tf32", "32"), network=networks, captured=[True])
    yield from _each(first, precision=("bf16", "tf32"), network=networks, compiled=[True])
    yield from _each(first, precision=("32", "tf32"), network=more)
    for precision in ("bf16", "tf32"):
        case = replace(first, precision=precision)
        yield from _each(case, compiled=(False, True), network=(*networks, *more), channels_last=[True])
        yield from _each(case, network=more, compiled=[True])
    yield from _each(first, network=(*networks, *more), compiled=[True])
    yield from _each(first, network=(*networks, *more), channels_last=[True])


def _each(case: Case, **values: Sequence[Any]) -> Iterator[Case]:
    """The case with each combination of values of some fields, the last field changing fastest."""
    for combination in itertools.product(*values.values()):
        yield replace(case, **dict(zip(values, combination, strict=True)))


def _beside(case: Case) -> Iterator[Case]:
    """What the paper's step with saliency may have been, and what its baseline may have been."""
    yield replace(case, plain=True)
    yield replace(case.baseline, originals_only=True)


def _methods(case: Case, samples: int) -> Iterator[Case]:
    for method in TIMED_METHODS:
        yield replace(case, method=method, samples=samples if catalog.METHODS[method].repeats else 0)


def counted(iterations: int, every: int) -> tuple[int, int]:
    """How many iterations a row runs, and how many of the last count: the second half, in whole rounds.

    With a saliency loss in every k-th step, a number that k does not divide would average another mixture.

    >>> counted(200, 1), counted(200, 16), counted(8, 16)
    ((200, 100), (200, 96), (32, 16))
    """
    iterations = max(iterations, 2 * every)
    return iterations, iterations // 2 // every * every
