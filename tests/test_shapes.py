"""Reshapes: which dimensions meet, how labels merge and split, and what scopes become."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from lightning_prune.tracing.labels import FROZEN, Ints, Label, Ledger, Site
from lightning_prune.tracing.shapes import blocks, divide, merge, reshape
from lightning_prune.tracing.solver import solve


def ledger_and_why() -> tuple[Ledger, int]:
    ledger = Ledger()
    return ledger, ledger.why(Site("view", "net", "net.py:1"), "reshaped")


def run(ledger: Ledger, dims: Sequence[Label | None], before: Any, after: Any) -> tuple[Label | None, ...]:
    return reshape(ledger, tuple(dims), before, after, ledger.why(Site("view", "", ""), "reshaped"))


def numbers(label: Label | None) -> Any:
    assert label is not None
    return label.tolist()


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((4,), (4,), [([0], [0])]),
        ((2, 6), (12,), [([0, 1], [0])]),
        ((12,), (2, 6), [([0], [0, 1])]),
        ((2, 6, 4), (2, 24), [([0], [0]), ([1, 2], [1])]),
        ((6, 4), (4, 6), [([0, 1], [0, 1])]),
        ((2, 3, 4), (3, 2, 4), [([0, 1], [0, 1]), ([2], [2])]),
        ((1, 4), (4,), [([0], []), ([1], [0])]),
        ((4,), (4, 1), [([0], [0]), ([], [1])]),
        ((1, 4), (1, 4), [([0], [0]), ([1], [1])]),
        ((4, 1, 3), (4, 3), [([0], [0]), ([1], []), ([2], [1])]),
        ((), (1,), [([], [0])]),
        ((8, 2), (2, 4, 2), [([0], [0, 1]), ([1], [2])]),
    ],
    ids=str,
)
def test_blocks(before: Any, after: Any, expected: Any) -> None:
    assert blocks(before, after) == expected


# -- merging -------------------------------------------------------------------


def test_an_outer_label_repeats_when_it_is_merged() -> None:
    ledger, _ = ledger_and_why()
    outer = ledger.new((2, 1))
    (out,) = run(ledger, (outer, None), (2, 3), (6,))
    assert numbers(out) == [1, 1, 1, 2, 2, 2]
    assert not ledger.ands


def test_an_inner_label_is_tiled_when_it_is_merged() -> None:
    ledger, _ = ledger_and_why()
    inner = ledger.new((1, 3))
    (out,) = run(ledger, (None, inner), (2, 3), (6,))
    assert numbers(out) == [1, 2, 3, 1, 2, 3]


def test_two_labels_merge_into_row_and_cell() -> None:
    ledger, _ = ledger_and_why()
    row, cell = ledger.new((2, 1)), ledger.new((1, 3))  # atoms 1, 2 and 3, 4, 5
    (out,) = run(ledger, (row, cell), (2, 3), (6,))
    rows, cells, leaves = ledger.ands[0]
    by_leaf = {a: (r, c) for r, c, a in zip(rows.tolist(), cells.tolist(), leaves.tolist(), strict=True)}
    assert [by_leaf[a] for a in numbers(out)] == [(1, 3), (1, 4), (1, 5), (2, 3), (2, 4), (2, 5)]


def test_merge_is_row_major_over_three_dimensions() -> None:
    ledger, why = ledger_and_why()
    middle = ledger.new((1, 2, 1))
    assert merge(ledger, [None, middle, None], [0, 1, 2], [2, 2, 2], why).tolist() == [
        [[[1, 1, 2, 2, 1, 1, 2, 2]]]
    ]


def test_an_outer_label_that_depends_on_the_inner_one_is_cut_alike() -> None:
    """Positions of dimension 0 that differ along dimension 1 cannot be merged in order: they tie."""
    ledger, _ = ledger_and_why()
    outer = ledger.new((2, 3))
    (out,) = run(ledger, (outer, None), (2, 3), (6,))
    of = solve(ledger).of
    assert numbers(of[out]) == numbers(of[np.repeat(outer[:, 0], 3)])
    assert len(set(of[outer].ravel())) == 2


# -- splitting -----------------------------------------------------------------


def test_a_tiled_label_splits_into_its_tile() -> None:
    ledger, _ = ledger_and_why()
    tile = ledger.new((3,))
    rows, cells = run(ledger, (np.tile(tile, 2),), (6,), (2, 3))
    assert rows is None
    assert numbers(cells) == [[1, 2, 3]]
    assert not ledger.ands


def test_a_repeated_label_splits_into_what_is_repeated() -> None:
    ledger, _ = ledger_and_why()
    rows, cells = run(ledger, (np.repeat(ledger.new((2,)), 3),), (6,), (2, 3))
    assert numbers(rows) == [[1], [2]]
    assert cells is None


def test_a_plain_label_splits_into_rows_and_cells_with_equal_counts() -> None:
    ledger, _ = ledger_and_why()
    flat = ledger.new((6,))
    rows, cells = run(ledger, (flat,), (6,), (2, 3))
    assert rows is not None
    assert cells is not None
    assert (rows.shape, cells.shape) == ((2, 1), (2, 3))
    row, cell, leaf = ledger.ands[0]
    assert leaf.tolist() == [1, 2, 3, 4, 5, 6]
    assert row.tolist() == np.repeat(rows.ravel(), 3).tolist()
    assert cell.tolist() == cells.ravel().tolist()
    [(grid, owners, _)] = ledger.grids
    assert owners is not None
    assert (grid.tolist(), owners.tolist()) == (cells.tolist(), rows.ravel().tolist())


def test_the_same_split_twice_gives_the_same_rows() -> None:
    ledger, _ = ledger_and_why()
    flat = ledger.new((6,))
    first, again = (run(ledger, (flat,), (6,), (2, 3)) for _ in range(2))
    assert [numbers(x) for x in first] == [numbers(x) for x in again]
    assert len(ledger.ands) == 1


def test_a_split_that_is_merged_again_is_the_label_it_was() -> None:
    ledger, _ = ledger_and_why()
    flat = ledger.new((6,))
    rows, cells = run(ledger, (flat,), (6,), (2, 3))
    (back,) = run(ledger, (rows, cells), (2, 3), (6,))
    assert rows is not None
    ledger.head_rows.append(rows.ravel())
    of = solve(ledger).of
    assert numbers(of[back]) == numbers(of[flat])
    assert len(set(of[flat].tolist()) - {FROZEN}) == 6


def test_divide_in_three() -> None:
    """[q0 q1 k0 k1 q0 q1 k0 k1]: tiled by 2, then two rows of two cells."""
    ledger, why = ledger_and_why()
    tile = ledger.new((4,))
    thrice = divide(ledger, np.tile(tile, 2), [2, 2, 2], why)
    assert thrice[0] is None
    assert [None if x is None else x.shape for x in thrice] == [None, (1, 2, 1), (1, 2, 2)]
    assert ledger.ands[0][2].tolist() == [1, 2, 3, 4]


# -- scopes --------------------------------------------------------------------


def test_a_label_scoped_from_outside_splits_within_its_scope() -> None:
    """Two groups with channels of their own: each splits by itself."""
    ledger, _ = ledger_and_why()
    label = ledger.new((2, 4))
    _, rows, cells = run(ledger, (None, label), (2, 4), (2, 2, 2))
    assert rows is not None
    assert cells is not None
    assert (rows.shape, cells.shape) == ((2, 2, 1), (2, 2, 2))
    assert len(np.unique(rows)) == 4
    assert ledger.ands[0][2].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]


def test_the_scope_of_a_label_is_split_with_its_dimension() -> None:
    ledger, _ = ledger_and_why()
    label = ledger.new((6, 4))
    first, second, third = run(ledger, (None, label), (6, 4), (2, 3, 4))
    assert (first, second) == (None, None)
    assert numbers(third) == np.arange(1, 25).reshape(2, 3, 4).tolist()


def test_the_scope_of_a_label_is_merged_with_its_dimensions() -> None:
    ledger, _ = ledger_and_why()
    label = ledger.new((2, 1, 4))
    _, out = run(ledger, (None, None, label), (2, 3, 4), (6, 4))
    expected = np.repeat(np.arange(1, 9).reshape(2, 4), 3, axis=0)
    assert numbers(out) == expected.tolist()


def test_a_scope_along_which_nothing_varies_is_dropped() -> None:
    ledger, _ = ledger_and_why()
    label = np.broadcast_to(ledger.new((1, 4)), (3, 4))
    _, out = run(ledger, (None, label), (3, 4), (3, 4))
    assert numbers(out) == [[1, 2, 3, 4]]


def test_labels_keep_their_axis_behind_a_split() -> None:
    ledger, _ = ledger_and_why()
    out = run(ledger, (None, ledger.new((1, 4))), (6, 4), (2, 3, 4))
    assert [None if x is None else x.shape for x in out] == [None, None, (1, 1, 4)]


# -- expanded dimensions -------------------------------------------------------


def solved(ledger: Ledger, label: Label | None) -> Ints:
    assert label is not None
    return solve(ledger).of[label]


def test_a_repeat_count_stays_when_what_it_repeats_is_labelled() -> None:
    """kv heads [2] expanded to [2, 3] and merged: the three query heads of a kv head go with it."""
    ledger, _ = ledger_and_why()
    heads, times = ledger.new((2, 1)), ledger.stretch(3).reshape(1, 3)
    (out,) = run(ledger, (heads, times), (2, 3), (6,))
    a, b = solved(ledger, heads).ravel().tolist()
    assert FROZEN not in (a, b)
    assert a != b
    assert solved(ledger, out).tolist() == [a, a, a, b, b, b]
    assert not solved(ledger, times).any()


def test_a_repeat_count_alone_stays_elastic() -> None:
    ledger, _ = ledger_and_why()
    times = ledger.stretch(3).reshape(1, 3)
    (out,) = run(ledger, (None, times), (2, 3), (6,))
    assert numbers(out) == [1, 2, 3, 1, 2, 3]
    assert solved(ledger, times).all()


# -- nothing to follow ---------------------------------------------------------


def test_unlabelled_and_empty_tensors_stay_unlabelled() -> None:
    ledger, _ = ledger_and_why()
    assert run(ledger, (None, None), (2, 3), (6,)) == (None,)
    assert run(ledger, (None, ledger.new((1, 3))), (0, 3), (0, 3, 1)) == (None, None, None)
    assert run(ledger, (np.zeros((6,), np.int64),), (6,), (2, 3)) == (None, None)


def test_dimensions_of_length_one_come_and_go() -> None:
    ledger, _ = ledger_and_why()
    label = ledger.new((1, 4))
    (out,) = run(ledger, (None, label), (1, 4), (4,))
    assert numbers(out) == [1, 2, 3, 4]
    first, second, third = run(ledger, (out,), (4,), (1, 4, 1))
    assert (first, third) == (None, None)
    assert numbers(second) == [[[1], [2], [3], [4]]]
