"""What comes out when a guarded line is gone, and when nothing is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from queue import SimpleQueue

from guards.copies import Copy, Found
from guards.tables import ROOT, Guard, StaleError, Table, marks

FINE = {"passed", "killed", "left out"}


@dataclass(frozen=True)
class Verdict:
    """What became of one guard, or of the unchanged tests of a table."""

    status: str
    seconds: float
    table: str
    about: str
    found: dict[str, Found]
    detail: str = ""


def judge(table: Table, guard: Guard, copy: Copy) -> Verdict:
    """Run the tests of a guard without its line."""
    start = time.monotonic()
    names = _here(table, guard.fails, copy)
    found: dict[str, Found] = {}
    status, detail = "killed", ""
    try:
        with copy.changed(guard):
            found = copy.run(table.tests, names) if names else {}
    except StaleError:
        status = "STALE"
    except TimeoutError:
        status = "SLOW"
    else:
        alive = [name for name in names if name not in found or not found[name].seen]
        if alive:
            status, detail = "SURVIVED", f"passes all the same: {', '.join(alive)}"
        elif not names:
            status, detail = "left out", "needs a GPU: --gpu"
    about = f"{guard.file}: {' '.join(guard.line.split())[:70]}"
    return Verdict(status, time.monotonic() - start, table.name, about, found, detail)


def see_pass(table: Table, copy: Copy) -> Verdict:
    """Run every test of a table with nothing changed."""
    start = time.monotonic()
    names = sorted(_here(table, {name for guard in table.guards for name in guard.fails}, copy))
    found = copy.run(table.tests, names) if names else {}
    bad = [name for name in names if name not in found or found[name].failed or not found[name].passed]
    status, detail = ("FAILED", f"does not pass: {', '.join(bad)}") if bad else ("passed", "")
    about = f"{len(names)} tests, nothing changed"
    return Verdict(status, time.monotonic() - start, table.name, about, found, detail)


def _here(table: Table, names: Iterable[str], copy: Copy) -> list[str]:
    """Choose the tests that this machine can run."""
    known = marks(ROOT / table.tests)
    return [name for name in names if copy.gpu or "gpu" not in known.get(name, ())]


def verdicts(tasks: list[Callable[[Copy], Verdict]], copies: list[Copy]) -> Iterator[Verdict]:
    """Do every task, each with a copy that no other has meanwhile; give what comes out as it comes."""
    free: SimpleQueue[Copy] = SimpleQueue()
    for copy in copies:
        free.put(copy)

    def work(task: Callable[[Copy], Verdict]) -> Verdict:
        copy = free.get()
        try:
            return task(copy)
        finally:
            free.put(copy)

    with ThreadPoolExecutor(len(copies)) as pool:
        for done in as_completed([pool.submit(work, task) for task in tasks]):
            yield done.result()


def unseen(done: list[Verdict]) -> list[str]:
    """Name the cases that passed with nothing changed and were not seen to fail under any guard of theirs."""
    failed = {(v.table, case) for v in done for each in v.found.values() for case in each.seen}
    lines = []
    for v in (v for v in done if v.status == "passed"):
        for test, each in v.found.items():
            left = [case for case in each.passed if (v.table, case) not in failed]
            some = ", ".join(case.removeprefix(test) for case in left[:4]) + (", ..." if left[4:] else "")
            count = f"{len(left)} of {len(each.passed)}"
            lines += [f"{v.table}  {test}: {count} cases: {some}"] if left else []
    return lines
