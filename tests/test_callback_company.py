"""Who else changes a run: tuners, compilers, adapters, shared weights, progress bars, sanity checks."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    LearningRateFinder,
    RichProgressBar,
    WeightAveraging,
)
from test_callback import CHANNELS, Net, NoForward, Plain, Quiet, build, data, fit, pytestmark  # noqa: F401
from torch import nn
from torch.nn import functional

HALF = CHANNELS // 2


def parameters(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class Sized(LightningDataModule):
    """Its batches have the size that a tuner sets."""

    def __init__(self):
        super().__init__()
        self.batch_size = 2

    def train_dataloader(self):
        return data(16, self.batch_size)


class Widths(Quiet):
    """Notes the widths that batches meet, trials of tuners included."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.trained = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self.trained.append((trainer.current_epoch, len(batch[0]), pl_module.net.conv.out_channels))


def test_the_batch_size_finder_tries_without_cutting(tmp_path):
    model, callback = build(), Widths(0.5, start_epoch=1)
    before = parameters(model).numel()
    finder = BatchSizeFinder(max_trials=2, steps_per_trial=1)
    loader = Sized()
    fit(model, callback, finder, loader=loader, default_root_dir=tmp_path)
    assert loader.batch_size > 2
    assert {width for epoch, _, width in callback.trained if epoch == 0} == {CHANNELS}
    assert {(size, width) for epoch, size, width in callback.trained if epoch == 1} == {
        (loader.batch_size, HALF)
    }
    assert callback.steps_done == 1
    assert parameters(model).numel() < before


class EveryEpoch(LearningRateFinder):
    """Looks for a learning rate again in the middle of the fit, after a cut."""

    def on_fit_start(self, *args):
        return

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            self.lr_find(trainer, pl_module)


def test_the_learning_rate_finder_may_run_after_a_cut(tmp_path):
    class Found(Plain):
        lr = 0.1

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)

    model, callback = build(Found), Quiet(0.5, start_epoch=1, every_n_epochs=2, iterative_steps=2)
    finder = EveryEpoch(num_training_steps=3, early_stop_threshold=None, update_attr=False)
    trainer = fit(model, finder, callback, max_epochs=4, default_root_dir=tmp_path)
    other = build(Found)
    alone = fit(other, Quiet(0.5, start_epoch=1, every_n_epochs=2, iterative_steps=2), max_epochs=4)
    assert trainer.callback_metrics == alone.callback_metrics
    assert finder.optimal_lr is not None
    assert model.net.conv.out_channels == HALF
    assert torch.equal(parameters(model), parameters(other))  # the search left nothing behind
    fit(model, callback, max_epochs=4)  # in a later fit neither
    assert (model.net.conv.out_channels, callback.steps_done) == (HALF, 2)


class Wide(LightningModule):
    """Many channels, to be cut more often than torch compiles one code object; it does not log."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 24, 3, bias=False), nn.BatchNorm2d(24)
        self.fc = nn.Linear(24, 2)

    def forward(self, x):
        return self.fc(self.bn(self.conv(x)).relu().mean(dim=(2, 3)))

    def training_step(self, batch, batch_idx):
        return functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def test_a_module_compiled_before_the_trainer_equals_the_eager_one():
    widths = []

    def backend(graph, inputs):
        labels = [
            x for x in inputs if isinstance(x, torch.Tensor) and x.dtype == torch.int64 and x.dim() == 1
        ]
        if labels:  # the whole training step in one graph
            widths.append(next(x.shape[0] for x in inputs if isinstance(x, nn.Parameter)))
        return graph

    model, eager = build(Wide), build(Wide)
    compiled = torch.compile(model, backend=backend)
    for each in (compiled, eager):
        fit(each, Quiet(0.5, start_epoch=0, iterative_steps=10, options={"reg": 0.01}), max_epochs=10)
    torch._dynamo.reset()
    assert model.conv.out_channels == 12
    assert torch.equal(parameters(model), parameters(eager))
    assert widths == [23, 22, 20, 19, 18, 17, 16, 14, 13, 12]


class LowRank(nn.Module):
    """A frozen linear layer and a small trainable one of low rank beside it."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(rank, base.in_features) / 10)
        self.B = nn.Parameter(torch.randn(base.out_features, rank) / 10)

    def forward(self, x):
        return self.base(x) + functional.linear(functional.linear(x, self.A), self.B)


class Adapted(Plain):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(), LowRank(nn.Linear(75, 8)), nn.ReLU(), LowRank(nn.Linear(8, 6)), nn.ReLU()
        )
        self.net.append(nn.Linear(6, 2))

    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(trained, lr=0.1, momentum=0.9)


class Before(Quiet):
    """Keeps what the cut met."""

    def _prune(self, trainer, pl_module):
        self.dense = {name: value.clone() for name, value in pl_module.state_dict().items()}
        super()._prune(trainer, pl_module)
        self.cut = {name: value.clone() for name, value in pl_module.state_dict().items()}


def test_adapters_of_low_rank_are_cut_with_the_frozen_layer_that_they_adapt():
    model = build(Adapted)
    start = {name: p.clone() for name, p in model.named_parameters()}
    callback = Before(0.5, start_epoch=1, options={"reg": 0.1})
    fit(model, callback)
    one, two = model.net[1], model.net[3]
    keep = {(c.tensor, c.dim): list(c.keep) for c in callback.pruner.plan.cuts}
    rows, columns = keep["net.1.base.weight", 0], keep["net.3.base.weight", 0]
    assert (len(rows), len(columns)) == (4, 3)
    # frozen: cut, and otherwise as they were built, for neither the task nor the penalty moves them
    assert torch.equal(one.base.weight, start["net.1.base.weight"][rows])
    assert torch.equal(two.base.weight, start["net.3.base.weight"][columns][:, rows])
    assert torch.equal(two.base.bias, start["net.3.base.bias"][columns])
    assert not any(p.requires_grad for layer in (one, two) for p in layer.base.parameters())
    assert all(p.grad is None for layer in (one, two) for p in layer.base.parameters())
    # the product of the adapters is that of before, at what is kept; a rank is a channel too
    for name, before, after in (("net.1", slice(None), rows), ("net.3", rows, columns)):
        rank = keep[f"{name}.A", 0]
        product = callback.dense[f"{name}.B"][:, rank] @ callback.dense[f"{name}.A"][rank]
        now = callback.cut[f"{name}.B"] @ callback.cut[f"{name}.A"]
        torch.testing.assert_close(now, product[after][:, before])
    assert not torch.equal(one.B, callback.cut["net.1.B"])  # it goes on learning


class Tied(Plain):
    """One weight read as a table and as a classifier's matrix, in a LightningModule's hands."""

    def __init__(self):
        super().__init__()
        self.net = None
        self.table, self.inner = nn.Embedding(5, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 5, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x):
        tokens = (x.flatten(1)[:, :4].abs() * 2).long().clamp(max=4)
        return self.head(self.inner(self.table(tokens)).relu().mean(1))


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_tied_weight_is_cut_once_and_stays_tied(kind, tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    def run(*callbacks, **options):
        model = build(Tied)
        model.kind = kind
        fit(model, Quiet(0.5, options={"reg": 0.01}), *callbacks, max_epochs=3, **options)
        return model

    model = run(ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), enable_checkpointing=True)
    assert model.head.weight is model.table.weight
    assert model.table.weight.shape == (5, 4)
    assert model.inner.in_features == 4
    resumed = run(ckpt_path=tmp_path / "epoch=1.ckpt")
    assert resumed.head.weight is resumed.table.weight
    assert torch.equal(parameters(resumed), parameters(model))


class Validated(NoForward):
    def validation_step(self, batch, batch_idx):
        assert not self.training
        self.log("val_loss", functional.cross_entropy(self.net(batch[0]), batch[1]))

    def val_dataloader(self):
        return data()


def test_a_progress_bar_shows_the_sparsity(capsys):
    fit(build(Validated), Quiet(0.5), RichProgressBar(), enable_progress_bar=True)
    assert "prune/sparsity:" in capsys.readouterr().out


def test_the_check_before_training_does_not_count_as_an_epoch():
    seen = []

    class Checked(Widths):
        def on_sanity_check_end(self, trainer, pl_module):
            seen.append(pl_module.net.conv.out_channels)

    model, callback = build(Validated), Checked(0.5, start_epoch=0)
    fit(model, callback, num_sanity_val_steps=2, limit_val_batches=1)
    assert seen == [CHANNELS]
    assert {width for *_, width in callback.trained} == {HALF}
    assert callback.steps_done == 1


def test_plain_averaging_of_weights_follows_a_cut():
    """The average of equal weights are these weights, cut like them."""

    class Still(Plain):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    model, averaging = build(Still), WeightAveraging()
    fit(model, Quiet(0.5), averaging)
    fresh = build(Still)
    for name, p in model.named_parameters():
        assert p.shape == averaging._average_model.module.get_parameter(name).shape
        torch.testing.assert_close(averaging._average_model.module.get_parameter(name), p)
    assert model.net.conv.out_channels == HALF
    assert fresh.net.conv.out_channels == CHANNELS
