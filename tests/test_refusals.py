"""What holds numbers in shapes that a cut ends, or has no shape to cut, is refused by name at the start."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from test_callback import Quiet, build, fit, pytestmark  # noqa: F401
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.distributed.tensor import DeviceMesh, distribute_tensor

from lightning_prune.errors import StrategyError
from lightning_prune.training.strategies import check_set_up


def trainer(**options):
    strategy = DDPStrategy(**options)
    return Trainer(strategy=strategy, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (
            {"ddp_comm_hook": powerSGD_hook, "ddp_comm_state": PowerSGDState(None)},
            "ddp_comm_state=PowerSGDState",
        ),
        ({"model_averaging_period": 4}, "model_averaging_period=4"),
    ],
    ids=["PowerSGD", "local SGD"],
)
def test_communication_that_keeps_state_is_refused(options, found):
    with pytest.raises(StrategyError, match=f"found {found}, which holds numbers in the shapes"):
        check_set_up(trainer(**options), build())


def test_communication_without_state_is_not():
    check_set_up(trainer(ddp_comm_hook=default_hooks.fp16_compress_hook), build())


def test_lazy_parameters_that_configure_model_makes_are_refused(recwarn):
    model = build()
    model.configure_model = lambda: setattr(model.net, "fc", nn.LazyLinear(2))
    with pytest.raises(StrategyError, match=r"'net\.fc\.weight' has no shape yet"):
        fit(model, Quiet(0.5))


def test_a_network_sharded_before_the_fit_is_refused(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = build()
        sharded = distribute_tensor(model.net.fc.weight.detach(), DeviceMesh("cpu", [0]))
        model.net.fc.weight = nn.Parameter(sharded)
        with pytest.raises(StrategyError, match=r"'net\.fc\.weight' is a DTensor: it is sharded already"):
            check_set_up(Trainer(accelerator="cpu", logger=False, enable_checkpointing=False), model)
    finally:
        torch.distributed.destroy_process_group()
