"""The regulariser against autograd on a penalty that is written out element by element."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from naive_penalty import (
    SHAPES,
    assert_added,
    before,
    channels,
    group,
    member,
    naive_gradients,
    naive_penalty,
    others,
    parameters,
    two_layers,
)

from lightning_prune.errors import OptionError, PruneError, StaleGraphError
from lightning_prune.graph.groups import Group
from lightning_prune.scores import walks
from lightning_prune.scores.layout import plan_blocks
from lightning_prune.scores.regularizer import Regularizer

pytestmark = pytest.mark.usefixtures("every_loop")


@pytest.mark.parametrize("include_bias", [False, True])
@pytest.mark.parametrize(("reg", "alpha"), [(1e-4, 4.0), (0.3, 4.0), (0.3, 0.0), (1e-2, 9.5)])
def test_gradients_equal_autograd_on_the_penalty(reg, alpha, include_bias):
    tensors, groups = parameters(), [channels(), *others()]
    start = before(tensors)
    regularizer = Regularizer(groups, tensors, reg=reg, alpha=alpha, include_bias=include_bias)
    regularizer.apply()
    assert_added(tensors, start, naive_gradients(groups, tensors, reg, alpha, include_bias))
    penalty = naive_penalty(groups, tensors, reg, alpha, include_bias)
    torch.testing.assert_close(regularizer.penalty(), penalty.detach())


@pytest.mark.parametrize("name", list(SHAPES))
def test_every_kind_of_tensor_gets_its_gradient_and_biases_none(name):
    tensors = parameters()
    start = before(tensors)
    Regularizer([channels(), *others()], tensors, reg=1.0).apply()
    changed = not torch.equal(tensors[name].grad, start[name])
    assert changed is not name.endswith("bias")


@pytest.mark.parametrize("chunk", [1, 16, 60])
def test_large_tensors_are_walked_in_chunks(monkeypatch, chunk):
    monkeypatch.setattr(walks, "CHUNK_CPU", chunk)
    tensors, groups = parameters(), [channels(), *others()]
    start = before(tensors)
    Regularizer(groups, tensors, reg=0.1).apply()
    assert_added(tensors, start, naive_gradients(groups, tensors, 0.1))


@pytest.mark.parametrize("rows", [8, 16, 20, 23, 24])
def test_sums_of_chunks_are_those_of_the_whole(rows):
    """Chunks of 8 rows are summed in pieces, a last one that does not divide as it is."""
    weight = torch.randn(rows, 6)
    (block,) = plan_blocks({"w": weight}, [("w", 0, 1), ("w", 1, 1)])
    by_row, by_column = block.sums(block.look(weight), torch.empty(8 * 6), 8)
    want = weight.numpy().astype(float) ** 2
    assert by_row.numpy() == pytest.approx(want.sum(1), rel=1e-5)
    assert by_column.numpy() == pytest.approx(want.sum(0), rel=1e-5)


def test_a_state_of_other_groups_is_refused():
    groups, tensors = two_layers()
    state = Regularizer(groups[:1], tensors).state_dict()
    with pytest.raises(PruneError, match=r"a state of \d+ units, these groups have"):
        Regularizer(groups, tensors).load_state_dict(state)


def test_gammas_of_a_state_are_those_that_multiply():
    groups, tensors = two_layers()
    first = Regularizer(groups, tensors, reg=0.1, update_every=100)
    first.apply()
    with torch.no_grad():
        tensors["a"].copy_(torch.randn_like(tensors["a"]))
    second = Regularizer(groups, tensors, reg=0.1, update_every=100)
    second.load_state_dict(first.state_dict())
    found = []
    for regularizer in (first, second):
        for tensor in tensors.values():
            tensor.grad = torch.zeros_like(tensor)
        regularizer.apply()
        found.append([t.grad.clone() for t in tensors.values()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_chunks_leave_non_finite_elements_out_as_well(monkeypatch):
    monkeypatch.setattr(walks, "CHUNK_CPU", 16)
    tensors, groups = parameters(), [channels(), *others()]
    clean = {n: t.detach().clone().requires_grad_() for n, t in tensors.items()}
    with torch.no_grad():
        tensors["conv.weight"][3, 1, 0, 2] = math.nan
        clean["conv.weight"][3, 1, 0, 2] = 0
    start = before(tensors)
    with pytest.warns(UserWarning, match=r"conv\.weight"):
        Regularizer(groups, tensors, reg=0.1, nan_policy="zero").apply()
    assert_added(tensors, start, naive_gradients(groups, clean, 0.1))


def test_memory_formats_and_gradients_that_lie_otherwise():
    tensors, groups = parameters(), [channels(), *others()]
    added = naive_gradients(groups, tensors, 0.1)
    for name in ("conv.weight", "transposed.weight"):
        tensors[name].data = tensors[name].data.contiguous(memory_format=torch.channels_last)
    tensors["transposed.weight"].grad = tensors["transposed.weight"].grad.contiguous(
        memory_format=torch.channels_last
    )
    tensors["square.weight"].data = tensors["square.weight"].data.t().contiguous().t()
    tensors["grouped.weight"].data = (
        tensors["grouped.weight"].data.transpose(0, 1).contiguous().transpose(0, 1)
    )
    tensors["embedding.weight"].data = torch.randn(7, 9, dtype=torch.float64)[:, :6].copy_(
        tensors["embedding.weight"].data
    )
    start = before(tensors)
    Regularizer(groups, tensors, reg=0.1).apply()
    assert_added(tensors, start, added)


def test_a_gradient_that_no_view_matches_its_parameter_is_added_to_as_well():
    tensors, groups = parameters(), [channels(), *others()]
    grad = tensors["conv.weight"].grad.contiguous(memory_format=torch.channels_last)
    tensors["conv.weight"].grad = grad
    start = before(tensors)
    regularizer = Regularizer(groups, tensors, reg=0.1)
    regularizer.apply()
    assert tensors["conv.weight"].grad is grad
    assert_added(tensors, start, naive_gradients(groups, tensors, 0.1))


def test_a_change_of_memory_format_or_type_after_construction_is_followed():
    tensors, groups = parameters(), [channels(), *others()]
    regularizer = Regularizer(groups, tensors, reg=0.1)
    regularizer.apply()
    for t in tensors.values():
        t.data, t.grad = t.data.float(), None
        t.grad = torch.zeros_like(t)
    tensors["conv.weight"].data = tensors["conv.weight"].data.contiguous(memory_format=torch.channels_last)
    regularizer.apply()
    added = naive_gradients(groups, tensors, 0.1)
    for name, t in tensors.items():
        torch.testing.assert_close(t.grad, added[name], rtol=1e-5, atol=1e-7)


def test_another_shape_is_refused_before_anything_is_written():
    tensors = parameters()
    regularizer = Regularizer([channels()], tensors)
    tensors["fc.weight"].data = torch.randn(3, 12, dtype=torch.float64)
    start = before(tensors)
    with pytest.raises(StaleGraphError, match=r"'fc.weight' of shape \[5, 12\], it has \[3, 12\] now"):
        regularizer.apply()
    assert all(torch.equal(t.grad, start[n]) for n, t in tensors.items())


def test_an_element_of_two_groups_gets_both():
    w = torch.nn.Parameter(torch.full((4, 1), 2.0, dtype=torch.float64))
    w.grad = torch.zeros_like(w)
    heads = Group("w:0/head", "head", np.arange(2), (member("w", 0, range(4), [0, 0, 1, 1], 4),), "")
    dims = Group("w:0/head_dim", "head_dim", np.arange(2), (member("w", 0, range(4), [0, 1, 0, 1], 4),), "")
    Regularizer([heads, dims], {"w": w}, reg=0.5).apply()
    assert w.grad.flatten().tolist() == [0.5 * (1 + 1) * 2.0] * 4


def test_dimensions_with_different_rows_meet_in_one_tensor():
    w = torch.nn.Parameter(torch.randn(8, 3, 2, dtype=torch.float64))
    w.grad = torch.zeros_like(w)
    groups = [
        group("w:0", member("w", 0, range(8), range(8), 8)),
        group("w:1", member("w", 1, range(6), range(6), 3, rows=2)),
        group("w:2", member("w", 2, range(8), range(8), 2, rows=4)),
    ]
    Regularizer(groups, {"w": w}, reg=0.1).apply()
    torch.testing.assert_close(w.grad, naive_gradients(groups, {"w": w}, 0.1)["w"])


@pytest.mark.parametrize("chunk", [2, 1000])
def test_groups_of_one_output_have_rows_and_outputs_along_one_axis(monkeypatch, chunk):
    monkeypatch.setattr(walks, "CHUNK_CPU", chunk)
    w = torch.nn.Parameter(torch.randn(3, 2, 1, dtype=torch.float64))
    w.grad = torch.zeros_like(w)
    groups = [
        group("w:1", member("w", 1, range(6), range(6), 2, rows=3)),
        group("w:0", member("w", 0, range(3), range(3), 3)),
    ]
    Regularizer(groups, {"w": w}, reg=0.1).apply()
    torch.testing.assert_close(w.grad, naive_gradients(groups, {"w": w}, 0.1)["w"])


def test_gamma_runs_from_one_for_the_strongest_to_two_to_the_alpha():
    w = torch.nn.Parameter(torch.tensor([[1.0], [2.0], [3.0]]))
    regularizer = Regularizer([group("w", member("w", 0, range(3), range(3), 3))], {"w": w}, alpha=4.0)
    gammas = regularizer.coefficients[0].tolist()
    assert gammas == pytest.approx([16, 2 ** (4 * 5 / 8), 1])


@pytest.mark.parametrize("values", [[[3.0]], [[3.0], [3.0], [-3.0]], [[0.0], [0.0]]])
def test_a_constant_group_has_gamma_one_and_never_nan(values):
    w = torch.nn.Parameter(torch.tensor(values))
    w.grad = torch.zeros_like(w)
    n = len(values)
    Regularizer([group("w", member("w", 0, range(n), range(n), n))], {"w": w}, reg=0.5).apply()
    assert torch.equal(w.grad, 0.5 * w.detach())


def test_one_channel_conv_gets_finite_gradients():
    w = torch.nn.Parameter(torch.randn(1, 3, 3, 3))
    w.grad = torch.zeros_like(w)
    Regularizer([group("w", member("w", 0, [0], [0], 1))], {"w": w}, reg=1.0).apply()
    torch.testing.assert_close(w.grad, w.detach())


@pytest.mark.parametrize("scale", [1.0, 2.0**16, 0.25, torch.tensor(1024.0)])
def test_grad_scale_multiplies_what_is_added(scale):
    tensors, groups = parameters(), [channels(), *others()]
    start = before(tensors)
    Regularizer(groups, tensors, reg=0.1).apply(grad_scale=scale)
    assert_added(
        tensors, start, {n: g * float(scale) for n, g in naive_gradients(groups, tensors, 0.1).items()}
    )


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_a_grad_scale_that_is_not_finite_is_refused(scale):
    with pytest.raises(OptionError, match="grad_scale must be a finite number"):
        Regularizer([channels()], parameters()).apply(grad_scale=scale)


def test_frozen_parameters_and_those_without_a_gradient_are_left_alone_but_count():
    tensors, groups = parameters(), [channels(), *others()]
    added = naive_gradients(groups, tensors, 0.1)
    tensors["conv.weight"].requires_grad_(False)
    tensors["bn.weight"].requires_grad_(False)
    tensors["fc.weight"].grad = None
    tensors["embedding.weight"].grad = tensors["embedding.weight"].grad.to_sparse()
    start = before(tensors)
    Regularizer(groups, tensors, reg=0.1).apply()
    for name in ("conv.weight", "bn.weight"):
        assert torch.equal(tensors[name].grad, start[name])
    assert tensors["fc.weight"].grad is None
    assert torch.equal(tensors["embedding.weight"].grad.to_dense(), start["embedding.weight"].to_dense())
    rest = {
        n: t for n, t in tensors.items() if n in ("depthwise.weight", "square.weight", "experts", "position")
    }
    assert_added(rest, start, added)


def test_weights_themselves_and_groups_that_were_not_passed_are_untouched():
    tensors = parameters()
    weights, start = {n: t.detach().clone() for n, t in tensors.items()}, before(tensors)
    Regularizer([], tensors, reg=1.0).apply()
    Regularizer([], tensors).refresh()
    assert Regularizer([], tensors).penalty() == 0
    assert Regularizer([], tensors).coefficients == []
    Regularizer(others()[:1], tensors, reg=1.0).apply()
    for name, t in tensors.items():
        assert torch.equal(t, weights[name])
        assert torch.equal(t.grad, start[name]) is (name != "conv.weight")


def test_reg_zero_adds_nothing():
    tensors = parameters()
    start = before(tensors)
    Regularizer([channels()], tensors, reg=0.0).apply()
    assert all(torch.equal(t.grad, start[n]) for n, t in tensors.items())


# When scores are computed


def test_gammas_are_kept_between_refreshes_while_the_weights_move():
    groups, tensors = two_layers()
    every, third = (Regularizer(groups, tensors, reg=0.1, update_every=n) for n in (1, 3))
    kept = []
    for step in range(4):
        every.apply()
        third.apply()
        kept.append([g.clone() for g in third.coefficients])
        current = all(torch.equal(a, b) for a, b in zip(every.coefficients, kept[-1], strict=True))
        assert current is (step in (0, 3))
        with torch.no_grad():
            tensors["a"].copy_(torch.randn_like(tensors["a"]))
            tensors["b"].copy_(torch.randn_like(tensors["b"]))


def test_cached_gammas_multiply_the_weights_of_the_moment():
    groups, tensors = two_layers()
    regularizer = Regularizer(groups[:1], tensors, reg=0.1, update_every=100)
    regularizer.apply()
    gamma = regularizer.coefficients[0].clone()
    with torch.no_grad():
        tensors["a"].copy_(torch.randn_like(tensors["a"]))
    tensors["a"].grad.zero_()
    regularizer.apply()
    torch.testing.assert_close(tensors["a"].grad, 0.1 * gamma * tensors["a"].detach())


@pytest.mark.parametrize("change", ["channels last", "float32"])
def test_cached_gammas_outlive_a_change_of_where_the_weights_lie(change):
    tensors, groups = parameters(), [channels(), *others()]
    regularizer = Regularizer(groups, tensors, reg=0.1, update_every=100)
    regularizer.apply()
    gammas = [g.clone() for g in regularizer.coefficients]
    with torch.no_grad():
        for tensor in tensors.values():
            moved = torch.randn_like(tensor)
            if change == "float32":
                moved, tensor.grad = moved.float(), None
            elif tensor.ndim == 4:
                moved = moved.contiguous(memory_format=torch.channels_last)
            tensor.data = moved
            tensor.grad = torch.zeros_like(tensor)
    still = {n: t.detach().clone() for n, t in tensors.items()}
    regularizer.apply()
    assert regularizer.state_dict()["age"] == 2  # the next refresh is due when it was
    for was, now in zip(gammas, regularizer.coefficients, strict=True):
        assert torch.equal(was.to(now.dtype), now)
    want = {n: torch.zeros_like(t) for n, t in still.items()}
    for members, gamma in zip([g.members for g in groups], gammas, strict=True):
        for m in members:
            if m.tensor.endswith("bias") or m.is_buffer:
                continue
            flat = torch.zeros(m.rows * m.size, dtype=torch.float64)
            flat.index_add_(0, torch.from_numpy(m.index), gamma.double()[torch.from_numpy(m.unit)])
            shape = [1] * still[m.tensor].ndim
            shape[m.dim] = m.size
            for block, row in zip(want[m.tensor].chunk(m.rows), flat.view(m.rows, m.size), strict=True):
                block.add_(0.1 * row.view(shape))
    for name, factor in want.items():
        torch.testing.assert_close(tensors[name].grad, factor * still[name], rtol=1e-5, atol=1e-6)


def test_refresh_on_demand():
    groups, tensors = two_layers()
    regularizer = Regularizer(groups, tensors, update_every=100)
    old = [g.clone() for g in regularizer.coefficients]
    with torch.no_grad():
        tensors["a"].copy_(torch.randn_like(tensors["a"]))
    regularizer.refresh()
    assert not torch.equal(regularizer.coefficients[1], old[1])


# Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32_and_rounded_once(dtype, every_loop):
    tensors, groups = parameters(dtype), [channels(), *others()]
    for t in tensors.values():
        t.grad.zero_()
    regularizer = Regularizer(groups, tensors, reg=0.1)
    regularizer.apply()
    wide = {n: t.detach().double().requires_grad_() for n, t in tensors.items()}
    for name, wanted in naive_gradients(groups, wide, 0.1).items():
        found = tensors[name].grad
        assert found.dtype == dtype
        # One rounding: half a unit in the last place of the format, float32 noise aside. Triton's interpreter
        # cuts digits off instead.
        rtol = torch.finfo(dtype).eps * (1.001 if every_loop == "kernels" else 0.501) + 1e-5
        torch.testing.assert_close(found.double(), wanted, rtol=rtol, atol=1e-7)
    assert set(regularizer.low_precision) == {n for n in SHAPES if not n.endswith("bias")}
    assert Regularizer(groups, parameters()).low_precision == ()


def test_squares_of_half_precision_scales_do_not_overflow():
    w = torch.nn.Parameter(torch.tensor([300.0, 600.0], dtype=torch.float16))
    w.grad = torch.zeros_like(w)
    regularizer = Regularizer(
        [group("w", member("w", 0, range(2), range(2), 2))], {"w": w}, reg=1.0, alpha=1.0
    )
    regularizer.apply()
    assert w.grad.tolist() == [600, 600]


def test_a_small_penalty_survives_in_half_precision():
    w = torch.nn.Parameter(torch.full((2, 2), 0.5, dtype=torch.float16))
    w.grad = torch.zeros_like(w)
    Regularizer([group("w", member("w", 0, range(2), range(2), 2))], {"w": w}, reg=1e-6).apply()
    assert (w.grad > 0).all()


def test_complex_weights_shrink_in_both_parts():
    w = torch.nn.Parameter(torch.tensor([[3 + 4j], [5j]]))
    w.grad = torch.zeros_like(w)
    Regularizer([group("w", member("w", 0, range(2), range(2), 2))], {"w": w}, reg=0.5).apply()
    torch.testing.assert_close(w.grad, 0.5 * w.detach())


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reg": -1.0}, "reg must be a finite number of at least 0, got -1.0"),
        ({"reg": math.inf}, "reg must be"),
        ({"reg": math.nan}, "reg must be"),
        ({"reg": "1e-4"}, "reg must be .* got '1e-4'"),
        ({"alpha": -0.1}, "alpha must be .* at most 64, got -0.1"),
        ({"alpha": 65}, "alpha must be"),
        ({"nan_policy": "ignore"}, "raise, skip, zero, got 'ignore'"),
        ({"update_every": 0}, "update_every must be a whole number of at least 1, got 0"),
        ({"update_every": 1.5}, "update_every"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        Regularizer([channels()], parameters(), **options)


def test_groups_on_several_devices_are_refused():
    tensors = parameters()
    tensors["fc.weight"] = torch.nn.Parameter(tensors["fc.weight"].detach().to("meta"))
    with pytest.raises(PruneError, match="lie on cpu, meta; the penalty needs them on one device"):
        Regularizer([channels()], tensors)


def test_the_strength_cannot_be_changed_in_vain():
    """Tables on a device hold it; a new regulariser is made with another."""
    regularizer = Regularizer([channels()], parameters(), reg=0.1, alpha=2.0)
    assert (regularizer.reg, regularizer.alpha) == (0.1, 2.0)
    for name in ("reg", "alpha"):
        with pytest.raises(AttributeError):
            setattr(regularizer, name, 1.0)


def test_low_precision_is_that_of_now():
    tensors = parameters()
    regularizer = Regularizer([channels()], tensors)
    assert not regularizer.low_precision
    for t in tensors.values():
        t.data, t.grad = t.data.half(), None
    assert "conv.weight" in regularizer.low_precision
