"""Figures of one sample: what is measured, and which metrics stand beside it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor, nn

from lightning_prune import GroupNormPruner, TraceError
from lightning_prune.measuring.cost import measure_cost
from lightning_prune.reporting.report import Metric
from lightning_prune.training.example_inputs import Call, Example, replay
from lightning_prune.training.samples import described, per_sample, sample_of
from lightning_prune.training.scoring import Score

BATCH = torch.ones(4, 6)


class Same(nn.Module):
    """A layer whose work does not depend on the batch, beside one whose work does."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.once = nn.Linear(6, 8), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.each(x) * self.once(torch.ones(1, 6))


class InPairs(nn.Linear):
    """Takes samples two by two."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.view(2, -1, 6)[0])


def test_a_batch_is_measured_as_one_sample() -> None:
    sample = sample_of(nn.Linear(6, 8), Example(BATCH))
    assert (sample.macs, sample.is_one, sample.words) == (6 * 8, True, "one sample, 1x6 float32")


def test_what_does_not_run_on_one_sample_is_measured_whole_and_says_so() -> None:
    sample = sample_of(InPairs(6, 8), Example(BATCH))
    assert (sample.macs, sample.is_one, sample.words) == (2 * 6 * 8, False, "one forward, 4x6 float32")
    with pytest.raises(TraceError):
        sample_of(nn.Linear(7, 8), Example(BATCH))


def test_inputs_of_several_sizes_are_not_cut_down() -> None:
    example = Example({"x": BATCH, "scale": torch.ones(2, dtype=torch.float64)})
    assert described(example) == "4x6 float32, 2 float64"
    calls = Example([Call("", (BATCH,), {}), Call("once", (torch.ones(2, 6),), {})], replay)
    assert described(calls) == "4x6 float32, 2x6 float32"


def test_a_plan_speaks_of_one_sample_as_the_report_does() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    pruner = GroupNormPruner(net, BATCH, pruning_ratio=0.5)
    counted = tuple(pruner.foresee())
    assert [step.macs for step in counted] == [4 * (48 + 16), 4 * (24 + 8)]
    steps, of = per_sample(counted, Example(BATCH), sample_of(net, Example(BATCH)))
    assert ([step.macs for step in steps], of) == ([48 + 16, 24 + 8], "one sample, 1x6 float32")
    pruner.step()
    assert steps[-1].macs == measure_cost(net, BATCH[:1]).macs


def test_where_work_does_not_grow_with_the_batch_a_plan_speaks_of_the_whole_forward() -> None:
    net = Same()
    counted = tuple(GroupNormPruner(net, BATCH, pruning_ratio=0.5).foresee())
    steps, of = per_sample(counted, Example(BATCH), sample_of(net, Example(BATCH)))
    assert (steps, of) == (counted, "one forward, 4x6 float32")
    assert steps[0].macs == 4 * 48 + 48


def scores(*callbacks: object) -> Score:
    return Score(SimpleNamespace(callbacks=list(callbacks)))  # type: ignore[arg-type]


def test_every_metric_of_both_is_compared_the_one_of_the_task_first() -> None:
    dense = {
        "val/loss": 0.5,
        "val/f1": 0.1,
        "val/acc": 0.8,
        "prune/macs": 1.0,
        "val/gone": 1.0,
        "val/x_step": 1.0,
    }
    pruned = {**dense, "val/acc": 0.7, "val/new": 2.0}
    del pruned["val/gone"]
    main, others = scores().compare(dense, pruned)
    assert main == Metric("accuracy", "max", 0.8, 0.7)
    assert others == (Metric("loss", "min", 0.5, 0.5), Metric("f1", None, 0.1, 0.1))
    monitored = scores(EarlyStopping("val/f1", mode="max"))
    del pruned["val/acc"]
    main, others = monitored.compare(dense, pruned)
    assert main == Metric("f1", "max", 0.1, 0.1)
    assert [other.name for other in others] == ["loss"]


@pytest.mark.parametrize(
    ("name", "direction"),
    [
        ("val/acc", "max"),
        ("val_top1_acc", "max"),
        ("test/BinaryAccuracy", "max"),
        ("valAcc", "max"),
        ("val/accepted", None),
        ("val/vaccine_f1", None),
        ("val/err_top5", "min"),
        ("val/top5_err", "min"),
        ("val/CharErrorRate", "min"),
        ("val/BCELoss", "min"),
        ("val/inferred_f1", None),
    ],
)
def test_a_direction_is_told_by_words_not_by_letters(name: str, direction: str | None) -> None:
    assert scores().direction(name) == direction
    assert (scores().choose({name: 0.0}) is None) is (direction is None or "rr" in name)


def test_a_metric_that_nothing_tells_of_is_shown_and_not_judged() -> None:
    main, others = scores().compare({"val/ppl": 9.0}, {"val/ppl": 8.0})
    assert (main, others) == (None, (Metric("ppl", None, 9.0, 8.0),))
    many = {f"val/m{i}": float(i) for i in range(20)}
    assert len(scores().compare(many, many)[1]) == 7
