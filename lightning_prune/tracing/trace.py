"""Trace a model: copy it, label it, run it once, hand over what was learnt."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_prune.errors import PruneError, TraceError
from lightning_prune.randomness import randomness_kept, used_gpus
from lightning_prune.surgery.tensors import tensors_of
from lightning_prune.tracing import (
    contraction,
    convolution,
    functional,
    indexing,
    joining,
    movement,
    normalization,
    pointwise,
    recurrent,
    sizes,
    windows,
)
from lightning_prune.tracing.borrowing import (
    Borrowed,
    Memory,
    SharedWriteError,
    copy_for_tracing,
    ways_to_trace,
)
from lightning_prune.tracing.interceptors import Functions, Operations
from lightning_prune.tracing.labels import Site
from lightning_prune.tracing.layers import replace_layers
from lightning_prune.tracing.meta import ADVICE as META_ADVICE
from lightning_prune.tracing.meta import Shapes, without_floats
from lightning_prune.tracing.numbers import Numbers
from lightning_prune.tracing.preparing import follow_modules, label_tensors, track_attributes
from lightning_prune.tracing.rules import FUNCTIONS, follow
from lightning_prune.tracing.running import call, output_tensors
from lightning_prune.tracing.stated import watch_stated_widths
from lightning_prune.tracing.tracer import Tracer

CALL_ADVICE = "Check that model.eval()(example_inputs) runs; pass forward_fn for an unusual call."
RULE_FILES = (
    contraction,
    convolution,
    functional,
    indexing,
    joining,
    movement,
    normalization,
    pointwise,
    recurrent,
    sizes,
    windows,
)


def trace(
    model: nn.Module,
    example_inputs: Any,
    *,
    forward_fn: Callable[..., Any] | None = None,
    output_transform: Callable[..., Any] | None = None,
    custom: Any = None,
    prepare: Callable[[Tracer, nn.Module], None] | None = None,
    change: Callable[[nn.Module], None] | None = None,
    numbers: Numbers | None = None,
    by_shapes: bool = True,
) -> Tracer:
    """Run a copy of ``model`` once in eval mode and follow its channels.

    Its floats are mere shapes first, which takes neither the time of the arithmetic nor the memory. Where
    that fails, since Python asked for a value or an operation cannot do without, it is run with values.

    Args:
        model: Any module; it is not touched.
        example_inputs: A tensor, a tuple of positional or a dict of keyword arguments.
        forward_fn: ``f(model, example_inputs)`` that replaces the call.
        output_transform: Picks the tensors of the output that count as outputs.
        custom: ``{type or name: rule}`` for modules that are followed by a rule of the user's.
        prepare: Called with the tracer and the labelled copy before it runs.
        change: Called with the copy first of all: to cut it, for instance.
        numbers: Record of what the run computes with, and what it is held against.
        by_shapes: False where it is known that values are needed.

    Raises:
        TraceError: If the model has lazy parameters, cannot be copied, or fails on the inputs.
    """
    refuse_lazy(model)
    given = (
        example_inputs,
        forward_fn,
        output_transform or (lambda outputs: outputs),
        custom,
        prepare,
        change,
    )
    numbers = numbers or Numbers()
    for memory in ways_to_trace(model, by_shapes=by_shapes):
        tracer = Tracer(Borrowed(model, memory), numbers.anew())
        try:
            _trace(tracer, model, *given)
        except Exception:
            if memory is not Memory.SHAPES:
                raise
            continue
        if not tracer.borrowed.is_void:
            break
    return tracer


def _trace(
    tracer: Tracer,
    model: nn.Module,
    example_inputs: Any,
    forward_fn: Callable[..., Any] | None,
    pick: Callable[..., Any],
    custom: Any,
    prepare: Callable[[Tracer, nn.Module], None] | None,
    change: Callable[[nn.Module], None] | None,
) -> None:
    """Trace a copy whose parameters are what the tracer says."""
    twin = copy_for_tracing(model, tracer.borrowed.memory)
    if change is not None:
        change(twin)
    tracer.shapes = Shapes() if any(p.is_meta for p in twin.parameters()) else None
    if tracer.borrowed.memory is Memory.SHAPES:
        tracer.stand_in = torch.empty(0, device=next(model.parameters()).device)
    elif tracer.shapes is not None and forward_fn is None:
        example_inputs = without_floats(example_inputs)
    label_tensors(tracer, twin)
    replace_layers(tracer, twin, custom)
    track_attributes(tracer, twin)
    follow_modules(tracer, twin)
    watch_stated_widths(tracer, twin)
    if prepare is not None:
        prepare(tracer, twin)
    with undisturbed(), suppress(SharedWriteError):
        _freeze_outputs(tracer, pick(_run(tracer, twin, _own(example_inputs), forward_fn)))
        if set(_unused(tracer)) - tracer.buffers:  # layers that work in training alone: auxiliary heads
            tracer.numbers.begin("train")
            with suppress(TraceError):
                _freeze_outputs(tracer, pick(_run(tracer, twin.train(), _own(example_inputs), forward_fn)))
    _settle_parameters(tracer)


def _own(example_inputs: Any) -> Any:
    """A forward may write into its inputs, or append to a cache among them: it gets a copy, if one can be."""
    try:
        return copy.deepcopy(example_inputs)
    except Exception:  # of many kinds, such as a tensor with a history
        return example_inputs


def _freeze_outputs(tracer: Tracer, outputs: Any) -> None:
    tracer.begin("output", Site("output", "", ""))  # no line of the model, which has returned
    tracer.modules = [""]
    for tensor in output_tensors(outputs):
        tracer.freeze_tensor(tensor, "an output of the model")


def _unused(tracer: Tracer) -> list[str]:
    """Parameters and buffers that nothing has read yet."""
    return [name for name in tracer.leaves if name not in tracer.touched and name not in tracer.ragged]


def refuse_lazy(model: nn.Module) -> None:
    """Lazy parameters have no shape yet."""
    for name, p in tensors_of(model).items():
        if is_lazy(p):
            raise TraceError(
                f"{name} is a lazy parameter without a shape. Run the model once on example inputs "
                "before pruning it."
            )


def _run(tracer: Tracer, twin: nn.Module, example_inputs: Any, forward_fn: Callable[..., Any] | None) -> Any:
    try:
        with torch.no_grad(), Operations(tracer, follow), Functions(tracer, FUNCTIONS):
            return call(twin, example_inputs, forward_fn)
    except (PruneError, SharedWriteError):
        raise
    except Exception as error:
        if tracer.borrowed.is_void:  # the model met the refusal and made it an error of its own
            raise SharedWriteError from error
        raise TraceError(
            f"The model was to be run once on the example inputs, but {tracer.modules[-1] or 'it'} failed in "
            f"{tracer.op or 'its forward'} with {type(error).__name__}: {error}. "
            f"{CALL_ADVICE if tracer.shapes is None else META_ADVICE}"
        ) from error


@contextmanager
def undisturbed() -> Iterator[None]:
    """RNG states, grad mode, autocast and the attention fast path are given back as they were.

    Two runs draw the same random numbers, so that what they do can be compared.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with randomness_kept(), _without_autocast():
            torch.default_generator.manual_seed(0)
            if used_gpus():
                torch.cuda.manual_seed_all(0)
            random.seed(0)
            np.random.seed(0)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


@contextmanager
def _without_autocast() -> Iterator[None]:
    with ExitStack() as off:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                off.enter_context(torch.autocast(kind, enabled=False))
        yield


def _settle_parameters(tracer: Tracer) -> None:
    """Parameters that were never used stay; ragged columns that were also read whole are cut alike."""
    for name in _unused(tracer):
        tracer.op, tracer._site = name, None
        for label in tracer.leaves[name]:
            tracer.freeze(label, "never used while tracing")
    for name in tracer.whole & set(tracer.ragged):
        column = tracer.leaves[name][1]
        if column is not None:
            tracer.ledger.tie(tracer.ragged[name], column.reshape(1, -1), tracer.why("also read as a whole"))
