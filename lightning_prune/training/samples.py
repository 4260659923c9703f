"""Inputs to measure a network with: one sample where that can be had, and words for what they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from lightning_prune.errors import TraceError
from lightning_prune.measuring.cost import measure_cost
from lightning_prune.selection.forecast import Forecast
from lightning_prune.training.example_inputs import Example, one_sample, replay

__all__ = ["Sample", "described", "per_sample", "sample_of"]


@dataclass(frozen=True)
class Sample:
    """Inputs of one forward that is measured.

    Args:
        example: The inputs, and how they are run.
        macs: Multiply-accumulates of a forward of them.
        is_one: Whether they are one sample; else a batch that could not be cut down.
    """

    example: Example
    macs: int
    is_one: bool

    @property
    def words(self) -> str:
        """What figures of it are figures of."""
        kind = "one sample" if self.is_one else "one forward"
        return f"{kind}, {described(self.example)}"


def sample_of(network: nn.Module, example: Example) -> Sample:
    """Cut inputs down to one sample, so that MACs and latency are those of one; where that fails, keep them.

    Args:
        network: It runs on them.
        example: Inputs, and how they are run.

    Raises:
        TraceError: If the network does not run on the inputs as they are either.

    >>> sample_of(nn.Linear(4, 2), Example(torch.ones(8, 4))).words
    'one sample, 1x4 float32'
    """
    for tried in (one_sample(example), example):
        try:
            macs = measure_cost(network, tried.inputs, forward_fn=tried.forward_fn).macs
        except TraceError:
            if tried is example:
                raise
            continue
        return Sample(tried, macs, {t.shape[0] if t.dim() else 0 for t in _tensors(tried)} == {1})
    raise AssertionError("the loop ends with a sample or an error")


def per_sample(
    steps: Sequence[Forecast], inputs: Example, sample: Sample
) -> tuple[tuple[Forecast, ...], str]:
    """Give MACs of one sample where those of the inputs are a whole multiple of it, and say what they are of.

    Args:
        steps: What is left, counted on the inputs.
        inputs: As the network was traced.
        sample: Of the network before the first step.
    """
    count, rest = divmod(steps[0].macs, sample.macs) if sample.is_one and sample.macs else (0, 1)
    if rest or any(step.macs % count for step in steps):
        return tuple(steps), f"one forward, {described(inputs)}"
    return tuple(replace(step, macs=step.macs // count) for step in steps), sample.words


def described(example: Example) -> str:
    """Say what inputs are: shape and type of every tensor.

    >>> described(Example({"ids": torch.ones(2, 7, dtype=torch.long), "scale": torch.ones(2)}))
    '2x7 int64, 2 float32'
    """
    shapes = [
        f"{'x'.join(map(str, t.shape))} {str(t.dtype).removeprefix('torch.')}" for t in _tensors(example)
    ]
    return ", ".join(shapes) or type(example.inputs).__name__


def _tensors(example: Example) -> list[torch.Tensor]:
    inputs: Any = example.inputs
    if example.forward_fn is replay:
        inputs = [(call.args, call.kwargs) for call in inputs]
    return [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
