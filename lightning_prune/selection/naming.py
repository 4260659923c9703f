"""What an option names: modules, names, globs, types or parameters -> units of a graph."""

from __future__ import annotations

import difflib
import fnmatch
import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from lightning_prune.errors import OptionError
from lightning_prune.surgery.tensors import tensors_of

Bools = npt.NDArray[np.bool_]


def tensors_named(model: nn.Module, what: Any, option: str) -> frozenset[str]:
    """Parameters and buffers that a module, name, glob, type or parameter stands for.

    Args:
        model: Where names are looked up.
        what: ``nn.Module``, ``Tensor``, type, ``"layer4.*"``, ``"layer4.0.conv1"``, ``"torch.nn.Linear"``.
        option: Name of the option, for the message.

    Raises:
        OptionError: If it matches nothing; the message lists the nearest names.

    >>> sorted(tensors_named(nn.Sequential(nn.Linear(2, 2)), "0", "ignored_layers"))
    ['0.bias', '0.weight']
    """
    tensors = list(tensors_of(model).items())
    if isinstance(what, Tensor):
        found = {name for name, t in tensors if t is what}
    else:
        modules = {name for name, module in model.named_modules() if is_named(name, module, what)}
        found = {name for name, _ in tensors if _owner_in(name, modules)}
        aliases = dict(model.named_modules(remove_duplicate=False))
        if isinstance(what, str):
            found |= {name for name, _ in tensors if fnmatch.fnmatchcase(name, what)}
            found |= _through_aliases(model, aliases, what, tensors)
        if modules and not found:
            return frozenset()
    if not found:
        raise OptionError(_nothing(model, what, option))
    return frozenset(found)


def _through_aliases(
    model: nn.Module, aliases: dict[str, nn.Module], what: str, tensors: Sequence[Any]
) -> set[str]:
    """A shared module or a tied parameter may be named by any of its names."""
    ids = {id(t): name for name, t in tensors}
    every = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    hit = {name for name in aliases if name and fnmatch.fnmatchcase(name, what)}
    return {ids[id(t)] for name, t in every if fnmatch.fnmatchcase(name, what) or _owner_in(name, hit)}


def _owner_in(tensor: str, modules: set[str]) -> bool:
    parts = tensor.split(".")
    return any(".".join(parts[:i]) in modules for i in range(len(parts)))


def is_named(name: str, module: nn.Module, what: Any) -> bool:
    """True if a module is what an option names."""
    if isinstance(what, nn.Module):
        return module is what
    if isinstance(what, type):
        return isinstance(module, what)
    if isinstance(what, str):
        by_type = type_named(what)
        return (bool(name) and fnmatch.fnmatchcase(name, what)) or (
            by_type is not None and isinstance(module, by_type)
        )
    return False


def type_named(text: str) -> type | None:
    """``"torch.nn.Linear"`` -> the class; None if the text names none."""
    module, _, name = text.rpartition(".")
    if not module or not name[:1].isupper():
        return None
    try:
        found = getattr(importlib.import_module(module), name, None)
    except (ImportError, ValueError):
        return None
    return found if isinstance(found, type) else None


def _nothing(model: nn.Module, what: Any, option: str) -> str:
    names = [n for n, _ in model.named_modules() if n] + [n for n, _ in model.named_parameters()]
    shown = what if isinstance(what, str) else getattr(what, "__name__", None) or f"a {type(what).__name__}"
    near = difflib.get_close_matches(str(shown), names, n=5, cutoff=0.3) or names[:5]
    kind = (
        "is no module, name, glob, type or parameter"
        if not isinstance(what, str)
        else "matches no module or parameter"
    )
    return f"{option}: {shown!r} {kind} of {type(model).__name__}. Nearest names: {', '.join(near)}."
