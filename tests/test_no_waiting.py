"""No step of the sparse phase waits for an accelerator, and a step outside it looks at nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from test_callback import Plain, Quiet, build, data, fit, pytestmark  # noqa: F401 - applies the same filters
from test_regularizer_nonfinite import NoWaiting
from torch.profiler import ProfilerActivity, profile

from lightning_prune.errors import PruneError

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Guarded(Quiet):
    """Runs the hooks of every step but the first two, which build things, under a guard."""

    def __init__(self, guard: Callable[[], AbstractContextManager[Any]], **options: Any) -> None:
        super().__init__(0.5, start_epoch=9, **options)
        self.guard, self.guarded = guard, 0

    def _under_guard(self, trainer):
        is_steady = trainer.global_step >= 2
        self.guarded += is_steady
        return self.guard() if is_steady else nullcontext()

    def on_train_batch_start(self, trainer, *args):
        with self._under_guard(trainer):
            super().on_train_batch_start(trainer, *args)

    def on_after_backward(self, trainer, pl_module):
        with self._under_guard(trainer):
            super().on_after_backward(trainer, pl_module)

    def on_before_optimizer_step(self, trainer, *args):
        with self._under_guard(trainer):
            super().on_before_optimizer_step(trainer, *args)


class Broken(Plain):
    """Its gradients of step 1 are not numbers."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.trainer.global_step == 1 else loss


class Idle(torch.optim.SGD):
    """Does nothing: what a broken gradient does to the weights is not the matter here."""

    def step(self, closure=None):
        return closure()


class BrokenIdle(Broken):
    def configure_optimizers(self):
        return Idle(self.parameters(), lr=0.1)


def half():
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("policy", ["raise", "skip", "zero"])
@pytest.mark.parametrize("update_every", [1, 3])
@pytest.mark.parametrize("plugins", [list, lambda: [half()]], ids=["fp32", "fp16"])
def test_between_log_intervals_nothing_is_asked_of_the_device(policy, update_every, plugins):
    callback = Guarded(NoWaiting, update_every=update_every, options={"nan_policy": policy})
    fit(build(), callback, max_epochs=2, plugins=plugins(), log_every_n_steps=50)
    assert callback.guarded == 18  # three hooks in six of the eight steps


def test_a_wait_would_be_noticed():
    """On a CPU it costs nothing to ask, so there the guard above fails."""
    with pytest.raises(AssertionError, match="_local_scalar_dense"):
        fit(build(), Guarded(NoWaiting))


@pytest.mark.usefixtures("accelerator")
def test_at_a_log_interval_the_device_is_asked():
    with pytest.raises(AssertionError, match="_local_scalar_dense"):
        fit(build(), Guarded(NoWaiting), max_epochs=1, log_every_n_steps=3)


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("policy", ["skip", "zero"])
def test_broken_gradients_are_counted_on_the_device_and_told_later(policy):
    seen: dict[int, list[torch.Tensor]] = {}

    class Look(Quiet):
        def on_after_backward(self, trainer, pl_module):
            before = [p.grad.clone() for p in pl_module.parameters()]
            super().on_after_backward(trainer, pl_module)
            after = [p.grad for p in pl_module.parameters()]
            seen[trainer.global_step] = [a - b for a, b in zip(after, before, strict=True)]
            assert trainer.global_step != 1 or policy == "skip" or all(a.isfinite().all() for a in after)

    callback = Look(0.5, start_epoch=9, options={"nan_policy": policy})
    with pytest.warns(UserWarning, match=r"gradient of 'net.conv.weight' is not finite at or before step"):
        trainer = fit(build(BrokenIdle), callback, max_epochs=1)
    assert trainer.callback_metrics["prune/nonfinite_gradients"] == 1
    assert any(added.count_nonzero() for added in seen[0])
    assert any(added.count_nonzero() for added in seen[2])


@pytest.mark.usefixtures("accelerator")
def test_skip_lets_the_penalty_of_a_broken_step_rest_on_the_device():
    """One tensor's gradient breaks; the others show whether the penalty joined them."""
    added = []

    class OneBroken(BrokenIdle):
        def training_step(self, batch, batch_idx):
            return Plain.training_step(self, batch, batch_idx)

    class Look(Quiet):
        def on_after_backward(self, trainer, pl_module):
            if trainer.global_step == 1:
                pl_module.net.fc.bias.grad[0] = torch.inf
            before = pl_module.net.conv.weight.grad.clone()
            super().on_after_backward(trainer, pl_module)
            added.append((pl_module.net.conv.weight.grad - before).abs().max().item())

    with pytest.warns(UserWarning, match=r"gradient of 'net.fc.bias' is not finite"):
        fit(build(OneBroken), Look(0.5, start_epoch=9), max_epochs=1)
    assert [a > 0 for a in added] == [True, False, True, True]


@pytest.mark.usefixtures("accelerator")
def test_raise_speaks_when_the_device_is_asked():
    callback = Quiet(0.5, start_epoch=9, options={"nan_policy": "raise"})
    with pytest.raises(PruneError, match=r"gradient of 'net.conv.weight' is not finite at or before step 2"):
        fit(build(BrokenIdle), callback, max_epochs=1, log_every_n_steps=3)


def test_outside_the_sparse_phase_gradients_are_nobodys_business():
    callback = Quiet(0.5, start_epoch=9, sparse_start_epoch=9, options={"nan_policy": "raise"})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not finite")
        trainer = fit(build(BrokenIdle), callback, max_epochs=1)
    assert "prune/nonfinite_gradients" not in trainer.callback_metrics


# The same where there is a device


@contextmanager
def error_on_sync() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("policy", ["raise", "skip", "zero"])
@pytest.mark.parametrize("update_every", [1, 3])
@pytest.mark.parametrize("fused", [False, True], ids=["torch", "fused"])
def test_no_step_synchronises_a_gpu(precision, policy, update_every, fused):
    options = {"nan_policy": policy, "fused": fused}
    callback = Guarded(error_on_sync, update_every=update_every, options=options)
    fit(build(), callback, accelerator="gpu", devices=1, precision=precision, log_every_n_steps=50)
    assert callback.guarded == 18


@pytest.mark.gpu
@needs_gpu
@pytest.mark.filterwarnings("ignore:.*Profiler clears events:UserWarning")
def test_the_profiler_sees_no_synchronisation_in_a_step():
    names: set[str] = set()

    @contextmanager
    def profiled() -> Iterator[None]:
        # Stopping the profiler waits for the device by itself, with cudaDeviceSynchronize.
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as run:
            yield
        names.update(event.name for event in run.events())

    fit(build(), Guarded(profiled), accelerator="gpu", devices=1, log_every_n_steps=50)
    assert any(name.startswith("aten::") for name in names)
    waits = {"cudaStreamSynchronize", "cudaEventSynchronize", "aten::_local_scalar_dense", "aten::nonzero"}
    assert not names & waits


@pytest.mark.gpu
@needs_gpu
@pytest.mark.filterwarnings("ignore:GPU available but not used")
def test_a_gpu_adds_what_a_cpu_adds():
    weights = []
    for device in ("cpu", "gpu"):
        model = build()
        options = {"accelerator": device, "devices": 1, "precision": "64-true"}  # else cuDNN would round
        fit(model, Quiet(0.5, start_epoch=9), loader=data(24), **options)
        weights.append(torch.cat([p.detach().cpu().flatten() for p in model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-9, atol=1e-12)
