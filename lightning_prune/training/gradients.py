"""What a Trainer does to gradients between loss and optimizer: loss scales, several optimizers, overflow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

from lightning.pytorch import Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.errors import PruneError
from lightning_prune.pruner import GroupNormPruner
from lightning_prune.scores.inspecting import Inspector, judge
from lightning_prune.scores.members import answers_at_once

__all__ = ["GradientWatch", "closes_accumulation", "hide_from", "loss_scale", "overflowed"]

_GRAD = attrgetter("grad")


def closes_accumulation(trainer: Trainer, batch_idx: int) -> bool:
    """Say whether an optimizer step follows this batch, as it always does after an epoch's last."""
    done = batch_idx + 1
    last = trainer.is_last_batch or done == trainer.num_training_batches
    return last or done % trainer.accumulate_grad_batches == 0


def _is_scaled(trainer: Trainer) -> bool:
    """Say whether a GradScaler is at work; it then looks for overflow itself, and skips the step."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler is not None and scaler.is_enabled()


def loss_scale(trainer: Trainer, optimizer: Optimizer | None = None) -> float | Tensor:
    """Give the factor on the gradients right now; that of an accelerator stays there.

    Args:
        trainer: The running Trainer.
        optimizer: None right after the backward pass; before a step, the optimizer that steps: its gradients
            are unscaled by then, unless it does that itself (fused ones).
    """
    if not _is_scaled(trainer):
        return 1.0
    if optimizer is not None and not getattr(optimizer, "_step_supports_amp_scaling", False):
        return 1.0
    scaler = trainer.precision_plugin.scaler  # type: ignore[attr-defined]
    scale = getattr(scaler, "_get_scale_async", lambda: None)()  # get_scale() would wait for the device
    if scale is None or answers_at_once(scale.device):
        return float(scaler.get_scale())
    return scale  # type: ignore[no-any-return]


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


def overflowed(trainer: Trainer, model: nn.Module) -> bool:
    """Say whether the GradScaler will skip this step; without one ``GradientWatch`` has seen to it."""
    grads = _dense_grads(dict(model.named_parameters())) if _is_scaled(trainer) else {}
    return bool(grads) and bool(judge(list(grads.values()))[1])


def _dense_grads(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    grads = map(_GRAD, parameters.values())
    return {n: g for n, g in zip(parameters, grads, strict=True) if g is not None and not g.is_sparse}


class GradientWatch:
    """Looks at the gradients of the task before the penalty joins them.

    A CPU answers at once. An accelerator is not waited for: there the penalty is multiplied by 0 or 1 on the
    device, and ``check`` counts, warns or raises later. Under a GradScaler overflow is usual and its own
    matter; then nothing is looked at.

    Args:
        policy: ``raise`` an error, ``skip`` the penalty of that step, or set such elements to ``zero``.
        fused: Whether kernels of our own may look.

    Attributes:
        count: Steps with a gradient that was not finite, as of the last ``check``.
    """

    def __init__(self, policy: str, *, fused: bool | None) -> None:
        self._policy, self._inspector = policy, Inspector(fused=fused)
        self._told_of_rounding = False
        self._wrong: dict[tuple[str, ...], Tensor] = {}  # whose gradients were wrong since the last check
        self._steps: Tensor | None = None  # number of such steps since then
        self._left = (0, "")  # the same two from a checkpoint
        self.count = 0

    def share(self, trainer: Trainer, parameters: Mapping[str, Tensor]) -> float | Tensor:
        """Say how much of the penalty may join the gradients, 0 or 1, after the policy has done its part.

        Args:
            trainer: The running Trainer.
            parameters: All that are trained, by name.

        Raises:
            PruneError: If a gradient on a CPU is not finite, and the policy is ``raise``.
        """
        grads = _dense_grads(parameters)
        if not grads or _is_scaled(trainer):
            return 1.0
        if not answers_at_once(next(iter(grads.values())).device):
            return self._on_device(grads)
        flags, is_wrong = self._inspector.look(list(grads.values()))
        if not is_wrong:
            return 1.0
        wrong = [name for name, flag in zip(grads, flags.tolist(), strict=True) if flag]
        self._tell(wrong[0], 1, f"at step {trainer.global_step}")
        if self._policy != "zero":
            return 0.0
        for name in wrong:
            grads[name].nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        return 1.0

    def check(self, trainer: Trainer) -> None:
        """Look at what accelerators found since the last look. Waits for the device: call it when logging.

        Raises:
            PruneError: If a gradient was not finite, and the policy is ``raise``.
        """
        steps, first = self._pending()
        self._steps, self._wrong, self._left = None, {}, (0, "")
        if steps:
            self._tell(first, steps, f"at or before step {trainer.global_step}")

    def state_dict(self) -> dict[str, Any]:
        """Give counts as plain data, of what ``check`` has yet to tell, too. Waits for the device."""
        return {"count": self.count, "pending": list(self._pending())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another watch stopped."""
        steps, first = state["pending"]
        self.count, self._left = state["count"], (steps, first)
        self._steps, self._wrong = None, {}

    def _pending(self) -> tuple[int, str]:
        """Count steps since the last check that had something not finite, and name the first that was so."""
        steps, first = self._left
        if self._steps is None or not int(self._steps):
            return steps, first
        found = (
            name
            for names, flags in self._wrong.items()
            for name, wrong in zip(names, flags.tolist(), strict=True)
            if wrong
        )
        return steps + int(self._steps), first or next(found)

    def _on_device(self, grads: Mapping[str, Tensor]) -> float | Tensor:
        """Judge without waiting."""
        wrong, is_wrong = self._inspector.look(list(grads.values()))
        names = tuple(grads)
        self._wrong[names] = self._wrong[names] | wrong if names in self._wrong else wrong
        self._steps = is_wrong.long() if self._steps is None else self._steps + is_wrong
        if self._policy != "zero":
            return 1.0 - is_wrong
        for grad in grads.values():
            grad.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        return 1.0

    def _tell(self, name: str, steps: int, when: str) -> None:
        """Count steps; raise or warn as the policy says.

        Raises:
            PruneError: If the policy is ``raise``.
        """
        what = f"the gradient of {name!r} is not finite {when}"
        if self._policy == "raise":
            raise PruneError(
                f"{what}, and nan_policy is 'raise'; lower the learning rate, clip gradients, or choose "
                "nan_policy='skip'"
            )
        if not self.count:
            rank_zero_warn(
                f"{what}; nan_policy is {self._policy!r}, so such steps are counted "
                "as prune/nonfinite_gradients"
            )
        self.count += steps

    def warn_of_rounding(self, pruner: GroupNormPruner) -> None:
        """Warn once where the penalty may be lost between the digits of a gradient."""
        names = pruner.regularizer.low_precision
        if names and pruner.options.reg and not self._told_of_rounding:
            self._told_of_rounding = True
            rank_zero_warn(
                f"the gradient of {names[0]!r} has less than 24 bits, where the penalty of "
                f"reg={pruner.options.reg:g} may round to nothing; use precision='bf16-mixed' or a larger reg"
            )
