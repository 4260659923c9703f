"""What is known of a primitive operation from its schema and tags, looked up once."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch

__all__ = ["LIKE", "Operation", "operation"]

# The values of these do not come from the tensor they are like.
LIKE = frozenset(("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"))


class Operation(NamedTuple):
    """What an overload in ``torch.ops`` does, as far as schema and tags tell.

    Args:
        name: As in ``torch.ops.aten``, ``add_`` for instance.
        defaults: Name and default of every argument, None where there is none.
        written: Number and name of every argument that it writes into.
        changes_numbers: Whether it writes numbers into its first argument, and gives that back.
        is_alone: Whether the first argument is its only tensor.
        makes_tensors: Whether it gives tensors with memory of their own, of shapes that follow from shapes.
        gives_data: Whether what it gives has a shape that hangs on values.
    """

    name: str
    defaults: tuple[tuple[str, Any], ...]
    written: tuple[tuple[int, str], ...]
    changes_numbers: bool
    is_alone: bool
    makes_tensors: bool
    gives_data: bool


@lru_cache(maxsize=4096)
def operation(func: Any) -> Operation:
    """Facts of an operation.

    >>> operation(torch.ops.aten.relu_.default).written
    ((0, 'self'),)
    """
    name = str(func._schema.name.removeprefix("aten::"))
    given, returned = func._schema.arguments, func._schema.returns
    writes = [(i, a.name) for i, a in enumerate(given) if a.alias_info is not None and a.alias_info.is_write]
    kinds = [str(a.type) for a in given]
    keeps_its_shape = torch.Tag.inplace_view not in func.tags and not name.startswith("_")
    is_in_place = name.endswith("_") and kinds[:1] == ["Tensor"] and [i for i, _ in writes] == [0]
    is_free = all(a.alias_info is None for a in (*given, *returned))
    gives_tensors = bool(returned) and all(str(r.type) == "Tensor" for r in returned)
    gives_data = torch.Tag.dynamic_output_shape in func.tags
    return Operation(
        name=name,
        defaults=tuple((a.name, a.default_value if a.has_default_value() else None) for a in given),
        written=tuple(writes),
        changes_numbers=is_in_place and keeps_its_shape and len(returned) == 1,
        is_alone=not any("Tensor" in kind for kind in kinds[1:]),
        makes_tensors=is_free and gives_tensors and not gives_data and name not in LIKE,
        gives_data=gives_data,
    )
