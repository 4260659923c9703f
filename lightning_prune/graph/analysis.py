"""Model -> graph with its constraints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from lightning_prune.graph.equations import Constraints
from lightning_prune.graph.grouping import build_graph
from lightning_prune.graph.groups import Graph, Group
from lightning_prune.graph.planning import make_plan, predicted_macs, predicted_parameters
from lightning_prune.plan import Plan
from lightning_prune.tracing.trace import trace
from lightning_prune.tracing.tracer import Tracer

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Analysis:
    """One look at a model: its graph, its constraints and its cost."""

    model: nn.Module
    graph: Graph
    constraints: Constraints

    @property
    def groups(self) -> tuple[Group, ...]:
        """Groups of units."""
        return self.graph.groups

    def alive(self, keep: Bools) -> Bools:
        """[n_classes] that live when ``keep`` [n_units] stays."""
        return self.graph.alive_classes(keep)

    def plan(self, keep: Bools, patched: frozenset[str] = frozenset()) -> tuple[Plan, tuple[str, ...]]:
        """What is kept, as a Plan, and what is to be said about configs if these modules are ``patched``."""
        return make_plan(self.model, self.graph, self.constraints, keep, patched)

    def macs(self, keep: Bools) -> int:
        """Predicted multiply-accumulates of one forward on the example inputs."""
        return predicted_macs(self.graph, self.constraints, self.alive(keep))

    def parameters(self, keep: Bools) -> int:
        """Predicted number of parameters."""
        return predicted_parameters(self.model, self.graph, self.alive(keep))


def analyse(
    model: nn.Module,
    example_inputs: Any,
    *,
    forward_fn: Callable[..., Any] | None = None,
    output_transform: Callable[..., Any] | None = None,
    custom: Any = None,
    prepare: Callable[..., None] | None = None,
) -> Analysis:
    """Trace and solve a model. The model is not touched.

    Raises:
        TraceError: If it cannot be run on the example inputs.
    """
    tracer = trace(
        model,
        example_inputs,
        forward_fn=forward_fn,
        output_transform=output_transform,
        custom=custom,
        prepare=prepare,
    )
    return solved(model, tracer)


def solved(model: nn.Module, tracer: Tracer) -> Analysis:
    """What a trace says of a model; its names are read, not its shapes."""
    graph = build_graph(tracer, tuple(tracer.leaves), frozenset(tracer.buffers))
    return Analysis(model, graph, Constraints(graph))
