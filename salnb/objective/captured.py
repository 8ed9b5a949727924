"""`Objective.compile(mode="cuda-graphs")`: the eager step, its kernels started all at once. Experimental.

The host needs longer to start a step's kernels than a fast GPU needs to run them. A CUDA graph holds what the
eager step starts, the gradients of the parameters included, and starts it by one call. It is captured in
seconds, from any model that neither looks at the values of its tensors nor waits for the device.

A graph reads and writes the memory that it was captured with. So a batch is copied in, and what comes out is
copied before the next step overwrites it; parameters and buffers are read and written where they are, and
whoever moves them gets a new graph. Generators on the device, PyTorch's own and those that modules hold,
advance with each step. Batch norm's derivatives are fused (`salnb.double_backward.fused`). An H100 has run
this; elsewhere the tests play graphs on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from salnb.double_backward import fused
from salnb.objective.compiled import CompiledStep, Graph, TracedStep, all_at_once
from salnb.objective.gradients_read import refuse_reading_gradients
from salnb.objective.graph_key import graph_key
from salnb.objective.randomness import refuse_seeding
from salnb.saliency.relu_masks import refuse_what_values_tell

__all__ = ["CapturedStep"]

_WARM_UP = 3  # steps before the capture, in which libraries choose their algorithms and allocate


class CapturedStep(CompiledStep):
    """Runs steps of an objective as CUDA graphs, one for each kind of step; see `CompiledStep`."""

    def __init__(self) -> None:
        super().__init__()
        self._pool: Any = None

    def __reduce__(self) -> tuple:
        """A copy captures for itself."""
        return CapturedStep, ()

    def applies(self, images: Tensor) -> bool:
        """Whether the images are on a GPU; elsewhere steps are eager."""
        return images.is_cuda

    def _check_compiler(self, images: Tensor) -> None:
        pass

    def _key(self, step: TracedStep, settings: Any, given: list[Tensor], structure: pytree.TreeSpec) -> dict:
        """What a compiled graph holds for, and where parameters and buffers are."""
        return graph_key(step, settings, given, structure, places=True)

    def _make(self, step: TracedStep, tensors: list[Tensor]) -> Graph:
        device = tensors[3].device
        inputs = [tensor.clone() for tensor in tensors[: 3 + step.structure.num_leaves]]
        run = partial(_run, step, (tuple(inputs[:3]), tuple(inputs[3:])))
        generators = _generators(step, device)
        stream = torch.cuda.Stream(device)
        with torch.enable_grad(), _without_cached_casts(), fused.preferred(device):
            with _as_before(step, device, generators):
                stream.wait_stream(torch.cuda.current_stream(device))
                try:
                    with torch.cuda.stream(stream), refuse_what_values_tell():
                        for _ in range(_WARM_UP):
                            run()
                finally:
                    torch.cuda.current_stream(device).wait_stream(stream)
            drawn = torch.random.get_rng_state()
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            for generator in generators:
                graph.register_generator_state(generator)
            # graphs share the memory in between: they run one after another, and what they return is copied
            with torch.cuda.graph(graph, pool=self._pool, stream=stream):
                values, gradients = run()
        if device.type != "cpu" and not torch.equal(drawn, torch.random.get_rng_state()):
            raise RuntimeError(
                'compile(mode="cuda-graphs") needs a model whose random numbers are drawn on its device, and '
                "this one (or its augmentation) draws some on the CPU, which a graph would draw only once"
            )
        made, outputs = pytree.tree_flatten((values, gradients, {}))

        def replay(*tensors: Tensor) -> list[Tensor | None]:
            for kept, tensor in zip(inputs, tensors, strict=False):
                kept.copy_(tensor)
            graph.replay()
            return all_at_once(_copies, made)

        return Graph(replay, outputs, values[4].shape[1])


def _run(step: TracedStep, given: tuple) -> tuple[list, list]:
    """The step on parameters that lie where the model's do, but have no hooks: these run in the backward."""
    parameters = {name: p.detach().requires_grad_(p.requires_grad) for name, p in step.named_parameters()}
    with refuse_seeding(), refuse_reading_gradients(parameters.values()):
        return torch.func.functional_call(step, parameters, given)


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    copies = [torch.empty_like(tensor) for tensor in tensors]
    torch._foreach_copy_(copies, tensors)
    return copies


def _generators(step: TracedStep, device: torch.device) -> list[torch.Generator]:
    """Those of the device that modules hold as attributes."""
    held = (value for module in step.modules() for value in vars(module).values())
    return list({g: None for g in held if isinstance(g, torch.Generator) and g.device.type == device.type})


@contextmanager
def _as_before(
    step: TracedStep, device: torch.device, generators: Iterable[torch.Generator]
) -> Iterator[None]:
    """Buffers and generators are put back at the end: what a warm-up changes is no training."""
    buffers = [(buffer, buffer.clone()) for buffer in step.buffers()]
    states = [(generator, generator.get_state()) for generator in generators]
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        try:
            with torch.enable_grad():
                yield
        finally:  # also where a warm-up finds what is refused
            for buffer, before in buffers:
                buffer.copy_(before)
            for generator, state in states:
                generator.set_state(state)


@contextmanager
def _without_cached_casts() -> Iterator[None]:
    """Autocast casts in each use: what it keeps of a weight is not made anew when a graph is run again."""
    before = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
