"""Recurrent layers: the gates of a hidden unit, its state and its row of every weight go together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_prune.tracing.labels import Ints, Tags
from lightning_prune.tracing.rules import function_rule, tensors_in
from lightning_prune.tracing.sizes import place
from lightning_prune.tracing.tracer import Tracer

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@function_rule(torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
def recurrent(t: Tracer, func: Callable[..., Any], *args: Any) -> Any:
    """``f(input, hx, weights, has_biases, num_layers, dropout, train, bidirectional, batch_first)``."""
    with t.silently():
        out = func(*args)
    x, states, weights = args[0], tensors_in((args[1],)), args[2]
    is_packed = isinstance(weights, Tensor)
    if is_packed:  # f(data, batch_sizes, hx, weights, has_biases, num_layers, dropout, train, bidirectional)
        states, weights = tensors_in((args[2],)), args[3]
    has_biases, layers = args[4 if is_packed else 3], int(args[5 if is_packed else 4])
    directions = 2 if args[8 if is_packed else 7] else 1
    per_cell = len(weights) // (layers * directions)
    if per_cell != (4 if has_biases else 2):
        for tensor in (x, *states, *weights):
            t.freeze_tensor(tensor, "recurrent layers with a projection stay whole")
        return out
    cells = [list(weights[i * per_cell : (i + 1) * per_cell]) for i in range(layers * directions)]
    result = _layers(t, x, cells, directions, GATES[func.__name__])
    _states(t, states, result)
    outputs = tensors_in((out,))
    label = _joined(result[-directions:])
    t.put(outputs[0], _last(label, outputs[0].ndim))
    for state in outputs[1:]:
        if not (is_packed and state is outputs[-1] and state.ndim == 1):
            t.put(state, _last(_agreed(t, result), state.ndim))
    return out


def _last(label: Ints | None, rank: int) -> Tags:
    dims = (None,) * (rank - 1) + (None if label is None else place(label, rank, rank - 1),)
    return Tags(dims, (False,) * (rank - 1) + (label is not None,))


def _joined(labels: Sequence[Ints | None]) -> Ints | None:
    present = [label for label in labels if label is not None]
    joined: Ints | None = np.concatenate(present) if len(present) == len(labels) else None
    return joined


def _agreed(t: Tracer, labels: Sequence[Ints | None]) -> Ints | None:
    """States of all layers lie side by side: their units tie."""
    why = t.why("states side by side")
    present = [label for label in labels if label is not None]
    for label in present:
        if len(present) < len(labels):
            t.ledger.freeze(label, why)
        else:
            t.ledger.tie(label, present[0], why)
    return present[0] if present and len(present) == len(labels) else None


def _layers(
    t: Tracer, x: Tensor, cells: list[list[Tensor]], directions: int, gates: int
) -> list[Ints | None]:
    tags = t.tags(x)
    for label in tags.dims[:-1]:
        t.freeze(label, "time and batch of a recurrent layer")
    last = tags.dims[-1]
    scopes = range(x.ndim - 1)
    source = (
        None if last is None else t.ledger.collapse(last, scopes, t.why("the same at all times")).reshape(-1)
    )
    hidden: list[Ints | None] = []
    for layer in range(len(cells) // directions):
        found = [_cell(t, source, cells[layer * directions + d], gates) for d in range(directions)]
        hidden += found
        source = _joined(found)
    return hidden


def _cell(t: Tracer, source: Ints | None, weights: list[Tensor], gates: int) -> Ints | None:
    """One layer in one direction; gives the atoms of its hidden units."""
    w_ih, w_hh, *biases = weights
    why = t.why("contracted" if source is not None else "contracted with a dimension that must stay")
    t.inputs |= {(t.names[id(w)], 1) for w in (w_ih, w_hh) if id(w) in t.names}
    columns = t.tags(w_ih).dims[1]
    if columns is not None and source is not None:
        t.ledger.tie(columns.reshape(-1), source, why)
    else:
        t.ledger.freeze(columns, why)
        t.ledger.freeze(source, why)
    rows = t.tags(w_ih).dims[0]
    back = t.tags(w_hh).dims[1]
    if rows is None or back is None:
        for w in weights:
            t.freeze_tensor(w, "a recurrent layer of one unit")
        return None
    hidden: Ints = rows.reshape(gates, -1)[0]
    why = t.why("gates of one hidden unit")
    t.ledger.tie(back.reshape(-1), hidden, why)
    for w in (w_ih, w_hh, *biases):
        label = t.tags(w).dims[0]
        assert label is not None
        t.ledger.tie(label.reshape(gates, -1), hidden, why)
    return hidden


def _states(t: Tracer, states: Sequence[Tensor], hidden: Sequence[Ints | None]) -> None:
    for state in states:
        label = t.tags(state).dims[-1]
        for units in hidden:
            if label is not None and units is not None:
                scopes = range(state.ndim - 1)
                why = t.why("state of")
                t.ledger.tie(t.ledger.collapse(label, scopes, why).reshape(-1), units, why)
            else:
                t.freeze(label, "state of a layer that must stay")
                t.freeze(units, "has a state that must stay")
