"""What the dense network teaches equals the same loss written into the training step."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from test_callback import Plain, Quiet, build, data, fit, pytestmark  # noqa: F401 - same filters
from test_checkpoint_lightning import Cosine, Slow, digest
from torch import nn

from lightning_prune import Distillation, Plan
from lightning_prune.errors import OptionError
from lightning_prune.training.distilling import logits_of

T, WEIGHT, FEATURE = 3.0, 2.0, 0.7


def explicit_loss(net, teacher, x, logits):
    """Hinton's term from its definition, and a squared difference of the channels that are left."""
    with torch.no_grad():
        theirs, dense = teacher(x).float(), teacher.conv(x).float()
    p, q = torch.softmax(theirs / T, 1), torch.softmax(logits.float() / T, 1)
    per_image = [sum(p[i, c] * (p[i, c] / q[i, c]).log() for c in range(2)) for i in range(len(x))]
    ours = net.conv(x).float()
    left = [
        next(k for k, w in enumerate(teacher.conv.weight) if torch.equal(w, first))
        for first in net.at_the_cut
    ]
    feature = sum((ours[:, i] - dense[:, k]).square().sum() for i, k in enumerate(left)) / ours.numel()
    return WEIGHT * T**2 * sum(per_image) / len(x) + FEATURE * feature


class Taught(Plain):
    """With ``explicit`` the training step computes the loss by itself."""

    def __init__(self, explicit=False):
        super().__init__()
        self.explicit, self.terms = explicit, {}
        with torch.no_grad():
            self.net.conv.weight[[0, 2, 3, 6]] *= 0.1  # so that not the first ones stay

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self.net(x)
        loss = nn.functional.cross_entropy(logits, y)
        teacher = self.__dict__.get("teacher")
        if teacher is None:
            return loss
        term = explicit_loss(self.net, teacher, x, logits)
        self.terms.setdefault(self.current_epoch, []).append(float(term.detach()))
        return loss + term


class Copy(Callback):
    """Keeps the dense network of the explicit run, and after the cut the filters that are left."""

    def __init__(self, after):
        self.after = after

    def on_train_epoch_start(self, trainer, pl_module):
        net = pl_module.net
        if trainer.current_epoch == 1 and self.after:
            net.at_the_cut = [w.detach().clone()[:3] for w in net.conv.weight]
        elif trainer.current_epoch == 1:
            pl_module.__dict__["teacher"] = copy.deepcopy(net).eval().requires_grad_(False)


def train(explicit, half=False, **options):
    if half:
        options["plugins"] = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    how = {"temperature": T, "weight": WEIGHT, "features": ["conv"], "feature_weight": FEATURE}
    callback = Quiet(module="net", options={"reg": 0.0}, distillation=None if explicit else how)
    callbacks = [Copy(False), callback, Copy(True)] if explicit else [callback]
    model = build(Taught, explicit=explicit)
    trainer = fit(model, *callbacks, loader=data(24), max_epochs=3, **options)
    assert [c.keep for c in callback.pruner.plan.cuts if c.tensor == "conv.weight"] != [(0, 1, 2, 3)]
    return torch.cat([p.detach().flatten() for p in model.parameters()]), trainer


CASES = {
    "fp32": (False, {}, 1e-6),
    "accumulated": (False, {"accumulate_grad_batches": 2}, 1e-6),
    "short last group": (False, {"accumulate_grad_batches": 4}, 1e-6),
    "clipped": (False, {"gradient_clip_val": 0.1}, 1e-6),
    "fp16": (True, {}, 2e-3),
    "fp16 accumulated": (True, {"accumulate_grad_batches": 2}, 2e-3),
}


@pytest.mark.parametrize(("half", "options", "tolerance"), CASES.values(), ids=CASES)
def test_equals_the_loss_written_into_the_training_step(half, options, tolerance):
    ours, trainer = train(False, half, **options)
    explicit, _ = train(True, half, **options)
    assert torch.allclose(ours, explicit, rtol=0, atol=tolerance), (ours - explicit).abs().max()
    assert float(trainer.callback_metrics["prune/distillation"]) > 0


def test_the_loss_that_is_logged_is_that_of_its_epoch():
    logged = float(train(False)[1].callback_metrics["prune/distillation"])
    terms = train(True)[1].lightning_module.terms
    means = {epoch: sum(found) / len(found) for epoch, found in terms.items()}
    assert sorted(means) == [1, 2]
    assert logged == pytest.approx(means[2] / 2, rel=1e-5)  # per output: the logits and one feature
    assert means[1] != pytest.approx(means[2], rel=1e-2)


def test_the_teaching_is_felt():
    """Guards the comparison above: without it the weights are elsewhere."""
    model = build(Taught)
    fit(model, Quiet(module="net", options={"reg": 0.0}), loader=data(24), max_epochs=3)
    without = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert (without - train(False)[0]).abs().max() > 1e-2


@pytest.mark.parametrize("module", [None, "net"])
def test_a_resumed_fit_has_the_same_bits(tmp_path, module):
    def callback():
        how = Distillation(features=("conv" if module else "net.conv",))
        return Quiet(module=module, start_epoch=1, iterative_steps=2, distillation=how)

    saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    options = {"max_epochs": 4, "loader": Slow()}
    whole = fit(build(Cosine), callback(), saver, enable_checkpointing=True, **options)
    steps = sorted(int(p.stem.partition("=")[2]) for p in tmp_path.glob("*.ckpt"))
    for step in steps[:-1]:
        resumed = fit(build(Cosine), callback(), ckpt_path=tmp_path / f"step={step}.ckpt", **options)
        assert digest(resumed) == digest(whole), f"from step {step}"


def test_the_teacher_is_the_network_before_its_first_cut_and_stays():
    class Watch(Quiet):
        def on_train_epoch_end(self, trainer, pl_module):
            super().on_train_epoch_end(trainer, pl_module)
            teacher = self._distiller.teacher
            seen.append(None if teacher is None else {k: v.clone() for k, v in teacher.state_dict().items()})
            weights.append({k: v.clone() for k, v in pl_module.net.state_dict().items()})

    seen, weights = [], []
    model = build(Taught)
    fit(model, Watch(module="net", iterative_steps=2, distillation={}), max_epochs=4)
    assert seen[0] is None
    for later in seen[1:]:
        assert all(torch.equal(later[name], weights[0][name]) for name in later)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert "teacher" not in "".join(model.state_dict())


class Parts(Plain):
    """Never calls the network as a whole."""

    forward = LightningModule.forward

    def __init__(self):
        super().__init__()
        features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
        self.net = nn.ModuleDict({"features": features})

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net["features"](batch[0]).flatten(1), batch[1])


def test_the_channels_to_compare_are_looked_up_once_for_a_cut():
    """On a GPU every look-up would wait for the device."""

    class Look(Quiet):
        def on_train_batch_start(self, trainer, *args):
            super().on_train_batch_start(trainer, *args)
            held.append((trainer.current_epoch, self._distiller._kept.get("conv")))

    held = []
    fit(
        build(Taught),
        Look(module="net", iterative_steps=2, distillation={"features": ["conv"]}, options={"reg": 0.0}),
        max_epochs=4,
    )
    widths = [None if kept is None else len(kept) for _, kept in held]
    assert widths == [None] * 4 + [6] * 4 + [4] * 8
    assert len({id(kept) for _, kept in held[4:]}) == 2


def test_nothing_of_a_network_is_kept_for_another():
    callback = Quiet(module="net", distillation={"features": ["conv"]})
    fit(build(Taught), callback, max_epochs=2)
    distiller = callback._distiller
    assert distiller.teacher is not None
    assert len(distiller._kept["conv"]) == 4
    distiller.forget()
    assert (distiller.teacher, distiller._kept, distiller._plan) == (None, {}, Plan())
    assert distiller.loss.tolist() == [0.0, 0.0]


def test_a_network_that_is_not_called_is_refused_by_name():
    with pytest.raises(OptionError, match="did not call it with gradients"):
        fit(build(Parts), Quiet(module="net", distillation={}))


@pytest.mark.parametrize(
    ("features", "message"),
    [(["nowhere"], "names 'nowhere', which is no submodule"), (["stage"], "name the convolution")],
)
def test_features_that_cannot_be_compared_are_refused(features, message):
    class Staged(Plain):
        def __init__(self):
            super().__init__()
            layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1)
            stage = nn.Sequential(*layers)
            self.net = nn.Sequential()
            self.net.add_module("stage", stage)
            self.net.add_module("rest", nn.Sequential(nn.Flatten(), nn.Linear(72, 2)))

    with pytest.raises(OptionError, match=message):
        fit(build(Staged), Quiet(module="net", distillation={"features": features}))


def test_logits_are_found_where_networks_put_them():
    z = torch.ones(2, 3)
    assert logits_of(z) is z
    assert logits_of({"logits": z}) is z
    with pytest.raises(OptionError, match="returned a tuple without any"):
        logits_of((z, z))


@pytest.mark.parametrize(
    "wrong", [{"temperature": 0}, {"weight": -1}, {"features": "conv"}, {"weight": "much"}]
)
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(OptionError, match=next(iter(wrong))):
        Distillation(**wrong)


def test_compiled_modules_are_refused():
    model = build()
    model.net.compile(backend="eager")
    with pytest.raises(OptionError, match="runs past forward hooks"):
        fit(model, Quiet(module="net", distillation={}))
