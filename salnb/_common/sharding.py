"""Where parameters are spread over several processes, which a gradient inside a forward pass may not see."""

from typing import Any

import torch.distributed as dist
from torch import nn

__all__ = ["in_processes", "sharded_part", "sharding_around", "tensor_parallel"]


def in_processes() -> bool:
    """Whether this process belongs to a group: elsewhere nothing is spread."""
    return dist.is_available() and dist.is_initialized()


def sharded_part(module: nn.Module) -> nn.Module | None:
    """The first module in here, itself included, that FSDP was given; None: there is none."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    parts = module.modules()
    return next((part for part in parts if isinstance(part, FSDPModule | FullyShardedDataParallel)), None)


def sharding_around(module: nn.Module) -> list[Any]:
    """The groups of parameters of what `fully_shard` was given: this module, or one that it is a part of."""
    from torch.distributed import _composable_state

    # a module does not know what it is a part of; here PyTorch finds the state of a module
    known: list[Any] = list(getattr(_composable_state, "_module_state_mapping", [module]))
    sharded = [other for other in known if hasattr(other, "_get_fsdp_state")]
    around = [other for other in sharded if any(part is module for part in other.modules())]
    states = [other._get_fsdp_state() for other in around]
    groups = [  # older versions have one
        getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for state in states
    ]
    return [group for of_state in groups for group in of_state if group is not None]


def tensor_parallel(module: nn.Module) -> str | None:
    """The name of a parameter that is a DTensor, but not of `fully_shard`; None: there is none."""
    from torch.distributed.tensor import DTensor

    spread = {name: p for name, p in module.named_parameters() if isinstance(p, DTensor)}
    if not spread:
        return None
    shards = [shard for group in sharding_around(module) for shard in getattr(group, "fsdp_params", ())]
    owned = {id(getattr(shard, "sharded_param", None)) for shard in shards}
    return next((name for name, p in spread.items() if id(p) not in owned), None)
