"""Every budget by name: what it counts, against counts by hand; what is reached; what is refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from lightning_prune import GroupNormPruner
from lightning_prune.budgets import latency
from lightning_prune.budgets.latency import LatencyTable, sizes_after
from lightning_prune.budgets.table import KINDS
from lightning_prune.errors import BudgetError, OptionError
from lightning_prune.measuring.cost import measure_cost
from lightning_prune.measuring.latency import Latency
from lightning_prune.measuring.memory import peak_memory_bytes
from lightning_prune.options import BUDGETS

X = torch.randn(2, 3, 6, 6)


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 200, 3), nn.Conv2d(200, 120, 3)
        self.fc = nn.Linear(120, 5)

    def forward(self, x):
        return self.fc(self.b(self.a(x).relu()).relu().mean((2, 3)))


def counted(name, model):
    if name == "memory":
        return peak_memory_bytes(model, X)
    if name == "latency":
        return clock(model)
    cost = measure_cost(model, X)
    return cost.macs if name == "macs" else cost.parameters


def clock(model):
    """A machine on which a layer takes one microsecond per element of its weight, and 100 for the call."""
    return sum(layer.weight.numel() + 100 for layer in (model.a, model.b, model.fc)) / 1000


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """Replaces the clock, nothing else: what a table makes of times must not depend on this computer."""

    def measure(subject, keeps, sizes):
        layers = {}
        for name in sizes[0]:
            works = sorted({size[name] for size in sizes})
            layers[name] = tuple((work, (work + 100) / 1000) for work in works)
        return {**layers, "": ((1, 0.0),)}

    def in_turns(models, inputs, **options):
        return {name: Latency(clock(model), 0.0, 1, 3, 1) for name, model in models.items()}

    monkeypatch.setenv(latency.CACHE, str(tmp_path))
    monkeypatch.setattr(latency, "_measure", measure)
    monkeypatch.setattr(latency, "measure_latency", in_turns)


def test_every_budget_of_the_options_is_in_the_table():
    assert tuple(KINDS) == BUDGETS


@pytest.mark.parametrize("ranking", [{}, {"global_pruning": True}, {"isomorphic": True}], ids=str)
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", BUDGETS)
def test_a_budget_is_met_within_a_percentage_point(name, steps, ranking):
    model = Wide()
    dense = counted(name, model)
    pruner = GroupNormPruner(model, X, budget={name: 0.6}, iterative_steps=steps, **ranking)
    for _ in range(steps):
        pruner.step()
    tolerance = 0.05 if name == "latency" else 0.01
    assert counted(name, model) / dense == pytest.approx(0.6, abs=tolerance)
    assert pruner.budget.reached == pytest.approx(counted(name, model) / dense, abs=1e-6)


@pytest.mark.parametrize("name", BUDGETS)
def test_an_unreachable_one_is_refused_at_once_with_what_is_reachable(name):
    before = copy.deepcopy(Wide().state_dict())
    torch.manual_seed(0)
    model = Wide()
    with pytest.raises(BudgetError, match=rf"budget {name}: 0.050 of .* at best"):
        GroupNormPruner(model, X, budget={name: 0.05}, max_pruning_ratio=0.2)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in before.items()}


def test_memory_is_parameters_and_what_lives_at_the_worst_moment():
    """By hand: while the second convolution runs, its input (after relu) and its result are alive."""
    model = Wide()
    parameters = 200 * 3 * 9 + 200 + 120 * 200 * 9 + 120 + 5 * 120 + 5
    worst = 2 * 200 * 16 + 2 * 120 * 4  # relu(a): [2, 200, 4, 4]; b: [2, 120, 2, 2]
    first = 2 * (2 * 200 * 16)  # a and relu(a)
    assert peak_memory_bytes(model, X, allocator=False) == 4 * (parameters + max(worst, first))


def test_a_table_reads_between_its_lines():
    table = LatencyTable({}, {"a": ((10, 1.0), (20, 3.0)), "": ((0, 0.5), (100, 0.5))})
    assert table.milliseconds({"a": 15}) == 2.5
    assert table.milliseconds({"a": 20}) == 3.5
    assert LatencyTable.from_dict(json.loads(json.dumps(table.as_dict()))) == table
    assert "a" in str(table)
    assert "3.0000" in str(table)


def test_sizes_are_those_after_the_plan():
    model = Wide()
    pruner = GroupNormPruner(model, X)
    plan = pruner.step(dry_run=True)
    foreseen = sizes_after(model, plan)
    pruner.step()
    assert foreseen == {n: layer.weight.numel() for n, layer in model.named_children()}


def test_a_table_is_measured_once_and_then_read(monkeypatch, tmp_path):
    GroupNormPruner(Wide(), X, budget={"latency": 0.6})
    (file,) = (tmp_path / "latency").glob("*.json")
    monkeypatch.setattr(latency, "_measure", lambda *args: pytest.fail("measured again"))
    torch.manual_seed(0)
    GroupNormPruner(Wide(), X, budget={"latency": 0.6})
    assert json.loads(file.read_text())["layers"].keys() == {"a", "b", "fc", ""}


def test_the_clock_corrects_the_table(monkeypatch):
    """The clock says that half of the time is none of the layers'; the table has not seen it."""

    def in_turns(models, inputs, **options):
        return {name: Latency(clock(model) + 150.0, 0.0, 1, 3, 1) for name, model in models.items()}

    monkeypatch.setattr(latency, "measure_latency", in_turns)
    model = Wide()
    dense = clock(model) + 150
    pruner = GroupNormPruner(model, X, budget={"latency": 0.7})
    pruner.step()
    assert (clock(model) + 150) / dense == pytest.approx(0.7, abs=0.05)


def test_a_clock_that_never_agrees_is_told(monkeypatch):
    def in_turns(models, inputs, **options):
        return {name: Latency(1.0, 0.0, 1, 3, 1) for name in models}

    monkeypatch.setattr(latency, "measure_latency", in_turns)
    with pytest.raises(BudgetError, match=r"the nearest that a pruned copy took .* is 1.000"):
        GroupNormPruner(Wide(), X, budget={"latency": 0.6})


def test_latency_needs_a_device_to_measure_on():
    with pytest.raises(OptionError, match="put all of it on one device"):
        GroupNormPruner(Wide().to("meta"), X.to("meta"), budget={"latency": 0.6})


@pytest.mark.parametrize("name", BUDGETS)
def test_a_resumed_pruner_goes_on_as_the_first_would(name):
    options = {"budget": {name: 0.5}, "iterative_steps": 2}
    whole = Wide()
    pruner = GroupNormPruner(whole, X, **options)
    pruner.step()
    state, halfway = copy.deepcopy(pruner.state_dict()), copy.deepcopy(whole)
    pruner.step()
    resumed = GroupNormPruner.resume(halfway, X, state, **options)
    resumed.step()
    assert resumed.plan == pruner.plan
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), halfway.parameters(), strict=True))
