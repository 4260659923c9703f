"""Tables of guards: a line of the code, and the tests that must fail when something else stands in its place.

``tests/guards/test_x.toml`` belongs to ``tests/test_x.py`` and holds one ``[[guard]]`` for each such line.
"""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path("tests", "guards")


class StaleError(ValueError):
    """The line of a guard does not stand in its file exactly once."""


@dataclass(frozen=True)
class Guard:
    """One line, and who notices when it is gone.

    Args:
        file: Path below the root.
        line: Text that stands in the file exactly once.
        instead: What takes its place.
        fails: Tests that must fail then: ``test_name`` or ``TestClass::test_name``.
    """

    file: str
    line: str
    instead: str
    fails: tuple[str, ...]

    def changed(self, root: Path) -> str:
        """Give the text of the file with the other line in it.

        Raises:
            StaleError: If the line is not there, or is there several times.
        """
        path = root / self.file
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if (count := text.count(self.line)) != 1:
            raise StaleError(f"{self.file} holds it {count} times, not once: {self.line.strip()!r}")
        return text.replace(self.line, self.instead)


@dataclass(frozen=True)
class Table:
    """The guards of one test file, given by its name without the ending."""

    name: str
    guards: tuple[Guard, ...]

    @property
    def tests(self) -> Path:
        """Path of the test file below the root."""
        return Path("tests", f"{self.name}.py")

    @staticmethod
    def read(path: Path) -> Table:
        """Read a table; a field that is missing or unknown is an error of Python's own."""
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        guards = (Guard(**{**guard, "fails": tuple(guard["fails"])}) for guard in data.pop("guard"))
        if data:
            raise TypeError(f"{path.name}: only [[guard]] may stand there, found {', '.join(data)}")
        return Table(path.stem, tuple(guards))


def tables(root: Path = ROOT) -> list[Path]:
    """List the files of all tables."""
    return sorted((root / FOLDER).glob("*.toml"))


def marks(path: Path) -> dict[str, set[str]]:
    """Name the tests of a file, each with its own marks (``gpu``, ``multiprocess``)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {name: set(map(_mark, node.decorator_list)) for name, node in _tests(tree, "")}


def faults(table: Table, root: Path = ROOT) -> list[str]:
    """List what is wrong with a table without running anything: it need not be true, but it must be sound."""
    known = marks(root / table.tests)
    named = [test for guard in table.guards for test in guard.fails]
    return [
        *(fault for guard in table.guards for fault in _faults_of(guard, root)),
        *(f"{table.name} has no test {test}" for test in named if test not in known),
        *(f"{test} is in no guard: it was not seen to fail" for test in known if test not in named),
    ]


def _faults_of(guard: Guard, root: Path) -> Iterator[str]:
    if not guard.fails:
        yield f"no test is named for {guard.line.strip()!r}"
    try:
        text = guard.changed(root)
        ast.parse(text)
    except StaleError as error:
        yield str(error)
        return
    except SyntaxError as error:
        yield f"{guard.file} is no Python with {guard.instead.strip()!r}: {error}"
        return
    if guard.line == guard.instead:
        yield f"{guard.file} does not change: {guard.line.strip()!r}"


def _tests(parent: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in parent.body:
        if isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            yield from _tests(node, f"{prefix}{node.name}::")
        elif isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
            yield prefix + node.name, node


def _mark(decorator: ast.expr) -> str:
    return ast.unparse(decorator).removeprefix("pytest.mark.")
