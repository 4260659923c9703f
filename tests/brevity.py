"""Lets a fit end soon."""

from __future__ import annotations

import pytest

from lightning_prune.training.finish import FitReport


def measure_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take time for a few forwards alone: a report measures latency for a second, and no test looks at it."""
    short = property(lambda report: 0.001, lambda report, value: None)
    monkeypatch.setattr(FitReport, "seconds", short, raising=False)
