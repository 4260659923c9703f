"""What a user may pass to the callback, checked before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, TypeVar

from lightning_prune.errors import OptionError

__all__ = ["as_record", "whole_number"]

T = TypeVar("T")


def whole_number(name: str, value: Any, least: int) -> int:
    """Give a whole number back.

    Raises:
        OptionError: If it is none, or below ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise OptionError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return value


def as_record(name: str, kind: type[T], given: T | Mapping[str, Any] | None) -> T:
    """Give a dataclass, from itself or from a mapping of its fields.

    Raises:
        OptionError: If it is neither, or a key is no field of it; the nearest are named.
    """
    if isinstance(given, kind):
        return given
    if given is not None and not isinstance(given, Mapping):
        raise OptionError(
            f"{name} must be a {kind.__name__} or a dict of its fields, got {type(given).__name__}"
        )
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for key in given or {}:
        if key not in known:
            near = get_close_matches(str(key), known, n=3, cutoff=0.0)
            raise OptionError(f"{name} has no field {key!r}; the nearest are {', '.join(near)}")
    return kind(**(given or {}))
