"""The report at the end of a fit: what it compares, where it goes, and that it never costs a training."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from test_callback import Plain, build, data, fit, pytestmark  # noqa: F401 - same filters

from lightning_prune.training import finish, showing
from lightning_prune.training.callback import StructuredPruning

QUIET = {"log_every_n_steps": 1, "enable_model_summary": False}


class Classifier(Plain):
    def __init__(self, metric="val_acc"):
        super().__init__()
        self.metric = metric
        self.example_input_array = torch.zeros(2, 3, 5, 5)

    def validation_step(self, batch, batch_idx):
        self.log(self.metric, (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def test_step(self, batch, batch_idx):
        self.log("test_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())


class Images(LightningDataModule):
    def train_dataloader(self):
        return data()

    def val_dataloader(self):
        return data(8)

    def test_dataloader(self):
        return data(12)


def run(folder, model=None, loader=None, callback=None, **options):
    callback = callback or StructuredPruning(0.5, start_epoch=1)
    callback.report.seconds = 1e-3
    options = {**QUIET, "default_root_dir": folder, **options}
    trainer = fit(model or build(Classifier), callback, loader=loader or Images(), **options)
    return trainer, callback.report.result


def test_compares_the_network_before_the_cut_on_the_test_split(tmp_path):
    scores = []

    class Watch(StructuredPruning):
        def on_train_epoch_start(self, trainer, pl_module):
            if self.should_prune(trainer.current_epoch):
                pl_module.eval()
                accuracies = [(pl_module(x).argmax(1) == y).float().mean() for x, y in data(12)]
                scores.append(float(torch.stack(accuracies).mean()))
                pl_module.train()
            super().on_train_epoch_start(trainer, pl_module)

    with torch.no_grad():
        trainer, report = run(tmp_path, callback=Watch(0.5, start_epoch=1))
    file = json.loads((tmp_path / "report.json").read_text())
    assert file["metric"] == {"name": "accuracy", "direction": "max", "split": "test"}
    assert file["dense"]["accuracy"] == pytest.approx(scores[0])
    # conv 3x3x3x8 on 3x3 places and fc 8x2: one sample
    assert (file["dense"]["macs"], file["pruned"]["macs"]) == (1944 + 16, 972 + 8)
    assert (file["dense"]["parameters"], file["pruned"]["parameters"]) == (250, 126)
    assert (file["dense"]["memory_bytes"], file["pruned"]["memory_bytes"]) == (1000, 504)
    assert file["dense"]["latency_ms"] > 0
    assert file["dense_is"] == "The model just before its first cut."
    assert file["channels"] == {"net.conv": [8, 4], "net.fc": [2, 2]}
    assert file["targets"] == [{"what": "units removed", "asked": 0.5, "reached": 0.5}]
    assert [epoch["phase"] for epoch in file["timeline"]] == ["sparse", "prune"]
    assert {"torch", "lightning"} <= file["versions"].keys()
    assert file["config"]["start_epoch"] == 1
    assert (tmp_path / "report.md").read_text().startswith("# Before and after")
    assert report.pruned.accuracy == file["pruned"]["accuracy"]
    assert trainer.datamodule.trainer is trainer


def test_the_fit_notes_norms_and_cuts_as_they_were(tmp_path):
    norms = []

    class Watch(StructuredPruning):
        """See the weights where the callback sees them."""

        def on_train_epoch_end(self, trainer, pl_module):
            conv, bn, fc = (getattr(pl_module.net, n).weight.detach().square() for n in ("conv", "bn", "fc"))
            norms.append((conv.flatten(1).sum(1) + bn + fc.sum(0)).double().numpy())
            super().on_train_epoch_end(trainer, pl_module)

    _, report = run(tmp_path, callback=Watch(0.5, start_epoch=1, options={"normalizer": None}))
    assert [len(each) for each in norms] == [8, 4]
    assert [spread.epoch for spread in report.spreads] == [0, 1]
    for spread, seen in zip(report.spreads, norms, strict=True):
        assert spread.quantiles[0] == pytest.approx(seen.min() / seen.mean(), rel=1e-5)
        assert spread.quantiles[3] == pytest.approx(np.median(seen) / seen.mean(), rel=1e-5)
        assert spread.quantiles[-1] == pytest.approx(seen.max() / seen.mean(), rel=1e-5)
    (cut,) = report.cuts
    (scores,) = cut.classes
    assert (cut.epoch, scores.name, sum(scores.kept), sum(scores.removed)) == (1, "net.conv", 4, 4)
    assert scores.line == pytest.approx(sorted(norms[0])[3], rel=1e-5)
    assert (cut.edges[0], cut.edges[-1]) == pytest.approx((norms[0].min(), norms[0].max()), rel=1e-5)
    assert {each.tensor for each in report.frozen} == {"net.conv.weight", "net.fc.weight", "net.fc.bias"}
    page = (tmp_path / "report.html").read_text()
    assert page.count("<img") == 4


def test_a_picture_that_cannot_be_noted_costs_a_warning(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError("no scale")

    monkeypatch.setattr(finish, "record_spread", fail)
    with pytest.warns(UserWarning, match="the report will lack a picture: ZeroDivisionError: no scale"):
        _, report = run(tmp_path)
    assert report.spreads == []
    assert len(report.cuts) == 1


class Untested(LightningDataModule):
    train_dataloader, val_dataloader = Images.train_dataloader, Images.val_dataloader


def test_without_a_test_split_the_validation_metric_is_labelled_so(tmp_path):
    seen = []

    class Model(Classifier):
        def on_train_epoch_start(self):
            seen.append(float(self.trainer.callback_metrics.get("val_acc", -1)))

    trainer, report = run(tmp_path, build(Model), Untested())
    assert (report.split, report.metric) == ("val", "accuracy")
    assert (report.dense.accuracy, report.pruned.accuracy) == (
        seen[1],
        float(trainer.callback_metrics["val_acc"]),
    )


def test_without_held_out_data_there_is_no_such_row(tmp_path):
    _, report = run(tmp_path, build(Plain), data())
    assert report.split is None
    assert report.pruned.accuracy is None
    assert "accuracy" not in [row.label for row in report.rows()]


def test_the_monitored_metric_takes_the_place_of_an_accuracy(tmp_path):
    from lightning_prune.training.checkpointing import PrunedEarlyStopping

    callback = StructuredPruning(0.5, start_epoch=1)
    callback.report.seconds = 1e-3
    fit(
        build(Classifier, metric="val_psnr"),
        callback,
        PrunedEarlyStopping("val_psnr", mode="max"),
        loader=Untested(),
        default_root_dir=tmp_path,
    )
    assert (callback.report.result.metric, callback.report.result.direction) == ("psnr", "max")


def test_a_twin_can_take_the_place_of_the_dense_network(tmp_path):
    twin, callback = build(Classifier), StructuredPruning(0.5, start_epoch=1)
    twin.net.fc.bias.data[0] += 100  # it has one answer
    callback.report.compare_with(twin, dense_is="A twin without pruning.")
    _, report = run(tmp_path, callback=callback)
    accuracies = [(twin.eval()(x).argmax(1) == y).float().mean() for x, y in data(12)]
    assert report.dense_is == "A twin without pruning."
    assert report.dense.accuracy == pytest.approx(float(torch.stack(accuracies).mean()))
    assert report.dense.accuracy != report.pruned.accuracy
    assert report.dense.parameters == 250


def test_a_resumed_run_reports_too(tmp_path):
    from test_checkpoint_lightning import every_epoch

    options = {**QUIET, "default_root_dir": tmp_path}
    first = StructuredPruning(0.5, start_epoch=1)
    first.report.seconds = 1e-3
    saver = every_epoch(tmp_path)
    fit(build(Classifier), first, saver, loader=Images(), max_epochs=2, enable_checkpointing=True, **options)
    second = StructuredPruning(0.5, start_epoch=1)
    second.report.seconds = 1e-3
    fit(
        build(Classifier),
        second,
        loader=Images(),
        max_epochs=3,
        ckpt_path=tmp_path / "epoch=1.ckpt",
        **options,
    )
    report = second.report.result
    assert report.split == "val"  # the dense weights are gone
    assert (report.dense.parameters, report.dense.macs) == (250, 1960)
    assert [epoch["phase"] for epoch in report.timeline] == ["sparse", "prune", "fine-tune"]
    assert [spread.epoch for spread in report.spreads] == [0, 1, 2]
    assert [cut.epoch for cut in report.cuts] == [1]
    assert report.cuts == first.report.result.cuts


def test_a_report_that_fails_is_a_warning_and_the_fit_succeeds(tmp_path):
    class Broken(Classifier):
        def test_step(self, batch, batch_idx):
            raise RuntimeError("no test today")

    with pytest.warns(
        UserWarning, match="report of the prune could not be made: RuntimeError: no test today"
    ):
        trainer, report = run(tmp_path, build(Broken))
    assert trainer.state.finished
    assert report is None


def test_a_run_without_a_cut_has_nothing_to_report(tmp_path):
    _, report = run(tmp_path, callback=StructuredPruning(0.5, start_epoch=9))
    assert report is None
    assert not (tmp_path / "report.json").exists()


@pytest.mark.filterwarnings("ignore:.*experiment logs directory")
def test_loggers_receive_numbers_text_and_figure(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board, table = TensorBoardLogger(tmp_path, "tb"), CSVLogger(tmp_path, "csv")
    run(tmp_path, logger=[board, table])
    events = event_accumulator.EventAccumulator(board.log_dir).Reload()
    tags = events.Tags()
    assert {"prune/sparsity", "prune/channels", "prune/macs", "prune/phase", "prune/target_reached"} <= set(
        tags["scalars"]
    )
    assert "prune/report/text_summary" in tags["tensors"]
    assert {f"prune/{name}" for name in ("timeline", "channels", "importance", "spread")} <= set(
        tags["images"]
    )
    assert [e.value for e in events.Scalars("prune/channels")] == [0, 0.5]
    header = (tmp_path / "csv" / "version_0" / "metrics.csv").read_text().splitlines()[0]
    assert "prune/sparsity" in header
    assert (tmp_path / "tb" / "version_0" / "report.json").exists()


@pytest.mark.multiprocess
def test_weights_and_biases_receives_table_and_pictures(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path))
    from lightning.pytorch.loggers import WandbLogger

    try:
        _, report = run(tmp_path, logger=WandbLogger(save_dir=tmp_path, offline=True))
    finally:
        wandb.finish()
    (media,) = tmp_path.glob("wandb/offline-run-*/files/media")
    pictures = {file.stem.partition("_")[0] for file in media.glob("images/prune/*.png")}
    assert pictures == {"timeline", "channels", "importance", "spread"}
    (table,) = media.glob("table/prune/report_*.json")
    content = json.loads(table.read_text())
    assert content["columns"] == ["measure", "dense", "pruned", "change"]
    assert content["data"] == [[row.label, row.dense, row.pruned, row.change] for row in report.rows()]


def test_a_logger_that_fails_is_a_warning(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setitem(showing.SHOWS, CSVLogger, fail)
    with pytest.warns(UserWarning, match="CSVLogger did not take the report: OSError: disk full"):
        trainer, report = run(tmp_path, logger=CSVLogger(tmp_path, "csv"))
    assert trainer.state.finished
    assert report is not None
