"""A group as a Mermaid diagram: layers as boxes, ties as lines that say why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_prune.graph.couplings import Coupling
from lightning_prune.graph.groups import Group

__all__ = ["to_mermaid"]


def to_mermaid(group: Group, couplings: Sequence[Coupling], types: Mapping[str, str] | None = None) -> str:
    """Write a group in Mermaid, which code hosts, notebooks and editors draw.

    Args:
        group: The group.
        couplings: Ties between its members.
        types: Name of a layer -> name of its type.

    >>> from lightning_prune.graph.groups import Member
    >>> import numpy as np
    >>> none = np.zeros(0, np.int64)
    >>> ends = [("a.weight", 0), ("b.weight", 1)]
    >>> members = tuple(Member(name, dim, 1, 4, none, none) for name, dim in ends)
    >>> group = Group("a.weight:0", "channel", np.arange(4), members, "")
    >>> print(to_mermaid(group, [Coupling(*ends, "contracted: linear in b")]))
    graph LR
      n0["<b>a</b><br/>weight dim 0"]
      n1["<b>b</b><br/>weight dim 1"]
      n0 -- "contracted: linear in b" --- n1
    """
    parts: dict[str, list[str]] = {}
    for member in group.members:
        layer, name = _layer(member.tensor)
        parts.setdefault(layer, []).append(f"{name} dim {member.dim}")
    number = {layer: f"n{place}" for place, layer in enumerate(parts)}
    lines = ["graph LR"]
    for layer, tensors in parts.items():
        kind = (types or {}).get(layer, "")
        title = f"<b>{_quoted(layer or 'the model itself')}</b>" + (f" {_quoted(kind)}" if kind else "")
        lines.append(f'  {number[layer]}["{title}<br/>{_quoted(", ".join(tensors))}"]')
    reasons: dict[tuple[str, str], list[str]] = {}
    for coupling in couplings:
        ends = (_layer(coupling.left[0])[0], _layer(coupling.right[0])[0])
        if ends[0] != ends[1]:
            reasons.setdefault(
                ends if ends in reasons or ends[::-1] not in reasons else ends[::-1], []
            ).append(coupling.reason)
    for (left, right), why in reasons.items():
        text = "<br/>".join(map(_quoted, dict.fromkeys(why)))
        lines.append(f'  {number[left]} -- "{text}" --- {number[right]}')
    return "\n".join(lines)


def _layer(tensor: str) -> tuple[str, str]:
    layer, _, name = tensor.rpartition(".")
    return layer, name


def _quoted(text: str) -> str:
    """Escape what Mermaid would read as its own."""
    return text.replace("#", "#35;").replace('"', "#quot;").replace("<", "#lt;").replace(">", "#gt;")
