"""The congruence rules, each on a ledger made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lightning_prune.tracing.labels import FROZEN, Ints, Ledger
from lightning_prune.tracing.solver import Classes, solve


class Hand:
    """A ledger with verbs on single atoms."""

    def __init__(self, atoms: int) -> None:
        self.ledger = Ledger()
        self.ledger.new((atoms,))

    def tie(self, *pairs: tuple[int, int]) -> Hand:
        left, right = np.array(pairs).T
        self.ledger.tie(left, right, 0)
        return self

    def freeze(self, *atoms: int) -> Hand:
        self.ledger.freeze(np.array(atoms), 0)
        return self

    def leaf(self, *triples: tuple[int, int, int]) -> Hand:
        """(row, cell, leaf)."""
        row, cell, leaf = np.array(triples).T
        self.ledger.ands.append((row, cell, leaf))
        return self

    def heads(self, *rows: int) -> Hand:
        self.ledger.head_rows.append(np.array(rows))
        return self

    def solve(self, lone: Ints | None = None) -> Classes:
        return solve(self.ledger, lone)


def partition(classes: Classes) -> set[frozenset[int]]:
    """Atoms that are one class; the frozen class holds atom 0."""
    table: dict[int, set[int]] = {}
    for atom, name in enumerate(classes.of.tolist()):
        table.setdefault(name, set()).add(atom)
    assert FROZEN in table[classes.of[FROZEN]]
    assert classes.of[FROZEN] == FROZEN
    return {frozenset(s) for s in table.values()}


def sets(*groups: Any) -> set[frozenset[int]]:
    return {frozenset(g) for g in groups}


# -- ties and freezes ----------------------------------------------------------


def test_without_ties_every_atom_is_a_class() -> None:
    assert partition(Hand(3).solve()) == sets([0], [1], [2], [3])


def test_ties_are_transitive() -> None:
    assert partition(Hand(5).tie((1, 2), (4, 2)).tie((3, 5)).solve()) == sets([0], [1, 2, 4], [3, 5])


def merged_one_by_one(atoms: int, pairs: list[tuple[int, int]]) -> set[frozenset[int]]:
    """The naive way: of two sets that a pair joins, every atom moves into the first."""
    sets_ = {atom: {atom} for atom in range(atoms + 1)}
    for left, right in pairs:
        together = sets_[left] | sets_[right]
        sets_.update(dict.fromkeys(together, together))
    return {frozenset(s) for s in sets_.values()}


@pytest.mark.parametrize("seed", range(20))
def test_ties_make_the_classes_that_merging_one_by_one_makes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pairs = [(int(a), int(b)) for a, b in rng.integers(0, 61, (int(rng.integers(1, 60)), 2))]
    assert partition(Hand(60).tie(*pairs).solve()) == merged_one_by_one(60, pairs)


@pytest.mark.parametrize("center", [1, 5, 9])
def test_what_is_tied_to_one_atom_is_one_class_in_whatever_order(center: int) -> None:
    others = [atom for atom in range(1, 10) if atom != center]
    assert partition(Hand(9).tie(*[(center, o) for o in others]).solve()) == sets([0], range(1, 10))
    assert partition(Hand(9).tie(*[(o, center) for o in others[::-1]]).solve()) == sets([0], range(1, 10))


def test_classes_are_numbered_by_their_first_atoms() -> None:
    assert Hand(6).tie((2, 6), (3, 1)).solve().of.tolist() == [0, 1, 2, 1, 3, 4, 2]


def test_what_is_tied_to_something_frozen_stays() -> None:
    assert partition(Hand(4).tie((1, 2), (3, 4)).freeze(2).solve()) == sets([0, 1, 2], [3, 4])


def test_atoms_can_be_frozen_from_outside() -> None:
    hand = Hand(4).tie((1, 2))
    assert partition(hand.solve(np.array([1, 4]))) == sets([0, 1, 2, 4], [3])
    assert partition(hand.solve()) == sets([0], [1, 2], [3], [4])


# -- leaf = row AND cell -------------------------------------------------------


def test_equal_rows_and_cells_make_equal_leaves() -> None:
    hand = Hand(6).heads(1, 4).leaf((1, 2, 3), (4, 5, 6)).tie((1, 4), (2, 5))
    assert partition(hand.solve()) == sets([0], [1, 4], [2, 5], [3, 6])


def test_equal_leaves_and_rows_have_equal_cells() -> None:
    hand = Hand(8).heads(1, 4).leaf((1, 2, 3), (4, 5, 6), (1, 7, 8)).tie((1, 4), (3, 6))
    assert partition(hand.solve()) == sets([0], [1, 4], [2, 5], [3, 6], [7], [8])


def test_equal_leaves_and_cells_have_equal_rows() -> None:
    """The rows differ in their other leaf, so it is not their content that makes them equal."""
    hand = Hand(10).heads(1, 4).leaf((1, 2, 3), (4, 5, 6), (1, 7, 8), (4, 9, 10)).tie((2, 5), (3, 6))
    assert partition(hand.solve()) == sets([0], [1, 4], [2, 5], [3, 6], [7], [8], [9], [10])


def test_a_frozen_row_leaves_the_cell() -> None:
    hand = Hand(3).heads(1).leaf((1, 2, 3)).freeze(1)
    assert partition(hand.solve()) == sets([0, 1], [2, 3])


def test_a_frozen_cell_leaves_the_row() -> None:
    hand = Hand(3).heads(1).leaf((1, 2, 3)).freeze(2)
    assert partition(hand.solve()) == sets([0, 2], [1, 3])


def test_a_frozen_leaf_freezes_row_and_cell() -> None:
    hand = Hand(5).heads(1).leaf((1, 2, 3), (1, 4, 5)).freeze(3)
    assert partition(hand.solve()) == sets([0, 1, 2, 3], [4, 5])


def test_a_leaf_that_is_its_own_row_is_its_cell_too() -> None:
    hand = Hand(5).heads(1).leaf((1, 2, 3), (1, 4, 5)).tie((3, 1))
    classes = hand.solve()
    assert classes.of[1] == classes.of[2] == classes.of[3]


def test_rows_of_equal_leaves_are_one_row() -> None:
    hand = Hand(10).heads(1, 2)
    hand.leaf((1, 3, 4), (1, 5, 6), (2, 7, 8), (2, 9, 10)).tie((4, 8), (6, 10))
    assert partition(hand.solve()) == sets([0], [1, 2], [3, 7], [4, 8], [5, 9], [6, 10])


def test_rows_that_share_one_of_two_leaves_are_not_one_row() -> None:
    hand = Hand(10).heads(1, 2)
    hand.leaf((1, 3, 4), (1, 5, 6), (2, 7, 8), (2, 9, 10)).tie((4, 8))
    assert len(solve(hand.ledger).of) == 11
    assert partition(hand.solve()) == sets([0, 1, 2], [3, 4, 7, 8], [5, 6], [9, 10])


# -- which rows may go ---------------------------------------------------------


def test_rows_that_are_no_heads_stay_and_their_leaves_are_their_cells() -> None:
    hand = Hand(8).heads(5).leaf((1, 2, 3), (5, 6, 7))
    assert partition(hand.solve()) == sets([0, 1], [2, 3], [4], [5], [6], [7], [8])


def test_a_row_that_is_tied_to_a_head_is_one() -> None:
    hand = Hand(6).heads(4).leaf((1, 2, 3)).tie((1, 4))
    classes = hand.solve()
    assert partition(classes) == sets([0], [1, 4], [2], [3], [5], [6])
    assert classes.is_head[classes.of[1]]


def test_a_leaf_that_is_cut_two_ways_keeps_its_rows() -> None:
    """Six channels read as 2 x 3 and as 3 x 2, both as heads: neither can be taken whole."""
    ledger = Ledger()
    flat = ledger.new((6,))
    by_two, _ = ledger.divide(flat, 2, 0)
    by_three, _ = ledger.divide(flat, 3, 0)
    ledger.head_rows += [by_two.ravel(), by_three.ravel()]
    classes = solve(ledger)
    assert not classes.of[by_two].any()
    assert not classes.of[by_three].any()
    assert len(set(classes.of[flat].tolist()) - {FROZEN}) == 6
    assert not (classes.row[classes.of[flat]] >= 0).any()


def test_one_way_alone_keeps_its_heads() -> None:
    ledger = Ledger()
    flat = ledger.new((6,))
    heads, cells = ledger.divide(flat, 2, 0)
    ledger.head_rows.append(heads.ravel())
    classes = solve(ledger)
    of = classes.of
    assert of[heads].all()
    assert classes.row[of[flat]].tolist() == np.repeat(of[heads], 3).tolist()
    assert classes.cell[of[flat]].tolist() == of[cells].ravel().tolist()


# -- what a class depends on ---------------------------------------------------


def elements(classes: Classes, *atoms: int) -> list[set[int]]:
    position, found = classes.elements(classes.of[list(atoms)])
    return [set(found[position == i].tolist()) for i in range(len(atoms))]


def test_elements_of_plain_frozen_and_composed_classes() -> None:
    classes = Hand(5).heads(1).leaf((1, 2, 3)).freeze(5).solve()
    of = classes.of
    assert elements(classes, 4, 5, 3) == [{of[4]}, set(), {of[1], of[2]}]


def test_elements_of_nothing() -> None:
    position, found = Hand(2).solve().elements(np.zeros(3, np.int64))
    assert (position.tolist(), found.tolist()) == ([], [])


def test_nested_elements() -> None:
    """5 = 1 AND 4, and 4 = 2 AND 3."""
    classes = Hand(5).heads(1, 2).leaf((1, 4, 5), (2, 3, 4)).solve()
    of = classes.of
    assert elements(classes, 5, 4) == [{of[1], of[2], of[3]}, {of[2], of[3]}]


def test_a_class_that_depends_on_itself_is_removable_by_itself() -> None:
    """2 = 1 AND 3, and 3 = 1 AND 2."""
    classes = Hand(3).heads(1).leaf((1, 3, 2), (1, 2, 3)).solve()
    of = classes.of
    assert elements(classes, 2, 3) == [{of[2]}, {of[3]}]


# -- flags ---------------------------------------------------------------------


def test_flags_of_heads_and_their_cells() -> None:
    classes = Hand(4).heads(1).leaf((1, 2, 3)).solve()
    names = classes.of[[1, 2, 3, 4]]
    assert classes.is_row[names].tolist() == [True, False, False, False]
    assert classes.is_head[names].tolist() == [True, False, False, False]
    assert classes.is_head_dim[names].tolist() == [False, True, False, False]


@pytest.mark.parametrize("frozen", [False, True])
def test_heads_of_one_dimension_are_rows_unless_they_stay(frozen: bool) -> None:
    hand = Hand(2).heads(1)
    hand.ledger.narrow_heads.append(np.array([1]))
    hand.ledger.head_cells.append(np.array([2]))
    if frozen:
        hand.freeze(1, 2)
    classes = hand.solve()
    assert bool(classes.is_row[classes.of[1]]) is not frozen
    assert bool(classes.is_head_dim[classes.of[2]]) is not frozen
    assert not classes.is_row[FROZEN]
    assert not classes.is_head[FROZEN]
    assert not classes.is_head_dim[FROZEN]
