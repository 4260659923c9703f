"""Schedules end where they were told to, and a wrong one is named."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from lightning_prune.errors import OptionError
from lightning_prune.selection.schedules import SCHEDULES, resolve


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("linear", [0, 0.125, 0.25, 0.375, 0.5]),
        ("cubic", [0, 0.5 * (1 - 0.421875), 0.5 * 0.875, 0.5 * (1 - 0.015625), 0.5]),
        ("exponential", [0, 1 - 0.5**0.25, 1 - 0.5**0.5, 1 - 0.5**0.75, 0.5]),
        ("one_shot", [0, 0.5, 0.5, 0.5, 0.5]),
    ],
)
def test_named_schedules_give_the_numbers_written_out(name, expected):
    assert resolve(name, 0.5, 4) == pytest.approx(expected)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize("target", [0.0, 0.1, 0.3, 0.7, 0.999])
@pytest.mark.parametrize("steps", [1, 3, 10, 49])
def test_every_schedule_starts_at_nothing_and_ends_exactly_at_the_target(name, target, steps):
    ratios = resolve(name, target, steps)
    assert len(ratios) == steps + 1
    assert ratios[0] == 0
    assert ratios[-1] == target
    assert ratios == sorted(ratios)


def test_cubic_removes_most_at_first_and_exponential_keeps_a_constant_factor():
    cubic, exponential = resolve("cubic", 0.8, 5), resolve("exponential", 0.8, 5)
    removed = [b - a for a, b in pairwise(cubic)]
    assert removed == sorted(removed, reverse=True)
    factors = [(1 - b) / (1 - a) for a, b in pairwise(exponential)]
    assert factors == pytest.approx([0.2**0.2] * 5)


def test_a_callable_receives_target_and_steps():
    seen = []

    def own(target, steps):
        seen.append((target, steps))
        return (0, 0.1, 0.4)

    assert resolve(own, 0.4, 2) == [0, 0.1, 0.4]
    assert seen == [(0.4, 2)]


def test_rounding_noise_of_a_callable_is_smoothed():
    ratios = resolve(lambda target, steps: [-1e-17, 0.1, 0.1 - 1e-12, 0.3 + 1e-13, 0.3 - 1e-12], 0.3, 4)
    assert ratios[0] == 0
    assert ratios[-1] == 0.3
    assert ratios == sorted(ratios)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([0, 0.5], "must give 3 numbers.*got 2"),
        ([0, 0.1, 0.2, 0.5], "must give 3 numbers.*got 4"),
        ([0.1, 0.2, 0.5], "start at 0, got 0.1"),
        ([0, 0.4, 0.3], "never decrease, got 0.4 and then 0.3 at step 2"),
        ([0, 0.2, 0.4], "end at 0.5, got 0.4"),
        ([0, 0.2, 0.6], "end at 0.5, got 0.6"),
        ([0, 1.0, 0.5], r"stay in \[0, 1\), got 1.0 at step 1"),
        ([-0.1, 0.2, 0.5], r"stay in \[0, 1\), got -0.1 at step 0"),
        ([0, math.nan, 0.5], r"stay in \[0, 1\), got nan at step 1"),
        (["a", 0.2, 0.5], "must give 3 numbers, got"),
        (0.5, "must give 3 numbers, got 0.5"),
    ],
)
def test_a_wrong_schedule_is_named(found, message):
    with pytest.raises(OptionError, match=message):
        resolve(lambda target, steps: found, 0.5, 2)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(OptionError, match=r"linear, cubic, exponential, one_shot.*'cosine'"):
        resolve("cosine", 0.5, 2)


@pytest.mark.parametrize("schedule", [None, 3])
def test_what_is_no_schedule_is_refused(schedule):
    with pytest.raises(OptionError, match="name or a callable"):
        resolve(schedule, 0.5, 2)


@pytest.mark.parametrize("target", [1, 1.2, -0.1, math.nan, "0.5", True])
def test_a_ratio_out_of_range_is_refused(target):
    with pytest.raises(OptionError, match=r"\[0, 1\)"):
        resolve("linear", target, 2)


@pytest.mark.parametrize("steps", [0, -1, 2.0, True])
def test_steps_must_be_a_positive_whole_number(steps):
    with pytest.raises(OptionError, match="at least 1"):
        resolve("linear", 0.5, steps)
