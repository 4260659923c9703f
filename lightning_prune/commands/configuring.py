"""From words to a configuration, and from a configuration to what it names: model, data, Trainer, pruner."""

from __future__ import annotations

import logging
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from omegaconf import DictConfig, OmegaConf

from lightning_prune.commands.words import keys_of
from lightning_prune.errors import OptionError
from lightning_prune.pruner import GroupNormPruner
from lightning_prune.training.building import build_pruner, example_of, target_of
from lightning_prune.training.callback import StructuredPruning
from lightning_prune.training.checkpointing import prunings
from lightning_prune.training.example_inputs import from_array

__all__ = [
    "CONF",
    "PRIMARY",
    "build",
    "check_checkpoint",
    "compose_config",
    "config_parser",
    "let_ratio_win",
    "pruner_of",
    "rehearse",
    "sow",
    "traced",
]

CONF = "lightning_prune.conf"
PRIMARY = "prune"
BUDGET = "pruning.options.budget"
LARGEST_SEED = 2**32 - 1  # of NumPy's old generator, which Lightning seeds too
log = logging.getLogger(__name__)


def config_parser(name: str, description: str, examples: str) -> ArgumentParser:
    """Make the parser of a command that reads the configuration of a run.

    Parse with ``parse_intermixed_args``, so that options may stand between the overrides.

    Args:
        name: Of the command.
        description: What it does, in a sentence or two.
        examples: Lines to copy, for the end of the help.
    """
    parser = ArgumentParser(
        prog=f"lightning-prune {name}",
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes a value, as for a run")
    parser.add_argument("--config-dir", "-cd", metavar="FOLDER", help="your own configuration files")
    return parser


def compose_config(
    overrides: Sequence[str], config_dir: str | None = None, *, run_dir: str = "."
) -> DictConfig:
    """Compose the configuration of a run outside Hydra's own program.

    Args:
        overrides: Words such as ``model=vit`` or ``trainer.max_epochs=3``.
        config_dir: Folder of the user's own files.
        run_dir: Folder that loggers and callbacks write to.
    """
    own = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir else []
    with initialize_config_module(CONF, version_base="1.3"):
        cfg = compose(PRIMARY, overrides=[*overrides, *own, f"run_dir={run_dir}"])
    let_ratio_win(cfg, overrides)
    return cfg


def let_ratio_win(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Drop the configured budget where a ratio was typed and no budget: the budget would override it."""
    keys = keys_of(overrides)
    typed_options = any(key.startswith("pruning.options.budget") or key == "pruning.options" for key in keys)
    if "pruning.pruning_ratio" in keys and not typed_options and OmegaConf.select(cfg, BUDGET) is not None:
        log.info("pruning_ratio=%s was asked for, so the configured budget is off", cfg.pruning.pruning_ratio)
        OmegaConf.update(cfg, BUDGET, None)


def rehearse(cfg: DictConfig) -> None:
    """Build everything once and plan the prune: a wrong option ends the run before anything is trained."""
    if cfg.ckpt_path:
        check_checkpoint(cfg.ckpt_path)
    model, _, trainer = build(cfg)
    for callback in prunings(trainer):
        pruner_of(callback, model)


def check_checkpoint(path: str) -> None:
    """Refuse what is no checkpoint, or half of one, before anything is read or trained."""
    if not Path(path).is_file():
        raise OptionError(
            f"ckpt_path={path} was asked for, and there is no such file; a run keeps its last "
            "checkpoint in outputs/<date>/<time>/checkpoints/last.ckpt"
        )
    if not is_zipfile(path):  # the table at the end of the file is missing
        raise OptionError(
            f"ckpt_path={path} was asked for, and that file is no checkpoint, or only a part of one; "
            "name one that a run has written, such as checkpoints/last.ckpt"
        )


def sow(seed: Any) -> None:
    """Seed every source of random numbers.

    Raises:
        OptionError: If it is no seed.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= LARGEST_SEED:
        raise OptionError(f"seed={seed} was asked for; a seed is a whole number, at least 0, below 2**32")
    seed_everything(seed, verbose=False)


def build(cfg: DictConfig) -> tuple[LightningModule, LightningDataModule, Trainer]:
    """Build what a run consists of, from the same random state every time."""
    sow(cfg.seed)
    model, data = instantiate(cfg.model), instantiate(cfg.data)
    callbacks = [instantiate(node) for node in cfg.callbacks.values()]
    callbacks += [instantiate(cfg.pruning)] if cfg.pruning else []
    loggers = [instantiate(node) for node in cfg.logger.values()]
    make_trainer = instantiate(cfg.trainer, _partial_=True)
    try:
        return model, data, make_trainer(callbacks=callbacks, logger=loggers or False)
    except Exception as error:
        raise OptionError(
            f"the Trainer refuses its options: {error}; see `lightning-prune --cfg job`"
        ) from error


def pruner_of(callback: StructuredPruning, model: LightningModule) -> GroupNormPruner | None:
    """Build the pruner that the callback will build; None where only a batch can say what the inputs are.

    Args:
        callback: Its options are the pruner's.
        model: Traced with its ``example_input_array``.

    Raises:
        OptionError: If the callback names a submodule that the model lacks.
    """
    target, calls = target_of(model, callback.module), from_array(model, callback.module)
    if not calls:
        return None
    return build_pruner(
        target,
        example_of(calls, callback.options.forward_fn),
        callback.options,
        pruning_ratio=callback.pruning_ratio,
        iterative_steps=callback.iterative_steps,
    )


def traced(callback: StructuredPruning, model: LightningModule, what: str) -> GroupNormPruner:
    """Build the pruner of a command that needs it now.

    Args:
        callback: As for ``pruner_of``.
        model: The same.
        what: Is asked for, in words that a name follows.

    Raises:
        OptionError: If only a batch can say what the inputs are.
    """
    pruner = pruner_of(callback, model)
    if pruner is None:
        raise OptionError(
            f"{what} {type(model).__name__} was asked for, but it has no example_input_array to trace it "
            "with; set that attribute to one input of forward"
        )
    return pruner
