"""Weights that are not finite never reach a gradient, and no accelerator is asked about them in a step."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from naive_penalty import (
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
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune.errors import PruneError
from lightning_prune.scores.regularizer import Regularizer

pytestmark = pytest.mark.usefixtures("every_loop")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_skip_lets_the_groups_of_a_non_finite_weight_rest_and_no_others(bad):
    groups, tensors = two_layers()
    added = naive_gradients(groups[2:], tensors, 0.1)
    with torch.no_grad():
        tensors["a"][1, 0] = bad
    regularizer = Regularizer(groups, tensors, reg=0.1)
    with pytest.warns(UserWarning, match="NaN or infinity in a; the groups concerned rest") as caught:
        regularizer.apply()
    regularizer.apply()
    assert len(caught) == 1
    assert int(regularizer.skipped) == 4  # two groups, two calls
    assert torch.equal(tensors["a"].grad, torch.zeros_like(tensors["a"]))
    torch.testing.assert_close(tensors["b"].grad, 2 * added["b"])
    assert float(regularizer.penalty()) == pytest.approx(
        float(naive_penalty(groups[2:], tensors, 0.1, 4.0).detach())
    )


def test_groups_work_again_once_the_weight_is_repaired():
    groups, tensors = two_layers()
    with torch.no_grad():
        keep = tensors["a"][1, 0].clone()
        tensors["a"][1, 0] = math.nan
    for update_every in (1, 100):
        regularizer = Regularizer(groups, tensors, reg=0.1, update_every=update_every)
        with torch.no_grad():
            tensors["a"][1, 0] = math.nan
        with pytest.warns(UserWarning, match="in a;"):
            regularizer.apply()
        with torch.no_grad():
            tensors["a"][1, 0] = keep
        tensors["a"].grad.zero_()
        regularizer.apply()
        torch.testing.assert_close(tensors["a"].grad, naive_gradients(groups, tensors, 0.1)["a"])
        assert int(regularizer.skipped) == 2


def test_zero_counts_the_element_as_nothing_and_keeps_the_group_at_work():
    groups, tensors = two_layers()
    with torch.no_grad():
        tensors["a"][1, 0] = 0
    added = naive_gradients(groups, tensors, 0.1)
    with torch.no_grad():
        tensors["a"][1, 0] = math.nan
    regularizer = Regularizer(groups, tensors, reg=0.1, nan_policy="zero")
    with pytest.warns(UserWarning, match="in a; such values count as 0"):
        regularizer.apply()
    assert_added(tensors, {n: torch.zeros_like(t) for n, t in tensors.items()}, added)
    assert int(regularizer.skipped) == 0


@pytest.mark.parametrize("update_every", [1, 100])
def test_raise_names_the_tensor_before_anything_is_written(update_every):
    groups, tensors = two_layers()
    regularizer = Regularizer(groups, tensors, nan_policy="raise", update_every=update_every)
    regularizer.apply()
    with torch.no_grad():
        tensors["b"][3, 2] = math.inf
    start = before(tensors)
    for _ in range(2):
        with pytest.raises(PruneError, match=r"found NaN or infinity in b \(nan_policy='raise'\)"):
            regularizer.apply()
    assert all(torch.equal(t.grad, start[n]) for n, t in tensors.items())


def test_what_was_raised_once_is_forgotten_when_it_is_repaired():
    groups, tensors = two_layers()
    regularizer = Regularizer(groups, tensors, nan_policy="raise")
    with torch.no_grad():
        tensors["b"][3, 2] = math.inf
    with pytest.raises(PruneError, match="in b"):
        regularizer.apply()
    with torch.no_grad():
        tensors["b"][3, 2] = 1
    regularizer.apply()
    torch.testing.assert_close(tensors["b"].grad, naive_gradients(groups, tensors)["b"])


@pytest.mark.parametrize("policy", ["skip", "zero"])
def test_a_weight_that_breaks_between_refreshes_never_reaches_a_gradient(policy):
    groups, tensors = two_layers()
    regularizer = Regularizer(groups, tensors, reg=0.1, nan_policy=policy, update_every=100)
    regularizer.apply()
    with torch.no_grad():
        tensors["b"][0, 0] = math.nan
    start = before(tensors)
    with pytest.warns(UserWarning, match="in b;"):
        regularizer.apply()
    assert all(t.grad.isfinite().all() for t in tensors.values())
    assert torch.equal(tensors["b"].grad, start["b"]) is (policy == "skip")
    assert not torch.equal(tensors["a"].grad, start["a"])


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # of Triton's interpreter
def test_squares_that_overflow_rest_too_and_the_group_is_named():
    w = torch.nn.Parameter(torch.tensor([[1e30], [1.0]]))
    w.grad = torch.zeros_like(w)
    regularizer = Regularizer([group("w:0", member("w", 0, range(2), range(2), 2))], {"w": w}, reg=0.1)
    with pytest.warns(UserWarning, match="squares of w:0 that were not finite"):
        regularizer.apply()
    assert w.grad.flatten().tolist() == [0, 0]


def test_an_element_outside_every_group_is_not_written_through():
    w = torch.nn.Parameter(torch.ones(3, 1))
    w.grad = torch.zeros_like(w)
    with torch.no_grad():
        w[2] = math.nan
    regularizer = Regularizer([group("w:0", member("w", 0, [0, 1], [0, 1], 3))], {"w": w}, reg=0.5)
    with pytest.warns(UserWarning, match="in w;"):
        regularizer.apply()
    assert w.grad.flatten().tolist() == [0.5, 0.5, 0]


def test_finite_weights_never_warn():
    tensors = parameters()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        regularizer = Regularizer([channels(), *others()], tensors, nan_policy="raise", update_every=2)
        for _ in range(4):
            regularizer.apply()
        regularizer.check()
    assert int(regularizer.skipped) == 0


# An accelerator is not waited for: the same on a CPU that is treated as one


class NoWaiting(TorchDispatchMode):
    """Fails where a value would have to come back from the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in {"_local_scalar_dense", "nonzero", "masked_select"}, name
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("policy", ["skip", "zero", "raise"])
@pytest.mark.parametrize("update_every", [1, 100])
def test_no_step_waits_for_the_device(policy, update_every):
    tensors, groups = parameters(), [channels(), *others()]
    start = before(tensors)
    regularizer = Regularizer(groups, tensors, reg=0.1, nan_policy=policy, update_every=update_every)
    with NoWaiting():
        regularizer.apply(torch.tensor(0.5))
        regularizer.apply(0.5)
    assert_added(tensors, start, naive_gradients(groups, tensors, 0.1))
    regularizer.check()


def test_a_wait_would_be_noticed():
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoWaiting():
        Regularizer([channels()], parameters()).apply()


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("update_every", [1, 100])
def test_what_breaks_on_the_device_rests_there_and_is_told_when_asked(update_every):
    groups, tensors = two_layers()
    regularizer = Regularizer(groups, tensors, reg=0.1, update_every=update_every)
    regularizer.apply()
    with torch.no_grad():
        tensors["a"][1, 0] = math.nan
        tensors["a"][1, 1] = math.inf
    start = before(tensors)
    with NoWaiting():
        regularizer.apply()
        regularizer.apply()
    assert torch.equal(tensors["a"].grad, start["a"])
    assert not torch.equal(tensors["b"].grad, start["b"])
    assert all(t.grad.isfinite().all() for t in tensors.values())
    assert int(regularizer.skipped) == 4
    with pytest.warns(UserWarning, match="in a; the groups concerned rest") as caught:
        regularizer.check()
    regularizer.check()
    assert len(caught) == 1


@pytest.mark.usefixtures("accelerator")
def test_many_weights_of_half_precision_are_no_reason_to_rest_on_the_device():
    """Their magnitudes add up to more than the largest number of the type."""
    w = torch.nn.Parameter(torch.full((512, 256), 1.0, dtype=torch.float16))
    w.grad = torch.zeros_like(w)
    groups = [group("w:0", member("w", 0, range(512), range(512), 512))]
    regularizer = Regularizer(groups, {"w": w}, reg=0.25, update_every=100)
    for step in (1, 2, 3):
        regularizer.apply()
        assert w.grad.eq(0.25 * step).all()
    assert int(regularizer.skipped) == 0


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("update_every", [1, 100])
def test_zero_on_the_device_leaves_the_element_out(update_every):
    groups, tensors = two_layers()
    with torch.no_grad():
        tensors["a"][1, 0] = 0
    regularizer = Regularizer(groups, tensors, reg=0.1, nan_policy="zero", update_every=update_every)
    regularizer.apply()
    added = naive_gradients(groups, tensors, 0.1)
    with torch.no_grad():
        tensors["a"][1, 0] = math.nan
    start = before(tensors)
    with NoWaiting():
        regularizer.apply()
    assert_added(tensors, start, added)
    with pytest.warns(UserWarning, match="in a; such values count as 0"):
        regularizer.check()


@pytest.mark.usefixtures("accelerator")
def test_raise_on_the_device_rests_until_asked():
    groups, tensors = two_layers()
    regularizer = Regularizer(groups, tensors, nan_policy="raise")
    with torch.no_grad():
        tensors["b"][0, 0] = math.nan
    regularizer.apply()
    assert torch.equal(tensors["b"].grad, torch.zeros_like(tensors["b"]))
    with pytest.raises(PruneError, match="NaN or infinity in b"):
        regularizer.check()
