"""Networks without the memory of their weights: planned like the same network with weights, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import draw, randomise
from torch import Tensor, nn

from lightning_prune import GroupNormPruner, TraceError, floats_on_meta
from lightning_prune.tracing.meta import run_without_floats


def alike(group: Any) -> Tensor:
    """Scores that do not depend on weights."""
    return torch.zeros(group.n_units)


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build().eval()


def without_floats(build: Callable[[], nn.Module]) -> nn.Module:
    with floats_on_meta():
        return build().eval()


BUILDS = {"torch.device": on_meta, "floats_on_meta": without_floats}


def ids(device: str = "cpu") -> dict[str, Tensor]:
    return {"input_ids": torch.tensor([[1, 5, 3], [7, 6, 4]], device=device)}


def assert_same_plan(real: nn.Module, empty: nn.Module, inputs: Any, others: Any, **options: Any) -> None:
    """Groups, counts, kept indices, attributes and both costs."""
    want = GroupNormPruner(real, inputs, importance=alike, **options)
    got = GroupNormPruner(empty, others, importance=alike, **options)
    assert [(g.name, g.n_units) for g in got.groups()] == [(g.name, g.n_units) for g in want.groups()]
    assert got.groups()
    assert list(got.foresee()) == list(want.foresee())
    assert got.step(dry_run=True) == want.step(dry_run=True)
    assert all(p.is_meta for p in empty.parameters())


# -- a small Llama -----------------------------------------------------------------------------------


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=11, max_position_embeddings=16, pad_token_id=0,
    )  # fmt: skip
    model: nn.Module = transformers.LlamaForCausalLM(config).eval()
    return model


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize(
    "options",
    [{}, {"pruning_ratio": 0.25, "prune_num_heads": True, "head_pruning_ratio": 0.5}],
    ids=["dims", "heads"],
)
def test_a_llama_without_weights_is_planned_alike(build: str, device: str, options: dict[str, Any]) -> None:
    empty = BUILDS[build](llama)
    assert_same_plan(randomise(llama(), 0), empty, ids(), ids(device), **options)


@pytest.mark.parametrize("build", BUILDS)
def test_a_mask_with_values_is_asked_for_them(build: str) -> None:
    """The library leaves a mask out if all of it is one: it asks ``mask.all()``."""
    inputs = {**ids(), "attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]])}
    assert_same_plan(randomise(llama(), 0), BUILDS[build](llama), inputs, inputs)


def test_its_plan_fits_the_model_with_weights() -> None:
    plan = GroupNormPruner(without_floats(llama), ids()).step(dry_run=True)
    model = randomise(llama(), 0)
    pruner = GroupNormPruner(model, ids())
    foreseen = list(pruner.foresee())[1]
    pruner.commit(plan)
    assert sum(p.numel() for p in model.parameters()) == foreseen.parameters


# -- one module per way in which values are asked for --------------------------------------------------


class Windows(nn.Module):
    """A table of biases looked up by an integer buffer, as in Swin; a boolean buffer that Python reads."""

    places: Tensor
    on: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(5, 8), nn.Linear(8, 3)
        self.table = nn.Parameter(torch.zeros(6, 8))
        self.register_buffer("places", torch.arange(4) % 3)
        self.register_buffer("on", torch.ones(1, dtype=torch.bool))
        self.rates = [r.item() for r in torch.linspace(0, 0.3, 4)]

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x) + self.table[self.places]
        if self.on.all():
            x = x * torch.tensor(self.rates)[:, None]
        kept = x[x.new_ones(4, dtype=torch.bool)]
        return self.leave(kept.masked_fill(torch.arange(4)[:, None] > 2, 0.0))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.norm, self.leave = nn.LSTM(5, 8, batch_first=True), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        y, _ = self.lstm(x)
        out: Tensor = self.leave(self.norm(y[torch.arange(len(x)), lengths - 1]))
        return out


@pytest.mark.parametrize(
    ("build", "inputs"),
    [(Windows, (draw(4, 5),)), (Recurrent, (draw(4, 6, 5), torch.tensor([6, 2, 3, 1])))],
    ids=["looked up by a buffer", "recurrent"],
)
def test_integers_have_values_where_floats_have_none(build: Any, inputs: tuple[Tensor, ...]) -> None:
    assert_same_plan(randomise(build(), 0), without_floats(build), inputs, inputs)


def test_a_value_that_is_not_there_is_refused_with_advice() -> None:
    with torch.device("meta"):
        layer = nn.Linear(5, 3)

    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(x)
            return out if out.sum() > 0 else -out

    with pytest.raises(TraceError, match=r"(?s)failed in .*lightning_prune\.floats_on_meta\(\)"):
        GroupNormPruner(Asks(), draw(2, 5))


def test_an_integer_buffer_without_values_is_refused_with_advice() -> None:
    class Counts(nn.Module):
        n: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3)
            self.register_buffer("n", torch.ones((), dtype=torch.long))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(x) * int(self.n)
            return out

    with pytest.raises(TraceError, match=r"makes its integer buffers real"):
        GroupNormPruner(on_meta(Counts), draw(2, 5))
    assert GroupNormPruner(without_floats(Counts), draw(2, 5)).groups() == ()


def test_writing_what_has_no_value_into_what_has_is_refused() -> None:
    with pytest.raises(TraceError, match="copy_ was to write numbers without values"):
        run_without_floats(
            torch.ops.aten.copy_.default,
            (torch.zeros(2, dtype=torch.long), torch.empty(2, device="meta")),
            {},
        )


def test_single_numbers_and_integers_stay_real() -> None:
    run = run_without_floats
    cpu, aten = torch.device("cpu"), torch.ops.aten
    assert run(aten.arange.default, (3,), {"device": torch.device("meta")}).tolist() == [0, 1, 2]
    assert run(aten.ones_like.default, (torch.empty(2, device="meta"),), {"dtype": torch.bool}).tolist() == [
        True,
        True,
    ]
    assert run(aten._to_copy.default, (torch.tensor([1, 2]),), {"device": torch.device("meta")}).device == cpu
    assert run(aten._to_copy.default, (torch.tensor([1, 2]),), {"dtype": torch.float32}).is_meta
    assert run(aten.mul.Tensor, (torch.tensor(2.0), torch.tensor(3.0)), {}).item() == 6.0
    assert run(aten.add.Tensor, (torch.empty(2, device="meta"), torch.tensor([1, 2])), {}).is_meta
