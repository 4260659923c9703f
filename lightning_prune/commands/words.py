"""Overrides as one types them, written and read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["keys_of", "words_of"]


def keys_of(words: Iterable[str]) -> set[str]:
    """Give what words set or add.

    >>> sorted(keys_of(["model.lr=0.01", "+callbacks.mine._target_=my.Callback", "++seed=1"]))
    ['callbacks.mine._target_', 'model.lr', 'seed']
    """
    return {word.lstrip("+").partition("=")[0] for word in words}


def words_of(values: Mapping[str, Any]) -> list[str]:
    """Write values as the words that one would type.

    >>> words_of({"pruning.options.round_to": None, "model.lr": 0.01, "model": "vit"})
    ['pruning.options.round_to=null', 'model.lr=0.01', "model='vit'"]
    """
    return [f"{path}={_word(value)}" for path, value in values.items()]


def _word(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value) if not isinstance(value, str) else "'" + value.replace("'", "\\'") + "'"
