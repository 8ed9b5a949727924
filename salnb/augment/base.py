"""The contract of every augmentation: draw, apply, relabel, and find the way back."""

import dataclasses
import inspect
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from salnb._common.checks import (
    as_labels,
    at_least_float32_dtype,
    check_alike,
    check_generator,
    check_images,
    check_mask,
    plain,
)
from salnb.augment.pieces import in_pieces

# what the face of the package shows; the rest serves those who write an augmentation
__all__ = ["Augmentation", "Batch", "Draw", "NotInvertibleError", "Params"]


class NotInvertibleError(RuntimeError):
    """Raised by `inverse` of an augmentation that destroys or mixes what it is given."""


@dataclass(frozen=True)
class Params:
    """What was drawn for one batch, to be saved and replayed: tensors whose first dimension is N.

    Boxes are in pixels, and so for images of the size that they were drawn for, which is not checked.
    """

    def __init_subclass__(cls) -> None:
        """Make each kind of params a pytree, so that it passes through tracers as its tensors."""
        pytree.register_pytree_node(
            cls,
            lambda params: ([getattr(params, field.name) for field in dataclasses.fields(params)], None),
            lambda values, _: cls(*values),
        )

    @property
    def mixed(self) -> bool:
        """Whether these refer to other samples of the batch, so that a part of them has no meaning."""
        return False

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.first)

    def __getitem__(self, some: slice) -> Self:
        """The params of some of the samples, by a slice, a mask or indices.

        Raises:
            TypeError: one number, which is no part of a batch.
            ValueError: the batch was mixed.
        """
        if hasattr(some, "__index__") and not getattr(some, "ndim", 0):
            raise TypeError(f"params have parts by a slice, a mask or indices (N,), got {some!r}")
        if self.mixed:
            raise ValueError(
                f"{type(self).__name__} have no parts, as each image's partner may be anywhere in the batch, "
                f"got {some!r}: draw params for the smaller batch"
            )
        return self.piece(some)

    def piece(self, some: slice) -> Self:
        """The params of some of the samples, also of a mixed batch, of which partners stay indices."""
        return pytree.tree_map(lambda tensor: tensor[some], self)

    @property
    def first(self) -> Tensor:
        """The first tensor of the draw, which stands for all in questions of length and device."""
        return pytree.tree_leaves(self)[0]

    def to(self, device: torch.device | str) -> Self:
        """The same draw on another device."""
        return pytree.tree_map(lambda tensor: tensor.to(device), self)


P = TypeVar("P", bound=Params)


class Draw:
    """Draws for each image of a batch, in float32 or better, and hands the numbers out on the images' device.

    Args:
        images: `(N, C, H, W)`; only their shape, dtype and device are read.
        generator: where the numbers come from; None is torch's global generator of the images' device.
    """

    def __init__(self, images: Tensor, generator: torch.Generator | None) -> None:
        self.samples = len(images)
        self.size = images.shape[-2:]
        self.generator = generator
        self.device = images.device
        self.source = images.device if generator is None else generator.device
        self.dtype = at_least_float32_dtype(images.dtype)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """`(N, *shape)` numbers from [low, high)."""
        unit = torch.rand(
            self.samples, *shape, device=self.source, dtype=self.dtype, generator=self.generator
        )
        return (low + (high - low) * unit).to(self.device)

    def chance(self, p: float) -> Tensor:
        """`(N,)` booleans, each true with probability p."""
        return self.uniform(0, 1) < p

    def integers(self, count: int | Tensor, *shape: int) -> Tensor:
        """`(N, *shape)` whole numbers from 0 to count - 1; count may differ among the samples."""
        # uniform numbers stay below one by more than what their product with count is rounded by
        return (self.uniform(0, 1, *shape) * count).long()

    def dirichlet(self, alpha: float, *shape: int) -> Tensor:
        """`(N, *shape)` weights from Dirichlet(alpha, ..., alpha), which sum to 1 in the last dimension."""
        concentration = torch.full((self.samples, *shape), alpha, device=self.source, dtype=self.dtype)
        return torch._sample_dirichlet(concentration, generator=self.generator).to(self.device)

    def beta(self, alpha: float) -> Tensor:
        """`(N,)` numbers from Beta(alpha, alpha)."""
        return self.dirichlet(alpha, 2)[:, 0]

    def partners(self) -> Tensor:
        """`(N,)` indices: each sample's partner, never itself, each sample partner of exactly one other."""
        order = torch.randperm(self.samples, device=self.source, generator=self.generator).to(self.device)
        return torch.empty_like(order).scatter(0, order, order.roll(1))


def column(values: Tensor, images: Tensor) -> Tensor:
    """Per-sample values `(N,)` in the images' dtype, shaped to act on `(N, C, H, W)`."""
    return values.to(images.dtype)[:, None, None, None]


def everywhere(maps: Tensor) -> Tensor:
    """A mask `(N, 1, H, W)` that is true at every pixel of the maps."""
    return torch.ones_like(maps[:, :1], dtype=torch.bool)


@dataclass
class Batch:
    """An augmented batch, with what is needed to bring saliency maps together.

    Attributes:
        images: `(N, C, H, W)`, augmented.
        targets: `(N,)` labels, `(N, K)` weights, or None where no target was given.
        params: what was drawn.
        augmentation: what was applied.
    """

    images: Tensor
    targets: Tensor | None
    params: Any
    augmentation: "Augmentation"

    def align(self, maps: Tensor, new_maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Both maps in one frame and where they may be compared; see `Augmentation.align`."""
        size, given = tuple(self.images.shape[-2:]), tuple(check_images(maps, name="maps").shape[-2:])
        if given != size:
            raise ValueError(f"maps must have the images' size {size}, got {given}")
        return self.augmentation.align(maps, new_maps, self.params)


class Augmentation(nn.Module, Generic[P]):
    """One augmentation of a batch of images, with its effect on labels and on saliency maps.

    Its methods take `images` `(N, C, H, W)`, a `target` `(N,)` of integer labels or `(N, K)` of class
    weights, maps `(N, 1, H, W)` of originals (`maps`) or of augmented images (`new_maps`), and `params`, what
    was drawn for these N samples. What comes back are plain tensors, of whatever subclass those given are.
    There is no state: what a call did is in its params.

    A subclass draws in `_draw`, changes images in `_transform` and maps in `_carry`, labels in `_relabel`
    if need be; one that can be undone has `_invert` and sets `invertible`. These may rely on arguments that
    were checked.

    Attributes:
        params_class: the kind of params that it draws.
        invertible: whether `inverse` has a way back.
        unit_range: whether images must lie in [0, 1].
        least_samples: how many images it needs.
        piecewise: whether `_transform` treats each image on its own, so that it may get a batch in pieces.
        division: how many times smaller than usual these are, for what does much with each image; 0 is the
            whole batch, for what does little, or goes through the images itself.
    """

    params_class: ClassVar[type[Params]]
    invertible: bool = False
    unit_range: bool = False
    least_samples: int = 1
    piecewise: bool = False
    division: ClassVar[int] = 1

    def make_params(self, images: Tensor, generator: torch.Generator | None = None) -> P:
        """Draw for each image of the batch, of which only shape, dtype and device are read.

        Args:
            images: see above.
            generator: the source of randomness; None is torch's global one.

        Raises:
            ValueError: too few images for an augmentation that mixes them.
        """
        check_images(images)
        check_generator(generator)
        if len(images) < self.least_samples:
            raise ValueError(
                f"{self._get_name()} mixes images and needs at least {self.least_samples}, got {len(images)}"
            )
        return self._draw(Draw(images, generator))

    def images(self, images: Tensor, params: P) -> Tensor:
        """The augmented images: same shape, dtype and device, and differentiable where the operation is."""
        images = check_images(images, unit_range=self.unit_range)
        params = self._checked(params, images, "images")
        if self.piecewise:
            changed = in_pieces(self._transform, images, params, self.division)
        else:
            changed = self._transform(images, params)
        return images.clone() if changed is images else changed

    def targets(self, target: Tensor, params: P, num_classes: int | None = None) -> Tensor:
        """The labels of the augmented images: the target itself, or `(N, K)` weights where images are mixed.

        `num_classes` is K, needed only where labels are mixed and given as integers.
        """
        if not isinstance(target, Tensor):
            raise TypeError(f"target must be a tensor (N,) or (N, K), got {type(target).__name__}")
        params = self._checked(params, target, "target")
        return self._relabel(as_labels(plain(target)), params, num_classes)

    def carry(self, maps: Tensor, params: P, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Push maps of the original images forward: the maps expected of the augmented images.

        `valid`, `(N, 1, H, W)` booleans, says where the maps hold at all; None is everywhere.

        Returns:
            The maps in the new frame, and where in it they hold.
        """
        maps = check_images(maps, name="maps")
        params = self._checked(params, maps, "maps")
        if valid is not None:
            check_mask("valid", valid, maps, "maps")
        carried, valid = self._carry(maps, params, valid if valid is None else plain(valid))
        return carried, everywhere(carried) if valid is None else valid

    def inverse(self, new_maps: Tensor, params: P) -> tuple[Tensor, Tensor]:
        """Pull maps of the augmented images back into the originals' frame.

        Returns:
            The maps in the originals' frame and `valid`, `(N, 1, H, W)`: false wherever the pixel had
            left the frame or would be read from filled-in pixels.

        Raises:
            NotInvertibleError: there is no way back.
        """
        new_maps = check_images(new_maps, name="new_maps")
        return self._invert(new_maps, self._checked(params, new_maps, "new_maps"))

    def align(self, maps: Tensor, new_maps: Tensor, params: P) -> tuple[Tensor, Tensor, Tensor]:
        """Bring the maps of the originals and of the augmented images into one frame.

        In the originals' frame (the new map pulled back) where an inverse exists, else in the new frame (the
        originals' map pushed forward). See the paper's Section 4 and eq. 7.

        Returns:
            The two maps, and `valid` `(N, 1, H, W)`: where they may be compared.
        """
        maps, new_maps = check_images(maps, name="maps"), check_images(new_maps, name="new_maps")
        check_alike("new_maps", new_maps, "maps", maps)
        if self.invertible:
            return maps, *self.inverse(new_maps, params)
        expected, valid = self.carry(maps, params)
        return expected, new_maps, valid

    def forward(
        self,
        images: Tensor,
        target: Tensor | None = None,
        *,
        num_classes: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Batch:
        """Draw, and apply to images and, where there are any, labels; see `make_params` and `targets`."""
        params = self.make_params(images, generator)
        labels = None if target is None else self.targets(target, params, num_classes)
        return Batch(self.images(images, params), labels, params, self)

    def extra_repr(self) -> str:
        """The constructor's arguments as they are in force."""
        arguments = inspect.signature(type(self)).parameters.values()
        names = [argument.name for argument in arguments if argument.kind is argument.POSITIONAL_OR_KEYWORD]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def _draw(self, draw: Draw) -> P:
        raise NotImplementedError

    def _transform(self, images: Tensor, params: P) -> Tensor:
        raise NotImplementedError

    def _relabel(self, target: Tensor, params: P, num_classes: int | None) -> Tensor:
        return target

    def _carry(self, maps: Tensor, params: P, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """`carry`, where None stands for everywhere."""
        raise NotImplementedError

    def _invert(self, new_maps: Tensor, params: P) -> tuple[Tensor, Tensor]:
        raise NotInvertibleError(
            f"{self._get_name()} has no inverse: use align(maps, new_maps, params), which carries the "
            "originals' maps forward with the same operation"
        )

    def _checked(self, params: P, samples: Tensor, name: str) -> P:
        """The params in a form that autograd may save, if they belong to these samples."""
        wanted, given = self.params_class.__name__, type(params).__name__
        if not isinstance(params, self.params_class):
            raise TypeError(f"params of {self._get_name()} must be {wanted}, got {given}")
        if len(params) != len(samples):
            raise ValueError(f"params were drawn for {len(params)} samples, but {name} has {len(samples)}")
        if params.first.device != samples.device:
            raise ValueError(
                f"params are on {params.first.device}, but {name} on {samples.device}: use params.to(device)"
            )
        return params if torch.compiler.is_compiling() else pytree.tree_map(plain, params)
