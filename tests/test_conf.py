"""conf/ against the code: every constructor argument is listed with its default, and everything composes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

import lightning_prune.commands  # noqa: F401  registers the resolver of the schedules
from lightning_prune.commands.spaces import Range, read_search
from lightning_prune.options import PruningOptions
from lightning_prune.training.account import settings_of
from lightning_prune.training.callback import StructuredPruning

CONF = Path(__file__).parent.parent / "conf"
GROUPS = {
    folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
    for folder in CONF.iterdir()
    if folder.is_dir() and folder.name != "hydra"
}
OF_ITS_OWN = {"model=timm": {"name"}}  # arguments without a default
CHOICES = [f"{group}={name}" for group, names in GROUPS.items() for name in names]


# Recipes that are made for data of the user's own.
BRING_DATA = {
    f"experiment={f.stem}" for f in (CONF / "experiment").glob("*.yaml") if "/data: ???" in f.read_text()
}


def _compose(*overrides: str) -> DictConfig:
    overrides = (*overrides, *(["data=digits"] if BRING_DATA & set(overrides) else []))
    with initialize_config_module("lightning_prune.conf", version_base="1.3"):
        return compose("prune", overrides=["run_dir=.", *overrides])


def _nodes(value: Any) -> Iterator[dict[str, Any]]:
    """Give every mapping with a _target_, however deep."""
    if isinstance(value, dict):
        if "_target_" in value:
            yield value
        for item in value.values():
            yield from _nodes(item)


def _defaults(cls: type) -> dict[str, Any]:
    parameters = inspect.signature(cls).parameters
    return {
        name: p.default
        for name, p in parameters.items()
        if p.kind is p.POSITIONAL_OR_KEYWORD or p.kind is p.KEYWORD_ONLY
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def test_the_groups_are_those_that_the_manual_names() -> None:
    groups = {"model", "data", "trainer", "pruning", "logger", "callbacks", "experiment", "hparams_search"}
    assert set(GROUPS) == groups
    assert {"resnet", "vit"} <= set(GROUPS["model"])
    assert {"default", "none", "vit_heads"} <= set(GROUPS["pruning"])
    assert {"csv", "none", "tensorboard", "wandb"} <= set(GROUPS["logger"])


@pytest.mark.parametrize("choice", CHOICES)
def test_every_file_composes_and_names_what_exists(choice: str) -> None:
    cfg = OmegaConf.to_container(_compose(choice), resolve=True)
    nodes = list(_nodes(cfg))
    for node in nodes:
        known = set(inspect.signature(get_object(node["_target_"])).parameters)
        extra = set(node) - known - {"_target_", "_convert_"}
        takes_any = "kwargs" in known
        assert takes_any or not extra, f"{node['_target_']} takes no {extra}"
    assert all(
        node["_convert_"] == "all"
        for node in nodes
        if not node["_target_"].startswith("lightning_prune.models.R")
        and not node["_target_"].startswith("lightning_prune.models.V")
    )


@pytest.mark.parametrize(
    ("choice", "path"),
    [
        ("model=resnet", "model"),
        ("model=resnet", "model.net"),
        ("model=vit", "model"),
        ("model=vit", "model.net"),
        ("model=timm", "model.net"),
        ("data=digits", "data"),
        ("pruning=default", "pruning"),
    ],
)
def test_our_classes_are_listed_argument_by_argument_with_their_defaults(choice: str, path: str) -> None:
    node = OmegaConf.to_container(OmegaConf.select(_compose(choice), path), resolve=True)
    defaults = _defaults(get_object(node["_target_"]))
    listed = {key: value for key, value in node.items() if key not in {"_target_", "_convert_"}}
    assert set(listed) == set(defaults)
    for name in set(listed) - {"net", "options"} - OF_ITS_OWN.get(choice, set()):
        assert listed[name] == _plain(defaults[name]), name


def test_the_record_of_a_run_holds_every_setting() -> None:
    settings = settings_of(StructuredPruning(distillation={}, options={"round_to": 8}))
    assert set(settings) == set(inspect.signature(StructuredPruning).parameters)
    assert settings["options"]["round_to"] == 8
    assert settings["distillation"]["temperature"] == 4.0


def test_the_options_are_listed_field_by_field_with_their_defaults() -> None:
    listed = OmegaConf.to_container(_compose("pruning=default").pruning.options)
    defaults = {
        field.name: field.default if field.default is not MISSING else field.default_factory()
        for field in fields(PruningOptions)
    }
    assert listed == {name: _plain(value) for name, value in defaults.items()}


@pytest.mark.parametrize(
    "file", sorted(CONF.rglob("*.yaml")), ids=lambda file: file.relative_to(CONF).as_posix()
)
def test_values_carry_a_comment(file: Path) -> None:
    if file.parent.name in {"hydra", "experiment"}:
        return
    lines = file.read_text(encoding="utf-8").splitlines()
    for line in lines:
        value = re.match(r"\s*(?!_|- )\w+: (?!\$\{run_dir\})(.+)", line)
        speaks_for_itself = value and re.search(r"project:|seed: \$", line)
        assert not value or "#" in line or speaks_for_itself, (
            f"{file.name}: no unit, range or meaning: {line}"
        )


@pytest.mark.parametrize("name", [name for name in GROUPS["pruning"] if name != "none"])
def test_pruning_files_make_a_callback_with_plain_values(name: str) -> None:
    callback = instantiate(_compose(f"pruning={name}", "model=vit").pruning)
    assert isinstance(callback, StructuredPruning)
    assert isinstance(callback.options, PruningOptions)
    assert not any(
        OmegaConf.is_config(getattr(callback.options, field.name)) for field in fields(PruningOptions)
    )


@pytest.mark.parametrize(
    ("epochs", "expected"), [(30, (3, 9, 6)), (3, (1, 1, 1)), (1, (1, 1, 1)), (10, (1, 3, 2))], ids=str
)
def test_the_schedule_follows_the_number_of_epochs(epochs: int, expected: tuple[int, int, int]) -> None:
    pruning = _compose(f"trainer.max_epochs={epochs}").pruning
    assert (pruning.sparse_start_epoch, pruning.start_epoch, pruning.iterative_steps) == expected


@pytest.mark.parametrize("name", GROUPS["hparams_search"])
@pytest.mark.parametrize("epochs", [1, 3, 30])
def test_searches_vary_what_the_configuration_has(name: str, epochs: int) -> None:
    search = read_search(_compose(f"hparams_search={name}", f"trainer.max_epochs={epochs}"))
    paths = {dimension.path for dimension in search.space}
    assert {"model.lr", "pruning.start_epoch", "pruning.options.reg", "pruning.options.round_to"} <= paths
    assert ("pruning.options.budget.macs" in paths) == (name == "tradeoff")
    assert ("pruning.pruning_ratio" in paths) == (name == "ratio")
    assert search.name == name
    last = {d.path: d.high for d in search.space if isinstance(d, Range)}
    cuts_end = last["pruning.start_epoch"] + last["pruning.iterative_steps"]
    assert cuts_end <= max(epochs, 2), "the last cut would come after the last epoch"


def test_several_loggers_can_be_chosen() -> None:
    assert set(_compose("logger=[csv,tensorboard]").logger) == {"csv", "tensorboard"}


def test_the_empty_choices_are_empty() -> None:
    cfg = _compose("pruning=none", "logger=none", "callbacks=none")
    assert not cfg.pruning
    assert not cfg.logger
    assert not cfg.callbacks
