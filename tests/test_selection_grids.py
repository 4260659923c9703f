"""Selection under grids: attention, chunks, convolution groups, concatenations, by hand."""

from __future__ import annotations

import numpy as np
from selections import falling, kept, make_grid, make_group, run

from lightning_prune.graph.groups import Grid, Group
from lightning_prune.selection.selecting import Demand, Pool, select

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


def test_of_equally_near_counts_the_larger_stays() -> None:
    groups = [make_group("q", 0, 3), make_group("v", 3, 3)]
    chosen = run(groups, [([0], 0.4), ([1], 0.7)], [make_grid([range(3), range(3, 6)])])
    assert chosen.asked.tolist() == [2, 1]
    assert chosen.reached.tolist() == [2, 2]


def test_the_deviations_of_all_pools_are_least_in_sum() -> None:
    groups = [make_group(name, first, 10) for name, first in (("q", 0), ("k", 10), ("v", 20))]
    grid = make_grid(np.arange(30).reshape(3, 10))
    chosen = run(groups, [([0], 0.8), ([1], 0.8), ([2], 0.2)], [grid])
    assert chosen.reached.tolist() == [2, 2, 2]


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
    grid = make_grid([[0, 1, -1], [2, 3, -1]])  # unit 4 stands in no row
    assert kept(run([make_group("a", 0, 5)], [([0], 0.8)], [grid], scores=[[0, 1, 2, 3, 4]])) == [4]


def test_no_row_is_left_empty() -> None:
    groups = [make_group("a", 0, 2), make_group("b", 2, 3)]
    grid = make_grid([[0, 1], [2, 3, 4]], offset=[1, 0])
    assert run(groups, [([0], 0.9), ([1], 0.9)], [grid]).reached.tolist() == [1, 2]


def test_heads_bound_to_channels_go_only_as_far_as_those() -> None:
    groups = [make_group("h", 0, 4, "head"), make_group("a", 4, 4)]
    grid = make_grid([range(4), range(4, 8)])
    assert run(groups, [([0], 0.5), ([1], 0.5)], [grid]).reached.tolist() == [2, 2]
    assert run(groups, [([0], 0.5)], [grid]).keep.all()


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
