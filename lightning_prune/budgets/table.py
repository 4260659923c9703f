"""The budgets by name. A new one is a function, a line in ``KINDS``, and its name in ``options.BUDGETS``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from lightning_prune.budgets.latency import (
    TOLERANCE,
    LatencyTable,
    aim_by_the_clock,
    build_table,
    sizes_after,
)
from lightning_prune.budgets.subject import Aim, CostOf, Subject
from lightning_prune.measuring.memory import peak_memory_bytes

__all__ = ["KINDS", "Kind"]


@dataclass(frozen=True)
class Kind:
    """One kind of budget.

    Args:
        cost: (subject, notebook) -> cost of a choice. What is written into the notebook, plain data, goes
            into checkpoints and comes again.
        tolerance: Share of the present cost by which it may be missed.
        aim: Replaces meeting the cost once: it may try, look at the result and aim anew.
    """

    cost: Callable[[Subject, dict[str, Any]], CostOf]
    tolerance: float = 0.01
    aim: Aim | None = None


def macs(subject: Subject, notebook: dict[str, Any]) -> CostOf:
    """Count multiply-accumulates of one forward of the example inputs, from the graph."""
    return subject.analysis.macs


def params(subject: Subject, notebook: dict[str, Any]) -> CostOf:
    """Count parameter elements, from the graph."""
    return subject.analysis.parameters


def memory(subject: Subject, notebook: dict[str, Any]) -> CostOf:
    """Measure the bytes of an inference forward at its worst moment, on a copy that is cut.

    Parameters, buffers and the intermediate results alive then, for the example inputs as they are: a larger
    batch weighs the results more. The tensors are followed on every device, so that equal choices give equal
    numbers.
    """
    known: dict[bytes, int] = {}

    def cost(keep: Any) -> float:
        key = keep.tobytes()
        if key not in known:
            known[key] = peak_memory_bytes(
                subject.pruned(keep), subject.inputs, forward_fn=subject.forward_fn, allocator=False
            )
        return known[key]

    return cost


def latency(subject: Subject, notebook: dict[str, Any]) -> CostOf:
    """Add up the milliseconds of all layers, from a table that is measured on the device in use."""
    if "table" not in notebook:
        notebook["table"] = build_table(subject).as_dict()
    table = LatencyTable.from_dict(notebook["table"])
    return lambda keep: table.milliseconds(sizes_after(subject.model, subject.plan(keep)))


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "macs": Kind(macs),
        "params": Kind(params),
        "memory": Kind(memory),
        "latency": Kind(latency, TOLERANCE, aim_by_the_clock),
    }
)
