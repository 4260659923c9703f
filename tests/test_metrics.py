"""Shares of what a prune keeps, alone and over ranks."""

import pickle

import pytest
import torch
from torch import Tensor

from lightning_prune.errors import OptionError
from lightning_prune.metrics import ChannelSparsity, KeptMacs, ParameterSparsity, kept_share, removed_share

METRICS = {ParameterSparsity: 0.3, ChannelSparsity: 0.3, KeptMacs: 0.7}  # at 7 of 10


@pytest.mark.parametrize("metric", METRICS)
def test_the_share_of_seven_in_ten(metric: type[ParameterSparsity]) -> None:
    level = metric()
    level.update(7, 10)
    assert level.compute() == torch.tensor(METRICS[metric], dtype=torch.float32)


def test_the_functions_agree_with_the_metrics() -> None:
    assert (kept_share(7, 10), removed_share(7, 10), kept_share(0, 3), removed_share(3, 3)) == (
        0.7,
        0.3,
        0.0,
        0.0,
    )


@pytest.mark.parametrize("metric", METRICS)
def test_the_last_update_counts_also_through_forward(metric: type[ParameterSparsity]) -> None:
    level = metric()
    level(10, 10)
    batch = level(7, 10)
    assert batch == level.compute() == torch.tensor(METRICS[metric], dtype=torch.float32)


@pytest.mark.parametrize("metric", METRICS)
def test_equal_ranks_reduce_to_the_same_share(metric: type[ParameterSparsity]) -> None:
    kept, initial = 2**26, 2**26 + 1  # the same number in float32
    alone = metric()
    three_ranks = metric(dist_sync_fn=lambda state, group: [state] * 3, distributed_available_fn=lambda: True)
    for level in (alone, three_ranks):
        level.update(kept, initial)
    share = kept / initial if metric is KeptMacs else 1 / initial
    assert alone.compute() == three_ranks.compute() == torch.tensor(share, dtype=torch.float32)


def test_reset_and_pickling_keep_the_state_honest() -> None:
    level = KeptMacs()
    level.update(1, 2)
    copy: KeptMacs = pickle.loads(pickle.dumps(level))
    level.reset()
    assert copy.compute() == 0.5
    with pytest.warns(UserWarning, match="was called before the ``update``"):
        assert torch.isnan(level.compute())


def test_nothing_is_added_to_a_checkpoint_and_half_precision_does_not_round() -> None:
    level = ParameterSparsity()
    assert level.state_dict() == {}
    level.half().update(99_999, 100_000)
    share: Tensor = level.compute()
    assert share == torch.tensor(1e-5, dtype=torch.float32)


@pytest.mark.parametrize(
    ("kept", "initial"),
    [(11, 10), (-1, 10), (0, 0), (0.5, 1), (True, 1), (1, "2")],
    ids=["more than before", "negative", "of nothing", "a share", "a bool", "a string"],
)
def test_impossible_counts_are_refused(kept: object, initial: object) -> None:
    for function in (kept_share, removed_share, ParameterSparsity().update):
        with pytest.raises(OptionError, match=r"0 <= kept <= initial.*but got kept="):
            function(kept, initial)  # type: ignore[arg-type]
