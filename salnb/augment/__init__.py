"""Augmentations that know their way back (Section 3.1 of the paper).

Each draws per sample, changes images and labels, and brings the saliency maps of both images into one frame.
"""

from collections.abc import Callable

from salnb.augment.augmix import AugMix, AugMixParams
from salnb.augment.base import Augmentation, Batch, NotInvertibleError, Params
from salnb.augment.geometric import (
    Affine,
    AffineParams,
    CropParams,
    FlipParams,
    HorizontalFlip,
    Rescale,
    ResizedCrop,
    Rotation,
    VerticalFlip,
)
from salnb.augment.mixing import CutMix, CutMixParams, CutOut, CutOutParams, MixUp, MixUpParams
from salnb.augment.photometric import (
    ColorJitter,
    Contrast,
    ContrastParams,
    Grayscale,
    GrayscaleParams,
    Identity,
    IdentityParams,
    JitterParams,
)
from salnb.augment.sequential import Combined, Sequential, SequentialParams, SimCLR

AUGMENTATIONS: dict[str, Callable[[], Augmentation]] = {
    "identity": Identity,
    "horizontal_flip": HorizontalFlip,
    "vertical_flip": VerticalFlip,
    "rescale": Rescale,
    "rotation": Rotation,
    "affine": Affine,
    "contrast": Contrast,
    "combined": Combined,
    "color_jitter": ColorJitter,
    "resized_crop": ResizedCrop,
    "simclr": SimCLR,
    "cutout": CutOut,
    "mixup": MixUp,
    "cutmix": CutMix,
    "augmix": AugMix,
}

__all__ = [
    "AUGMENTATIONS",
    "Affine",
    "AffineParams",
    "AugMix",
    "AugMixParams",
    "Augmentation",
    "Batch",
    "ColorJitter",
    "Combined",
    "Contrast",
    "ContrastParams",
    "CropParams",
    "CutMix",
    "CutMixParams",
    "CutOut",
    "CutOutParams",
    "FlipParams",
    "Grayscale",
    "GrayscaleParams",
    "HorizontalFlip",
    "Identity",
    "IdentityParams",
    "JitterParams",
    "MixUp",
    "MixUpParams",
    "NotInvertibleError",
    "Params",
    "Rescale",
    "ResizedCrop",
    "Rotation",
    "Sequential",
    "SequentialParams",
    "SimCLR",
    "VerticalFlip",
]
