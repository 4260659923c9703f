"""Checkpoints of a pruned fit under ``weights_only``: nothing in them needs more than ``True``."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from test_callback import CHANNELS, Quiet, build, data, fit, pytestmark  # noqa: F401 - same filters
from test_checkpoint_lightning import Images, Judged, digest, every_epoch, quiet_trainer

from lightning_prune.checkpoint import PrunableMixin, load_from_checkpoint
from lightning_prune.errors import CheckpointMismatchError

EPOCHS = 4
LOOPS = ["fit", "validate", "test", "predict"]


class Told(PrunableMixin, Judged):
    """Has a hyperparameter, which may be an object of a class."""

    def __init__(self, where=None):
        super().__init__()
        self.save_hyperparameters()


def pruning(importance="taylor"):
    """Everything that a callback keeps: collected evidence, a teacher, a budget, weights of the penalty."""
    options = {"reg": 0.01, "importance": importance, "budget": {"params": 0.7}}
    return Quiet(start_epoch=1, iterative_steps=2, update_every=3, distillation={}, options=options)


def enter(loop, path, *callbacks, weights_only):
    """Take a checkpoint into a fresh model by one of the Trainer's loops."""
    model = build(Told)
    trainer = quiet_trainer(*callbacks, max_epochs=EPOCHS)
    loader = Images() if loop == "fit" else data()
    getattr(trainer, loop)(model, loader, ckpt_path=path, weights_only=weights_only)
    return trainer


def values(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model, expected):
    found = model.state_dict()
    return found.keys() == expected.keys() and all(torch.equal(found[k], v) for k, v in expected.items())


@pytest.mark.parametrize("importance", ["taylor", "random"])
@pytest.mark.parametrize("loop", LOOPS)
def test_every_loop_takes_a_checkpoint_as_mere_weights(tmp_path, loop, importance):
    saver = every_epoch(tmp_path)
    options = {"max_epochs": EPOCHS, "enable_checkpointing": True, "loader": Images()}
    whole = fit(build(Told), pruning(importance), EMAWeightAveraging(decay=0.5), saver, **options)
    both = [pruning(importance), *([EMAWeightAveraging(decay=0.5)] if loop == "fit" else [])]
    path = tmp_path / f"epoch={1 if loop == 'fit' else EPOCHS - 1}.ckpt"
    trainer = enter(loop, path, *both, weights_only=True)
    assert trainer.lightning_module.net.conv.out_channels < CHANNELS
    if loop == "fit":
        assert digest(trainer) == digest(whole)
    else:
        assert same(trainer.lightning_module, torch.load(path, weights_only=True)["state_dict"])


@pytest.mark.parametrize("loop", LOOPS)
def test_every_loop_takes_a_checkpoint_that_holds_mere_weights(tmp_path, loop):
    """All but ``fit``, which Lightning refuses."""
    saver = every_epoch(tmp_path, save_weights_only=True)
    options = {"max_epochs": EPOCHS, "enable_checkpointing": True, "loader": Images()}
    whole = fit(build(Told), pruning(), saver, **options)
    path = tmp_path / f"epoch={EPOCHS - 1}.ckpt"
    if loop == "fit":
        with pytest.raises(KeyError, match="checkpoint contains only the model"):
            enter(loop, path, pruning(), weights_only=True)
        return
    trainer = enter(loop, path, pruning(), weights_only=True)
    assert same(trainer.lightning_module, values(whole.lightning_module))
    assert trainer.lightning_module.net.conv.out_channels < CHANNELS


class Stripping(Told):
    """Saves a plain dict, as one does to leave some weights out; the plan is gone with it."""

    def on_save_checkpoint(self, checkpoint):
        checkpoint["state_dict"] = dict(checkpoint["state_dict"])


@pytest.mark.parametrize("loop", ["validate", "test", "predict"])
@pytest.mark.parametrize("weights_only", [True, False])
def test_no_loop_runs_on_shapes_that_nothing_explains(tmp_path, loop, weights_only):
    """The callback's own entry explains them, and a file of mere weights has none."""
    saver = every_epoch(tmp_path, save_weights_only=weights_only)
    fit(build(Stripping), pruning(), saver, max_epochs=EPOCHS, enable_checkpointing=True, loader=Images())
    path = tmp_path / f"epoch={EPOCHS - 1}.ckpt"
    if weights_only:
        with pytest.raises(CheckpointMismatchError, match="no plan that explains them"):
            enter(loop, path, pruning(), weights_only=True)
    else:
        net = enter(loop, path, pruning(), weights_only=True).lightning_module.net
        assert net.conv.out_channels == len(net.conv.weight) < CHANNELS


@pytest.fixture
def untold(tmp_path):
    """A checkpoint that ``weights_only=True`` refuses for what the user put into it, and its run."""
    options = {"max_epochs": EPOCHS, "enable_checkpointing": True, "loader": Images()}
    whole = fit(build(Told, where=Path("here")), pruning(), every_epoch(tmp_path), **options)
    return tmp_path, whole


@pytest.mark.parametrize("loop", LOOPS)
def test_every_loop_takes_a_trusted_checkpoint_whole(untold, loop):
    folder, whole = untold
    path = folder / f"epoch={1 if loop == 'fit' else EPOCHS - 1}.ckpt"
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        enter(loop, path, pruning(), weights_only=True)
    trainer = enter(loop, path, pruning(), weights_only=False)
    assert same(trainer.lightning_module, values(whole.lightning_module))
    if loop == "fit":
        assert digest(trainer) == digest(whole)


def test_a_class_loads_a_trusted_checkpoint_whole(untold):
    folder, whole = untold
    path = folder / f"epoch={EPOCHS - 1}.ckpt"
    for load in (
        Told.load_from_checkpoint,
        lambda *args, **options: load_from_checkpoint(Told, *args, **options),
    ):
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            load(path, weights_only=True)
        model = load(path, weights_only=False)
        assert same(model, values(whole.lightning_module))
        assert model.hparams.where == Path("here")
