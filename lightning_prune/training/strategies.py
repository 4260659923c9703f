"""What else in a Trainer holds on to the model: strategies, averaged copies, compiled code.

The core prunes one module. Under a Trainer the same parameters are also known to a DDP wrapper, to averaged
copies and to compiled graphs; each must follow a cut, and where it cannot, pruning is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lightning_prune.checkpoint import is_prepared
from lightning_prune.errors import PruneError, StrategyError

__all__ = [
    "averaged_copies",
    "callbacks_of",
    "check_parameters",
    "check_set_up",
    "decide_on_rank_zero",
    "eager",
    "follow_cut",
    "is_compiled",
    "point_out_missed_start",
    "point_out_neighbours",
    "show_what_is_read",
]

T = TypeVar("T")

# Lightning replaces these on a module that was compiled before the Trainer saw it (2.0 to 2.6).
_COMPILED_STEPS = ("forward", "training_step", "validation_step", "test_step", "predict_step")


def check_set_up(trainer: Trainer, pl_module: LightningModule) -> None:
    """Refuse what cannot be pruned in the middle of a fit.

    Raises:
        StrategyError: If the strategy keeps flattened or sharded copies of the parameters or state that is
            shaped like them, if a parameter is sharded already or has no shape yet, or if the Trainer comes
            from another distribution of Lightning.
    """
    if not isinstance(trainer, Trainer):
        raise StrategyError(
            f"StructuredPruning was given a Trainer from {type(trainer).__module__}, whose classes are not "
            "those of lightning.pytorch; import Trainer and callbacks from lightning.pytorch"
        )
    supported = isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy))
    if not supported or isinstance(trainer.strategy, DeepSpeedStrategy):  # a DDPStrategy by name alone
        raise StrategyError(
            f"StructuredPruning supports SingleDeviceStrategy and DDPStrategy, found "
            f"{type(trainer.strategy).__name__}, which keeps flattened or sharded copies of the parameters; "
            "prune before sharding (in configure_model), or use DDP"
        )
    if isinstance(trainer.strategy, DDPStrategy):
        _check_communication(trainer.strategy)
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher) and not is_prepared(pl_module):
        raise StrategyError(
            "the strategy fits in spawned processes and loads the trained weights into a model that no "
            "callback has seen; call lightning_prune.prepare(model) before trainer.fit, or let its class "
            "inherit PrunableMixin"
        )
    check_parameters(pl_module)


def check_parameters(pl_module: LightningModule) -> None:
    """Refuse parameters that cannot be cut; once more after ``configure_model``, which may have made them.

    Raises:
        StrategyError: If one is sharded already or has no shape yet.
    """
    for name, tensor in pl_module.named_parameters():
        _check_parameter(name, tensor)


def _check_communication(strategy: DDPStrategy) -> None:
    """PowerSGD keeps errors per bucket, local SGD means of the parameters: both in shapes that a cut ends."""
    state, period = strategy._ddp_comm_state, strategy._model_averaging_period
    if state is not None or period is not None:
        found = (
            f"ddp_comm_state={type(state).__name__}"
            if state is not None
            else f"model_averaging_period={period}"
        )
        raise StrategyError(
            f"StructuredPruning supports DDP whose communication keeps no state, found {found}, which holds "
            "numbers in the shapes from before a cut; use a hook without state, such as fp16_compress_hook"
        )


def _check_parameter(name: str, tensor: nn.Parameter) -> None:
    if isinstance(tensor.data, DTensor):
        raise StrategyError(f"parameter {name!r} is a DTensor: it is sharded already; prune before sharding")
    if isinstance(tensor, nn.parameter.UninitializedParameter):
        raise StrategyError(
            f"parameter {name!r} has no shape yet (a lazy module); run one forward before trainer.fit"
        )


def decide_on_rank_zero(trainer: Trainer, decide: Callable[[], T]) -> T:
    """Run ``decide`` on rank 0 and give every rank its answer, or its failure.

    Ranks hold the same weights but not the same statistics, so the same decision may not be made twice.
    Without the failure travelling too, the other ranks would wait for ever.

    Raises:
        PruneError: On every rank, if ``decide`` raises on rank 0; of its own class there.
    """
    answer: list[Any] = [None, ""]
    failure: Exception | None = None
    if trainer.is_global_zero:
        try:
            answer = [decide(), ""]
        except Exception as error:  # raised again below, once every rank knows
            failure, answer = error, [None, f"{type(error).__name__}: {error}"]
    answer = trainer.strategy.broadcast(answer, src=0)
    if failure is not None:
        raise failure
    if answer[1]:
        raise PruneError(f"rank 0 could not plan the cut: {answer[1]}")
    return answer[0]  # type: ignore[no-any-return]


def point_out_neighbours(trainer: Trainer) -> None:
    """Warn of callbacks that judge unpruned epochs: the best epoch is then the one before the cut."""
    for callback in callbacks_of(trainer):
        monitor = callback.monitor if isinstance(callback, (ModelCheckpoint, EarlyStopping)) else None
        if monitor is not None and not getattr(callback, "waits_for_pruning", False):
            ours = "EarlyStopping" if isinstance(callback, EarlyStopping) else "ModelCheckpoint"
            rank_zero_warn(
                f"{type(callback).__name__}(monitor={monitor!r}) compares epochs before and after the cut, "
                f"and the unpruned ones tend to win; use lightning_prune.Pruned{ours}, which waits for the "
                "last cut"
            )


def point_out_missed_start(trainer: Trainer) -> None:
    """Warn of callbacks that act when an epoch starts, where Lightning resumed past the start of one."""
    for callback in callbacks_of(trainer):
        if isinstance(callback, StochasticWeightAveraging) and callback.swa_start <= trainer.current_epoch:
            rank_zero_warn(
                f"the run goes on within epoch {trainer.current_epoch}, and StochasticWeightAveraging acts "
                "at the start of an epoch alone, which Lightning leaves out then: the average will be "
                "another than that of an uninterrupted run; resume from a checkpoint of the end of an epoch"
            )


def show_what_is_read(trainer: Trainer, look: Callable[[Trainer, Mapping[str, Any]], None]) -> None:
    """Let ``look`` see every checkpoint that this Trainer reads, before anything is taken from it.

    A callback is not asked before the weights are loaded, and not given its state before that either.
    """
    strategy = trainer.strategy
    if getattr(strategy.load_checkpoint, "func", None) is not _read_and_show:
        shown = partial(_read_and_show, trainer, strategy.load_checkpoint, look)
        strategy.load_checkpoint = shown  # type: ignore[method-assign]


def _read_and_show(
    trainer: Trainer,
    read: Callable[..., Any],
    look: Callable[[Trainer, Mapping[str, Any]], None],
    *args: Any,
    **kwargs: Any,
) -> Any:
    checkpoint = read(*args, **kwargs)
    look(trainer, checkpoint)
    return checkpoint


def averaged_copies(trainer: Trainer) -> list[nn.Module]:
    """List the averaged LightningModules that other callbacks hold (WeightAveraging, EMA, SWA).

    They have no public name in Lightning 2.6; ``_average_model`` is what all three call it.
    """
    held = [getattr(callback, "_average_model", None) for callback in callbacks_of(trainer)]
    copies = [c.module if isinstance(c, torch.optim.swa_utils.AveragedModel) else c for c in held]
    return [c for c in copies if isinstance(c, nn.Module)]


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """List the callbacks of a Trainer."""
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]


def follow_cut(trainer: Trainer, pl_module: LightningModule) -> None:
    """Make the strategy and the compiler forget the shapes from before a cut.

    A DDP wrapper registered its hooks on the old gradients: not rebuilding it raises at best, and with
    ``find_unused_parameters=True`` lets the ranks drift apart silently.
    """
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy) and isinstance(strategy.model, DistributedDataParallel):
        strategy.model = strategy.lightning_module
        strategy.configure_ddp()
        # The first backward of a static graph under manual optimization is delayed by hand, per wrapper.
        strategy._pl_static_graph_delay_done = False
    if is_compiled(pl_module):
        # Eight shapes per code object are compiled, then torch falls back to eager for good.
        torch._dynamo.reset()


def is_compiled(pl_module: LightningModule) -> bool:
    """Say whether any of it runs as compiled code."""
    if getattr(pl_module, "_compiler_ctx", None) is not None:
        return True
    return any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in pl_module.modules())


@contextmanager
def eager(pl_module: LightningModule) -> Iterator[None]:
    """Show the module's own ``forward`` and steps, where Lightning has put compiled ones over them.

    A copy of a compiled LightningModule would otherwise run the forward of the original.
    """
    own = pl_module.__dict__
    compiled = getattr(pl_module, "_compiler_ctx", None) is not None
    hidden = {name: own.pop(name) for name in _COMPILED_STEPS if compiled and name in own}
    try:
        yield
    finally:
        own.update(hidden)
