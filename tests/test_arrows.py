"""Imports point one way: from the callback and the command line down to the plan, never back."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lightning_prune"

# Lowest first. A module imports only from lower lines: those of one line are siblings, which never meet. The
# files of a folder may import one another. A module or folder that is not here needs a place.
RANKS = (
    {"errors", "leaving"},
    {"plan", "options", "files", "randomness"},
    {"surgery"},  # its patches tell tracing which layers have an equal forward
    {"tracing"},
    {"graph"},
    {"scores", "selection", "measuring"},
    {"budgets"},
    {"vetting", "prospect"},
    {"pruner", "checkpoint", "metrics", "reporting"},
    {"pretrained"},
    {"models", "data", "sensitivity"},  # the first two of the demo
    {"training"},
    {"commands"},
    {"__init__", "__main__"},
)
RANK = {module: rank for rank, modules in enumerate(RANKS) for module in modules}

# Who may import a library; those of LAZY inside functions alone (or for types), never with the package.
LIGHTNING = {"training", "models", "data", "commands"}
LIBRARIES = {
    "lightning": LIGHTNING,
    "lightning_utilities": LIGHTNING,
    "hydra": {"commands"},
    "omegaconf": {"commands"},
    "optuna": {"commands"},
    "filelock": {"commands"},
    "rich": {"reporting"},
    "matplotlib": {"reporting"},
}
LAZY = {"rich", "matplotlib", "optuna", "filelock"}

FILES = sorted(PACKAGE.rglob("*.py"))


def _module(dotted: str) -> str:
    """Return the first name below the package: ``lightning_prune.tracing.labels`` -> ``tracing``."""
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def _imports(path: Path) -> Iterator[tuple[str, bool, int]]:
    """Yield (dotted name, whether loading the module runs it, line) of every import."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    later = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{path}:{node.lineno}: write the import in full"
            names = [node.module]
            if node.module == PACKAGE.name:  # `from lightning_prune import surgery`
                names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            yield name, id(node) not in later, node.lineno


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_downwards(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert own in RANK, f"{own} has no rank: give it a place in RANKS, or merge it where it is needed"
    for name, at_load, line in _imports(path):
        library, where = name.partition(".")[0], f"{path.relative_to(PACKAGE)}:{line} imports {name}"
        if library == PACKAGE.name:
            other = _module(name)
            if (PACKAGE / f"{other}.py").exists() or (PACKAGE / other).is_dir():
                assert other in RANK, f"{where}: {other} has no rank"
            elif other not in RANK:
                other = "__init__"  # a public name, taken from the top
            assert other == own or RANK[other] < RANK[own], f"{where}: an arrow upwards or between siblings"
        elif library in LIBRARIES:
            allowed = LIBRARIES[library]
            assert own in allowed, f"{where}: only {', '.join(sorted(allowed))} may"
            assert not (library in LAZY and at_load), f"{where}: import it inside the function that needs it"
