"""What a search has found: a table, a picture, and the best settings as a configuration that runs."""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable
from importlib.resources import files
from io import BytesIO, StringIO
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from lightning_prune.commands.configuring import CONF, PRIMARY
from lightning_prune.commands.spaces import GROUP, Search, without_search
from lightning_prune.commands.studies import REFUSED, counted, finished, front
from lightning_prune.commands.words import words_of
from lightning_prune.files import write_whole
from lightning_prune.reporting.pictures.search import Tried, search_figure
from lightning_prune.reporting.pictures.style import styled

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

__all__ = ["conclude", "write_findings"]

BEST = "best"
KEPT_BY_THE_RUN = ("experiment", "hydra", "local", GROUP)
log = logging.getLogger(__name__)


def write_findings(study: Study, search: Search, compose: Callable[..., DictConfig]) -> None:
    """Write trials.csv and the best settings; whatever moment the search ends, they are whole.

    Args:
        study: With any number of trials.
        search: What was searched.
        compose: Words -> the configuration of a run.
    """
    write_whole(search.folder / "trials.csv", _table(study, search).encode())
    folder = search.folder / BEST / "experiment"
    folder.mkdir(parents=True, exist_ok=True)
    best = {_name(trial, search): trial for trial in front(study)}
    for name, trial in best.items():
        cfg = compose(*words_of(trial.params), is_trial=False)
        write_whole(folder / f"{name}.yaml", _as_experiment(trial, search, cfg, name).encode())
    for old in folder.glob("*.yaml"):
        if old.stem not in best:
            old.unlink()


def conclude(study: Study, search: Search) -> None:
    """Draw the search, and say what was found and how to run it."""
    _draw(study, search)
    best = front(study)
    done, refused = len(finished(study)), sum(REFUSED in t.user_attrs for t in counted(study))
    stopped = len(counted(study)) - done - refused
    print(f"Trials: {done} finished, {stopped} stopped early, {refused} refused.")
    for trial in best:
        values = ", ".join(f"{n} {v:.6g}" for n, v in zip(search.objectives, trial.values, strict=True))
        print(f"\ntrial {trial.number}: {values}")
        print(*(f"  {word}" for word in words_of(trial.params)), sep="\n")
        print(f"  lightning-prune --config-dir {search.folder / BEST} experiment={_name(trial, search)}")
    print(f"\nThe table is {search.folder / 'trials.csv'}, each trial is in {search.folder / 'trials'}.")


def _name(trial: FrozenTrial, search: Search) -> str:
    return BEST if len(search.objectives) == 1 else f"trial_{trial.number}"


def _as_experiment(trial: FrozenTrial, search: Search, cfg: DictConfig, name: str) -> str:
    """Write the whole configuration as a file of the group ``experiment``, which leans on no other file."""
    values = ", ".join(f"{n} {v:.6g}" for n, v in zip(search.objectives, trial.values, strict=True))
    return "\n".join(
        [
            "# @package _global_",
            f"# lightning-prune --config-dir {search.folder / BEST} experiment={name}",
            f"# Trial {trial.number} of the search {search.name}: {values}.",
            "defaults:",
            *(f"  - override /{group}: null" for group in _groups()),
            "  - _self_",
            "",
            OmegaConf.to_yaml(without_search(cfg)),
        ]
    )


def _groups() -> list[str]:
    """List the groups of files of which a run takes one, from the primary configuration."""
    primary = OmegaConf.create((files(CONF) / f"{PRIMARY}.yaml").read_text(encoding="utf-8"))
    entries = [OmegaConf.to_container(entry) for entry in primary.defaults if OmegaConf.is_dict(entry)]
    names = [str(next(iter(entry))).removeprefix("optional ") for entry in entries if isinstance(entry, dict)]
    return [name for name in names if name not in KEPT_BY_THE_RUN]


def _table(study: Study, search: Search) -> str:
    text = StringIO()
    paths = [dimension.path for dimension in search.space]
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["trial", "state", *search.objectives, *paths, "reason"])
    for trial in study.get_trials(deepcopy=False):
        state = REFUSED if REFUSED in trial.user_attrs else trial.state.name.lower()
        state = {"fail": "interrupted", "pruned": "stopped early"}.get(state, state)
        values = trial.values or [""] * len(search.objectives)
        params = [trial.params.get(path, "") for path in paths]
        table.writerow([trial.number, state, *values, *params, trial.user_attrs.get(REFUSED, "")])
    return text.getvalue()


def _draw(study: Study, search: Search) -> None:
    best = {trial.number for trial in front(study)}
    tried = []
    for trial in counted(study):
        if trial.values or trial.intermediate_values:
            last = [trial.intermediate_values[max(trial.intermediate_values)]] if not trial.values else []
            values = tuple(trial.values or last)
            tried.append(Tried(trial.number, values, trial.number in best, was_stopped=bool(last)))
    if not tried:
        return
    picture = BytesIO()
    try:
        with styled():
            figure = search_figure(tried, list(search.objectives), list(search.objectives.values()))
            figure.savefig(picture, dpi=150)
    except ImportError:
        log.warning("No picture: matplotlib is not installed. `pip install 'lightning-prune[tune]'` adds it.")
        return
    write_whole(search.folder / "search.png", picture.getvalue())
