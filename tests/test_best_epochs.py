"""Which epoch is best, and when to stop, where unpruned epochs would win every comparison."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from test_callback import Plain, Quiet, build, data, fit, pytestmark  # noqa: F401 - same filters

from lightning_prune.training.checkpointing import PrunedEarlyStopping, PrunedModelCheckpoint


class Scripted(Plain):
    """Validation accuracy by epoch, as written here: highest before the cut."""

    scores = (0.9, 0.95, 0.6, 0.7, 0.65, 0.6)

    def validation_step(self, batch, batch_idx):
        if not self.trainer.sanity_checking:
            self.log("val_acc", torch.tensor(self.scores[self.trainer.current_epoch]))

    def val_dataloader(self):
        return data()


def test_the_best_pruned_epoch_is_kept(tmp_path):
    saver = PrunedModelCheckpoint(dirpath=tmp_path, filename="{epoch}", monitor="val_acc", mode="max")
    fit(build(Scripted), Quiet(0.5, start_epoch=2), saver, max_epochs=6, enable_checkpointing=True)
    assert saver.best_model_path.endswith("epoch=3.ckpt")
    assert [p.name for p in tmp_path.iterdir()] == ["epoch=3.ckpt"]


def test_a_step_right_after_the_cut_is_not_judged_by_the_epoch_before(tmp_path):
    saver = PrunedModelCheckpoint(
        dirpath=tmp_path, filename="{step}", monitor="val_acc", mode="max", every_n_train_steps=1
    )
    fit(build(Scripted), Quiet(0.5, start_epoch=2), saver, max_epochs=6, enable_checkpointing=True)
    assert saver.best_model_score == pytest.approx(0.7)


def test_the_best_of_every_level_is_kept(tmp_path):
    saver = PrunedModelCheckpoint(
        dirpath=tmp_path, filename="{epoch}", monitor="val_acc", mode="max", per_level=True
    )
    callback = Quiet(0.5, start_epoch=2, every_n_epochs=2, iterative_steps=2)
    fit(build(Scripted), callback, saver, max_epochs=6, enable_checkpointing=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["epoch=1.ckpt", "epoch=3.ckpt", "epoch=4.ckpt"]
    assert saver.best_model_path.endswith("epoch=4.ckpt")


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_resumed_run_goes_on_with_the_best_of_its_level(tmp_path):
    def callbacks():
        saver = PrunedModelCheckpoint(
            dirpath=tmp_path / "best", filename="{epoch}", monitor="val_acc", mode="max", per_level=True
        )
        return Quiet(0.5, start_epoch=2), saver

    every = ModelCheckpoint(tmp_path / "all", "{epoch}", save_top_k=-1)
    fit(build(Scripted), *callbacks(), every, max_epochs=5, enable_checkpointing=True)
    pruning, saver = callbacks()
    path = tmp_path / "all" / "epoch=3.ckpt"
    fit(build(Scripted), pruning, saver, ckpt_path=path, max_epochs=6, enable_checkpointing=True)
    assert saver.best_model_path.endswith("epoch=3.ckpt")  # epochs 4 and 5 were worse


def test_saving_by_the_clock_waits_for_the_cut_too(tmp_path):
    saver = PrunedModelCheckpoint(
        dirpath=tmp_path, filename="{epoch}", save_top_k=-1, train_time_interval=timedelta(microseconds=1)
    )
    fit(build(Scripted), Quiet(0.5, start_epoch=2), saver, max_epochs=4, enable_checkpointing=True)
    # In the epoch of the cut nothing is validated yet.
    assert sorted(p.name for p in tmp_path.iterdir()) == ["epoch=3.ckpt"]


@pytest.mark.parametrize("at_epoch_end", [True, False], ids=["epoch end", "validation end"])
def test_early_stopping_begins_to_count_after_the_last_cut(at_epoch_end):
    stopper = PrunedEarlyStopping("val_acc", mode="max", patience=2, check_on_train_epoch_end=at_epoch_end)
    trainer = fit(build(Scripted), Quiet(0.5, start_epoch=2), stopper, max_epochs=6)
    assert trainer.current_epoch == 6  # best 0.7 in epoch 3, two worse ones after it
    assert stopper.best_score == pytest.approx(0.7)


@pytest.mark.parametrize(
    "callback",
    [ModelCheckpoint(monitor="val_acc"), EarlyStopping("val_acc")],
    ids=["ModelCheckpoint", "EarlyStopping"],
)
def test_callbacks_that_judge_unpruned_epochs_are_pointed_out(callback, tmp_path):
    name = type(callback).__name__
    with pytest.warns(UserWarning, match=rf"{name}\(monitor='val_acc'\).*use lightning_prune\.Pruned{name}"):
        fit(
            build(Scripted),
            Quiet(0.5),
            callback,
            max_epochs=1,
            enable_checkpointing=True,
            default_root_dir=tmp_path,
        )
