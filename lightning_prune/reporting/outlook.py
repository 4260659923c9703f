"""What a prune will do, before it does it: one value, shown on the console or as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lightning_prune.graph.explaining import Frozen
from lightning_prune.reporting.console import print_table, wide_console
from lightning_prune.reporting.sections import frozen_cells
from lightning_prune.reporting.wording import percent
from lightning_prune.selection.forecast import Forecast

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["GroupOutlook", "Outlook", "print_outlook", "waiting", "with_progress"]


@dataclass(frozen=True)
class GroupOutlook:
    """One group.

    Args:
        name: Of the group.
        kind: "channel", "head" or "head_dim".
        isomorphism: Number of its isomorphism class, from 1.
        units: Units before the first step.
        left: Units after the last.
        tensors: What it reaches into, as ``tensor:dim``.
    """

    name: str
    kind: str
    isomorphism: int
    units: int
    left: int
    tensors: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What a prune will do.

    Args:
        model: Name of its class.
        inputs: What it was traced with, in words.
        macs_of: What the MACs of the steps are those of, in words.
        groups: Every group of units.
        steps: What is left before the first step and after each.
        epochs: Epoch that begins with each step, 0-based; one less than ``steps``.
        budget: Name of the budget, share asked for, share reached; None without one.
        frozen: What stays whatever is asked, and why.
        unknown: Operations without a rule; what goes into them stays.
    """

    model: str
    inputs: str
    macs_of: str
    groups: tuple[GroupOutlook, ...]
    steps: tuple[Forecast, ...]
    epochs: tuple[int, ...]
    budget: tuple[str, float, float] | None
    frozen: tuple[Frozen, ...]
    unknown: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Give plain numbers, strings, lists and dicts."""
        dense = self.steps[0]
        return {
            "model": self.model,
            "inputs": self.inputs,
            "macs_of": self.macs_of,
            "groups": [asdict(group) | {"tensors": list(group.tensors)} for group in self.groups],
            "steps": [
                {
                    "step": step.step,
                    "epoch": None if number == 0 else self.epochs[number - 1],
                    "units": sum(step.kept),
                    "parameters": step.parameters,
                    "parameters_left": step.parameters / max(dense.parameters, 1),
                    "macs": step.macs,
                    "macs_left": step.macs / max(dense.macs, 1),
                    "notes": list(step.notes),
                }
                for number, step in enumerate(self.steps)
            ],
            "budget": None
            if self.budget is None
            else dict(zip(("what", "asked", "reached"), self.budget, strict=True)),
            "frozen": [asdict(each) for each in self.frozen],
            "unknown_operations": list(self.unknown),
        }


def print_outlook(outlook: Outlook, console: Console | None = None) -> None:
    """Print an outlook.

    Args:
        outlook: What to print.
        console: Where to; None = standard output.
    """
    from rich.text import Text

    console = console or wide_console()
    console.print(Text(f"{outlook.model}, traced with {outlook.inputs}\n"))
    print_table(
        console,
        "Groups: units that compete with each other; those of one class are alike",
        ("units", "left", "kept", "class", "kind", "group"),
        _group_cells(outlook.groups),
        words=2,
    )
    print_table(
        console,
        f"What each step leaves; MACs are those of {outlook.macs_of}",
        ("step", "epoch", "units", "parameters", "", "MACs", ""),
        list(_step_cells(outlook)),
        words=0,
    )
    if outlook.budget is not None:
        what, asked, reached = outlook.budget
        console.print(Text(f"Budget {what}: asked to keep {percent(asked)}, will keep {percent(reached)}.\n"))
    print_table(
        console,
        "What stays whatever is asked, and why",
        ("reason", "where"),
        [
            *frozen_cells(outlook.frozen),
            *((f"an operation without a rule: {op}", "its inputs") for op in outlook.unknown),
        ],
        words=2,
    )
    for note in outlook.steps[-1].notes:
        console.print(Text.assemble(("Note: ", "bold yellow"), note))


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """Show on the terminal that something goes on; elsewhere show nothing.

    Args:
        text: What goes on.
    """
    from rich.console import Console

    console = Console(stderr=True)
    with console.status(text) if console.is_terminal else nullcontext():
        yield


def with_progress(steps: Iterable[Forecast], total: int) -> Iterator[Forecast]:
    """Pass steps on and show on the terminal how far it is; elsewhere show nothing.

    Args:
        steps: What takes its time.
        total: How many there are.
    """
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(
        steps, "planning", total=total, console=console, transient=True, disable=not console.is_terminal
    )


def _group_cells(groups: Sequence[GroupOutlook]) -> list[Sequence[str]]:
    return [
        (
            f"{group.units:,}",
            f"{group.left:,}",
            f"{group.left / group.units:.0%}",
            str(group.isomorphism),
            group.kind.replace("_", " "),
            group.name.split("/")[0],
        )
        for group in groups
    ]


def _step_cells(outlook: Outlook) -> Iterator[Sequence[str]]:
    dense = outlook.steps[0]
    for number, step in enumerate(outlook.steps):
        yield (
            str(step.step),
            "" if number == 0 else str(outlook.epochs[number - 1]),
            f"{sum(step.kept):,}",
            f"{step.parameters:,}",
            percent(step.parameters / max(dense.parameters, 1)),
            f"{step.macs:,}",
            percent(step.macs / max(dense.macs, 1)),
        )
