"""The layer that Grad-CAM looks at: found by name or as the last convolution, with an output (N, C, h, w)."""

import re
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from salnb._common.autograd import nodes_of
from salnb._common.catalog import unknown
from salnb.double_backward.functions import Convolution

__all__ = ["LastConvolution", "OtherLayerError", "Reshape", "check_layout", "check_tokens", "find_layer"]
__all__ += ["OnLastDimension", "convolution_behind", "is_sequence_first", "rearranged"]
__all__ += ["stem_before_attention"]

#: how a layer's output becomes (N, C, h, w); see `grad_cam`
Reshape = str | Callable[[Tensor], Tensor] | None

# modules that hand on the layout they are given, and which transformers apply to tokens
_ANY_LAYOUT = (nn.Identity, nn.Dropout, nn.Softmax, nn.LogSoftmax)

# PyTorch's modules for sequences (N, T, C), or (T, N, C) without `batch_first`
_FOR_SEQUENCES = (
    *(nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder),
    *(nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.MultiheadAttention, nn.RNNBase),
)


class OtherLayerError(ValueError):
    """The last convolution that ran is not the one that was recorded.

    Attributes:
        layer: the one that ran.
    """

    def __init__(self, message: str, layer: nn.Module):
        super().__init__(message)
        self.layer = layer


def find_layer(model: nn.Module, layer: nn.Module | str | None, reshape: Reshape = None) -> nn.Module:
    """The module that is meant; for None, the convolution that is likely to run last.

    Raises:
        TypeError, ValueError: there is no such module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, whose layers can be named, got {type(model).__name__}")
    modules = dict(model.named_modules(remove_duplicate=False))
    if not (reshape is None or callable(reshape)) and reshape not in ("tokens", "channels_last"):
        raise unknown("reshape", reshape, ["tokens", "channels_last", "a function"])
    if layer is None and reshape is not None:
        raise ValueError("reshape is for the output of a layer that is named, got layer=None")
    if isinstance(layer, str):
        if layer not in modules:
            raise unknown("layer", layer, [name for name in modules if name])
        return modules[layer]
    if isinstance(layer, nn.Module):
        if not any(module is layer for module in modules.values()):
            raise ValueError(
                f"layer must be a module of the model, got a {type(layer).__name__} that is not part of it"
            )
        return layer
    if layer is not None:
        raise TypeError(f"layer must be a module, a dotted name or None, got {type(layer).__name__}")
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    if not convolutions:
        raise ValueError("layer=None takes the model's last nn.Conv2d, but the model has none: name a layer")
    return convolutions[-1]


class LastConvolution:
    """A context manager that takes note of the last `nn.Conv2d` that a forward pass of `model` runs.

    Attributes:
        module: that layer; None before one has run.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.module: nn.Module | None = None
        self._output: Tensor | None = None
        self._version = self._thread = 0
        self._stack = ExitStack()

    def __enter__(self) -> "LastConvolution":
        self._thread = threading.get_ident()
        for module in self.model.modules():
            if isinstance(module, nn.Conv2d):
                self._stack.callback(module.register_forward_hook(self._note).remove)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def _note(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if threading.get_ident() == self._thread and torch._C._current_graph_task_id() == -1:
            self.module, self._output, self._version = module, output, output._version

    def untouched(self, *, as_default: bool) -> tuple[nn.Module, Tensor]:
        """The layer and its output, unless what followed has overwritten it.

        Raises:
            OtherLayerError: it has, or `as_default` is false; the message says what to name.
            ValueError: no convolution has run.
        """
        if self.module is None or self._output is None:
            raise ValueError("layer=None takes the last nn.Conv2d that runs, but none does: name a layer")
        if as_default and self._output._version == self._version:
            return self.module, self._output
        raise OtherLayerError(
            "layer=None takes the last nn.Conv2d of the model, but the last that runs is "
            f"{_name(self.model, self.module)}: name it, or another layer",
            self.module,
        )


def convolution_behind(model: nn.Module, scores: Tensor, output: Tensor) -> str | None:
    """What to call a convolution after a layer's `output` that is no `nn.Conv2d`; None if there is none."""
    since = -1 if output.grad_fn is None else output.grad_fn._sequence_nr()
    scripted = any(getattr(module, "original_name", "") == "Conv2d" for module in model.modules())
    for node in nodes_of(scores):
        if node._sequence_nr() <= since:
            continue
        if scripted and "DifferentiableGraph" in node.name():
            return "a convolution in scripted code"
        plain = node.name().startswith("Convolution") and len(node._saved_stride) == 2
        if plain or isinstance(getattr(node, "rule", None), Convolution):
            return "a convolution that is no nn.Conv2d"
    return None


class OnLastDimension:
    """A context manager that takes note of what the modules that work on the last dimension give.

    Attributes:
        shapes: of a module's outputs in the forward pass, as far as they are tensors.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.shapes: dict[nn.Module, set[torch.Size]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "OnLastDimension":
        for module in self.model.modules():
            if isinstance(module, nn.Linear) or _works_on_last(module):
                self._stack.callback(module.register_forward_hook(self._note).remove)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def _note(self, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            self.shapes.setdefault(module, set()).add(output.shape)

    def any_in(self, module: nn.Module, n: int) -> bool:
        """Whether parts of a module work on the last dimension of features, as transformers do.

        What only met (n, K), such as the logits of n images, does not; an `nn.Linear` does that met four
        dimensions.
        """
        for part in module.modules():
            shapes = self.shapes.get(part, set())
            if isinstance(part, nn.Linear):
                if any(len(shape) == 4 for shape in shapes):
                    return True
            elif _works_on_last(part) and not (shapes and all(len(s) == 2 and s[0] == n for s in shapes)):
                return True
        return False


def check_layout(
    model: nn.Module, layer: nn.Module, output: Tensor, images: Tensor, on_last: OnLastDimension | None = None
) -> None:
    """Raise a ValueError unless a layer's output of four dimensions is (N, C, h, w) of these images.

    Channels may come last, as in the stages of Swin transformers, and attention weights have four dimensions
    as well. A layer for images (PyTorch's, and whatever else is called …2d unless parts of it work on the
    last dimension, or its shape is that of channels last) is trusted, unless its ratio of height to width
    tells that its rows are none of the images. Otherwise the shape tells: a feature map has the images' ratio
    of height to width. Where channels could be taken for rows, the modules inside the layer tell, then those
    of the model, by what they met in the pass (`on_last`).
    """
    shape, on_last = tuple(output.shape), on_last or OnLastDimension(model)
    if shape[0] != len(images):
        raise ValueError(
            f"layer must have an output (N, C, h, w) with N = {len(images)}, "
            f"but that of {_name(model, layer)} is {shape}: the model changes the batch before it"
        )
    if shape[2:] == (1, 1):
        raise ValueError("layer must have an output of more than one pixel, got 1×1: choose an earlier layer")
    rows_and_columns = _is_scaled(shape[2:], images.shape[2:])
    rows_first = _is_scaled(shape[1:3], images.shape[2:])
    contradicted = (rows_first and not rows_and_columns) or on_last.any_in(layer, shape[0])
    if _is_for_images(layer) and (isinstance(layer, _ConvNd) or _is_pytorchs(layer) or not contradicted):
        _check_ratio(model, layer, shape[2:], images.shape[2:])
        return
    if rows_first != rows_and_columns:
        fits = rows_and_columns and not (isinstance(layer, _ANY_LAYOUT) and on_last.any_in(model, shape[0]))
    else:
        fits = not on_last.any_in(layer if any(map(_is_for_images, layer.modules())) else model, shape[0])
    if not fits:
        raise ValueError(
            f"layer must have an output (N, C, h, w), but that of {_name(model, layer)}, {shape}, looks "
            "like (N, h, w, C) or attention, or cannot be told from it: pass reshape='channels_last' for "
            "(N, h, w, C), reshape=lambda features: features if it is (N, C, h, w), name a layer whose "
            "output has the channels second, such as a convolution, or let an nn.Dropout2d(0) follow what "
            "permutes it, and name that"
        )


def _check_ratio(model: nn.Module, layer: nn.Module, size: tuple[int, ...], full: tuple[int, ...]) -> None:
    """Raise a ValueError if features are those of images on their side, or a grid of tokens in one line.

    Strides of their own for each dimension, padding and rounding give neither.
    """
    if _is_scaled(size, full):
        return
    grid = _grid(max(size), full[0], full[1], most=0) if min(size) == 1 else None
    if _is_scaled(size[::-1], full):
        found, way = "rows and columns exchanged", "lambda features: features.mT"
    elif grid and min(grid) > 1:
        found, way = "a grid in one line", f"lambda features: features.flatten(2).unflatten(2, {grid})"
    else:
        return
    raise ValueError(
        f"the output of {_name(model, layer)} may have {found}, as its h×w is {size[0]}×{size[1]} for images "
        f"of {full[0]}×{full[1]}: name the layer, with reshape={way} where it has, and otherwise with "
        "reshape=lambda features: features"
    )


def check_tokens(model: nn.Module, layer: nn.Module, output: Tensor, images: Tensor) -> None:
    """Raise a ValueError if a layer's output (N, N, C) may have the tokens first, and not the images."""
    n = len(images)
    if output.shape[:2] == (n, n) and is_sequence_first(model, layer, output, n):
        raise ValueError(
            f"reshape='tokens' is for features (N, 1 + hw, C), and {tuple(output.shape)} may be "
            "(1 + hw, N, C), as the model has a module for sequences without batch_first=True: pass another "
            "number of images, or a function"
        )


def is_sequence_first(model: nn.Module, layer: nn.Module, output: Tensor, n: int) -> bool:
    """Whether a layer's output for n images is (T, N, C), as far as PyTorch's modules for sequences tell.

    What is part of one has its layout. Any other layer has that of the sequences in the model where its
    output has n rows of length n, which nothing else tells apart.
    """
    if _is_pytorchs(layer) and not _is_batch_first(layer):
        return True
    others = [m for m in model.modules() if isinstance(m, _FOR_SEQUENCES) and not _is_batch_first(m)]
    if output.ndim == 3 and output.shape[:2] == (n, n):
        return bool(others)
    return any(part is layer for module in others for part in module.modules())


def _is_batch_first(module: nn.Module) -> bool:
    return next((bool(part.batch_first) for part in module.modules() if hasattr(part, "batch_first")), True)


def rearranged(features: Tensor, reshape: Reshape, images: Tensor) -> Tensor:
    """Features of a layer, or their gradient, as (N, C, h, w); see `grad_cam`.

    Raises:
        ValueError: they are not of the layout that was named, or a function made something else of them.
    """
    n, *size = len(images), *images.shape[2:]
    if callable(reshape):
        found = reshape(features)
        if not isinstance(found, Tensor) or found.ndim != 4 or len(found) != n:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"reshape must give (N, C, h, w) with N = {n}, got {got}")
        return found
    shape = tuple(features.shape)
    if reshape == "channels_last" and len(shape) == 4 and shape[0] == n:
        return features.permute(0, 3, 1, 2)
    if reshape == "tokens" and len(shape) == 3 and shape[0] == n and (grid := _grid(shape[1], *size)):
        # class token and registers come first
        return features[:, shape[1] - grid[0] * grid[1] :].mT.unflatten(2, grid)
    form = "(N, h, w, C)" if reshape == "channels_last" else "(N, 1 + hw, C), h:w as in the images"
    raise ValueError(f"reshape={reshape!r} is for features {form}, got {shape}: pass a function")


def _grid(tokens: int, height: int, width: int, most: int = 8) -> tuple[int, int] | None:
    """Rows and columns of the largest grid with the images' ratio that leaves at most so many tokens over."""
    for extra in range(most + 1):
        rows = round(((tokens - extra) * height / width) ** 0.5) if tokens > extra else 0
        if rows and (tokens - extra) % rows == 0 and rows * width == (tokens - extra) // rows * height:
            return rows, (tokens - extra) // rows
    return None


def stem_before_attention(model: nn.Module) -> str:
    """What to warn of where the last `nn.Conv2d` only cuts the image into patches; "" where it does not."""
    modules = dict(model.named_modules())
    names = list(modules)
    convolutions = [name for name, module in modules.items() if isinstance(module, nn.Conv2d)]
    kinds = {name: type(module).__name__ for name, module in modules.items()}
    attention = [name for name, kind in kinds.items() if re.search("[Aa]ttention(?!.*(2d|Pool))", kind)]
    if not convolutions or not attention or names.index(convolutions[-1]) > names.index(attention[0]):
        return ""
    norms = [name for name in names[: names.index(attention[-1])] if "LayerNorm" in kinds[name]]
    example = f", such as {norms[-1]!r}" if norms else ""
    return (
        f"layer=None takes the last nn.Conv2d, which in this model, {convolutions[-1]!r}, comes before all "
        f"attention: name a later layer{example}, with reshape='tokens' or 'channels_last'"
    )


def _is_for_images(module: nn.Module) -> bool:
    """Whether a module is one for (N, C, h, w): PyTorch's, and what follows its names."""
    return isinstance(module, _ConvNd | nn.GroupNorm) or "2d" in type(module).__name__


def _is_pytorchs(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")


def _works_on_last(module: nn.Module) -> bool:
    """Whether it is one of the parts of transformers that work on the last dimension, or named like one."""
    kinds = (nn.LayerNorm, nn.MultiheadAttention, nn.Softmax)
    named = re.search("RMSNorm|LayerNorm", type(module).__name__)
    return (isinstance(module, kinds) or named is not None) and not _is_for_images(module)


def _is_scaled(size: tuple[int, ...], full: tuple[int, ...]) -> bool:
    """Whether `size` may be that of an image `full`, reduced or enlarged, and rounded, in both dimensions."""
    (low, high), (others_low, others_high) = (
        ((n - 1) / m, (n + 1) / m) for n, m in zip(size, full, strict=True)
    )
    return low < others_high and others_low < high


def _name(model: nn.Module, layer: nn.Module) -> str:
    name = next((name for name, module in model.named_modules() if module is layer), "")
    return f"{name!r} ({type(layer).__name__})"
