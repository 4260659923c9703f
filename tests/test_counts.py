"""Counts that rows permit, against trying all of them."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from lightning_prune.selection.counts import Component, candidates

Rows = list[tuple[dict[int, int], int]]


def component(sizes: list[int], grids: list[Rows]) -> Component:
    """Each row: block -> positions per unit, and the positions that stay."""
    rows = [(blocks, fixed, g) for g, grid in enumerate(grids) for blocks, fixed in grid]
    entries = [(r, b, n) for r, (blocks, _, _) in enumerate(rows) for b, n in blocks.items()]
    row, block, times = (np.array(column, np.int64) for column in zip(*entries, strict=True))
    return Component(
        blocks=np.arange(len(sizes)),
        size=np.array(sizes),
        floor=np.zeros(len(sizes), np.int64),
        row=row,
        block=block,
        times=times,
        grid=np.array([g for _, _, g in rows]),
        fixed=np.array([fixed for _, fixed, _ in rows]),
        scale=np.ones(len(rows)),
        offset=np.zeros(len(rows), np.int64),
    )


HEADS: Rows = [({0: 1}, 0), ({1: 1}, 0), ({2: 1}, 0)]


@pytest.mark.parametrize(
    "part",
    [
        component([5, 5, 5], [HEADS, [({0: 1, 1: 1, 2: 1}, 0)]]),
        component([5, 4, 6], [HEADS, [({0: 1, 1: 1, 2: 1}, 0), ({3: 3}, 0)]][:1]),
        component([5, 5, 5, 5], [HEADS, [({0: 1, 1: 1, 2: 1}, 0), ({3: 3}, 0)], [({3: 1}, 0), ({0: 1}, 0)]]),
        component([5, 5, 5], [HEADS, [({0: 2, 1: 1}, 1), ({2: 3}, 1)], [({0: 1, 1: 1}, 0), ({}, 4)]]),
        component([4, 8], [[({0: 2}, 0), ({1: 1}, 0)], [({0: 1, 1: 1}, 0)]]),
    ],
    ids=["one row holds all", "unequal sizes", "a width beside", "bound to a fixed row", "twice as many"],
)
def test_one_number_decides_all_whatever_rows_hold_several_blocks(part: Component) -> None:
    tried = np.array(list(product(*(range(n + 1) for n in part.size))))
    listed = candidates(part)
    assert listed is not None
    assert listed.tolist() == tried[part.holds(tried)].tolist()


def test_two_degrees_of_freedom_are_not_listed() -> None:
    assert candidates(component([3, 3, 3], [[({0: 1}, 0), ({1: 1}, 0)], [({0: 1, 2: 1}, 0)]])) is None
    assert candidates(component([3, 3], [[({0: 1, 1: 1}, 0), ({}, 3)]])) is None
