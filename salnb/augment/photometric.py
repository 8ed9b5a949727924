"""Augmentations that change colours and leave every pixel, and so the map, where it is (Section 3.1).

Images hold values in [0, 1] and one (grey) or three (red, green, blue) channels. The kernels are
torchvision's `adjust_*` with a factor for each sample.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from salnb._common.limits import check_number, check_range
from salnb.augment.base import Augmentation, Draw, P, Params, column, everywhere
from salnb.augment.pieces import apply_where, are_large

__all__ = ["ColorJitter", "Contrast", "Grayscale", "Identity", "Photometric"]
__all__ += ["ContrastParams", "GrayscaleParams", "IdentityParams", "JitterParams"]

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


@dataclass(frozen=True)
class IdentityParams(Params):
    """Nothing was drawn: `(N, 0)`, for its length."""

    nothing: Tensor


@dataclass(frozen=True)
class ContrastParams(Params):
    """The contrast factor of each image, `(N,)`; 1 leaves it as it is."""

    factor: Tensor


@dataclass(frozen=True)
class GrayscaleParams(Params):
    """Which images lose their colour: `(N,)` booleans."""

    gray: Tensor


@dataclass(frozen=True)
class JitterParams(Params):
    """The colour changes of each image and their order.

    Attributes:
        factors: `(N, 3)`, for brightness, contrast and saturation; 1 leaves the image as it is.
        hue: `(N,)`, in turns of the colour wheel.
        order: `(N, 4)`, a permutation of 0 to 3: brightness, contrast, saturation, hue.
    """

    factors: Tensor
    hue: Tensor
    order: Tensor


def check_channels(images: Tensor) -> None:
    """Check that the images are grey or red, green and blue."""
    if images.shape[1] not in (1, 3):
        raise ValueError(f"images must have 1 (grey) or 3 (red, green, blue) channels, got {images.shape[1]}")


def luminance(images: Tensor) -> Tensor:
    """The grey image `(N, 1, H, W)` of a colour image: ITU-R 601 with torchvision's rounded weights."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.split(1, 1)
    return (red * 0.2989).add(green, alpha=0.587).add(blue, alpha=0.114)


def blend(reference: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """Move images away from (factor `(N,)` > 1) or towards (< 1) a reference, and clip to [0, 1]."""
    weight = column(factor, images)
    return torch.addcmul(reference * (1 - weight), images, weight).clamp(0, 1)


def adjust_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue of each pixel by `turn` `(N,)` turns of the colour wheel, value and saturation kept.

    Works on the hexagon directly: a colour is its lowest channel plus its chroma times a profile of the hue
    that is 1 over two sextants, 0 over two others and linear in between, shifted by a third for each channel.
    """
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(1)
    high, low = images.amax(1), images.amin(1)
    chroma = high - low
    divisor = chroma.where(chroma > 0, 1)  # grey has no hue, and whatever it gets is multiplied by zero
    from_green_or_blue = torch.where(high == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor)
    sextant = torch.where(high == red, (green - blue) / divisor, from_green_or_blue)
    sextant = (sextant + 6 * turn.to(images.dtype)[:, None, None]).remainder(6)
    profiles = [(sextant - 3).abs() - 1, 2 - (sextant - 2).abs(), 2 - (sextant - 4).abs()]
    return torch.stack([torch.addcmul(low, chroma, profile.clamp(0, 1)) for profile in profiles], 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Change the contrast of each image by a factor `(N,)`, about the mean of all pixels' luminance."""
    mean = luminance(images.mean((-2, -1), keepdim=True))
    return blend(mean, images, factor)


class Photometric(Augmentation[P]):
    """An augmentation that moves nothing: maps of both images are compared as they are."""

    invertible = True

    def _carry(self, maps: Tensor, params: P, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return maps, valid

    def _invert(self, new_maps: Tensor, params: P) -> tuple[Tensor, Tensor]:
        return new_maps, everywhere(new_maps)


class Identity(Photometric[IdentityParams]):
    """Nothing happens: the reference that the others are measured against."""

    params_class = IdentityParams

    def _draw(self, draw: Draw) -> IdentityParams:
        return IdentityParams(torch.empty(draw.samples, 0, dtype=torch.float32, device=draw.device))

    def _transform(self, images: Tensor, params: IdentityParams) -> Tensor:
        return images


class Contrast(Photometric[ContrastParams]):
    """Change the contrast of each image with probability p.

    Args:
        factor: range of the factor; 1 leaves the image as it is, 0 makes it uniformly grey.
        p: in [0, 1].
    """

    params_class = ContrastParams
    unit_range = True
    piecewise = True
    division = 0

    def __init__(self, factor: tuple[float, float] = (0.5, 1.5), p: float = 0.5) -> None:
        super().__init__()
        self.factor = check_range("factor", factor, 0, 1000)
        self.p = check_number("p", p, 0, 1)

    def _draw(self, draw: Draw) -> ContrastParams:
        factor = draw.uniform(*self.factor)
        return ContrastParams(torch.where(draw.chance(self.p), factor, 1))

    def _transform(self, images: Tensor, params: ContrastParams) -> Tensor:
        check_channels(images)
        if are_large(images):
            return apply_where(params.factor != 1, adjust_contrast, images, params.factor)
        return adjust_contrast(images, params.factor)


class ColorJitter(Photometric[JitterParams]):
    """Change brightness, contrast, saturation and hue of each image, in a random order of its own.

    Brightness, contrast and saturation are one blend with different references (black, the mean luminance,
    the luminance of the pixel), so that one pass at each place of the order serves all samples.

    Args:
        brightness: range of the factor; one number b means from max(0, 1 - b) to 1 + b.
        contrast: likewise.
        saturation: likewise.
        hue: range of the shift in turns of the colour wheel, within [-0.5, 0.5]; one number h means
            from -h to h.
        p: probability that an image is changed at all.
    """

    params_class = JitterParams
    unit_range = True
    piecewise = True

    def __init__(
        self,
        brightness: float | tuple[float, float] = 0.4,
        contrast: float | tuple[float, float] = 0.4,
        saturation: float | tuple[float, float] = 0.4,
        hue: float | tuple[float, float] = 0.1,
        p: float = 1.0,
    ) -> None:
        super().__init__()
        self.brightness = check_range("brightness", brightness, 0, 1000, about=1)
        self.contrast = check_range("contrast", contrast, 0, 1000, about=1)
        self.saturation = check_range("saturation", saturation, 0, 1000, about=1)
        self.hue = check_range("hue", hue, -0.5, 0.5, about=0)
        self.p = check_number("p", p, 0, 1)

    def _draw(self, draw: Draw) -> JitterParams:
        ranges = (self.brightness, self.contrast, self.saturation)
        factors = torch.stack([draw.uniform(*span) for span in ranges], -1)
        changed = draw.chance(self.p)
        return JitterParams(
            factors=torch.where(changed[:, None], factors, 1),
            hue=torch.where(changed, draw.uniform(*self.hue), 0),
            order=draw.uniform(0, 1, 4).argsort(-1),
        )

    def _transform(self, images: Tensor, params: JitterParams) -> Tensor:
        check_channels(images)
        # hue's place in the order is a blend with factor 1, which changes nothing
        factors = torch.cat([params.factors, torch.ones_like(params.factors[:, :1])], -1)
        for place in params.order.unbind(-1):
            gray = luminance(images)
            mean = gray.mean((-2, -1), keepdim=True)
            reference = gray * column(place == SATURATION, images) + mean * column(place == CONTRAST, images)
            images = blend(reference, images, factors.gather(-1, place[:, None])[:, 0])
            images = apply_where(place == HUE, adjust_hue, images, params.hue)
        return images


class Grayscale(Photometric[GrayscaleParams]):
    """Take the colour out of each image with probability p; it keeps its channels."""

    params_class = GrayscaleParams
    piecewise = True
    division = 0

    def __init__(self, p: float = 0.2) -> None:
        super().__init__()
        self.p = check_number("p", p, 0, 1)

    def _draw(self, draw: Draw) -> GrayscaleParams:
        return GrayscaleParams(draw.chance(self.p))

    def _transform(self, images: Tensor, params: GrayscaleParams) -> Tensor:
        check_channels(images)
        return apply_where(params.gray, lambda chosen: luminance(chosen).expand_as(chosen), images)
