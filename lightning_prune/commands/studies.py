"""The memory of a search: an Optuna study in SQLite that outlives Ctrl-C, kill and power cuts.

optuna is imported when a study is opened, so that only those who tune need it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lightning_prune.commands.spaces import Choices, Dimension, Search
from lightning_prune.errors import OptionError, PruneError

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

__all__ = ["REFUSED", "counted", "finished", "front", "give_up", "need_optuna", "opened", "refuse", "suggest"]

FILE = "study.db"
MADE_FOR = "made for"
REFUSED = "refused"


def need_optuna() -> None:
    """Say which extra brings the search.

    Raises:
        PruneError: If optuna is not installed.
    """
    if find_spec("optuna") is None:
        raise PruneError(
            "a search was asked for: it needs optuna, which is not installed; "
            "pip install 'lightning-prune[tune]'"
        )


@contextmanager
def opened(search: Search, config: Mapping[str, Any], *, seed: int) -> Iterator[Study]:
    """Open the study of a folder, or begin one; no other process may have it open.

    Args:
        search: What is searched.
        config: What every trial shares; a study goes on only with the same.
        seed: Of the sampler, >= 0.

    Raises:
        OptionError: If the study was made for something else, or is in use.
    """
    from filelock import FileLock, Timeout

    search.folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(search.folder / ".lock", timeout=0):
            yield _study(search, config, seed)
    except Timeout:
        raise OptionError(
            f"the search in {search.folder} is running already; wait for it, or choose another "
            "hparams_search.name"
        ) from None


def _study(search: Search, config: Mapping[str, Any], seed: int) -> Study:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = optuna.storages.RDBStorage(f"sqlite:///{search.folder / FILE}")
    study = optuna.create_study(
        study_name=search.name,
        storage=storage,
        directions=list(search.directions),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=search.startup_trials)
        if search.stops_early
        else optuna.pruners.NopPruner(),
        load_if_exists=True,
    )
    _check_same(study, search, config)
    # A sampler that starts again from its seed would draw the first trials once more.
    study.sampler = optuna.samplers.TPESampler(
        seed=seed + len(study.trials), n_startup_trials=search.startup_trials
    )
    _take_up(study)
    return study


def _check_same(study: Study, search: Search, config: Mapping[str, Any]) -> None:
    """A study goes on with what it was made for, or not at all: its trials would not compare."""
    wanted = _flat(
        {"objectives": dict(search.objectives), "space": search.described, "configuration": config}
    )
    wanted = json.loads(json.dumps(wanted))
    made_for = study.user_attrs.get(MADE_FOR)
    if made_for is None and not study.trials:
        study.set_user_attr(MADE_FOR, wanted)
        return
    made_for = made_for or {}
    for key in [*wanted, *made_for]:
        if wanted.get(key, "nothing") != made_for.get(key, "nothing"):
            was, now = made_for.get(key, "nothing"), wanted.get(key, "nothing")
            raise OptionError(
                f"the study in {search.folder} was made for another search: its {key} was {was}, now it "
                f"is {now}. Type the same command to go on with it, hparams_search.name=... to begin another "
                f"one, or remove {search.folder}"
            )


def _flat(node: Any, above: str = "") -> dict[str, Any]:
    if not isinstance(node, Mapping) or not node:
        return {above: node}
    found: dict[str, Any] = {}
    for key, value in node.items():
        found |= _flat(value, f"{above}.{key}" if above else str(key))
    return found


def _take_up(study: Study) -> None:
    """Queue what a killed process left unfinished, to be done again from its start."""
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.enqueue_trial(trial.params)
        study.tell(trial.number, state=TrialState.FAIL)


def suggest(trial: Trial, search: Search) -> dict[str, Any]:
    """Draw a value for every dimension, by its path."""
    return {one.path: _drawn(trial, one) for one in search.space}


def _drawn(trial: Trial, one: Dimension) -> Any:
    if isinstance(one, Choices):
        return trial.suggest_categorical(one.path, list(one.values))
    if one.is_whole:
        low, high, step = int(one.low), int(one.high), int(one.step or 1)
        return trial.suggest_int(one.path, low, high, log=one.log, step=step)
    return trial.suggest_float(one.path, one.low, one.high, log=one.log, step=one.step)


def give_up(study: Study, trial: Trial) -> None:
    """End a trial that was interrupted; the next call begins with the same values."""
    from optuna.trial import TrialState

    study.enqueue_trial(trial.params)
    study.tell(trial, state=TrialState.FAIL)


def refuse(study: Study, trial: Trial, reason: str) -> None:
    """End a trial whose values cannot be had together, such as a budget that rounding puts out of reach."""
    from optuna.trial import TrialState

    trial.set_user_attr(REFUSED, reason)
    study.tell(trial, state=TrialState.FAIL)


def finished(study: Study) -> list[FrozenTrial]:
    """List the trials that ran to their end."""
    from optuna.trial import TrialState

    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def counted(study: Study) -> list[FrozenTrial]:
    """List the trials that count: finished, stopped early or refused, but not interrupted ones."""
    from optuna.trial import TrialState

    done = (TrialState.COMPLETE, TrialState.PRUNED)
    return [t for t in study.get_trials(deepcopy=False) if t.state in done or REFUSED in t.user_attrs]


def front(study: Study) -> list[FrozenTrial]:
    """Give the best trial, or those that no other beats in every objective, in the order of the first."""
    best = study.best_trials if finished(study) else []
    if len(study.directions) == 1:
        return best[:1]
    return sorted(best, key=lambda t: (t.values, t.number))
