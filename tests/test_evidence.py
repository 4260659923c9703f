"""Gradients and outputs that a fit collects, against the same training written as a plain loop."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from test_callback import CHANNELS, Net, Plain, Quiet, build, data, fit, pytestmark  # noqa: F401 - same filters
from test_checkpoint_lightning import Cosine, Slow, digest
from torch import nn

from lightning_prune import GroupNormPruner
from lightning_prune.errors import OptionError
from lightning_prune.scores.importance import NEEDS, Evidence

REG = 0.05
WEIGHTS = ("conv.weight", "bn.weight", "fc.weight")
X = torch.ones(2, 3, 5, 5)


class Watch(Quiet):
    """Remembers what was collected in the epoch before the cut."""

    def on_train_epoch_end(self, trainer, pl_module):
        super().on_train_epoch_end(trainer, pl_module)
        if trainer.current_epoch == self.start_epoch - 1:
            evidence = self.pruner.collector.evidence(Evidence(include_bias=False))
            self.seen = getattr(evidence, NEEDS[self.options.importance])
            self.before = {n: p.detach().clone() for n, p in pl_module.net.named_parameters()}


def collected(importance, half=False, epochs=1, **options):
    if half:
        options["plugins"] = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    pruning = {"importance": importance, "reg": REG, "alpha": 0.0}
    callback = Watch(module="net", start_epoch=epochs, options=pruning)
    model = build()
    fit(model, callback, loader=data(24), max_epochs=epochs + 1, **options)
    return callback, model.net


def by_hand(need, accumulate=1, half=False, epochs=1):
    """SGD with the penalty's gradient; means per step of the last epoch, found beside it."""
    net = build().net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    batches, sums, steps = list(data(24)), {}, 0
    for start in [s for _ in range(epochs) for s in range(0, len(batches), accumulate)]:
        sums, steps = ({}, 0) if start == 0 else (sums, steps)
        group = batches[start : start + accumulate]
        optimizer.zero_grad()
        for x, y in group:
            with torch.autocast("cpu", torch.float16, enabled=half):
                h = net.conv(x)
                b = net.bn(h)
                loss = nn.functional.cross_entropy(net.fc(b.relu().mean(dim=(2, 3))), y)
            (loss * 65536 / accumulate if half else loss / accumulate).backward()
            for name, out in (("conv.weight", h), ("bn.weight", b)) if need == "activations" else ():
                total, count = sums.get(name, (torch.zeros(CHANNELS), 0))
                per_channel = [float(out[:, k].detach().float().abs().sum()) for k in range(CHANNELS)]
                sums[name] = total + torch.tensor(per_channel), count + out[:, 0].numel()
        for name, p in net.named_parameters():
            p.grad /= 65536 if half else 1
            g = p.grad * accumulate / len(group)
            if need != "activations":
                sums[name] = sums.get(name, 0) + (g if need == "gradients" else g**2)
            if name in WEIGHTS:
                p.grad += REG * p.detach()
        optimizer.step()
        steps += 1
    if need == "activations":
        return net, {name: total / count for name, (total, count) in sums.items()}
    return net, {name: total / steps for name, total in sums.items() if name in WEIGHTS}


def unit_scores(importance, net, mean):
    """Channel by channel, element by element."""
    scores = []
    for k in range(CHANNELS):
        own = {"conv.weight": (k,), "bn.weight": (k,), "fc.weight": (slice(None), k)}
        if importance == "activation":
            scores.append(float(mean["conv.weight"][k] + mean["bn.weight"][k]) / 2)
            continue
        score = 0.0
        for name, at in own.items():
            for w, g in zip(
                net.get_parameter(name).detach()[at].flatten(), mean[name][at].flatten(), strict=True
            ):
                score += float(w * g) ** 2 if importance == "taylor" else float(w**2 * g) / 2
        scores.append(score)
    return scores


CASES = {
    "fp32": (1, False, 1, 1e-5),
    "second epoch": (1, False, 2, 1e-4),
    "accumulated": (2, False, 1, 1e-5),
    "short last group": (4, False, 1, 1e-5),
    "fp16": (1, True, 1, 1e-3),
    "fp16 short last group": (4, True, 1, 1e-3),
}


@pytest.mark.parametrize("importance", ["taylor", "hessian", "activation"])
@pytest.mark.parametrize(("accumulate", "half", "epochs", "tolerance"), CASES.values(), ids=CASES)
def test_a_fit_collects_what_a_plain_loop_does(importance, accumulate, half, epochs, tolerance):
    callback, pruned = collected(importance, half, epochs, accumulate_grad_batches=accumulate)
    net, mean = by_hand(NEEDS[importance], accumulate, half, epochs)
    assert callback.seen.keys() == mean.keys()
    for name, value in mean.items():
        torch.testing.assert_close(
            callback.seen[name].float(), value, rtol=tolerance, atol=tolerance * float(value.abs().max())
        )
    scores = unit_scores(importance, net, mean)
    weakest = sorted(range(CHANNELS), key=scores.__getitem__)[: CHANNELS // 2]
    kept = [k for k in range(CHANNELS) if k not in weakest]
    assert pruned.conv.out_channels == len(kept)
    assert [c.keep for c in callback.pruner.plan.cuts if c.tensor == "conv.weight"] == [tuple(kept)]


@pytest.mark.parametrize("importance", ["taylor", "hessian", "activation"])
def test_a_resumed_fit_has_the_same_bits(importance, tmp_path):
    def callback():
        return Quiet(start_epoch=1, every_n_epochs=1, iterative_steps=2, options={"importance": importance})

    saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    options = {"max_epochs": 4, "loader": Slow()}
    whole = fit(build(Cosine), callback(), saver, enable_checkpointing=True, **options)
    steps = sorted(int(p.stem.partition("=")[2]) for p in tmp_path.glob("*.ckpt"))
    assert len(steps) > 8
    for step in steps[:-1]:
        resumed = fit(build(Cosine), callback(), ckpt_path=tmp_path / f"step={step}.ckpt", **options)
        assert digest(resumed) == digest(whole), f"from step {step}"


@pytest.mark.parametrize("importance", ["group_norm", lambda group: torch.arange(group.n_units)])
def test_what_needs_no_evidence_collects_none(importance):
    class Hooked(Quiet):
        def on_after_backward(self, trainer, pl_module):
            super().on_after_backward(trainer, pl_module)
            assert not any(m._forward_hooks for m in pl_module.modules())
            assert "evidence" not in self.pruner.state_dict()

    fit(build(), Hooked(options={"importance": importance}))


def test_hooks_hang_on_the_layers_within_a_batch_alone():
    hooks = []

    class Hooked(Quiet):
        def on_after_backward(self, trainer, pl_module):
            super().on_after_backward(trainer, pl_module)
            hooks.append(sum(len(m._forward_hooks) for m in pl_module.modules()))

        def on_train_epoch_end(self, trainer, pl_module):
            super().on_train_epoch_end(trainer, pl_module)
            hooks.append(sum(len(m._forward_hooks) for m in pl_module.modules()))

    fit(build(), Hooked(module="net", options={"importance": "activation"}))
    assert hooks == [2, 2, 2, 2, 0, 0, 0, 0, 0, 0]  # of conv and bn; after the last cut nothing is needed


class Stop(Plain):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 1:
            raise RuntimeError("stop")
        return loss


def test_a_fit_that_fails_gives_the_layers_back():
    model = build(Stop)
    with pytest.raises(RuntimeError, match="stop"):
        fit(model, Quiet(options={"importance": "activation"}))
    assert not any(m._forward_hooks for m in model.modules())


def test_a_first_cut_before_any_step_is_refused():
    with pytest.raises(OptionError, match="start_epoch=0 cuts before any"):
        Quiet(start_epoch=0, options={"importance": "taylor"})


def test_compiled_modules_and_activations_do_not_go_together():
    model = build()
    model.net.compile(backend="eager")
    with pytest.raises(OptionError, match="runs past forward hooks"):
        fit(model, Quiet(options={"importance": "activation"}))


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6, 2))

    def forward(self, x):
        return x @ self.a @ self.b


def test_units_that_no_layer_produces_are_named_at_once():
    with pytest.raises(OptionError, match="to produce the units of group"):
        GroupNormPruner(Bare(), torch.ones(1, 4), importance="activation")


@pytest.mark.parametrize("importance", ["taylor", "hessian", "activation"])
def test_evidence_is_cut_along(importance):
    net = Net()
    pruner = GroupNormPruner(net, X, importance=importance, iterative_steps=2)
    with pruner.watch():
        net(torch.randn(4, 3, 5, 5)).square().sum().backward()
    pruner.collect()
    before = pruner.collector.state_dict()["sums"]
    plan = pruner.step()
    after = pruner.collector.state_dict()["sums"]
    cut = next(c for c in plan.cuts if c.tensor == "conv.weight")
    assert torch.equal(after["conv.weight"], before["conv.weight"][list(cut.keep)])
    pruner.step()
    assert net.conv.out_channels == CHANNELS // 2


def test_a_budget_is_checked_before_there_is_evidence():
    pruner = GroupNormPruner(Net(), X, importance="taylor", budget={"params": 0.5})
    with pytest.raises(OptionError, match=r"call pruner.collect\(\) after the backward pass"):
        pruner.step(dry_run=True)
