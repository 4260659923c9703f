"""Knowledge distillation: the pruned network also learns from the dense one that it was cut from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_prune.errors import OptionError
from lightning_prune.plan import Plan
from lightning_prune.surgery.structure import plan_of, take_on
from lightning_prune.training.gradients import loss_scale
from lightning_prune.training.strategies import eager, is_compiled

__all__ = ["Distillation", "Distiller"]


@dataclass(frozen=True)
class Distillation:
    """What the dense network teaches: ``weight * T^2 * KL(teacher || student)`` is added to the task's loss.

    Both distributions are softmaxes of logits divided by ``T`` (Hinton et al., 2015, section 2); ``T^2``
    keeps the size of the gradient. Features add the mean squared difference of outputs of layers, over the
    channels that are left.

    Args:
        weight: Of the logits' part, >= 0.
        temperature: ``T``, > 0.
        features: Names of layers inside the pruned module whose outputs are compared.
        feature_weight: Of each feature's part, >= 0.
        class_dim: Dimension of the logits that runs over the classes; -1 for [n, classes] and for tokens, 1
            for maps [n, classes, height, width].

    Raises:
        OptionError: If a value is out of range.

    >>> Distillation(temperature=2.0).weight
    1.0
    """

    weight: float = 1.0
    temperature: float = 4.0
    features: tuple[str, ...] = ()
    feature_weight: float = 1.0
    class_dim: int = -1

    def __post_init__(self) -> None:
        for name in ("weight", "temperature", "feature_weight"):
            value = getattr(self, name)
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not 0 <= value < float("inf") or (name == "temperature" and value == 0):
                raise OptionError(
                    f"distillation.{name} must be a number >= 0, the temperature > 0, got {value!r}"
                )
        if isinstance(self.features, str):  # type: ignore[unreachable]  # YAML has no types
            raise OptionError(f"distillation.features must be a list of names, got {self.features!r}")
        object.__setattr__(self, "features", tuple(self.features))

    def logits_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Give ``T^2 * KL``, summed over classes and averaged over everything else."""
        dim, t = self.class_dim, self.temperature
        log_q, log_p = (F.log_softmax(z.float() / t, dim) for z in (student, teacher))
        return t**2 * (log_p.exp() * (log_p - log_q)).sum(dim).mean()


class Distiller:
    """Keeps the teacher, and adds its gradient to that of the training step.

    The gradient of the added loss with respect to an output of the network is added where the task's gradient
    of that output passes by, scaled as that one is. So one backward pass carries both: accumulation, loss
    scaling and DDP need nothing more.

    Args:
        how: What is taught; None switches everything off.
        module: Name of the pruned submodule, None for the whole.
    """

    def __init__(self, how: Distillation | None, module: str | None) -> None:
        self.how, self._module = how, module
        self.teacher: nn.Module | None = None
        self.loss = torch.zeros(2, dtype=torch.float64)  # sum and count since the epoch began
        self._hooks = ExitStack()
        self._depth = 0
        self._seen: dict[str, Tensor] = {}
        self._taught = False
        self._plan = Plan()
        self._kept: dict[str, Tensor] = {}  # channels of features that the plan keeps, on the device

    def forget(self) -> None:
        """Begin anew, with another network."""
        self.teacher, self._plan, self._kept = None, Plan(), {}
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Count the loss from here."""
        self.loss = torch.zeros(2, dtype=torch.float64)

    def mean_loss(self, trainer: Trainer) -> float | None:
        """Give the added loss per output compared since the epoch began, over all ranks; None without any."""
        if self.teacher is None:
            return None
        total = trainer.strategy.reduce(self.loss.to(trainer.strategy.root_device), reduce_op="sum")
        assert isinstance(total, Tensor)
        return float(total[0] / total[1]) if total[1] else None

    def keep_teacher(self, pl_module: LightningModule) -> None:
        """Copy the network, just before its first cut."""
        if self.how is not None and self.teacher is None:
            target = pl_module.get_submodule(self._module or "")
            self._check(target)
            with eager(pl_module):
                self.teacher = copy.deepcopy(target).eval().requires_grad_(False)

    def begin_batch(self, trainer: Trainer, pl_module: LightningModule, kept: Plan) -> None:
        """Put hooks on student and teacher, if there is a teacher.

        Raises:
            OptionError: If compiled code passes the hooks by.
        """
        if self.how is None or self.teacher is None:
            return
        if is_compiled(pl_module):
            raise OptionError(
                "distillation was asked for a compiled module, whose code runs past forward hooks; train it "
                "uncompiled, or without distillation"
            )
        student, self._depth, self._taught = pl_module.get_submodule(self._module or ""), 0, False
        self.teacher.to(pl_module.device)
        # Under DDP a call of the whole LightningModule is its training step; the network is called inside.
        outer = 1 if student is pl_module and trainer.strategy.model is not pl_module else 0
        scale = _backward_scale(trainer, pl_module)
        hook = self._hooks.callback
        hook(student.register_forward_pre_hook(self._enter).remove)
        hook(
            student.register_forward_hook(
                self._leave(outer, scale), with_kwargs=True, always_call=True
            ).remove
        )
        for name in self.how.features:
            for network, key in ((student, f"student {name}"), (self.teacher, f"teacher {name}")):
                layer = network.get_submodule(name)
                hook(layer.register_forward_hook(self._see(key)).remove)
        if kept is not self._plan:  # once for a cut: in every step the device would be waited for
            table = {c.tensor: c.keep for c in kept.cuts if c.dim == 0}
            found = {name: table.get(f"{name}.weight") for name in self.how.features}
            self._kept = {n: torch.tensor(k, device=pl_module.device) for n, k in found.items() if k}
            self._plan = kept

    def end_batch(self) -> None:
        """Give the layers back."""
        self._hooks.close()
        self._seen = {}

    def check_taught(self, pl_module: LightningModule) -> None:
        """Refuse a training step that came to a backward pass and did not call the network as one module.

        Raises:
            OptionError: With the names that can be called.
        """
        if self.how is not None and self.teacher is not None and not self._taught:
            names = [name for name, _ in pl_module.named_children()]
            raise OptionError(
                f"distillation compares the outputs of {self._module or 'the LightningModule'!r}, and the "
                "training step did not call it with gradients; name the network that it calls, module= one "
                f"of {names}"
            )

    def state_dict(self) -> dict[str, Any] | None:
        """Give the teacher's weights, and the loss as this rank has met it in the epoch."""
        if self.teacher is None:
            return None
        return {"teacher": dict(self.teacher.state_dict()), "loss": self.loss.tolist()}

    def load_state_dict(self, state: Mapping[str, Any] | None, target: nn.Module, base: Plan) -> None:
        """Rebuild the teacher from what the student is now.

        Args:
            state: What ``state_dict`` gave.
            target: The pruned module; a copy of it is grown back.
            base: What had been cut before this callback's first cut.

        """
        if self.how is None or state is None:
            return
        teacher = copy.deepcopy(target)
        if plan_of(teacher) != base:
            take_on(teacher, {"": base}, {})
        teacher.load_state_dict(state["teacher"])
        self.teacher = teacher.eval().requires_grad_(False)
        self.loss = torch.tensor(state["loss"], dtype=torch.float64)

    def _check(self, target: nn.Module) -> None:
        names = dict(target.named_modules())
        for name in self.how.features if self.how else ():
            if name not in names:
                raise OptionError(
                    f"distillation.features names {name!r}, which is no submodule of "
                    f"{self._module or 'the LightningModule'!r}; there are {list(names)[1:9]} ..."
                )

    def _enter(self, *_: Any) -> None:
        self._depth += 1

    def _see(self, key: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: Any, output: Any) -> None:
            self._seen[key] = output

        return hook

    def _leave(self, outer: int, scale: Callable[[], float | Tensor]) -> Callable[..., None]:
        def hook(student: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._depth -= 1
            if self._depth != outer or not torch.is_grad_enabled() or output is None:
                return
            self._taught = True
            seen, self._seen = self._seen, {}
            with torch.no_grad():
                answer = self.teacher(*args, **kwargs)  # type: ignore[misc]
            taught, self._seen = self._seen, {}
            self._teach(logits_of(output), logits_of(answer), scale, self.how.weight, self.how.logits_loss)  # type: ignore[union-attr]
            for name in self.how.features:  # type: ignore[union-attr]
                if f"student {name}" not in seen or f"teacher {name}" not in taught:
                    raise OptionError(f"distillation.features: the forward does not call {name!r}")
                kept = self._kept.get(name)
                ours, theirs = _matched(name, seen[f"student {name}"], taught[f"teacher {name}"], kept)
                self._teach(ours, theirs, scale, self.how.feature_weight, F.mse_loss)  # type: ignore[union-attr]

        return hook

    def _teach(
        self,
        ours: Tensor,
        theirs: Tensor,
        scale: Callable[[], float | Tensor],
        weight: float,
        loss: Callable[..., Tensor],
    ) -> None:
        """Add the gradient of ``weight * loss`` where the task's gradient of ``ours`` passes by, once."""
        with torch.enable_grad(), torch.autocast(ours.device.type, enabled=False):
            leaf = ours.detach().float().requires_grad_()
            value = weight * loss(leaf, theirs.float())
            (gradient,) = torch.autograd.grad(value, leaf)
        self.loss = self.loss.to(value.device) + torch.stack(
            [value.detach().double(), value.new_ones(()).double()]
        )
        waits = [gradient]

        def add(grad: Tensor) -> Tensor:  # scaled first: a half-precision number would lose what is small
            return grad + (scale() * waits.pop()).to(grad.dtype) if waits else grad

        ours.register_hook(add)  # type: ignore[no-untyped-call]


def logits_of(output: Any) -> Tensor:
    """Find the logits in what a network returns: a tensor, or something with ``logits``.

    Raises:
        OptionError: If it is neither.
    """
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(found, Tensor):
        raise OptionError(
            f"distillation compares logits, and the network returned a {type(output).__name__} without any; "
            "let it return a tensor or something with .logits, or name a submodule that does"
        )
    return found


def _matched(name: str, ours: Any, theirs: Any, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """Give two features of equal shape: of the teacher's channels those that the student still has."""
    if not isinstance(ours, Tensor) or not isinstance(theirs, Tensor):
        raise OptionError(f"distillation.features: {name!r} returns a {type(ours).__name__}, not a tensor")
    differing = [d for d in range(ours.dim()) if ours.shape[d] != theirs.shape[d]]
    if differing and (keep is None or len(differing) > 1 or ours.shape[differing[0]] != len(keep)):
        raise OptionError(
            f"distillation.features: {name!r} gives {list(ours.shape)}, dense {list(theirs.shape)}, and "
            "which channels those are is known of layers with a weight of their own alone; name the "
            "convolution, linear layer or norm that makes them"
        )
    if differing and keep is not None:
        theirs = theirs.index_select(differing[0], keep.to(theirs.device))
    return ours, theirs


def _backward_scale(trainer: Trainer, pl_module: LightningModule) -> Callable[[], float | Tensor]:
    """Give the factor on the gradients while the backward pass runs."""
    share = 1 / trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1.0
    return lambda: share * loss_scale(trainer)
