"""The command line: Hydra composes the configuration, this file turns it into a run."""

from __future__ import annotations

import copy
import logging
import math
import os
import shutil
import sys
import warnings
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import hydra
import numpy as np
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import env_override
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_prune.errors import OptionError, PruneError
from lightning_prune.graph.groups import Group
from lightning_prune.measuring.cost import measure_cost
from lightning_prune.plan import Plan
from lightning_prune.pruner import GroupNormPruner
from lightning_prune.surgery.applying import apply
from lightning_prune.training.callback import StructuredPruning
from lightning_prune.training.example_inputs import Example, from_array, one_sample
from lightning_prune.training.strategies import callbacks_of

__all__ = ["main"]

CONF = "lightning_prune.conf"
PRIMARY = "prune"
FULL_ERROR = "HYDRA_FULL_ERROR"  # Hydra's own switch between messages and tracebacks
TWIN = "The same network, trained without pruning with the same seed for the same number of epochs."
BUDGET = "pruning.options.budget"
log = logging.getLogger(__name__)


USER_ERRORS = (
    PruneError,
    HydraException,
    OmegaConfBaseException,
)  # what the words on the command line can mend


class Refused(BaseException):
    """An error on its way past Hydra, which would print a line of its own about any ``Exception``."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class Stopped(KeyboardInterrupt):
    """Ctrl-C, with what is left to go on from."""


def share(part: float, total: Any) -> int:
    """Give a share of a number of epochs, rounded, at least 1.

    Args:
        part: Share, in [0, 1].
        total: Epochs, >= 1.

    Raises:
        OptionError: If ``total`` is no such number.

    >>> share(0.3, 30), share(0.1, 3)
    (9, 1)
    """
    if isinstance(total, bool) or not isinstance(total, int) or total < 1:
        raise OptionError(
            f"trainer.max_epochs={total} was asked for, and the schedule of pruning is a share of it; "
            "give a whole number of epochs, at least 1"
        )
    return max(1, round(part * total))


# Shipped schedules follow trainer.max_epochs, and OmegaConf has no arithmetic of its own.
OmegaConf.register_new_resolver("share", share, replace=True)


def main() -> None:
    """Run ``lightning-prune``: a first word names a command, anything else is for Hydra."""
    first = sys.argv[1] if len(sys.argv) > 1 else ""
    is_command = bool(first) and first[0] not in "-+~" and "=" not in first
    sys.exit(_answer(lambda: _command(first) if is_command else _train()))


def _command(name: str) -> None:
    """Run the command called ``name``."""
    if name != "plan":
        later = "comes with a later version" if name in ("report", "tune") else "is no command"
        raise OptionError(
            f"`lightning-prune {name}` {later}. There are `lightning-prune [key=value ...]`, which trains "
            "and prunes, `lightning-prune plan [key=value ...]`, which shows what would be cut, and "
            "`lightning-prune --help`."
        )
    parser = ArgumentParser(prog="lightning-prune plan", description="Show what would be cut; train nothing.")
    parser.add_argument("--config-dir", "-cd", help="folder of your own configuration files")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for a run")
    given = parser.parse_args(sys.argv[2:])
    own = [f"hydra.searchpath=[file://{Path(given.config_dir).resolve()}]"] if given.config_dir else []
    with initialize_config_module(CONF, version_base="1.3"):
        cfg = compose(PRIMARY, overrides=[*given.overrides, *own, "run_dir=."])
    _let_ratio_win(cfg, given.overrides)
    _print_plan(cfg)


def _print_plan(cfg: DictConfig) -> None:
    """Print the groups before and after, what stays and why, and what the prune will save."""
    if not cfg.pruning:
        raise OptionError(
            "a plan was asked for with pruning=none, which cuts nothing; choose another pruning=..."
        )
    cfg.pruning.iterative_steps = 1  # the end of all steps, seen at once
    seed_everything(cfg.seed, verbose=False)
    model, callback = instantiate(cfg.model), instantiate(cfg.pruning)
    pruner = _pruner(callback, model)
    if pruner is None:
        raise OptionError(
            f"a plan for {type(model).__name__} was asked for, but it has no example_input_array to trace it "
            "with; set that attribute to one input of forward"
        )
    plan = pruner.step(dry_run=True)
    print(f"{'units':>12}  group")
    for group in pruner.groups():
        kind = "" if group.kind == "channel" else f" ({group.kind})"
        print(f"{f'{group.n_units} -> {units_left(group, plan)}':>12}  {group.name.split('/')[0]}{kind}")
    print("\nWhat stays whole, and why:", *_frozen(pruner), sep="\n  ")
    before, after = pruner.model, copy.deepcopy(pruner.model)
    apply(after, plan)
    example = one_sample(Example.of(from_array(model, callback.module)))
    dense, pruned = (measure_cost(m, example.inputs, forward_fn=example.forward_fn) for m in (before, after))
    for name in ("macs", "parameters"):
        was, will = getattr(dense, name), getattr(pruned, name)
        print(f"{name:>12}  {was:,} -> {will:,} ({will / was:.1%})")
    print(*pruner.notes, sep="\n", end="")


def units_left(group: Group, plan: Plan) -> int:
    """Count the units of a group that a plan keeps.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Linear(4, 1))
    >>> pruner = GroupNormPruner(net, torch.ones(1, 2))
    >>> units_left(pruner.groups()[0], pruner.step(dry_run=True))
    2
    """
    cuts = {(cut.tensor, cut.dim): cut for cut in plan.cuts}
    alive: set[int] = set()
    for member in group.members:
        cut = cuts.get((member.tensor, member.dim))
        if cut is None:
            return group.n_units
        rows = cut.by_row() if cut.rows > 1 else cut.by_row() * member.rows
        kept = [row * member.size + position for row, positions in enumerate(rows) for position in positions]
        alive |= set(member.unit[np.isin(member.index, kept)].tolist())
    return len(alive)


def _frozen(pruner: GroupNormPruner) -> Iterator[str]:
    """Name the channel dimensions of which something stays, with the reason."""
    for name, tensor in pruner.model.named_parameters():
        for dim in range(min(2, tensor.dim())):  # those after are a kernel's height and width
            _, found, reason = pruner.explain(name, dim).partition(" stay: ")
            if found:
                yield f"{name} dim {dim}: {reason.splitlines()[0]}"
    yield from (f"operation without a rule, its inputs stay: {name}" for name in pruner.unknown_operations())


def _answer(run: Callable[[], None]) -> int:
    """Call ``run``; whatever the user can mend becomes one message instead of a traceback."""
    wants_traceback = os.environ.get(FULL_ERROR) == "1"
    with env_override({FULL_ERROR: "1"}):  # Hydra then hands errors on instead of printing them itself
        try:
            run()
        except KeyboardInterrupt as stop:
            print(str(stop) or "Stopped before anything was trained.", file=sys.stderr)
            return 130
        except (Refused, *USER_ERRORS) as raised:
            error = raised.error if isinstance(raised, Refused) else raised
            if wants_traceback:
                raise error from None
            print(_explain(error), file=sys.stderr)
            return 1
    return 0


def _explain(error: BaseException) -> str:
    """Give the message of the error that says most: ours, wherever libraries have wrapped it."""
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, PruneError):
            return str(cause)
    parts = [f"{error.override}: {error}" if isinstance(error, OverrideParseException) else str(error)]
    for cause in causes:
        if isinstance(cause, OmegaConfBaseException) and cause.parent_node is not None:
            near = get_close_matches(str(cause.key), [str(key) for key in cause.parent_node], n=3)
            parts += [f"The nearest names are: {', '.join(near)}."] if near else []
    parts.append("`lightning-prune --cfg job` shows every value, `lightning-prune --help` how to change one.")
    return "\n".join(dict.fromkeys(parts))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@hydra.main(version_base="1.3", config_path=f"pkg://{CONF}", config_name=PRIMARY)
def _train(cfg: DictConfig) -> float:
    """Do one run; what it returns is for sweepers."""
    has_begun = False
    try:
        _let_ratio_win(cfg, HydraConfig.get().overrides.task)
        _rehearse(cfg)
        has_begun = True
        return _run(cfg)
    except USER_ERRORS as error:
        if not has_begun:
            _discard(Path(HydraConfig.get().runtime.output_dir))
        if HydraConfig.get().mode == RunMode.RUN:
            raise Refused(error) from error
        raise  # in a sweep, Hydra's line says which job it was


def _let_ratio_win(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Drop the configured budget where a ratio was typed and no budget: the budget would override it."""
    keys = [word.lstrip("+").partition("=")[0] for word in overrides]
    typed_options = any(key.startswith("pruning.options.budget") or key == "pruning.options" for key in keys)
    if "pruning.pruning_ratio" in keys and not typed_options and OmegaConf.select(cfg, BUDGET) is not None:
        log.info("pruning_ratio=%s was asked for, so the configured budget is off", cfg.pruning.pruning_ratio)
        OmegaConf.update(cfg, BUDGET, None)


def _rehearse(cfg: DictConfig) -> None:
    """Build everything once and plan the prune: a wrong option ends the run before anything is trained."""
    if isinstance(cfg.seed, bool) or not isinstance(cfg.seed, int) or cfg.seed < 0:
        raise OptionError(f"seed={cfg.seed} was asked for; a seed is a whole number, at least 0")
    if cfg.ckpt_path and not Path(cfg.ckpt_path).is_file():
        raise OptionError(
            f"ckpt_path={cfg.ckpt_path} was asked for, and there is no such file; a run keeps its last "
            "checkpoint in outputs/<date>/<time>/checkpoints/last.ckpt"
        )
    model, _, trainer = _build(cfg)
    for callback in _prunings(trainer):
        _pruner(callback, model)


def _build(cfg: DictConfig) -> tuple[LightningModule, LightningDataModule, Trainer]:
    """Build what a run consists of, from the same random state every time."""
    seed_everything(cfg.seed, verbose=False)
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


def _run(cfg: DictConfig) -> float:
    """Train the dense twin, then the network that is pruned; save that one and say how good it is."""
    with _known_warnings():
        twin = _dense_twin(cfg) if cfg.dense_twin and cfg.pruning else None
        model, data, trainer = _build(cfg)
        for callback in _prunings(trainer):
            callback.report.config = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
            if twin is not None:
                callback.report.compare_with(twin, dense_is=TWIN)
        _fit(trainer, model, data, cfg.ckpt_path, "go on from the last checkpoint with ckpt_path={}")
        tuned = _tuned(trainer, cfg.tuned_metric)
        if not cfg.pruning:
            trainer.test(model, datamodule=data)
    name = "pruned.ckpt" if cfg.pruning else "trained.ckpt"
    trainer.save_checkpoint(Path(cfg.run_dir) / name, weights_only=True)
    log.info("Everything is in %s", cfg.run_dir)
    return tuned


def _dense_twin(cfg: DictConfig) -> LightningModule:
    """Train the same network with the same seed for the same epochs, and prune nothing."""
    log.info("First the dense twin is trained, then the network that is pruned")
    twin = copy.deepcopy(cfg)
    twin.run_dir, twin.pruning = f"{cfg.run_dir}/dense", {}
    model, data, trainer = _build(twin)
    _fit(trainer, model, data, None, "the last checkpoint of the dense twin is {}")
    return model


@contextmanager
def _known_warnings() -> Iterator[None]:
    """Keep warnings off the console that nobody needs to act on."""
    with warnings.catch_warnings():
        for text in (
            ".*does not have many workers",  # the demo's images lie in memory
            ".*LeafSpec",  # Lightning 2.6 on torch 2.13
            "Experiment logs directory .* exists",  # made by Hydra a moment ago
            "The dirpath has changed",  # a run that goes on has a folder of its own
        ):
            warnings.filterwarnings("ignore", message=text)
        yield


def _prunings(trainer: Trainer) -> list[StructuredPruning]:
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, StructuredPruning)]


def _fit(
    trainer: Trainer, model: LightningModule, data: LightningDataModule, ckpt_path: str | None, advice: str
) -> None:
    """Train; Lightning turns Ctrl-C into an exit with code 1, which is turned back here."""
    try:
        trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
    except SystemExit:
        if not trainer.interrupted:
            raise
        keeper = trainer.checkpoint_callback
        last = getattr(keeper, "last_model_path", "") or getattr(keeper, "best_model_path", "")
        rest = advice.format(last) if last else "no checkpoint was written yet."
        raise Stopped(f"Stopped in epoch {trainer.current_epoch}; {rest}") from None


def _tuned(trainer: Trainer, name: str) -> float:
    """Give the last value of the metric that a sweeper tunes; NaN, with a warning, if nothing logged it."""
    if name not in trainer.callback_metrics:
        known = ", ".join(sorted(trainer.callback_metrics))
        log.warning("tuned_metric=%s was asked for, but only these were logged: %s", name, known)
        return math.nan
    return float(trainer.callback_metrics[name])


def _pruner(callback: StructuredPruning, model: LightningModule) -> GroupNormPruner | None:
    """Build the pruner that the callback will build; None where only a batch can say what the inputs are."""
    names = [name for name, _ in model.named_modules()]
    if callback.module is not None and callback.module not in names:
        near = ", ".join(get_close_matches(callback.module, names, cutoff=0.0))
        raise OptionError(
            f"pruning.module={callback.module} was asked for, which names no submodule of "
            f"{type(model).__name__}; the nearest are {near}"
        )
    calls = from_array(model, callback.module)
    if not calls:
        return None
    example = Example.of(calls)
    options = {field.name: getattr(callback.options, field.name) for field in fields(callback.options)}
    options["forward_fn"] = options["forward_fn"] or example.forward_fn
    return GroupNormPruner(
        model.get_submodule(callback.module or ""),
        example.inputs,
        pruning_ratio=callback.pruning_ratio,
        iterative_steps=callback.iterative_steps,
        **options,
    )


def _discard(folder: Path) -> None:
    """Remove what Hydra wrote for a run that never began, and the folders that this leaves empty."""
    for handler in [h for h in logging.getLogger().handlers if isinstance(h, logging.FileHandler)]:
        if Path(handler.baseFilename).parent == folder:
            handler.close()
            logging.getLogger().removeHandler(handler)
            Path(handler.baseFilename).unlink(missing_ok=True)
    shutil.rmtree(folder / ".hydra", ignore_errors=True)
    with suppress(OSError):  # a folder with other content stays
        for place in (folder, *folder.parents[:2]):
            place.rmdir()
