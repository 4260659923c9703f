"""Recurrent layers: the gates of a hidden unit go together, through layers and directions, and exactly."""

from __future__ import annotations

import copy
import itertools
import warnings
from typing import Any

import pytest
import torch
from nets import Net, draw, randomise
from oracle import assert_exact
from torch import Tensor, nn

from lightning_prune import GroupNormPruner, Plan, prepare
from lightning_prune.surgery.optimizers import Carrier
from lightning_prune.surgery.structure import shape_stored, shape_the_rest

GATES: dict[type[nn.RNNBase], int] = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}
SHAPES = list(itertools.product(GATES, [1, 2], [False, True], [True, False]))
NAMES = [
    f"{k.__name__} {n} layer(s), {1 + b} direction(s), batch {'first' if f else 'second'}"
    for k, n, b, f in SHAPES
]
X = draw(3, 4, 5)


def build(kind: type[nn.RNNBase], layers: int, both: bool, batch_first: bool, **options: Any) -> nn.Module:
    """Linear 5 -> 6, recurrent 6 -> 8, linear -> 3 on every step."""
    rnn = kind(6, 8, num_layers=layers, bidirectional=both, batch_first=batch_first, **options)
    return randomise(
        Net(
            lambda m, x: m.fc(m.rnn(torch.relu(m.pre(x)))[0]),
            pre=nn.Linear(5, 6), rnn=rnn, fc=nn.Linear(16 if both else 8, 3),
        ),
        0,
    )  # fmt: skip


def prune(model: nn.Module, inputs: Any, **options: Any) -> Plan:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return GroupNormPruner(model, inputs, **options).step()


@pytest.mark.parametrize(("kind", "layers", "both", "batch_first"), SHAPES, ids=NAMES)
def test_half_of_every_hidden_state_goes_exactly(
    kind: type[nn.RNNBase], layers: int, both: bool, batch_first: bool
) -> None:
    model = build(kind, layers, both, batch_first)
    dense = copy.deepcopy(model)
    plan = prune(model, X)
    rnn, width = model.rnn, 8 if both else 4
    assert (model.pre.out_features, rnn.input_size, rnn.hidden_size) == (3, 3, 4)
    assert model.fc.in_features == width
    rows = GATES[kind] * 4
    for layer, suffix in itertools.product(range(layers), ["", "_reverse"][: 1 + both]):
        at = f"l{layer}{suffix}"
        assert getattr(rnn, f"weight_ih_{at}").shape == (rows, width if layer else 3)
        assert getattr(rnn, f"weight_hh_{at}").shape == (rows, 4)
        assert getattr(rnn, f"bias_ih_{at}").shape == getattr(rnn, f"bias_hh_{at}").shape == (rows,)
    assert_exact(dense, model, plan, X)


@pytest.mark.parametrize("kind", GATES)
def test_every_gate_keeps_the_same_hidden_units(kind: type[nn.RNNBase]) -> None:
    plan = prune(build(kind, 1, False, True), X)
    keep = {(c.tensor, c.dim): c.keep for c in plan.cuts}
    units = keep["rnn.weight_hh_l0", 1]
    rows = tuple(8 * gate + u for gate in range(GATES[kind]) for u in units)
    for tensor in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
        assert keep[f"rnn.{tensor}", 0] == rows
    assert keep["fc.weight", 1] == units
    assert keep["rnn.weight_ih_l0", 1] == keep["pre.weight", 0]


@pytest.mark.parametrize("kind", GATES)
def test_without_biases(kind: type[nn.RNNBase]) -> None:
    model = build(kind, 2, True, True, bias=False)
    dense = copy.deepcopy(model)
    plan = prune(model, X, pruning_ratio=0.25)
    assert (model.rnn.hidden_size, model.fc.in_features) == (6, 12)
    assert_exact(dense, model, plan, X)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_both_nonlinearities(nonlinearity: str) -> None:
    model = build(nn.RNN, 1, False, True, nonlinearity=nonlinearity)
    dense = copy.deepcopy(model)
    plan = prune(model, X)
    assert model.rnn.hidden_size == 4
    assert_exact(dense, model, plan, X)


def last_state(m: Net, x: Tensor) -> Tensor:
    """Classify by the final hidden state of the last layer."""
    state = m.rnn(m.pre(x))[1]
    state = state[0] if isinstance(state, tuple) else state
    out: Tensor = m.fc(state[-1])
    return out


@pytest.mark.parametrize("kind", GATES)
def test_the_final_state_carries_the_hidden_units(kind: type[nn.RNNBase]) -> None:
    model = randomise(
        Net(last_state, pre=nn.Linear(5, 6), rnn=kind(6, 8, batch_first=True), fc=nn.Linear(8, 3)), 0
    )
    dense = copy.deepcopy(model)
    plan = prune(model, X)
    assert (model.rnn.hidden_size, model.fc.in_features) == (4, 4)
    assert_exact(dense, model, plan, X)


@pytest.mark.parametrize("kind", [nn.GRU, nn.RNN])
def test_an_initial_state_of_the_models_own_is_cut_along(kind: type[nn.RNNBase]) -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        start = m.start.expand(1, x.shape[0], -1).contiguous()
        out: Tensor = m.fc(m.rnn(x, start)[0])
        return out

    start = nn.Parameter(torch.zeros(1, 1, 8))
    model = randomise(Net(run, start=start, rnn=kind(5, 8, batch_first=True), fc=nn.Linear(8, 3)), 0)
    dense = copy.deepcopy(model)
    plan = prune(model, X)
    assert (tuple(model.start.shape), model.rnn.hidden_size) == ((1, 1, 4), 4)
    assert_exact(dense, model, plan, X)


@pytest.mark.parametrize("kind", GATES)
def test_packed_sequences(kind: type[nn.RNNBase]) -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(m.pre(x), [4, 3, 1], batch_first=True)
        padded = nn.utils.rnn.pad_packed_sequence(m.rnn(packed)[0], batch_first=True)[0]
        out: Tensor = m.fc(padded)
        return out

    model = randomise(Net(run, pre=nn.Linear(5, 6), rnn=kind(6, 8, batch_first=True), fc=nn.Linear(8, 3)), 0)
    dense = copy.deepcopy(model)
    plan = prune(model, X)
    assert model.rnn.hidden_size == model.fc.in_features
    assert_exact(dense, model, plan, X)


def test_a_projection_keeps_the_layer_whole() -> None:
    model = randomise(
        Net(
            lambda m, x: m.fc(m.rnn(m.pre(x))[0]),
            pre=nn.Linear(5, 6), rnn=nn.LSTM(6, 8, proj_size=4, batch_first=True), fc=nn.Linear(4, 3),
        ),
        0,
    )  # fmt: skip
    dense = copy.deepcopy(model)
    plan = prune(model, X)
    assert (model.pre.out_features, model.rnn.hidden_size, model.rnn.proj_size) == (6, 8, 4)
    assert_exact(dense, model, plan, X)


@pytest.mark.parametrize("kind", GATES)
def test_a_second_cut_is_exact_too(kind: type[nn.RNNBase]) -> None:
    model = build(kind, 2, True, True)
    dense = copy.deepcopy(model)
    pruner = GroupNormPruner(model, X, iterative_steps=2)
    pruner.step()
    assert model.rnn.hidden_size == 6
    pruner.step()
    assert model.rnn.hidden_size == 4
    assert_exact(dense, model, pruner.plan, X)


# cuDNN wants the weights of a layer side by side in memory


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a CPU do what a GPU does when it is asked to; there it reads the sizes of the layer."""

    def pack(self: nn.RNNBase) -> None:
        weights = self._flat_weights
        assert weights[0].shape == (GATES[type(self)] * self.hidden_size, self.input_size)
        piece = torch.cat([w.detach().flatten() for w in weights])
        for weight, part in zip(weights, piece.split([w.numel() for w in weights]), strict=True):
            weight.data = part.view(weight.shape)

    monkeypatch.setattr(nn.RNNBase, "flatten_parameters", pack)


def pieces(layer: nn.RNNBase) -> set[int]:
    return {w.untyped_storage().data_ptr() for w in layer._flat_weights}


@pytest.mark.usefixtures("cudnn")
@pytest.mark.parametrize("kind", GATES)
def test_a_layer_is_in_one_piece_after_a_cut_and_when_it_grows_back(kind: type[nn.RNNBase]) -> None:
    model = prepare(build(kind, 2, True, True))
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole = pieces(model.rnn)
    prune(model, X)
    assert model.rnn.hidden_size == 4
    assert len(pieces(model.rnn)) == 1
    assert pieces(model.rnn) != whole
    model.load_state_dict(dense)
    assert model.rnn.hidden_size == 8
    assert len(pieces(model.rnn)) == 1


@pytest.mark.usefixtures("cudnn")
def test_a_layer_whose_input_alone_was_cut_goes_back_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its other weights have moved, too."""

    def interrupt(self: Carrier) -> None:
        assert model.rnn.input_size == 3
        assert pieces(model.rnn) != whole
        raise KeyboardInterrupt

    model = build(nn.LSTM, 1, False, True)
    whole, before = pieces(model.rnn), copy.deepcopy(model.state_dict())
    monkeypatch.setattr(Carrier, "commit", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prune(model, X, ignored_layers=["rnn"])
    assert len(whole) == 1
    assert pieces(model.rnn) == whole
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.usefixtures("cudnn")
def test_a_layer_that_a_library_loads_is_in_one_piece() -> None:
    model, other = build(nn.LSTM, 2, False, True), build(nn.LSTM, 2, False, True)
    plan = prune(model, X)
    shape_stored(other, plan)
    other.load_state_dict(model.state_dict())
    shape_the_rest(other, plan)
    assert len(pieces(other.rnn)) == 1
    assert torch.equal(model(X), other(X))
