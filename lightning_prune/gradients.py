"""What a Trainer does to gradients between loss and optimizer: loss scales, several optimizers, overflow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["closes_accumulation", "hide_from", "is_scaled", "loss_scale", "non_finite"]


def closes_accumulation(trainer: Trainer, batch_idx: int) -> bool:
    """Say whether an optimizer step follows this batch, as it always does after an epoch's last."""
    done = batch_idx + 1
    last = trainer.is_last_batch or done == trainer.num_training_batches
    return last or done % trainer.accumulate_grad_batches == 0


def is_scaled(trainer: Trainer) -> bool:
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
    if not is_scaled(trainer):
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


def non_finite(model: nn.Module) -> dict[str, Tensor]:
    """List the gradients with a NaN or an infinity, by parameter name."""
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and not p.grad.is_sparse}
    if not grads or torch.isfinite(torch.nn.utils.get_total_norm(grads.values())):
        return {}
    # A norm overflows before its elements do, so only these are the judges.
    return {name: grad for name, grad in grads.items() if not torch.isfinite(grad).all()}
