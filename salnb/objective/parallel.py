"""Which wrappers for several devices an objective with the saliency term can be in."""

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from salnb._common.sharding import in_processes, sharded_part, sharding_around, tensor_parallel

__all__ = ["check_parallel", "check_unwrapped", "sharing_processes"]

_SHARDING = "shard the objective as a whole, fully_shard(Objective(model, ...)), and leave resharding on"


def check_unwrapped(model: nn.Module) -> None:
    """Raise a TypeError if what should be around the objective is around its model."""
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            raise TypeError(
                "model must not be wrapped in DistributedDataParallel: wrap the objective, "
                "DistributedDataParallel(Objective(model, ...))"
            )


def sharing_processes() -> tuple[str, int] | None:
    """Name and number of the processes that share a step in `DistributedDataParallel`; None elsewhere."""
    wrapper = DistributedDataParallel._active_ddp_module
    return None if wrapper is None else (wrapper.process_group.group_name, wrapper.process_group.size())


def check_parallel(objective: nn.Module, *, training: bool, balanced: bool = False) -> None:
    """Raise a RuntimeError where gradients would be wrong, or missing, without a word.

    The saliency term differentiates inside the forward pass, which some wrappers take for the backward pass.
    """
    if training and any(isinstance(module, nn.SyncBatchNorm) for module in objective.modules()):
        raise RuntimeError(
            "nn.SyncBatchNorm has no second derivative, which the saliency term needs: "
            "use nn.BatchNorm2d, or gamma=0"
        )
    if not in_processes():
        return
    wrapper = DistributedDataParallel._active_ddp_module
    if wrapper is not None and wrapper.static_graph:
        raise RuntimeError(
            "DistributedDataParallel(static_graph=True) would skip the averaging of gradients without a "
            "word, as the saliency term differentiates inside the forward pass: leave static_graph out"
        )
    for module in objective.children():
        if part := sharded_part(module):
            raise RuntimeError(
                f"a sharded part of the objective, here {type(part).__name__}, frees parameters that the "
                f"gradient inside the forward pass still needs: {_SHARDING}, or use gamma=0"
            )
    if name := tensor_parallel(objective):
        raise RuntimeError(
            f"{name} is a DTensor, as parallelize_module makes them, which the second derivative that the "
            "saliency term needs does not reach, without a word: leave tensor parallelism out, or use gamma=0"
        )
    around = sharding_around(objective)
    if around and balanced:
        raise RuntimeError(
            "balance compares the lengths of whole gradients, of which each process has a shard here: use "
            "DistributedDataParallel(Objective(model, ...)), or a fixed gamma with balance=0"
        )
    if not all(getattr(group, "reshard_after_backward", True) for group in around):
        raise RuntimeError(
            "set_reshard_after_backward(False) leaves parameters whose .grad is None, as the gradients "
            f"are those of the shards, which nothing looks at then: {_SHARDING}"
        )
