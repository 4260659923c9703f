"""Remove each guarded line and see its tests fail: ``python tests/guards/run.py 'test_check*' [--jobs 2]``.

A guard is *killed* when each of its tests fails in at least one case; all else makes the exit code 1.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, closing
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory

sys.path[0] = str(Path(__file__).resolve().parents[1])  # as for the tests, where these are ``guards``
from guards.copies import Copy, Found  # noqa: E402
from guards.tables import ROOT, Guard, StaleError, Table, faults, marks, tables  # noqa: E402

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


def say(v: Verdict, place: str, *, reasons: bool) -> None:
    """Print a verdict."""
    lines = [
        f"{place} {v.status:8} {v.seconds:6.1f} s  {v.table}  {v.about}",
        *([v.detail] if v.detail else []),
    ]
    said = [each.failed[0] for each in v.found.values() if each.failed]
    lines += [f"{case}: {why[:160]}" for case, why in said if reasons or v.status not in FINE]
    sys.stdout.write("\n         ".join(lines) + "\n")
    sys.stdout.flush()


def unseen(done: list[Verdict]) -> list[str]:
    """Name the cases that passed with nothing changed and were not seen to fail under any guard of theirs."""
    cases = {(v.table, c) for v in done if v.status == "passed" for f in v.found.values() for c in f.passed}
    failed = {(v.table, c) for v in done for f in v.found.values() for c in f.seen}
    return [f"{table}  {case}" for table, case in sorted(cases - failed)]


def main() -> int:
    """Judge the guards of the tables that match."""
    parser = argparse.ArgumentParser(description="Remove each guarded line and see its tests fail.")
    parser.add_argument("globs", nargs="*", default=["*"], help="names of test files, without the ending")
    parser.add_argument(
        "--only", default="", help="guards alone that hold this text in a line or a test's name"
    )
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--gpu", action="store_true", help="run the tests that need a GPU, too")
    parser.add_argument("--reasons", action="store_true", help="say what each test failed with")
    given = parser.parse_args()
    chosen = [Table.read(p) for p in tables() if any(fnmatch(p.stem, glob) for glob in given.globs)]
    unsound = [fault for table in chosen for fault in faults(table)]
    sys.stdout.write("".join(f"UNSOUND  {fault}\n" for fault in unsound))
    tasks: list[Callable[[Copy], Verdict]] = [partial(see_pass, table) for table in chosen if not given.only]
    tasks += [partial(judge, t, g) for t in chosen for g in t.guards if given.only in f"{g.line} {g.fails}"]
    done: list[Verdict] = []
    with TemporaryDirectory() as folder, ExitStack() as stack:
        folders = [Path(folder, str(number)) for number in range(given.jobs)]
        copies = [stack.enter_context(closing(Copy(each, gpu=given.gpu))) for each in folders]
        for verdict in verdicts(tasks, copies):
            done.append(verdict)
            say(verdict, f"[{len(done):3}/{len(tasks)}]", reasons=given.reasons)
    left = unseen(done)
    sys.stdout.write("".join(f"no guard makes it fail: {case}\n" for case in left))
    count = Counter(verdict.status for verdict in done)
    sys.stdout.write(", ".join(f"{n} {status}" for status, n in count.most_common()) + "\n")
    return int(not chosen or bool(unsound) or bool(set(count) - FINE))


if __name__ == "__main__":
    sys.exit(main())
