"""Python integers that know where they came from, so that sizes can be followed and re-computed."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

Expr: TypeAlias = tuple[Any, ...]
"""("const", value), ("axis", number), ("attr", number) or (operator, Expr, Expr)."""

OPERATORS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
    "**": operator.pow,
}
RELATIONS: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


@dataclass(frozen=True)
class Equation:
    """``expr`` was used where ``target`` is counted; None: its value must not change."""

    expr: Expr
    target: int | None
    value: int
    why: int


@dataclass(frozen=True)
class Condition:
    """``left relation right`` was asked, and what the code did next hangs on the answer."""

    relation: str
    left: Expr
    right: Expr
    answer: bool
    why: int

    def holds(self, axes: Callable[[int], int], attributes: Mapping[int, int]) -> bool:
        """True if the answer is still the same."""
        left, right = evaluate(self.left, axes, attributes), evaluate(self.right, axes, attributes)
        return RELATIONS[self.relation](left, right) == self.answer


class Recorder:
    """Where a tracked integer reports how it was used. Set by the tracer while it runs.

    Args:
        on_value: A number was computed that is no size any more: (expression, value of it).
        on_equal: Two sizes were found equal: (left, right, value of both).
        on_answer: A size was compared: (relation, left, right, answer).
    """

    def __init__(
        self,
        on_value: Callable[[Expr, int], None],
        on_equal: Callable[[Expr, Expr, int], None],
        on_answer: Callable[[str, Expr, Expr, bool], None],
    ) -> None:
        self.on_value = on_value
        self.on_equal = on_equal
        self.on_answer = on_answer


class Size(int):
    """An int that carries the expression it was computed by."""

    expr: Expr
    recorder: Recorder

    def __new__(cls, value: int, expr: Expr, recorder: Recorder) -> Size:
        """Make one."""
        self = super().__new__(cls, value)
        self.expr = expr
        self.recorder = recorder
        return self

    def _binary(self, symbol: str, left: Any, right: Any) -> Any:
        if (
            not isinstance(left, int)
            or not isinstance(right, int)
            or isinstance(left, bool)
            or isinstance(right, bool)
        ):
            return self._as_value(symbol, left, right)
        value = OPERATORS[symbol](int.__int__(left), int.__int__(right))
        return Size(value, (symbol, expression(left), expression(right)), self.recorder)

    def _as_value(self, symbol: str, left: Any, right: Any) -> Any:
        """Leave the integers: what is computed from here on is a number, and kept where it is used."""
        if not isinstance(left, (int, float)) or not isinstance(right, (int, float)):
            return NotImplemented
        self.recorder.on_value(self.expr, int.__int__(self))
        plain: list[Any] = [int.__int__(v) if isinstance(v, int) else v for v in (left, right)]
        return (operator.truediv if symbol == "/" else OPERATORS[symbol])(*plain)

    def __add__(self, other: Any) -> Any:
        return self._binary("+", self, other)

    def __radd__(self, other: Any) -> Any:
        return self._binary("+", other, self)

    def __sub__(self, other: Any) -> Any:
        return self._binary("-", self, other)

    def __rsub__(self, other: Any) -> Any:
        return self._binary("-", other, self)

    def __mul__(self, other: Any) -> Any:
        if isinstance(other, (list, tuple, str)):
            return other * int.__int__(self)
        return self._binary("*", self, other)

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Any:
        return self._binary("//", self, other)

    def __rfloordiv__(self, other: Any) -> Any:
        return self._binary("//", other, self)

    def __mod__(self, other: Any) -> Any:
        return self._binary("%", self, other)

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __truediv__(self, other: Any) -> Any:
        return self._as_value("/", self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return self._as_value("/", other, self)

    def __pow__(self, other: Any, modulo: int | None = None) -> Any:
        if isinstance(other, int) and other >= 0:
            return self._binary("**", self, other)
        return self._as_value("**", self, other)

    def __rpow__(self, other: Any, modulo: int | None = None) -> Any:
        return self._as_value("**", other, self)

    def __rmod__(self, other: Any) -> Any:
        return NotImplemented if isinstance(other, str) else self._binary("%", other, self)

    def __lshift__(self, other: Any) -> Any:
        return self._binary("*", self, 1 << other)

    def __rshift__(self, other: Any) -> Any:
        return self._binary("//", self, 1 << other)

    def __neg__(self) -> Size:
        return Size(-int.__int__(self), ("-", ("const", 0), self.expr), self.recorder)

    def __abs__(self) -> Size:
        return -self if self < 0 else self

    def __round__(self, ndigits: Any = None) -> Any:
        return self if ndigits is None else self.__int__().__round__(ndigits)

    def __trunc__(self) -> Size:
        return self

    __floor__ = __ceil__ = __trunc__

    def __float__(self) -> float:
        return float(self.__int__())

    def __int__(self) -> int:
        self.recorder.on_value(self.expr, int.__int__(self))
        return int.__int__(self)

    def __bool__(self) -> bool:
        return self != 0

    def _compare(self, relation: str, other: Any) -> Any:
        answer = getattr(int, _METHODS[relation])(self, other)
        if isinstance(other, int):
            self.recorder.on_answer(relation, self.expr, expression(other), answer)
        elif isinstance(other, float):
            answer = RELATIONS[relation](int.__int__(self), other)
            self.recorder.on_answer(relation, self.expr, ("const", other), answer)
        return answer

    def __lt__(self, other: Any) -> Any:
        return self._compare("<", other)

    def __le__(self, other: Any) -> Any:
        return self._compare("<=", other)

    def __gt__(self, other: Any) -> Any:
        return self._compare(">", other)

    def __ge__(self, other: Any) -> Any:
        return self._compare(">=", other)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Size) and int.__eq__(self, other) is True:
            self.recorder.on_equal(self.expr, other.expr, int.__int__(self))
            return True
        return self._compare("==", other) is True

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = int.__hash__

    def __reduce__(self) -> Any:
        return int, (int.__int__(self),)

    def __deepcopy__(self, memo: Any) -> Size:
        return self

    def __copy__(self) -> Size:
        return self


_METHODS = {"==": "__eq__", "<": "__lt__", "<=": "__le__", ">": "__gt__", ">=": "__ge__"}


def expression(value: int) -> Expr:
    """Expression of a tracked or plain integer."""
    return value.expr if isinstance(value, Size) else ("const", int(value))


def mentions(expr: Expr, kind: str) -> set[int]:
    """Numbers of all axes ("axis") or attributes ("attr") in an expression."""
    if expr[0] == kind:
        return {expr[1]}
    if expr[0] in OPERATORS:
        return mentions(expr[1], kind) | mentions(expr[2], kind)
    return set()


def evaluate(expr: Expr, axes: Callable[[int], int], attributes: Mapping[int, int]) -> int:
    """Value of an expression.

    >>> evaluate(("//", ("axis", 0), ("const", 2)), lambda axis: 10, {})
    5
    """
    head = expr[0]
    if head == "const":
        return expr[1]  # type: ignore[no-any-return]
    if head == "axis":
        return axes(expr[1])
    if head == "attr":
        return attributes[expr[1]]
    left, right = evaluate(expr[1], axes, attributes), evaluate(expr[2], axes, attributes)
    if head in ("//", "%") and right == 0:
        return -1
    return OPERATORS[head](left, right)


def invert(
    expr: Expr, target: int, axes: Callable[[int], int], attributes: Mapping[int, int], unknown: int
) -> int | None:
    """Solve ``expr == target`` for the one attribute ``unknown``; None if it cannot be solved in integers.

    >>> invert(("*", ("attr", 7), ("const", 3)), 12, lambda axis: 0, {}, 7)
    4
    """
    if expr == ("attr", unknown):
        return target
    if expr[0] not in OPERATORS:
        return None
    in_left = unknown in mentions(expr[1], "attr")
    if in_left and unknown in mentions(expr[2], "attr"):
        return None
    known = evaluate(expr[2] if in_left else expr[1], axes, attributes)
    wanted = _undo(expr[0], target, known, in_left)
    inner = expr[1] if in_left else expr[2]
    return None if wanted is None else invert(inner, wanted, axes, attributes, unknown)


def _undo(symbol: str, target: int, known: int, in_left: bool) -> int | None:
    if symbol == "+":
        return target - known
    if symbol == "-":
        return target + known if in_left else known - target
    if symbol == "*":
        return target // known if known and target % known == 0 else None
    if symbol == "//":
        return target * known if in_left else (known // target if target and known % target == 0 else None)
    return None
