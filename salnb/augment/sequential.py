"""Augmentations one after another, and those of the paper that are made of others."""

from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import Tensor, nn

from salnb._common.limits import check_number
from salnb.augment.base import Augmentation, Draw, Params, everywhere
from salnb.augment.geometric import (
    Affine,
    Geometric,
    HorizontalFlip,
    ResizedCrop,
    VerticalFlip,
    move,
    pull_back,
    push_forward,
)
from salnb.augment.photometric import ColorJitter, Contrast, Grayscale
from salnb.augment.pieces import in_pieces

__all__ = ["Combined", "Sequential", "SequentialParams", "SimCLR"]


@dataclass(frozen=True)
class SequentialParams(Params):
    """The params of each step, first to last."""

    steps: tuple[Any, ...]

    @property
    def mixed(self) -> bool:
        """See `Params.mixed`."""
        return any(step.mixed for step in self.steps)


class Sequential(Augmentation[SequentialParams]):
    """Augmentations one after another.

    Geometric steps in a row are one matrix and one resampling, flips alone none. Steps of another kind
    between them see the images as they then are, so the images are resampled once for each run of geometric
    steps; maps on their way back are resampled once in any case.

    Args:
        *augmentations: first to last; one that has no inverse makes the whole have none.
    """

    params_class = SequentialParams
    steps: Any  # an nn.ModuleList, whose items type checkers take for bare modules

    def __init__(self, *augmentations: Augmentation) -> None:
        super().__init__()
        if not augmentations:
            raise ValueError("Sequential needs at least one augmentation, got none")
        for step in augmentations:
            if not isinstance(step, Augmentation):
                raise TypeError(f"augmentations must be salnb augmentations, got {type(step).__name__}")
        self.steps = nn.ModuleList(augmentations)
        self.invertible = all(step.invertible for step in augmentations)
        self.unit_range = any(step.unit_range for step in augmentations)
        self.least_samples = max(step.least_samples for step in augmentations)
        self.piecewise = all(step.piecewise for step in augmentations)

    def extra_repr(self) -> str:
        """Nothing: the steps are printed as submodules."""
        return ""

    def _draw(self, draw: Draw) -> SequentialParams:
        return SequentialParams(tuple(step._draw(draw) for step in self.steps))

    def _transform(self, images: Tensor, params: SequentialParams) -> Tensor:
        for geometric, steps in self._runs(params):
            if geometric:
                images = move(images, steps)
            else:
                for step, drawn in steps:
                    images = step._transform(images, drawn)
        return images

    def _carry(
        self, maps: Tensor, params: SequentialParams, valid: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        for geometric, steps in self._runs(params):
            if geometric:
                maps, valid = push_forward(maps, steps, valid)
            else:
                for step, drawn in steps:
                    maps, valid = step._carry(maps, drawn, valid)
        return maps, valid

    def _relabel(self, target: Tensor, params: SequentialParams, num_classes: int | None) -> Tensor:
        for step, drawn in zip(self.steps, params.steps, strict=True):
            target = step._relabel(target, drawn, num_classes)
        return target

    def _invert(self, new_maps: Tensor, params: SequentialParams) -> tuple[Tensor, Tensor]:
        for step, drawn in self._flat(params):
            if not step.invertible:
                step._invert(new_maps, drawn)  # raises, and says what has no inverse
        return in_pieces(self._pull_back, new_maps, params)

    def _checked(self, params: SequentialParams, samples: Tensor, name: str) -> SequentialParams:
        if isinstance(params, SequentialParams) and len(params.steps) != len(self.steps):
            raise ValueError(
                f"params of {self._get_name()} must have one for each of its {len(self.steps)} steps, "
                f"got {len(params.steps)}"
            )
        params = super()._checked(params, samples, name)
        pairs = zip(self.steps, params.steps, strict=True)
        return SequentialParams(tuple(step._checked(drawn, samples, name) for step, drawn in pairs))

    def _pull_back(self, new_maps: Tensor, params: SequentialParams) -> tuple[Tensor, Tensor]:
        groups = [steps for geometric, steps in self._runs(params) if geometric]
        return pull_back(new_maps, groups) if groups else (new_maps, everywhere(new_maps))

    def _flat(self, params: SequentialParams) -> list[tuple[Augmentation, Params]]:
        """Every step with its params, nested sequences taken apart."""
        flat: list[tuple[Augmentation, Params]] = []
        for step, drawn in zip(self.steps, params.steps, strict=True):
            flat += step._flat(drawn) if isinstance(step, Sequential) else [(step, drawn)]
        return flat

    def _runs(self, params: SequentialParams) -> list[tuple[bool, list[Any]]]:
        """The steps in runs, each of geometric ones only (True) or of others only."""
        runs = groupby(self._flat(params), key=lambda pair: isinstance(pair[0], Geometric))
        return [(geometric, list(steps)) for geometric, steps in runs]


class Combined(Sequential):
    """All single-image augmentations of Table 1 in a row: both flips, an affine movement, contrast.

    The paper names the combination without listing its parts; these are the methods that stand before it.
    """

    def __init__(self) -> None:
        super().__init__(HorizontalFlip(), VerticalFlip(), Affine(), Contrast())


class SimCLR(Sequential):
    """Crop and resize, flip, colour jitter and loss of colour (Table 2; arXiv 2002.05709, Appendix A).

    Args:
        strength: of the colour jitter; the SimCLR paper takes 1 for ImageNet and 0.5 for CIFAR-10.
        scale: range of the crop's area, as a fraction of the image's.
    """

    def __init__(self, strength: float = 0.5, scale: tuple[float, float] = (0.08, 1.0)) -> None:
        check_number("strength", strength, 0, 2.5)
        super().__init__(
            ResizedCrop(scale),
            HorizontalFlip(),
            ColorJitter(0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength, p=0.8),
            Grayscale(),
        )
