"""Pruned Hugging Face models, from the files that they save themselves to.

Nothing of the library is imported: a class is asked for what its ``from_pretrained`` and its config do. The
library builds the dense model without memory, gets the shapes of the files put under its names, and fills
them; what no file holds it makes anew, as for the dense model. Then that is cut, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from lightning_prune.checkpoint import prepare
from lightning_prune.errors import CheckpointMismatchError
from lightning_prune.plan import Plan
from lightning_prune.surgery.manifests import KEY, dense_config, unpack
from lightning_prune.surgery.structure import ADVICE, shape_stored, shape_the_rest

__all__ = ["from_pretrained"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def from_pretrained(cls: type[ModuleT], path: Any, **kwargs: Any) -> ModuleT:
    """Do ``cls.from_pretrained(path, **kwargs)`` for a pruned Hugging Face model.

    ``model.save_pretrained(path)`` is all that is needed before: what was kept stands in ``config.json``.

    Args:
        cls: The class of the model itself, not an ``Auto`` class.
        path: Directory or name that ``cls.from_pretrained`` takes.
        **kwargs: Handed on, but for ``config``, which is read from the files.

    Returns:
        The model as it was saved: structure, weights, buffers that no file holds, replaced computations.

    Raises:
        CheckpointMismatchError: If the files do not hold a pruned model, are damaged, or do not fit ``cls``;
            names the first difference.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module) and hasattr(cls, "config_class")):
        raise CheckpointMismatchError(
            f"from_pretrained was given {getattr(cls, '__name__', cls)}, which builds no model from a config "
            "of its own; pass the class of the model itself, such as LlamaForCausalLM"
        )
    config, plan = _pretrained_structure(cls, path, kwargs)

    def build(self: Any, *args: Any, **inner: Any) -> None:
        cls.__init__(self, *args, **inner)
        shape_stored(self, plan)

    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    loader: Any = type(cls.__name__, (cls,), {**names, "__init__": build})
    asked = {**kwargs, "config": config, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, info = loader.from_pretrained(path, **asked)
    except CheckpointMismatchError:
        raise
    except Exception as error:  # of many kinds: a file that is absent, cut short or of another format
        raise CheckpointMismatchError(
            f"{path} cannot be read: {type(error).__name__}: {error}. Nothing was loaded"
        ) from error
    _check_loaded(path, info)
    model.__class__ = cls
    shape_the_rest(model, plan)
    loaded: ModuleT = prepare(model)
    return loaded


def _pretrained_structure(cls: Any, path: Any, kwargs: Mapping[str, Any]) -> tuple[Any, Plan]:
    """Config as it was before the cut, and what was kept."""
    if "config" in kwargs:
        raise CheckpointMismatchError(
            "from_pretrained takes no config: it is read from the files, with the plan"
        )
    try:
        data, _ = cls.config_class.get_config_dict(path, **kwargs)
        if not data:
            raise FileNotFoundError("there is no config.json")
    except Exception as error:  # as above
        raise CheckpointMismatchError(
            f"the config of {path} cannot be read: {type(error).__name__}: {error}. Nothing was loaded"
        ) from error
    if KEY not in data:
        raise CheckpointMismatchError(
            f"the config of {path} names no plan; for a model that was never pruned call "
            f"{cls.__name__}.from_pretrained, else call record(model, plan) before model.save_pretrained"
        )
    try:
        plan = unpack(data[KEY])
        return cls.config_class.from_dict(dense_config(data, plan)), plan
    except Exception as error:  # whatever a wrong entry leads to
        raise CheckpointMismatchError(
            f"the plan in the config of {path} cannot be read: {type(error).__name__}: {error}. "
            "Nothing was loaded"
        ) from error


def _check_loaded(path: Any, info: Mapping[str, Any]) -> None:
    """What the files hold is what the model has, all of it."""
    for key, held, own in sorted(info["mismatched_keys"]):
        raise CheckpointMismatchError(
            f"{path} holds {key} of shape {list(held)}, this model would have {list(own)}; {ADVICE}. "
            "Nothing was loaded"
        )
    for name, what in (
        ("missing_keys", "is missing from"),
        ("unexpected_keys", "is of no use to the model in"),
    ):
        for key in sorted(info[name]):
            raise CheckpointMismatchError(f"{key!r} {what} {path}; {ADVICE}. Nothing was loaded")
