"""Remove each guarded line and see its tests fail: ``python tests/guards/run.py 'test_check*' [--jobs 2]``.

A guard is *killed* when each of its tests fails in at least one case; all else makes the exit code 1.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, closing
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path[0] = str(Path(__file__).resolve().parents[1])  # as for the tests, where these are ``guards``
from guards.copies import Copy  # noqa: E402
from guards.judging import FINE, Verdict, judge, see_pass, unseen, verdicts  # noqa: E402
from guards.tables import Table, faults, tables  # noqa: E402


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
