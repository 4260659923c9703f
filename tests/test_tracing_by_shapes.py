"""A trace by shapes says what a trace with values says; where values are asked for, they are there."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from nets import Case, case_ids, draw
from test_exact import CASES
from torch import Tensor, nn

from lightning_prune import GroupNormPruner
from lightning_prune.graph.grouping import build_graph
from lightning_prune.surgery.numbers import Length
from lightning_prune.tracing.borrowing import Memory, ways_to_trace
from lightning_prune.tracing.meta import FORMS, Shapes, run_without_floats
from lightning_prune.tracing.trace import trace
from lightning_prune.tracing.tracer import Tracer


def texts(tracer: Tracer, values: Any) -> list[str]:
    """Everything with its reasons in words, for they are numbered as they come."""
    words = [re.sub(r"why=(\d+)", lambda m: tracer.ledger.explain(int(m[1])), repr(v)) for v in values]
    return [re.sub(r"test_tracing_by_shapes.py:\d+", "here", text) for text in words]


def assert_same_trace(a: Tracer, b: Tracer, *, same_answers: bool = True) -> None:
    assert a.numbers.equals(b.numbers) or not same_answers
    assert (a.attributes, a.work, a.touched, a.whole) == (b.attributes, b.work, b.touched, b.whole)
    assert [(u.op, u.site.module) for u in a.unknown] == [(u.op, u.site.module) for u in b.unknown]
    for name in ("equations", "left"):
        assert texts(a, getattr(a, name)) == texts(b, getattr(b, name)), name
    assert texts(a, a.conditions.values()) == texts(b, b.conditions.values())
    graphs = [build_graph(t, tuple(t.leaves), frozenset(t.buffers)) for t in (a, b)]
    assert np.array_equal(graphs[0].classes.of, graphs[1].classes.of)
    assert [(g.name, g.n_units) for g in graphs[0].groups] == [(g.name, g.n_units) for g in graphs[1].groups]


@pytest.mark.parametrize("case", CASES, ids=case_ids(CASES))
def test_shapes_say_what_values_say(case: Case) -> None:
    model = case.build().eval()
    by_shapes = trace(model, case.inputs())
    assert by_shapes.borrowed.memory is Memory.SHAPES
    with_values = trace(model, case.inputs(), by_shapes=False)
    assert with_values.borrowed.memory is not Memory.SHAPES
    assert_same_trace(by_shapes, with_values)


class Asks(nn.Module):
    """Decides by something that is done to what its first layer gives."""

    def __init__(self, question: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second, self.question = nn.Linear(4, 6), nn.Linear(6, 2), question

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if self.question(y):
            y = y[:, :3].repeat(1, 2)
        out: Tensor = self.second(y)
        return out


def in_secret(y: Tensor) -> bool:
    with suppress(Exception):
        return bool(y.sum() > 1e9)
    return True  # as a model might that goes on without


NEEDS_VALUES: dict[str, Callable[[Tensor], Any]] = {
    "a comparison": lambda y: bool((y > 1e9).any()),
    "a number": lambda y: y.sum().item() > 1e9,
    "a list": lambda y: y.detach().tolist()[0][0] > 1e9,
    "an array": lambda y: y.detach().numpy()[0, 0] > 1e9,
    "how many": lambda y: len(torch.nonzero(y > 1e9)),
    "a mask": lambda y: len(y[y > 1e9]),
    "the memory": lambda y: y.data_ptr() == 0,
    "in secret": in_secret,
}
DOES_NOT: dict[str, Callable[[Tensor], Any]] = {
    "where it is": lambda y: y.device.type != "cpu",
    "whether it has values": lambda y: y.is_meta or not y.is_cpu or y.is_cuda,
    "a number of its device": lambda y: y.get_device() != -1 or torch.get_device(y) != -1,
    "what type it has": lambda y: y.dtype != torch.float32,
    "how long it is": lambda y: len(y) != 2,
}


@pytest.mark.parametrize("question", [*NEEDS_VALUES, *DOES_NOT])
def test_the_forward_goes_the_way_that_it_goes_with_values(question: str) -> None:
    model = Asks((NEEDS_VALUES | DOES_NOT)[question]).eval()
    tracer = trace(model, draw(2, 4))
    assert (tracer.borrowed.memory is Memory.SHAPES) == (question in DOES_NOT)
    again = trace(model, draw(2, 4), by_shapes=False)
    assert_same_trace(tracer, again, same_answers=question != "the memory")
    if question in DOES_NOT:
        assert [g.n_units for g in GroupNormPruner(model, draw(2, 4)).groups()] == [6]  # none if repeated


@pytest.mark.parametrize("question", ["a number", "where it is"])
def test_a_cut_is_tried_in_the_way_in_which_the_model_could_be_traced(
    question: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways: list[bool] = []

    def watched(model: nn.Module, *, by_shapes: bool) -> tuple[Memory, ...]:
        ways.append(by_shapes)
        return ways_to_trace(model, by_shapes=by_shapes)

    monkeypatch.setattr(import_module("lightning_prune.tracing.trace"), "ways_to_trace", watched)
    model = Asks((NEEDS_VALUES | DOES_NOT)[question]).eval()
    assert GroupNormPruner(model, draw(2, 4)).step()
    assert model(draw(2, 4)).shape == (2, 2)
    assert ways == [True, question in DOES_NOT]


def test_shapes_do_for_floats_of_one_device_alone() -> None:
    whole = nn.Linear(2, 2)
    whole.counts = nn.Parameter(torch.arange(3), requires_grad=False)
    apart = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    for model in (whole, apart, nn.Linear(2, 2, device="meta"), nn.ReLU()):
        assert ways_to_trace(model, by_shapes=True) == (Memory.SHARED, Memory.OWN)
    assert ways_to_trace(nn.Linear(2, 2), by_shapes=True) == tuple(Memory)
    assert ways_to_trace(nn.Linear(2, 2), by_shapes=False) == (Memory.SHARED, Memory.OWN)


# -- results that are found once -------------------------------------------------------------------

ATEN = torch.ops.aten


def shape(*sizes: int, **options: Any) -> Tensor:
    return torch.empty(*sizes, device="meta", **options)


def forms(value: Any) -> list[tuple[Any, ...]]:
    tensors = [value] if isinstance(value, Tensor) else list(value)
    return [(t.shape, t.stride(), t.dtype, t.is_meta) for t in tensors]


CALLS: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
    "whole by whole": (ATEN.mul.Scalar, (shape(3, dtype=torch.int64), 2), {}),
    "whole by float": (ATEN.mul.Scalar, (shape(3, dtype=torch.int64), 2.0), {}),
    "whole by truth": (ATEN.add.Scalar, (shape(3, dtype=torch.bool), True), {}),
    "truth by whole": (ATEN.add.Scalar, (shape(3, dtype=torch.bool), 1), {}),
    "a dimension": (ATEN.mean.dim, (shape(3, 4), [0]), {}),
    "another": (ATEN.mean.dim, (shape(3, 4), [1]), {}),
    "kept": (ATEN.mean.dim, (shape(3, 4), [1], True), {}),
    "by keyword": (ATEN.sum.dim_IntList, (shape(3, 4), [1]), {"dtype": torch.float64}),
    "without": (ATEN.sum.dim_IntList, (shape(3, 4), [1]), {}),
    "laid out otherwise": (ATEN.relu.default, (shape(4, 3).t(),), {}),
    "several": (ATEN.var_mean.correction, (shape(3, 4), [1]), {}),
    "with values beside": (ATEN.add.Tensor, (shape(3, 4), torch.ones(4)), {}),
    "with others beside": (ATEN.add.Tensor, (shape(3, 4), torch.ones(2, 3, 4)), {}),
    "a table": (ATEN.embedding.default, (shape(3, 4), torch.tensor([[1, 2]])), {}),
    "two pass": (ATEN.index.Tensor, (shape(3, 4), [torch.tensor([True, True, False])]), {}),
    "one passes": (ATEN.index.Tensor, (shape(3, 4), [torch.tensor([True, False, False])]), {}),
    "a view": (ATEN.view.default, (shape(3, 4), [12]), {}),
    "truths like it": (ATEN.ones_like.default, (shape(2, dtype=torch.bool),), {}),
    "a window": (
        ATEN.convolution.default,
        (shape(1, 3, 8, 8), shape(5, 3, 3, 3), None, [2, 2], [1, 1], [1, 1], False, [0, 0], 1), {},
    ),
}  # fmt: skip


def test_a_result_that_is_known_is_what_it_would_be() -> None:
    shapes = Shapes()
    for _ in range(2):  # found, then known
        for name, (func, args, kwargs) in CALLS.items():
            want = forms(run_without_floats(func, args, kwargs))
            assert forms(shapes(func, args, kwargs)) == want, name


def test_what_has_values_is_not_taken_for_a_shape_of_the_same_form() -> None:
    shapes, known = Shapes(), torch.zeros(2, dtype=torch.int64)
    assert shapes(ATEN.add.Scalar, (known.to("meta"), 1), {}).is_meta
    assert shapes(ATEN.add.Scalar, (known, 1), {}).tolist() == [1, 1]
    assert shapes(ATEN.add.Scalar, (known + 1, 1), {}).tolist() == [2, 2]


def test_a_result_has_memory_of_its_own() -> None:
    shapes, x = Shapes(), shape(3)
    one, other = shapes(ATEN.relu.default, (x,), {}), shapes(ATEN.relu.default, (x,), {})
    assert one is not other is not x
    assert one.untyped_storage()._cdata != other.untyped_storage()._cdata


def test_what_writes_into_the_first_of_several_tensors_gives_it_back() -> None:
    shapes = Shapes()
    for x in (shape(3, 4), shape(3, 4)):  # found, then known
        assert shapes(ATEN.add_.Tensor, (x, shape(4)), {}) is x
        assert x.shape == (3, 4)
    with pytest.raises(RuntimeError):
        shapes(ATEN.add_.Tensor, (shape(3, 4), shape(5)), {})


def test_a_function_is_run_once_for_every_form_of_its_arguments() -> None:
    shapes, runs = Shapes(), []

    def linear(*args: Any, **kwargs: Any) -> Tensor:
        runs.append(args)
        return nn.functional.linear(*args, **kwargs)

    first, again, wider, bare = (
        shapes.whole(linear, (shape(2, 3), shape(n, 3)), {"bias": bias})
        for n, bias in ((4, shape(4)), (4, shape(4)), (5, shape(5)), (4, None))
    )
    assert len(runs) == 3
    assert [tuple(t.shape) for t in (first, again, wider, bare)] == [(2, 4), (2, 4), (2, 5), (2, 4)]
    assert first.untyped_storage()._cdata != again.untyped_storage()._cdata


def test_sizes_count_as_the_numbers_that_they_are() -> None:
    shapes, norm = Shapes(), nn.functional.layer_norm
    for size in (3, Length(3)):
        assert shapes.whole(norm, (shape(2, 3), (size,)), {}).shape == (2, 3)
    with pytest.raises(RuntimeError):
        shapes.whole(norm, (shape(2, 3), (Length(2),)), {})


def test_a_result_that_looks_at_an_argument_is_not_known() -> None:
    shapes = Shapes()
    for x in (shape(2, 3), shape(2, 3)):
        assert shapes.whole(torch.t, (x,), {}).untyped_storage()._cdata == x.untyped_storage()._cdata


def test_where_gradients_are_on_every_result_has_a_history() -> None:
    shapes, weight = Shapes(), nn.Parameter(shape(3, 3))
    with torch.no_grad():
        shapes.whole(nn.functional.linear, (shape(2, 3), weight), {})
    with torch.enable_grad():
        for _ in range(2):
            assert shapes.whole(nn.functional.linear, (shape(2, 3), weight), {}).requires_grad


def test_gradients_that_nobody_asked_for_are_none() -> None:
    shapes, x, weight = Shapes(), shape(1, 3, 4, 4), shape(2, 3, 1, 1)
    rest = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, False, False])
    for _ in range(2):
        found = shapes(ATEN.convolution_backward.default, (shape(1, 2, 4, 4), x, weight, [0], *rest), {})
        assert (found[0].shape, *found[1:]) == (x.shape, None, None)


class Strided(nn.Module):
    """Calls a convolution with NumPy's integers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        two, one = np.int64(2), np.int64(1)
        y = nn.functional.conv2d(x, self.first.weight, None, stride=two, groups=one)  # type: ignore[call-overload]
        return self.last(y)  # type: ignore[no-any-return]


def test_whole_numbers_of_numpy_are_strides_and_groups() -> None:
    tracer = trace(Strided(), torch.zeros(1, 3, 16, 16))
    graph = build_graph(tracer, tuple(tracer.leaves), frozenset(tracer.buffers))
    assert [(g.name, g.n_units) for g in graph.groups] == [("first.weight:0", 8)]


@pytest.mark.parametrize(
    "spread_out",
    [
        lambda x, n: nn.functional.pixel_unshuffle(nn.functional.pixel_shuffle(x, n), n),
        torch.channel_shuffle,
        lambda x, n: torch.repeat_interleave(x, n, dim=2),
    ],
    ids=["pixels", "channels", "repeats"],
)
def test_whole_numbers_of_numpy_are_factors(spread_out: Callable[..., Tensor]) -> None:
    class Factors(nn.Module):
        def __init__(self, number: Any) -> None:
            super().__init__()
            self.first, self.last, self.number = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), number

        def forward(self, x: Tensor) -> Tensor:
            return self.last(spread_out(self.first(x), self.number))  # type: ignore[no-any-return]

    found = []
    for number in (2, np.int64(2)):
        tracer = trace(Factors(number), torch.zeros(1, 3, 16, 16))
        graph = build_graph(tracer, tuple(tracer.leaves), frozenset(tracer.buffers))
        found.append([(g.name, g.n_units) for g in graph.groups])
    assert found[0] == found[1] != []


def test_a_function_of_values_is_run_every_time() -> None:
    shapes = Shapes()
    assert [shapes.whole(torch.relu, (torch.full((2,), v),), {}).tolist() for v in (1.0, 2.0)] == [
        [1, 1],
        [2, 2],
    ]


def test_what_writes_into_one_tensor_gives_it_back() -> None:
    shapes, x = Shapes(), shape(3, 4)
    for func, args in [
        (ATEN.relu_.default, ()),
        (ATEN.hardtanh_.default, (0.0, 6.0)),
        (ATEN.add_.Scalar, (1,)),
    ]:
        assert shapes(func, (x, *args), {}) is x
        assert x.shape == (3, 4)
    assert shapes(ATEN.t_.default, (x,), {}).shape == x.shape == (4, 3)
    assert shapes(ATEN.squeeze_.default, (shape(3, 1),), {}).shape == (3,)
    values = torch.tensor([-1.0, 2.0])
    assert shapes(ATEN.relu_.default, (values,), {}) is not None
    assert values.tolist() == [0.0, 2.0]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "x",
    [shape(2, 3), shape(2, 3, 5), shape(2, 3, 4, 5), shape(2, 3, 4, 5, dtype=torch.bfloat16),
     shape(2, 3, 4, 5).to(memory_format=torch.channels_last)],
    ids=["rows", "1d", "2d", "bf16", "channels last"],
)  # fmt: skip
def test_forms_by_hand_are_those_of_torch(x: Tensor, training: bool) -> None:
    assert set(FORMS) == {"native_batch_norm"}
    rest = [shape(3, dtype=x.dtype) for _ in range(4)]
    args = (x, *rest, training, 0.1, 1e-5)
    real = [torch.ones_like(t, device="cpu") for t in (x, *rest)]
    got, want = FORMS["native_batch_norm"](args, {}), torch.native_batch_norm(*real, training, 0.1, 1e-5)
    assert (got[0].shape, got[0].stride(), got[0].dtype) == (want[0].shape, want[0].stride(), want[0].dtype)
    assert [t.shape for t in got[1:]] == [t.shape for t in want[1:]]
