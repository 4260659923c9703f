"""Recipes of conf/experiment on the networks that they name: random weights, nothing of the model changed."""

from __future__ import annotations

import sys

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

import lightning_prune.commands  # noqa: F401  registers the resolver of the schedules
from lightning_prune import GroupNormPruner
from lightning_prune.commands.configuring import pruner_of
from lightning_prune.errors import OptionError
from lightning_prune.measuring.cost import measure_cost
from lightning_prune.models import timm_model

IMAGE = torch.zeros(1, 3, 224, 224)
# experiment: dense GMACs and million parameters, then what is left; the first as published with the paper.
RECIPES = {
    "isomorphic_deit": ((17.69, 87.34), (4.16, 20.7)),
    "isomorphic_convnext": ((8.68, 50.22), (4.21, 25.4)),
}


@pytest.mark.slow
@pytest.mark.zoo
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_reaches_its_size(name):
    dense, left = RECIPES[name]
    with initialize_config_module("lightning_prune.conf", version_base="1.3"):
        # The weights are random, so that gradients would say no more than the weights do.
        overrides = [
            f"experiment={name}",
            "data=digits",
            "run_dir=.",
            "pruning.options.importance=group_norm",
        ]
        cfg = compose("prune", overrides=overrides)
    torch.manual_seed(0)
    model, callback = instantiate(cfg.model), instantiate(cfg.pruning)
    model.example_input_array = IMAGE
    for macs, parameters in (dense, left):
        cost = measure_cost(model.net, IMAGE)
        assert cost.macs / 1e9 == pytest.approx(macs, rel=0.02)
        assert cost.parameters / 1e6 == pytest.approx(parameters, rel=0.02)
        if macs == dense[0]:
            pruner = pruner_of(callback, model)
            assert isinstance(pruner, GroupNormPruner)
            pruner.step()


def test_a_missing_timm_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(OptionError, match=r"lightning-prune\[timm\]"):
        timm_model("deit_tiny_patch16_224")


@pytest.mark.zoo
def test_an_unknown_network_is_named():
    with pytest.raises(OptionError, match="knows no network 'deit_huge'; it knows deit"):
        timm_model("deit_huge")


def test_a_plan_before_any_training_says_what_it_ranks_by(capsys):
    from lightning_prune.commands import plan

    plan.run(["pruning.options.importance=taylor", "model.net.widths=[8,8,8]", "model.net.depth=1"])
    said = capsys.readouterr()
    assert said.err.startswith("importance=taylor needs training; this plan ranks by group_norm")
    assert "MACs" in said.out
