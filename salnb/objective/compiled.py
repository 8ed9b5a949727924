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

from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.autograd.function import once_differentiable
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils import _pytree as pytree

from salnb._common import catalog
from salnb._common.checks import at_least_float32_dtype, check_labels
from salnb._common.warning import warn_caller
from salnb.double_backward.foreign import has_foreign_functions
from salnb.double_backward.recomputation import stored_instead
from salnb.objective.gradients_read import refuse_reading_gradients
from salnb.objective.graph_key import changes, graph_key, refuse_what_a_graph_forgets
from salnb.objective.precision import autocast_dtype, full_precision
from salnb.objective.randomness import refuse_seeding
from salnb.objective.terms import Losses, StepInputs, StepModules, TermSettings, step_losses
from salnb.saliency.isolation import left_as_found
from salnb.saliency.relu_masks import refuse_what_values_tell

__all__ = ["CompiledStep", "Graph", "TracedStep", "all_at_once"]

_OWN_GENERATOR = (
    "compile() needs a model that draws from PyTorch's default generator, and this one has a torch.Generator "
    "of its own: leave compile() out"
)


class CompiledStep:
    """Runs steps of an objective as compiled graphs, one for each kind of step that it meets.

    A graph holds for the shapes, types and strides of the batch, the settings of the terms and which of them
    there are (`every` and `warmup` make two kinds of steps), and all that `salnb.objective.graph_key` tells
    of model and augmentation. Where one of these is new, a graph is traced and compiled.

    Args:
        **options: for `torch.compile`.
    """

    def __init__(self, **options: Any):
        self.options = options
        self._graphs: dict[tuple, Graph] = {}

    def __reduce__(self) -> tuple:
        """A copy compiles for itself."""
        return partial(CompiledStep, **self.options), ()

    def __call__(
        self,
        modules: StepModules,
        inputs: StepInputs,
        weights: tuple[float, float, float],
        settings: TermSettings,
    ) -> Losses:
        """What `step_losses` returns, but that only the total can be called `backward()` on."""
        images = inputs.images
        self._check_compiler(images)
        given, structure = pytree.tree_flatten(inputs)
        _check_constant(inputs)
        step = TracedStep(modules, settings, structure)
        parameters, buffers = step.state()
        # written by the device itself, which a copy from the host would have to wait for
        scalar = partial(torch.full, (), dtype=at_least_float32_dtype(images.dtype), device=images.device)
        tensors = [
            *map(scalar, weights),
            *given,
            *(tensor.detach() for tensor in (*parameters.values(), *buffers.values())),
        ]

        key_of_the_moment = partial(self._key, step, settings, given, structure)
        names = key_of_the_moment()
        key = tuple(names.items())
        graph = self._graphs.get(key)
        if graph is None:
            self._warn_of_many(names)
            with refuse_what_a_graph_forgets(step, key_of_the_moment):
                graph = self._make(step, tensors)
            self._graphs[key] = graph
        if modules.class_term.own is None:
            labels = inputs.target.clamp(min=0) if settings.confidence else inputs.target
            check_labels(labels, graph.num_classes)

        with torch.no_grad(), full_precision(images):  # all casts are in the graph
            results = graph.run(*tensors)
            values, gradients, updated = pytree.tree_unflatten(results, graph.outputs)
            for name, value in updated.items():
                buffers[name].copy_(value)
        value, classes, invariance, salience, logits, gamma, consistent = values
        trained = (p for p in parameters.values() if p.requires_grad)
        total = _ReturnPrecomputedGradients.apply(value, gradients, *trained)
        has_saliency = settings.has_saliency
        return Losses(total, classes, invariance, salience, logits, has_saliency, gamma, consistent)

    def applies(self, images: Tensor) -> bool:
        """Whether steps on the images' device are run as graphs."""
        return True

    def _key(self, *args: Any) -> dict:
        return graph_key(*args)

    def _make(self, step: TracedStep, tensors: list[Tensor]) -> Graph:
        _try_out(step, tensors)
        return _compile(step, tensors, self.options)

    def _check_compiler(self, images: Tensor) -> None:
        """Refuse the C++ of an Inductor that writes more than its buffers hold (pytorch#159154)."""
        inductor = self.options.get("backend", "inductor") == "inductor"
        if inductor and images.device.type == "cpu" and torch.__version__ < "2.9":
            raise RuntimeError(
                f"compile() on a CPU needs torch 2.9 or newer: Inductor of torch {torch.__version__} writes "
                'beyond its buffers there; compile with another backend (backend="aot_eager"), leave '
                "compile() out, or update torch"
            )

    def _warn_of_many(self, names: dict[str, Hashable]) -> None:
        """What changes in each step makes each step compile."""
        if (count := len(self._graphs)) >= 8 and count & (count - 1) == 0:
            last = dict(list(self._graphs)[-1])
            warn_caller(
                f"compile() is about to compile its graph number {count + 1}; since the last one, these have "
                f"changed: {', '.join(changes(last, names)[:5])}"
            )


class Graph(NamedTuple):
    """A compiled step."""

    run: Callable  # of a flat list of tensors, to another
    outputs: pytree.TreeSpec  # the structure of what it returns
    num_classes: int


def _check_constant(inputs: StepInputs) -> None:
    """Check that nothing of a batch is to be differentiated: a graph has the parameters' gradients only."""
    names = {"new_images": "what the augmentation returns", "params": "what the augmentation draws"}
    for field in ("images", "target", "model_kwargs", *names):
        values = pytree.tree_leaves(getattr(inputs, field))
        if any(isinstance(value, Tensor) and value.requires_grad for value in values):
            raise ValueError(
                f"{names.get(field, field)} must not require a gradient after compile(): only those of the "
                "parameters of the model are computed; leave compile() out for others"
            )


def _try_out(step: TracedStep, tensors: list[Tensor]) -> None:
    """Run a step without trace: wrong derivatives of Functions, and some ReLUs, show in values only."""
    by_values = has_foreign_functions() or catalog.METHODS[step.settings.method].rule
    if step.settings.has_saliency and by_values:
        inputs = pytree.tree_unflatten(tensors[3 : 3 + step.structure.num_leaves], step.structure)
        device, weights = inputs.images.device, (tensors[0], tensors[1], tensors[2])
        devices = [device] if device.type == "cuda" else []
        with left_as_found(step), torch.random.fork_rng(devices), refuse_what_values_tell():
            step_losses(step.step_modules, inputs, weights, replace(step.settings, measured=False))


class TracedStep(nn.ModuleDict):
    """One step as a function of tensors, to be traced; its parameters and buffers are those of `modules`."""

    def __init__(self, modules: StepModules, settings: TermSettings, structure: pytree.TreeSpec):
        super().__init__(modules._asdict())
        self.step_modules, self.settings, self.structure = modules, settings, structure

    def state(self) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
        """`named_parameters` and `named_buffers`, from one walk through the modules."""
        found: tuple[dict, dict] = {}, {}
        for prefix, module in self.named_modules():
            for known, tensors in zip(found, (module._parameters, module._buffers), strict=True):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        known.setdefault(id(tensor), (f"{prefix}.{name}", tensor))
        parameters, buffers = (dict(known.values()) for known in found)
        return parameters, buffers

    def trained(self) -> list[nn.Parameter]:
        """The parameters that gradients are computed of."""
        return [p for p in self.parameters() if p.requires_grad]

    def forward(self, weights: tuple[Tensor, Tensor, Tensor], given: tuple[Tensor, ...]) -> tuple[list, list]:
        """The tensors of `Losses` and the gradients, with the parameters and buffers of the moment."""
        inputs = pytree.tree_unflatten(given, self.structure)
        losses = step_losses(self.step_modules, inputs, weights, self.settings)
        trained = self.trained()
        # a GradScaler only sees what leaves the graph
        half = torch.float16 in (autocast_dtype(inputs.images), *(p.dtype for p in trained))
        gradient_scale = self.step_modules.gradient_scale
        scale = gradient_scale.value if half else 1.0
        with full_precision(inputs.images):  # as the user's backward() would be
            gradients = list(torch.autograd.grad(losses.total * scale, trained, allow_unused=True))
        if half:
            gradients = [None if g is None else g / scale for g in gradients]
            finite = [g.isfinite().all() for g in gradients if g is not None]
            gradient_scale.update(torch.stack(finite).all())
        terms = (losses.total, losses.class_loss, losses.invariance_loss, losses.saliency_loss, losses.logits)
        return [
            *(term.detach() for term in terms),
            losses.gamma,
            torch.as_tensor(losses.consistency_loss).detach(),
        ], gradients

    def with_state(self, *tensors: Tensor) -> list[Tensor | None]:
        """Values, gradients and new buffers in a flat list, from weights, inputs, parameters and buffers."""
        inputs_end = 3 + self.structure.num_leaves
        weights, given, rest = tensors[:3], tensors[3:inputs_end], tensors[inputs_end:]
        parameters, buffers = dict(self.named_parameters()), [name for name, _ in self.named_buffers()]
        state = {
            name: tensor.detach().requires_grad_(parameters[name].requires_grad)
            if name in parameters
            else tensor.clone()
            for name, tensor in zip([*parameters, *buffers], rest, strict=True)
        }
        with refuse_seeding(), refuse_reading_gradients(state.values()):
            values, gradients = torch.func.functional_call(self, state, (weights, given))
        if changed := [n for n, p in parameters.items() if state[n].requires_grad is not p.requires_grad]:
            raise RuntimeError(
                f"compile() needs a model whose forward pass leaves requires_grad alone, but that of "
                f"{', '.join(changed[:5])} is changed: set it before, or leave compile() out"
            )
        if written := [name for name, tensor in state.items() if tensor.is_leaf and tensor.grad is not None]:
            raise RuntimeError(
                "compile() needs a model that leaves .grad alone, but a backward() of its own (or of a "
                f"Function) writes that of {', '.join(written[:5])} in each step, which no graph does: "
                "use torch.autograd.grad for gradients that only the model needs, or leave compile() out"
            )
        updated = {name: state[name] for name in buffers}
        # what the caller of make_fx gets to see is a flat list only
        self.num_classes = values[4].shape[1]
        flat, self.outputs = pytree.tree_flatten((values, gradients, updated))
        return flat


def _compile(step: TracedStep, tensors: list[Tensor], options: dict[str, Any]) -> Graph:
    """Trace a step and hand it to the compiler."""
    try:
        # one thread: the modes that trace and that swap functions belong to it
        # and what a checkpoint would recompute has its random numbers in the graph once
        with torch.enable_grad(), torch.autograd.set_multithreading_enabled(False), stored_instead():
            graph = make_fx(step.with_state, tracing_mode="fake", _allow_non_fake_inputs=True)(*tensors)
    except (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode) as error:
        raise RuntimeError(
            "compile() needs a model whose operations do not depend on the values of its tensors "
            f"({error}): leave compile() out for this one"
        ) from error
    except NotImplementedError as error:  # of torch.fx, before it could hold one
        if "torch._C.Generator" in str(error):
            raise RuntimeError(_OWN_GENERATOR) from error
        raise
    if any(node.kwargs.get("generator") is not None for node in graph.graph.nodes):
        raise RuntimeError(_OWN_GENERATOR)
    run = torch.compile(graph, **{"dynamic": False, "fullgraph": True} | options)
    return Graph(run, step.outputs, step.num_classes)


def all_at_once(
    run: Callable[[list[Tensor]], Iterable[Tensor]], tensors: Iterable[Tensor | None]
) -> list[Tensor | None]:
    """What a function of a list makes of the tensors that are there, each in its place.

    With PyTorch's `_foreach` operators: a host needs longer to start a kernel for each than they take.
    """
    tensors = list(tensors)
    there = [tensor for tensor in tensors if tensor is not None]
    results = iter(run(there) if there else ())
    return [None if tensor is None else next(results) for tensor in tensors]


class _ReturnPrecomputedGradients(torch.autograd.Function):
    """The total, whose backward pass returns gradients that are known already."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, gradients: list[Tensor | None], *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *all_at_once(lambda known: torch._foreach_mul(known, grad), ctx.saved_tensors)
