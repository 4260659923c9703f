"""Ranking: one scale for all groups, and non-finite units last of all."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

from lightning_prune.errors import OptionError, PruneError
from lightning_prune.graph.groups import Group, Member
from lightning_prune.scores.importance import Evidence
from lightning_prune.scores.normalizers import NORMALIZERS, normalize
from lightning_prune.scores.ranking import rank, score


def member(tensor, dim, index, unit, size, rows=1, is_buffer=False):
    return Member(tensor, dim, rows, size, np.asarray(index), np.asarray(unit), is_buffer)


def whole(tensor, dim, size, **more):
    return member(tensor, dim, range(size), range(size), size, **more)


def group(*members, units=None, name="g"):
    n = units or int(max(m.unit.max() for m in members)) + 1
    return Group(name, "channel", np.arange(n), members, "")


def check(found, wanted):
    rtol = 1e-9 if found.dtype == torch.float64 else 1e-6
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=found.dtype), rtol=rtol, atol=1e-12)


@pytest.mark.parametrize(
    ("normalizer", "wanted"),
    [
        ("mean", [1 / 2, 2 / 2, 3 / 2]),
        ("max", [1 / 3, 2 / 3, 1]),
        ("none", [1, 2, 3]),
        (None, [1, 2, 3]),
        (lambda scores: scores * 10, [10, 20, 30]),
    ],
)
def test_normalizers(normalizer, wanted):
    check(normalize(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), normalizer), wanted)


@pytest.mark.parametrize("normalizer", sorted(NORMALIZERS))
@pytest.mark.parametrize("scores", [[0.0, 0.0], [1e38, 3e38], [1e-44, 3e-44], [-1.0, 1.0], [-3.0, -1.0]])
def test_no_normalizer_changes_the_order_or_leaves_the_numbers(normalizer, scores):
    found = normalize(torch.tensor(scores), normalizer)
    assert found.isfinite().all()
    assert (found[1] > found[0]) == (scores[1] > scores[0])


def test_units_without_a_finite_score_come_last_and_do_not_count_in_the_mean():
    found = normalize(torch.tensor([math.nan, 1.0, math.inf, 3.0, -math.inf]), "mean")
    assert found.tolist() == [-math.inf, 0.5, -math.inf, 1.5, -math.inf]
    assert normalize(torch.tensor([math.nan]), "mean").tolist() == [-math.inf]


def test_wrong_normalizers_are_named():
    with pytest.raises(OptionError, match="mean, max, none, None or a callable, got 'median'"):
        normalize(torch.ones(2), "median")
    with pytest.raises(OptionError, match=r"got shape \[1\]"):
        normalize(torch.ones(2), lambda s: s[:1])
    with pytest.raises(OptionError, match="guard it against"):
        normalize(torch.ones(2), lambda s: (s - s.mean()) / s.std())
    with pytest.raises(OptionError, match="got float"):
        normalize(torch.ones(2), lambda s: 1.0)


def pair(a, b):
    tensors = {"a": torch.tensor(a)[:, None], "b": torch.tensor(b)[:, None]}
    return [group(whole(n, 0, len(t)), name=n) for n, t in tensors.items()], tensors


def test_ranking_normalises_each_group_by_itself():
    groups, tensors = pair([1.0, 3.0**0.5], [10.0, 30.0])
    found = rank(groups, tensors)
    check(found[0], [0.5, 1.5])
    check(found[1], [0.2, 1.8])


def test_ranking_of_groups_that_share_a_dimension_equals_one_by_one():
    tensors = {"w": torch.randn(3, 5)}
    left, right = group(member("w", 1, [0, 1], [0, 1], 5)), group(member("w", 1, [2, 3, 4], [0, 1, 2], 5))
    together = rank([left, right], tensors, normalizer=None)
    torch.testing.assert_close(torch.cat(together), (tensors["w"] ** 2).sum(0))


def test_ranking_keeps_the_dimensions_of_a_tensor_apart():
    tensors = {"w": torch.randn(4, 4), "v": torch.randn(4, 4)}
    groups = [group(whole(n, d, 4)) for n in tensors for d in (0, 1)]
    groups.append(group(member("w", 1, range(8), range(8), 4, rows=2)))
    found = rank(groups, tensors, importance="l1", normalizer=None)
    sizes = {n: t.abs() for n, t in tensors.items()}
    for scores, wanted in zip(
        found,
        [
            *(t.sum(1 - d) for t in sizes.values() for d in (0, 1)),
            torch.cat([sizes["w"][:2].sum(0), sizes["w"][2:].sum(0)]),
        ],
        strict=True,
    ):
        torch.testing.assert_close(scores, wanted)


def test_scores_below_zero_are_divided_by_their_mean_magnitude():
    check(normalize(torch.tensor([-3.0, -1.0]), "mean"), [-1.5, -0.5])


@pytest.mark.parametrize("importance", ["group_norm", "l1", "l2", "lamp", "fpgm"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_skip_cuts_non_finite_units_first_and_ranks_the_others_by_their_own(importance, bad):
    groups, tensors = pair([1.0, bad, 3.0, 7.0], [1.0, 2.0])
    clean, clean_tensors = pair([1.0, 3.0, 7.0], [1.0, 2.0])
    with pytest.warns(UserWarning, match="NaN or infinity in a;.*cut first") as caught:
        found = rank(groups, tensors, importance=importance)
    assert len(caught) == 1
    assert found[0][1] == -math.inf
    wanted = rank(clean, clean_tensors, importance=importance)
    torch.testing.assert_close(found[0][[0, 2, 3]], wanted[0])
    torch.testing.assert_close(found[1], wanted[1])


def test_zero_gives_a_unit_with_a_bad_element_no_score():
    tensors = {"w": torch.tensor([[math.nan, 9.0], [1.0, 1.0]])}
    with pytest.warns(UserWarning, match="in w; such units score 0"):
        found = rank([group(whole("w", 0, 2))], tensors, nan_policy="zero", normalizer=None)
    assert found[0].tolist() == [0, 2]


def test_zero_holds_for_bad_gradients_too():
    tensors = {"w": torch.ones(2, 2)}
    evidence = Evidence(gradients={"w": torch.tensor([[math.inf, 2.0], [1.0, 1.0]])})
    with pytest.warns(UserWarning, match="scores of g are not finite"):
        found = rank(
            [group(whole("w", 0, 2))],
            tensors,
            importance="taylor",
            nan_policy="zero",
            normalizer=None,
            evidence=evidence,
        )
    assert found[0].tolist() == [0, 2]


def test_raise_names_the_tensor():
    groups, tensors = pair([1.0, 2.0], [1.0, math.nan])
    with pytest.raises(PruneError, match=r"NaN or infinity in b \(nan_policy='raise'\)"):
        rank(groups, tensors, nan_policy="raise")


def test_finite_weights_warn_of_nothing():
    groups, tensors = pair([1.0, 2.0], [0.0, 0.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rank(groups, tensors)[1].tolist() == [0, 0]


def test_an_own_importance_gets_the_group_and_is_ranked():
    groups, tensors = pair([1.0, 2.0, 3.0], [1.0, 2.0])
    seen = []

    def own(g):
        seen.append(g)
        return np.arange(g.n_units, 0, -1)

    found = rank(groups, tensors, importance=own, normalizer="max")
    assert seen == groups
    check(found[0], [1, 2 / 3, 1 / 3])


@pytest.mark.parametrize("policy", ["skip", "zero"])
def test_a_non_finite_own_score_is_never_strong(policy):
    groups, tensors = pair([1.0, 2.0, 3.0], [1.0])
    with pytest.warns(UserWarning, match="scores of a are not finite.*(cut first|score 0)"):
        found = rank(groups[:1], tensors, importance=lambda g: [math.inf, 1, 2], nan_policy=policy)
    assert found[0].argsort().tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        (lambda g: torch.ones(2), r"must give 3 real scores.*'a', got torch.float32 of shape \[2\]"),
        (lambda g: torch.ones(3, 1), r"of shape \[3, 1\]"),
        (lambda g: torch.ones(3) > 0, "got torch.bool"),
        (lambda g: torch.ones(3, dtype=torch.complex64), "got torch.complex64"),
        (lambda g: "scores", "failed with"),
        (lambda g: None, "failed with"),
        ("group-norm", "must be one of group_norm, l1.*did you mean 'group_norm'"),
        ("zzz", "got 'zzz'$"),
        (3, "a name or a callable group -> scores, got int"),
    ],
)
def test_a_wrong_importance_is_named(importance, message):
    groups, tensors = pair([1.0, 2.0, 3.0], [1.0])
    with pytest.raises(OptionError, match=message):
        score(importance, groups[0], tensors, Evidence())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nan_policy": "ignore"}, "raise, skip, zero, got 'ignore'"),
        ({"importance": "nothing"}, "got 'nothing'"),
        ({"importance": 3}, "got int"),
        ({"normalizer": "median"}, "got 'median'"),
        ({"normalizer": 3}, "got 3"),
    ],
)
def test_unknown_options_are_refused_even_where_there_is_nothing_to_rank(options, message):
    with pytest.raises(OptionError, match=message):
        rank([], {}, **options)
