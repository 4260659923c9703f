"""Checkpoints of a pruned fit: resuming to the same bits, loading anywhere, averaged copies."""

from __future__ import annotations

import hashlib

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from test_callback import CHANNELS, Plain, Quiet, build, data, fit, pytestmark  # noqa: F401 - same filters
from torch import nn

from lightning_prune.checkpoint import PrunableMixin, load_from_checkpoint, load_pruned_state, prepare
from lightning_prune.errors import CheckpointMismatchError
from lightning_prune.training.callback import PHASES
from lightning_prune.training.checkpointing import PrunedModelCheckpoint


class Cosine(Plain):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def test_step(self, batch, batch_idx):
        self.log("test_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())


class Images(LightningDataModule):
    train_dataloader = val_dataloader = lambda self: data()


class Mixed(PrunableMixin, Cosine):
    pass


def pruning(**options):
    return Quiet(0.5, start_epoch=1, iterative_steps=3, options={"reg": 0.01}, **options)


def every_epoch(folder, **options):
    return ModelCheckpoint(folder, "{epoch}", save_top_k=-1, **options)


def digest(trainer):
    """Of all that a run is: weights, buffers, averaged copies, optimizer state, learning rate, schedule."""
    total = hashlib.sha256()
    held = [getattr(callback, "_average_model", None) for callback in trainer.callbacks]
    for model in filter(None, [trainer.lightning_module, *held]):
        for name, tensor in model.state_dict().items():
            total.update(name.encode() + tensor.cpu().numpy().tobytes())
    for optimizer in trainer.optimizers:
        state = optimizer.state_dict()
        for index, values in sorted(state["state"].items()):
            for key, value in sorted(values.items()):
                total.update(f"{index}{key}".encode() + torch.as_tensor(value).cpu().numpy().tobytes())
        total.update(str([group["lr"] for group in state["param_groups"]]).encode())
    total.update(str([config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]).encode())
    return total.hexdigest()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_resuming_from_any_epoch_gives_the_same_bits(tmp_path, optimizer):
    whole = fit(
        build(Cosine, optimizer=optimizer),
        pruning(),
        every_epoch(tmp_path),
        max_epochs=5,
        enable_checkpointing=True,
    )
    assert whole.lightning_module.net.conv.out_channels == CHANNELS // 2
    expected = digest(whole)
    for epoch in range(4):
        callback = pruning()
        path = tmp_path / f"epoch={epoch}.ckpt"
        resumed = fit(build(Cosine, optimizer=optimizer), callback, ckpt_path=path, max_epochs=5)
        assert digest(resumed) == expected, f"from epoch {epoch}"
        assert callback.pruner.current_step == 3


def test_a_run_may_go_back_in_the_same_process(tmp_path):
    """The model and the callback have been further already."""
    model, callback = build(Cosine), pruning()
    whole = fit(model, callback, every_epoch(tmp_path), max_epochs=5, enable_checkpointing=True)
    expected = digest(whole)
    for epoch in (3, 0, 1):
        again = fit(model, callback, ckpt_path=tmp_path / f"epoch={epoch}.ckpt", max_epochs=5)
        assert digest(again) == expected, f"from epoch {epoch}"
        assert callback.steps_done == 3


@pytest.mark.parametrize("array", [True, False], ids=["example_input_array", "recorded inputs"])
def test_a_resumed_run_cuts_before_any_forward(tmp_path, array):
    class Net(Cosine):
        def __init__(self):
            super().__init__()
            self.example_input_array = torch.zeros(2, 3, 5, 5) if array else None

    class Watch(Quiet):
        def on_train_epoch_start(self, trainer, pl_module):
            was_built = self.pruner is not None
            super().on_train_epoch_start(trainer, pl_module)
            seen.append((was_built, pl_module.net.conv.out_channels))

    seen = []
    fit(build(Net), Watch(start_epoch=1), every_epoch(tmp_path), max_epochs=1, enable_checkpointing=True)
    fit(build(Net), Watch(start_epoch=1), ckpt_path=tmp_path / "epoch=0.ckpt", max_epochs=2)
    assert seen == [(array, CHANNELS), (True, CHANNELS // 2)]


class Slow:
    """A loader that can go on from the middle of an epoch."""

    def __init__(self):
        self.batches, self.next = list(data()), 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        self.next %= len(self.batches)  # the Trainer does not ask for the end of an epoch
        while self.next < len(self.batches):
            self.next += 1
            yield self.batches[self.next - 1]

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]


def test_a_run_may_go_back_between_two_cuts(tmp_path):
    """The structure is that of the live pruner; the weights of its penalty are later ones."""
    steps = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    model, callback = build(Cosine), pruning(update_every=3)
    whole = fit(model, callback, steps, max_epochs=2, loader=Slow(), enable_checkpointing=True)
    expected = digest(whole)
    for step in (7, 5, 6):
        path = tmp_path / f"step={step}.ckpt"
        again = fit(model, callback, ckpt_path=path, max_epochs=2, loader=Slow())
        assert digest(again) == expected, f"from step {step}"


def test_resuming_in_the_middle_of_an_epoch_gives_the_same_bits(tmp_path):
    steps = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    whole = fit(build(Cosine), pruning(), steps, max_epochs=3, loader=Slow(), enable_checkpointing=True)
    for step in (1, 3, 4, 5, 6, 8, 10):  # 4 and 8: of their epoch only the end is left
        path = tmp_path / f"step={step}.ckpt"
        resumed = fit(build(Cosine), pruning(), ckpt_path=path, max_epochs=3, loader=Slow())
        assert digest(resumed) == digest(whole), f"from step {step}"


def test_a_run_resumed_in_the_epoch_of_a_cut_knows_its_phase(tmp_path):
    steps = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    whole = fit(build(Cosine), pruning(), steps, max_epochs=2, loader=Slow(), enable_checkpointing=True)
    assert whole.callback_metrics["prune/phase"] == PHASES.index("prune")
    resumed = fit(build(Cosine), pruning(), ckpt_path=tmp_path / "step=6.ckpt", max_epochs=2, loader=Slow())
    ours = {name for name in whole.callback_metrics if name.startswith("prune/")}
    assert all(resumed.callback_metrics[name] == whole.callback_metrics[name] for name in ours)


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("kind", ["ema", "swa"])
@pytest.mark.filterwarnings("ignore:.*swa_epoch_start", "ignore:.*Swapping scheduler")
def test_averaged_copies_follow_and_resume(tmp_path, kind, ours_first):
    def callbacks():
        other = (
            EMAWeightAveraging(decay=0.5)
            if kind == "ema"
            else StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=3)
        )
        return [pruning(), other] if ours_first else [other, pruning()]

    cls = Cosine if kind == "ema" else Plain
    whole = fit(build(cls), *callbacks(), every_epoch(tmp_path), max_epochs=5, enable_checkpointing=True)
    assert whole.lightning_module.net.conv.weight.shape[0] == CHANNELS // 2
    for epoch in range(4):
        resumed = fit(build(cls), *callbacks(), ckpt_path=tmp_path / f"epoch={epoch}.ckpt", max_epochs=5)
        assert digest(resumed) == digest(whole), f"from epoch {epoch}"


def test_an_averaged_checkpoint_loads_everywhere(tmp_path):
    def callbacks():
        return pruning(module="net"), EMAWeightAveraging(decay=0.5)

    fit(build(Cosine), *callbacks(), every_epoch(tmp_path), max_epochs=4, enable_checkpointing=True)
    path = tmp_path / "epoch=3.ckpt"
    model = load_from_checkpoint(Cosine, path)
    other, plain = build(Cosine), build(Cosine)
    load_pruned_state(plain, torch.load(path, weights_only=True))
    trainer = quiet_trainer(*callbacks())
    with pytest.warns(UserWarning, match="WeightAveraging"):
        trainer.test(other, data(), ckpt_path=path, verbose=False)
    x = next(iter(data()))[0]
    assert model.net.conv.out_channels == CHANNELS // 2
    assert torch.equal(model.eval()(x), other.eval()(x))
    assert torch.equal(model(x), plain.eval()(x))


def quiet_trainer(*callbacks, **options):
    return Trainer(
        **options,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("module", [None, "net"])
def test_a_checkpoint_loads_by_class_by_mixin_and_by_hand(tmp_path, weights_only, module):
    saver = every_epoch(tmp_path, save_weights_only=weights_only)
    trainer = fit(build(Mixed), pruning(module=module), saver, max_epochs=4, enable_checkpointing=True)
    path, x = tmp_path / "epoch=3.ckpt", next(iter(data()))[0]
    expected = trainer.lightning_module.eval()(x)
    by_hand = build(Cosine)
    load_pruned_state(by_hand, torch.load(path, weights_only=True))
    inner = build(Cosine).net
    load_pruned_state(inner, torch.load(path, weights_only=True), prefix="net.")
    prepared = prepare(build(Cosine))
    prepared.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    for model in (
        load_from_checkpoint(Cosine, path, optimizer="adamw"),
        Mixed.load_from_checkpoint(path),
        by_hand,
        prepared,
    ):
        assert torch.equal(model.eval()(x), expected)
        assert model.net.conv.out_channels == CHANNELS // 2
    assert type(load_from_checkpoint(Cosine, path)) is Cosine
    assert torch.equal(inner.eval()(x), expected)


def test_a_class_keeps_its_own_word_in_loading(tmp_path):
    class Own(Cosine):
        def on_load_checkpoint(self, checkpoint):
            self.epoch_of_file = checkpoint["epoch"]

    fit(build(Own), pruning(), every_epoch(tmp_path), max_epochs=2, enable_checkpointing=True)
    assert load_from_checkpoint(Own, tmp_path / "epoch=1.ckpt").epoch_of_file == 1


def assert_holds(model, path):
    """Every tensor of the file is in the model, and no other."""
    held = torch.load(path, weights_only=True)["state_dict"]
    torch.testing.assert_close(model.state_dict(), held, rtol=0, atol=0)


def test_best_and_last_load_into_the_pruned_model_dense_ones_included(tmp_path):
    saver = every_epoch(tmp_path, save_last=True)
    trainer = fit(build(Cosine), pruning(), saver, max_epochs=5, enable_checkpointing=True)
    model = trainer.lightning_module
    for path, width in (
        ("last", CHANNELS // 2),
        (tmp_path / "epoch=0.ckpt", CHANNELS),
        (tmp_path / "epoch=1.ckpt", 7),  # a third of one half of 8, rounded
    ):
        trainer.test(model, data(), ckpt_path=path, verbose=False)
        assert model.net.conv.out_channels == width
        assert_holds(model, saver.last_model_path if path == "last" else path)


class Judged(Cosine):
    """Answers in every loop; later epochs are better."""

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", float(self.trainer.current_epoch))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])


@pytest.mark.filterwarnings("ignore:.*multiple `ModelCheckpoint` callbacks")
@pytest.mark.parametrize("weights_only", [False, True], ids=["whole", "weights only"])
@pytest.mark.parametrize("loop", ["validate", "test", "predict"])
@pytest.mark.parametrize("kind", ["best", "last", "path"])
def test_every_loop_takes_a_checkpoint_of_another_structure(tmp_path, loop, kind, weights_only):
    """The best epoch is the last one, the file by its path is of an epoch before the cuts."""
    common = {"filename": "{epoch}", "save_weights_only": weights_only}
    saver = PrunedModelCheckpoint(dirpath=tmp_path, monitor="val_acc", mode="max", save_last=True, **common)
    plain = ModelCheckpoint(tmp_path / "all", save_top_k=-1, **common)
    options = {"enable_checkpointing": True, "num_sanity_val_steps": 0}
    fitted = fit(build(Judged), pruning(), saver, plain, loader=Images(), max_epochs=5, **options)
    model, dense = fitted.lightning_module, tmp_path / "all" / "epoch=0.ckpt"
    path = {"best": saver.best_model_path, "last": saver.last_model_path}.get(kind, dense)
    assert ("optimizer_states" in torch.load(path, weights_only=True)) is not weights_only
    if kind != "path":
        assert_holds(model, path)
        load_pruned_state(model, torch.load(tmp_path / "all" / "epoch=1.ckpt", weights_only=True))
        assert model.net.conv.out_channels == 7
    getattr(fitted, loop)(model, data(), ckpt_path=dense if kind == "path" else kind)
    other = build(Judged)
    getattr(quiet_trainer(pruning()), loop)(other, data(), ckpt_path=path)
    for each in (model, other):
        assert each.net.conv.out_channels == (CHANNELS if kind == "path" else CHANNELS // 2)
        assert_holds(each, path)


def test_a_prune_in_the_last_epoch_is_in_the_last_checkpoint(tmp_path):
    saver = ModelCheckpoint(tmp_path, save_last=True)
    model = build(Cosine)
    fit(model, Quiet(0.5, start_epoch=1), saver, max_epochs=2, enable_checkpointing=True)
    assert model.net.conv.out_channels == CHANNELS // 2
    loaded = load_from_checkpoint(Cosine, saver.last_model_path).state_dict()
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items())


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    class Wide(Cosine):
        def __init__(self):
            super().__init__()
            self.net.conv = nn.Conv2d(3, 12, 3, bias=False)
            self.net.bn = nn.BatchNorm2d(12)
            self.net.fc = nn.Linear(12, 2)

    fit(build(Cosine), pruning(), every_epoch(tmp_path), max_epochs=3, enable_checkpointing=True)
    path = tmp_path / "epoch=2.ckpt"
    for load in (
        lambda: fit(build(Wide), pruning(), ckpt_path=path),
        lambda: load_from_checkpoint(Wide, path),
    ):
        with pytest.raises(
            CheckpointMismatchError, match=r"net.bn.bias of shape \[8\], this model has \[12\]"
        ):
            load()


def test_a_smaller_checkpoint_that_no_plan_explains_is_refused(tmp_path):
    class Thin(Cosine):
        def __init__(self):
            super().__init__()
            self.net.conv = nn.Conv2d(3, 4, 3, bias=False)
            self.net.bn = nn.BatchNorm2d(4)
            self.net.fc = nn.Linear(4, 2)

    fit(build(Thin), every_epoch(tmp_path), max_epochs=1, enable_checkpointing=True)
    with pytest.raises(CheckpointMismatchError, match="no plan that explains them"):
        fit(build(Cosine), pruning(), ckpt_path=tmp_path / "epoch=0.ckpt")


def test_a_resumed_run_goes_on_counting_the_gradients_that_were_not_finite(tmp_path):
    class Bad(Cosine):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if (self.trainer.current_epoch, batch_idx) == (0, 1) else loss

    def bad_pruning():
        return Quiet(0.5, start_epoch=9, options={"nan_policy": "zero"})

    with pytest.warns(UserWarning, match="is not finite at step 1"):
        fit(build(Bad), bad_pruning(), every_epoch(tmp_path), max_epochs=1, enable_checkpointing=True)
    resumed = fit(build(Bad), bad_pruning(), ckpt_path=tmp_path / "epoch=0.ckpt", max_epochs=2)
    assert resumed.callback_metrics["prune/nonfinite_gradients"] == 1


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("epoch", [0, 1])
def test_a_resumed_run_hands_on_what_it_was_given(tmp_path, epoch):
    """Its own checkpoint says the same as that of the uninterrupted run."""

    def ours(folder):
        state = torch.load(folder / "epoch=2.ckpt", weights_only=True)["callbacks"]
        (found,) = [value for key, value in state.items() if key.startswith("Quiet")]
        return {name: found[name] for name in ("example", "initial", "base", "cut_epoch", "overflows")}

    one, two = tmp_path / "one", tmp_path / "two"
    fit(build(Cosine), pruning(), every_epoch(one), max_epochs=3, enable_checkpointing=True)
    path = one / f"epoch={epoch}.ckpt"
    fit(build(Cosine), pruning(), every_epoch(two), ckpt_path=path, max_epochs=3, enable_checkpointing=True)
    assert ours(one)["example"] is not None
    assert ours(two) == ours(one)


def test_a_checkpoint_from_before_the_first_cut_says_that_nothing_was_cut(tmp_path):
    fit(build(Cosine), pruning(module="net"), every_epoch(tmp_path), max_epochs=1, enable_checkpointing=True)
    state = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    assert state["state_dict"]._metadata["net"]["lightning_prune"]["cuts"] == []
    assert state["lightning_prune"]["net"]["cuts"] == []


def test_the_state_holds_plain_data(tmp_path):
    fit(build(Cosine), pruning(), every_epoch(tmp_path), max_epochs=2, enable_checkpointing=True)
    state = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)
    assert LightningModule  # the file was read without it
    (ours,) = [value for key, value in state["callbacks"].items() if key.startswith("Quiet")]

    def plain(value):
        if isinstance(value, dict):
            return all(map(plain, value)) and all(map(plain, value.values()))
        if isinstance(value, (list, tuple)):
            return all(map(plain, value))
        return value is None or type(value) in (bool, int, float, str) or isinstance(value, torch.Tensor)

    assert plain(ours)
    assert state["lightning_prune"].keys() == {""}
