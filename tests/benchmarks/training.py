"""Rows ``training``, ``idle`` and ``memory``: what the callback costs a running Trainer."""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Iterator
from time import perf_counter
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from benchmarks.clock import Marks, Spread
from benchmarks.figure import Figure, Settings
from benchmarks.regularize import LOOPS
from benchmarks.subjects import build
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_prune import StructuredPruning

MODELS = ("resnet50",)
NEVER = 10**9
WARM_UP = 3  # the first steps build the pruner, the momentum and the regulariser


class Classifier(LightningModule):
    """The subject under SGD with momentum."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-4, momentum=0.9)


class Alternate(Callback):
    """Takes the pruning callback out of the Trainer for every other step, and times the steps.

    Bare steps and steps with the callback so share the model, its weights, the data and the hour.
    """

    def __init__(self, pruning: StructuredPruning, device: str) -> None:
        self.pruning = pruning
        self._marks, self._active = Marks(device), list[bool]()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        active = self.pruning in trainer.callbacks  # type: ignore[attr-defined]
        self._active.append(active)
        if len(self._active) >= WARM_UP:
            trainer.callbacks = [self] if active else [self.pruning, self]  # type: ignore[attr-defined]
        self._marks.note()

    def seconds(self, *, active: bool) -> list[float]:
        """Seconds of the steps with the callback, or of those without; warm-up left out."""
        ended = zip(self._active[1:], self._marks.seconds(), strict=True)
        return [taken for was, taken in list(ended)[WARM_UP - 1 :] if was == active]


class Idle(Callback):
    """Times the hooks of a step of the pruning callback alone, many times over."""

    def __init__(self, pruning: StructuredPruning, rounds: int) -> None:
        self.pruning, self.rounds = pruning, rounds
        self.seconds: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        if self.seconds or trainer.global_step < WARM_UP:
            return
        hooks, optimizer, repeats = self.pruning, trainer.optimizers[0], 10
        for _ in range(self.rounds):
            start = perf_counter()
            for _ in range(repeats):
                hooks.on_train_batch_start(trainer, module, batch, index)
                hooks.on_before_backward(trainer, module, batch[0])
                hooks.on_after_backward(trainer, module)
                hooks.on_before_optimizer_step(trainer, module, optimizer)
                hooks.on_before_zero_grad(trainer, module, optimizer)
                hooks.on_train_batch_end(trainer, module, outputs, batch, index)
            self.seconds.append((perf_counter() - start) / repeats)


def training(settings: Settings) -> Iterator[Figure]:
    """Steps in the sparse phase beside bare ones, batch 32 at 112 px."""
    for name in settings.pick(MODELS):
        for loops, fused in LOOPS.items():
            pruning = StructuredPruning(start_epoch=NEVER, options={"fused": fused})
            watch = Alternate(pruning, settings.device)
            _fit(name, settings, [pruning, watch], steps=WARM_UP + 2 * settings.rounds, batch=32, size=112)
            with_it, bare = watch.seconds(active=True), watch.seconds(active=False)
            value = Spread.of([100 * (a / b - 1) for a, b in zip(with_it, bare, strict=False)])
            times = {"with": Spread.of(with_it).times(1e3), "bare": Spread.of(bare).times(1e3)}
            what = f"extra time of a training step in the sparse phase, {loops}, batch 32 at 112 px"
            yield Figure("training", name, what, value, "%", 3.0, times)


def idle(settings: Settings) -> Iterator[Figure]:
    """The callback's own hooks in a step outside the sparse phase."""
    for name in settings.pick(MODELS):
        pruning = StructuredPruning(start_epoch=NEVER, sparse_start_epoch=NEVER)
        watch = Idle(pruning, settings.rounds)
        _fit(name, settings, [pruning, watch], steps=WARM_UP, batch=2, size=64)
        value = Spread.of(watch.seconds).times(1e6)
        yield Figure(
            "idle", name, "the callback's own time in a step outside the sparse phase", value, "us", 50.0
        )


def memory(settings: Settings) -> Iterator[Figure]:
    """Everything that only the callback keeps alive in the sparse phase, tensors, arrays and objects."""
    for name in settings.pick(MODELS):
        pruning = StructuredPruning(start_epoch=NEVER)
        subject = _fit(name, settings, [pruning], steps=WARM_UP, batch=2, size=64)
        held = held_bytes(pruning, beyond=subject.net)
        share = 100 * held / sum(p.numel() * p.element_size() for p in subject.net.parameters())
        what, note = "memory held by the callback / bytes of the parameters", f"{held / 2**20:.1f} MiB"
        yield Figure("memory", name, what, Spread.of([share]), "%", 10.0, note=note)


def held_bytes(holder: object, *, beyond: object) -> int:
    """Bytes that can be reached from ``holder`` but not from ``beyond``.

    Running Trainers and LightningModules, classes, modules and the globals of functions are not followed.

    >>> held_bytes([torch.zeros(1000)], beyond=None) // 1000
    4
    >>> shared = torch.zeros(1000)
    >>> held_bytes([shared[:5]], beyond=shared) < 1000
    True
    """
    seen: set[int] = set()
    stored: set[int] = set()
    _walk(beyond, seen, stored)
    return _walk(holder, seen, stored)


def _walk(root: object, seen: set[int], stored: set[int]) -> int:
    total, waiting = 0, [root]
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, (ModuleType, type, Trainer, LightningModule)):
            continue
        seen.add(id(item))
        total += sys.getsizeof(item, 0)
        if isinstance(item, Tensor) and item.device.type != "meta" and item.layout == torch.strided:
            storage = item.untyped_storage()
            total += 0 if storage.data_ptr() in stored else storage.nbytes()
            stored.add(storage.data_ptr())
        elif isinstance(item, np.ndarray) and item.flags.owndata:
            total -= item.nbytes if item.ctypes.data in stored else 0
            stored.add(item.ctypes.data)
        if isinstance(item, FunctionType):
            waiting += [item.__closure__, item.__defaults__, item.__dict__]
        else:
            waiting += gc.get_referents(item)
    return total


def _fit(
    name: str, settings: Settings, callbacks: list[Callback], *, steps: int, batch: int, size: int
) -> Classifier:
    subject = build(name, seed=settings.seed, batch=batch, size=size)
    one = TensorDataset(subject.inputs, torch.randint(0, 10, (batch,)))
    data = Subset(one, [i % batch for i in range(steps * batch)])  # one epoch, no end of one in between
    module = Classifier(subject.model.train())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on workers and loggers
        trainer = Trainer(
            max_steps=steps,
            accelerator="gpu" if settings.device == "cuda" else "cpu",
            devices=1,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(data, batch_size=batch))
    return module
