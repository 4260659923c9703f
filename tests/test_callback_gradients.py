"""The gradient that the callback adds equals an explicit loss term's, whatever a Trainer does to them."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins import MixedPrecision
from test_callback import Plain, Quiet, build, data, fit, pytestmark  # noqa: F401 - applies the same filters
from torch import nn

from lightning_prune.scores.inspecting import Inspector

REG = 0.05


def penalty(net):
    """``reg / 2 * sum_k gamma_k I_k`` over the conv's channels; alpha is 0, so every gamma is 1."""
    return REG / 2 * sum(w.square().sum() for w in (net.conv.weight, net.bn.weight, net.fc.weight))


class Automatic(Plain):
    def __init__(self, explicit, optimizer="sgd", skip=()):
        super().__init__(optimizer)
        self.explicit, self.skip = explicit, skip

    def training_step(self, batch, batch_idx):
        if batch_idx in self.skip:
            return None
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        return loss + penalty(self.net) if self.explicit else loss

    def configure_optimizers(self):
        if self.kind == "fused":
            return torch.optim.AdamW(self.parameters(), lr=1e-2, fused=True)
        if self.kind == "lbfgs":
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Manual(Automatic):
    """Two optimizers that step in turn; each loss carries the penalty of its own parameters."""

    def __init__(self, explicit):
        super().__init__(explicit)
        self.automatic_optimization = False

    def configure_optimizers(self):
        first, second = [*self.net.conv.parameters(), *self.net.bn.parameters()], self.net.fc.parameters()
        return [torch.optim.SGD(group, lr=0.1, momentum=0.9) for group in (first, second)]

    def training_step(self, batch, batch_idx):
        net, (one, two) = self.net, self.optimizers()
        for optimizer, held in ((one, (net.conv.weight, net.bn.weight)), (two, (net.fc.weight,))):
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            own = REG / 2 * sum(w.square().sum() for w in held)
            optimizer.zero_grad()
            self.manual_backward(loss + own if self.explicit else loss)
            optimizer.step()


class ClippedByHand(Manual):
    """The training step clips the task's gradients; the penalty joins them when the optimizer steps."""

    def training_step(self, batch, batch_idx):
        net, (one, two) = self.net, self.optimizers()
        for optimizer, held in ((one, (net.conv.weight, net.bn.weight)), (two, (net.fc.weight,))):
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            self.clip_gradients(optimizer, 0.1, "norm")
            for weight in held if self.explicit else ():
                weight.grad += REG * weight.detach()
            optimizer.step()


class Together(Manual):
    """One backward pass, then two steps: no gradient may get its penalty twice."""

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss + penalty(self.net) if self.explicit else loss)
        for optimizer in self.optimizers():
            optimizer.step()


def half():
    return {"plugins": MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))}


CASES = {
    "fp32": (Automatic, {}, dict, 1e-6),
    "accumulated": (Automatic, {}, lambda: {"accumulate_grad_batches": 4}, 1e-6),
    "short last group": (Automatic, {}, lambda: {"accumulate_grad_batches": 5}, 1e-6),
    "accumulation that changes": (
        Automatic,
        {},
        lambda: {"callbacks": [GradientAccumulationScheduler({0: 1, 1: 2})]},
        1e-6,
    ),
    "limited": (Automatic, {}, lambda: {"limit_train_batches": 5, "accumulate_grad_batches": 4}, 1e-6),
    "a share of an epoch": (
        Automatic,
        {},
        lambda: {"limit_train_batches": 0.5, "accumulate_grad_batches": 2},
        1e-6,
    ),
    "overfitted": (Automatic, {}, lambda: {"overfit_batches": 3, "accumulate_grad_batches": 2}, 1e-6),
    "lbfgs": (Automatic, {"optimizer": "lbfgs"}, dict, 1e-5),
    "lbfgs accumulated": (Automatic, {"optimizer": "lbfgs"}, lambda: {"accumulate_grad_batches": 2}, 1e-6),
    # In float32 the steps of this pair grow whatever rounding there is to numbers of any size.
    "lbfgs clipped": (
        Automatic,
        {"optimizer": "lbfgs"},
        lambda: {"gradient_clip_val": 0.1, "precision": "64-true"},
        1e-7,
    ),
    "clipped": (Automatic, {}, lambda: {"gradient_clip_val": 0.1}, 1e-6),
    "bf16": (Automatic, {}, lambda: {"precision": "bf16-mixed"}, 1e-6),
    "fp16": (Automatic, {}, half, 1e-5),
    "fp16 accumulated": (Automatic, {}, lambda: {**half(), "accumulate_grad_batches": 2}, 1e-5),
    "fp16 clipped": (Automatic, {}, lambda: {**half(), "gradient_clip_val": 0.1}, 1e-5),
    "fp16 fused": (Automatic, {"optimizer": "fused"}, half, 1e-4),
    "no loss": (Automatic, {"skip": (1,)}, dict, 1e-6),
    "no loss, first of two": (Automatic, {"skip": (2,)}, lambda: {"accumulate_grad_batches": 2}, 1e-6),
    "no loss, last of two": (Automatic, {"skip": (3,)}, lambda: {"accumulate_grad_batches": 2}, 1e-6),
    "manual": (Manual, {}, dict, 1e-6),
    "fp16 manual": (Manual, {}, half, 1e-5),
    "manual, one backward": (Together, {}, dict, 1e-6),
    "manual, clipped by hand": (ClippedByHand, {}, dict, 1e-6),
}


GPU_CASES = {
    "fp32": (Automatic, {}, {}, 1e-5),
    "accumulated": (Automatic, {}, {"accumulate_grad_batches": 4}, 1e-5),
    "clipped": (Automatic, {}, {"gradient_clip_val": 0.1}, 1e-5),
    "bf16": (Automatic, {}, {"precision": "bf16-mixed"}, 1e-4),
    "fp16": (Automatic, {}, {"precision": "16-mixed"}, 1e-4),
    "fp16 accumulated": (Automatic, {}, {"precision": "16-mixed", "accumulate_grad_batches": 2}, 1e-4),
    "fp16 clipped": (Automatic, {}, {"precision": "16-mixed", "gradient_clip_val": 0.1}, 1e-4),
    "fp16 fused": (Automatic, {"optimizer": "fused"}, {"precision": "16-mixed"}, 1e-3),
    "manual": (Manual, {}, {}, 1e-5),
    "fp16 manual": (Manual, {}, {"precision": "16-mixed"}, 1e-4),
    "fp16 manual, one backward": (Together, {}, {"precision": "16-mixed"}, 1e-4),
}


def train(cls, explicit, options, trainer_options):
    model = build(cls, explicit=explicit, **options)
    ours = [] if explicit else [Quiet(start_epoch=9, options={"reg": REG, "alpha": 0.0})]
    callbacks = [*trainer_options.get("callbacks", ()), *ours]
    trainer = Trainer(
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"accelerator": "cpu", **trainer_options, "callbacks": callbacks},
    )
    trainer.fit(model, data(24))
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.filterwarnings("ignore:.*training_step. returned .None.")
@pytest.mark.parametrize(("cls", "options", "trainer_options", "tolerance"), CASES.values(), ids=CASES)
def test_equals_an_explicit_loss_term(cls, options, trainer_options, tolerance):
    explicit = train(cls, True, options, trainer_options())
    ours = train(cls, False, options, trainer_options())
    assert torch.allclose(ours, explicit, rtol=0, atol=tolerance), (ours - explicit).abs().max()


def test_the_penalty_is_there_when_the_module_looks_at_whole_gradients():
    """Its own hook follows the backward pass, long before the optimizer steps."""

    class Looking(Automatic):
        def on_after_backward(self):
            seen.append(self.net.conv.weight.grad.clone())

    def run(explicit):
        seen.clear()
        ours = [] if explicit else [Quiet(start_epoch=9, options={"reg": REG, "alpha": 0.0})]
        model = build(Looking, explicit=explicit)
        fit(model, *ours, loader=data(24), max_epochs=1, accumulate_grad_batches=5)
        return [seen[4], seen[5]]  # of six: after the fifth, and after the epoch's last

    seen = []
    for found, expected in zip(run(False), run(True), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("cls", "options", "trainer_options", "tolerance"), GPU_CASES.values(), ids=GPU_CASES
)
def test_equals_an_explicit_loss_term_on_a_gpu(cls, options, trainer_options, tolerance):
    trainer_options = {"accelerator": "gpu", "devices": 1, **trainer_options}
    explicit = train(cls, True, options, trainer_options)
    ours = train(cls, False, options, trainer_options)
    assert torch.allclose(ours, explicit, rtol=0, atol=tolerance), (ours - explicit).abs().max()


@pytest.mark.parametrize("value", [1.0, torch.nan, torch.inf])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "torch"])
def test_gradients_of_every_kind_are_judged(value, fused):
    """Complex ones may be conjugated in name alone."""
    kinds = {
        "plain": torch.ones(3),
        "half": torch.full((70_000,), 1.0, dtype=torch.float16),
        "large": torch.full((3,), 3e38),
        "wide": torch.full((3,), 1e300, dtype=torch.float64),
        "complex": torch.ones(3, dtype=torch.complex64).conj(),
    }
    inspector = Inspector(fused=fused)
    assert not inspector.look(list(kinds.values()))[1]
    for name, grad in kinds.items():
        broken = grad.clone()
        broken[1] = value
        flags, _ = inspector.look(list({**kinds, name: broken.conj() if grad.is_conj() else broken}.values()))
        assert [n for n, flag in zip(kinds, flags, strict=True) if flag] == ([] if value == 1 else [name])


def test_the_penalty_is_felt():
    """Guards the comparison above: without the penalty the weights are elsewhere."""
    unpenalised = Trainer(
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    model = build(Automatic, explicit=False)
    unpenalised.fit(model, data(24))
    without = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert (without - train(Automatic, True, {}, {})).abs().max() > 1e-2


class Interrupt(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        raise RuntimeError("stop")


def test_a_fit_that_stopped_between_two_micro_batches_leaves_nothing_to_the_next():
    """The penalty counts the backward passes of an accumulation; those of a broken one are gone."""

    def run(callback):
        model = build(Automatic, explicit=False)
        fit(model, callback, max_epochs=1, accumulate_grad_batches=2)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    def pruning():
        return Quiet(start_epoch=5, options={"reg": 1.0})

    used = pruning()
    with pytest.raises(RuntimeError, match="stop"):
        fit(build(Automatic, explicit=False), used, Interrupt(), accumulate_grad_batches=2)
    assert torch.equal(run(used), run(pruning()))


def test_weights_of_the_penalty_are_refreshed_by_optimizer_steps():
    """Micro-batches do not count: an epoch of two steps in four parts equals one of two whole steps."""

    class Still(Plain):
        def __init__(self):
            super().__init__()
            self.net.bn = nn.Identity()  # else the size of a batch matters

    def run(batch_size, **options):
        model, callback = build(Still), Quiet(start_epoch=9, update_every=3, options={"reg": 0.5})
        fit(model, callback, loader=data(16, batch_size), max_epochs=4, **options)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.allclose(run(8), run(4, accumulate_grad_batches=2), rtol=0, atol=1e-6)
