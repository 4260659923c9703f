"""The trace runs on a copy that borrows the model's parameters, and never writes into them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.graph.analysis import analyse
from lightning_prune.tracing.borrowing import Memory, copy_for_tracing
from lightning_prune.tracing.trace import trace
from lightning_prune.tracing.tracer import Tracer


class Writer(nn.Module):
    """Does something to its own weight before it uses it."""

    def __init__(self, write: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.fc, self.out, self.write = nn.Linear(4, 6), nn.Linear(6, 2), write

    def forward(self, x: Tensor) -> Tensor:
        self.write(self.fc.weight)
        return self.out(self.fc(x).relu())


def in_place(weight: Tensor) -> None:
    weight.mul_(0.5)


def through_a_view(weight: Tensor) -> None:
    weight.detach()[1:].zero_()


def through_out(weight: Tensor) -> None:
    torch.add(weight, 1, out=weight.data)


def of_a_list(weight: Tensor) -> None:
    torch._foreach_mul_([weight.data], 2.0)


def by_numpy(weight: Tensor) -> None:
    weight.detach().numpy()[:] = 0


def unnoticed(weight: Tensor) -> None:
    with suppress(Exception):  # as a model might that has another way
        weight.mul_(0.5)


def made_another_error(weight: Tensor) -> None:
    try:
        weight.mul_(0.5)
    except Exception as error:
        raise RuntimeError("cannot normalise") from error


@pytest.mark.parametrize(
    ("write", "removable"),
    [
        (in_place, [6]),
        (through_a_view, [5]),  # the first row is none of the view's
        (through_out, [6]),
        (of_a_list, []),  # an operation without a rule
        (by_numpy, []),  # whoever writes there is not seen
        (unnoticed, [6]),
    ],
)
def test_a_forward_that_writes_into_its_weights_runs_on_a_copy_of_them(
    write: Callable[[Tensor], object], removable: list[int]
) -> None:
    model = Writer(write).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    groups = analyse(model, torch.ones(2, 4)).groups
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert [g.n_units for g in groups] == removable


def test_the_refusal_of_a_write_is_not_taken_for_a_failure_of_the_model() -> None:
    groups = analyse(Writer(made_another_error), torch.ones(2, 4)).groups
    assert [g.n_units for g in groups] == [6]


def test_a_forward_that_only_reads_runs_on_the_memory_of_the_model() -> None:
    model, seen = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)), []

    def look(_: Tracer, twin: nn.Module) -> None:
        seen.append(dict(twin.state_dict(keep_vars=True)))

    trace(model, torch.ones(2, 4), prepare=look, by_shapes=False)
    assert len(seen) == 1
    own = model.state_dict(keep_vars=True)
    for name, tensor in seen[0].items():
        assert tensor is not own[name]
        assert (tensor.data_ptr() == own[name].data_ptr()) == isinstance(own[name], nn.Parameter)
    assert all(not vars(tensor) for tensor in own.values())  # labels lie on the copy


def test_tied_parameters_and_dicts_are_tied_in_the_copy_too() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    model[0].memory = model[1].memory = {}  # type: ignore[assignment]
    twin = copy_for_tracing(model, Memory.SHARED)
    assert twin[0].weight is twin[1].weight  # type: ignore[index]
    assert twin[0].memory is twin[1].memory is not model[0].memory  # type: ignore[index]
    assert twin[0]._forward_hooks is not twin[1]._forward_hooks  # type: ignore[index]


class Odd(nn.Module):
    """Holds things in every way in which a copy may come apart."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(6.0))
        self.part = self.table[2:4]
        self.register_buffer("same", self.table.view(2, 3))
        self.fc = nn.Linear(6, 2)
        self.again, self.listed, self.sizes = self.fc, [self.fc, self], (3, [4])
        self.mark = torch.ones(2)
        self.mark.note = [self.fc]
        self.own = Own()
        self.hook = self.fc.register_forward_hook(print)


class Own(nn.Module):
    """Says itself how it is copied."""

    copies = 0

    def __deepcopy__(self, memo: dict[int, object]) -> Own:
        twin = memo[id(self)] = Own()
        twin.copies = self.copies + 1
        return twin


@pytest.mark.parametrize("memory", Memory)
def test_a_copy_holds_together_as_the_model_does(memory: Memory) -> None:
    model = Odd()
    twin = copy_for_tracing(model, memory)
    assert type(twin) is Odd
    assert twin is not model
    assert twin.again is twin.fc is twin.listed[0] is twin.mark.note[0]
    assert twin.fc is not model.fc
    assert twin.listed[1] is twin
    assert twin.sizes == (3, [4])
    assert twin.sizes[1] is not model.sizes[1]
    assert (twin.fc.weight.data_ptr() == model.fc.weight.data_ptr()) == (memory is Memory.SHARED)
    assert twin.fc.weight.is_meta == (memory is Memory.SHAPES)
    assert twin.own.copies == 1
    assert list(twin.fc._forward_hooks.values()) == [print]
    twin.table.fill_(7.0)
    assert twin.part.tolist() == [7.0, 7.0]
    assert twin.same.tolist() == [[7.0] * 3] * 2
    assert model.table.tolist() == [0, 1, 2, 3, 4, 5]
    assert not twin.training
    assert model.training
