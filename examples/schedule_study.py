"""Measure what schedules of pruning do to one network, and print it as a Markdown table.

    pip install 'lightning-prune[demo]'
    OMP_NUM_THREADS=1 python examples/schedule_study.py 0.3      some minutes of one core

The number is the share of the multiply-accumulates to keep: 0.3 is a common prune, 0.03 a brutal one.

docs/choosing-a-schedule.md shows its output and what can be read from it.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import platform
import statistics
import sys
import time
import warnings
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import nn

from lightning_prune import GroupNormPruner, StructuredPruning
from lightning_prune.data import Digits
from lightning_prune.models import Classifier, ResNet

EPOCHS = int(os.environ.get("EPOCHS", "24"))
SEEDS = range(int(os.environ.get("SEEDS", "3")))
FIRST, LATE, STEPS = EPOCHS // 3, 5 * EPOCHS // 6, max(1, EPOCHS // 4)  # first cuts, number of cuts


@dataclass(frozen=True)
class Setting:
    """One row of a table."""

    name: str
    schedule: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    weight_decay: float = 0.05


NOT_SPARSE = {"sparse_start_epoch": EPOCHS}
SETTINGS = (
    Setting("one cut", NOT_SPARSE),
    Setting(f"{STEPS} cuts", {**NOT_SPARSE, "iterative_steps": STEPS}),
    Setting("one cut, reg 0.1", {}, {"reg": 0.1}),
    Setting(f"{STEPS} cuts, reg 0.1", {"iterative_steps": STEPS}, {"reg": 0.1}),
    Setting("one cut, random ranking", NOT_SPARSE, {"importance": "random"}),
    Setting("one cut, reg 0.01", {}, {"reg": 0.01}),
    Setting("one cut, batch norms recalibrated", {**NOT_SPARSE, "recalibrate_batches": 20}),
    Setting("one cut, late", {**NOT_SPARSE, "start_epoch": LATE}),
    Setting("one cut, weight decay 0", NOT_SPARSE, weight_decay=0.0),
    Setting("one cut, reg 0.1, weight decay 0", {}, {"reg": 0.1}, weight_decay=0.0),
    None,  # no pruning
)


class Probe(Callback):
    """Test the network right after every cut, before anything is learnt again."""

    def __init__(self, pruning: StructuredPruning, data: Digits) -> None:
        self.pruning, self.data = pruning, data
        self.after_cut = float("nan")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run behind the pruning callback, which stands before this one in the list."""
        if self.pruning.phase(trainer.current_epoch) == "prune":
            self.after_cut = accuracy(pl_module, self.data)


def accuracy(model: nn.Module, data: Digits) -> float:
    """Give the accuracy on the test images, in percent, and leave the model's mode as it was."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        hits = [(model(x).argmax(1) == y).float() for x, y in data.test_dataloader()]
    model.train(was_training)
    return 100 * float(torch.cat(hits).mean())


def run(setting: Setting | None, budget: float, seed: int) -> tuple[float, float]:
    """Train once; None prunes nothing. Give the accuracy right after the last cut and at the end."""
    seed_everything(seed, verbose=False)
    data = Digits()
    data.setup("fit")
    net = ResNet(widths=(16, 32, 64), depth=1)
    model = Classifier(net, weight_decay=setting.weight_decay if setting else 0.05)
    callbacks: list[Callback] = []
    if setting:
        options = {"budget": {"macs": budget}, **setting.options}
        pruning = StructuredPruning(
            module="net", **{"start_epoch": FIRST, **setting.schedule}, options=options
        )
        pruning.report.seconds = 0.001  # the report at the end is not what is looked at here
        callbacks = [pruning, Probe(pruning, data)]
    trainer = Trainer(
        max_epochs=EPOCHS,
        callbacks=callbacks,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data)
    after_cut = callbacks[1].after_cut if setting else math.nan
    return after_cut, accuracy(model, data)


def cost() -> tuple[float, float]:
    """Give the CPU milliseconds of a training step and of what sparse learning adds, measured in turns."""
    net = ResNet(widths=(16, 32, 64), depth=1)
    images, labels = torch.randn(50, 1, 8, 8), torch.arange(50) % 10
    pruner = GroupNormPruner(net, images[:1])
    optimizer = torch.optim.AdamW(net.parameters())
    steps, penalties = [], []
    for _ in range(200):
        start = time.process_time()
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()
        between = time.process_time()
        pruner.regularize()
        penalties.append(1000 * (time.process_time() - between))
        steps.append(1000 * (between - start))
    return statistics.median(steps), statistics.median(penalties)


def line(name: str, runs: list[tuple[float, float]]) -> str:
    """Write mean and range over the seeds as a row."""
    after_cut, final = zip(*runs, strict=True)

    def span(values: tuple[float, ...]) -> str:
        mean = sum(values) / len(values)
        return "" if math.isnan(mean) else f"{mean:.2f} ({min(values):.2f} to {max(values):.2f})"

    return f"| {name} | {span(after_cut)} | {span(final)} |"


def measured(setting: Setting | None, budget: float) -> list[tuple[float, float]]:
    """Run all seeds with nothing on the console."""
    with contextlib.redirect_stdout(io.StringIO()):
        return [run(setting, budget, seed) for seed in SEEDS]


def main() -> None:
    """Print the table of a budget."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning", "lightning-prune"))
    print(
        f"{EPOCHS} epochs, seeds {', '.join(map(str, SEEDS))}; first cut in epoch {FIRST}, late: {LATE}; "
        f"Python {platform.python_version()}, {packages}, {torch.get_num_threads()} thread(s), "
        f"{platform.machine()}"
    )
    step, penalty = cost()
    print(f"CPU time of a training step: {step:.2f} ms; sparse learning adds {penalty:.2f} ms")
    budget = float(sys.argv[1]) if len(sys.argv) > 1 else 0.3
    print(f"\n| {budget:.0%} of the MACs left | after the last cut, % | at the end, % |")
    print("|:---|---:|---:|")
    for setting in SETTINGS:
        name = setting.name if setting else "no pruning"
        print(line(name, measured(setting, budget)), flush=True)


if __name__ == "__main__":
    main()
