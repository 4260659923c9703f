"""A plan is carried out on every copy of the model that a Trainer holds."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer

from lightning_prune.checkpoint import record
from lightning_prune.plan import Plan
from lightning_prune.pruner import GroupNormPruner
from lightning_prune.surgery.applying import apply
from lightning_prune.training.building import target_of
from lightning_prune.training.strategies import averaged_copies

__all__ = ["cut_every_copy"]


def cut_every_copy(
    trainer: Trainer,
    pl_module: LightningModule,
    module: str | None,
    pruner: GroupNormPruner,
    plan: Plan,
    base: Plan,
) -> None:
    """Cut the model, its optimizers and its averaged copies, and note on each what it has kept.

    Args:
        trainer: Holds optimizers and copies.
        pl_module: Holds the model of the pruner.
        module: Name of that model, None for the whole.
        pruner: Commits the plan.
        plan: What to keep.
        base: What had been kept before the pruner was built.
    """
    pruner.commit(plan, optimizers=trainer.optimizers)
    for root in averaged_copies(trainer):
        apply(target_of(root, module), plan)
    kept = base.then(pruner.plan)
    for root in (pl_module, *averaged_copies(trainer)):
        record(target_of(root, module), kept)
