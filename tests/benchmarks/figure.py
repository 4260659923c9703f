"""What one measurement gives: a number, its spread, and the bound that it is held to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from benchmarks.clock import Spread


@dataclass(frozen=True)
class Figure:
    """One measured number.

    Args:
        row: Name of the row, as for ``--only``.
        subject: What was measured, usually a model.
        what: The number in words.
        value: Median and quartiles; ``None`` if it could not be measured.
        unit: Of the value: ``x`` for a ratio, ``%``, ``us``, or nothing for an exponent.
        limit: Largest value that passes; ``None`` if there is none.
        times: Milliseconds behind a ratio, by name.
        note: Why there is no value, or what stands out.
    """

    row: str
    subject: str
    what: str
    value: Spread | None
    unit: str
    limit: float | None = None
    times: Mapping[str, Spread] = field(default_factory=dict)
    note: str = ""

    @property
    def verdict(self) -> str:
        """PASS, MISS, or nothing where there is no bound or no value."""
        if self.limit is None or self.value is None:
            return ""
        return "PASS" if self.value.median <= self.limit else "MISS"

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "verdict": self.verdict}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Figure:
        """Read what ``as_dict`` gave."""
        value = data["value"] and Spread(**data["value"])
        times = {name: Spread(**time) for name, time in data["times"].items()}
        rest = {k: v for k, v in data.items() if k not in ("value", "times", "verdict")}
        return Figure(**rest, value=value, times=times)


@dataclass(frozen=True)
class Settings:
    """What the command line asked for."""

    models: tuple[str, ...] | None
    rounds: int
    device: str
    seed: int

    def pick(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Models of a row: those asked for, else its own."""
        return names if self.models is None else self.models


class Row(Protocol):
    """Measures one row, figure by figure."""

    def __call__(self, settings: Settings, /) -> Iterator[Figure]:
        """Yield each figure as soon as it is there."""
        ...
