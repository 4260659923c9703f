"""Saved states are vetted before anything is taken from them; the first thing that is wrong is named."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from lightning_prune.budgets.latency import LatencyTable
from lightning_prune.errors import CheckpointMismatchError, PlanError
from lightning_prune.plan import Plan
from lightning_prune.scores.regularizer import MAX_ALPHA

__all__ = ["Part", "vet_pruner"]

LARGEST = 2**63 - 1  # what a tensor of whole numbers holds


@dataclass(frozen=True)
class Part:
    """A value in a saved state. Whatever it is asked for and is not is a ``CheckpointMismatchError``.

    Args:
        where: How one gets there, for the message.
        value: What was found there.

    >>> Part("the state", {"step": 3})["step"].whole(0, 5)
    3
    """

    where: str
    value: Any

    def refuse(self, wanted: str) -> NoReturn:
        """Raise, with what was wanted and what was found."""
        raise CheckpointMismatchError(
            f"{self.where} must be {wanted}, the checkpoint holds {_shown(self.value)}: the file is "
            "damaged or was edited. Nothing was loaded"
        )

    def __getitem__(self, key: str) -> Part:
        return Part(f"{self.where}[{key!r}]", self.value[key])

    def table(self, *keys: str, optional: tuple[str, ...] = ()) -> Part:
        """Give itself, a dict with strings for keys: with these alone and all of these, if any are named."""
        if not isinstance(self.value, Mapping) or not all(isinstance(key, str) for key in self.value):
            self.refuse("a table")
        for key in keys:
            if key not in self.value:
                self.refuse(f"a table with {key!r}")
        known = (*keys, *optional)
        extra = [key for key in self.value if key not in known] if known else []
        if extra:
            self.refuse(f"a table of {', '.join(known)}, without {_shown(extra[0])}")
        return self

    def parts(self) -> list[Part]:
        """Give the values of a table."""
        return [self[key] for key in self.table().value]

    def items(self, count: int | None = None) -> list[Part]:
        """Give the entries of a list."""
        if not isinstance(self.value, (list, tuple)) or count not in (None, len(self.value)):
            self.refuse("a list" if count is None else f"a list of {count}")
        return [Part(f"{self.where}[{i}]", value) for i, value in enumerate(self.value)]

    def whole(self, least: int = 0, most: int = LARGEST) -> int:
        """Give a whole number."""
        value = self.value
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            self.refuse(f"a whole number in [{least}, {most}]")
        return value

    def number(self, least: float = -math.inf, most: float = math.inf) -> float:
        """Give a finite number."""
        value = self.value
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST:
            value = float(value)
        if not isinstance(value, float) or not math.isfinite(value) or not least <= value <= most:
            known = "" if least == -math.inf else f" in [{least:g}, {most:g}]"
            self.refuse(f"a finite number{known}")
        return value

    def truth(self) -> bool:
        """Give True or False."""
        if not isinstance(self.value, bool):
            self.refuse("True or False")
        return self.value

    def text(self) -> str:
        """Give a string."""
        if not isinstance(self.value, str):
            self.refuse("a string")
        return self.value

    def plain(self) -> int | float | str | bool | None:
        """Give a number, a string, or None."""
        if self.value is not None and not isinstance(self.value, (bool, int, float, str)):
            self.refuse("a number or a string")
        return self.value

    def plan(self) -> Plan:
        """Give a plan."""
        try:
            return Plan.from_dict(self.table().value)
        except (PlanError, OverflowError) as error:
            raise CheckpointMismatchError(
                f"{self.where} is no plan: {error}; the file is damaged or was edited. Nothing was loaded"
            ) from error

    def tensor(self, *shapes: tuple[int, ...]) -> Tensor:
        """Give a tensor with values, of one of these shapes if any are named."""
        value = self.value
        if not isinstance(value, Tensor) or value.is_meta or value.layout != torch.strided:
            self.refuse("a tensor with values")
        if shapes and tuple(value.shape) not in shapes:
            self.refuse(f"a tensor of shape {list(shapes[0])}")
        return value


def vet_pruner(state: Part, steps: int, shapes: Mapping[str, tuple[int, ...]]) -> Plan:
    """See that a ``GroupNormPruner`` can go on with a state.

    Args:
        state: What its ``state_dict`` gave.
        steps: Its ``iterative_steps``.
        shapes: Of the parameters that it prunes, as they were when the state was saved.

    Returns:
        What the pruner has kept so far.

    Raises:
        CheckpointMismatchError: If it cannot; names the first thing wrong.
    """
    state.table(
        "step", "plan", "budget", "rng", "initial", "head_dims", "regularizer", optional=("evidence",)
    )
    step, plan = state["step"].whole(0, steps), state["plan"].plan()
    if plan and not step:
        state["step"].refuse("at least 1 where something was cut")
    _vet_sizes(state["plan"], plan, shapes)
    _vet_budget(state["budget"])
    _vet_random_state(state["rng"])
    for units in state["initial"].parts():
        units.number(0, LARGEST)
    for name in state["head_dims"].items():
        name.text()
    _vet_regularizer(state["regularizer"])
    if "evidence" in state.value:
        _vet_evidence(state["evidence"], shapes)
    return plan


def _vet_sizes(part: Part, plan: Plan, shapes: Mapping[str, tuple[int, ...]]) -> None:
    sizes = dict(plan.sizes)
    for cut in plan.cuts:
        before, now = sizes.get(cut.tensor, ()), shapes.get(cut.tensor)
        if not 0 <= cut.dim < len(before) or before[cut.dim] != cut.size:
            part.refuse(f"a plan with a size of {cut.size} for {cut.tensor!r} dim {cut.dim}, which it cuts")
        if now is not None and (len(now) != len(before) or now[cut.dim] != cut.kept):
            part.refuse(f"a plan that leaves {cut.tensor!r} with shape {list(now)}")


def _vet_budget(budget: Part) -> None:
    budget.table("dense", "reached", "notebook")
    if budget["dense"].value is not None:
        budget["dense"].number(0)
    budget["reached"].number(0)
    for page in budget["notebook"].table(optional=("table",)).parts():
        for points in page.table("machine", "layers")["layers"].parts():
            for point in points.items():
                elements, milliseconds = point.items(2)
                elements.whole()
                milliseconds.number()
        page["machine"].table()
        LatencyTable.from_dict(page.value)


def _vet_random_state(state: Part) -> None:
    digits = state.text()
    try:
        torch.Generator().set_state(
            torch.tensor(list(bytes.fromhex(digits)), dtype=torch.uint8, device="cpu")
        )
    except (RuntimeError, TypeError, ValueError):
        state.refuse("the state of a random number generator in hexadecimal")


def _vet_regularizer(state: Part) -> None:
    state.table("age", "skipped", "gamma", "scores")
    state["skipped"].whole()
    gammas = [gamma.number(0, 2**MAX_ALPHA) for gamma in state["gamma"].items()]
    scores = [score.number() for score in state["scores"].items(len(gammas))]
    if state["age"].value is not None:
        state["age"].whole()
    elif set(gammas) - {1.0} or any(scores):
        state["age"].refuse("a whole number where gammas were computed")


def _vet_evidence(state: Part, shapes: Mapping[str, tuple[int, ...]]) -> None:
    for kind in state.table("sums", "counts", "pending").value:
        for name in state[kind].table().value:
            part = state[kind][name]
            if name not in shapes:
                part.refuse("of a parameter, there is none of this name; it")
            shape = shapes[name]
            of = {"sums": (shape, shape[:1]), "counts": ((),), "pending": ((shape[0] + 1,) if shape else (),)}
            part.tensor(*of[kind])


def _shown(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    if isinstance(value, str):
        return repr(value[:60])
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    return "a table" if isinstance(value, Mapping) else f"a {type(value).__name__}"
