"""Which epoch is best, and when to stop, where unpruned epochs would win every comparison."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from test_callback import CHANNELS, Plain, Quiet, build, data, fit, pytestmark  # noqa: F401 - same filters
from test_checkpoint_lightning import Slow

from lightning_prune.checkpoint import load_from_checkpoint, prepare
from lightning_prune.training.checkpointing import PrunedEarlyStopping, PrunedModelCheckpoint


class Scripted(Plain):
    """Validation accuracy by epoch, as written here: highest before the cut."""

    scores = (0.9, 0.95, 0.6, 0.7, 0.65, 0.6)

    def validation_step(self, batch, batch_idx):
        if not self.trainer.sanity_checking:
            self.log("val_acc", torch.tensor(self.scores[self.trainer.current_epoch]))

    def val_dataloader(self):
        return data()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def best_of(folder, filename="{epoch}", **options):
    return PrunedModelCheckpoint(dirpath=folder, filename=filename, monitor="val_acc", mode="max", **options)


def assert_holds(path, model):
    """Every tensor of a file has the bits of the model in memory."""
    loaded = load_from_checkpoint(type(model), path).state_dict()
    expected = model.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], value) for key, value in expected.items())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "epoch=3-step=16.ckpt"),
        ({"check_val_every_n_epoch": 2}, "epoch=3-step=16.ckpt"),
        ({"val_check_interval": 0.5}, "epoch=3-step=14.ckpt"),
    ],
    ids=["every epoch", "every other epoch", "twice an epoch"],
)
def test_the_best_pruned_epoch_is_kept(tmp_path, options, expected):
    saver = best_of(tmp_path, "{epoch}-{step}")
    callbacks = Quiet(0.5, start_epoch=2), saver
    fit(build(Scripted), *callbacks, max_epochs=6, enable_checkpointing=True, **options)
    assert saver.best_model_path == str(tmp_path / expected)
    assert names(tmp_path) == [expected]


@pytest.mark.parametrize(
    "options",
    [
        {"every_n_train_steps": 3, "save_top_k": -1},
        {"every_n_train_steps": 1, "save_top_k": -1, "monitor": "val_acc", "mode": "max", "save_last": True},
        {"train_time_interval": timedelta(0), "save_top_k": -1},
        {"save_top_k": 2, "monitor": "val_acc", "mode": "max", "save_last": True},
    ],
    ids=["steps", "judged steps", "clock", "best epochs"],
)
def test_without_a_schedule_it_saves_what_a_plain_one_saves(tmp_path, options):
    runs = []
    for cls in (ModelCheckpoint, PrunedModelCheckpoint):
        folder = tmp_path / cls.__name__
        saver = cls(dirpath=folder, filename="{epoch}-{step}", **options)
        fit(build(Scripted), saver, max_epochs=3, enable_checkpointing=True)
        files = {path.name: torch.load(path, weights_only=True) for path in folder.iterdir()}
        parts = {
            name: [file["global_step"], file["state_dict"], file["optimizer_states"]]
            for name, file in files.items()
        }
        paths = [path.replace(str(folder), "") for path in (saver.best_model_path, saver.last_model_path)]
        runs.append((parts, paths, saver.best_model_score))
    (plain_files, *plain), (files, *pruned) = runs
    assert len(plain_files) >= 3
    torch.testing.assert_close(files, plain_files, rtol=0, atol=0)
    assert pruned == plain


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize(("step", "known"), [(6, True), (8, True), (9, True), (9, False)])
def test_a_resumed_run_saves_the_steps_that_the_whole_run_saves(tmp_path, step, known):
    """The cut is before step 5; no epoch of the pruned network has ended before step 9."""

    def saver(name, cls=PrunedModelCheckpoint):
        return cls(dirpath=tmp_path / name, filename="{step}", save_top_k=-1, every_n_train_steps=1)

    def steps(name):
        return sorted(int(path.stem.removeprefix("step=")) for path in (tmp_path / name).iterdir())

    options = {"max_epochs": 4, "enable_checkpointing": True}
    savers = [saver("every", ModelCheckpoint), *([saver("whole")] if known else [])]
    fit(build(), *savers, Quiet(0.5, start_epoch=1), loader=Slow(), **options)
    if known:
        assert steps("whole") == [9, 10, 11, 12, 13, 14, 15, 16]
    path = tmp_path / "every" / f"step={step}.ckpt"
    pruning = Quiet(0.5, start_epoch=1)
    fit(build(), saver("resumed"), pruning, loader=Slow(), ckpt_path=path, **options)
    assert steps("resumed") == list(range(max(9, step + 1), 17))


class Ends(Callback):
    """The run breaks off after some step."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            raise RuntimeError("the end")


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("broken", [False, True], ids=["comes to its end", "breaks off"])
def test_a_fit_that_ends_before_the_cut_has_no_best_but_a_file_to_go_on_from(tmp_path, broken):
    def callbacks():
        files = {"save_on_exception": True} if broken else {"save_last": True}
        return Quiet(0.5, start_epoch=2), best_of(tmp_path, **files)

    model, (pruning, saver) = build(Scripted), callbacks()
    options = {"loader": Slow(), "enable_checkpointing": True}
    if broken:
        with pytest.raises(RuntimeError, match="the end"):
            fit(model, pruning, saver, Ends(6), max_epochs=6, **options)
    else:
        fit(model, pruning, saver, max_epochs=2, **options)
    assert model.net.conv.out_channels == CHANNELS
    assert (saver.best_model_path, saver.best_model_score) == ("", None)
    (path,) = tmp_path.iterdir()
    assert path.name == ("epoch=1.ckpt" if broken else "last.ckpt")
    assert_holds(path, model)
    pruning, saver = callbacks()
    fit(build(Scripted), pruning, saver, ckpt_path=path, max_epochs=6, **options)
    assert saver.best_model_path == str(tmp_path / "epoch=3.ckpt")
    assert load_from_checkpoint(Scripted, saver.best_model_path).net.conv.out_channels == CHANNELS // 2


def test_a_step_right_after_the_cut_is_not_judged_by_the_epoch_before(tmp_path):
    saver = best_of(tmp_path, "{step}", every_n_train_steps=1)
    fit(build(Scripted), Quiet(0.5, start_epoch=2), saver, max_epochs=6, enable_checkpointing=True)
    assert saver.best_model_score == pytest.approx(0.7)


def test_a_validation_within_the_epoch_of_the_cut_lets_its_other_steps_count(tmp_path):
    saver = PrunedModelCheckpoint(dirpath=tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    options = {"val_check_interval": 0.5, "max_epochs": 2, "enable_checkpointing": True}
    fit(build(Scripted), Quiet(0.5, start_epoch=1), saver, **options)
    assert names(tmp_path) == ["step=7.ckpt", "step=8.ckpt"]  # validated after steps 6 and 8


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_saver_may_serve_another_network(tmp_path):
    options = {"save_top_k": -1, "every_n_train_steps": 1, "per_level": True}
    saver = PrunedModelCheckpoint(dirpath=tmp_path, filename="{step}", **options)
    fit(build(), Quiet(0.5, start_epoch=1), saver, max_epochs=3, enable_checkpointing=True)
    before = set(names(tmp_path))
    fit(build(), Quiet(0.5, start_epoch=1), saver, max_epochs=1, enable_checkpointing=True)
    assert set(names(tmp_path)) - before == {f"step={step}-v1.ckpt" for step in (1, 2, 3, 4)}


def test_the_best_of_every_level_is_kept(tmp_path):
    saver = best_of(tmp_path, per_level=True)
    callback = Quiet(0.5, start_epoch=2, every_n_epochs=2, iterative_steps=2)
    fit(build(Scripted), callback, saver, max_epochs=6, enable_checkpointing=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["epoch=1.ckpt", "epoch=3.ckpt", "epoch=4.ckpt"]
    assert saver.best_model_path.endswith("epoch=4.ckpt")


def test_the_level_may_stand_in_the_name(tmp_path):
    name = "{epoch}-{prune/sparsity:.2f}-{val_acc:.3f}"
    saver = best_of(tmp_path, name, auto_insert_metric_name=False, per_level=True)
    callback = Quiet(0.5, start_epoch=1, iterative_steps=2)
    fit(build(Scripted), callback, saver, max_epochs=3, enable_checkpointing=True)
    assert names(tmp_path) == ["0-0.00-0.900.ckpt", "1-0.25-0.950.ckpt", "2-0.50-0.600.ckpt"]


class Writes(Callback):
    """Writes a file after the cut and before anything that the savers do in its epoch."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (2, 0):
            trainer.save_checkpoint(self.path)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_run_that_goes_on_right_after_the_cut_begins_anew(tmp_path):
    def callbacks():
        return Quiet(0.5, start_epoch=2), best_of(tmp_path / "best", per_level=True)

    path, options = tmp_path / "cut.ckpt", {"enable_checkpointing": True}
    fit(build(Scripted), *callbacks(), Writes(path), loader=Slow(), max_epochs=3, **options)
    pruning, saver = callbacks()
    fit(build(Scripted), pruning, saver, ckpt_path=path, loader=Slow(), max_epochs=6, **options)
    assert saver.best_model_path == str(tmp_path / "best" / "epoch=3.ckpt")


@pytest.mark.parametrize("alone", [False, True], ids=["with pruning", "alone"])
def test_validating_a_file_leaves_the_best_of_its_level(tmp_path, alone):
    def callbacks():
        return Quiet(0.5, start_epoch=2), best_of(tmp_path, per_level=True)

    pruning, saver = callbacks()
    fit(build(Scripted), pruning, saver, max_epochs=4, enable_checkpointing=True)
    path, (pruning, saver) = saver.best_model_path, callbacks()
    quiet = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu"}
    company = [saver] if alone else [pruning, saver]
    model = build(Scripted)
    prepare(model)
    Trainer(callbacks=company, **quiet).validate(model, ckpt_path=path, verbose=False)
    assert saver.best_model_path == path


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_resumed_run_goes_on_with_the_best_of_its_level(tmp_path):
    def callbacks():
        return Quiet(0.5, start_epoch=2), best_of(tmp_path / "best", per_level=True)

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


class Saver(ModelCheckpoint):
    """A class of the user's own."""


@pytest.mark.parametrize(
    ("callback", "ours"),
    [
        (ModelCheckpoint(monitor="val_acc"), "PrunedModelCheckpoint"),
        (Saver(monitor="val_acc"), "PrunedModelCheckpoint"),
        (EarlyStopping("val_acc"), "PrunedEarlyStopping"),
    ],
    ids=["ModelCheckpoint", "Saver", "EarlyStopping"],
)
def test_callbacks_that_judge_unpruned_epochs_are_pointed_out(callback, ours, tmp_path):
    name = type(callback).__name__
    with pytest.warns(UserWarning, match=rf"{name}\(monitor='val_acc'\).*use lightning_prune\.{ours},"):
        fit(
            build(Scripted),
            Quiet(0.5),
            callback,
            max_epochs=1,
            enable_checkpointing=True,
            default_root_dir=tmp_path,
        )
