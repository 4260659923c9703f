"""Points are what a prune by hand gives; files survive a stop; ratios meet a budget."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from lightning_prune import GroupNormPruner
from lightning_prune.commands.configuring import compose_config, pruner_of
from lightning_prune.commands.sensitivity import run as sensitivity_command
from lightning_prune.errors import BudgetError, OptionError
from lightning_prune.measuring.cost import measure_cost
from lightning_prune.models import Classifier
from lightning_prune.reporting.pictures.sensitivity import sensitivity_figure, sensitivity_png
from lightning_prune.sensitivity import Sensitivity, measure_sensitivity, ratios_for
from lightning_prune.sensitivity.ratios import options_of, shares_for

X = torch.randn(2, 3, 6, 6)
IMAGES = torch.randn(16, 3, 6, 6)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 40, 3), nn.Conv2d(40, 30, 3)
        self.fc = nn.Linear(30, 5)

    def forward(self, x):
        return self.fc(self.b(self.a(x).relu()).relu().mean((2, 3)))


def loss(reference):
    """Mean squared distance to what the dense network says."""
    wanted = reference(IMAGES).detach()
    return lambda model: float((model(IMAGES) - wanted).square().mean())


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().requires_grad_(False)


def test_a_point_is_what_a_prune_by_hand_gives(net):
    before = copy.deepcopy(net.state_dict())
    evaluate = loss(net)
    found = measure_sensitivity(net, X, evaluate, ratios=[0.3, 0.6], mode="min")
    assert found.baseline == 0.0
    assert set(found.points) == {"a.weight:0", "b.weight:0"}
    for part, layer in (("a.weight:0", "a"), ("b.weight:0", "b")):
        for ratio in (0.3, 0.6):
            by_hand = copy.deepcopy(net)
            weight = by_hand.get_parameter(f"{layer}.weight")
            GroupNormPruner(by_hand, X, pruning_ratio=0.0, pruning_ratio_dict={layer: ratio}).step()
            assert weight.shape[0] == round((1 - ratio) * len(before[f"{layer}.weight"]))
            assert found.points[part][ratio] == evaluate(by_hand)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


class Attention(nn.Module):
    def __init__(self, width=8, heads=2, head_dim=8):
        super().__init__()
        self.heads, self.head_dim, inner = heads, head_dim, heads * head_dim
        self.embed, self.qkv, self.out = nn.Linear(3, width), nn.Linear(width, 3 * inner), nn.Linear(inner, 2)

    def forward(self, x):
        b, n, _ = x.shape
        qkv = self.qkv(self.embed(x)).view(b, n, 3, self.heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))


def test_what_one_size_binds_is_one_part():
    model = Attention().requires_grad_(False)
    x = torch.randn(2, 4, 3)
    widths = []

    def evaluate(m):
        m(x)
        widths.append((m.embed.out_features, m.heads, m.head_dim))
        return 0.0

    found = measure_sensitivity(model, x, evaluate, ratios=[0.5], prune_num_heads=True)
    assert len(found.points) == 3
    assert widths == [(8, 2, 8), (4, 2, 8), (8, 2, 4), (8, 1, 8)] or sorted(widths) == sorted(
        [(8, 2, 8), (4, 2, 8), (8, 2, 4), (8, 1, 8)]
    )
    table = ratios_for(found, model, x, {"params": 0.5}, prune_num_heads=True)
    assert set(table) == {"pruning_ratio_dict", "head_pruning_ratio_dict"}
    # Heads and head dims are parts of one weight: each has a share of its own.
    shares = shares_for(found, model, x, {"params": 0.5}, prune_num_heads=True)
    assert {p.name: s for p, s in shares.items() if p.heads} == {
        f"{key}:0/head": share for key, share in table["head_pruning_ratio_dict"].items()
    }
    assert options_of(shares) == table


def test_ratios_for_heads_and_their_dims_together_meet_a_budget():
    """Dims that go with their heads must not count as a share of the dims that are left."""
    torch.manual_seed(0)
    model, x = Attention(48, heads=4, head_dim=16).requires_grad_(False), torch.randn(2, 4, 3)
    found = measure_sensitivity(
        model, x, lambda m: float(m(x).mean()), ratios=[0.25, 0.5], prune_num_heads=True
    )
    dense = measure_cost(model, x)
    table = ratios_for(found, model, x, {"macs": 0.5}, prune_num_heads=True)
    assert max(table["head_pruning_ratio_dict"].values()) > 0
    pruner = GroupNormPruner(model, x, pruning_ratio=0.0, prune_num_heads=True, **table)
    pruner.step()
    assert measure_cost(model, x).macs / dense.macs == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("budget", [{"macs": 0.5}, {"params": 0.5}, {"memory": 0.8}], ids=str)
def test_ratios_meet_a_budget_and_spare_what_is_sensitive(net, budget):
    points = {"a.weight:0": {0.5: 0.01, 0.9: 0.02}, "b.weight:0": {0.5: 5.0, 0.9: 9.0}}
    dense = measure_cost(net, X)
    table = ratios_for(Sensitivity("", "min", 0.0, points), net, X, budget)
    ratios = table["pruning_ratio_dict"]
    assert ratios["a.weight"] > ratios["b.weight"]
    pruner = GroupNormPruner(net, X, pruning_ratio=0.0, **table)
    pruner.step()
    cost = measure_cost(net, X)
    if "macs" in budget:
        assert cost.macs / dense.macs == pytest.approx(0.5, abs=0.02)
    if "params" in budget:
        assert cost.parameters / dense.parameters == pytest.approx(0.5, abs=0.02)


def test_a_budget_out_of_reach_is_refused(net):
    points = {"b.weight:0": {0.5: 0.0}}
    with pytest.raises(BudgetError, match="at best"):
        ratios_for(Sensitivity("", "min", 0.0, points), net, X, {"macs": 0.1})
    with pytest.raises(OptionError, match="measure it on this network"):
        ratios_for(Sensitivity("", "min", 0.0, {"other": {0.5: 0.0}}), net, X, {"macs": 0.5})


def test_no_more_goes_than_the_budget_asks(net):
    points = {"a.weight:0": {0.9: 0.0}, "b.weight:0": {0.9: 0.0}}
    table = ratios_for(Sensitivity("", "min", 0.0, points), net, X, {"params": 0.7})
    dense = measure_cost(net, X).parameters
    GroupNormPruner(net, X, pruning_ratio=0.0, **table).step()
    assert measure_cost(net, X).parameters / dense == pytest.approx(0.7, abs=0.02)


def test_curves_never_fall_and_read_between_points():
    found = Sensitivity("", "max", 0.9, {"p": {0.2: 0.95, 0.4: 0.7, 0.6: 0.8, 0.8: float("nan")}})
    assert found.harm("p") == [
        (0.0, 0.0),
        (0.2, 0.0),
        (0.4, pytest.approx(0.2)),
        (0.6, pytest.approx(0.2)),
        (0.8, float("inf")),
    ]
    assert found.ratio_at("p", 0.0) == pytest.approx(0.2)
    assert found.ratio_at("p", 0.1) == pytest.approx(0.3)
    assert found.ratio_at("p", 0.5) == pytest.approx(0.6)


@pytest.mark.parametrize(("is_used", "held"), [(False, 0), (True, 8)])
def test_an_evaluation_draws_from_gpus_for_itself_where_they_are_used(net, monkeypatch, is_used, held):
    """Asked for none by name, PyTorch takes all of them into use, and warns where there are several."""
    asked, given_back = [], []
    monkeypatch.setattr(torch.random, "_fork_rng_warned_already", False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: is_used)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: None)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: asked.append(device) or device)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: given_back.append(device))
    inside = []
    measure_sensitivity(
        net, X, lambda model: inside.append(len(asked) - len(given_back)) or 1.0, ratios=[0.5]
    )
    assert inside == [held] * 3
    assert asked == given_back


def test_a_file_is_gone_on_with_and_nothing_is_measured_twice(net, tmp_path):
    file = tmp_path / "kept" / "s.json"
    evaluate, calls = loss(net), []

    def counted(model):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return evaluate(model)

    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(net, X, counted, ratios=[0.3, 0.6], mode="min", file=file)
    assert sum(map(len, Sensitivity.read(file).points.values())) == 1
    found = measure_sensitivity(net, X, counted, ratios=[0.3, 0.6], mode="min", file=file)
    assert len(calls) == 6  # the baseline and four points, one of them tried twice
    assert found == measure_sensitivity(net, X, evaluate, ratios=[0.3, 0.6], mode="min")
    assert [p.name for p in file.parent.iterdir()] == ["s.json"]


def test_a_file_of_another_network_is_refused(net, tmp_path):
    file = tmp_path / "s.json"
    measure_sensitivity(net, X, loss(net), ratios=[0.5], file=file)
    other = copy.deepcopy(net)
    other.a.weight.data[0] += 1
    with pytest.raises(OptionError, match="other weights"):
        measure_sensitivity(other, X, loss(net), ratios=[0.5], file=file)
    file.write_text("{}")
    with pytest.raises(OptionError, match="was to hold a sensitivity"):
        measure_sensitivity(net, X, loss(net), ratios=[0.5], file=file)


@pytest.mark.parametrize("wrong", [{"ratios": [1.5]}, {"ratios": []}, {"mode": "best"}], ids=str)
def test_wrong_options_are_refused(net, wrong):
    with pytest.raises(OptionError):
        measure_sensitivity(net, X, loss(net), **wrong)


def test_the_picture_has_a_curve_per_part_and_marks_what_was_chosen():
    curves = {f"layer{i}.weight:0": {0.5: 0.8, 0.9: 0.2} for i in range(5)}
    figure = sensitivity_figure(curves, 0.9, metric="val/acc", chosen={"layer1.weight:0": 0.4})
    seen = [axes for axes in figure.axes if axes.get_visible()]
    assert len(seen) == 5
    assert seen[0].lines[1].get_xydata().tolist() == [[0.0, 0.9], [0.5, 0.8], [0.9, 0.2]]
    assert [len(axes.lines) for axes in seen] == [2, 3, 2, 2, 2]
    assert sensitivity_png(curves, 0.9, metric="val/acc").startswith(b"\x89PNG")


COMMAND = "from lightning_prune.commands.entry import main; main()"
SMALL = ["model.net.widths=[8,8,8]", "model.net.depth=1"]


def command(*words, cwd, wait=True):
    words = ["sensitivity", "--as-is", *SMALL, "--ratios", "0.25,0.5", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *words],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if not wait:
        return process
    out, err = process.communicate(timeout=170)
    assert process.returncode == 0, err[-2000:]
    return out


@pytest.mark.multiprocess
def test_a_killed_command_goes_on_where_it_was(tmp_path):
    process = command(cwd=tmp_path, wait=False)
    file = tmp_path / "sensitivity.json"
    deadline = time.monotonic() + 120
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = json.loads(file.read_text())["points"]
    out = command("--budget", "macs=0.6", cwd=tmp_path)
    after = json.loads(file.read_text())["points"]
    assert all(point in after[part] for part, curve in kept.items() for point in curve)
    *_, data, picture, ratios = out.splitlines()
    assert [data, picture, ratios] == ["sensitivity.json", "sensitivity.png", "sensitivity.yaml"]
    table = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.endswith("% ")}
    assert [f"{layer}.weight:0" for layer in table] == list(after)
    written = OmegaConf.load(tmp_path / ratios).options.pruning_ratio_dict
    for layer, (*cells, chosen) in table.items():
        assert cells == [f"{value:.2%}" for _, value in sorted(after[f"{layer}.weight:0"])]
        assert chosen == f"{written[f'{layer}.weight']:.2%}"
    (tmp_path / "pruning").mkdir()
    (tmp_path / "sensitivity.yaml").rename(tmp_path / "pruning" / "sensitivity.yaml")
    cfg = compose_config(["pruning=sensitivity", *SMALL], str(tmp_path))
    pruner = pruner_of(instantiate(cfg.pruning), instantiate(cfg.model))
    dense = measure_cost(pruner.model, pruner.example_inputs).macs
    pruner.step()
    assert measure_cost(pruner.model, pruner.example_inputs).macs / dense == pytest.approx(0.6, abs=0.05)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ratios", "0.2,x"], "'0.2,x' is no list of shares in (0, 1) such as 0.25,0.5"),
        (["--ratios", "0.2,1.5"], "'0.2,1.5' is no list of shares"),
        (["--budget", "macs"], "'macs' is not of the form NAME=SHARE, such as macs=0.5"),
    ],
    ids=str,
)
def test_wrong_words_are_refused_in_words(words, said, capsys):
    with pytest.raises(SystemExit):
        sensitivity_command(["--as-is", *words])
    assert said in capsys.readouterr().err


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"weights": torch.zeros(1000)}, "half.ckpt")
    whole = Path("half.ckpt").read_bytes()
    Path("half.ckpt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OptionError, match="no checkpoint, or only a part of one"):
        sensitivity_command([*SMALL, "ckpt_path=half.ckpt"])


class Blind(Classifier):
    @property
    def example_input_array(self):
        return None

    @example_input_array.setter
    def example_input_array(self, array):
        pass


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "asked of fresh weights, .* ckpt_path=..., or say --as-is"),
        (["--as-is", "pruning=none"], "pruning=none was asked for"),
        (["--as-is", "seed=-1"], "seed=-1 was asked for; a seed is a whole number"),
        (
            ["--as-is", f"model._target_={__name__}.Blind"],
            "the sensitivity of Blind was asked for, but it has no example_input_array",
        ),
        (
            ["--as-is", "--metric", "val/f1"],
            "val/f1 is to be measured, and validation logs .*val/acc.*--metric",
        ),
        (
            ["--as-is", "trainer.limit_val_batches=0"],
            "val/acc is to be measured, and validation logs nothing;",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_refused(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OptionError, match=said):
        sensitivity_command([*SMALL, "trainer.accelerator=cpu", *words])


def test_a_loss_is_measured_into_a_file_of_another_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["--metric", "val/loss", "--mode", "min", "--file", "kept/loss.json", "--ratios", "0.5"]
    sensitivity_command(["--as-is", *SMALL, "trainer.accelerator=cpu", "trainer.limit_val_batches=1", *words])
    assert capsys.readouterr().out.splitlines()[-2:] == ["kept/loss.json", "kept/loss.png"]
    found = Sensitivity.read(tmp_path / "kept" / "loss.json")
    assert found.mode == "min"
    assert found.baseline > 1  # no accuracy
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["loss.json", "loss.png"]


def test_a_wrong_budget_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OptionError, match="one of macs, params"):
        sensitivity_command(["--as-is", *SMALL, "--budget", "mac=0.5"])
    assert list(tmp_path.iterdir()) == []
