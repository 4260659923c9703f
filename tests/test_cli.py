"""lightning-prune: what it says, what it leaves behind, how it ends."""

from __future__ import annotations

import csv
import json
import logging
import re
import signal
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from brevity import measure_briefly
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_prune.checkpoint import load_from_checkpoint
from lightning_prune.commands import entry, running, train
from lightning_prune.commands.table import COMMANDS
from lightning_prune.data import Digits
from lightning_prune.models import Classifier, ResNet

pytestmark = [  # Lightning 2.6 on torch 2.13, and advice that a test does not need
    pytest.mark.filterwarnings(f"ignore:{text}") for text in (".*LeafSpec", ".*does not have many workers")
]
SMALL = [
    "experiment=quick",
    "trainer.max_epochs=4",
    "trainer.accelerator=cpu",
    "trainer.enable_progress_bar=false",
    "model.net.widths=[16,32]",
    "data.batch_size=200",
    "trainer.log_every_n_steps=1",
]


class Answer(NamedTuple):
    code: object
    out: str
    err: str


class StopInSecondEpoch(Callback):
    """Press Ctrl-C."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == 1:
            raise KeyboardInterrupt


@pytest.fixture
def logs() -> Iterator[None]:
    """Give back what Hydra's logging set-up and Lightning's Ctrl-C change for good."""
    loggers = [logging.getLogger(name) for name in (None, "lightning.pytorch")]
    before = [(logger, logger.level, logger.handlers[:]) for logger in loggers]
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)
    for logger, level, handlers in before:
        for extra in set(logger.handlers) - set(handlers):
            extra.close()
        logger.setLevel(level)
        logger.handlers[:] = handlers


@pytest.fixture
def command(
    logs: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Answer]:
    """Give a function that types one command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    measure_briefly(monkeypatch)

    def run(*words: str) -> Answer:
        monkeypatch.setattr(sys, "argv", ["lightning-prune", *words])
        with pytest.raises(SystemExit) as stop:
            entry.main()
        return Answer(stop.value.code, *capsys.readouterr())

    return run


def _rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def _values(folder: Path, name: str) -> list[float]:
    return [float(row[name]) for row in _rows(folder) if row.get(name)]


def group_line(out: str, name: str) -> list[str]:
    """Give the cells of a group's line in a printed plan."""
    (line,) = [line.split() for line in out.splitlines() if line.split()[-1:] == [name]]
    return line


def test_help_teaches_and_needs_no_extra(command, monkeypatch):
    for extra in ("sklearn", "tensorboard", "wandb", "matplotlib"):
        monkeypatch.setitem(sys.modules, extra, None)
    code, out, _ = command("--help")
    assert code == 0
    assert all(f"lightning-prune {name} " in out and does in out for name, does in COMMANDS.items())
    for word in (
        "model: resnet, timm, vit",
        "pruning: default",
        "lightning-prune plan",
        "--multirun",
        "max_epochs: 30",
    ):
        assert word in out


@pytest.mark.parametrize("words", [["--version"], ["plan", "--version"]], ids=" ".join)
def test_the_version_is_ours(command, words):
    assert command(*words) == (0, f"lightning-prune {version('lightning-prune')}\n", "")


def test_cfg_job_shows_the_configuration_and_runs_nothing(command, tmp_path):
    code, out, _ = command("--cfg", "job", "model=vit", "seed=7")
    assert code == 0
    assert "lightning_prune.models.ViT" in out
    assert "seed: 7" in out
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["pruning.pruning_ratio=1.2"], ["pruning_ratio", "1.2", "[0, 1)"]),
        (["pruning.options.ignored_layers=[stam]"], ["stam", "stem"]),
        (["pruning.options.max_pruning_ratio=0.1"], ["budget", "0.5"]),
        (["pruning.options.budget.macs=half"], ["budget", "half"]),
        (["pruning.options.importance=l3"], ["l3", "l1"]),
        (["pruning.options.nan_policy=maybe"], ["maybe", "skip"]),
        (["pruning.module=nett"], ["nett", "net"]),
        (["pruning.start_epoch=-1"], ["start_epoch", "-1"]),
        (["+pruning.options.rond_to=8"], ["rond_to", "round_to"]),
        (["pruning.rond_to=8"], ["rond_to"]),
        (["trainer.max_epoch=3"], ["max_epoch", "max_epochs"]),
        (["trainer.max_epochs=abc"], ["max_epochs", "abc"]),
        (["+trainer.nonsense=1"], ["Trainer", "nonsense"]),
        (["model=resnett"], ["resnett", "resnet", "vit"]),
        (["model.lr=-1"], ["lr=-1", "> 0"]),
        (["data.batch_size=0"], ["batch_size=0", "at least 1"]),
        (["model=vit", "model.net.num_heads=5"], ["num_heads=5", "divide"]),
        (["ckpt_path=nowhere.ckpt"], ["nowhere.ckpt", "last.ckpt"]),
        ([f"ckpt_path={__file__}"], ["no checkpoint, or only a part of one", "last.ckpt"]),
        (["seed="], ["seed"]),
        (["seed=[1"], ["seed=[1"]),
        (["seed=4294967296"], ["seed=4294967296", "below 2**32"]),
        (["plan", "seed=-1"], ["seed=-1", "at least 0"]),
        (["train", "pruning.pruning_ratio=1.2"], ["1.2", "[0, 1)"]),
        (["plam", "model=vit"], ["plam", "did you mean `lightning-prune plan`?", "lightning-prune train"]),
        (["--frobnicate"], ["--frobnicate", "`lightning-prune --help`"]),
        (["plan", "--jsn"], ["--jsn", "`lightning-prune --help`"]),
        (["report"], ["required", "`lightning-prune --help`"]),
        (["plan", "pruning=none"], ["pruning=none"]),
        (["plan", "pruning.pruning_ratio=1.2"], ["1.2", "[0, 1)"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_be_done_ends_with_one_message_and_leaves_nothing(command, tmp_path, words, parts):
    code, out, err = command(*words)
    assert code == 1
    assert "Traceback" not in out + err
    assert "Error executing job" not in err
    for part in parts:
        assert part in err
    assert not any(tmp_path.iterdir()), "a run that never began left something behind"


def test_a_traceback_is_there_for_those_who_ask(command, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["lightning-prune", "pruning.pruning_ratio=1.2"])
    with pytest.raises(Exception, match=r"1\.2"):
        entry.main()


def test_discarding_a_run_spares_what_else_lies_there(tmp_path):
    run = tmp_path / "date" / "time"
    (run / ".hydra").mkdir(parents=True)
    (run / ".hydra" / "config.yaml").touch()
    (tmp_path / "date" / "other.txt").touch()
    train._discard(run)
    assert not run.exists()
    assert (tmp_path / "date" / "other.txt").exists()


def test_a_run_trains_prunes_reports_and_saves(command, tmp_path):
    code, _, err = command(*SMALL)
    assert code == 0, err
    (folder,) = (tmp_path / "outputs").glob("*/*")
    assert {
        "pruned.ckpt",
        "checkpoints",
        "metrics.csv",
        "report.html",
        "report.md",
        "report.json",
        "channels.png",
        "dense",
        ".hydra",
    } <= {path.name for path in folder.iterdir()}
    assert (folder / "checkpoints" / "last.ckpt").is_file()
    # The twin starts from the same weights and sees the same batches: before sparse learning nothing differs.
    assert _values(folder, "train/loss")[0] == _values(folder / "dense", "train/loss")[0]
    assert _values(folder, "train/loss")[2:] != _values(folder / "dense", "train/loss")[2:]
    assert _values(folder, "prune/macs")[-1] == pytest.approx(0.5, abs=0.01)
    assert "prune/macs" not in _rows(folder / "dense")[0]
    # The file is enough to go on with: a fresh model takes the pruned shapes from it.
    torch.load(folder / "pruned.ckpt", weights_only=True)
    model = load_from_checkpoint(Classifier, folder / "pruned.ckpt", net=ResNet(widths=(16, 32), depth=1))
    assert model.net.stem.out_channels < 16
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    (again,) = trainer.validate(model, datamodule=Digits(), verbose=False)
    assert again["val/acc"] == pytest.approx(_values(folder, "val/acc")[-1], abs=1e-6)


def test_pruning_none_trains_alone(command, tmp_path):
    code, _, err = command(*SMALL, "pruning=none", "callbacks=none", "logger=none", "trainer.max_epochs=1")
    assert code == 0, err
    (folder,) = (tmp_path / "outputs").glob("*/*")
    assert {path.name for path in folder.iterdir()} == {
        ".hydra",
        "checkpoints",
        "lightning-prune.log",
        "trained.ckpt",
    }


def test_a_sweep_runs_every_job_and_gets_the_tuned_metric(command, tmp_path, monkeypatch):
    returned = []
    run = running.run
    monkeypatch.setattr(running, "run", lambda cfg: returned.append(run(cfg)) or returned[-1])
    code, _, err = command("--multirun", *SMALL, "seed=0,1", "dense_twin=false", "trainer.max_epochs=1")
    assert code == 0, err
    (folder,) = (tmp_path / "multirun").glob("*/*")
    assert returned == [pytest.approx(_values(folder / job, "val/acc")[-1]) for job in "01"]
    assert returned[0] != returned[1]


def test_a_failing_job_of_a_sweep_is_named(command):
    code, _, err = command("--multirun", *SMALL, "pruning.pruning_ratio=1.2,1.3")
    assert code == 1
    assert "pruning.pruning_ratio=1.2" in err
    assert "Traceback" not in err


def test_an_unknown_tuned_metric_is_a_warning_not_an_error(command, tmp_path):
    code, _, _ = command(*SMALL, "tuned_metric=val/f1", "pruning=none", "trainer.max_epochs=1")
    assert code == 0
    (log,) = (tmp_path / "outputs").glob("*/*/lightning-prune.log")
    assert "tuned_metric=val/f1" in log.read_text()
    assert "val/acc" in log.read_text()


def test_ctrl_c_is_one_line_and_keeps_the_last_checkpoint(command, tmp_path):
    stop = f"+callbacks.stop._target_={__name__}.StopInSecondEpoch"
    code, _, err = command(*SMALL, stop, "dense_twin=false")
    assert code == 130
    (last,) = (tmp_path / "outputs").glob("*/*/checkpoints/last.ckpt")
    assert err.count("\n") == 1
    assert f"ckpt_path={last}" in err
    assert torch.load(last, weights_only=True)["epoch"] == 0


def test_ctrl_c_behind_the_last_line_says_nothing(command):
    assert command("plan", *SMALL).code == 0
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_ctrl_c_in_a_sweep_ends_all_of_it_and_keeps_the_run_in_hand(command, tmp_path):
    stop = f"+callbacks.stop._target_={__name__}.StopInSecondEpoch"
    words = [*SMALL, stop, "dense_twin=false", "hydra.sweep.dir=sweep"]
    code, _, err = command("--multirun", "seed=0,1", *words)
    assert code == 130
    assert f"ckpt_path={tmp_path / 'sweep' / '0' / 'checkpoints' / 'last.ckpt'}" in err
    assert "Traceback" not in err
    assert not (tmp_path / "sweep" / "1").exists()


def test_a_stopped_run_goes_on_from_its_checkpoint(command, tmp_path):
    stop = f"+callbacks.stop._target_={__name__}.StopInSecondEpoch"
    command(*SMALL, stop, "dense_twin=false", "hydra.run.dir=first")
    code, _, err = command(
        *SMALL, "dense_twin=false", "hydra.run.dir=second", "ckpt_path=first/checkpoints/last.ckpt"
    )
    assert code == 0, err
    assert [int(row["epoch"]) for row in _rows(tmp_path / "second") if row["val/acc"]] == [1, 2, 3]
    assert _values(tmp_path / "second", "prune/macs")[-1] == pytest.approx(0.5, abs=0.01)


def test_a_run_that_goes_on_takes_its_dense_twin_along(command, tmp_path):
    code, _, err = command(*SMALL, "hydra.run.dir=first", "trainer.max_epochs=2")
    assert code == 0, err
    code, _, err = command(*SMALL, "hydra.run.dir=second", "ckpt_path=first/checkpoints/last.ckpt")
    assert code == 0, err
    assert (
        "The dense twin goes on from first/dense/checkpoints/last.ckpt"
        in (tmp_path / "second" / "lightning-prune.log").read_text()
    )
    for run in ("second", "second/dense"):
        assert [int(row["epoch"]) for row in _rows(tmp_path / run) if row["val/acc"]] == [2, 3]


def test_a_folder_of_ones_own_is_found(command, tmp_path):
    own = tmp_path / "my" / "pruning"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text("defaults: [default, _self_]\nmodule: net\npruning_ratio: 0.25\n")
    code, out, err = command("plan", "--config-dir", "my", "pruning=mine")
    assert code == 0, err
    assert group_line(out, "stem.weight:0")[:2] == ["32", "24"]
    code, out, _ = command("--config-dir", "my", "pruning=mine", "--cfg", "job")
    assert code == 0
    assert "pruning_ratio: 0.25" in out


def test_plan_shows_groups_reasons_and_savings_and_touches_nothing(command, tmp_path):
    code, out, err = command("plan", "pruning=default", "pruning.module=net", "pruning.pruning_ratio=0.5")
    assert code == 0, err
    assert group_line(out, "stem.weight:0")[:2] == ["32", "16"]
    assert re.search(r"an output of the model: output +head.weight dim 0", out)
    dense = sum(p.numel() for p in ResNet().parameters())
    pruned = sum(p.numel() for p in ResNet(widths=(16, 32, 64)).parameters())
    assert re.search(rf"^ +0 +672 +{dense:,} +100.00%", out, flags=re.MULTILINE)
    assert re.search(rf"^ +1 +1 +336 +{pruned:,} +{pruned / dense:.2%}", out, flags=re.MULTILINE)
    assert not any(tmp_path.iterdir())


def test_plan_counts_heads(command):
    code, out, err = command("plan", "model=vit", "pruning=vit_heads")
    assert code == 0, err
    assert len(re.findall(r"^ +4 +2 +50% +\d+ +head +blocks\.", out, flags=re.MULTILINE)) == 3


def test_plan_shows_every_step_with_its_epoch_and_whether_the_budget_is_met(command):
    _, out, _ = command("plan", "trainer.max_epochs=20", "pruning.options.budget.macs=0.4")
    steps = [
        line.split() for line in out.splitlines() if re.match(r"^ +\d+ +\d+ +\d+ +[\d,]+ +[\d.]+% ", line)
    ]
    assert [(step[0], step[1]) for step in steps] == [("1", "6"), ("2", "7"), ("3", "8"), ("4", "9")]
    shares = [float(step[-1].rstrip("%")) for step in steps]
    assert shares == pytest.approx([85, 70, 55, 40], abs=1.5)  # an equal part of the way each
    assert f"asked to keep 40.00%, will keep {shares[-1]:.2f}%" in out


def test_plan_says_what_is_reachable_where_a_budget_is_not(command):
    code, out, err = command(
        "plan", "pruning.options.budget.macs=0.1", "pruning.options.ignored_layers=['stages.2.*']"
    )
    assert (code, out) == (1, "")
    assert "budget macs: 0.100 of" in err
    assert "Ask for at least" in err


def test_plan_as_json_is_json_and_nothing_else(command, tmp_path):
    code, out, _ = command(
        "plan", "--json", "pruning=default", "pruning.module=net", "pruning.pruning_ratio=0.5"
    )
    assert code == 0
    data = json.loads(out)
    assert data["model"] == "ResNet"
    assert data["inputs"] == "2x1x8x8 float32"
    stem = next(group for group in data["groups"] if group["name"] == "stem.weight:0")
    assert (stem["units"], stem["left"], stem["kind"]) == (32, 16, "channel")
    assert {"stem.weight:0", "bn.bias:0", "stages.0.0.conv1.weight:1"} <= set(stem["tensors"])
    assert [step["epoch"] for step in data["steps"]] == [None, 1]
    assert data["budget"] is None
    assert {
        "tensor": "head.weight",
        "dim": 0,
        "stays": 10,
        "size": 10,
        "reason": "an output of the model: output",
    } in data["frozen"]
    assert data["unknown_operations"] == []
    assert not any(tmp_path.iterdir())


def test_plan_draws_one_group(command):
    code, out, err = command("plan", "--diagram", "stages.0.0.conv1")
    assert code == 0, err
    assert out.splitlines()[:4] == [
        "graph LR",
        '  n0["<b>stages.0.0.conv1</b> Conv2d<br/>weight dim 0"]',
        '  n1["<b>stages.0.0.bn1</b> BatchNorm2d<br/>'
        'weight dim 0, bias dim 0, running_mean dim 0, running_var dim 0"]',
        '  n2["<b>stages.0.0.conv2</b> Conv2d<br/>weight dim 1"]',
    ]
    ties = [re.sub(r":\d+\)", ":N)", line.strip()) for line in out.splitlines()[4:]]
    assert ties == [
        'n0 -- "normalised with: batch_norm in stages.0.0.bn1 (resnet.py:N)" --- n1',
        'n0 -- "contracted: conv2d in stages.0.0.conv2 (resnet.py:N)" --- n2',
    ]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("stam", ["no group has", "stem.weight:0", "`lightning-prune plan` shows all 9"]),
        ("blocks.0.attn.qkv", ["more than one", "qkv.weight:0/head,"]),
    ],
)
def test_plan_does_not_guess_which_group_is_meant(command, name, parts):
    code, _, err = command("plan", "model=vit" if "blocks" in name else "model=resnet", "--diagram", name)
    assert code == 1
    assert all(part in err for part in parts)


class Blind(LightningModule):
    """Tells nobody what it eats."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(4, 2)


def test_plan_of_a_model_without_example_inputs_says_what_to_do(command, tmp_path):
    (tmp_path / "my" / "model").mkdir(parents=True)
    (tmp_path / "my" / "model" / "blind.yaml").write_text(f"_target_: {__name__}.Blind\n")
    code, _, err = command("plan", "--config-dir", "my", "model=blind")
    assert code == 1
    assert "a plan for Blind was asked for, but it has no example_input_array" in err


@pytest.mark.parametrize(
    ("words", "left"),
    [
        (["pruning.pruning_ratio=0.25"], "32 -> 24"),
        (["pruning.pruning_ratio=0.25", "pruning.options.budget.macs=0.5"], "32 -> 23"),
        (["pruning.options.budget=null"], "32 -> 16"),
    ],
    ids=["a typed ratio beats the configured budget", "a typed budget beats the ratio", "no budget"],
)
def test_ratio_and_budget(command, words, left):
    _, out, _ = command("plan", *words)
    assert " -> ".join(group_line(out, "stem.weight:0")[:2]) == left
