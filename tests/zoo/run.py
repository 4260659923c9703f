"""Judge cases from the command line: ``python tests/zoo/run.py 'timm/*vit*' [--jobs 2] [--board FOLDER]``."""

from __future__ import annotations

import argparse
import sys
import threading
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from queue import Empty, SimpleQueue
from tempfile import TemporaryDirectory

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder: its names are plain words
from zoo.operators import import_torchvision  # noqa: E402

import_torchvision()  # lightning imports it where it finds one, so it comes first

from zoo.board import Board  # noqa: E402
from zoo.catalogue import matching  # noqa: E402
from zoo.judge import Verdict  # noqa: E402
from zoo.server import Server  # noqa: E402

HEADING = f"{'case':48} {'status':10} {'left':>5} {'seconds':>8}  (analysis, cut)"


def line(v: Verdict) -> str:
    """One line of the table."""
    share = v.after / v.before if v.before else 1.0
    unknown = f" unknown: {v.unknown[0]} (+{len(v.unknown) - 1})" if v.unknown else ""
    seconds = f"{v.total:8.1f}  ({v.analysis:.1f}, {v.cut:.1f})"
    return f"{v.name:48} {v.status:10} {share:5.2f} {seconds}  {v.detail[:150]}{unknown}"


class Run:
    """Judges names one after the other in several processes, and says each verdict as it comes.

    Args:
        names: The cases.
        trace: Whether to print the last frames of errors.
    """

    def __init__(self, names: list[str], *, trace: bool) -> None:
        self.todo: SimpleQueue[str] = SimpleQueue()
        for name in names:
            self.todo.put(name)
        self.count, self.trace = len(names), trace
        self.found: Counter[str] = Counter()
        self._lock = threading.Lock()

    def work(self, board: Board) -> None:
        """Take names until there are none."""
        while True:
            try:
                name = self.todo.get_nowait()
            except Empty:
                return
            self._say(board.verdict(name))

    def _say(self, v: Verdict) -> None:
        with self._lock:
            self.found[v.status] += 1
            place = f"[{self.found.total():3}/{self.count}]"
            sys.stdout.write(f"{place} {line(v)}\n" + "".join(f"      {t}\n" for t in v.trace if self.trace))
            sys.stdout.flush()


def main() -> None:
    """Run what matches and print a table; verdicts that the board holds already are not judged again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("globs", nargs="*")
    parser.add_argument("--board", type=Path, help="folder of verdicts, kept for the next run")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--trace", action="store_true", help="print the last frames of errors")
    parser.add_argument("--reasons", action="store_true", help="have what stays explained")
    given = parser.parse_args()
    run = Run(matching(given.globs), trace=given.trace)
    with ExitStack() as stack:
        folder = given.board or Path(stack.enter_context(TemporaryDirectory()))
        servers = [stack.enter_context(Server(reasons=given.reasons)) for _ in range(given.jobs)]
        boards = [Board(folder, server) for server in servers]
        boards[0].forget_claims()
        sys.stdout.write(f"{'':9} {HEADING}\n")
        threads = [threading.Thread(target=run.work, args=(board,)) for board in boards]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    sys.stdout.write(", ".join(f"{n} {status}" for status, n in run.found.most_common()) + "\n")


if __name__ == "__main__":
    main()
