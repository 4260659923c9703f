"""``lightning-prune sensitivity``: what each part of a trained network can lose, and ratios made of that."""

from __future__ import annotations

import copy
import logging
import warnings
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from omegaconf import OmegaConf
from torch import nn

from lightning_prune.checkpoint import load_pruned_state
from lightning_prune.commands.configuring import (
    build,
    check_checkpoint,
    compose_config,
    config_parser,
    traced,
)
from lightning_prune.commands.running import stoppable
from lightning_prune.errors import OptionError
from lightning_prune.files import write_whole
from lightning_prune.options import check_budget
from lightning_prune.reporting.curves import print_curves
from lightning_prune.reporting.pictures.sensitivity import sensitivity_png
from lightning_prune.scores.importance import NEEDS
from lightning_prune.sensitivity import Sensitivity, measure_sensitivity
from lightning_prune.sensitivity.measuring import RATIOS
from lightning_prune.sensitivity.parts import Part
from lightning_prune.sensitivity.ratios import options_of, shares_for
from lightning_prune.training.checkpointing import prunings

__all__ = ["run"]

EXAMPLES = """\
  lightning-prune sensitivity ckpt_path=outputs/<date>/<time>/dense/checkpoints/last.ckpt
  lightning-prune sensitivity ckpt_path=last.ckpt --budget macs=0.5       and ratios that meet it
  lightning-prune sensitivity ckpt_path=last.ckpt --metric val/loss --mode min --ratios 0.2,0.4,0.6
  lightning-prune sensitivity --as-is model=timm model.net.pretrained=true data=mine

Stop it when you like: what was measured is kept in the file, and the same words go on."""


def run(words: Sequence[str]) -> None:
    """Measure, write sensitivity.json and a picture, and ratios if a budget is given."""
    given = _parsed(words)
    if given.budget:
        check_budget(given.budget)  # before minutes of measuring
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)  # it would speak once per point
    cfg = compose_config([*given.overrides, "logger=none", "callbacks=none"], given.config_dir)
    cfg.trainer.enable_progress_bar = False
    model, data, trainer = build(cfg)
    if not prunings(trainer):
        raise OptionError("pruning=none was asked for, and sensitivity is that of what pruning would cut")
    callback = prunings(trainer)[0]
    if cfg.ckpt_path is None and not given.as_is:
        raise OptionError(
            "sensitivity was asked of fresh weights, which lose nothing; name a trained network with "
            "ckpt_path=..., or say --as-is if the model comes with trained weights"
        )
    if cfg.ckpt_path is not None:
        check_checkpoint(cfg.ckpt_path)
        load_pruned_state(model, torch.load(cfg.ckpt_path, map_location="cpu", weights_only=True))
    pruner = traced(callback, model, "the sensitivity of")
    options = pruner.options.as_keywords()
    del options["budget"]
    if options["importance"] in NEEDS:
        print(f"importance={options['importance']} needs training; sensitivity is that of group_norm")
        options["importance"] = "group_norm"
    file, name = Path(given.file), given.metric or cfg.tuned_metric
    evaluate = _metric_of(model, callback.module, data, trainer, name)
    inputs, network = pruner.example_inputs, pruner.model
    with stoppable(
        trainer, lambda: f"Stopped; what was measured is in {file}, and the same command goes on."
    ):
        found = measure_sensitivity(
            network, inputs, evaluate, ratios=given.ratios, mode=given.mode, file=file, **options
        )
        shares = shares_for(found, network, inputs, given.budget, **options) if given.budget else None
    _show(found, file, name, shares, callback.module)


def _parsed(words: Sequence[str]) -> Namespace:
    parser = config_parser(
        "sensitivity",
        "Prune each part of a trained network alone, at several ratios, and see what the validation\n"
        "metric loses. With --budget, turn that into ratios per layer.",
        EXAMPLES,
    )
    parser.add_argument("--metric", help="logged validation metric (default: tuned_metric, val/acc)")
    parser.add_argument("--mode", choices=("max", "min"), default="max", help="min for a loss")
    parser.add_argument(
        "--ratios",
        type=_shares,
        default=RATIOS,
        metavar="SHARES",
        help=f"shares of a part to remove (default: {','.join(map(str, RATIOS))})",
    )
    parser.add_argument(
        "--budget",
        type=_budget,
        metavar="NAME=SHARE",
        help="share to keep: macs=0.5, params=0.3, memory or latency",
    )
    parser.add_argument(
        "--file",
        default="sensitivity.json",
        help="where to keep what was measured, picture and ratios beside it (default: sensitivity.json)",
    )
    parser.add_argument(
        "--as-is", action="store_true", help="measure the weights that the model is built with"
    )
    return parser.parse_intermixed_args(words)


def _shares(word: str) -> tuple[float, ...]:
    try:
        shares = tuple(float(each) for each in word.split(","))
    except ValueError:
        shares = (-1.0,)
    if not all(0 < share < 1 for share in shares):
        raise ArgumentTypeError(f"{word!r} is no list of shares in (0, 1) such as 0.25,0.5")
    return shares


def _budget(word: str) -> dict[str, float]:
    name, _, share = word.partition("=")
    try:
        return {name: float(share)}
    except ValueError:
        raise ArgumentTypeError(f"{word!r} is not of the form NAME=SHARE, such as macs=0.5") from None


def _metric_of(
    model: LightningModule, module: str | None, data: LightningDataModule, trainer: Trainer, name: str
) -> Callable[[nn.Module], float]:
    """Give a function that validates the module with another network in the place of its own."""

    def evaluate(network: nn.Module) -> float:
        if module is None:
            assert isinstance(network, LightningModule)
            twin = network
        else:
            twin = copy.deepcopy(model)
            owner, _, leaf = module.rpartition(".")
            setattr(twin.get_submodule(owner), leaf, network)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the loader has few workers, once per point
            logged = trainer.validate(twin, datamodule=data, verbose=False)
        found = next(iter(logged), {})
        if name not in found:
            raise OptionError(
                f"{name} is to be measured, and validation logs {', '.join(sorted(found)) or 'nothing'}; "
                "name another with --metric"
            )
        return float(found[name])

    return evaluate


def _show(
    found: Sensitivity, file: Path, metric: str, shares: dict[Part, float] | None, module: str | None
) -> None:
    """Print the table, write picture and ratios."""
    assert found.baseline is not None
    chosen = None if shares is None else {part.name: share for part, share in shares.items()}
    print_curves(found.points, found.baseline, metric, chosen)
    picture = sensitivity_png(found.points, found.baseline, metric=metric, chosen=chosen or {})
    files = [file, write_whole(file.with_suffix(".png"), picture)]
    if shares is not None:
        text = _yaml(options_of(shares), module)
        files.append(write_whole(file.with_suffix(".yaml"), text.encode()))
    print(*files, sep="\n")


def _yaml(table: dict[str, Any], module: str | None) -> str:
    """Write ratios as a choice of pruning=."""
    head = "# Ratios made of a sensitivity. Put it into <folder>/pruning/ and run\n"
    head += "#   lightning-prune --config-dir <folder> pruning=sensitivity\n"
    more = {"prune_num_heads": True} if "head_pruning_ratio_dict" in table else {}
    options = {"budget": None, **more, **table}
    choice = {"defaults": ["default", "_self_"], "module": module, "pruning_ratio": 0.0, "options": options}
    return head + OmegaConf.to_yaml(OmegaConf.create(choice))
