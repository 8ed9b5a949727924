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

from salnb._common.checks import check_labels
from salnb.objective.precision import autocast_dtype, full_precision

if TYPE_CHECKING:
    from salnb.objective import Objective


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
        # written by the device itself, which a copy from the host would have to wait for
        number = partial(
            torch.full, (), dtype=torch.promote_types(images.dtype, torch.float32), device=images.device
        )
        weights = [number(weight) for weight in (objective.alpha, objective.beta, gamma)]

        kind = _kind(objective, batch, spec, gamma)
        if kind not in self._graphs:
            step = _Step(objective, spec, gamma, len(batch))
            self._graphs[kind] = _compile(step, [*weights, *tensors], self.options)
        graph = self._graphs[kind]
        check_labels(target, graph.num_classes)

        with torch.no_grad(), full_precision(images):  # all casts are in the graph
            results = graph.run(*weights, *tensors)
            values, gradients, buffers = pytree.tree_unflatten(results, graph.outputs)
            for name, value in buffers.items():
                state[name].copy_(value)
        total = _HandOut.apply(values[0], gradients, *parameters)
        return total, *values[1:]


class _Graph(NamedTuple):
    """A compiled step."""

    run: Callable  # of a flat list of tensors, to another
    outputs: pytree.TreeSpec  # the structure of what it returns
    num_classes: int


class _Step(nn.Module):
    """One step as a function of tensors, to be traced."""

    def __init__(self, objective: Objective, spec: pytree.TreeSpec, gamma: float, batch_length: int):
        super().__init__()
        self.objective = objective
        self.spec, self.gamma, self.batch_length = spec, gamma, batch_length

    def forward(self, weights: tuple[Tensor, ...], batch: tuple[Tensor, ...]) -> tuple[list, list]:
        """The fields of `Losses` and the gradients, with the parameters and buffers of the moment."""
        images, new_images, target, *drawn = batch
        params = pytree.tree_unflatten(drawn, self.spec)
        losses = self.objective.losses(images, new_images, target, params, self.gamma)
        terms = (losses.class_loss, losses.invariance_loss, losses.saliency_loss)
        total = torch.stack([w * term for w, term in zip(weights, terms, strict=True)]).sum()
        trained = [p for p in self.objective.parameters() if p.requires_grad]
        # a GradScaler only sees what leaves the graph
        half = torch.float16 in (autocast_dtype(images), *(p.dtype for p in trained))
        scale = self.objective.gradient_scale.value if half else 1.0
        with full_precision(images):  # as the user's backward() would be
            gradients = list(torch.autograd.grad(total * scale, trained, allow_unused=True))
        if half:
            gradients = [None if g is None else g / scale for g in gradients]
            finite = [g.isfinite().all() for g in gradients if g is not None]
            self.objective.gradient_scale.update(torch.stack(finite).all())
        return [result.detach() for result in (total, *terms, losses.logits)], gradients

    def with_state(self, *tensors: Tensor) -> list[Tensor | None]:
        """Values, gradients and new buffers in a flat list, from weights, batch, parameters and buffers."""
        weights, batch, rest = (
            tensors[:3],
            tensors[3 : 3 + self.batch_length],
            tensors[3 + self.batch_length :],
        )
        parameters, buffers = dict(self.named_parameters()), [name for name, _ in self.named_buffers()]
        state = {
            name: tensor.detach().requires_grad_(parameters[name].requires_grad)
            if name in parameters
            else tensor.clone()
            for name, tensor in zip([*parameters, *buffers], rest, strict=True)
        }
        values, gradients = torch.func.functional_call(self, state, (weights, batch))
        updated = {name.removeprefix("objective."): state[name] for name in buffers}
        # what the caller of make_fx gets to see is a flat list only
        self.num_classes = values[-1].shape[1]
        flat, self.outputs = pytree.tree_flatten((values, gradients, updated))
        return flat


def _compile(step: _Step, tensors: list[Tensor], options: dict[str, Any]) -> _Graph:
    """Trace a step and hand it to the compiler."""
    try:
        # one thread: the modes that trace and that swap functions belong to it
        with torch.enable_grad(), torch.autograd.set_multithreading_enabled(False):
            graph = make_fx(step.with_state, tracing_mode="fake", _allow_non_fake_inputs=True)(*tensors)
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
        autocast_dtype(images),
    )


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
