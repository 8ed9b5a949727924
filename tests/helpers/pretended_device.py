"""A device that no machine has, whose tensors have no values: what a GPU would refuse or wait for is seen here.

PyTorch lets a device be registered that has no kernels. Its tensors are fake ones: each operation finds out
shape, type and device of its result, refuses tensors of two devices, and computes nothing. To bring a number
from the host to the device, or back, takes a kernel, and is an error.

It stays registered, so this is for a process of its own.
"""

import traceback
import warnings
from functools import partial
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils import backend_registration

from salnb import Objective, losses, saliency
from salnb._common import checks
from salnb.augment import AUGMENTATIONS
from tests.helpers.methods import cheap
from tests.helpers.networks import conv_bn

NAME = "pretended"
TARGET = torch.tensor([0, 1, 2, 3])


def register():
    """The mode for its tensors, and a function that moves a tensor or a module there."""
    backend_registration._setup_privateuseone_for_python_backend(NAME)
    getattr(torch, NAME).get_amp_supported_dtype = lambda: [torch.float16]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    device = torch.device(NAME, 0)

    def moved(tensor):
        return FakeTensor(mode, torch.empty_like(tensor, device="meta"), device)

    def move(thing):
        if not isinstance(thing, nn.Module):
            return pytree.tree_map(moved, thing)
        for module in thing.modules():
            for name, tensor in module._parameters.items():
                module._parameters[name] = nn.Parameter(moved(tensor.detach()))
            for name, tensor in module._buffers.items():
                module._buffers[name] = moved(tensor)
        return thing

    return mode, move


def cases(move):
    """Name and function of all that is to be done there; the functions are called in the mode."""
    for method in saliency.METHODS:
        model, x, target = move(conv_bn()), move(torch.rand(4, 3, 8, 8)), move(TARGET)
        yield (
            f"map: {method}",
            lambda method=method, model=model, x=x, target=target: (
                saliency.METHODS[method](model, x, target, create_graph=True, **cheap(method))
                .sum()
                .backward()
            ),
        )
    for name, make in AUGMENTATIONS.items():
        for dtype in (torch.float32, torch.float16):
            for generator in (torch.Generator(), None):
                if generator is None and name in ("mixup", "cutmix", "augmix"):
                    continue  # fake tensors cannot be drawn from a Dirichlet distribution
                objective = move(Objective(conv_bn().to(dtype), make(), beta=0.5, layers=["0"]))
                x, target = move(torch.rand(4, 3, 8, 8).to(dtype)), move(TARGET)
                yield (
                    f"steps: {name}, {dtype}, {generator and 'generator of the CPU'}",
                    partial(two_steps, objective, x, target, generator),
                )
    others = {
        "confidence": 0.1,
        "balance": 0.5,
        "shuffle_pairs": True,
        "score": "log_prob",
        "layer_relative": True,
    }
    for name, value in others.items():
        objective = move(
            Objective(conv_bn(), AUGMENTATIONS["affine"](), beta=0.5, layers=["0"], **{name: value})
        )
        x, target = move(torch.rand(4, 3, 8, 8)), move(TARGET)
        yield f"steps: {name}", partial(two_steps, objective, x, target)
    for normalize in losses.NORMALIZATIONS:
        for distance in losses.DISTANCES:
            maps, valid = (
                move(torch.rand(2, 4, 1, 8, 8)).requires_grad_(),
                move(torch.ones(4, 1, 8, 8).bool()),
            )
            yield (
                f"loss: {normalize}, {distance}",
                (
                    lambda maps=maps, valid=valid, normalize=normalize, distance=distance: (
                        losses.saliency_loss(*maps, valid, normalize=normalize, distance=distance).backward()
                    )
                ),
            )


def two_steps(objective, *batch):
    """In the first of which a GPU may be waited for, to see whether the target is one."""
    objective(*batch).total.backward()
    with mock.patch.object(checks, "is_traced", return_value=False):
        objective(*batch).total.backward()


def report(log):
    """Do all there; gives a line for each failure and a last one, which counts."""
    warnings.simplefilter("ignore")
    mode, move = register()
    done, failures = 0, []
    for name, function in cases(move):
        try:
            with mode:
                function()
            done += 1
        except Exception as error:
            ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "salnb" in frame.filename]
            reason = str(error).partition("\n")[0][:150]
            failures.append(
                f"{name}: {type(error).__name__}: {reason}\n  {ours[-1].filename}:{ours[-1].lineno}: {ours[-1].line}"
            )
    return "\n".join([*failures, f"{done} done, {len(failures)} failed"])
