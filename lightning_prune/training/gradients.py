"""What a Trainer does to gradients between loss and optimizer: loss scales, several optimizers, overflow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch import Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.errors import PruneError
from lightning_prune.pruner import GroupNormPruner

__all__ = ["GradientWatch", "closes_accumulation", "hide_from", "loss_scale", "overflowed"]


def closes_accumulation(trainer: Trainer, batch_idx: int) -> bool:
    """Say whether an optimizer step follows this batch, as it always does after an epoch's last."""
    done = batch_idx + 1
    last = trainer.is_last_batch or done == trainer.num_training_batches
    return last or done % trainer.accumulate_grad_batches == 0


def _is_scaled(trainer: Trainer) -> bool:
    """Say whether a GradScaler is at work; it then looks for overflow itself, and skips the step."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler is not None and scaler.is_enabled()


def loss_scale(trainer: Trainer, optimizer: Optimizer | None = None) -> float:
    """Give the factor on the gradients right now.

    Args:
        trainer: The running Trainer.
        optimizer: None right after the backward pass; before a step, the optimizer that steps: its gradients
            are unscaled by then, unless it does that itself (fused ones).
    """
    if not _is_scaled(trainer):
        return 1.0
    if optimizer is not None and not getattr(optimizer, "_step_supports_amp_scaling", False):
        return 1.0
    return float(trainer.precision_plugin.scaler.get_scale())  # type: ignore[attr-defined]


@contextmanager
def hide_from(model: nn.Module, optimizer: Optimizer) -> Iterator[None]:
    """Hide the gradients of parameters that ``optimizer`` does not hold: they belong to another step."""
    held = {p for group in optimizer.param_groups for p in group["params"]}
    hidden = [(p, p.grad) for p in model.parameters() if p not in held and p.grad is not None]
    for parameter, _ in hidden:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, grad in hidden:
            parameter.grad = grad


def _non_finite(model: nn.Module) -> dict[str, Tensor]:
    """List the gradients with a NaN or an infinity, by parameter name."""
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and not p.grad.is_sparse}
    if not grads or torch.isfinite(torch.nn.utils.get_total_norm(grads.values())):
        return {}
    # A norm overflows before its elements do, so only these are the judges.
    return {name: grad for name, grad in grads.items() if not torch.isfinite(grad).all()}


def overflowed(trainer: Trainer, model: nn.Module) -> bool:
    """Say whether the GradScaler will skip this step; without one ``GradientWatch`` has seen to it."""
    return _is_scaled(trainer) and bool(_non_finite(model))


class GradientWatch:
    """Looks at the gradients of the task before the penalty joins them.

    Under a GradScaler overflow is usual and its own matter; then nothing is looked at.

    Args:
        policy: ``raise`` an error, ``skip`` the penalty of that step, or set such elements to ``zero``.

    Attributes:
        count: Steps with a gradient that was not finite.
    """

    def __init__(self, policy: str) -> None:
        self._policy = policy
        self._told_of_rounding = False
        self.count = 0

    def is_finite(self, trainer: Trainer, model: nn.Module) -> bool:
        """Say whether all gradients are finite, after the policy has done its part.

        Raises:
            PruneError: If one is not, and the policy is ``raise``.
        """
        wrong = {} if _is_scaled(trainer) else _non_finite(model)
        if not wrong:
            return True
        what = f"the gradient of {next(iter(wrong))!r} is not finite at step {trainer.global_step}"
        if self._policy == "raise":
            raise PruneError(
                f"{what}, and nan_policy is 'raise'; lower the learning rate, clip gradients, or choose "
                "nan_policy='skip'"
            )
        if self._policy == "zero":
            for grad in wrong.values():
                grad.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        if not self.count:
            rank_zero_warn(
                f"{what}; nan_policy is {self._policy!r}, so such steps are counted "
                "as prune/nonfinite_gradients"
            )
        self.count += 1
        return self._policy == "zero"

    def warn_of_rounding(self, pruner: GroupNormPruner) -> None:
        """Warn once where the penalty may be lost between the digits of a gradient."""
        names = pruner.regularizer.low_precision
        if names and pruner.options.reg and not self._told_of_rounding:
            self._told_of_rounding = True
            rank_zero_warn(
                f"the gradient of {names[0]!r} has less than 24 bits, where the penalty of "
                f"reg={pruner.options.reg:g} may round to nothing; use precision='bf16-mixed' or a larger reg"
            )
