"""``lightning-prune tune``: search for good settings; stop and go on at any time."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from lightning_prune.commands.answering import Stopped
from lightning_prune.commands.configuring import compose_config, config_parser, rehearse
from lightning_prune.commands.findings import conclude, write_findings
from lightning_prune.commands.spaces import GROUP, Search, read_search, without_search
from lightning_prune.commands.studies import (
    REFUSED,
    counted,
    finished,
    give_up,
    need_optuna,
    opened,
    refuse,
    suggest,
)
from lightning_prune.commands.trials import check_metrics, run_trial
from lightning_prune.commands.words import keys_of, words_of
from lightning_prune.errors import PruneError
from lightning_prune.reporting.waiting import Advance, waiting

if TYPE_CHECKING:
    from optuna import Study, Trial

__all__ = ["run"]

DESCRIPTION = """\
Search for good settings: train with many, keep a table of them, write the best as a configuration.
Everything is kept in tune/<name>; after Ctrl-C or a kill the same command goes on. What is varied and
what is aimed at are in hparams_search, which is changed like every other value."""
EXAMPLES = """\
  lightning-prune tune                                          the accuracy left at the configured budget
  lightning-prune tune hparams_search=tradeoff                  accuracy against multiply-accumulates
  lightning-prune tune hparams_search.n_trials=60               more trials; those that are there count
  lightning-prune tune hparams_search.space.model.lr.high=0.02  a wider range
  lightning-prune tune '~hparams_search.space.pruning.options.alpha'             vary less
  lightning-prune tune '+hparams_search.space.data.batch_size={choices: [25, 50]}'  vary more
  lightning-prune --config-dir tune/accuracy/best experiment=best               run with the best"""

# What a trial does without unless it is typed: a twin to compare with, a progress bar, a web logger.
QUIET = {"dense_twin": "false", "trainer.enable_progress_bar": "false", "logger": "csv"}


@dataclass(frozen=True)
class Words:
    """What was typed.

    Args:
        typed: The overrides.
        config_dir: Folder of the user's own files.
    """

    typed: tuple[str, ...]
    config_dir: str | None

    def compose(self, *more: str, run_dir: str = ".", is_trial: bool = True) -> DictConfig:
        """Compose the configuration of a trial, or of a run like it."""
        keys = keys_of(self.typed)
        quiet = [f"{key}={value}" for key, value in QUIET.items() if is_trial and key not in keys]
        group = [] if GROUP in keys else [f"{GROUP}=accuracy"]
        return compose_config([*group, *quiet, *self.typed, *more], self.config_dir, run_dir=run_dir)


def run(words: Sequence[str]) -> None:
    """Search until there are as many trials as were asked for."""
    given = config_parser("tune", DESCRIPTION, EXAMPLES).parse_intermixed_args(words)
    need_optuna()
    said = Words(tuple(given.overrides), given.config_dir)
    cfg = said.compose()
    search = read_search(cfg, said.typed)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # as in a run: its tips are not news
    rehearse(cfg)
    check_metrics(cfg, search.objectives)
    with opened(search, _shared(cfg), seed=cfg.seed) as study:
        _search(study, search, said)
        conclude(study, search)


def _shared(cfg: DictConfig) -> dict[str, Any]:
    """Give what all trials share, as plain data."""
    plain = OmegaConf.to_container(without_search(cfg))
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _search(study: Study, search: Search, said: Words) -> None:
    """Run trials, writing the findings after each."""
    done = len(counted(study))
    with waiting(search.n_trials, done, f"{done} done before" if done else "first trial") as advance:
        while len(counted(study)) < search.n_trials:
            trial = study.ask()
            try:
                _one(study, search, said, trial, advance)
            except KeyboardInterrupt:
                give_up(study, trial)
                raise Stopped(
                    f"Stopped in trial {trial.number}; the finished trials ({len(finished(study))}) are kept "
                    f"in {search.folder}, and the same command goes on."
                ) from None
            except BaseException:
                give_up(study, trial)
                raise
            write_findings(study, search, said.compose)
            _check_hope(study, search)
            advance(1, f"trial {trial.number} is done")


def _one(study: Study, search: Search, said: Words, trial: Trial, advance: Advance) -> None:
    """Run one trial and tell the study how it ended."""
    from optuna import TrialPruned
    from optuna.trial import TrialState

    values = suggest(trial, search)

    def follow(epoch: int, value: float | None) -> None:
        advance(0, f"trial {trial.number}, epoch {epoch + 1}")
        if value is not None and search.stops_early:
            trial.report(value, epoch)
            if trial.should_prune():
                raise TrialPruned

    try:
        cfg = said.compose(*words_of(values), run_dir=str(search.folder / "trials" / str(trial.number)))
        study.tell(trial, _finite(search, run_trial(cfg, search.objectives, follow)))
    except TrialPruned:
        study.tell(trial, state=TrialState.PRUNED)
    except PruneError as error:
        refuse(study, trial, str(error))


def _finite(search: Search, values: tuple[float, ...]) -> tuple[float, ...]:
    for name, value in zip(search.objectives, values, strict=True):
        if math.isnan(value):
            raise PruneError(f"{name} is nan at the end of the trial")
    return values


def _check_hope(study: Study, search: Search) -> None:
    """Go on past values that cannot be had together, unless there are no others."""
    tried = counted(study)
    reasons = [trial.user_attrs[REFUSED] for trial in tried if REFUSED in trial.user_attrs]
    if len(reasons) == len(tried) >= search.startup_trials:
        raise PruneError(f"all of the first {len(tried)} trials were refused, the last because {reasons[-1]}")
