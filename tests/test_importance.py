"""Scores against naive loops: one unit, one member, one element at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lightning_prune.errors import OptionError, PruneError
from lightning_prune.graph.groups import Group, Member
from lightning_prune.scores.importance import IMPORTANCES, Evidence, position_sums, register
from lightning_prune.scores.members import is_bias, real


def member(tensor, dim, index, unit, size, rows=1, is_buffer=False):
    return Member(tensor, dim, rows, size, np.asarray(index), np.asarray(unit), is_buffer)


def whole(tensor, dim, size, **more):
    return member(tensor, dim, range(size), range(size), size, **more)


def group(*members, units=None, name="g"):
    n = units or int(max(m.unit.max() for m in members)) + 1
    return Group(name, "channel", np.arange(n), members, "")


@pytest.fixture
def tensors():
    shapes = {
        "conv.weight": (4, 3, 2, 2),
        "conv.bias": (4,),
        "bn.weight": (4,),
        "bn.bias": (4,),
        "grouped.weight": (6, 2, 3),  # three groups of two outputs, each reading two of six channels
        "fc.weight": (5, 8),  # reads four channels of two pixels
    }
    return {n: torch.nn.Parameter(torch.randn(s, dtype=torch.float64)) for n, s in shapes.items()}


@pytest.fixture
def channels():
    """Four units; each owns two columns of the linear layer behind a flatten, given out of order."""
    flat = member("fc.weight", 1, [7, 0, 1, 2, 3, 4, 5, 6], [3, 0, 0, 1, 1, 2, 2, 3], 8)
    return group(
        whole("conv.weight", 0, 4),
        whole("conv.bias", 0, 4),
        whole("bn.weight", 0, 4),
        whole("bn.bias", 0, 4),
        flat,
        whole("bn.running_mean", 0, 4, is_buffer=True),
    )


def slices(g, tensors, unit, include_bias=False):
    """What a unit owns, one tensor per position, found by walking over every element."""
    for m in g.members:
        if m.is_buffer or (not include_bias and m.tensor.endswith(".bias")):
            continue
        tensor = tensors[m.tensor].detach()
        for position, owner in zip(m.index.tolist(), m.unit.tolist(), strict=True):
            if owner != unit:
                continue
            row, i = divmod(position, m.size)
            block = len(tensor) // m.rows
            elements = [
                tensor[at]
                for at in np.ndindex(*tensor.shape)
                if at[m.dim] == i and (m.rows == 1 or at[0] // block == row)
            ]
            yield m, torch.stack(elements)


def expected(g, tensors, value, **more):
    return [sum(float(value(m, s)) for m, s in slices(g, tensors, k, **more)) for k in range(g.n_units)]


def check(found, wanted):
    rtol = 1e-9 if found.dtype == torch.float64 else 1e-6
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=found.dtype), rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("include_bias", [False, True])
def test_group_norm_sums_squares_of_everything_a_unit_owns(channels, tensors, include_bias):
    found = IMPORTANCES["group_norm"](channels, tensors, Evidence(include_bias=include_bias))
    wanted = expected(channels, tensors, lambda m, s: (s**2).sum(), include_bias=include_bias)
    check(found, wanted)


@pytest.mark.parametrize("include_bias", [False, True])
def test_l1_sums_magnitudes(channels, tensors, include_bias):
    found = IMPORTANCES["l1"](channels, tensors, Evidence(include_bias=include_bias))
    check(found, expected(channels, tensors, lambda m, s: s.abs().sum(), include_bias=include_bias))


def test_l2_is_the_length_of_the_unit(channels, tensors):
    found = IMPORTANCES["l2"](channels, tensors, Evidence())
    check(found, [math.sqrt(x) for x in expected(channels, tensors, lambda m, s: (s**2).sum())])


def test_rows_keep_sums_of_their_own(tensors):
    g = group(member("grouped.weight", 1, range(6), [5, 4, 3, 2, 1, 0], 2, rows=3))
    check(IMPORTANCES["group_norm"](g, tensors, Evidence()), expected(g, tensors, lambda m, s: (s**2).sum()))


@pytest.mark.parametrize(
    ("shape", "dim", "rows"), [((6,), 0, 1), ((4, 3), 1, 1), ((4, 3), 1, 4), ((4, 3, 2, 5), 2, 2)]
)
def test_position_sums_add_up_element_by_element(shape, dim, rows):
    values = torch.rand(shape, dtype=torch.float64)
    wanted = [0.0] * (rows * shape[dim])
    for at in np.ndindex(*shape):
        row = at[0] * rows // shape[0] if rows > 1 else 0
        wanted[row * shape[dim] + at[dim]] += float(values[at])
    check(position_sums(values, dim, rows), wanted)


@pytest.mark.parametrize("name", ["random", "lamp"])
def test_a_default_device_of_the_users_is_not_where_scores_are_made(name, channels, tensors):
    """As with ``torch.set_default_device("cuda")``; generators lie on the CPU."""
    wanted = IMPORTANCES[name](channels, tensors, Evidence())
    with torch.device("meta"):
        found = IMPORTANCES[name](channels, tensors, Evidence())
    assert torch.equal(found, wanted)


def test_random_follows_its_generator_and_its_state_can_be_kept(channels, tensors):
    evidence = Evidence(generator=torch.Generator().manual_seed(7))
    first = IMPORTANCES["random"](channels, tensors, evidence)
    state = evidence.generator.get_state()
    second = IMPORTANCES["random"](channels, tensors, evidence)
    assert not torch.equal(first, second)
    evidence.generator.set_state(state)
    assert torch.equal(IMPORTANCES["random"](channels, tensors, evidence), second)
    again = Evidence(generator=torch.Generator().manual_seed(7))
    assert torch.equal(IMPORTANCES["random"](channels, tensors, again), first)
    assert len(set(first.tolist())) == 4


def test_two_pruners_do_not_share_a_generator():
    assert Evidence().generator is not Evidence().generator


def test_taylor_sums_squared_contributions(channels, tensors):
    grads = {n: torch.randn_like(t) for n, t in tensors.items()}
    found = IMPORTANCES["taylor"](channels, tensors, Evidence(gradients=grads))
    product = {n: t.detach() * grads[n] for n, t in tensors.items()}
    check(found, expected(channels, product, lambda m, s: (s**2).sum()))


def test_hessian_weighs_squares_by_squared_gradients(channels, tensors):
    fisher = {n: torch.rand_like(t) for n, t in tensors.items()}
    found = IMPORTANCES["hessian"](channels, tensors, Evidence(squared_gradients=fisher))
    product = {n: t.detach() ** 2 * fisher[n] for n, t in tensors.items()}
    check(found, expected(channels, product, lambda m, s: s.sum() / 2))


@pytest.mark.parametrize("name", ["taylor", "hessian"])
def test_missing_or_outdated_gradients_are_named(channels, tensors, name):
    with pytest.raises(OptionError, match=r"shape \[4, 3, 2, 2\] for 'conv.weight', got none"):
        IMPORTANCES[name](channels, tensors, Evidence())
    old = {"conv.weight": torch.zeros(8, 3, 2, 2)}
    with pytest.raises(OptionError, match=r"got shape \[8, 3, 2, 2\]"):
        IMPORTANCES[name](channels, tensors, Evidence(gradients=old, squared_gradients=old))


def test_a_frozen_parameter_has_no_gradient_and_counts_as_zero(channels, tensors):
    grads = {n: torch.ones_like(t) for n, t in tensors.items() if n != "conv.weight"}
    tensors["conv.weight"].requires_grad_(False)
    found = IMPORTANCES["taylor"](channels, tensors, Evidence(gradients=grads))
    check(found, expected(channels, tensors, lambda m, s: 0 if m.tensor == "conv.weight" else (s**2).sum()))


def test_bn_scale_reads_norm_weights_alone(channels, tensors):
    found = IMPORTANCES["bn_scale"](channels, tensors, Evidence(include_bias=True))
    check(found, tensors["bn.weight"].detach().abs().tolist())


def test_bn_scale_says_which_group_has_no_norm(tensors):
    with pytest.raises(OptionError, match="'lonely' has none"):
        IMPORTANCES["bn_scale"](group(whole("conv.weight", 0, 4), name="lonely"), tensors, Evidence())


def test_lamp_compares_each_unit_with_those_not_smaller():
    squares = [3.0, 1.0, 3.0, 0.5]
    tensors = {"w": torch.tensor(squares, dtype=torch.float64).sqrt()[:, None]}
    found = IMPORTANCES["lamp"](group(whole("w", 0, 4)), tensors, Evidence())
    check(found, [3 / 6, 1 / 7, 3 / 3, 0.5 / 7.5])


def test_fpgm_sums_distances_between_units(channels, tensors):
    vectors = [torch.cat([s for _, s in slices(channels, tensors, k)]) for k in range(4)]
    # The positions of a unit come in the order of the member, the two columns of unit 3 are listed backwards.
    last = list(slices(channels, tensors, 3))
    assert last[-1][0].tensor == "fc.weight"
    wanted = [sum(float((a - b).norm()) for b in vectors) for a in vectors]
    check(IMPORTANCES["fpgm"](channels, tensors, Evidence()), wanted)


def test_fpgm_reads_rows_and_inner_dimensions(tensors):
    g = group(member("grouped.weight", 1, range(6), range(6), 2, rows=3))
    vectors = [next(iter(slices(g, tensors, k)))[1] for k in range(6)]
    wanted = [sum(float((a - b).norm()) for b in vectors) for a in vectors]
    check(IMPORTANCES["fpgm"](g, tensors, Evidence()), wanted)


def test_fpgm_refuses_units_of_different_extent(tensors):
    with pytest.raises(OptionError, match=r"between 1 and 3 positions of 'conv.weight'"):
        IMPORTANCES["fpgm"](group(member("conv.weight", 0, range(4), [0, 0, 0, 1], 4)), tensors, Evidence())


def test_activation_averages_the_producing_layers(channels, tensors):
    measured = {"conv.weight": torch.tensor([1.0, 2, 3, 4]), "bn.weight": torch.tensor([3.0, 2, 1, 0])}
    found = IMPORTANCES["activation"](channels, tensors, Evidence(activations=measured))
    check(found, [2.0, 2.0, 2.0, 2.0])
    with pytest.raises(OptionError, match="of group 'g', found those of 0"):
        IMPORTANCES["activation"](channels, tensors, Evidence())


def test_half_precision_is_summed_in_float32():
    tensors = {"w": torch.full((2, 1000), 300.0, dtype=torch.float16)}
    found = IMPORTANCES["group_norm"](group(whole("w", 0, 2)), tensors, Evidence())
    assert found.dtype == torch.float32
    assert found.tolist() == [9e7, 9e7]


def test_complex_weights_count_both_parts():
    tensors = {"w": torch.tensor([[3 + 4j], [1j]])}
    assert IMPORTANCES["group_norm"](group(whole("w", 0, 2)), tensors, Evidence()).tolist() == [25, 1]
    assert real(tensors["w"]).shape == (2, 1, 2)


@pytest.mark.parametrize(
    ("name", "shape", "answer"),
    [
        ("fc.bias", (3,), True),
        ("attn.in_proj_bias", (3,), True),
        ("lstm.bias_hh_l0_reverse", (3,), True),
        ("fc.parametrizations.bias.original", (3,), True),
        ("bias", (3,), True),
        ("fc.parametrizations.weight.original0", (3,), False),
        ("norm.weight", (3,), False),
        ("scale.biased", (3,), False),
        ("bias.weight", (3,), False),
        ("relative_position_bias_table", (9, 3), False),
    ],
)
def test_what_is_a_bias(name, shape, answer):
    assert is_bias(name, torch.zeros(shape)) is answer


def test_a_parameter_that_was_not_given_is_named(channels, tensors):
    del tensors["fc.weight"]
    with pytest.raises(PruneError, match=r"'g' holds the parameter 'fc.weight'"):
        IMPORTANCES["l1"](channels, tensors, Evidence())


def test_a_name_can_be_taken_once(monkeypatch):
    monkeypatch.setattr("lightning_prune.scores.importance.IMPORTANCES", dict(IMPORTANCES))

    @register("constant")
    def constant(g, tensors, evidence):
        return torch.ones(g.n_units)

    with pytest.raises(OptionError, match="'constant' is registered already"):
        register("constant")(constant)


def test_scores_leave_no_trace_in_autograd(channels, tensors):
    for name in ("group_norm", "l1", "l2", "fpgm", "lamp", "bn_scale", "random"):
        assert not IMPORTANCES[name](channels, tensors, Evidence()).requires_grad
