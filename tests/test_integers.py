"""Integers that remember how they were computed: what stays an expression, what is reported as a value."""

from __future__ import annotations

import copy
import math
import operator
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from lightning_prune.tracing.integers import (
    Condition,
    Expr,
    Recorder,
    Size,
    evaluate,
    expression,
    invert,
    mentions,
)

A: Expr = ("attr", 0)
B: Expr = ("axis", 1)
SIX: Expr = ("const", 6)


class Log:
    """Two tracked integers and what they report."""

    def __init__(self, value: int = 12, other: int = 4) -> None:
        self.values: list[tuple[Expr, int]] = []
        self.equal: list[tuple[Expr, Expr, int]] = []
        self.answers: list[tuple[str, Expr, Expr, bool]] = []
        recorder = Recorder(
            lambda expr, value: self.values.append((expr, value)),
            lambda left, right, value: self.equal.append((left, right, value)),
            lambda *asked: self.answers.append(asked),
        )
        self.a = Size(value, A, recorder)
        self.b = Size(other, B, recorder)


EXACT: dict[str, tuple[Callable[[Size, Size], Any], int, Expr]] = {
    "a + 6": (lambda a, b: a + 6, 18, ("+", A, SIX)),
    "6 + a": (lambda a, b: 6 + a, 18, ("+", SIX, A)),
    "a - b": (lambda a, b: a - b, 8, ("-", A, B)),
    "6 - a": (lambda a, b: 6 - a, -6, ("-", SIX, A)),
    "a * b": (lambda a, b: a * b, 48, ("*", A, B)),
    "6 * a": (lambda a, b: 6 * a, 72, ("*", A, SIX)),
    "a // b": (lambda a, b: a // b, 3, ("//", A, B)),
    "6 // b": (lambda a, b: 6 // b, 1, ("//", SIX, B)),
    "a % 5": (lambda a, b: a % 5, 2, ("%", A, ("const", 5))),
    "a ** 2": (lambda a, b: a**2, 144, ("**", A, ("const", 2))),
    "-a": (lambda a, b: -a, -12, ("-", ("const", 0), A)),
    "quotient": (lambda a, b: divmod(a, 5)[0], 2, ("//", A, ("const", 5))),
    "remainder": (lambda a, b: divmod(a, 5)[1], 2, ("%", A, ("const", 5))),
    "nested": (lambda a, b: (a + b) // 2 * 3, 24, ("*", ("//", ("+", A, B), ("const", 2)), ("const", 3))),
    "smallest": (min, 4, B),
    "100 % b": (lambda a, b: 100 % b, 0, ("%", ("const", 100), B)),
    "a >> 1": (lambda a, b: a >> 1, 6, ("//", A, ("const", 2))),
    "a << 1": (lambda a, b: a << 1, 24, ("*", A, ("const", 2))),
    "abs": (lambda a, b: abs(a), 12, A),
    "round": (lambda a, b: round(a), 12, A),
    "floor": (lambda a, b: math.floor(a), 12, A),
    "ceil": (lambda a, b: math.ceil(a), 12, A),
    "sum": (lambda a, b: sum([a, b]), 16, ("+", ("+", ("const", 0), A), B)),
}


@pytest.mark.parametrize("name", EXACT)
def test_whole_arithmetic_is_followed(name: str) -> None:
    log = Log()
    compute, value, expr = EXACT[name]
    found = compute(log.a, log.b)
    assert type(found) is Size
    assert not log.values
    assert (int(found), found.expr) == (value, expr)


LEAVING: dict[str, tuple[Callable[[Size], Any], float]] = {
    "a / 8": (lambda a: a / 8, 1.5),
    "6 / a": (lambda a: 6 / a, 0.5),
    "a ** -1": (lambda a: a**-1, 1 / 12),
    "a ** 0.5": (lambda a: a**0.5, math.sqrt(12)),
    "2 ** a": (lambda a: 2**a, 4096),
    "a * 0.5": (lambda a: a * 0.5, 6.0),
    "a + 0.5": (lambda a: a + 0.5, 12.5),
    "a // 5.0": (lambda a: a // 5.0, 2.0),
    "a + True": (lambda a: a + True, 13),
    "float": (float, 12.0),
    "int": (int, 12),
    "round to tens": (lambda a: round(a, -1), 10),
    "sqrt": (math.sqrt, math.sqrt(12)),
}


@pytest.mark.parametrize("name", LEAVING)
def test_leaving_the_integers_reports_that_the_value_is_used(name: str) -> None:
    log = Log()
    compute, value = LEAVING[name]
    found = compute(log.a)
    assert found == value
    assert type(found) in (int, float)
    assert log.values == [(A, 12)]


ASKED: dict[str, tuple[Callable[[Size], Any], bool, str, float]] = {
    "a > 4": (lambda a: a > 4, True, ">", 4),
    "a >= 13": (lambda a: a >= 13, False, ">=", 13),
    "a < 12": (lambda a: a < 12, False, "<", 12),
    "a <= 12": (lambda a: a <= 12, True, "<=", 12),
    "4 < a": (lambda a: operator.lt(4, a), True, ">", 4),
    "a > 11.5": (lambda a: a > 11.5, True, ">", 11.5),
    "a == 12": (lambda a: a == 12, True, "==", 12),
    "a != 12": (lambda a: a != 12, False, "==", 12),
    "truth": (bool, True, "==", 0),
    "key": (lambda a: {12: True}[a], True, "==", 12),
}


@pytest.mark.parametrize("name", ASKED)
def test_what_the_code_asks_a_size_is_reported_with_the_answer(name: str) -> None:
    log = Log()
    ask, answer, relation, other = ASKED[name]
    assert ask(log.a) is answer
    is_same = answer if name not in ("a != 12", "truth") else not answer
    assert log.answers == [(relation, A, ("const", other), is_same)]
    assert not log.values


def test_an_answer_holds_while_it_is_the_same() -> None:
    condition = Condition(">", ("//", A, ("const", 2)), B, True, 0)
    assert condition.holds({1: 5}.__getitem__, {0: 12})
    assert not condition.holds({1: 6}.__getitem__, {0: 12})


def test_a_product_that_leaves_reports_the_whole_expression() -> None:
    log = Log()
    assert (log.a * log.b) ** -0.5 == 48**-0.5
    assert log.values == [(("*", A, B), 48)]


def test_equal_sizes_are_reported_and_different_ones_are_not() -> None:
    log = Log(value=4, other=4)
    assert log.a == log.b
    assert (log.a != log.b) is False
    assert log.equal == [(A, B, 4)] * 2
    assert not log.answers
    other = Log(value=4, other=5)
    assert other.a != other.b
    assert (other.a == other.b) is False
    assert not other.equal
    assert other.answers == [("==", A, B, False)] * 2


def test_what_is_no_number_is_compared_without_a_report() -> None:
    log = Log()
    assert log.a != "12"
    assert log.a != None  # noqa: E711 - the comparison is what is tested
    assert not log.equal
    assert not log.answers


def test_a_size_is_a_key_and_an_index_like_its_number() -> None:
    log = Log(value=2)
    assert {2: "two"}[log.a] == "two"
    assert "abc"[log.a] == "c"
    assert list(range(log.a)) == [0, 1]
    assert [log.a * [7], [7] * log.a, log.a * "x", (1,) * log.a] == [[7, 7], [7, 7], "xx", (1, 1)]
    assert not log.values


def test_a_size_refuses_what_a_number_refuses() -> None:
    log = Log()
    with pytest.raises(TypeError):
        log.a + "x"
    with pytest.raises(ZeroDivisionError):
        log.a // 0


def test_copies_stay_tracked_and_pickles_are_plain() -> None:
    log = Log()
    assert copy.deepcopy({"width": log.a})["width"] is log.a
    assert copy.copy(log.a) is log.a
    assert type(pickle.loads(pickle.dumps(log.a))) is int
    assert pickle.loads(pickle.dumps(log.a)) == 12


def test_expression_of_tracked_and_plain() -> None:
    assert expression(Log().a) == A
    assert expression(3) == ("const", 3)


def test_mentions_by_kind() -> None:
    expr = ("*", ("+", A, ("attr", 3)), ("//", B, ("const", 9)))
    assert mentions(expr, "attr") == {0, 3}
    assert mentions(expr, "axis") == {1}
    assert mentions(("const", 9), "axis") == set()


@pytest.mark.parametrize(
    ("expr", "value"),
    [
        (("const", 7), 7),
        (A, 5),
        (B, 10),
        (("+", A, B), 15),
        (("-", A, B), -5),
        (("*", A, ("const", 3)), 15),
        (("//", B, ("const", 4)), 2),
        (("%", B, ("const", 4)), 2),
        (("**", A, ("const", 2)), 25),
        (("//", B, ("-", A, ("const", 5))), -1),
        (("%", B, ("-", A, ("const", 5))), -1),
        (("-", ("const", 0), ("*", A, B)), -50),
    ],
    ids=str,
)
def test_evaluate(expr: Expr, value: int) -> None:
    """A division by zero gives -1, the length of nothing: an equation with it does not hold."""
    assert evaluate(expr, {1: 10}.__getitem__, {0: 5}) == value


@pytest.mark.parametrize(
    ("expr", "target", "solution"),
    [
        (A, 9, 9),
        (("+", A, B), 12, 2),
        (("+", B, A), 12, 2),
        (("-", A, B), 12, 22),
        (("-", B, A), 4, 6),
        (("*", A, ("const", 3)), 12, 4),
        (("*", ("const", 3), A), 13, None),
        (("*", A, ("const", 0)), 12, None),
        (("//", A, ("const", 4)), 3, 12),
        (("//", ("const", 12), A), 3, 4),
        (("//", ("const", 13), A), 3, None),
        (("//", ("const", 12), A), 0, None),
        (("%", A, ("const", 4)), 3, None),
        (("**", A, ("const", 2)), 9, None),
        (("+", A, A), 8, None),
        (("const", 8), 8, None),
        (("*", ("+", A, ("const", 1)), B), 50, 4),
    ],
    ids=str,
)
def test_invert(expr: Expr, target: int, solution: int | None) -> None:
    assert invert(expr, target, {1: 10}.__getitem__, {0: 99}, 0) == solution


def test_invert_takes_the_other_attributes_as_known() -> None:
    assert invert(("*", A, ("attr", 5)), 12, {}.__getitem__, {0: 99, 5: 6}, 0) == 2
