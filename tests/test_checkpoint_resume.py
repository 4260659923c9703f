"""Resuming where it is hard: between two refreshes of the regulariser, under a budget, after ``kill -9``."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from resume_worker import EPOCHS, save, train
from test_callback import Net, Quiet, build, fit, pytestmark  # noqa: F401 - same filters
from test_checkpoint_lightning import Cosine, Images, Judged, Slow, digest, every_epoch, pruning
from test_no_waiting import BrokenIdle
from torch import nn

from lightning_prune import GroupNormPruner
from lightning_prune.errors import BudgetError, CheckpointMismatchError, OptionError, PruneError
from lightning_prune.training.checkpointing import PrunedModelCheckpoint

WORKER = Path(__file__).with_name("resume_worker.py")
X = torch.ones(2, 3, 5, 5)


def test_resuming_between_two_refreshes_of_the_regulariser_gives_the_same_bits(tmp_path):
    saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    options = {"max_epochs": 3, "loader": Slow(), "enable_checkpointing": True}
    whole = fit(build(Cosine), pruning(update_every=3), saver, **options)
    for step in (1, 2, 3, 4, 5, 7, 8, 10):
        path = tmp_path / f"step={step}.ckpt"
        resumed = fit(build(Cosine), pruning(update_every=3), ckpt_path=path, max_epochs=3, loader=Slow())
        assert digest(resumed) == digest(whole), f"from step {step}"


def test_the_state_of_the_regulariser_is_of_one_set_of_groups():
    net = Net()
    pruner = GroupNormPruner(net, X)
    pruner.regularizer.refresh()
    state = pruner.state_dict()
    for name in ("gamma", "scores"):
        state["regularizer"][name].pop()
    with pytest.raises(CheckpointMismatchError, match="a state of 7 units, these groups have 8"):
        GroupNormPruner.resume(net, X, state)


def test_groups_that_rest_go_on_resting():
    net = Net()
    pruner = GroupNormPruner(net, X)
    with torch.no_grad():
        net.conv.weight[0] = float("nan")
    with pytest.warns(UserWarning, match="NaN or infinity"):
        pruner.regularize()
    state = pruner.state_dict()
    assert state["regularizer"]["skipped"] == 1
    other = GroupNormPruner.resume(net, X, state)
    assert other.regularizer.coefficients[0].tolist() == [0.0] * 8
    assert other.state_dict() == state
    with torch.no_grad():
        net.conv.weight[0] = 1.0
    for each in (pruner, other):  # and until the weights are well, not until the gammas are due
        each.regularizer.update_every = 9
        each.regularize()
    assert other.state_dict() == pruner.state_dict()
    assert 0.0 not in other.regularizer.coefficients[0]


@pytest.mark.filterwarnings(
    "ignore:.*compares epochs before and after the cut", "ignore:Checkpoint directory"
)
@pytest.mark.parametrize("name", ["last", "best"])
def test_a_fit_goes_on_from_the_last_checkpoint_or_the_best(tmp_path, name):
    """The best one is of the dense network, and the model has been further."""

    def run(model, epochs):
        saver = every_epoch(tmp_path, save_last=True, monitor="val_acc", mode="min")
        options = {"loader": Images(), "num_sanity_val_steps": 0, "enable_checkpointing": True}
        return fit(model, pruning(), saver, max_epochs=epochs, **options)

    model = build(Judged)
    begun, whole = run(model, 3), fit(build(Judged), pruning(), loader=Images(), max_epochs=5)
    assert (model.net.conv.out_channels, begun.checkpoint_callback.best_model_path[-12:]) == (
        5,
        "epoch=0.ckpt",
    )
    begun.fit_loop.max_epochs = 5
    begun.fit(model, Images(), ckpt_path=name)
    assert digest(begun) == digest(whole)


def first(model, batch):
    return model(batch[0])


class Asks(Cosine):
    """Before there is a batch."""

    def on_train_start(self):
        ours = self.trainer.callbacks[0]
        state = ours.state_dict()
        self.heard = ours.steps_done, (state["pruner"] or {}).get("plan"), state["initial"]


class Levels(PrunedModelCheckpoint):
    """Notes the levels that it has left behind."""

    left = ()

    def _begin_anew(self):
        self.left = (*self.left, self._seen_level)
        super()._begin_anew()


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize(("cuts", "importance"), [(1, "group_norm"), (3, "taylor")])
def test_a_pruner_that_waits_for_a_batch_is_as_far_as_it_had_come(tmp_path, cuts, importance):
    """With a forward_fn no inputs are recorded, so there is no pruner before the first batch."""

    def parts(folder):
        options = {"reg": 0.01, "forward_fn": first, "importance": importance}
        levels = Levels(dirpath=tmp_path / folder, monitor="loss", per_level=True)
        return Quiet(0.5, start_epoch=1, iterative_steps=cuts, options=options), levels

    every = {"enable_checkpointing": True, "loader": Slow(), "max_epochs": 5}
    saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    whole = fit(build(Asks), *parts("whole"), saver, **every)
    for step in (2, 4, 7, 8, 12, 15, 16):
        path = tmp_path / f"step={step}.ckpt"
        model, (ours, levels), made = build(Asks), parts(str(step)), min(cuts, (step - 1) // 4)
        resumed = fit(model, ours, levels, ckpt_path=path, **every)
        (saved,) = (v for k, v in torch.load(path)["callbacks"].items() if k.startswith("Quiet"))
        assert model.heard == (made, saved["pruner"]["plan"], saved["initial"]), f"from step {step}"
        assert ours.steps_done == cuts, f"from step {step}"
        if step % 4:  # else Lightning tells this callback of no start of the epoch that the run goes on with
            assert levels.left == tuple(range(made, cuts)), f"from step {step}"
        assert digest(resumed) == digest(whole), f"from step {step}"
        for name in ("prune/phase", "prune/sparsity", "prune/macs"):
            assert resumed.callback_metrics[name] == whole.callback_metrics[name], f"{name} from step {step}"


class Masked(Cosine):
    """Its network is called with a mask, as transformers are."""

    def __init__(self):
        super().__init__()
        self.net = MaskedNet()

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x, torch.ones(len(x), 5, dtype=torch.bool)), y)


class MaskedNet(Net):
    def forward(self, x, mask):
        return super().forward(x * mask[:, None, None, :])


def test_a_mask_among_the_inputs_goes_through_a_checkpoint(tmp_path):
    whole = fit(
        build(Masked), pruning(module="net"), every_epoch(tmp_path), max_epochs=5, enable_checkpointing=True
    )
    resumed = fit(build(Masked), pruning(module="net"), ckpt_path=tmp_path / "epoch=2.ckpt", max_epochs=5)
    assert digest(resumed) == digest(whole)


def test_shares_are_of_the_same_example_after_a_resume(tmp_path):
    """A dataset is asked for two samples, the first batch had four."""

    def callback():
        return Quiet(0.5, start_epoch=1, iterative_steps=3, options={"forward_fn": first})

    names = ("prune/macs", "prune/sparsity", "prune/channels")
    whole = fit(build(Cosine), callback(), every_epoch(tmp_path), max_epochs=5, enable_checkpointing=True)
    for epoch in (1, 3):
        resumed = fit(build(Cosine), callback(), ckpt_path=tmp_path / f"epoch={epoch}.ckpt", max_epochs=5)
        found = [[run.callback_metrics[name] for name in names] for run in (whole, resumed)]
        assert found[0] == found[1], f"from epoch {epoch}"


def test_a_callback_goes_on_with_another_model_than_it_had(tmp_path):
    ours = pruning()
    whole = fit(build(Cosine), ours, every_epoch(tmp_path), max_epochs=5, enable_checkpointing=True)
    for epoch in (3, 1):
        resumed = fit(build(Cosine), ours, ckpt_path=tmp_path / f"epoch={epoch}.ckpt", max_epochs=5)
        assert (digest(resumed), ours.steps_done) == (digest(whole), 3), f"from epoch {epoch}"


@pytest.mark.usefixtures("accelerator")
def test_what_a_device_has_found_is_told_by_the_run_that_goes_on(tmp_path):
    """An accelerator is not asked between log intervals; a checkpoint may lie between."""

    def run(policy, *callbacks, **options):
        ours = Quiet(0.5, start_epoch=9, options={"nan_policy": policy})
        return fit(build(BrokenIdle), ours, *callbacks, loader=Slow(), max_epochs=1, **options)

    path = tmp_path / "step=3.ckpt"
    with pytest.warns(UserWarning, match=r"'net.conv.weight' is not finite"):
        run("skip", *save(tmp_path), enable_checkpointing=True)
    with pytest.warns(UserWarning, match=r"'net.conv.weight' is not finite at or before step 4"):
        resumed = run("skip", ckpt_path=path)
    assert resumed.callback_metrics["prune/nonfinite_gradients"] == 1
    with pytest.raises(PruneError, match=r"'net.conv.weight' is not finite at or before step 4"):
        run("raise", ckpt_path=path)


@pytest.mark.parametrize("budget", [{"params": 0.5}, {"macs": 0.5}])
def test_a_budget_is_of_the_dense_network_after_a_resume_too(tmp_path, budget):
    """Half of what is left of a pruned network would be another quarter, or out of reach."""

    def callback():
        options = {"budget": budget, "max_pruning_ratio": 0.5}
        return Quiet(start_epoch=1, iterative_steps=3, options=options)

    class Wide(Cosine):
        def __init__(self):
            super().__init__()
            self.example_input_array = X

    whole = fit(build(Wide), callback(), every_epoch(tmp_path), max_epochs=5, enable_checkpointing=True)
    for epoch in range(4):
        resumed = fit(build(Wide), callback(), ckpt_path=tmp_path / f"epoch={epoch}.ckpt", max_epochs=5)
        assert digest(resumed) == digest(whole), f"from epoch {epoch}"
    with pytest.raises(BudgetError):
        GroupNormPruner(whole.lightning_module, X, budget=budget, max_pruning_ratio=0.1)


def test_a_number_of_groups_is_of_the_dense_network_too():
    """A depthwise convolution has as many groups as channels."""
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=8), nn.Conv2d(8, 2, 1))
    options = {"out_channel_groups": {"1": 8}, "pruning_ratio": 0.5}
    pruner = GroupNormPruner(net, X, **options)
    pruner.step()
    with pytest.raises(OptionError, match="8 was given for 1, the trace found 4"):
        GroupNormPruner(net, X, **options)
    resumed = GroupNormPruner.resume(net, X, pruner.state_dict(), **options)
    assert (resumed.current_step, resumed.options) == (1, pruner.options)


quietly = pytest.mark.filterwarnings("ignore:.*swa_epoch_start")


@quietly
@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize(("kind", "last"), [("mean", 15), ("ema", 15), ("swa", 7)])
def test_averaged_copies_resume_from_every_step(tmp_path, kind, last, ours_first):
    whole = train(kind, *save(tmp_path), ours_first=ours_first, enable_checkpointing=True)
    for step in range(1, last + 1):
        resumed = train(kind, ours_first=ours_first, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert digest(resumed) == digest(whole), f"from step {step}"


@quietly
@pytest.mark.parametrize(("prune", "ours_first"), [(True, True), (True, False), (False, True)])
def test_stochastic_averaging_goes_on_at_the_end_of_an_epoch_alone(tmp_path, prune, ours_first):
    """With pruning or without; it acts when an epoch starts."""
    options = {"prune": prune, "ours_first": ours_first}
    whole = train("swa", *save(tmp_path), enable_checkpointing=True, **options)
    for epoch in (1, 2):
        resumed = train("swa", ckpt_path=tmp_path / f"epoch={epoch}.ckpt", **options)
        assert digest(resumed) == digest(whole), f"from epoch {epoch}"
    for step in (8, 9, 14):
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            resumed = train("swa", ckpt_path=tmp_path / f"step={step}.ckpt", **options)
        assert digest(resumed) != digest(whole), f"from step {step}"
        said = f"goes on within epoch {step // 4}, and StochasticWeightAveraging acts at the start"
        assert any(said in str(warning.message) for warning in heard) == prune
    resumed = train("swa", ckpt_path=tmp_path / f"epoch={EPOCHS - 1}.ckpt", **options)
    assert digest(resumed) != digest(whole), "from the last epoch"


@pytest.mark.parametrize("prune", [True, False])
def test_an_average_of_epochs_misses_the_epoch_whose_end_was_not_saved(tmp_path, prune):
    """Lightning leaves that end out, with pruning or without."""
    whole = train("epochs", *save(tmp_path), enable_checkpointing=True, prune=prune)
    for name in ("step=7", "step=8", "epoch=1", "step=9"):
        resumed = train("epochs", ckpt_path=tmp_path / f"{name}.ckpt", prune=prune)
        assert (digest(resumed) == digest(whole)) == (name != "step=8"), f"from {name}"


@pytest.mark.parametrize("prune", [True, False])
def test_double_precision_resumes_where_the_module_is_built_in_it(tmp_path, prune):
    """Lightning loads before it converts, with pruning or without."""
    options = {"precision": "64-true", "prune": prune}
    whole = train("none", *save(tmp_path), enable_checkpointing=True, **options)
    for dtype in (torch.float64, torch.float32):
        resumed = train("none", ckpt_path=tmp_path / "step=6.ckpt", dtype=dtype, **options)
        assert (digest(resumed) == digest(whole)) == (dtype == torch.float64)


def start(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(WORKER), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def kill(last, folder, kind, *checkpoint):
    """Run a worker until a step is done, and give the last step that it saved."""
    with start(folder, kind, last, *checkpoint) as victim:
        assert any(line == f"{last}\n" for line in victim.stdout)
        os.kill(victim.pid, signal.SIGKILL)
    assert victim.returncode == -signal.SIGKILL
    return max(folder.glob("step=*.ckpt"), key=lambda path: path.stat().st_mtime_ns, default=None)


@pytest.mark.multiprocess
@pytest.mark.timeout(300)
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path):
    """Killed in the sparse epoch, then once more right before the third cut."""
    expected = digest(train("none"))
    checkpoint = []
    for last in (3, 12):
        checkpoint = [kill(last, tmp_path, "none", *checkpoint)]
        assert checkpoint[0].name in (f"step={last}.ckpt", f"step={last - 1}.ckpt")
    assert digest(train("none", ckpt_path=checkpoint[0])) == expected


@quietly
@pytest.mark.multiprocess
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("kind", "last", "epoch"), [("ema", 6, 0), ("swa", 14, 2)])
def test_a_killed_run_goes_on_with_its_averaged_copies(tmp_path, kind, last, epoch):
    """Killed in the epoch of a cut; each other copy averages by step or by epoch."""
    expected = digest(train(kind))
    newest = kill(last, tmp_path, kind)
    assert digest(train(kind, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")) == expected
    if kind == "ema":
        assert digest(train(kind, ckpt_path=newest)) == expected


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("last", range(1, 16))
def test_a_run_killed_after_any_step_goes_on_to_the_same_bits(tmp_path, last):
    checkpoint = kill(last, tmp_path, "none")
    assert digest(train("none", ckpt_path=checkpoint)) == digest(train("none"))
