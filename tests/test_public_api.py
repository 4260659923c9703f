"""The names a user imports: complete, sorted, there, documented."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import lightning_prune

# conf/ holds YAML files.
MODULES = sorted(
    info.name
    for info in pkgutil.walk_packages([str(Path(lightning_prune.__file__).parent)], "lightning_prune.")
    if info.name.rpartition(".")[2] not in {"__main__", "conf"}
)


def _load(name: str) -> ModuleType:
    return importlib.import_module(name)


def _by_kind(name: str) -> tuple[bool, bool, str]:
    return not name.isupper(), name[0].islower() or name[0] == "_", name


def _seen_by_checkers() -> dict[str, str]:
    """Public name -> module, as type checkers and editors read it."""
    tree = ast.parse(Path(lightning_prune.__file__).read_text(encoding="utf-8"))
    return {
        alias.name: node.module
        for block in tree.body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
        for alias in node.names
    }


def test_every_public_name_of_the_package_is_listed() -> None:
    assert set(_seen_by_checkers()) == set(lightning_prune.__all__)


def test_a_public_name_is_what_checkers_take_it_for() -> None:
    for name, home in _seen_by_checkers().items():
        assert getattr(lightning_prune, name) is getattr(_load(home), name)


def test_checkers_know_that_other_names_are_wrong() -> None:
    """To them a module with a ``__getattr__`` has every name."""
    tree = ast.parse(Path(lightning_prune.__file__).read_text(encoding="utf-8"))
    seen = [node for node in tree.body if ast.unparse(node).partition("\n")[0] != "if not TYPE_CHECKING:"]
    defined = {each.name for node in seen for each in ast.walk(node) if isinstance(each, ast.FunctionDef)}
    assert "__getattr__" not in defined
    assert "__getattr__" in vars(lightning_prune)


def test_a_name_that_is_not_ours_is_an_error() -> None:
    with pytest.raises(AttributeError, match="'lightning_prune' has no attribute 'StructuredPruner'"):
        _ = lightning_prune.StructuredPruner
    with pytest.raises(ImportError, match="cannot import name 'StructuredPruner' from 'lightning_prune'"):
        from lightning_prune import StructuredPruner  # noqa: F401


LOOK = """
import sys
before = set(sys.modules)
import lightning_prune.__main__
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))
print(*sorted(set(lightning_prune.__all__) - set(dir(lightning_prune))))
from lightning_prune import *
print(GroupNormPruner.__name__)
"""


def test_nothing_heavy_is_loaded_before_a_name_is_asked_for() -> None:
    """Else Ctrl-C in the first seconds of a command would be Python's to answer."""
    shown = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, check=True).stdout
    assert shown.splitlines() == ["lightning_prune", "", "GroupNormPruner"]


def test_the_essentials_are_public() -> None:
    essentials = {"GroupNormPruner", "Plan", "PruneError", "PruningOptions", "StructuredPruning", "apply"}
    assert essentials | {"load_from_checkpoint"} <= set(lightning_prune.__all__)


def test_every_error_is_public() -> None:
    errors = _load("lightning_prune.errors")
    assert set(errors.__all__) <= set(lightning_prune.__all__)


@pytest.mark.parametrize("name", ["lightning_prune", *MODULES])
def test_all_is_sorted_importable_and_documented(name: str) -> None:
    module = _load(name)
    assert module.__doc__, f"{name} has no docstring"
    listed = getattr(module, "__all__", [])
    assert len(listed) == len(set(listed)), f"{name}.__all__ holds a name twice"
    assert listed == sorted(listed, key=_by_kind), (
        f"{name}.__all__ is not sorted: CONSTANTS, Classes, functions"
    )
    for public in listed:
        value = getattr(module, public)  # AttributeError: listed, but not there
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), f"{name}.{public} has no docstring"


def test_the_package_names_the_module_a_public_object_comes_from() -> None:
    for public in lightning_prune.__all__:
        value = getattr(lightning_prune, public)
        home = getattr(value, "__module__", "lightning_prune")
        assert home.startswith("lightning_prune"), f"{public} comes from {home}: it is not ours to export"
