"""LightningCLI builds the callbacks from YAML and from the command line, and its help explains them."""

from __future__ import annotations

import inspect
import json
import re

import pytest
import torch
from brevity import measure_briefly
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from test_callback import CHANNELS, Plain, data, pytestmark  # noqa: F401 - same filters

from lightning_prune import PrunedModelCheckpoint, PruningOptions, StructuredPruning
from lightning_prune.scores.importance import IMPORTANCES
from lightning_prune.scores.normalizers import NORMALIZERS
from lightning_prune.selection.schedules import SCHEDULES
from lightning_prune.training.distilling import Distillation

QUIET = {
    "logger": "false",
    "accelerator": "cpu",
    "enable_progress_bar": "false",
    "enable_model_summary": "false",
}


class Model(Plain):
    def __init__(self):
        super().__init__()

    def train_dataloader(self):
        return data()


class Pinned(LightningCLI):
    """Knows the callback by a name of its own."""

    def add_arguments_to_parser(self, parser):
        parser.add_lightning_class_args(StructuredPruning, "prune")


def start(*words, cls=LightningCLI, run=False, save=None):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["train.py", *(["fit"] if run else []), *words])
        patch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's, not ours
        measure_briefly(patch)
        return cls(Model, run=run, save_config_callback=save, seed_everything_default=0)


def build(*words, **options):
    cli = start(*words, *(f"--trainer.{name}={value}" for name, value in QUIET.items()), **options)
    return cli, next(c for c in cli.trainer.callbacks if isinstance(c, StructuredPruning))


def test_yaml_names_the_class_by_its_path(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(
        f"""
trainer:
  max_epochs: 1
  enable_checkpointing: false
  default_root_dir: {tmp_path}
  callbacks:
    - class_path: lightning_prune.StructuredPruning
      init_args:
        pruning_ratio: 0.25
        start_epoch: 0
        options:
          round_to: 2
          ignored_layers: ["net.fc"]
          pruning_ratio_dict: {{net.conv: 0.5}}
"""
    )
    cli, callback = build(f"--config={file}", run=True)
    assert callback.options == PruningOptions(
        round_to=2, ignored_layers=["net.fc"], pruning_ratio_dict={"net.conv": 0.5}
    )
    assert cli.model.net.conv.out_channels == CHANNELS // 2
    assert callback.report.result.targets[0].asked == 0.25
    assert (tmp_path / "report.json").exists()


def test_the_command_line_knows_the_short_name():
    _, callback = build(
        "--trainer.callbacks+=StructuredPruning",
        "--trainer.callbacks.pruning_ratio=0.25",
        "--trainer.callbacks.iterative_steps=3",
        "--trainer.callbacks.options.budget={macs: 0.5}",
    )
    assert (callback.pruning_ratio, callback.iterative_steps) == (0.25, 3)
    assert callback.options == PruningOptions(ignored_layers=[], budget={"macs": 0.5})


def test_a_command_line_of_its_own_may_pin_it():
    _, callback = build("--prune.start_epoch=3", "--prune.options.round_to=4", cls=Pinned)
    assert (callback.start_epoch, callback.options.round_to) == (3, 4)


def test_the_neighbours_are_known_too(tmp_path):
    cli, _ = build(
        "--trainer.callbacks+=StructuredPruning",
        "--trainer.callbacks+=PrunedModelCheckpoint",
        "--trainer.callbacks.monitor=val_acc",
        "--trainer.callbacks.per_level=true",
        f"--trainer.callbacks.dirpath={tmp_path}",
    )
    saver = cli.trainer.checkpoint_callback
    assert type(saver) is PrunedModelCheckpoint
    assert (saver.monitor, saver.per_level) == ("val_acc", True)


EVERYTHING = {
    "pruning_ratio": 0.25,
    "module": "net",
    "sparse_start_epoch": 1,
    "start_epoch": 2,
    "every_n_epochs": 2,
    "iterative_steps": 2,
    "update_every": 3,
    "recalibrate_batches": 1,
    "distillation": {
        "weight": 0.5,
        "temperature": 2.0,
        "features": ["conv", "bn"],
        "feature_weight": 0.25,
        "class_dim": 1,
    },
    "options": {
        "importance": "lamp",
        "pruning_ratio_dict": {"conv": 0.5},
        "ignored_layers": ["fc"],
        "round_to": 2,
        "normalizer": None,
        "reg": 0.01,
        "nan_policy": "zero",
    },
}


def test_the_saved_configuration_restarts_an_equal_fit(tmp_path):
    """No argument has its default."""
    callbacks = [{"class_path": "test_callback.Quiet", "init_args": EVERYTHING}]
    trainer = {"max_epochs": 5, "enable_checkpointing": False, "default_root_dir": str(tmp_path)}
    file, saved = tmp_path / "given.json", tmp_path / "config.yaml"
    file.write_text(json.dumps({"trainer": {**trainer, "callbacks": callbacks}}))
    first, ours = build(f"--config={file}", run=True, save=SaveConfigCallback)
    assert ours.steps_done == 2
    assert first.model.net.conv.out_channels == CHANNELS // 2
    again = start(f"--config={saved}", run=True)
    theirs = next(c for c in again.trainer.callbacks if isinstance(c, StructuredPruning))
    defaults = StructuredPruning()
    for name in inspect.signature(StructuredPruning).parameters:
        assert getattr(theirs, name) == getattr(ours, name) != getattr(defaults, name)
    assert theirs.distillation == Distillation(0.5, 2.0, ("conv", "bn"), 0.25, 1)
    torch.testing.assert_close(again.model.state_dict(), first.model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("pruning_ratio=much", "Expected a <class 'float'>. Got value: much"),
        ("iterative_steps=1.5", "Expected a <class 'int'>. Got value: 1.5"),
    ],
)
def test_a_wrong_word_is_refused_with_its_name(word, text, capsys):
    with pytest.raises(SystemExit):
        build("--trainer.callbacks+=StructuredPruning", f"--trainer.callbacks.{word}")
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "match"),
    [
        ("pruning_ratio=1.5", r"must be a number in \[0, 1\), got 1.5"),
        ("options.round_too=8", "no field 'round_too'; the nearest are round_to"),
    ],
)
def test_our_own_errors_come_through(word, match):
    with pytest.raises(ValueError, match=match):
        build("--trainer.callbacks+=StructuredPruning", f"--trainer.callbacks.{word}")


@pytest.mark.parametrize(
    ("options", "words", "sentences"),
    [
        (
            {},
            ["--trainer.callbacks.help=StructuredPruning"],
            [
                "Prune a network while it trains",
                "Share of the units of every group to remove by the last cut, in [0, 1). "
                "(type: float, default: 0.5)",
                "Epoch that begins with the first cut, 0-based. (type: int, default: 1)",
                "(type: str | null, default: null)",
            ],
        ),
        (
            {"cls": Pinned},
            ["--prune.options.help"],
            [
                "Keep channel counts at multiples of this; None: any count.",
                "(type: int | null, default: null)",
            ],
        ),
    ],
    ids=["callback", "options"],
)
def test_help_says_what_every_argument_means(options, words, sentences, capsys):
    with pytest.raises(SystemExit) as stop:
        start(*words, **options)
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for sentence in sentences:
        assert sentence in text


@pytest.mark.parametrize(
    "table", [IMPORTANCES, NORMALIZERS, SCHEDULES], ids=["importance", "scale", "course"]
)
def test_help_lists_the_names_that_an_option_takes(table, capsys):
    with pytest.raises(SystemExit):
        start("--prune.options.help", cls=Pinned)
    words = set(re.findall(r"[a-z0-9_]+", capsys.readouterr().out))
    assert set(table) <= words
