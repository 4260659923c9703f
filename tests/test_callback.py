"""StructuredPruning in a Trainer: when it cuts, what it logs, what it leaves alone."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune.errors import OptionError, PruneError
from lightning_prune.training.callback import PHASES, StructuredPruning

pytestmark = [  # Lightning 2.6 on torch 2.13, and advice that a test does not need
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in (
        ".*LeafSpec",
        ".*does not have many workers",
        ".*number of training batches",
        "Be aware that when using .ckpt_path",
    )
]
CHANNELS = 8


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, CHANNELS, 3, bias=False)
        self.bn = nn.BatchNorm2d(CHANNELS)
        self.fc = nn.Linear(CHANNELS, 2)

    def forward(self, x):
        return self.fc(self.bn(self.conv(x)).relu().mean(dim=(2, 3)))


class Plain(LightningModule):
    """Has a forward of its own; the network is the module."""

    def __init__(self, optimizer="sgd"):
        super().__init__()
        self.net, self.kind = Net(), optimizer

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        if self.kind == "sgd":
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class NoForward(Plain):
    """The training step calls the network itself."""

    forward = LightningModule.forward

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


def data(n=16, batch_size=4):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, 5, 5, generator=generator)
    return DataLoader(TensorDataset(x, (x.mean(dim=(1, 2, 3)) > 0).long()), batch_size=batch_size)


def fit(model, *callbacks, ckpt_path=None, loader=None, **options):
    options = {
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        **options,
    }
    trainer = Trainer(callbacks=list(callbacks), **options)
    trainer.fit(model, loader if loader is not None else data(), ckpt_path=ckpt_path)
    return trainer


def build(cls=Plain, **options):
    torch.manual_seed(0)
    return cls(**options)


class Quiet(StructuredPruning):
    """Writes no report."""

    def on_fit_end(self, trainer, pl_module):
        pass


@pytest.mark.parametrize("cls", [Plain, NoForward])
@pytest.mark.parametrize("start_epoch", [0, 1])
@pytest.mark.parametrize("module", [None, "net"])
def test_half_of_the_channels_go_at_the_start_epoch(cls, start_epoch, module):
    widths = []

    class Watch(Quiet):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            widths.append((trainer.current_epoch, pl_module.net.conv.out_channels))

    model = build(cls)
    callback = Watch(0.5, start_epoch=start_epoch, module=module)
    trainer = fit(model, callback)
    assert trainer.callback_metrics["prune/channels"] == 0.5
    expected = {e: CHANNELS if e < start_epoch else CHANNELS // 2 for e in range(2)}
    assert all(width == expected[epoch] for epoch, width in widths)
    assert len(widths) == 8
    assert callback.pruner.current_step == 1
    assert model.net.conv.weight.shape == (4, 3, 3, 3)
    assert model.net.fc.weight.shape == (2, 4)


def test_schedule_and_phases_are_logged_every_epoch():
    seen = []

    class Collect(Quiet):
        def on_train_epoch_start(self, trainer, pl_module):
            seen.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("prune/")})
            super().on_train_epoch_start(trainer, pl_module)

    model = build()
    callback = Collect(0.5, sparse_start_epoch=1, start_epoch=2, every_n_epochs=2, iterative_steps=2)
    trainer = fit(model, callback, max_epochs=6)
    rows = [*seen[1:], {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("prune/")}]
    assert [PHASES[int(r["prune/phase"])] for r in rows] == [
        "dense",
        "sparse",
        "prune",
        "sparse",
        "prune",
        "fine-tune",
    ]
    assert [r["prune/channels"] for r in rows] == [0, 0, 0.25, 0.25, 0.5, 0.5]
    assert [r["prune/target_reached"] for r in rows] == [0, 0, 0, 0, 1, 1]
    # conv 8*27, bn 2*8, fc 2*8+2 parameters; 250 in all, 4 channels hold (27 + 2 + 2) * 4 = 124 of them
    assert rows[-1]["prune/sparsity"] == pytest.approx(124 / 250)
    assert rows[-1]["prune/macs"] == pytest.approx(0.5)


def test_should_prune_can_be_overridden():
    class Late(Quiet):
        def should_prune(self, epoch):
            return epoch == 2 and not self.target_reached

    model = build()
    fit(model, Late(0.5, start_epoch=0), max_epochs=2)
    assert model.net.conv.out_channels == CHANNELS
    fit(model, Late(0.5, start_epoch=0), max_epochs=3)
    assert model.net.conv.out_channels == CHANNELS // 2


def test_a_cut_that_removes_nothing_is_pointed_out():
    with pytest.warns(UserWarning, match=r"cut of epoch 1 removes nothing.*explain\(name, dim\)"):
        fit(build(), Quiet(0.5, options={"ignored_layers": ["*"]}))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"pruning_ratio": 1.2}, r"\[0, 1\), got 1.2"),
        ({"start_epoch": -1}, "start_epoch must be a whole number of at least 0, got -1"),
        ({"every_n_epochs": 0}, "every_n_epochs"),
        ({"iterative_steps": 1.5}, "iterative_steps"),
        ({"options": 5}, "options must be a PruningOptions or a dict of its fields, got int"),
        (
            {"distillation": ["logits"]},
            "distillation must be a Distillation or a dict of its .*, got list",
        ),
        ({"options": {"round_too": 8}}, "no field 'round_too'; the nearest are round_to"),
        ({"options": {"pruning_ratio": 0.5}}, "no field 'pruning_ratio'"),
    ],
)
def test_wrong_options_are_named(options, match):
    with pytest.raises(OptionError, match=match):
        StructuredPruning(**options)


def test_unknown_module_is_named_before_training():
    with pytest.raises(OptionError, match=r"'nett' names no submodule of Plain; the nearest are .*'net'"):
        fit(build(), Quiet(module="nett"))


def test_a_second_fit_goes_on_with_the_pruned_network_and_cuts_no_further():
    model, callback = build(), Quiet(0.5)
    fit(model, callback)
    fit(model, callback)
    assert model.net.conv.out_channels == CHANNELS // 2


@pytest.mark.parametrize(
    ("same_trainer", "second"),
    [(False, [7, 5, 4, 4]), (True, [5, 4, 4])],
    ids=["new Trainer", "same Trainer"],
)
def test_a_schedule_that_a_fit_left_unfinished_goes_on_in_the_next(same_trainer, second):
    """Three cuts, of which the first fit has time for one; a new Trainer counts its epochs from zero."""
    widths = []

    class Watch(Quiet):
        def on_train_epoch_end(self, trainer, pl_module):
            super().on_train_epoch_end(trainer, pl_module)
            widths.append(pl_module.net.conv.out_channels)

    model, callback = build(), Watch(0.5, start_epoch=1, iterative_steps=3)
    trainer = fit(model, callback)
    assert (widths, callback.steps_done) == ([CHANNELS, 7], 1)
    if same_trainer:
        trainer.fit_loop.max_epochs = 5
        trainer.fit(model, data())
    else:
        trainer = fit(model, callback, max_epochs=4)
    assert (widths[2:], callback.steps_done) == (second, 3)
    assert trainer.callback_metrics["prune/channels"] == 0.5


class Wide(NoForward):
    def __init__(self):
        super().__init__()
        self.net.conv, self.net.bn = nn.Conv2d(3, 24, 3, bias=False), nn.BatchNorm2d(24)
        self.net.fc = nn.Linear(24, 2)


@pytest.mark.parametrize("distillation", [None, {}], ids=["alone", "taught"])
def test_a_callback_that_pruned_another_network_is_as_good_as_new(distillation):
    def run(callback):
        model = build(Wide)
        trainer = fit(model, callback)
        ours = {k: v for k, v in trainer.callback_metrics.items() if k.startswith("prune/")}
        return model.state_dict(), ours, callback.steps_done

    def new():
        return Quiet(0.5, start_epoch=1, module="net", distillation=distillation)

    used = new()
    fit(build(NoForward), used)
    expected, metrics, steps = run(new())
    state, found, done = run(used)
    assert state["net.conv.weight"].shape[0] == 12
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert (found, done) == (metrics, steps)


def test_the_callback_leaves_random_states_and_loaders_alone():
    """A run whose callback never cuts nor regularises equals one without it, whatever is random in it."""

    class Noisy(TensorDataset):
        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            return x + torch.rand(()) * 0.1, y

    class Dropped(Plain):
        def forward(self, x):
            return super().forward(nn.functional.dropout(x, training=self.training))

    def run(*callbacks):
        model, dataset = build(Dropped), Noisy(*data().dataset.tensors)
        torch.manual_seed(3)
        fit(model, *callbacks, loader=DataLoader(dataset, batch_size=4, shuffle=True))
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    alone = run()
    assert torch.equal(alone, run(Quiet(0.5, start_epoch=9, sparse_start_epoch=9)))
    assert torch.equal(alone, run(Quiet(0.0, start_epoch=0)))  # looks at a batch before epoch 0


@pytest.mark.parametrize("policy", ["raise", "skip", "zero"])
def test_gradients_that_are_not_finite_follow_the_policy(policy):
    class Bad(Plain):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if batch_idx == 1 else loss

    model = build(Bad)
    callback = Quiet(0.5, start_epoch=5, options={"nan_policy": policy})
    if policy == "raise":
        with pytest.raises(PruneError, match=r"gradient of 'net.conv.weight' is not finite at step 1"):
            fit(model, callback, max_epochs=1)
        return
    with pytest.warns(UserWarning, match=r"gradient of 'net.conv.weight' is not finite at step 1"):
        trainer = fit(model, callback, max_epochs=1)
    assert trainer.callback_metrics["prune/nonfinite_gradients"] == (1 if policy == "zero" else 3)
    assert all(torch.isfinite(p).all() for p in model.parameters()) == (policy == "zero")
