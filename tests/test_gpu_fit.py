"""Fits on a GPU: optimizer state and loss scale follow a cut, a resume gives the same bits."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from on_device import DEVICE, ON_GPU, TRAINER, assert_on_device, at_home, on_gpu
from oracle import relative_error, run_double, slice_by
from test_callback import CHANNELS, Plain, Quiet, build, data, fit
from test_callback_report import Classifier, run
from test_checkpoint_lightning import Cosine, digest, every_epoch, pruning
from test_no_waiting import error_on_sync
from torch import nn, optim

from lightning_prune import GroupNormPruner, load_from_checkpoint
from lightning_prune.scores.importance import IMPORTANCES

pytestmark = [
    *on_gpu,
    pytest.mark.filterwarnings("ignore:.*low-precision", "ignore:.*bf16", "ignore:.*less than 24 bits"),
]

OPTIMIZERS = {
    "sgd": (optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "sgd fused": (optim.SGD, {"lr": 0.05, "momentum": 0.9, "fused": True}),
    "adamw fused": (optim.AdamW, {"lr": 0.01, "fused": True, "amsgrad": True}),
    "adamw foreach": (optim.AdamW, {"lr": 0.01, "foreach": True}),
    "adam capturable": (optim.Adam, {"lr": 0.01, "capturable": True}),
}
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed", "bf16-true")


class Fitted(Plain):
    def configure_optimizers(self):
        cls, options = OPTIMIZERS[self.kind]
        return cls(self.parameters(), **options)


class Taught(Cosine):
    def configure_optimizers(self):
        found = super().configure_optimizers()
        cls, options = OPTIMIZERS[self.kind]
        found["optimizer"] = cls(self.parameters(), **options)
        found["lr_scheduler"] = optim.lr_scheduler.CosineAnnealingLR(found["optimizer"], 5)
        return found


def on(precision):
    """Trainer options; a CPU has no loss scale of its own."""
    if precision == "16-mixed" and not ON_GPU:
        return {"plugins": MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu")), **TRAINER}
    return {"precision": precision, **TRAINER}


def scaler_state(trainer):
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return None if scaler is None else scaler.state_dict()


class Look(Callback):
    """What an optimizer knows at the start of an epoch, by parameter name."""

    def __init__(self):
        self.states, self.scales, self.losses = [], [], []

    def on_train_epoch_start(self, trainer, pl_module):
        (optimizer,) = trainer.optimizers
        names = {id(p): n for n, p in pl_module.named_parameters()}
        self.scales.append(scaler_state(trainer))
        self.states.append(
            {
                names[id(p)]: {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in s.items()}
                for p, s in optimizer.state.items()
            }
        )

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_state_of_optimizers_and_loss_scale_follow_a_cut(kind, precision):
    if "capturable" in kind and not ON_GPU:
        pytest.skip("PyTorch refuses capturable=True on a CPU")
    model, callback, before, after = build(Fitted, optimizer=kind), Quiet(0.5, start_epoch=1), Look(), Look()
    trainer = fit(model, before, callback, after, max_epochs=3, **on(precision))
    old, new = before.states[1], after.states[1]
    assert set(old) == set(new) == {n for n, _ in model.named_parameters()}
    cuts = callback.pruner.plan.by_tensor()
    shapes = {n: p.shape for n, p in model.named_parameters()}
    for name, state in old.items():
        assert state.keys() == new[name].keys()
        for key, value in state.items():
            found = new[name][key]
            if value is None:
                assert found is None
                continue
            want = slice_by(value.cpu(), list(cuts.get(name, ()))) if value.dim() else value.cpu()
            assert torch.equal(found.cpu(), want), f"{name} {key}"
            assert found.dtype == value.dtype
            assert found.device == value.device
            assert found.shape in (shapes[name], ())
            if found.dim() or "fused" in kind or "capturable" in kind:
                assert found.device.type == DEVICE
    assert model.net.conv.weight.shape == (CHANNELS // 2, 3, 3, 3)
    assert before.scales[1] == after.scales[1]
    assert (before.scales[1] is None) == (precision != "16-mixed")
    assert len(after.losses) == 12
    assert all(map(math.isfinite, after.losses))
    assert trainer.global_step == 12
    steps = [s["step"] for s in trainer.optimizers[0].state.values() if "step" in s]
    skipped = 0 if precision != "16-mixed" else 12 - int(min(steps, default=12))
    assert all(int(step) == 12 - skipped for step in steps)
    assert skipped <= 4


@pytest.mark.parametrize("importance", sorted(IMPORTANCES))
def test_every_importance_cuts_in_mixed_precision(importance):
    model = build()
    options = {"importance": importance, "reg": 0.01}
    trainer = fit(model, Quiet(0.5, start_epoch=1, module="net", options=options), **on("16-mixed"))
    assert model.net.conv.out_channels == CHANNELS // 2
    assert all(p.isfinite().all() for p in model.parameters())
    assert trainer.callback_metrics["prune/channels"] == 0.5


class Pupil(Plain):
    """Its step may not wait for the device, but for the first of an epoch, whose loss is counted from 0."""

    def training_step(self, batch, batch_idx):
        with error_on_sync() if ON_GPU and batch_idx else nullcontext():
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_step_that_the_dense_network_teaches_does_not_wait(precision):
    model = build(Pupil)
    callback = Quiet(0.5, start_epoch=1, module="net", distillation={"features": ["conv"]})
    trainer = fit(model, callback, max_epochs=3, **on(precision))
    assert model.net.conv.out_channels == CHANNELS // 2
    assert math.isfinite(trainer.callback_metrics["prune/distillation"])
    assert all(p.isfinite().all() for p in model.parameters())
    assert_on_device(callback._distiller.teacher)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-true"])
def test_the_report_is_of_the_device(tmp_path, precision):
    model = build(Classifier)
    _, report = run(tmp_path, model, **on(precision))
    assert model.net.conv.out_channels == CHANNELS // 2
    assert report.machine["device"].startswith(DEVICE)
    assert report.split == "test"
    for measured in (report.dense, report.pruned):
        assert measured.latency_ms > 0
        assert measured.peak_memory_bytes > measured.memory_bytes
        assert 0 <= measured.accuracy <= 1
    assert (report.dense.macs, report.pruned.macs) == (1944 + 16, 972 + 8)


# Resuming


@pytest.fixture
def reproducible(monkeypatch):
    """Lightning sets it too, with ``deterministic=True``; cuBLAS must know before its first product."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.mark.usefixtures("reproducible")
@pytest.mark.parametrize(
    ("kind", "precision"),
    [("sgd", "32-true"), ("adamw fused", "16-mixed"), ("adamw foreach", "bf16-mixed")],
)
def test_a_resumed_run_gives_the_same_bits(tmp_path, kind, precision):
    options = {"max_epochs": 5, "deterministic": True}
    whole = fit(
        build(Taught, optimizer=kind),
        pruning(),
        every_epoch(tmp_path),
        enable_checkpointing=True,
        **options,
        **on(precision),
    )
    expected, scale = digest(whole), scaler_state(whole)
    assert whole.lightning_module.net.conv.out_channels == CHANNELS // 2
    for epoch in range(4):
        path, callback = tmp_path / f"epoch={epoch}.ckpt", pruning()
        resumed = fit(build(Taught, optimizer=kind), callback, ckpt_path=path, **options, **on(precision))
        assert digest(resumed) == expected, f"from epoch {epoch}"
        assert scaler_state(resumed) == scale
        assert callback.pruner.current_step == 3


@pytest.mark.usefixtures("reproducible")
@pytest.mark.parametrize("importance", ["group_norm", "taylor", "hessian", "activation", "l1", "fpgm"])
def test_two_runs_give_the_same_bits(importance):
    def run():
        options = {"importance": importance, "reg": 0.01}
        return digest(
            fit(
                build(Taught, optimizer="sgd"),
                Quiet(0.5, start_epoch=1, module="net", options=options),
                deterministic=True,
                **TRAINER,
            )
        )

    assert run() == run()


def test_a_checkpoint_loads_on_a_cpu(tmp_path):
    model = build(Cosine)
    fit(model, pruning(), every_epoch(tmp_path), max_epochs=3, enable_checkpointing=True, **TRAINER)
    loaded = load_from_checkpoint(Cosine, tmp_path / "epoch=2.ckpt", map_location="cpu").eval()
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}
    assert all(torch.equal(a.cpu(), b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    x = next(iter(data()))[0]
    (got,), (want,) = run_double(loaded, x), run_double(copy.deepcopy(model).to(DEVICE), x.to(DEVICE))
    assert relative_error(got, want.cpu()) <= 1e-9
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), at_home(model).eval()(x), rtol=1e-4, atol=1e-5)


def test_a_run_from_a_gpu_goes_on_on_a_cpu(tmp_path):
    """What the callback keeps, evidence too, lies where the weights lie."""
    options = {"importance": "taylor", "reg": 0.01}

    def taught():
        return Quiet(0.5, start_epoch=2, iterative_steps=1, options=options)

    fit(build(Cosine), taught(), every_epoch(tmp_path), max_epochs=2, enable_checkpointing=True, **TRAINER)
    for where in ({"accelerator": "cpu"}, TRAINER):
        model = build(Cosine)
        fit(model, taught(), ckpt_path=tmp_path / "epoch=1.ckpt", max_epochs=3, **where)
        assert model.net.conv.out_channels == CHANNELS // 2


# Several processes, of which there is one


@pytest.fixture
def no_group():
    """Let no process group outlive a test."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Silent(Plain):
    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


def trained(*, prepare=lambda model: None, **options):
    model = build(Silent)
    prepare(model)
    callback = Quiet(0.5, start_epoch=1, iterative_steps=2, options={"reg": 0.01})
    fit(model, callback, max_epochs=3, precision="64-true", **{**TRAINER, **options})
    assert model.net.conv.out_channels == CHANNELS // 2
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.usefixtures("no_group")
@pytest.mark.filterwarnings("ignore")  # of advice that DDP gives
@pytest.mark.parametrize(
    "option", [None, "find_unused_parameters", "static_graph", "gradient_as_bucket_view"]
)
def test_the_wrapper_of_ddp_follows_a_cut(option):
    """Its buckets lie on the device, and NCCL sums them."""
    strategy = DDPStrategy(**({option: True} if option else {}))
    wrapped = trained(strategy=strategy, use_distributed_sampler=False)  # which would shuffle
    torch.testing.assert_close(wrapped, trained(), rtol=1e-9, atol=1e-12)


# Compiled code


@pytest.fixture
def compiler():
    """Forget what was compiled, before and after."""
    torch._dynamo.reset()
    # Before 2.13 compiled code did not look at the shapes of parameters that nobody had put elsewhere.
    with torch._dynamo.config.patch(skip_tensor_guards_with_matching_dict_tags=False):
        yield
    torch._dynamo.reset()


BACKEND = "inductor" if ON_GPU else "aot_eager"


@pytest.mark.usefixtures("compiler")
@pytest.mark.filterwarnings("ignore")  # of the compiler's own doing
def test_a_compiled_module_computes_what_it_does_uncompiled_after_two_cuts():
    model, x = build().net.double().to(DEVICE).eval(), next(iter(data()))[0].double().to(DEVICE)
    pruner = GroupNormPruner(model, x, pruning_ratio=0.5, iterative_steps=2)
    model.compile(backend=BACKEND)
    for width in (8, 6, 4):
        assert model.conv.out_channels == width
        (want,) = run_double(copy.deepcopy(model), x)
        with torch.no_grad():
            assert relative_error(model(x), want) <= 1e-9
        if width > 4:
            pruner.step()
    assert_on_device(model)


@pytest.mark.usefixtures("compiler")
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_network_trains_as_the_uncompiled_one():
    """With CUDA graphs too: what was recorded before a cut is not replayed after it."""
    how = {"mode": "reduce-overhead"} if ON_GPU else {"backend": BACKEND}
    compiled = trained(prepare=lambda model: model.net.compile(**how))
    torch.testing.assert_close(compiled, trained(), rtol=1e-6, atol=1e-9)
