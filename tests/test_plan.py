"""Plans as data: checks, JSON, composition. The references index with loops."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_prune.errors import PlanError
from lightning_prune.plan import Cut, Patch, Plan, Rewrite
from lightning_prune.surgery.applying import apply
from lightning_prune.surgery.cutting import cut_tensor


def naive(array, cuts):
    """Cut nested lists [n0][n1]: columns of every row by the row's own block, then rows."""
    rows = list(range(len(array)))
    columns = {r: list(range(len(array[0]))) for r in rows}
    for cut in cuts:
        if cut.dim == 1:
            block = len(array) // cut.rows
            per_block = [list(cut.keep[i * cut.kept : (i + 1) * cut.kept]) for i in range(cut.rows)]
            columns = {r: per_block[r // block] for r in rows}
    for cut in cuts:
        if cut.dim == 0:
            rows = list(cut.keep)
    return [[array[r][c] for c in columns[r]] for r in rows]


@st.composite
def cuts_of(draw, shape, blocks=(1, 2, 3, 4, 6)):
    """Cuts of a [n0, n1] tensor in any order; blocks of dimension 0 may keep columns of their own."""
    cuts = []
    if draw(st.booleans()):
        keep = draw(st.permutations(range(shape[0])))[: draw(st.integers(1, shape[0]))]
        cuts.append(Cut("weight", 0, shape[0], tuple(keep)))
    if draw(st.booleans()):
        rows = draw(st.sampled_from([b for b in blocks if shape[0] % b == 0]))
        kept = draw(st.integers(1, shape[1]))
        keep = tuple(i for _ in range(rows) for i in draw(st.permutations(range(shape[1])))[:kept])
        cuts.append(Cut("weight", 1, shape[1], keep, rows))
    return tuple(draw(st.permutations(cuts)))


def shape_after(shape, cuts):
    kept = {cut.dim: cut.kept for cut in cuts}
    return tuple(kept.get(d, n) for d, n in enumerate(shape))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_cut_tensor_equals_loops(data):
    shape = data.draw(st.sampled_from([(12, 5), (6, 4), (1, 3), (8, 1)]))
    cuts = data.draw(cuts_of(shape))
    array = torch.arange(shape[0] * shape[1]).reshape(shape)
    assert cut_tensor(array, cuts).tolist() == naive(array.tolist(), cuts)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_composed_plan_equals_both_in_turn(data):
    shape = data.draw(st.sampled_from([(12, 5), (6, 4), (8, 3)]))
    first = data.draw(cuts_of(shape))
    later = data.draw(cuts_of(shape_after(shape, first)))
    earlier = Plan(first, sizes=(("weight", shape),))
    follower = Plan(later, sizes=(("weight", shape_after(shape, first)),))
    composed = earlier.then(follower)
    array = torch.arange(shape[0] * shape[1]).reshape(shape)
    expected = naive(naive(array.tolist(), first), later)
    assert cut_tensor(array, composed.cuts).tolist() == expected
    assert composed.sizes == (("weight", shape),)
    assert Plan.from_dict(json.loads(json.dumps(composed.as_dict()))) == composed


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_applying_a_composed_plan_equals_applying_both(data):
    shape = (6, 4)
    first = data.draw(cuts_of(shape, blocks=(1,)))
    later = data.draw(cuts_of(shape_after(shape, first), blocks=(1,)))
    one, two = (nn.Linear(shape[1], shape[0], bias=False) for _ in range(2))
    two.load_state_dict(one.state_dict())
    for cuts in (first, later):
        apply(one, Plan(cuts))
    apply(two, Plan(first).then(Plan(later)))
    assert torch.equal(one.weight, two.weight)


def test_rows_after_a_whole_block_has_gone_fall_on_the_blocks_that_are_left():
    """Four groups of three filters; group 1 goes, then groups 0, 2, 3 keep columns of their own."""
    first = Plan((Cut("w", 0, 12, (0, 1, 2, 6, 7, 8, 9, 10, 11)),))
    later = Plan((Cut("w", 1, 4, (0, 1, 2), 3),))
    weight = torch.arange(48).reshape(12, 4)
    got = cut_tensor(weight, first.then(later).cuts)
    assert got.flatten().tolist() == [0, 4, 8, 25, 29, 33, 38, 42, 46]
    assert first.then(later).cuts[1].rows == 4


def test_three_plans_compose_in_any_grouping():
    plans = [
        Plan((Cut("w", 0, 6, (5, 3, 1, 0)), Cut("w", 1, 4, (2, 3, 0))), sizes=(("w", (6, 4)),)),
        Plan((Cut("w", 1, 3, (2, 1, 0, 2), 2),), sizes=(("w", (4, 3)),)),
        Plan((Cut("w", 0, 4, (3, 0)), Cut("w", 1, 2, (1,))), sizes=(("w", (4, 2)),)),
    ]
    weight = torch.arange(24).reshape(6, 4)
    # rows 5, 3, 1, 0 and columns 2, 3, 0; rows 5, 3 then keep columns 0, 3 and rows 1, 0 columns 2, 0 ...
    # ... and the last plan keeps rows 0 and 5 with the second of their columns: 0 and 3
    expected = [[0], [23]]
    left = plans[0].then(plans[1]).then(plans[2])
    right = plans[0].then(plans[1].then(plans[2]))
    assert cut_tensor(weight, left.cuts).tolist() == expected
    assert cut_tensor(weight, right.cuts).tolist() == expected


def test_rewrites_compose_and_vanish_when_they_come_back():
    one = Plan(rewrites=(Rewrite("a", "n", 8, 6), Rewrite("b", "n", 4, 2)))
    two = Plan(rewrites=(Rewrite("a", "n", 6, 8), Rewrite("b", "n", 2, 1), Rewrite("c", "n", 3, 2)))
    assert one.then(two).rewrites == (Rewrite("b", "n", 4, 1), Rewrite("c", "n", 3, 2))


def test_the_later_patch_of_a_module_wins():
    one = Plan(patches=(Patch("a", "sdpa_scale", (("scale", 1.0),)), Patch("b", "sdpa_scale")))
    two = Plan(patches=(Patch("a", "sdpa_scale", (("scale", 2.0),)),))
    assert one.then(two).patches == (Patch("a", "sdpa_scale", (("scale", 2.0),)), Patch("b", "sdpa_scale"))


def test_an_empty_plan_is_false_and_neutral():
    plan = Plan((Cut("w", 0, 4, (2, 0)),), sizes=(("w", (4,)),))
    assert not Plan()
    assert plan
    assert Plan().then(plan) == plan.then(Plan()) == plan


def test_plans_go_through_json_unchanged():
    plan = Plan(
        (Cut("w", 0, 4, (2, 0)), Cut("w", 1, 3, (0, 2), 2)),
        (Rewrite("", "shape[0]", 4, 2), Rewrite("a", "scale", 0.1 + 0.2, None)),
        (Patch("a", "attention", (("num_heads", 2), ("scale", 1 / 3))),),
        (("w", (4, 3)),),
    )
    assert Plan.from_dict(json.loads(json.dumps(plan.as_dict()))) == plan


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cut("w", 0, 4, (0, 0)), "distinct"),
        (lambda: Cut("w", 0, 4, (4,)), r"in \[0, 4\)"),
        (lambda: Cut("w", 0, 4, (-1,)), r"in \[0, 4\)"),
        (lambda: Cut("w", 1, 4, (0, 1, 2), 2), "3 kept indices do not divide into 2 rows"),
        (lambda: Cut("w", 1, 4, (0,), 0), "do not divide"),
        (
            lambda: Plan((Cut("w", 0, 4, (0, 1)),)).then(Plan((Cut("w", 0, 3, (0,)),))),
            "starts from 3.*leaves 2",
        ),
        (
            lambda: Plan((Cut("w", 0, 4, (0, 1, 2)),)).then(Plan((Cut("w", 1, 2, (0, 1), 2),))),
            "2 rows do not divide the 3 positions",
        ),
        (lambda: Plan.from_dict({}), "not a plan: KeyError"),
        (lambda: Plan.from_dict({**Plan().as_dict(), "format": 9}), "format 9, this version reads 1"),
        (lambda: Plan.from_dict({**Plan().as_dict(), "cuts": [["w", 0]]}), "not a plan"),
        (lambda: Plan.from_dict({**Plan().as_dict(), "rewrites": [["m", "p", [1], 2]]}), "plain number"),
    ],
)
def test_what_is_no_plan_is_refused(make, message):
    with pytest.raises(PlanError, match=message):
        make()
