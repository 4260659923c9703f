"""The judge is judged: nets cut by hand must pass, nets cut wrongly must fail."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import randomise
from nets_attention import Separate, Vit, tokens
from nets_language import RMSNorm, StandardConv, ids
from oracle import (
    assert_exact,
    assert_same_objects,
    assert_sliced,
    masked_twin,
    relative_error,
    run_double,
    slice_by,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lightning_prune.plan import Cut, Plan


def _conv_net() -> nn.Sequential:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Sigmoid(), nn.Conv2d(6, 4, 3))
    return randomise(net, 0)


CONV_PLAN = Plan(
    cuts=(
        Cut("0.weight", 0, 6, (1, 3, 4)),
        Cut("0.bias", 0, 6, (1, 3, 4)),
        Cut("1.weight", 0, 6, (1, 3, 4)),
        Cut("1.bias", 0, 6, (1, 3, 4)),
        Cut("1.running_mean", 0, 6, (1, 3, 4)),
        Cut("1.running_var", 0, 6, (1, 3, 4)),
        Cut("3.weight", 1, 6, (1, 3, 4)),
    )
)


def _load_sliced(net: nn.Module, dense: nn.Module, plan: Plan) -> nn.Module:
    """Fill a smaller net, built by hand, with what the plan keeps of the larger one."""
    cuts: dict[str, list[Cut]] = {}
    for cut in plan.cuts:
        cuts.setdefault(cut.tensor, []).append(cut)
    net.load_state_dict({n: slice_by(t, cuts.get(n, [])) for n, t in dense.state_dict().items()})
    return net.eval()


def _small_conv_net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Sigmoid(), nn.Conv2d(3, 4, 3))


IMAGE = torch.linspace(-1, 1, 2 * 3 * 6 * 6).view(2, 3, 6, 6).sin()


def test_hand_cut_conv_net_passes() -> None:
    dense = _conv_net()
    assert_exact(dense, _load_sliced(_small_conv_net(), dense, CONV_PLAN), CONV_PLAN, IMAGE)


@pytest.mark.parametrize(
    "name", ["0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"]
)
def test_permuted_values_fail(name: str) -> None:
    dense = _conv_net()
    pruned = _load_sliced(_small_conv_net(), dense, CONV_PLAN)
    with torch.no_grad():
        tensor = pruned.state_dict()[name]
        tensor.copy_(tensor[[1, 0, 2]])
    with pytest.raises(AssertionError, match="kept values moved"):
        assert_exact(dense, pruned, CONV_PLAN, IMAGE)


@pytest.mark.parametrize("at", range(len(CONV_PLAN.cuts)))
@pytest.mark.parametrize("keep", [(1, 3, 5), (3, 1, 4)])
def test_a_plan_with_one_wrong_cut_fails_by_its_output(at: int, keep: tuple[int, ...]) -> None:
    dense = _conv_net()
    wrong = list(CONV_PLAN.cuts)
    wrong[at] = Cut(wrong[at].tensor, wrong[at].dim, 6, keep)
    plan = Plan(cuts=tuple(wrong))
    pruned = _load_sliced(_small_conv_net(), dense, plan)
    assert_sliced(dense, pruned, plan)
    with pytest.raises(AssertionError, match="relative error"):
        assert_exact(dense, pruned, plan, IMAGE)


def test_a_consistent_permutation_of_all_cuts_is_no_error() -> None:
    dense = _conv_net()
    plan = Plan(cuts=tuple(Cut(c.tensor, c.dim, 6, (4, 1, 3)) for c in CONV_PLAN.cuts))
    assert_exact(dense, _load_sliced(_small_conv_net(), dense, plan), plan, IMAGE)


def test_a_shape_that_did_not_shrink_fails() -> None:
    dense = _conv_net()
    with pytest.raises(AssertionError, match="the plan says"):
        assert_exact(dense, copy.deepcopy(dense), CONV_PLAN, IMAGE)


def test_a_changed_scale_fails() -> None:
    """1e-9 is a hair: a follow-on factor of 1 + 1e-7 is seen."""
    dense = _conv_net()
    pruned = _load_sliced(_small_conv_net(), dense, CONV_PLAN)
    with torch.no_grad():
        pruned.double()[3].weight *= 1 + 1e-7
    twin = masked_twin(dense, CONV_PLAN)
    error = relative_error(run_double(pruned, IMAGE)[0], run_double(twin, IMAGE)[0])
    assert 1e-9 < error < 1e-5


class _Shuffled(nn.Module):
    """Grouped conv whose groups keep different input channels: rows of indices of their own."""

    def __init__(self, mid: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, mid, 1)
        self.b = nn.Conv2d(mid, 4, 3, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x).tanh())
        return out


def test_grouped_conv_with_rows_passes_and_mixed_rows_fail() -> None:
    dense = randomise(_Shuffled(8), 1)
    keep = (0, 3, 5, 6)
    cuts = (Cut("a.weight", 0, 8, keep), Cut("a.bias", 0, 8, keep))
    plan = Plan(cuts=(*cuts, Cut("b.weight", 1, 4, (0, 3, 1, 2), rows=2)))
    assert_exact(dense, _load_sliced(_Shuffled(4), dense, plan), plan, IMAGE)
    swapped = Plan(cuts=(*cuts, Cut("b.weight", 1, 4, (1, 2, 0, 3), rows=2)))
    with pytest.raises(AssertionError, match="relative error"):
        assert_exact(dense, _load_sliced(_Shuffled(4), dense, swapped), swapped, IMAGE)


def _norm_net(norm: nn.Module, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, width), norm, nn.Linear(width, 3))


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_norms_take_statistics_over_survivors(kind: type[nn.Module]) -> None:
    dense = randomise(_norm_net(kind(8), 8), 2)
    keep = (0, 2, 3, 7, 6)
    names = [n for n, _ in dense[1].named_parameters(prefix="1")]
    cuts = [Cut("0.weight", 0, 8, keep), Cut("0.bias", 0, 8, keep), Cut("2.weight", 1, 8, keep)]
    plan = Plan(cuts=(*cuts, *(Cut(n, 0, 8, keep) for n in names)))
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    assert_exact(dense, _load_sliced(_norm_net(kind(5), 5), dense, plan), plan, x)


def test_norm_without_weight_needs_to_be_told_its_survivors() -> None:
    dense = randomise(_norm_net(nn.LayerNorm(8, elementwise_affine=False), 8), 2)
    keep = (0, 2, 3, 7)
    plan = Plan(cuts=(Cut("0.weight", 0, 8, keep), Cut("0.bias", 0, 8, keep), Cut("2.weight", 1, 8, keep)))
    pruned = _load_sliced(_norm_net(nn.LayerNorm(4, elementwise_affine=False), 4), dense, plan)
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    assert_exact(dense, pruned, plan, x, survivors={"1": {0: ("0.weight", 0)}})
    with pytest.raises(AssertionError, match="relative error"):
        assert_exact(dense, pruned, plan, x)


def test_group_norm_takes_statistics_over_the_survivors_of_each_group() -> None:
    dense = randomise(_norm_net(nn.GroupNorm(2, 8), 8), 3)
    keep = (0, 3, 4, 5)
    affine = (Cut("1.weight", 0, 8, keep), Cut("1.bias", 0, 8, keep))
    plan = Plan(
        cuts=(Cut("0.weight", 0, 8, keep), Cut("0.bias", 0, 8, keep), *affine, Cut("2.weight", 1, 8, keep)),
    )
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    assert_exact(dense, _load_sliced(_norm_net(nn.GroupNorm(2, 4), 4), dense, plan), plan, x)
    with pytest.raises(AssertionError, match="relative error"):
        assert_exact(dense, _load_sliced(_norm_net(nn.GroupNorm(1, 4), 4), dense, plan), plan, x)


def test_weight_norm_rows_do_not_become_nan() -> None:
    def build(width: int) -> nn.Sequential:
        return nn.Sequential(
            parametrizations.weight_norm(nn.Linear(5, width)), nn.Tanh(), nn.Linear(width, 2)
        )

    dense = randomise(build(6), 4)
    keep = (1, 2, 5)
    g, v = (f"0.parametrizations.weight.original{i}" for i in (0, 1))
    plan = Plan(cuts=tuple(Cut(n, d, 6, keep) for n, d in [("0.bias", 0), (g, 0), (v, 0), ("2.weight", 1)]))
    assert_exact(dense, _load_sliced(build(3), dense, plan), plan, torch.randn(3, 5))


def test_same_objects_are_asked_for() -> None:
    net = _conv_net()
    before = list(net.named_parameters())
    assert_same_objects(before, net)
    net[0].weight = nn.Parameter(net[0].weight.detach().clone())
    with pytest.raises(AssertionError, match="another object"):
        assert_same_objects(before, net)


def test_the_twin_leaves_the_original_alone() -> None:
    dense = _conv_net()
    before = {n: t.clone() for n, t in dense.state_dict().items()}
    masked_twin(dense, CONV_PLAN)
    assert all(
        torch.equal(t, before[n]) and t.dtype == before[n].dtype for n, t in dense.state_dict().items()
    )


def _attention_plan() -> Plan:
    """Of two heads of four dimensions each keeps two; q and k the same, v and the projection others."""
    qk, v = (0, 3, 5, 6), (1, 2, 4, 7)
    cuts = [Cut(f"att.{n}.{p}", 0, 8, v if n == "v" else qk) for n in "qkv" for p in ("weight", "bias")]
    return Plan(cuts=(*cuts, Cut("att.proj.weight", 1, 8, v)))


def _cut_attention(dense: nn.Module, plan: Plan, style: str) -> nn.Module:
    small = Vit(Separate(style=style))
    for n in "qkv":
        setattr(small.att, n, nn.Linear(8, 4))
    small.att.proj = nn.Linear(4, 8)
    return _load_sliced(small, dense, plan)


def test_head_dims_with_the_scale_kept_pass_and_with_a_new_scale_fail() -> None:
    plan = _attention_plan()
    dense = randomise(Vit(Separate(style="matmul")), 5)
    assert_exact(dense, _cut_attention(dense, plan, "matmul"), plan, tokens())
    dense = randomise(Vit(Separate(style="sdpa")), 5)
    with pytest.raises(AssertionError, match="relative error"):
        assert_exact(dense, _cut_attention(dense, plan, "sdpa"), plan, tokens())


def test_heads_cut_alike_in_number_but_not_matched_fail() -> None:
    plan = _attention_plan()
    wrong = Plan(cuts=tuple(Cut(c.tensor, 0, 8, (1, 2, 4, 6)) if ".q." in c.tensor else c for c in plan.cuts))
    dense = randomise(Vit(Separate(style="matmul")), 5)
    with pytest.raises(AssertionError, match="relative error"):
        assert_exact(dense, _cut_attention(dense, wrong, "matmul"), wrong, tokens())


def test_a_norm_written_by_hand_takes_statistics_over_the_survivors() -> None:
    def build(width: int) -> nn.Module:
        return nn.Sequential(nn.Embedding(11, width), RMSNorm(width), nn.Linear(width, 3))

    keep = (0, 2, 5)
    plan = Plan(cuts=(Cut("0.weight", 1, 8, keep), Cut("1.weight", 0, 8, keep), Cut("2.weight", 1, 8, keep)))
    dense = randomise(build(8), 6)
    assert_exact(dense, _load_sliced(build(3), dense, plan), plan, ids())


def test_standardised_weights_take_statistics_over_the_surviving_inputs() -> None:
    def build(width: int) -> nn.Module:
        return nn.Sequential(StandardConv(3, width, 3), nn.Tanh(), StandardConv(width, 4, 3))

    keep = (1, 2, 6)
    plan = Plan(cuts=(Cut("0.weight", 0, 8, keep), Cut("0.bias", 0, 8, keep), Cut("2.weight", 1, 8, keep)))
    dense = randomise(build(8), 7)
    assert_exact(dense, _load_sliced(build(3), dense, plan), plan, IMAGE)
