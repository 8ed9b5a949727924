"""`Objective.compile()`: a whole step, the parameters' gradients included, as one compiled graph.

PyTorch's compiler does not differentiate a compiled function twice. So the step is run once, eagerly and on
fake tensors, with everything in it that differentiates: the gradient that makes the maps, and the gradient of
the total with respect to the parameters. `make_fx` writes down the operators that this takes; that list needs
no differentiation any more, and any compiler can have it.

What a step changes besides is handed in and out: running statistics are copied before they are updated, and
the copies returned. Random numbers (dropout, SmoothGrad) are drawn by operators of the graph, anew in each
call.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.autograd.function import once_differentiable
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils import _pytree as pytree

from salnb._checks import check_labels

if TYPE_CHECKING:
    from salnb.objective import Losses, Objective


class CompiledStep:
    """Runs steps of an objective as compiled graphs, one for each kind of step that it meets.

    A graph holds for the shapes, types and strides of the batch, the settings of the objective, which of its
    weights are zero (`every` and `warmup` make two kinds of steps), which parameters are trained, which
    modules are in train mode, and autocast. Where one of these is new, a graph is traced and compiled.

    Args:
        **options: for `torch.compile`.
    """

    def __init__(self, **options: Any):
        self.options = options
        self._graphs: dict[Hashable, _Graph] = {}
        self._scale: LossScale | None = None

    def __reduce__(self) -> tuple:
        """A copy compiles for itself."""
        return partial(CompiledStep, **self.options), ()

    def __call__(
        self,
        objective: Objective,
        images: Tensor,
        new_images: Tensor,
        target: Tensor,
        params: Any,
        gamma: float,
    ) -> tuple[Tensor, ...]:
        """The fields of what `objective.losses` returns; the first can be called `backward()` on."""
        if images.requires_grad:
            raise ValueError(
                "images must not require a gradient after compile(): only the parameters' are computed"
            )
        drawn, spec = pytree.tree_flatten(params)
        batch = [images, new_images, target, *drawn]
        parameters = [p for p in objective.parameters() if p.requires_grad]
        state = dict(objective.named_parameters()) | dict(objective.named_buffers())
        tensors = [*batch, *(tensor.detach() for tensor in state.values())]
        half = _autocast(images) is torch.float16
        if half and self._scale is None:
            self._scale = LossScale(images.device)
        # written by the device itself, which a copy from the host would have to wait for
        number = partial(torch.full, (), device=images.device)
        dtype = torch.promote_types(images.dtype, torch.float32)
        weights = [number(weight, dtype=dtype) for weight in (objective.alpha, objective.beta, gamma)]
        scale = self._scale.value if half and self._scale else number(1.0, dtype=dtype)

        kind = _kind(objective, batch, spec, gamma)
        if kind not in self._graphs:
            step = _Step(objective, spec, gamma, [*state], len(batch), half)
            self._graphs[kind] = _compile(step, [*weights, scale, *tensors], self.options)
        graph = self._graphs[kind]
        check_labels(target, graph.num_classes)

        # all casts are in the graph
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            values, gradients, buffers, finite = pytree.tree_unflatten(
                graph.run(*weights, scale, *tensors), graph.outputs
            )
            for name, value in buffers.items():
                state[name].copy_(value)
            if self._scale and half:
                self._scale.update(finite)
        total = _HandOut.apply(values[0], gradients, *parameters)
        return total, *values[1:]


class _Graph(NamedTuple):
    """A compiled step."""

    run: Callable  # of a flat list of tensors, to another
    outputs: pytree.TreeSpec  # the structure of what it returns
    num_classes: int


class _Step(nn.Module):
    """One step as a function of tensors, to be traced."""

    def __init__(
        self,
        objective: Objective,
        spec: pytree.TreeSpec,
        gamma: float,
        names: list[str],
        batch_length: int,
        scaled: bool,
    ):
        super().__init__()
        self.objective = objective
        self.spec, self.gamma, self.names = spec, gamma, names
        self.batch_length, self.scaled = batch_length, scaled

    def forward(self, *batch: Tensor) -> Losses:
        """The losses of a batch, with whatever parameters and buffers the module has just then."""
        images, new_images, target, *drawn = batch
        params = pytree.tree_unflatten(drawn, self.spec)
        return self.objective.losses(images, new_images, target, params, self.gamma)

    def differentiate(self, *tensors: Tensor) -> list[Tensor | None]:
        """Values, gradients, updated buffers and whether the gradients are finite, in a flat list."""
        *weights, scale = tensors[:4]
        batch, values = tensors[4 : 4 + self.batch_length], tensors[4 + self.batch_length :]
        parameters = dict(self.objective.named_parameters())
        state = {}
        for name, value in zip(self.names, values, strict=True):
            if name in parameters:
                state[f"objective.{name}"] = value.detach().requires_grad_(parameters[name].requires_grad)
            else:
                state[f"objective.{name}"] = value.clone()
        trained = [tensor for tensor in state.values() if tensor.requires_grad]
        losses = torch.func.functional_call(self, state, batch)

        terms = (losses.class_loss, losses.invariance_loss, losses.saliency_loss)
        total = sum(weight * term for weight, term in zip(weights, terms, strict=True))
        gradients: list[Tensor | None] = [*torch.autograd.grad(total * scale, trained, allow_unused=True)]
        finite = None
        if self.scaled:
            gradients = [None if g is None else g / scale for g in gradients]
            finite = torch.stack([g.isfinite().all() for g in gradients if g is not None]).all()
        training = any(module.training for module in self.objective.modules())
        buffers = {
            name: state[f"objective.{name}"] for name in self.names if training and name not in parameters
        }
        results = [result.detach() for result in (total, *terms, losses.logits)]
        # what the caller of make_fx gets to see is a flat list only
        self.num_classes = losses.logits.shape[1]
        flat, self.outputs = pytree.tree_flatten((results, gradients, buffers, finite))
        return flat


def _compile(step: _Step, tensors: list[Tensor], options: dict[str, Any]) -> _Graph:
    """Trace a step and hand it to the compiler."""
    try:
        # one thread: the modes that trace and that swap functions belong to it
        with torch.enable_grad(), torch.autograd.set_multithreading_enabled(False):
            graph = make_fx(step.differentiate, tracing_mode="fake", _allow_non_fake_inputs=True)(*tensors)
    except (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode) as error:
        raise RuntimeError(
            "compile() needs a model whose operations do not depend on the values of its tensors "
            f"({error}): leave compile() out for this one"
        ) from error
    run = torch.compile(graph, **{"dynamic": False, "fullgraph": True} | options)
    return _Graph(run, step.outputs, step.num_classes)


def _kind(objective: Objective, batch: list[Tensor], spec: pytree.TreeSpec, gamma: float) -> Hashable:
    """All that a graph was made for, apart from the values of its tensors."""
    images = batch[0]
    return (
        tuple((t.shape, t.dtype, t.device, t.stride()) for t in batch),
        spec,
        bool(gamma),
        objective.settings(),
        tuple((p.dtype, p.device, p.requires_grad) for p in objective.parameters()),
        tuple(module.training for module in objective.modules()),
        _autocast(images),
    )


def _autocast(images: Tensor) -> torch.dtype | None:
    device = images.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


class _HandOut(torch.autograd.Function):
    """The total, whose backward pass hands out gradients that are known already."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, gradients: list[Tensor | None], *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(None if g is None else g * grad for g in ctx.saved_tensors)


class LossScale:
    """Keeps float16 gradients inside a graph from underflowing, like `GradScaler`, which only sees its ends.

    The loss is multiplied by `value` before it is differentiated, and the gradients are divided by it. It is
    halved when a gradient overflows and doubled after 2000 steps without; nothing waits for the device.
    """

    def __init__(self, device: torch.device):
        self.value = torch.full((), 2.0**14, device=device)
        self._steps = torch.zeros((), device=device)

    def update(self, finite: Tensor) -> None:
        """Take note whether the gradients of a step were finite."""
        self._steps = torch.where(finite, self._steps + 1, 0)
        grown = torch.where(self._steps % 2000 == 0, 2 * self.value, self.value)
        self.value = torch.where(finite, grown, self.value / 2).clamp(1, 2.0**24)
