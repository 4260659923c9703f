"""Statistics of batch norms after a cut, against means taken by hand; nothing else may move."""

from __future__ import annotations

import pytest
import torch
from test_callback import Plain, Quiet, build, data, fit, pytestmark  # noqa: F401 - same filters
from test_checkpoint_lightning import Cosine, digest, every_epoch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_prune.errors import OptionError


class Watch(Quiet):
    """Remembers what the cut epoch begins with."""

    def on_train_epoch_start(self, trainer, pl_module):
        before = torch.get_rng_state()
        super().on_train_epoch_start(trainer, pl_module)
        if trainer.current_epoch == 1:
            self.untouched = torch.equal(before, torch.get_rng_state())
            self.net = {k: v.clone() for k, v in pl_module.net.state_dict().items()}
            self.training = [m.training for m in pl_module.modules()]


def by_hand(weight, x, batches):
    """Mean over batches of each batch's mean and unbiased variance, channel by channel."""
    means, variances = [], []
    for indices in batches:
        h = nn.functional.conv2d(x[indices], weight)
        channels = [h[:, k].flatten() for k in range(h.shape[1])]
        means.append([float(c.sum() / len(c)) for c in channels])
        variances.append([float(((c - c.sum() / len(c)) ** 2).sum() / (len(c) - 1)) for c in channels])
    return torch.tensor(means).mean(0), torch.tensor(variances).mean(0)


def test_statistics_are_those_of_training_batches():
    loader = data(16)
    callback = Watch(recalibrate_batches=2)
    fit(build(), callback, loader=loader)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1)).tolist()
    x = loader.dataset.tensors[0]
    mean, variance = by_hand(callback.net["conv.weight"], x, [order[:4], order[4:8]])
    torch.testing.assert_close(callback.net["bn.running_mean"], mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(callback.net["bn.running_var"], variance, rtol=1e-5, atol=1e-6)
    assert callback.net["bn.num_batches_tracked"] == 4  # of the first epoch
    assert callback.untouched
    assert all(callback.training)


class Noting(Plain):
    """Counts its own steps, and draws in each."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((batch[0][0, 0, 0, 0].item(), torch.rand(()).item()))
        return super().training_step(batch, batch_idx)


def shuffled(generator=None):
    return DataLoader(data(16).dataset, batch_size=4, shuffle=True, generator=generator)


@pytest.mark.parametrize("own", [False, True])
def test_order_and_draws_of_the_fit_do_not_move(own):
    seen = []
    for batches in (0, 3):
        model = build(Noting)
        loader = shuffled(torch.Generator().manual_seed(5) if own else None)
        fit(model, Quiet(recalibrate_batches=batches), loader=loader)
        seen.append(model.seen)
    assert len(seen[0]) == 8
    assert seen[0] == seen[1]


def test_frozen_layers_keep_their_statistics():
    class Frozen(Plain):
        def on_train_epoch_start(self):
            self.net.bn.eval()

        def on_train_batch_start(self, batch, batch_idx):
            self.net.bn.eval()

    class Cut(Watch):
        def on_train_epoch_start(self, trainer, pl_module):
            pl_module.net.bn.eval()
            super().on_train_epoch_start(trainer, pl_module)

    callback = Cut(recalibrate_batches=2)
    fit(build(Frozen), callback)
    assert torch.equal(callback.net["bn.running_mean"], torch.zeros(4))


def test_a_resumed_fit_has_the_same_bits(tmp_path):
    def callback():
        return Quiet(start_epoch=1, iterative_steps=2, recalibrate_batches=2)

    options = {"max_epochs": 4, "loader": data()}
    whole = fit(build(Cosine), callback(), every_epoch(tmp_path), enable_checkpointing=True, **options)
    for epoch in range(3):
        resumed = fit(build(Cosine), callback(), ckpt_path=tmp_path / f"epoch={epoch}.ckpt", **options)
        assert digest(resumed) == digest(whole), f"from epoch {epoch}"


class Stream(IterableDataset):
    def __iter__(self):
        return iter(TensorDataset(*data(16).dataset.tensors))


def test_a_training_set_that_only_goes_forward_is_refused():
    with pytest.raises(OptionError, match="found Stream, which only goes forward"):
        fit(build(), Quiet(recalibrate_batches=1), loader=DataLoader(Stream(), batch_size=4))


class AtOnce(TensorDataset):
    """Fetches whole batches, as the digits of the demo do."""

    def __getitems__(self, indices):
        return self[torch.tensor(indices)]


def as_it_is(batch):
    return batch


@pytest.mark.parametrize("has_example", [True, False])
def test_datasets_that_fetch_batches_at_once_are_asked_that_way(has_example):
    loader = DataLoader(AtOnce(*data(16).dataset.tensors), batch_size=4, collate_fn=as_it_is)
    callback, model = Watch(recalibrate_batches=2), build()
    model.example_input_array = torch.ones(2, 3, 5, 5) if has_example else None
    fit(model, callback, loader=loader)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1)).tolist()
    mean, _ = by_hand(callback.net["conv.weight"], loader.dataset.tensors[0], [order[:4], order[4:8]])
    torch.testing.assert_close(callback.net["bn.running_mean"], mean, rtol=1e-5, atol=1e-6)


def test_a_first_cut_takes_its_batch_that_way_too():
    loader = DataLoader(AtOnce(*data(16).dataset.tensors), batch_size=4, collate_fn=as_it_is)
    model = build()
    fit(model, Quiet(start_epoch=0), loader=loader)
    assert model.net.conv.out_channels == 4
