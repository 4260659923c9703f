"""Invariants on nets drawn at random."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nets import draw, image
from oracle import assert_exact, assert_same_objects
from strategies import SIDE, Spec, specs

from lightning_prune import GroupNormPruner, Plan, apply
from lightning_prune.graph.groups import Group, Member

QUICK = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)


def kept_positions(member: Member, plan: Plan) -> set[int]:
    """List the positions ``row * size + i`` of one dimension that the plan keeps."""
    for cut in plan.cuts:
        if (cut.tensor, cut.dim) == (member.tensor, member.dim):
            lists = cut.by_row() * (member.rows // cut.rows)
            assert len(lists) == member.rows, (
                f"{member.tensor}: {cut.rows} rows in the plan, {member.rows} in the group"
            )
            return {r * member.size + i for r, row in enumerate(lists) for i in row}
    return set(range(member.rows * member.size))


def kept_units(group: Group, plan: Plan) -> set[int]:
    """List the units of a group that a plan keeps; a unit that is kept in part is an error."""
    kept, gone = set(), set()
    for member in group.members:
        positions = kept_positions(member, plan)
        for index, unit in zip(member.index.tolist(), member.unit.tolist(), strict=True):
            (kept if index in positions else gone).add(unit)
    assert not kept & gone, f"{group.name}: units {sorted(kept & gone)} are kept in part"
    return kept


def removed_of(n: int, ratio: float) -> int:
    """Count removed units: the nearest to ``ratio * n``, a half rounding down, one always kept."""
    return min(math.ceil(ratio * n - 0.5 - 1e-9), n - 1)


@QUICK
@given(
    spec=specs(),
    ratio=st.sampled_from([0.25, 0.5, 0.7]),
    seed=st.integers(0, 99),
    options=st.fixed_dictionaries(
        {
            "global_pruning": st.booleans(),
            "prune_num_heads": st.booleans(),
            "round_to": st.sampled_from([None, 2]),
            "iterative_steps": st.integers(1, 2),
        }
    ),
)
def test_pruned_equals_masked(spec: Spec, ratio: float, seed: int, options: dict[str, Any]) -> None:
    model, inputs = spec.build(seed), image(3, SIDE)
    dense, objects = copy.deepcopy(model), list(model.named_parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = GroupNormPruner(model, inputs, pruning_ratio=ratio, **options)
        for _ in range(pruner.iterative_steps):
            pruner.step()
    plan = pruner.plan
    assert_same_objects(objects, model)
    assert_exact(dense, model, plan, inputs)
    replayed = copy.deepcopy(dense)
    apply(replayed, Plan.from_dict(plan.as_dict()))
    assert all(torch.equal(a, b) for a, b in zip(replayed.parameters(), model.parameters(), strict=True))
    assert torch.isfinite(model(draw(3, 3, SIDE, SIDE))).all()


@QUICK
@given(spec=specs(), ratio=st.sampled_from([0.25, 0.5, 0.7]), seed=st.integers(0, 99))
def test_counts_are_exact_and_units_whole(spec: Spec, ratio: float, seed: int) -> None:
    model = spec.build(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = GroupNormPruner(model, image(3, SIDE), pruning_ratio=ratio)
        groups = pruner.groups()
        plan = pruner.step()
    owned = [u for g in groups for u in g.units.tolist()]
    assert len(owned) == len(set(owned)), "a unit stands in two groups"
    for group in groups:
        if group.kind == "head":  # whole heads stay here, and lose dimensions
            continue
        removed = group.n_units - len(kept_units(group, plan))
        assert removed < group.n_units
        if not spec.gridded:
            assert removed == removed_of(group.n_units, ratio), group.name


@QUICK
@given(spec=specs(), seed=st.integers(0, 99), flags=st.integers(0, 2**12 - 1), grad=st.booleans())
def test_ratio_zero_and_tracing_leave_no_trace(spec: Spec, seed: int, flags: int, grad: bool) -> None:
    model = spec.build(seed)
    for i, module in enumerate(model.modules()):
        module.training = bool(flags >> (i % 12) & 1)
    training = [m.training for m in model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    before = [(n, t, t.detach().clone()) for n, t in (*model.named_parameters(), *model.named_buffers())]
    torch.manual_seed(seed)
    rng = torch.get_rng_state()
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = GroupNormPruner(model, image(3, SIDE), pruning_ratio=0.0).step()
        assert torch.is_grad_enabled() == grad
    assert not plan
    assert torch.equal(torch.get_rng_state(), rng)
    assert [m.training for m in model.modules()] == training
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    after = [*model.named_parameters(), *model.named_buffers()]
    assert [n for n, _ in after] == [n for n, _, _ in before]
    for (_, now), (name, then, value) in zip(after, before, strict=True):
        assert now is then, name
        assert torch.equal(now.detach(), value), name
