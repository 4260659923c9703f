"""Selection: every rule against counts and units written by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from lightning_prune.groups import Grid, Group
from lightning_prune.selection import Demand, Pool, Selection, removals, select, violations


def make_group(name: str, first: int, n: int, kind: str = "channel") -> Group:
    return Group(name, kind, np.arange(first, first + n), (), name)  # type: ignore[arg-type]


def make_grid(
    rows: Sequence[Sequence[int]],
    owners: Sequence[int] | None = None,
    scale: Sequence[float] | None = None,
    offset: Sequence[int] | None = None,
    reason: str = "view in net.py:7",
) -> Grid:
    return Grid(
        tuple(np.array(row, np.int64) for row in rows),
        np.array(owners if owners is not None else [-1] * len(rows), np.int64),
        tuple(scale or [1.0] * len(rows)),
        tuple(offset or [0] * len(rows)),
        reason,
    )


def falling(group: Group) -> np.ndarray:
    """Scores under which the first units are the best."""
    return -np.arange(group.n_units, dtype=float)


def run(
    groups: Sequence[Group],
    pools: Sequence[tuple[Sequence[int], float]],
    grids: Sequence[Grid] = (),
    scores: Sequence[Sequence[float]] | None = None,
    *,
    locked: Sequence[int] = (),
    initial: Sequence[int] | None = None,
    cap: float = 1.0,
    round_to: int | None = None,
) -> Selection:
    held = np.zeros(sum(g.n_units for g in groups), bool)
    held[list(locked)] = True
    demand = Demand(
        tuple(Pool(tuple(members), ratio) for members, ratio in pools),
        np.array(initial if initial is not None else [g.n_units for g in groups]),
        held,
        cap,
        round_to,
    )
    given = [falling(g) for g in groups] if scores is None else [np.array(s, float) for s in scores]
    chosen = select(groups, given, grids, demand)
    assert violations(groups, grids, chosen.keep) == ()
    assert chosen.reached.tolist() == [int(chosen.keep[g.units].sum()) for g in groups]
    return chosen


def kept(chosen: Selection) -> list[int]:
    return np.flatnonzero(chosen.keep).tolist()


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


# Attention: heads are rows, head dims are cells


def attention(heads: int, dims: int, owned: bool = True) -> tuple[list[Group], Grid]:
    groups = [make_group("h", 0, heads, "head"), make_group("c", heads, heads * dims, "head_dim")]
    cells = heads + np.arange(heads * dims).reshape(heads, dims)
    return groups, make_grid(cells, list(range(heads)) if owned else None)


def test_every_head_keeps_its_own_best_cells_and_equally_many() -> None:
    groups, grid = attention(2, 4)
    chosen = run(groups, [([1], 0.5)], [grid], scores=[[1, 2], [9, 1, 8, 7, 1, 2, 3, 4]])
    assert kept(chosen) == [0, 1, 2, 4, 8, 9]


def test_the_count_of_cells_is_rounded_per_row() -> None:
    groups, grid = attention(4, 3)
    chosen = run(groups, [([1], 0.5)], [grid])  # 1.5 of 3 go: one per head
    assert chosen.asked.tolist() == chosen.reached.tolist() == [4, 8]
    groups, grid = attention(2, 3)
    assert run(groups, [([1], 0.99)], [grid]).reached.tolist() == [2, 2]
    groups, grid = attention(2, 100)
    # 0.515 of 100 are 51.5, a half that rounds down; of all 200 they would be 103, so 52 or 51 by chance
    assert run(groups, [([1], 0.515)], [grid]).reached.tolist() == [2, 98]


def test_dead_heads_take_their_cells_along_and_out_of_the_count() -> None:
    groups, grid = attention(4, 4)
    chosen = run(groups, [([0], 0.5), ([1], 0.25)], [grid], scores=[[1, 4, 2, 3], [1] * 16])
    assert kept(chosen) == [1, 3, 8, 9, 10, 16, 17, 18]
    assert chosen.asked.tolist() == chosen.reached.tolist() == [2, 6]
    assert chosen.notes == ()


def test_heads_alone_leave_the_cells_of_live_heads_whole() -> None:
    groups, grid = attention(4, 4)
    assert run(groups, [([0], 0.5)], [grid], round_to=8).reached.tolist() == [2, 8]


def test_later_steps_count_cells_per_head_of_the_first() -> None:
    groups, grid = attention(3, 6)  # of 4 heads with 8 cells
    chosen = run(groups, [([0], 0.5), ([1], 0.5)], [grid], initial=[4, 32])
    assert chosen.reached.tolist() == [2, 8]
    chosen = run(groups, [([1], 0.25)], [grid], initial=[4, 32])
    assert chosen.reached.tolist() == [3, 18]


def test_cells_shared_by_all_heads_live_while_one_head_lives() -> None:
    groups = [make_group("h", 0, 3, "head"), make_group("c", 3, 4, "head_dim")]
    grid = make_grid([[3, 4, 5, 6]] * 3, [0, 1, 2])
    assert kept(run(groups, [([0], 0.6), ([1], 0.5)], [grid])) == [0, 3, 4]


def test_cells_of_a_dead_head_die_in_flat_rows_too() -> None:
    groups = [make_group("h", 0, 2, "head"), make_group("c", 2, 4, "head_dim"), make_group("r", 6, 4)]
    grids = [make_grid([[2, 3], [4, 5]], [0, 1]), make_grid([[2, 3, 4, 5], [6, 7, 8, 9]])]
    chosen = run(groups, [([0], 0.5), ([1], 0.1), ([2], 0.5)], grids)
    assert kept(chosen) == [0, 2, 3, 6, 7]


def test_heads_stay_where_a_grid_cannot_do_without_their_cells() -> None:
    groups = [make_group("h", 0, 2, "head"), make_group("c", 2, 4, "head_dim"), make_group("r", 6, 4)]
    grids = [make_grid([[2, 3], [4, 5]], [0, 1]), make_grid([[2, 3, 4, 5], [6, 7, 8, 9]])]
    chosen = run(groups, [([0], 0.5), ([1], 0.1)], grids)  # the residual width 4 is asked to stay
    assert chosen.keep.all()
    assert "h: 0 instead of 1 units go" in chosen.notes[0]


def test_query_heads_inside_key_heads() -> None:
    groups = [
        make_group("kv", 0, 2, "head"),
        make_group("q", 2, 6, "head"),
        make_group("c", 8, 12, "head_dim"),
    ]
    rows = make_grid([[2, 3, 4], [5, 6, 7]], [0, 1])
    cells = make_grid(8 + np.arange(12).reshape(6, 2), list(range(2, 8)))
    chosen = run(groups, [([0], 0.5), ([1], 0.3), ([2], 0.5)], [rows, cells])
    assert kept(chosen) == [0, 2, 3, 8, 10]


# Other structures


def test_halves_of_a_chunk_share_one_count() -> None:
    grid = make_grid([[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]])
    chosen = run([make_group("a", 0, 10)], [([0], 0.4)], [grid], scores=[[9, 8, 7, 6, 5, 0, 1, 2, 3, 4]])
    assert kept(chosen) == [0, 1, 2, 7, 8, 9]


def test_groups_bound_by_a_grid_meet_in_the_middle() -> None:
    groups = [make_group("q", 0, 8), make_group("v", 8, 8)]
    chosen = run(groups, [([0], 0.25), ([1], 0.75)], [make_grid([range(8), range(8, 16)])])
    assert chosen.asked.tolist() == [6, 2]
    assert chosen.reached.tolist() == [4, 4]
    assert chosen.notes == ("view in net.py:7: q keeps 4 of 8, asked 6; v keeps 4 of 8, asked 2",)


def test_the_residual_width_is_heads_times_head_dim() -> None:
    groups = [make_group("r", 0, 48), make_group("c", 48, 4, "head_dim")]
    grid = make_grid([range(48), np.repeat(np.arange(48, 52), 12)])
    chosen = run(groups, [([0], 0.4), ([1], 0.5)], [grid])  # 29 and 2 asked
    assert chosen.asked.tolist() == [29, 2]
    assert chosen.reached.tolist() == [24, 2]


def test_scale_and_offset_count() -> None:
    groups = [make_group("a", 0, 6), make_group("b", 6, 13)]
    grid = make_grid([range(6), range(6, 19)], scale=[2.0, 1.0], offset=[1, 0])
    assert run(groups, [([0], 0.5), ([1], 0.5)], [grid]).reached.tolist() == [3, 7]
    halves = make_grid([range(6), [*range(6, 18)]], scale=[1.0, 0.5])
    assert run([groups[0], make_group("b", 6, 12)], [([0, 1], 0.5)], [halves]).reached.tolist() == [3, 6]


def test_groups_of_a_convolution_keep_equally_many_and_at_least_one() -> None:
    rows = np.arange(32).reshape(8, 4)
    scores = np.where(np.arange(32) < 4, 0.0, 1.0 + np.arange(32))  # the first group is the weakest
    chosen = run([make_group("a", 0, 32)], [([0], 0.75)], [make_grid(rows)], scores=[scores])
    assert kept(chosen) == [0, *range(7, 32, 4)]


def test_fixed_positions_pin_what_is_bound_to_them() -> None:
    groups = [make_group("a", 0, 4), make_group("b", 4, 4)]
    chosen = run(
        groups, [([0], 0.5), ([1], 0.5)], [make_grid([range(4), [-1] * 4], reason="add in net.py:9")]
    )
    assert chosen.reached.tolist() == [4, 2]
    assert chosen.notes == ("add in net.py:9: a keeps 4 of 4, asked 2",)


def test_a_row_may_be_left_with_fixed_positions_only() -> None:
    grid = make_grid([[0, 1, -1], [2, 3, -1]])
    chosen = run(
        [make_group("a", 0, 4), make_group("b", 4, 8)],
        [([0, 1], 0.5)],
        [grid],
        scores=[[0, 1, 2, 3], [9] * 8],
    )
    assert chosen.reached.tolist() == [2, 4]


def test_locked_cells_hold_the_count_of_all_rows_up() -> None:
    grid = make_grid([[0, 1, 2, 3], [4, 5, 6, 7]])
    chosen = run([make_group("a", 0, 8)], [([0], 0.75)], [grid], locked=[1, 2, 3])
    assert kept(chosen) == [1, 2, 3, 4, 5, 6]


def test_rows_of_several_blocks_are_solved_as_a_whole() -> None:
    groups = [make_group("a", 0, 4), make_group("b", 4, 6), make_group("c", 10, 10)]
    grid = make_grid([[*range(10)], [*range(10, 20)]], reason="cat in net.py:3")
    chosen = run(groups, [([0], 0.5), ([1], 0.5), ([2], 0.5)], [grid])
    assert chosen.reached.tolist() == [2, 3, 5]
    chosen = run(groups, [([0], 0.5), ([1], 0.5), ([2], 0.1)], [grid])
    assert chosen.reached.sum() == 2 * chosen.reached[2]
    assert 5 <= chosen.reached[2] <= 9
    chosen = run(groups, [([0], 0.5), ([1], 0.5), ([2], 0.5)], [grid], round_to=4)
    assert chosen.reached[2] == 4
    assert chosen.reached[:2].sum() == 4


def test_partial_rotary_heads() -> None:
    """Per head two single cells and three pairs, a pair standing twice in its row."""
    rows = [[h * 5 + i for i in (0, 1, 2, 2, 3, 3, 4, 4)] for h in range(3)]
    chosen = run([make_group("c", 0, 15, "head_dim")], [([0], 0.4)], [make_grid(rows)])
    assert chosen.reached.tolist() == [9]


def test_the_rest_of_a_pool_makes_up_for_its_grids() -> None:
    groups = [make_group("a", 0, 9), make_group("b", 9, 11)]
    scores = [[0, 1, 2, 3, 90, 91, 92, 93, 94], list(range(10, 21))]
    chosen = run(groups, [([0, 1], 0.25)], [make_grid(np.arange(9).reshape(3, 3))], scores=scores)
    assert chosen.asked.tolist() == [5, 10]  # rows of a shall be equal: 6
    assert chosen.reached.tolist() == [6, 9]
    assert chosen.notes == (
        "view in net.py:7: a keeps 6 of 9, asked 5",
        "makes up for the rest of its pool: b keeps 9 of 11, asked 10",
    )


def test_positions_of_units_of_no_group_stay() -> None:
    group = make_group("a", 0, 3)
    demand = Demand((Pool((0,), 0.5),), np.array([3]), np.zeros(6, bool))
    chosen = select([group], [falling(group)], [make_grid([[0, 1, 2], [3, 4, 5]])], demand)
    assert chosen.keep.all()


def test_a_model_without_units() -> None:
    chosen = select([], [], [], Demand((), np.zeros(0, np.int64), np.zeros(0, bool)))
    assert (chosen.keep.size, chosen.notes) == (0, ())


def test_the_input_is_left_alone() -> None:
    group, score, held = make_group("a", 0, 4), np.array([1.0, 2.0, 3.0, 4.0]), np.zeros(4, bool)
    select([group], [score], [], Demand((Pool((0,), 0.5),), np.array([4]), held))
    assert score.tolist() == [1, 2, 3, 4]
    assert not held.any()


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
