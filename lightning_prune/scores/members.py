"""Which members of a group count: what is a bias, what is scored, and which tensor holds a bad number.

Scores and the regulariser must agree on these questions, and neither may import the other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from lightning_prune.errors import OptionError, PruneError
from lightning_prune.graph.groups import Group, Member

__all__ = [
    "NAN_POLICIES",
    "answers_at_once",
    "check_nan_policy",
    "check_number",
    "facts_of",
    "is_bias",
    "listed",
    "non_finite",
    "real",
    "scored_members",
]

NAN_POLICIES = ("raise", "skip", "zero")
_FACTS: tuple[Callable[[Any], Any], ...] = (
    attrgetter("shape"),
    attrgetter("dtype"),
    attrgetter("device"),
    Tensor.stride,
    Tensor.is_neg,
)
_BIAS = re.compile(r"(^|_)bias(es)?(_|$)")


def is_bias(name: str, tensor: Tensor) -> bool:
    """Tell a bias from a weight.

    A bias has one dimension and the word ``bias`` in the last component of its name, as in ``fc.bias``,
    ``attn.in_proj_bias`` or ``lstm.bias_hh_l0``. A table such as ``relative_position_bias_table`` has two
    dimensions and is a weight; so is the scale of a norm.

    Args:
        name: Name as in ``named_parameters()``; the parts that a parametrization adds are looked through.
        tensor: The parameter.

    >>> is_bias("attn.in_proj_bias", torch.zeros(3)), is_bias("norm.weight", torch.zeros(3))
    (True, False)
    """
    parts = name.split(".")
    leaf = parts[-2] if parts[-1].startswith("original") and "parametrizations" in parts[:-2] else parts[-1]
    return tensor.dim() == 1 and _BIAS.search(leaf) is not None


def scored_members(group: Group, tensors: Mapping[str, Tensor], *, include_bias: bool) -> list[Member]:
    """List the members that take part in scores and regularisation: parameters, biases only on request.

    Args:
        group: The group.
        tensors: All named parameters.
        include_bias: Whether biases count.

    Raises:
        PruneError: If a member that is no buffer is missing from ``tensors``.
    """
    members = [m for m in group.members if not m.is_buffer]
    for member in members:
        if member.tensor not in tensors:
            raise PruneError(
                f"group {group.name!r} holds the parameter {member.tensor!r}, which is not among the "
                f"{len(tensors)} tensors given; pass all named parameters of the model the groups came from"
            )
    return [m for m in members if include_bias or not is_bias(m.tensor, tensors[m.tensor])]


def real(tensor: Tensor) -> Tensor:
    """Give a complex tensor as a real view with a last dimension of 2; a real tensor as it is.

    >>> real(torch.zeros(4, dtype=torch.complex64)).shape
    torch.Size([4, 2])
    """
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def facts_of(tensors: Iterable[Any]) -> list[list[Any]]:
    """List shapes, types, devices, strides and pending signs: what a layout hangs on, cheap to ask for.

    >>> facts_of([torch.zeros(2, 3)])
    [[torch.Size([2, 3])], [torch.float32], [device(type='cpu')], [(3, 1)], [False]]
    """
    known = list(tensors)
    return [list(map(fact, known)) for fact in _FACTS]


def answers_at_once(device: torch.device) -> bool:
    """Say whether a value can be asked for without waiting for a queue of work, as on a CPU."""
    return device.type == "cpu"


def non_finite(names: Iterable[str], tensors: Mapping[str, Tensor]) -> list[str]:
    """Name the tensors that hold a NaN or an infinity. Waits for the device.

    >>> non_finite(["a", "b"], {"a": torch.ones(2), "b": torch.tensor([1.0, float("nan")])})
    ['b']
    """
    return [n for n in dict.fromkeys(names) if n in tensors and not bool(tensors[n].isfinite().all())]


def check_nan_policy(nan_policy: str) -> str:
    """Give the policy back if it is one.

    Raises:
        OptionError: If it is not.
    """
    if nan_policy not in NAN_POLICIES:
        raise OptionError(f"nan_policy must be one of {', '.join(NAN_POLICIES)}, got {nan_policy!r}")
    return nan_policy


def check_number(name: str, value: Any, most: float) -> float:
    """Check that a number is finite, at least 0 and at most ``most``.

    Raises:
        OptionError: If it is not.
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not 0 <= value <= most
        or value == math.inf
    ):
        limit = "" if most == math.inf else f" and at most {most:g}"
        raise OptionError(f"{name} must be a finite number of at least 0{limit}, got {value!r}")
    return float(value)


def listed(names: Sequence[str]) -> str:
    """Join names for a message, the first five of them.

    >>> listed(["a", "b"])
    'a, b'
    """
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
