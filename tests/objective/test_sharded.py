"""FSDP around the objective: the mean of the shards' gradients; elsewhere, a clear error."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

from salnb import Objective, saliency
from salnb.augment import HorizontalFlip
from tests.helpers.networks import conv_bn
from tests.helpers.processes import group, in_two
from tests.helpers.tolerances import assert_close

TARGET = torch.tensor([0, 1, 2, 3])
# before, fully_shard asked for streams, which a CPU has not
SHARDED = pytest.mark.skipif(torch.__version__ < (2, 9), reason="fully_shard does not run on a CPU")


def objective_of():
    torch.manual_seed(0)
    return Objective(conv_bn(), HorizontalFlip(1.0), gamma=2.0)


def images(rank):
    return torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(rank))


def gradients(objective, rank):
    objective(images(rank), TARGET).total.backward()
    return [p.grad for p in objective.parameters()]


def shard(kind):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    objective, mesh = objective_of(), init_device_mesh("cpu", (dist.get_world_size(),))
    device = torch.device("cpu")
    if kind == "fully sharded":
        return FullyShardedDataParallel(objective, device_id=device, use_orig_params=True)
    if kind == "fully sharded inside":
        objective.model = FullyShardedDataParallel(objective.model, device_id=device, use_orig_params=True)
        return objective
    if kind == "inside":
        fully_shard(objective.model[0], mesh=mesh)
    if kind == "the model":
        fully_shard(objective.model, mesh=mesh)
        return objective
    fully_shard(objective, mesh=mesh)
    objective.set_reshard_after_backward(kind != "left unsharded")
    return objective


def check_gradients(rank, kind):
    warnings.simplefilter("ignore")
    expected = [
        torch.stack(pair).mean(0)
        for pair in zip(*(gradients(objective_of(), r) for r in range(2)), strict=True)
    ]
    objective = shard(kind)
    found = gradients(objective, rank)
    if kind == "fully sharded":
        with type(objective).summon_full_params(objective, with_grads=True):
            found = [p.grad.clone() for p in objective.parameters()]
    else:
        found = [g.full_tensor() for g in found]
    for a, b in zip(found, expected, strict=True):
        if b.abs().max() > 1e-6:
            assert_close(a, b, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param("whole", marks=SHARDED), "fully sharded"])
def test_the_objective_as_a_whole(kind, tmp_path):
    in_two(tmp_path, check_gradients, kind)


@pytest.fixture
def alone(tmp_path):
    """A group of one process."""
    with group(tmp_path):
        yield


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "left unsharded",
            r"set_reshard_after_backward\(False\) leaves parameters whose .grad is None",
        ),
        ("inside", "a sharded part of the objective, here FSDPConv2d"),
        ("the model", "a sharded part of the objective, here FSDPSequential"),
        ("fully sharded inside", "a sharded part of the objective, here FullyShardedDataParallel"),
    ],
)
@pytest.mark.usefixtures("alone")
@pytest.mark.filterwarnings("ignore")
@SHARDED
def test_what_would_lose_gradients_is_refused(kind, message):
    objective = shard(kind)
    with pytest.raises(
        RuntimeError, match=rf"{message}.*shard the objective as a whole, fully_shard\(Objective"
    ):
        objective(images(0), TARGET)
    objective.gamma = 0.0
    objective(images(0), TARGET).total.backward()  # plain training goes on


class Wrapped(nn.Module):
    """A module around the objective, as Lightning has it."""

    def __init__(self, objective):
        super().__init__()
        self.objective = objective

    def forward(self, x):
        return self.objective(x, TARGET)


def wrapped(**options):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    return fully_shard(
        Wrapped(Objective(conv_bn(), HorizontalFlip(1.0), **options)),
        mesh=init_device_mesh("cpu", (1,)),
    )


@pytest.mark.usefixtures("alone")
@pytest.mark.filterwarnings("ignore")
@SHARDED
def test_a_sharded_module_around_the_objective():
    outer = wrapped(gamma=2.0)
    outer(images(0)).total.backward()
    for p, expected in zip(outer.parameters(), gradients(objective_of(), 0), strict=True):
        assert_close(p.grad.full_tensor(), expected, 1e-5)
    outer.set_reshard_after_backward(False)
    with pytest.raises(RuntimeError, match=r"set_reshard_after_backward\(False\) leaves parameters"):
        outer(images(0))
    with pytest.raises(RuntimeError, match="balance compares the lengths of whole gradients"):
        wrapped(balance=0.5)(images(0))


@pytest.mark.usefixtures("alone")
def test_tensor_parallel_is_refused():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    objective, expected = objective_of(), objective_of()
    plan = {"8": ColwiseParallel(output_layouts=Replicate())}
    parallelize_module(objective.model, init_device_mesh("cpu", (1,)), plan)
    with pytest.raises(RuntimeError, match=r"model\.8\.weight is a DTensor, .* leave tensor parallelism out"):
        objective(images(0), TARGET)
    with pytest.raises(RuntimeError, match=r"create_graph=True: 8\.weight is a DTensor"):
        saliency.vanilla_gradient(objective.model, images(0), TARGET, create_graph=True)
    saliency.vanilla_gradient(objective.model, images(0), TARGET)
    objective.gamma = expected.gamma = 0.0
    gradients(expected, 0)
    gradients(objective, 0)  # plain training goes on
    for p, q in zip(objective.parameters(), expected.parameters(), strict=True):
        assert_close(p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad, q.grad)


@pytest.mark.usefixtures("alone")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["vanilla_gradient", "grad_cam", "smoothgrad"])
@SHARDED
def test_maps_of_a_sharded_model(method):
    model, whole, x = shard("the model").model.eval(), objective_of().model.eval(), images(0)
    options = {"noise_level": 0.0} if method == "smoothgrad" else {}
    explain = saliency.METHODS[method]
    assert_close(explain(model, x, TARGET, **options), explain(whole, x, TARGET, **options))
    with pytest.raises(
        RuntimeError, match=r"create_graph=True: a sharded part .*, here FSDPSequential, frees"
    ):
        explain(model, x, TARGET, create_graph=True)


class Devices(nn.DataParallel):
    def __init__(self, module, devices):
        super().__init__(module)
        self.device_ids = devices


def test_data_parallel():
    with pytest.raises(
        TypeError, match=r"model must not hold an nn.DataParallel on 2 devices, .* take its .module"
    ):
        Objective(nn.Sequential(Devices(conv_bn(), [0, 1])), HorizontalFlip())
    Objective(nn.DataParallel(conv_bn().cpu()), HorizontalFlip())
