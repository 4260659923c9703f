"""Selection: ratios, pools, caps and rounding against counts and units written by hand."""

from __future__ import annotations

import numpy as np
import pytest
from selections import kept, make_grid, make_group, run

from lightning_prune.graph.groups import Grid
from lightning_prune.selection.selecting import removals, violations

# Counts of a group that stands alone


@pytest.mark.parametrize(
    ("n", "ratio", "left"),
    [
        (3, 0.5, 2),
        (10, 0.9, 1),
        (100, 0.9, 10),
        (20, 0.7, 6),
        (5, 0.1 + 0.2, 4),
        (3, 1 / 6, 3),
        (7, 0.99, 1),
        (1, 0.5, 1),
    ],
)
def test_the_count_is_the_nearest_and_a_half_keeps_more(n: int, ratio: float, left: int) -> None:
    chosen = run([make_group("a", 0, n)], [([0], ratio)])
    assert (chosen.asked.tolist(), chosen.reached.tolist(), kept(chosen)) == (
        [left],
        [left],
        list(range(left)),
    )
    assert chosen.notes == ()


@pytest.mark.parametrize(
    ("ratio", "n", "gone"), [(0.15, 10, 1), (0.7 + 0.1, 10, 8), (0.5 * (1 / 3), 9, 1), (2 / 3, 3, 2)]
)
def test_removals_know_what_a_float_stands_for(ratio: float, n: int, gone: int) -> None:
    assert removals(ratio, n) == gone


def test_the_best_stay_and_of_equals_the_first() -> None:
    chosen = run([make_group("a", 0, 6)], [([0], 0.5)], scores=[[1, 2, 5, 2, 2, 2]])
    assert kept(chosen) == [1, 2, 3]


def test_units_without_a_finite_score_go_first() -> None:
    chosen = run([make_group("a", 0, 4)], [([0], 0.5)], scores=[[-np.inf, -3, -np.inf, -7]])
    assert kept(chosen) == [1, 3]


def test_ratios_count_from_the_first_step() -> None:
    once_cut = make_group("a", 0, 9)  # of 12
    assert run([once_cut], [([0], 0.5)], initial=[12]).reached.tolist() == [6]
    assert run([once_cut], [([0], 0.2)], initial=[12]).reached.tolist() == [9]


def test_groups_without_a_pool_or_ratio_stay_whole() -> None:
    groups = [make_group("a", 0, 9), make_group("b", 9, 9)]
    assert run(groups, [([1], 0.0)], round_to=4).reached.tolist() == [9, 9]


@pytest.mark.parametrize("pools", [[([0], 0.5)], [([0], 0.5), ([1], 0.0)]])
def test_a_grid_does_not_cut_what_is_asked_to_stay_whole(pools: list[tuple[list[int], float]]) -> None:
    groups = [make_group("q", 0, 8), make_group("v", 8, 8)]
    assert run(groups, pools, [make_grid([range(8), range(8, 16)])]).keep.all()


def test_locked_units_stay_and_the_rest_pays_as_far_as_it_can() -> None:
    group = [make_group("a", 0, 6)]
    assert kept(run(group, [([0], 0.5)], locked=[4, 5])) == [0, 4, 5]
    chosen = run(group, [([0], 0.5)], locked=[1, 2, 3, 5])
    assert kept(chosen) == [1, 2, 3, 5]
    assert chosen.asked.tolist() == [3]
    assert chosen.notes == (
        "max_pruning_ratio and units that must stay win over the ratio: a: 2 instead of 3 units go",
    )


# Pools of several groups


def test_a_pool_loses_its_lowest_scores_wherever_they_are() -> None:
    groups = [make_group("a", 0, 4), make_group("b", 4, 4)]
    chosen = run(groups, [([0, 1], 0.5)], scores=[[8, 7, 6, 1], [5, 4, 3, 2]])
    assert kept(chosen) == [0, 1, 2, 4]
    assert chosen.asked.tolist() == chosen.reached.tolist() == [3, 1]


def test_ties_at_a_common_threshold_are_cut_exactly() -> None:
    groups = [make_group("a", 0, 4), make_group("b", 4, 4)]
    assert kept(run(groups, [([0, 1], 0.25)], scores=[[1] * 4, [1] * 4])) == [0, 1, 2, 3, 4, 5]


def test_no_group_of_a_pool_dies_out() -> None:
    groups = [make_group("a", 0, 3), make_group("b", 3, 5)]
    chosen = run(groups, [([0, 1], 0.5)], scores=[[0, 1, 2], [13, 14, 15, 16, 17]])
    assert kept(chosen) == [2, 5, 6, 7]


def test_what_a_cap_forbids_is_taken_elsewhere() -> None:
    groups = [make_group("a", 0, 10), make_group("b", 10, 10)]
    scores = [list(range(10)), list(range(10, 20))]
    assert run(groups, [([0, 1], 0.4)], scores=scores).reached.tolist() == [2, 10]
    capped = run(groups, [([0, 1], 0.4)], scores=scores, cap=0.55)
    assert capped.reached.tolist() == [5, 7]
    assert capped.notes == ()


def test_caps_win_over_a_ratio_out_of_reach() -> None:
    chosen = run([make_group("a", 0, 100)], [([0], 0.9)], cap=0.5)
    assert (chosen.asked.tolist(), chosen.reached.tolist()) == ([10], [50])
    assert chosen.notes == (
        "max_pruning_ratio and units that must stay win over the ratio: a: 50 instead of 90 units go",
    )
    assert run([make_group("a", 0, 3)], [([0], 0.9)], cap=0.5).reached.tolist() == [2]


def test_a_cap_counts_from_the_first_step() -> None:
    assert run([make_group("a", 0, 8)], [([0], 0.9)], initial=[10], cap=0.5).reached.tolist() == [5]


# round_to


@pytest.mark.parametrize(
    ("n", "ratio", "round_to", "cap", "left"),
    [
        (20, 0.7, 8, 1.0, 8),  # asked 6: the smallest multiple
        (64, 0.3, 8, 1.0, 40),  # asked 45
        (64, 0.5, 8, 1.0, 32),
        (64, 0.99, 8, 1.0, 8),
        (8, 0.5, 8, 1.0, 8),
        (6, 0.5, 8, 1.0, 6),  # smaller than a multiple
        (30, 0.01, 8, 1.0, 24),  # asked all 30
        (100, 0.9, 8, 0.5, 56),  # 48 is forbidden
        (16, 0.9, 8, 0.25, 12),  # 8 is forbidden, 16 would undo the cut
        (20, 0.9, 8, 0.1, 18),  # no multiple from 18 to 20
        (21, 0.5, 1, 1.0, 11),
    ],
)
def test_rounding(n: int, ratio: float, round_to: int, cap: float, left: int) -> None:
    assert run([make_group("a", 0, n)], [([0], ratio)], round_to=round_to, cap=cap).reached.tolist() == [left]


def test_rounding_is_said() -> None:
    groups = [make_group("a", 0, 64), make_group("b", 64, 6), make_group("c", 70, 16)]
    chosen = run(groups, [([0], 0.3), ([1], 0.5), ([2], 0.9)], round_to=8, cap=0.75)
    assert chosen.notes == (
        "max_pruning_ratio and units that must stay win over the ratio: c: 12 instead of 14 units go",
        "round_to=8: a keeps 40 of 64, asked 45; c keeps 8 of 16, asked 2",
        "smaller than round_to=8, stays whole: b keeps 6 of 6, asked 3",
    )


def test_heads_are_not_rounded() -> None:
    assert run([make_group("h", 0, 12, "head")], [([0], 0.5)], round_to=8).reached.tolist() == [6]


def test_rounding_counts_the_positions_of_a_row() -> None:
    pairs = make_grid([[0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]])  # rotary: two positions per unit
    assert run([make_group("a", 0, 6)], [([0], 0.5)], [pairs], round_to=4).reached.tolist() == [2]
    with_fixed = make_grid([[0, 1, 2, 3, 4, 5, -1, -1]])
    assert run([make_group("a", 0, 6)], [([0], 0.5)], [with_fixed], round_to=4).reached.tolist() == [2]


def test_rounding_holds_in_every_row() -> None:
    rows = np.arange(36).reshape(3, 12)
    chosen = run([make_group("a", 0, 36)], [([0], 0.3)], [make_grid(rows)], round_to=4)
    assert (chosen.asked.tolist(), chosen.reached.tolist()) == ([24], [24])
    chosen = run([make_group("a", 0, 36)], [([0], 0.5)], [make_grid(rows)], round_to=4)
    assert (chosen.asked.tolist(), chosen.reached.tolist()) == ([18], [12])


# The check afterwards


def test_violations_name_rows_and_reason() -> None:
    groups = [make_group("q", 0, 3), make_group("v", 3, 3)]
    grid = make_grid([[0, 1, 2], [3, 4, 5]], reason="view in attention.py:12")
    keep = np.array([1, 1, 0, 1, 0, 0], bool)
    assert violations(groups, [grid], keep) == (
        "view in attention.py:12: all rows must keep the same and at least one, got row 0 (q) 2, row 1 (v) 1",
    )


@pytest.mark.parametrize(
    ("grid", "good"),
    [
        (make_grid([[0, 1], [2, 3]]), True),
        (make_grid([[0, 1], [2, -1]]), False),
        (make_grid([[0, 0], [2, -1]]), True),
        (make_grid([[0, 1], [4, 5]]), False),  # row 1 is empty
        (make_grid([[1], [5]]), False),
        (make_grid([[0, 1], [4, 5]], owners=[-1, 5]), True),  # row 1 is dead
        (make_grid([[0, 2], [1, 3, 2, 0]], scale=[1.0, 0.5]), False),
        (make_grid([[0, 2], [0, 2, 0, 2]], scale=[1.0, 0.5]), True),
        (make_grid([[0, 2], [0]], offset=[0, 1]), True),
    ],
)
def test_violations_by_hand(grid: Grid, good: bool) -> None:
    keep = np.array([1, 0, 1, 0, 0, 0], bool)
    assert (violations([make_group("a", 0, 6)], [grid], keep) == ()) == good
