"""One trial of a search: a run of its own folder, and what it reached."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, fields
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf
from typing_extensions import override

from lightning_prune.commands.configuring import build
from lightning_prune.commands.running import fit, known_warnings
from lightning_prune.errors import OptionError
from lightning_prune.measuring.measured import Measured
from lightning_prune.training.checkpointing import prunings

__all__ = ["FROM_REPORT", "Watch", "check_metrics", "run_trial"]

FROM_REPORT = "report/"
# The report's accuracy is that of the test split, which must not guide a search.
MEASURED = [field.name for field in fields(Measured) if field.name != "accuracy"]
Follow = Callable[[int, float | None], None]


class Watch(Callback):
    """Tell a metric after every validation: what a stopper looks at.

    A trial is compared only once it has made its last cut, because before that a late cut looks like a good
    one.

    Args:
        metric: Logged name.
        follow: Called with the epoch and the value, None until the last cut; it may raise to end the fit.
    """

    def __init__(self, metric: str, follow: Follow) -> None:
        self.metric = metric
        self.follow = follow

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        value = trainer.callback_metrics.get(self.metric)
        is_done = all(pruning.target_reached for pruning in prunings(trainer))
        self.follow(trainer.current_epoch, float(value) if is_done and value is not None else None)


def run_trial(cfg: DictConfig, objectives: Iterable[str], follow: Follow) -> tuple[float, ...]:
    """Train, prune and report in the trial's folder, the console in a file of it.

    Args:
        cfg: Configuration of the run.
        objectives: Metrics to give, in this order.
        follow: Told of every epoch.

    Returns:
        Last value of every objective.

    Raises:
        OptionError: If an objective was not logged or not measured.
        PruneError: If the prune cannot be done as asked.
    """
    folder = Path(cfg.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    objectives = list(objectives)
    with (folder / "console.txt").open("w", encoding="utf-8") as console, redirect_stdout(console):
        with redirect_stderr(console), known_warnings():  # warnings of one trial are not news of the search
            model, data, trainer = build(cfg)
            trainer.callbacks.insert(0, Watch(objectives[0], follow))  # type: ignore[attr-defined]
            fit(trainer, model, data, None, "the last checkpoint of the trial is {}")
        trainer.save_checkpoint(folder / "pruned.ckpt", weights_only=True)
    known = {name: float(value) for name, value in trainer.callback_metrics.items()} | _measured(trainer)
    _check_names(objectives, known)
    return tuple(known[name] for name in objectives)


def check_metrics(cfg: DictConfig, objectives: Iterable[str]) -> None:
    """Train one batch to learn what a run logs: a wrong name ends the search before it begins.

    Raises:
        OptionError: If an objective is none of them.
    """
    rehearsal = cfg.copy()
    with tempfile.TemporaryDirectory() as folder:
        OmegaConf.update(rehearsal, "run_dir", folder)
        OmegaConf.update(rehearsal, "trainer.fast_dev_run", True, force_add=True)
        with (
            (Path(folder) / "console.txt").open("w", encoding="utf-8") as console,
            redirect_stdout(console),
            redirect_stderr(console),
            known_warnings(),
        ):
            model, data, trainer = build(rehearsal)
            fit(trainer, model, data, None, "")
    known = dict.fromkeys(map(str, trainer.callback_metrics), 0.0)
    if prunings(trainer):
        known |= {f"{FROM_REPORT}{name}": 0.0 for name in MEASURED}
    _check_names(objectives, known)


def _check_names(objectives: Iterable[str], known: Mapping[str, float]) -> None:
    for name in objectives:
        if name not in known:
            raise OptionError(
                f"hparams_search.objectives has {name!r}, which a run neither logs nor measures; there are "
                f"{', '.join(sorted(known))}"
            )


def _measured(trainer: Trainer) -> dict[str, float]:
    """Give what the report at the end of the fit measured of the pruned network."""
    results = [pruning.report.result for pruning in prunings(trainer)]
    if len(results) != 1 or results[0] is None:
        return {}
    figures = asdict(results[0].pruned)
    return {f"{FROM_REPORT}{name}": float(figures[name]) for name in MEASURED if figures[name] is not None}
