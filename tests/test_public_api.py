"""The names a user imports: complete, sorted, there, documented."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
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


def test_every_public_name_of_the_package_is_listed() -> None:
    found = {
        name
        for name, value in vars(lightning_prune).items()
        if not name.startswith("_") and not inspect.ismodule(value) and name != "annotations"
    }
    assert found == set(lightning_prune.__all__) - {"__version__"}


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
    for public in set(lightning_prune.__all__) - {"__version__"}:
        value = getattr(lightning_prune, public)
        home = getattr(value, "__module__", "lightning_prune")
        assert home.startswith("lightning_prune"), f"{public} comes from {home}: it is not ours to export"
