"""Sensitivity: what was measured, as data that goes through JSON."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lightning_prune.errors import OptionError
from lightning_prune.files import write_whole

__all__ = ["Sensitivity"]

FORMAT = 1


@dataclass
class Sensitivity:
    """A metric against the share of units removed, one curve per part of a network.

    Args:
        of: Digest of the network and its options; a file of another is refused.
        mode: ``max`` where a larger metric is better, ``min`` for a loss.
        baseline: The metric of the network as it is.
        points: Per part, share removed -> metric.
    """

    of: str
    mode: Literal["max", "min"] = "max"
    baseline: float | None = None
    points: dict[str, dict[float, float]] = field(default_factory=dict)

    def harm(self, part: str) -> list[tuple[float, float]]:
        """Give (share removed, what the metric loses), from (0, 0) on and never falling.

        A curve that dips after a rise is noise, or luck with this very cut: the rise counts.
        """
        assert self.baseline is not None
        sign = 1.0 if self.mode == "max" else -1.0
        ratios = sorted(self.points[part])
        losses = [sign * (self.baseline - self.points[part][ratio]) for ratio in ratios]
        losses = [np.inf if np.isnan(loss) else max(0.0, loss) for loss in losses]
        return list(zip([0.0, *ratios], np.maximum.accumulate([0.0, *losses]).tolist(), strict=True))

    def ratio_at(self, part: str, harm: float) -> float:
        """Give the largest share that can go before the metric loses more than ``harm``.

        >>> curve = Sensitivity("", "max", 0.9, {"fc": {0.5: 0.8, 0.9: 0.4}})
        >>> round(curve.ratio_at("fc", 0.05), 3), round(curve.ratio_at("fc", 0.3), 3)
        (0.25, 0.7)
        """
        curve = self.harm(part)
        for (ratio, loss), (further, more) in itertools.pairwise(curve):
            if more > harm:
                part_way = 0.0 if more == np.inf else (harm - loss) / (more - loss)
                return ratio + (further - ratio) * part_way
        return curve[-1][0]

    def write(self, file: Path) -> None:
        """Write it, whole or not at all."""
        points = {part: [[r, v] for r, v in sorted(curve.items())] for part, curve in self.points.items()}
        data = {
            "format": FORMAT,
            "of": self.of,
            "mode": self.mode,
            "baseline": self.baseline,
            "points": points,
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(data, indent=1).encode())

    @staticmethod
    def read(file: Path) -> Sensitivity:
        """Read what ``write`` wrote.

        Raises:
            OptionError: If it is no such file.
        """
        try:
            data: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']!r}")
            points = {part: {float(r): float(v) for r, v in curve} for part, curve in data["points"].items()}
            return Sensitivity(data["of"], data["mode"], data["baseline"], points)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise OptionError(
                f"{file} was to hold a sensitivity, and it does not ({type(error).__name__}: {error}); name "
                "another file, or remove it"
            ) from error
