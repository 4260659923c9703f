"""lightning-prune tune: what it searches, what it keeps, how it stops and goes on, how it refuses."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from omegaconf import OmegaConf
from test_cli import command, logs, pytestmark  # noqa: F401 - fixtures, and the same filters

from lightning_prune import StructuredPruning
from lightning_prune.commands import tune
from lightning_prune.commands.spaces import Choices, Range, read_search
from lightning_prune.commands.trials import Watch
from lightning_prune.commands.words import words_of
from lightning_prune.data import Digits
from lightning_prune.errors import BudgetError, OptionError
from lightning_prune.models import Classifier, ResNet
from lightning_prune.reporting.pictures.search import Tried, search_figure

optuna = pytest.importorskip("optuna")
WORKER = Path(__file__).with_name("tune_worker.py")
TINY = [
    "experiment=quick",
    "trainer.max_epochs=3",
    "trainer.accelerator=cpu",
    "trainer.limit_train_batches=3",
    "trainer.log_every_n_steps=1",
    "model.net.widths=[16,32]",
    "data.batch_size=200",
    "hparams_search.startup_trials=2",
]
FEW = [f"~hparams_search.space.pruning.options.{name}" for name in ("alpha", "importance", "round_to")]
SPACE = {
    "pruning": {
        "start_epoch": {"low": 1, "high": 3},
        "options": {"reg": {"low": 1e-6, "high": 1e-2, "log": True}},
    }
}


def config(**search):
    content = {
        "name": "s",
        "folder": "tune/s",
        "n_trials": 3,
        "objectives": ["maximize val/acc"],
        "space": SPACE,
        **search,
    }
    pruning = {"start_epoch": 1, "options": {"reg": 1e-4, "round_to": None}}
    return OmegaConf.create({"pruning": pruning, "seed": 0, "model": {"lr": 0.1}, "hparams_search": content})


def table(folder="tune/accuracy"):
    with Path(folder, "trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# -- what is searched ----------------------------------------------------------------------------------


def test_a_space_is_read_by_paths():
    choices = {"choices": [None, 8]}
    space = {
        "pruning": {**SPACE["pruning"], "options": {"round_to": choices}},
        "model.lr": {"low": 0, "high": 1.0},
    }
    assert read_search(config(space=space)).space == (
        Range("pruning.start_epoch", 1, 3),
        Choices("pruning.options.round_to", (None, 8)),
        Range("model.lr", 0, 1.0),
    )


@pytest.mark.parametrize(
    ("change", "typed", "words"),
    [
        ({"n_trial": 3}, [], ["n_trial", "n_trials"]),
        ({"n_trials": 0}, [], ["n_trials=0", "at least 1"]),
        ({"startup_trials": "two"}, [], ["startup_trials=two"]),
        ({"objectives": []}, [], ["objectives=[]", "[maximize val/acc]"]),
        ({"objectives": ["max val/acc"]}, [], ["max val/acc", "`maximize metric`"]),
        ({"name": 5}, [], ["name=5", "a name"]),
        ({"folder": None}, [], ["folder=None", "path"]),
        ({"median_stopper": "maybe"}, [], ["median_stopper=maybe", "true or false"]),
        ({"space": 3}, [], ["space=3", "a table"]),
        ({"space": {}}, [], ["empty"]),
        (
            {"space": {"pruning": {"options": {"rge": {"low": 0, "high": 1}}}}},
            [],
            ["options.rge", "options.reg"],
        ),
        ({"space": {"seed": 3}}, [], ["seed: 3", "~hparams_search.space.seed"]),
        ({"space": {"seed": {"low": 3, "high": 2}}}, [], ["low=3 above high=2"]),
        ({"space": {"seed": {"low": 3}}}, [], ["needs low and high"]),
        ({"space": {"seed": {"low": "a", "high": 2}}}, [], ["low='a'", "no number"]),
        ({"space": {"seed": {"low": 0, "high": 2, "log": True}}}, [], ["log=true", "low > 0"]),
        ({"space": {"seed": {"low": 1, "high": 2, "log": "maybe"}}}, [], ["log='maybe'", "true or false"]),
        ({"space": {"seed": {"low": 0, "high": 2, "step": 0}}}, [], ["step=0", "> 0"]),
        ({"space": {"seed": {"low": 0, "high": 2, "stop": 1}}}, [], ["unknown 'stop'"]),
        ({"space": {"seed": {"choices": []}}}, [], ["choices=[]", "give a list"]),
        ({"space": {"seed": {"choices": [[1]]}}}, [], ["[1]", "plain value"]),
        (
            {},
            ["pruning.options.reg=0.1"],
            ["pruning.options.reg was typed", "'~hparams_search.space.pruning.options.reg'"],
        ),
    ],
)
def test_what_is_no_search_is_refused_with_a_reason(change, typed, words):
    with pytest.raises(OptionError) as error:
        read_search(config(**change), typed)
    for word in words:
        assert word in str(error.value)


def test_a_search_without_a_part_is_refused():
    cfg = config()
    del cfg.hparams_search["objectives"]
    with pytest.raises(OptionError, match="lacks 'objectives'"):
        read_search(cfg)


@pytest.mark.parametrize(
    ("value", "word"),
    [(None, "a=null"), (True, "a=true"), (3, "a=3"), (1e-06, "a=1e-06"), ("l'x y", "a='l\\'x y'")],
)
def test_values_become_words_that_come_back_as_they_were(value, word):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    assert words_of({"a": value}) == [word]
    assert OverridesParser.create().parse_override(word).value() == value


# -- what is kept --------------------------------------------------------------------------------------


@pytest.mark.timeout(600)  # seconds alone, minutes on a machine that is busy
def test_a_search_finds_writes_goes_on_and_is_taken_back(command, tmp_path):
    code, out, err = command("tune", *TINY, "hparams_search.n_trials=2")
    assert code == 0, err
    rows = table()
    assert [row["state"] for row in rows] == ["complete"] * 2
    best = max(rows, key=lambda row: float(row["val/acc"]))
    assert f"trial {best['trial']}: val/acc" in out
    folder = tmp_path / "tune" / "accuracy"
    assert {"best", "search.png", "study.db", "trials", "trials.csv"} <= {p.name for p in folder.iterdir()}
    assert (folder / "trials" / "1" / "pruned.ckpt").is_file()
    assert "accuracy" in (folder / "trials" / "0" / "console.txt").read_text()

    code, _, err = command("tune", *TINY, "hparams_search.n_trials=3")  # two of them are there
    assert code == 0, err
    assert table()[:2] == rows
    assert len(table()) == 3
    drawn = [tuple(row[key] for key in row if key.startswith(("pruning", "model"))) for row in table()]
    assert len(set(drawn)) == 3, "the sampler began again"

    best = max(table(), key=lambda row: float(row["val/acc"]))
    back = ["--config-dir", str(folder / "best"), "experiment=best"]
    code, out, err = command(*back, "dense_twin=false", "hydra.run.dir=again", "logger=csv")
    assert code == 0, err
    with (tmp_path / "again" / "metrics.csv").open(newline="") as file:
        again = [row["val/acc"] for row in csv.DictReader(file) if row.get("val/acc")]
    assert float(again[-1]) == float(best["val/acc"])
    code, out, _ = command("plan", *back)
    assert code == 0
    assert "ResNet" in out

    code, _, err = command("tune", *TINY, "hparams_search.space.model.lr.high=0.02")
    assert code == 1
    assert "space.model.lr.high was 0.01, now it is 0.02" in err
    code, _, err = command("tune", *TINY, "data.batch_size=100")
    assert code == 1
    assert "configuration.data.batch_size was 200, now it is 100" in err
    assert "Traceback" not in err


@pytest.mark.timeout(600)  # seconds alone, minutes on a machine that is busy
def test_several_objectives_give_the_front(command, tmp_path):
    words = [*TINY, "hparams_search=tradeoff", "hparams_search.n_trials=4", "hparams_search.folder=out"]
    objectives = "hparams_search.objectives=[maximize val/acc,minimize report/macs]"
    code, _, err = command("tune", *words, *FEW, objectives)
    assert code == 0, err
    points = {row["trial"]: (-float(row["val/acc"]), float(row["report/macs"])) for row in table("out")}
    assert len({macs for _, macs in points.values()}) > 1
    beaten = {
        a for a, x in points.items() if any(y[0] <= x[0] and y[1] <= x[1] and y != x for y in points.values())
    }
    written = {path.stem for path in Path("out/best/experiment").iterdir()}
    assert written == {f"trial_{number}" for number in set(points) - beaten}
    assert "prune/macs" not in table("out")[0]
    for row in table("out"):
        report = json.loads(Path("out/trials", row["trial"], "report.json").read_text())
        assert report["pruned"]["macs"] == float(row["report/macs"])


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["hparams_search.objectives=[maximize val/f1]"], ["'val/f1'", "val/acc", "report/latency_ms"]),
        (["hparams_search=accurate"], ["accurate", "tradeoff"]),
        (["hparams_search.n_trails=3"], ["n_trails", "n_trials"]),
        (["+hparams_search.space.pruning.options.rge={low: 0, high: 1}"], ["options.rge", "options.reg"]),
        (["pruning.options.reg=1"], ["pruning.options.reg was typed"]),
        (["pruning.options.max_pruning_ratio=0.1"], ["budget"]),
    ],
    ids=lambda value: value[0] if "=" in value[0] else None,
)
def test_a_search_that_cannot_begin_ends_with_one_message_and_leaves_nothing(command, tmp_path, words, parts):
    code, out, err = command("tune", *TINY, *words)
    assert code == 1
    assert "Traceback" not in out + err
    for part in parts:
        assert part in err
    assert not any(tmp_path.iterdir())


def test_without_optuna_the_extra_is_named(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    code, _, err = command("tune")
    assert code == 1
    assert "pip install 'lightning-prune[tune]'" in err


def test_help_of_tune_teaches(command):
    code, out, _ = command("tune", "--help")
    assert code == 0
    assert "hparams_search=tradeoff" in out
    assert "the same command goes on" in out


def test_a_search_that_runs_elsewhere_is_left_alone(command, tmp_path):
    from filelock import FileLock

    (tmp_path / "tune" / "accuracy").mkdir(parents=True)
    with FileLock(tmp_path / "tune" / "accuracy" / ".lock"):
        code, _, err = command("tune", *TINY)
    assert code == 1
    assert "running already" in err


# -- trials that end otherwise -------------------------------------------------------------------------


def faked(monkeypatch, outcomes):
    """Let trials have these outcomes: a list of values per epoch, or an error. Nothing is trained."""

    def run_trial(cfg, objectives, follow):
        outcome = outcomes[int(Path(cfg.run_dir).name)]
        if isinstance(outcome, Exception):
            raise outcome
        for epoch, value in enumerate(outcome):
            follow(epoch, value)
        return (outcome[-1],)

    monkeypatch.setattr(tune, "run_trial", run_trial)
    monkeypatch.setattr(tune, "check_metrics", lambda cfg, objectives: None)


def test_a_trial_worse_than_the_median_is_stopped(command, monkeypatch):
    faked(monkeypatch, [[None, 0.5, 0.8], [None, 0.6, 0.9], [None, 0.4, 1.0], [0.7, 0.7, 0.95]])
    code, out, err = command("tune", *TINY, "hparams_search.n_trials=4")
    assert code == 0, err
    assert [row["state"] for row in table()] == ["complete", "complete", "stopped early", "complete"]
    assert "3 finished, 1 stopped early" in out


def test_no_trial_is_stopped_where_that_is_off(command, monkeypatch):
    faked(monkeypatch, [[0.5], [0.6], [0.1]])
    code, _, err = command("tune", *TINY, "hparams_search.n_trials=3", "hparams_search.median_stopper=false")
    assert code == 0, err
    assert [row["state"] for row in table()] == ["complete"] * 3


def test_values_that_cannot_be_had_together_are_noted_and_passed_over(command, monkeypatch):
    faked(monkeypatch, [[0.5], BudgetError("round_to=8 leaves 0.7"), [0.6]])
    code, out, err = command("tune", *TINY, "hparams_search.n_trials=3")
    assert code == 0, err
    assert [row["state"] for row in table()] == ["complete", "refused", "complete"]
    assert table()[1]["reason"] == "round_to=8 leaves 0.7"
    assert "1 refused" in out


def test_a_search_in_which_nothing_can_be_had_ends(command, monkeypatch):
    faked(monkeypatch, [BudgetError("out of reach")] * 9)
    code, _, err = command("tune", *TINY, "hparams_search.n_trials=9")
    assert code == 1
    assert "all of the first 2 trials were refused" in err
    assert "out of reach" in err


def test_a_value_that_is_no_number_is_a_refused_trial(command, monkeypatch):
    faked(monkeypatch, [[0.5], [math.nan], [0.6]])
    code, _, err = command("tune", *TINY, "hparams_search.n_trials=3")
    assert code == 0, err
    assert [row["state"] for row in table()] == ["complete", "refused", "complete"]
    assert "nan" in table()[1]["reason"]


def test_a_failure_of_our_own_loses_no_trial(command, monkeypatch):
    faked(monkeypatch, [[0.5], ZeroDivisionError("a bug"), [0.6]])
    with pytest.raises(ZeroDivisionError):
        tune.run([*TINY, "hparams_search.n_trials=3"])
    code, _, err = command("tune", *TINY, "hparams_search.n_trials=2")
    assert code == 0, err
    rows = table()
    assert [row["state"] for row in rows] == ["complete", "interrupted", "complete"]
    assert rows[1]["model.lr"] == rows[2]["model.lr"], "its values are tried again"


def test_the_stopper_sees_what_follows_the_last_cut(tmp_path):
    seen = []
    pruning = StructuredPruning(0.5, module="net", start_epoch=1, iterative_steps=2)
    trainer = Trainer(
        max_epochs=4,
        limit_train_batches=1,
        accelerator="cpu",
        callbacks=[pruning, Watch("val/acc", lambda epoch, value: seen.append((epoch, value is not None)))],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    pruning.report.seconds = 0.001
    trainer.fit(Classifier(ResNet(widths=(8,), depth=1)), datamodule=Digits(batch_size=200))
    assert seen == [(0, False), (1, False), (2, True), (3, True)]


# -- pictures ------------------------------------------------------------------------------------------


def test_the_course_shows_the_best_so_far():
    trials = [
        Tried(0, (0.5,)),
        Tried(1, (0.4,)),
        Tried(2, (0.3,), was_stopped=True),
        Tried(3, (0.7,), is_best=True),
    ]
    axes = search_figure(trials, ["val/acc"], ["maximize"]).axes[0]
    best, finished, stopped = axes.get_lines()
    assert list(best.get_ydata()) == [0.5, 0.5, 0.7]
    assert list(finished.get_xdata()) == [0, 1, 3]
    assert list(stopped.get_ydata()) == [0.3]
    assert [text.get_text() for text in axes.texts] == ["3"]


def test_the_front_is_joined_and_numbered():
    trials = [Tried(0, (0.9, 5.0), is_best=True), Tried(1, (0.8, 6.0)), Tried(2, (0.7, 2.0), is_best=True)]
    axes = search_figure(trials, ["acc", "ms"], ["maximize", "minimize"]).axes[0]
    beaten, front = axes.get_lines()
    assert list(front.get_xdata()) == [2.0, 5.0]
    assert list(beaten.get_xdata()) == [6.0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("ms (less is better)", "acc (more is better)")


# -- real interruptions --------------------------------------------------------------------------------


def start(words, folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(WORKER), "tune", *words],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_trial(folder, number, seconds=120):
    """Wait until a trial is being trained: it has logged an epoch."""
    log = folder / "tune" / "accuracy" / "trials" / str(number) / "checkpoints" / "last.ckpt"
    for _ in range(10 * seconds):
        if log.exists():
            return
        time.sleep(0.1)
    raise AssertionError(f"trial {number} did not begin")


def states(folder):
    """Ask SQLite itself, not the library that wrote."""
    with sqlite3.connect(folder / "tune" / "accuracy" / "study.db") as base:
        return base.execute("select number, state from trials order by number").fetchall()


@pytest.mark.multiprocess
@pytest.mark.timeout(400)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_an_interrupted_search_goes_on_with_the_same_command(how, tmp_path):
    words = [*TINY, "hparams_search.n_trials=2", "trainer.max_epochs=12"]
    with start(words, tmp_path) as process:
        wait_for_trial(tmp_path, 1)
        process.send_signal(how)
        _, err = process.communicate(timeout=60)
    if how == signal.SIGINT:
        assert process.returncode == 130, err
        assert (
            "Stopped in trial 1; the finished trials (1) are kept in tune/accuracy, "
            "and the same command goes on." in err
        )
    else:
        assert process.returncode == -signal.SIGKILL
    folder = tmp_path / "tune" / "accuracy"
    assert not list(folder.rglob("*.part"))
    assert states(tmp_path)[:2] == [(0, "COMPLETE"), (1, "RUNNING" if how == signal.SIGKILL else "FAIL")]
    before = table(folder)[0]
    with start(words, tmp_path) as process:
        out, err = process.communicate(timeout=150)
    assert process.returncode == 0, err
    rows = table(folder)
    assert rows[0] == before
    assert [row["state"] for row in rows] == ["complete", "interrupted", "complete"]
    assert rows[1]["model.lr"] == rows[2]["model.lr"]
    assert "2 finished" in out
