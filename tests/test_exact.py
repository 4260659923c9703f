"""Every net of ``nets_conv`` and ``nets_attention``: cut where the hand says, and exact by the oracle."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from typing import Any

import pytest
import torch
from nets import Case, case_ids, dim_of
from nets_attention import ATTENTION_CASES
from nets_conv import CONV_CASES
from nets_language import LANGUAGE_CASES
from nets_other import OTHER_CASES
from oracle import (
    assert_exact,
    assert_same_gradients,
    assert_same_objects,
    masked_twin,
    relative_error,
    run_double,
    without_fast_path,
)
from torch import nn

from lightning_prune import GroupNormPruner, Plan, apply

CASES = CONV_CASES + OTHER_CASES + ATTENTION_CASES + LANGUAGE_CASES
WITH_HEADS = ATTENTION_CASES + [c for c in LANGUAGE_CASES if c.name == "llama_block"]
CUTTING = [c for c in CASES if not c.idle]


def prune(model: nn.Module, inputs: Any, **options: Any) -> Plan:
    """Prune in place, quiet about a group too small to be cut."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return GroupNormPruner(model, inputs, **options).step()


def parameter_cuts(model: nn.Module, plan: Plan) -> dict[tuple[str, int], int]:
    """List what the plan shortens, parameters alone."""
    names = {n for n, _ in model.named_parameters()}
    return {(c.tensor, c.dim): c.kept for c in plan.cuts if c.tensor in names and c.kept < c.size}


@pytest.mark.parametrize("case", CASES, ids=case_ids(CASES))
def test_half_is_cut_where_the_hand_says_and_exactly(case: Case) -> None:
    model, inputs = case.make(), case.inputs()
    dense, objects = copy.deepcopy(model), list(model.named_parameters())
    plan = prune(model, inputs, pruning_ratio=0.5)
    cuts, want = parameter_cuts(dense, plan), case.expected_cut()
    assert {k: cuts.get(k) for k in want} == want
    if case.whole:
        assert cuts == want
    assert not set(cuts) & {dim_of(s) for s in case.stay.split()}
    assert_same_objects(objects, model)
    assert_exact(dense, model, plan, inputs, survivors=case.survivors)


@pytest.mark.parametrize("case", [c for c in CASES if c.groups is not None], ids=lambda c: c.name)
def test_groups_are_those_written_by_hand(case: Case) -> None:
    pruner = GroupNormPruner(case.make(), case.inputs())
    groups = [frozenset((m.tensor, m.dim) for m in g.members if not m.is_buffer) for g in pruner.groups()]
    assert len(groups) == len(set(groups))
    assert set(groups) == case.expected_groups()


@pytest.mark.parametrize("ratio", [0.2, 0.75])
@pytest.mark.parametrize("case", CUTTING, ids=case_ids(CUTTING))
def test_other_ratios_are_exact(case: Case, ratio: float) -> None:
    model, inputs = case.make(seed=1), case.inputs()
    dense = copy.deepcopy(model)
    plan = prune(model, inputs, pruning_ratio=ratio)
    assert_exact(dense, model, plan, inputs, survivors=case.survivors)
    assert_same_gradients(dense, model, plan, inputs, survivors=case.survivors)


@pytest.mark.parametrize("case", CUTTING, ids=case_ids(CUTTING))
def test_global_ranking_is_exact(case: Case) -> None:
    model, inputs = case.make(seed=2), case.inputs()
    dense = copy.deepcopy(model)
    plan = prune(model, inputs, pruning_ratio=0.4, global_pruning=True)
    assert_exact(dense, model, plan, inputs, survivors=case.survivors)


@pytest.mark.parametrize(("ratio", "steps"), [(0.0, 1), (0.5, 2)])
@pytest.mark.parametrize("case", WITH_HEADS, ids=case_ids(WITH_HEADS))
def test_whole_heads_are_exact(case: Case, ratio: float, steps: int) -> None:
    model, inputs = case.make(seed=3), case.inputs()
    dense = copy.deepcopy(model)
    options: dict[str, Any] = {"prune_num_heads": True, "head_pruning_ratio": 0.5, "iterative_steps": steps}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = GroupNormPruner(model, inputs, pruning_ratio=ratio, **options)
        for _ in range(steps):
            pruner.step()
    assert_exact(dense, model, pruner.plan, inputs, survivors=case.survivors)


HEADS = {
    "separate_sdpa": {
        ("att.q.weight", 0): 4,
        ("att.k.bias", 0): 4,
        ("att.v.weight", 0): 4,
        ("att.proj.weight", 1): 4,
    },
    "fused_index": {("att.qkv.weight", 0): 12, ("att.qkv.bias", 0): 12, ("att.proj.weight", 1): 4},
    "fused_chunk": {("att.qkv.weight", 0): 12, ("att.qkv.bias", 0): 12, ("att.proj.weight", 1): 4},
    "multihead_attention": {
        ("att.mha.in_proj_weight", 0): 12,
        ("att.mha.in_proj_bias", 0): 12,
        ("att.mha.out_proj.weight", 1): 4,
    },
    "llama_block": {("q.weight", 0): 8, ("k.weight", 0): 4, ("v.weight", 0): 4, ("o.weight", 1): 8},
}


@pytest.mark.parametrize("name", HEADS)
def test_half_the_heads_go_where_the_hand_says(name: str) -> None:
    case = next(c for c in WITH_HEADS if c.name == name)
    model, inputs = case.make(seed=3), case.inputs()
    dense = copy.deepcopy(model)
    plan = prune(model, inputs, pruning_ratio=0.0, prune_num_heads=True, head_pruning_ratio=0.5)
    cuts = parameter_cuts(dense, plan)
    assert {k: cuts.get(k) for k in HEADS[name]} == HEADS[name]
    assert {n for n, _ in cuts} == {n for n, _ in HEADS[name]} | (
        {"att.q.bias", "att.k.weight", "att.v.bias"} if "att.q.weight" in {n for n, _ in cuts} else set()
    )


@pytest.mark.parametrize("case", CUTTING, ids=case_ids(CUTTING))
def test_two_steps_compose_and_replay_on_a_fresh_model(case: Case) -> None:
    model, inputs = case.make(seed=4), case.inputs()
    dense = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = GroupNormPruner(model, inputs, pruning_ratio=0.6, iterative_steps=2)
        first = pruner.step()
        second = pruner.step()
    assert_exact(dense, model, pruner.plan, inputs, survivors=case.survivors)
    assert first.then(second) == pruner.plan
    replayed = copy.deepcopy(dense)
    apply(replayed, Plan.from_dict(pruner.plan.as_dict()))
    assert_exact(dense, replayed, pruner.plan, inputs, survivors=case.survivors)


@pytest.mark.parametrize("case", CUTTING, ids=case_ids(CUTTING))
def test_the_twin_is_no_copy_of_the_dense_model(case: Case) -> None:
    """A cut changes the output, so that agreement with the twin says something."""
    model, inputs = case.make(), case.inputs()
    plan = prune(copy.deepcopy(model), inputs, pruning_ratio=0.5)
    if not parameter_cuts(model, plan):
        pytest.skip("nothing may be cut here")
    with without_fast_path():
        twin, dense = (run_double(m, inputs) for m in (masked_twin(model, plan, case.survivors), model))
    assert max(relative_error(t, d) for t, d in zip(twin, dense, strict=True)) > 1e-3


@pytest.mark.parametrize(
    "name", ["plain", "residual", "channel_shuffle", "fused_unbind", "llama_block", "flip"]
)
def test_one_permuted_cut_fails(name: str) -> None:
    """Negative control: in turn, each cut of a real plan keeps the same indices in another order."""
    case = next(c for c in CASES if c.name == name)
    dense, inputs = case.make(), case.inputs()
    plan = prune(copy.deepcopy(dense), inputs, pruning_ratio=0.5)
    judged = 0
    for i, cut in enumerate(plan.cuts):
        if cut.kept < 2:
            continue
        rolled = tuple(k for row in cut.by_row() for k in (*row[1:], row[0]))
        wrong = dataclasses.replace(
            plan, cuts=(*plan.cuts[:i], dataclasses.replace(cut, keep=rolled), *plan.cuts[i + 1 :])
        )
        pruned = copy.deepcopy(dense)
        apply(pruned, wrong)
        judged += 1
        with pytest.raises(AssertionError, match="relative error"):
            assert_exact(dense, pruned, wrong, inputs)
    assert judged >= 4


@pytest.mark.parametrize("case", CASES, ids=case_ids(CASES))
def test_ratio_zero_is_the_identity(case: Case) -> None:
    model, inputs = case.make(), case.inputs()
    before = {n: (t, t.detach().clone()) for n, t in (*model.named_parameters(), *model.named_buffers())}
    plan = prune(model, inputs, pruning_ratio=0.0)
    assert not plan
    after = dict((*model.named_parameters(), *model.named_buffers()))
    assert list(after) == list(before)
    for name, (tensor, value) in before.items():
        assert after[name] is tensor
        assert torch.equal(tensor.detach(), value)


@pytest.mark.parametrize("case", CASES, ids=case_ids(CASES))
def test_constructing_leaves_no_residue(case: Case) -> None:
    model, inputs = case.make(), case.inputs()
    for i, module in enumerate(model.modules()):
        module.training = i % 2 == 0
    flags = [m.training for m in model.modules()]
    attributes = [set(vars(m)) for m in model.modules()]
    state = {n: t.clone() for n, t in model.state_dict().items()}
    torch.manual_seed(5)
    rng = torch.get_rng_state()
    GroupNormPruner(model, inputs).groups()
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled()
    assert [m.training for m in model.modules()] == flags
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
