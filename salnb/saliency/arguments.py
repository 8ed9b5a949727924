"""What saliency methods are called with is checked before anything is computed."""

from torch import Tensor, nn

from salnb._common import catalog
from salnb._common.checks import check_finite, check_images, check_no_transform
from salnb._common.outputs import ModelCall, check_model_kwargs, check_output
from salnb._common.sharding import in_processes, sharded_part, tensor_parallel
from salnb.saliency.isolation import check_usable

__all__ = ["check_arguments"]


def check_arguments(
    model: nn.Module, images: Tensor, call: ModelCall, reduce: str | None, score: str, *, create_graph: bool
) -> None:
    """Check what all saliency methods are called with; see `salnb.saliency.vanilla_gradient`."""
    if not callable(model) or isinstance(model, type):
        raise TypeError(f"model must be an nn.Module, got {model!r}")
    check_output(call.output)
    check_model_kwargs(call.kwargs)
    check_images(images)
    check_no_transform()
    check_usable(model)
    if not isinstance(create_graph, bool):
        raise TypeError(f"create_graph must be True or False, got {create_graph!r}")
    if create_graph:
        _check_whole(model)
    check_finite(images, name="images")
    if reduce not in ("max", None):
        raise ValueError(f"reduce must be 'max' or None, got {reduce!r}")
    if score not in catalog.SCORES:
        raise catalog.unknown("score", score, catalog.SCORES)


def _check_whole(model: nn.Module) -> None:
    """Raise a RuntimeError where parameters are spread, so that a loss on a map fails or lacks gradients."""
    if not in_processes():
        return
    if part := sharded_part(model):
        raise RuntimeError(
            f"create_graph=True: a sharded part of the model, here {type(part).__name__}, frees parameters "
            "that the graph of a map still needs: leave create_graph out, or take "
            "fully_shard(Objective(model, ...))"
        )
    if name := tensor_parallel(model):
        raise RuntimeError(
            f"create_graph=True: {name} is a DTensor, as parallelize_module makes them, which the gradient "
            "of a loss on a map does not reach, without a word: leave create_graph or tensor parallelism out"
        )
