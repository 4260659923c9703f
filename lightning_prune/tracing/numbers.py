"""What a forward computes with beside tensors, place by place, and how it is held against an earlier run.

A pruned model has to do what the dense one does: the same operations in the same modules, with the same
plain numbers; sizes alone follow. One run writes everything down, another one is held against it while it
goes. A number that differs has followed a size. The run goes on with the number as it was, and remembers
where.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from lightning_prune.surgery.numbers import Length, call_of, computes, is_number, name_of, replaced, same
from lightning_prune.tracing.labels import Site

OUTSIDE = "<outside>"
NEAR = 1e-3  # relative difference up to which two numbers that were read off data count as one


class Call(NamedTuple):
    """One call of a torch function: its name, and everything in its arguments but tensors."""

    name: str
    leaves: tuple[Any, ...]


@dataclass
class Visit:
    """One run of one module's forward, without what its submodules do.

    Args:
        stack: The modules around it, outermost first, and itself.
        calls: What it called, with the numbers that were passed on.
        found: Call -> leaves as they were before kept numbers took the place of found ones.
    """

    stack: tuple[str, ...]
    calls: list[Call] = field(default_factory=list)
    found: dict[int, tuple[Any, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Kept:
    """A number that followed a size and was kept."""

    stack: tuple[str, ...]
    name: str
    leaf: int
    found: Any
    kept: Any
    site: Site


@dataclass(frozen=True)
class Parting:
    """Where a run did something else than the run that it was held against.

    Args:
        module: Where.
        text: What.
        by_data: True if data that was read before had changed too, so that it may have been the reason.
    """

    module: str
    text: str
    by_data: bool


class Numbers:
    """The record of one run.

    Args:
        reference: Record to hold this run against; None: only write down.
        steady: Another record of the reference model with other data. A number that is equal in both does
            not follow the data.
    """

    def __init__(self, reference: Numbers | None = None, steady: Numbers | None = None) -> None:
        self.reference = reference
        self.steady = steady
        self.visits: dict[tuple[str, str], list[Visit]] = {}
        self.kept: list[Kept] = []
        self.partings: list[Parting] = []
        self.data_differ = False
        self._pieces: set[tuple[Any, Any]] = set()
        self.site: Callable[[], Site] = lambda: Site("", "", "")
        self.begin("")

    def begin(self, phase: str) -> None:
        """Start a run of the whole model; runs in training mode are told apart by their phase."""
        self._phase = phase
        self._stack: list[Visit] = []
        self._same: list[tuple[Visit | None, Visit | None]] = []
        self.enter(OUTSIDE)

    def anew(self) -> Numbers:
        """Give an empty record that is held against the same runs."""
        return Numbers(self.reference, self.steady)

    def enter(self, module: str) -> None:
        """A module's forward starts."""
        if self._stack:
            self._note("enter", (module,))
        stack = (*self._stack[-1].stack, module) if self._stack else (module,)
        visits = self.visits.setdefault((self._phase, module), [])
        self._same.append((self._earlier(self.reference, module), self._earlier(self.steady, module)))
        self._stack.append(Visit(stack))
        visits.append(self._stack[-1])

    def leave(self) -> None:
        """It ends."""
        (same_visit, _), visit = self._same[-1], self._stack[-1]
        if same_visit is not None and len(visit.calls) < len(same_visit.calls):
            self._part(f"{same_visit.calls[len(visit.calls)].name} is not run any more")
        self._stack.pop()
        self._same.pop()

    def meet(
        self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, plain_sizes: bool = False
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A torch function is called; gives the arguments to call it with.

        Args:
            function: Of torch.
            args: What it is called with.
            kwargs: The same, by keyword.
            plain_sizes: Whether a size looks like any whole number here.
        """
        called = name_of(function)
        name, leaves, kwargs = call_of(function, called, args, kwargs)
        if plain_sizes and not computes(called):
            leaves = tuple(Length(leaf) if type(leaf) is int else leaf for leaf in leaves)
        earlier = self._note(name, leaves)
        if earlier is None or earlier.leaves == leaves:
            return args, kwargs
        changes = self._changes(earlier, leaves)
        if not changes:
            return args, kwargs
        visit = self._stack[-1]
        visit.found[len(visit.calls) - 1] = leaves
        visit.calls[-1] = Call(name, tuple(changes.get(i, leaf) for i, leaf in enumerate(leaves)))
        for leaf, kept in changes.items():
            self.kept.append(Kept(visit.stack, name, leaf, leaves[leaf], kept, self.site()))
        return replaced(called, args, kwargs, changes)

    def read(self, what: str, value: Any) -> None:
        """Python was given a value of a tensor, or a length that hangs on values."""
        leaves = call_of(None, "", (value,), {})[1]
        earlier = self._note(f"the value of {what}", leaves)
        if earlier is not None and (
            len(earlier.leaves) != len(leaves)
            or not all(_follows(a, b) or same(a, b) for a, b in zip(earlier.leaves, leaves, strict=True))
        ):
            self.data_differ = True

    def calls(self) -> Iterator[tuple[Visit, Call, tuple[Any, ...]]]:
        """Every call of the runs that the reference knows too: visit, call, leaves as they were found."""
        phases = {phase for phase, _ in (self.reference or self).visits}
        for (phase, _), visits in self.visits.items():
            for visit in visits if phase in phases else ():
                for i, call in enumerate(visit.calls):
                    yield visit, call, visit.found.get(i, call.leaves)

    def give(self, what: str, number: int) -> None:
        """A function gave a number of tensors, such as pieces of a dimension, which may follow its size."""
        leaves = ((number,),)
        earlier = self._note(f"the pieces of {what}", leaves)
        if earlier is not None and earlier.leaves != leaves:
            self._pieces.add((earlier.leaves[0], leaves[0]))

    def equals(self, other: Numbers) -> bool:
        """True if another run did the same."""
        mine, theirs = self.visits, other.visits
        return mine.keys() == theirs.keys() and all(
            len(mine[k]) == len(theirs[k])
            and all(_alike(a, b) for a, b in zip(mine[k], theirs[k], strict=True))
            for k in mine
        )

    def _earlier(self, record: Numbers | None, module: str) -> Visit | None:
        """The same visit in another record; a module that ran more often now is held against its last run."""
        if record is None:
            return None
        visits = record.visits.get((self._phase, module), [])
        number = len(self.visits.get((self._phase, module), []))
        return visits[min(number, len(visits) - 1)] if visits else None

    def _note(self, name: str, leaves: tuple[Any, ...]) -> Call | None:
        """Write a call down, and give the one that stands in its place in the reference."""
        visit, (earlier, _) = self._stack[-1], self._same[-1]
        visit.calls.append(Call(name, leaves))
        if earlier is None:
            return None
        place = len(visit.calls) - 1
        if place >= len(earlier.calls):
            self._part(f"{name} was not run")
            return None
        if earlier.calls[place].name != name or (name == "enter" and earlier.calls[place].leaves != leaves):
            self._part(f"{name} is run in the place of {earlier.calls[place].name}")
            return None
        return earlier.calls[place]

    def _changes(self, earlier: Call, leaves: tuple[Any, ...]) -> dict[int, Any]:
        """Numbers that followed a size, as they were."""
        changes: dict[int, Any] = {}
        if len(earlier.leaves) != len(leaves):
            self._part(f"{earlier.name} is called with other arguments")
            return changes
        for i, (was, now) in enumerate(zip(earlier.leaves, leaves, strict=True)):
            if _follows(was, now) or same(was, now) or (was, now) in self._pieces:
                continue
            if not is_number(was) or not is_number(now):
                self._part(f"{earlier.name} is called with {now!r} in the place of {was!r}")
                return {}
            if not self.data_differ or self._is_steady(i, was):
                changes[i] = was
            elif not math.isclose(was, now, rel_tol=NEAR):
                self._part(f"{earlier.name} computes with {now!r} in the place of {was!r}")
                return {}
        return changes

    def _is_steady(self, leaf: int, was: Any) -> bool:
        """True if a number of the reference does not hang on the data."""
        steady = self._same[-1][1]
        place = len(self._stack[-1].calls) - 1
        if steady is None or place >= len(steady.calls):
            return False
        call = steady.calls[place]
        return call.name == self._stack[-1].calls[-1].name and call.leaves[leaf : leaf + 1] == (was,)

    def _part(self, text: str) -> None:
        """From here on this visit cannot be held against the reference."""
        self._same[-1] = (None, None)
        self.partings.append(Parting(self._stack[-1].stack[-1], f"{text}: {self.site()}", self.data_differ))


def _follows(was: Any, now: Any) -> bool:
    return isinstance(was, Length) or isinstance(now, Length)


def _alike(a: Visit, b: Visit) -> bool:
    return len(a.calls) == len(b.calls) and all(
        x.name == y.name
        and len(x.leaves) == len(y.leaves)
        and all(same(p, q) for p, q in zip(x.leaves, y.leaves, strict=True))
        for x, y in zip(a.calls, b.calls, strict=True)
    )


def is_read(value: Any) -> bool:
    """Whether a function gave Python something to decide by."""
    return isinstance(value, (bool, int, float, complex, list)) and not _are_tensors(value)


def are_pieces(value: Any) -> bool:
    """Whether a function gave several tensors."""
    return isinstance(value, (tuple, list)) and _are_tensors(value)


def _are_tensors(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and any(isinstance(v, Tensor) for v in value)
