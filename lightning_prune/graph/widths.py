"""Attributes that state a width for others to read, used by no forward: ``num_features``, ``embed_dim``.

Nothing says which dimension such an attribute speaks of, so it follows only where there is no doubt: every
dimension below its module that had this length, and was cut, has one and the same length now.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lightning_prune.plan import Cut, Rewrite

STATED = ("num_features", "embed_dim", "head_hidden_size")


def stated_widths(
    model: nn.Module,
    cuts: tuple[Cut, ...],
    used: frozenset[tuple[str, str]],
    decided: frozenset[tuple[str, str]],
) -> Iterator[Rewrite]:
    """Rewrites of stated widths.

    Args:
        model: The model before the cut.
        cuts: What is cut.
        used: (module, path) of attributes that the forward uses.
        decided: (module, path) of attributes that are rewritten already.
    """
    for name, module in model.named_modules():
        stated = {k: v for k, v in vars(module).items() if k in STATED and type(v) is int}
        stated = {k: v for k, v in stated.items() if (name, k) not in used | decided}
        if not stated:
            continue
        prefix = f"{name}." if name else ""
        below = [c for c in cuts if c.tensor.startswith(prefix)]
        for key, value in stated.items():
            lengths = {c.kept for c in below if c.size == value}
            if len(lengths) == 1:
                yield Rewrite(name, key, value, lengths.pop())
