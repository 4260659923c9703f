"""Random numbers drawn on the side change none that are drawn later, and wake no GPU."""

from __future__ import annotations

import random
from contextlib import suppress

import numpy as np
import pytest
import torch

from lightning_prune.randomness import randomness_kept


def draw():
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


def test_what_is_drawn_inside_is_drawn_again():
    with randomness_kept():
        inside = draw()
    assert draw() == inside


def test_states_come_back_after_an_error():
    inside = []
    with suppress(KeyError), randomness_kept():
        inside += draw()
        raise KeyError
    assert draw() == inside


def test_gpus_that_nobody_has_used_are_not_asked(monkeypatch):
    def asked(*_):
        raise AssertionError("a GPU was asked for its random state")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", asked)
    with randomness_kept():
        draw()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(AssertionError, match="was asked"), randomness_kept():
        draw()
