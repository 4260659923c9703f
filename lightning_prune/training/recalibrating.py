"""After a cut, batch norms get statistics of the network that is left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, IterableDataset

from lightning_prune.errors import OptionError
from lightning_prune.randomness import randomness_kept
from lightning_prune.training.example_inputs import collated, quiet_twin, training_step, transferred

__all__ = ["recalibrate"]


def recalibrate(trainer: Trainer, pl_module: LightningModule, module: str | None, batches: int) -> None:
    """Estimate the running statistics of the pruned network's batch norms anew.

    A mean over ``batches`` training batches, each through a training step of a copy, without gradients: what
    the step logs, draws or sets stays in the copy, and random states are put back. The samples are drawn from
    the training set by a generator of their own, the same on every rank; sampler and loader do not notice.
    Layers in eval mode, or without running statistics, keep what they have.

    Args:
        trainer: The running Trainer.
        pl_module: The module, cut already.
        module: Name of the pruned submodule, None for the whole.
        batches: Number of training batches, >= 1.

    Raises:
        OptionError: If the training set cannot be drawn from.
    """
    norms = _norms(pl_module, module)
    if not norms:
        return
    with randomness_kept(), torch.no_grad():
        twin = quiet_twin(pl_module, trainer)
        copies = _norms(twin, module)
        for norm in copies.values():
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean over all batches
        for batch in _draw(trainer.train_dataloader, batches, seed=trainer.current_epoch):
            ready = transferred(trainer, pl_module, batch)
            with trainer.precision_plugin.train_step_context():
                training_step(twin, ready)()
        for name, norm in norms.items():
            if copies[name].num_batches_tracked:  # a layer that no batch reached keeps its statistics
                for ours, new in (
                    (norm.running_mean, copies[name].running_mean),
                    (norm.running_var, copies[name].running_var),
                ):
                    ours.copy_(new)


def _norms(root: nn.Module, module: str | None) -> dict[str, Any]:
    target = root.get_submodule(module or "")
    return {
        name: layer
        for name, layer in target.named_modules()
        if isinstance(layer, _BatchNorm) and layer.training and layer.running_mean is not None
    }


def _draw(loaders: Any, batches: int, seed: int) -> Iterator[Any]:
    """Give batches of the structure that the Trainer gives: one loader, or a list or dict of them."""
    if isinstance(loaders, Mapping):
        parts = {key: _draw(loader, batches, seed) for key, loader in loaders.items()}
        yield from (dict(zip(parts, items, strict=True)) for items in zip(*parts.values(), strict=False))
    elif isinstance(loaders, (list, tuple)):
        several = [_draw(loader, batches, seed) for loader in loaders]
        yield from (type(loaders)(items) for items in zip(*several, strict=False))
    else:
        yield from _draw_one(loaders, batches, seed)


def _draw_one(loader: Any, batches: int, seed: int) -> Iterator[Any]:
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        raise OptionError(
            f"recalibrate_batches={batches} draws samples from the training set, and found "
            f"{type(getattr(loader, 'dataset', loader)).__name__}, which only goes forward; use a map-style "
            "dataset in a DataLoader, or recalibrate_batches=0"
        )
    size: int = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 1
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(loader.dataset), generator=generator, device=generator.device).tolist()  # type: ignore[arg-type]
    chunks = [order[start : start + size] for start in range(0, len(order), size)]
    for chunk in [c for c in chunks if len(c) == size or len(chunks) == 1][:batches]:
        batched = loader.batch_sampler is not None
        yield collated(loader, chunk) if batched else loader.collate_fn(loader.dataset[chunk[0]])
