"""What a search varies and what it aims at, read from ``hparams_search`` and checked before any training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeAlias

from omegaconf import DictConfig, OmegaConf

from lightning_prune.commands.words import keys_of
from lightning_prune.errors import OptionError

__all__ = ["GROUP", "Choices", "Dimension", "Range", "Search", "read_search", "without_search"]

Direction: TypeAlias = Literal["maximize", "minimize"]
DIRECTIONS = ("maximize", "minimize")
RANGE, CHOICES = {"low", "high", "log", "step"}, {"choices"}
PLAIN = (bool, int, float, str)
GROUP = "hparams_search"
TYPES: tuple[tuple[str, type, str], ...] = (
    ("name", str, "a name, in quotes where it is a number"),
    ("folder", str, "the path of a folder"),
    ("median_stopper", bool, "true or false"),
    ("space", dict, "a table of what is varied, such as {model: {lr: {low: 0.001, high: 0.01}}}"),
)


@dataclass(frozen=True)
class Range:
    """Numbers that a search draws from.

    Args:
        path: Of a value, such as ``pruning.options.reg``.
        low: Smallest number; a whole one together with a whole ``high`` gives whole numbers.
        high: Largest number, >= low.
        log: Whether small numbers are drawn as densely as large ones; needs low > 0.
        step: Distance between numbers, > 0; None = any, or 1 for whole numbers.

    Raises:
        OptionError: If this is no range.

    >>> Range("pruning.start_epoch", 1, 5).is_whole, Range("model.lr", 0.001, 0.01, log=True).is_whole
    (True, False)
    """

    path: str
    low: float
    high: float
    log: bool = False
    step: float | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        name = f"the search space of {self.path}"
        numbers = {"low": self.low, "high": self.high, "step": 1 if self.step is None else self.step}
        for key, value in numbers.items():
            if not _is_number(value):
                raise OptionError(f"{name} has {key}={value!r}, which is no number")
        if self.low > self.high:
            raise OptionError(f"{name} has low={self.low} above high={self.high}")
        if numbers["step"] <= 0:
            raise OptionError(f"{name} has step={self.step}; it must be > 0")
        if not isinstance(self.log, bool):
            raise OptionError(f"{name} has log={self.log!r}; it is true or false")
        if self.log and (self.low <= 0 or self.step is not None):
            raise OptionError(f"{name} has log=true, which needs low > 0 and no step")

    @property
    def is_whole(self) -> bool:
        """Whether the numbers are whole."""
        return all(isinstance(n, int) for n in (self.low, self.high, 1 if self.step is None else self.step))


@dataclass(frozen=True)
class Choices:
    """Values that a search chooses from.

    Args:
        path: Of a value, or of a group of files, such as ``pruning``.
        values: Plain values, at least one.

    Raises:
        OptionError: If a value is not plain.
    """

    path: str
    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        """Check the values."""
        for value in self.values:
            if value is not None and not isinstance(value, PLAIN):
                raise OptionError(
                    f"the search space of {self.path} has the choice {value!r}; a choice is a plain value"
                )


Dimension: TypeAlias = Range | Choices


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True)
class Search:
    """Everything that ``hparams_search`` says.

    Args:
        name: Of the study.
        folder: Where everything is kept.
        n_trials: Trials in all, >= 1.
        objectives: Metric -> "maximize" or "minimize", at least one.
        space: What is varied, at least one dimension.
        startup_trials: Trials drawn at random before the sampler learns from them, >= 1.
        median_stopper: Whether a trial that is worse than the median of the others ends early.
    """

    name: str
    folder: Path
    n_trials: int
    objectives: Mapping[str, str]
    space: tuple[Dimension, ...]
    startup_trials: int = 8
    median_stopper: bool = True
    described: Mapping[str, Any] = field(default_factory=dict, compare=False)  # the space as it was written

    @property
    def directions(self) -> tuple[Direction, ...]:
        """What is wanted of each objective."""
        return tuple("maximize" if way == "maximize" else "minimize" for way in self.objectives.values())

    @property
    def stops_early(self) -> bool:
        """Whether trials may end early: Optuna compares them by one objective only."""
        return self.median_stopper and len(self.objectives) == 1


def read_search(cfg: DictConfig, typed: Sequence[str] = ()) -> Search:
    """Read ``hparams_search`` of a composed configuration.

    Args:
        cfg: The whole configuration; what the space varies must be in it.
        typed: The words of the command line; none may set what the space varies.

    Raises:
        OptionError: If something is unknown, missing or out of range.
    """
    content = OmegaConf.to_container(cfg[GROUP], resolve=True)
    assert isinstance(content, dict)
    known = ("name", "folder", "n_trials", "objectives", "space", "startup_trials", "median_stopper")
    for key in content:
        if key not in known:
            raise OptionError(f"{GROUP} has no key {key!r}; the nearest is {_nearest(str(key), known)}")
    for key in known[:5]:
        if key not in content:
            raise OptionError(f"{GROUP} lacks {key!r}; see conf/hparams_search/accuracy.yaml")
    for key in ("n_trials", "startup_trials"):
        value = content.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise OptionError(f"{GROUP}.{key}={value} was asked for; it is a whole number, at least 1")
    for key, kind, words in TYPES:
        if not isinstance(content.get(key, kind()), kind):
            raise OptionError(f"{GROUP}.{key}={content[key]} was asked for; it is {words}")
    space = tuple(_dimensions(content["space"], ""))
    _check_space(space, cfg, typed)
    read = {
        "folder": Path(content["folder"]),
        "objectives": _objectives(content["objectives"]),
        "space": space,
        "described": content["space"],
    }
    return Search(**{**content, **read})


def without_search(cfg: DictConfig) -> DictConfig:
    """Give what remains of a configuration without the search and without its folder.

    >>> without_search(OmegaConf.create({"seed": 0, "run_dir": ".", "hparams_search": {"n_trials": 3}}))
    {'seed': 0}
    """
    return OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key not in (GROUP, "run_dir")])


def _objectives(lines: Any) -> dict[str, str]:
    """Read lines such as ``maximize val/acc``."""
    found: dict[str, str] = {}
    for line in lines if isinstance(lines, list) and lines else [lines]:
        direction, _, metric = str(line).partition(" ")
        if direction not in DIRECTIONS or not metric.strip():
            raise OptionError(
                f"{GROUP}.objectives={lines} was asked for; it is a list of `maximize metric` and "
                "`minimize metric`, such as [maximize val/acc]"
            )
        found[metric.strip()] = direction
    return found


def _dimensions(node: Mapping[str, Any], above: str) -> Iterator[Dimension]:
    for key, value in node.items():
        path = f"{above}.{key}" if above else str(key)
        if not isinstance(value, Mapping):
            raise OptionError(
                f"the search space has {path}: {value!r}; give {{low, high}} or {{choices}}, "
                f"`~{GROUP}.space.{path}` takes it out"
            )
        if set(value) & (CHOICES | {"low", "high"}):
            yield _dimension(path, value)
        else:
            yield from _dimensions(value, path)


def _dimension(path: str, node: Mapping[str, Any]) -> Dimension:
    for key in node:
        if key not in (CHOICES if "choices" in node else RANGE):
            raise OptionError(
                f"the search space of {path} has an unknown {key!r}; it takes low and high with log or step, "
                "or choices"
            )
    if "choices" in node:
        if not isinstance(node["choices"], list) or not node["choices"]:
            raise OptionError(f"the search space of {path} has choices={node['choices']!r}; give a list")
        return Choices(path, tuple(node["choices"]))
    if not {"low", "high"} <= set(node):
        raise OptionError(f"the search space of {path} is {dict(node)}; a range needs low and high")
    return Range(path, **node)


def _check_space(space: Sequence[Dimension], cfg: DictConfig, typed: Sequence[str]) -> None:
    """Everything varied must exist, and nobody else may set it."""
    if not space:
        raise OptionError(f"{GROUP}.space is empty, so there is nothing to search")
    set_by_hand = keys_of(typed)
    for dimension in space:
        path = dimension.path
        _check_path(path, cfg)
        if path in set_by_hand:
            raise OptionError(
                f"{path} was typed, and the search varies it; `'~{GROUP}.space.{path}'` takes it out of the "
                "search"
            )


def _check_path(path: str, cfg: DictConfig) -> None:
    above, _, key = path.rpartition(".")
    parent = OmegaConf.select(cfg, above) if above else cfg
    if OmegaConf.is_config(parent) and key in parent:
        return
    known = [k for k in _paths(cfg) if k.partition(".")[0] != GROUP]
    raise OptionError(
        f"the search space varies {path}, which the configuration does not have; "
        f"the nearest is {_nearest(path, known)}"
    )


def _paths(node: DictConfig, above: str = "") -> Iterator[str]:
    for key in map(str, node):
        path = f"{above}.{key}" if above else key
        yield path
        child = None if OmegaConf.is_missing(node, key) else node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none():
            yield from _paths(child, path)


def _nearest(word: str, known: Sequence[str]) -> str:
    return ", ".join(get_close_matches(word, known, n=3, cutoff=0.0))
