"""Optimizer state follows a cut: training goes on as a dense run whose removed channels are silent."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn, optim

from lightning_prune.errors import PruneError, StrategyError
from lightning_prune.plan import Cut, Plan
from lightning_prune.surgery.applying import apply
from lightning_prune.surgery.cutting import cut_tensor
from lightning_prune.surgery.optimizers import Carrier, register_state_slicer

KEEP = {"1": (0, 2, 3), "2": (4, 0, 1)}  # of 5 channels each; the second list is not sorted
CUTS = {
    "conv1.weight": [(0, "1")],
    "bn1.weight": [(0, "1")],
    "bn1.bias": [(0, "1")],
    "conv2.weight": [(0, "2"), (1, "1")],
    "bn2.weight": [(0, "2")],
    "bn2.bias": [(0, "2")],
    "head.weight": [(1, "2")],
    "bn1.running_mean": [(0, "1")],
    "bn1.running_var": [(0, "1")],
    "bn2.running_mean": [(0, "2")],
    "bn2.running_var": [(0, "2")],
}
PLAN = Plan(tuple(Cut(name, dim, 5, KEEP[key]) for name, cuts in CUTS.items() for dim, key in cuts))


class Net(nn.Module):
    """No bias before a batch norm: its gradient is rounding noise, which Adam would blow up to full steps."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 5, 3, bias=False), nn.BatchNorm2d(5)
        self.conv2, self.bn2 = nn.Conv2d(5, 5, 3, bias=False), nn.BatchNorm2d(5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        x = torch.tanh(self.bn1(self.conv1(x)))
        x = torch.tanh(self.bn2(self.conv2(x)))
        return self.head(x.mean((2, 3)))


def survivors(name, tensor):
    """What the plan keeps of a dense tensor, by plain indexing."""
    for dim, key in CUTS.get(name, ()):
        tensor = tensor[list(KEEP[key])] if dim == 0 else tensor[:, list(KEEP[key])]
    return tensor


def silence(net):
    """Hold the removed channels at 0 behind their batch norm."""
    with torch.no_grad():
        for bn, key in ((net.bn1, "1"), (net.bn2, "2")):
            removed = [i for i in range(5) if i not in KEEP[key]]
            bn.weight[removed] = bn.bias[removed] = 0.0


def train(net, optimizer, batches, after=lambda net: None):
    for x, y in batches:

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
        after(net)


def batches(count):
    return [(torch.randn(6, 2, 7, 7, dtype=torch.float64), torch.randint(3, (6,))) for _ in range(count)]


def prune(net, optimizer):
    carrier = Carrier.of(optimizer, net, PLAN)
    apply(net, PLAN)
    carrier.commit()


EXACT = {
    "sgd": (optim.SGD, {"lr": 0.1}),
    "sgd momentum": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "sgd foreach": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "foreach": True}),
    "sgd fused": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "fused": True}),
    "adam": (optim.Adam, {"lr": 0.01}),
    "adam amsgrad": (optim.Adam, {"lr": 0.01, "amsgrad": True}),
    "adam fused": (optim.Adam, {"lr": 0.01, "fused": True}),
    "adamw": (optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "adamw foreach": (optim.AdamW, {"lr": 0.01, "foreach": True}),
    "adamw fused": (optim.AdamW, {"lr": 0.01, "amsgrad": True, "fused": True}),
    "nadam": (optim.NAdam, {"lr": 0.01}),
    "radam": (optim.RAdam, {"lr": 0.01}),
    "adamax": (optim.Adamax, {"lr": 0.01}),
    "rmsprop": (optim.RMSprop, {"lr": 0.01, "centered": True, "momentum": 0.9}),
    "adagrad": (optim.Adagrad, {"lr": 0.01, "initial_accumulator_value": 0.1}),
    "adagrad fused": (optim.Adagrad, {"lr": 0.01, "fused": True}),
    "adadelta": (optim.Adadelta, {"lr": 1.0}),
    "asgd": (optim.ASGD, {"lr": 0.01, "t0": 1}),
    "rprop": (optim.Rprop, {"lr": 0.01}),
}


@pytest.mark.parametrize(("cls", "kwargs"), EXACT.values(), ids=EXACT)
def test_training_goes_on_as_the_dense_run_with_silent_channels(cls, kwargs):
    net, before, after = Net().double(), batches(3), batches(3)
    optimizer = cls(net.parameters(), **kwargs)
    train(net, optimizer, before)

    dense, twin = copy.deepcopy((net, optimizer))  # load_state_dict would raise NAdam's mu_product to float64
    silence(dense)
    train(dense, twin, after, after=silence)

    prune(net, optimizer)
    train(net, optimizer, after)
    for (name, got), expected in zip(net.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(got, survivors(name, expected), rtol=0, atol=1e-12)
        for key, value in optimizer.state[got].items():
            if torch.is_tensor(value) and value.dim():
                kept = survivors(name, twin.state[expected][key])
                torch.testing.assert_close(value, kept, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cls", [optim.Adafactor, optim.Muon])
def test_states_that_mix_all_entries_are_sliced_though_not_exact(cls):
    """Adafactor clips by a mean over the tensor, Muon orthogonalises it: what went had changed the rest."""
    net = Net().double()
    parameters = [p for p in net.parameters() if cls is optim.Adafactor or p.dim() == 2]
    optimizer = cls(parameters, lr=0.01)
    train(net, optimizer, batches(2))
    old = {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
    prune(net, optimizer)
    for name, p in net.named_parameters():
        for key, value in optimizer.state[p].items() if p in old else ():
            if key == "row_var":  # [n0, n1, k, 1], or [n0, 1] of a matrix
                expected = old[p][key] if name == "head.weight" else survivors(name, old[p][key])
            elif key == "step":
                expected = old[p][key]
            else:
                expected = survivors(name, old[p][key])
            assert torch.equal(value, expected), (name, key)
    train(net, optimizer, batches(2))
    assert all(p.isfinite().all() for p in net.parameters())


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 5, sparse=True, dtype=torch.float64)
        self.head = nn.Linear(5, 3, dtype=torch.float64)

    def forward(self, x):
        return self.head(self.table(x).mean(1))


def test_sparse_adam_goes_on_as_the_dense_run():
    keep = [4, 0, 1]
    plan = Plan((Cut("table.weight", 1, 5, tuple(keep)), Cut("head.weight", 1, 5, tuple(keep))))
    data = [(torch.randint(7, (6, 4)), torch.randint(3, (6,))) for _ in range(6)]
    net = Table()

    def optimizers(net):
        return optim.SparseAdam([net.table.weight], lr=0.05), optim.SGD(
            net.head.parameters(), lr=0.1, momentum=0.9
        )

    def run(net, optimizers, data, silent):
        for x, y in data:
            for o in optimizers:
                o.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            for o in optimizers:
                o.step()
            with torch.no_grad():
                net.head.weight[:, silent] = 0.0

    mine = optimizers(net)
    run(net, mine, data[:3], [])
    dense = copy.deepcopy(net)
    twins = optimizers(dense)
    for twin, o in zip(twins, mine, strict=True):
        twin.load_state_dict(copy.deepcopy(o.state_dict()))
    with torch.no_grad():
        dense.head.weight[:, [2, 3]] = 0.0
    run(dense, twins, data[3:], [2, 3])
    carrier = Carrier.of(mine, net, plan)
    apply(net, plan)
    carrier.commit()
    run(net, mine, data[3:], [])
    torch.testing.assert_close(net.table.weight, dense.table.weight[:, keep], rtol=0, atol=1e-12)
    torch.testing.assert_close(net.head.weight, dense.head.weight[:, keep], rtol=0, atol=1e-12)


def test_lbfgs_starts_again():
    net, data = Net().double(), batches(1)
    optimizer = optim.LBFGS(net.parameters(), lr=0.1, max_iter=4, history_size=3)
    train(net, optimizer, data)
    prune(net, optimizer)
    assert not optimizer.state
    train(net, optimizer, data * 2)
    assert optimizer.state


def test_lbfgs_over_other_parameters_goes_on():
    net, other = Net(), nn.Parameter(torch.ones(2))
    optimizer = optim.LBFGS([other])
    optimizer.step(lambda: (other**2).sum().backward() or (other**2).sum())
    prune(net, optimizer)
    assert optimizer.state[other]["n_iter"] >= 1


def test_groups_hyperparameters_and_order_stay():
    net = Net().double()
    optimizer = optim.AdamW(
        [{"params": net.conv1.parameters(), "lr": 0.3}, {"params": net.head.parameters()}], lr=0.1
    )
    scheduler = optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    train(net, optimizer, batches(1))
    scheduler.step()
    before = [
        ({k: v for k, v in g.items() if k != "params"}, [id(p) for p in g["params"]])
        for g in optimizer.param_groups
    ]
    prune(net, optimizer)
    assert before == [
        ({k: v for k, v in g.items() if k != "params"}, [id(p) for p in g["params"]])
        for g in optimizer.param_groups
    ]
    assert [g["lr"] for g in optimizer.param_groups] == [0.15, 0.05]
    clone = optim.AdamW([{"params": net.conv1.parameters()}, {"params": net.head.parameters()}])
    clone.load_state_dict(optimizer.state_dict())


def test_wrappers_and_several_optimizers_are_looked_through():
    class Wrapper:
        def __init__(self, optimizer):
            self._optimizer = optimizer

    net = Net().double()
    first = optim.SGD(net.conv1.parameters(), lr=0.1, momentum=0.9)
    second = optim.Adam(net.conv2.parameters())
    for o in (first, second):
        train(net, o, batches(1))
    prune(net, (Wrapper(first), second))
    assert first.state[net.conv1.weight]["momentum_buffer"].shape == (3, 2, 3, 3)
    assert second.state[net.conv2.weight]["exp_avg"].shape == (3, 3, 3, 3)


def test_parameters_without_state_and_of_other_models_are_left_alone():
    net, other = Net().double(), nn.Linear(2, 2).double()
    optimizer = optim.Adam([*net.parameters(), *other.parameters()])
    other(torch.ones(1, 2, dtype=torch.float64)).sum().backward()
    optimizer.step()
    before = optimizer.state[other.weight]["exp_avg"]
    carrier = Carrier.of(optimizer, net, PLAN)
    assert set(optimizer.state) == {other.weight, other.bias}
    apply(net, PLAN)
    carrier.commit()
    assert set(optimizer.state) == {other.weight, other.bias}
    assert optimizer.state[other.weight]["exp_avg"] is before
    train(net, optimizer, batches(1))


@pytest.mark.parametrize("names", ["ab", "a", "b"])
def test_tied_parameters_are_carried_once(names):
    """By whichever of its names the plan calls the tensor."""
    model = nn.ModuleDict({"a": nn.Embedding(5, 4), "b": nn.Linear(4, 5, bias=False)})
    model["b"].weight = model["a"].weight
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model["b"](model["a"](torch.tensor([1, 2]))).square().sum().backward()
    optimizer.step()
    expected = optimizer.state[model["a"].weight]["momentum_buffer"][:, [3, 1]].clone()
    plan = Plan(tuple(Cut(f"{name}.weight", 1, 4, (3, 1)) for name in names))
    carrier = Carrier.of(optimizer, model, plan)
    apply(model, plan)
    carrier.commit()
    assert torch.equal(optimizer.state[model["a"].weight]["momentum_buffer"], expected)


def test_rows_of_grouped_weights_are_carried():
    layer = nn.Conv1d(6, 4, 1, groups=2, bias=False)
    optimizer = optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer(torch.randn(2, 6, 3)).square().sum().backward()
    optimizer.step()
    old = optimizer.state[layer.weight]["momentum_buffer"].clone()
    plan = Plan((Cut("weight", 1, 3, (0, 2, 1, 0), 2),))
    carrier = Carrier.of(optimizer, layer, plan)
    apply(layer, plan)
    carrier.commit()
    expected = torch.cat([old[:2][:, [0, 2]], old[2:][:, [1, 0]]])
    assert torch.equal(optimizer.state[layer.weight]["momentum_buffer"], expected)


def test_channels_last_state_stays_channels_last():
    net = Net().double().to(memory_format=torch.channels_last)
    optimizer = optim.Adam(net.parameters(), fused=True)
    train(net, optimizer, batches(1))
    prune(net, optimizer)
    assert optimizer.state[net.conv2.weight]["exp_avg"].stride() == net.conv2.weight.stride()
    assert optimizer.state[net.conv2.weight]["exp_avg"].is_contiguous(memory_format=torch.channels_last)


class RowNorms(optim.SGD):
    """Keeps one number per row, in a tensor of fewer dimensions than the parameter's."""

    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.dim() > 1:
                    rows = p.grad.flatten(1).square().sum(1)
                    self.state[p]["rows"] = self.state[p].get("rows", torch.zeros_like(rows)) + rows
        return loss


def test_unknown_state_starts_again_with_one_warning():
    net = Net().double()
    optimizer = RowNorms(net.parameters(), lr=0.1, momentum=0.9)
    train(net, optimizer, batches(1))
    with pytest.warns(UserWarning, match=r"RowNorms keeps 'rows' \(shape \(5,\)\)") as record:
        carrier = Carrier.of(optimizer, net, PLAN)
    assert len(record) == 1
    apply(net, PLAN)
    carrier.commit()
    assert net.conv1.weight not in optimizer.state
    assert optimizer.state[net.bn1.bias]["momentum_buffer"].shape == (3,)
    train(net, optimizer, batches(1))
    assert optimizer.state[net.conv1.weight]["rows"].shape == (3,)


def test_unknown_objects_in_a_state_start_again():
    net = Net().double()
    optimizer = optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    train(net, optimizer, batches(1))
    optimizer.state[net.conv1.weight]["history"] = [torch.zeros(5)]
    with pytest.warns(UserWarning, match=r"SGD keeps 'history' \(list\)"):
        prune(net, optimizer)
    assert net.conv1.weight not in optimizer.state


def test_adagrad_is_never_left_without_its_sum():
    net = Net().double()
    optimizer = optim.Adagrad(net.parameters(), lr=0.1, initial_accumulator_value=0.5)
    train(net, optimizer, batches(1))
    optimizer.state[net.conv1.weight]["odd"] = torch.zeros(7)
    with pytest.warns(UserWarning, match="Adagrad keeps 'odd'"):
        prune(net, optimizer)
    state = optimizer.state[net.conv1.weight]
    assert state["step"] == 0
    assert torch.equal(state["sum"], torch.full((3, 2, 3, 3), 0.5, dtype=torch.float64))
    train(net, optimizer, batches(1))


def test_a_registered_slicer_carries_the_unknown_state():
    class Registered(RowNorms):
        pass

    def slicer(state, shape, cuts):
        assert len(shape) == state["momentum_buffer"].dim()
        rows = [cut for cut in cuts if cut.dim == 0]
        new = {**state, "momentum_buffer": cut_tensor(state["momentum_buffer"], cuts)}
        return new | ({"rows": cut_tensor(state["rows"], rows)} if "rows" in state and rows else {})

    register_state_slicer(Registered, slicer)
    net = Net().double()
    optimizer = Registered(net.parameters(), lr=0.1, momentum=0.9)
    train(net, optimizer, batches(1))
    expected = optimizer.state[net.conv1.weight]["rows"][list(KEEP["1"])]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune(net, optimizer)
    assert torch.equal(optimizer.state[net.conv1.weight]["rows"], expected)
    train(net, optimizer, batches(1))


def test_nothing_changes_before_commit():
    net = Net().double()
    optimizer = optim.Adam(net.parameters())
    train(net, optimizer, batches(1))
    before = {p: {k: id(v) for k, v in s.items()} for p, s in optimizer.state.items()}
    Carrier.of(optimizer, net, PLAN)
    assert before == {p: {k: id(v) for k, v in s.items()} for p, s in optimizer.state.items()}


def test_a_commit_without_the_cut_is_refused_and_changes_nothing():
    net = Net().double()
    optimizer = optim.Adam(net.parameters(), fused=True)
    train(net, optimizer, batches(1))
    carrier = Carrier.of(optimizer, net, PLAN)
    before = {p: {k: id(v) for k, v in s.items()} for p, s in optimizer.state.items()}
    with pytest.raises(
        PruneError, match=r"Adam: a parameter was to have shape \(3, 2, 3, 3\) and has \(5, 2, 3, 3\)"
    ):
        carrier.commit()
    assert before == {p: {k: id(v) for k, v in s.items()} for p, s in optimizer.state.items()}


def test_a_state_of_a_wrong_shape_is_an_error_before_anything_changes():
    net = Net().double()
    optimizer = optim.SGD(net.parameters(), lr=0.1, momentum=0.9, fused=True)
    train(net, optimizer, batches(1))
    carrier = Carrier.of(optimizer, net, PLAN)
    stale = next(c for c in carrier._carried if c.parameter is net.head.weight)
    stale.state["momentum_buffer"] = torch.zeros(3, 5)
    apply(net, PLAN)
    with pytest.raises(
        PruneError, match=r"SGD: 'momentum_buffer' has shape \(3, 5\), its parameter has \(3, 3\)"
    ):
        carrier.commit()
    assert optimizer.state[net.conv1.weight]["momentum_buffer"].shape == (5, 2, 3, 3)


def test_sharded_optimizers_are_refused():
    class ZeroRedundancyOptimizer(optim.SGD):
        pass

    net = Net()
    with pytest.raises(StrategyError, match="shards its state"):
        Carrier.of(ZeroRedundancyOptimizer(net.parameters(), lr=0.1), net, PLAN)
