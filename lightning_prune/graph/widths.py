"""Attributes that state a width for others to read, used by no forward: ``num_features``, ``embed_dim``.

Where the trace has seen what an attribute speaks of, it follows that. Elsewhere nothing says which dimension
it is, so it follows only where there is no doubt: every dimension of this length, of the module's own tensors
or else of all below it, has one and the same length after the cut.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from torch import nn

from lightning_prune.plan import Cut, Rewrite
from lightning_prune.surgery.attributes import get_path

STATED = ("num_features", "embed_dim", "head_hidden_size")
Place = tuple[str, str]


def stated_widths(
    model: nn.Module,
    cuts: tuple[Cut, ...],
    seen: Mapping[Place, int | None],
    decided: Collection[Place],
) -> tuple[tuple[Rewrite, ...], tuple[str, ...]]:
    """Rewrites of stated widths, and a note for each that has to be left.

    Args:
        model: The model before the cut.
        cuts: What is cut.
        seen: (module, path) -> the width after the cut, None if it stays; what the trace has seen.
        decided: (module, path) of attributes that are decided already, or that the forward uses.
    """
    kept = {(c.tensor, c.dim): c.kept for c in cuts}
    rewrites: list[Rewrite] = []
    notes: list[str] = []
    for name, path, value in _stated(model, seen):
        if (name, path) in decided:
            continue
        module = model.get_submodule(name)
        is_seen = (name, path) in seen
        widths = {seen[name, path] or value} if is_seen else _widths(module, name, kept, value)
        if len(widths) > 1:
            found = ", ".join(map(str, sorted(widths)))
            whole = f"{name}.{path}" if name else path
            notes.append(
                f"{whole} still says {value}: dimensions of that length keep {found}, and nothing tells of "
                "which it speaks"
            )
        elif widths - {value}:
            rewrites.append(Rewrite(name, path, value, *widths))
    return tuple(rewrites), tuple(notes)


def _stated(model: nn.Module, seen: Mapping[Place, int | None]) -> Iterator[tuple[str, str, int]]:
    for name, module in model.named_modules():
        for key in STATED:
            if type(vars(module).get(key)) is int:
                yield name, key, vars(module)[key]
    for name, path in seen:
        if path not in STATED:
            yield name, path, get_path(model.get_submodule(name), path)


def _widths(module: nn.Module, name: str, kept: Mapping[tuple[str, int], int], value: int) -> set[int]:
    """Lengths after the cut of all dimensions that have this length: own tensors speak before those below."""
    prefix = f"{name}." if name else ""
    for recurse in (False, True):
        tensors = [*module.named_parameters(recurse=recurse), *module.named_buffers(recurse=recurse)]
        found = {
            kept.get((prefix + key, d), n)
            for key, tensor in tensors
            for d, n in enumerate(tensor.shape)
            if n == value
        }
        if found:
            return found
    return set()
