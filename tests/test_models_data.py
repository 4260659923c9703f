"""The demo's data and networks: splits, shapes, ranges, and checkpoints that load without pickled objects."""

from __future__ import annotations

import importlib.util
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from sklearn.datasets import load_digits
from torch import nn

from lightning_prune.data import Digits
from lightning_prune.errors import OptionError, PruneError
from lightning_prune.models import Classifier, ResNet, ViT

pytestmark = [  # Lightning 2.6 on torch 2.13, and advice that a test does not need
    pytest.mark.filterwarnings(f"ignore:{text}") for text in (".*LeafSpec", ".*does not have many workers")
]
ALL = torch.as_tensor(load_digits().images)


def _parts(**sizes: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    data = Digits(**sizes)
    data.setup("fit")
    return {name: (part.images, part.labels) for name, part in data.parts.items()}


def _keys(images: torch.Tensor) -> list[tuple[int, ...]]:
    """Give each image as its original grey levels, which are whole numbers from 0 to 16."""
    return [tuple(image.flatten().mul(6.02).add(4.88).round().int().tolist()) for image in images]


def test_the_three_parts_hold_every_image_once() -> None:
    parts = _parts()
    assert {name: len(labels) for name, (_, labels) in parts.items()} == {
        "train": 1000,
        "val": 200,
        "test": 597,
    }
    found = Counter(key for images, _ in parts.values() for key in _keys(images))
    assert found == Counter(tuple(image.flatten().int().tolist()) for image in ALL)


def test_images_keep_their_labels() -> None:
    label_of = {
        tuple(image.flatten().int().tolist()): label
        for image, label in zip(ALL, load_digits().target, strict=True)
    }
    for images, labels in _parts().values():
        assert [label_of[key] for key in _keys(images)] == labels.tolist()


def test_every_part_has_each_class_in_its_share() -> None:
    share = torch.bincount(torch.as_tensor(load_digits().target)) / 1797
    for images, labels in _parts().values():
        assert torch.all((torch.bincount(labels, minlength=10) - share * len(images)).abs() <= 1.0)


def test_the_split_hangs_on_its_own_seed_alone() -> None:
    torch.manual_seed(1)
    first = _parts()
    torch.manual_seed(2)
    assert all(torch.equal(_parts()[name][0], first[name][0]) for name in first)
    assert not torch.equal(_parts(split_seed=1)["test"][0], first["test"][0])


def test_training_batches_are_shuffled_by_the_global_seed_and_cover_the_part() -> None:
    data = Digits(batch_size=300)
    data.setup("fit")
    torch.manual_seed(0)
    one = [labels for _, labels in data.train_dataloader()]
    torch.manual_seed(0)
    again = [labels for _, labels in data.train_dataloader()]
    other = [labels for _, labels in data.train_dataloader()]
    assert [len(labels) for labels in one] == [300, 300, 300, 100]
    assert all(map(torch.equal, one, again))
    assert not all(map(torch.equal, one, other))
    assert Counter(torch.cat(one).tolist()) == Counter(data.parts["train"].labels.tolist())


@pytest.mark.parametrize(
    ("sizes", "match"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"val_size": 5}, "val_size=5"),
        ({"test_size": 1700}, "there are 1797 images"),
    ],
    ids=["batch", "val", "nothing left"],
)
def test_sizes_out_of_range_are_refused(sizes: dict[str, int], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        Digits(**sizes)


def test_a_missing_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "lightning_prune.data.digits.find_spec", lambda name: None if name == "sklearn" else real(name)
    )
    with pytest.raises(PruneError, match=r"lightning-prune\[demo\]"):
        Digits()


@pytest.mark.parametrize("net", [ResNet(widths=(4, 6), depth=2), ViT(dim=8, depth=1, num_heads=2, mlp_dim=8)])
def test_networks_map_images_to_one_logit_per_class(net: nn.Module) -> None:
    assert net(torch.randn(5, 1, 8, 8)).shape == (5, 10)


def test_the_residual_network_has_the_expected_parameters() -> None:
    net = ResNet(in_channels=1, num_classes=10, widths=(4, 6), depth=1)
    first = (4 * 4 * 9 + 8) * 2  # two 3x3 convolutions without bias, two norms
    second = 4 * 6 * 9 + 12 + 6 * 6 * 9 + 12 + 4 * 6 + 12  # and a 1x1 shortcut with its norm
    assert sum(p.numel() for p in net.parameters()) == 4 * 9 + 8 + first + second + 6 * 10 + 10


def test_the_transformer_attends_as_the_formula_says() -> None:
    attention = ViT(dim=6, depth=1, num_heads=2, mlp_dim=8).blocks[0].attn.double()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    q, k, v = attention.qkv(x).split(6, dim=-1)
    heads = []
    for h in (slice(0, 3), slice(3, 6)):
        scores = q[..., h] @ k[..., h].mT / math.sqrt(3)
        heads.append(scores.softmax(-1) @ v[..., h])
    expected = torch.cat(heads, -1) @ attention.proj.weight.T + attention.proj.bias
    torch.testing.assert_close(attention(x), expected)


def test_position_matters_to_the_transformer() -> None:
    net = ViT(dim=8, depth=1, num_heads=2, mlp_dim=8).eval()
    image = torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        net.position.normal_()
    assert not torch.allclose(net(image), net(image.roll(2, dims=-1)), atol=1e-4)


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: ResNet(widths=()), "one width per stage"),
        (lambda: ResNet(depth=0), "depth=0"),
        (lambda: ViT(patch_size=3), "must divide image_size=8"),
        (lambda: ViT(num_heads=5), "num_heads must divide dim"),
        (lambda: Classifier(nn.Flatten(), lr=0.0), "lr=0.0 .* > 0"),
        (lambda: Classifier(nn.Flatten(), weight_decay=-1.0), "weight_decay=-1.0"),
        (lambda: Classifier(nn.Flatten(), scheduler="step"), "cosine or constant"),
        (lambda: Classifier(nn.Flatten(), warmup=1.0), "warmup=1.0"),
        (lambda: Classifier(nn.Flatten(), label_smoothing=1.0), "label_smoothing=1.0"),
    ],
)
def test_values_out_of_range_are_refused(build: object, match: str) -> None:
    with pytest.raises(OptionError, match=match):
        build()


def _fit(tmp_path: Path, model: Classifier, epochs: int) -> Trainer:
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        default_root_dir=tmp_path,
    )
    trainer.fit(model, datamodule=Digits(batch_size=100))
    return trainer


def test_a_fit_learns_logs_and_loads_back_without_pickled_objects(tmp_path: Path) -> None:
    model = Classifier(ResNet(widths=(8, 16), depth=1), lr=0.01, warmup=0.2)
    trainer = _fit(tmp_path, model, epochs=2)
    assert {"train/loss", "train/acc", "val/loss", "val/acc"} <= set(trainer.callback_metrics)
    assert trainer.callback_metrics["val/acc"] > 0.6
    trainer.save_checkpoint(tmp_path / "net.ckpt")
    checkpoint = torch.load(tmp_path / "net.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["lr"] == 0.01
    assert "net" not in checkpoint["hyper_parameters"]
    back = Classifier.load_from_checkpoint(tmp_path / "net.ckpt", net=ResNet(widths=(8, 16), depth=1))
    images = torch.randn(3, 1, 8, 8)
    assert torch.equal(back.eval()(images), model.eval()(images))


def test_test_accuracy_is_the_share_of_right_answers(tmp_path: Path) -> None:
    model = Classifier(ResNet(widths=(4,), depth=1))
    data = Digits(batch_size=128)  # 597 is no multiple of it
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    (logged,) = trainer.test(model, datamodule=data, verbose=False)
    part = data.parts["test"]
    with torch.no_grad():
        right = (model.eval()(part.images).argmax(-1) == part.labels).double().mean()
    assert logged["test/acc"] == pytest.approx(right.item(), abs=1e-6)


@pytest.mark.parametrize("scheduler", ["cosine", "constant"])
def test_the_learning_rate_follows_its_schedule(tmp_path: Path, scheduler: str) -> None:
    model = Classifier(ResNet(widths=(4,), depth=1), lr=0.01, scheduler=scheduler, warmup=0.2)
    seen: list[float] = []
    model.on_train_batch_start = lambda *_: seen.append(model.optimizers().param_groups[0]["lr"])
    _fit(tmp_path, model, epochs=1)  # 10 steps
    rising = [0.005, 0.01]
    falling = [0.005 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    assert seen == pytest.approx(rising + falling if scheduler == "cosine" else [0.01] * 10)
