"""A private copy of the tree: one line is taken out, the tests that guard it run, the line is put back."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from guards.tables import ROOT, Guard

SERVER = Path(__file__).with_name("server.py")
_SENSELESS = re.compile(
    r"\b(SyntaxError|IndentationError|ImportError|ModuleNotFoundError|NameError|UnboundLocalError): "
)


@dataclass(frozen=True)
class Found:
    """What became of one test.

    Args:
        passed: Its cases that passed, by their whole names.
        failed: Those that failed, each with what it said.
    """

    passed: tuple[str, ...] = ()
    failed: tuple[tuple[str, str], ...] = ()

    @property
    def seen(self) -> set[str]:
        """Cases that failed by an assertion or an error, not because the code makes no sense any more."""
        return {case for case, said in self.failed if not _SENSELESS.search(said)}


class Copy:
    """A copy of the tree's own files, in which one file at a time is another.

    Args:
        folder: Where it lies; empty.
        gpu: Whether to run the tests that need a GPU.
    """

    def __init__(self, folder: Path, *, gpu: bool = False) -> None:
        self.folder, self.gpu = folder, gpu
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        for name in filter(None, listed.stdout.split("\0")):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, folder / name)
        self._server = _serve(folder)

    @contextmanager
    def changed(self, guard: Guard) -> Iterator[None]:
        """Have the other line in its file for a while.

        Raises:
            StaleError: If the line is not there, or is there several times.
        """
        path, text = self.folder / guard.file, guard.changed(self.folder)
        before = path.read_text(encoding="utf-8")
        _put(path, text)
        try:
            yield
        finally:
            _put(path, before)

    def run(self, file: Path, names: Iterable[str]) -> dict[str, Found]:
        """Run tests of one file by name, whatever their marks.

        Args:
            file: Path of the test file below the root.
            names: ``test_name`` or ``TestClass::test_name``.

        Raises:
            TimeoutError: If they take too long.
        """
        report = self.folder / "guards-report.xml"
        report.unlink(missing_ok=True)
        options = ["-n", "0", "-p", "no:cacheprovider", "-m", "" if self.gpu else "not gpu"]
        arguments = [*options, f"--junitxml={report}", *(f"{file}::{name}" for name in names)]
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(arguments) + "\n")
        self._server.stdin.flush()
        if (answer := self._server.stdout.readline().strip()) != "done":
            raise TimeoutError if answer == "late" else RuntimeError("the server of tests has ended")
        return outcomes(report) if report.exists() else {}

    def close(self) -> None:
        """End the server."""
        self._server.communicate()


def _put(path: Path, text: str) -> None:
    """Write a file, and a second later than before: bytecode is known by time and length of its source."""
    before = path.stat().st_mtime
    path.write_text(text, encoding="utf-8")
    os.utime(path, (before + 1, before + 1))


def _serve(folder: Path) -> subprocess.Popen[str]:
    """Start a server of test runs in a tree."""
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, str(SERVER)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def outcomes(report: Path) -> dict[str, Found]:
    """Read a JUnit report, by test; a file that could not be collected has no tests in it."""
    found: dict[str, Found] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        if not (place := case.get("classname")):  # tests.test_x.TestClass
            continue
        whole = "::".join([*place.split(".")[2:], case.get("name", "")])
        said = " ".join(c.get("message", "") for c in case if c.tag in {"failure", "error"}).split()
        before = found.setdefault(name := whole.partition("[")[0], Found())
        passed, failed = (whole,) * (len(case) == 0), ((whole, " ".join(said)),) * bool(said)
        found[name] = Found(before.passed + passed, before.failed + failed)
    return found
