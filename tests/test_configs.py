"""Configs that models were built from: true after a cut, or left alone, and never another model's."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nets import draw, randomise
from torch import Tensor, nn

from lightning_prune import GroupNormPruner, Plan, apply
from lightning_prune.graph.configs import config_rewrites, owners
from lightning_prune.plan import Cut, Rewrite

X = draw(4, 5)


def prune(model: nn.Module, inputs: Any, **options: Any) -> Plan:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return GroupNormPruner(model, inputs, **options).step()


@dataclass
class Sizes:
    """Hidden widths of a ``Stack``; ``depth`` is no width."""

    width: int = 8
    inner: int = 12
    depth: int = 2
    name: str = "stack"


class Part(nn.Module):
    """width -> inner -> width."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.inner = config.inner
        self.up, self.down = nn.Linear(config.width, config.inner), nn.Linear(config.inner, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Stack(nn.Module):
    """5 -> width -> parts -> 3, built from a config alone."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.enter = nn.Linear(5, config.width)
        self.parts = nn.ModuleList(Part(config) for _ in range(config.depth))
        self.leave = nn.Linear(config.width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for part in self.parts:
            x = part(x)
        out: Tensor = self.leave(x)
        return out


def stack(config: Any = None) -> Stack:
    return randomise(Stack(config or Sizes()), 0)


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {n: tuple(p.shape) for n, p in model.named_parameters()}


def narrower(model: nn.Module, by: dict[str, int]) -> tuple[Cut, ...]:
    """Cuts of ``{"tensor:dim": kept}``, the first indices kept."""
    parameters = dict(model.named_parameters())
    cuts = []
    for at, kept in by.items():
        tensor, dim = at.split(":")
        cuts.append(Cut(tensor, int(dim), parameters[tensor].shape[int(dim)], tuple(range(kept))))
    return tuple(cuts)


# -- a config of one's own ------------------------------------------------------


def test_a_config_is_true_after_a_cut() -> None:
    model = stack()
    prune(model, X)
    assert model.config == Sizes(width=4, inner=6, depth=2, name="stack")
    assert shapes(Stack(model.config)) == shapes(model)


def test_what_was_copied_from_the_config_follows_it() -> None:
    model = stack()
    prune(model, X)
    assert [part.inner for part in model.parts] == [6, 6]


def test_the_original_config_object_is_not_touched() -> None:
    config = Sizes()
    model = stack(config)
    prune(model, X)
    assert config == Sizes()
    assert model.config is not config


def test_modules_of_one_model_go_on_sharing_their_config() -> None:
    model = stack()
    prune(model, X)
    assert all(part.config is model.config for part in model.parts)


def test_a_second_model_of_the_same_config_does_not_notice() -> None:
    config = Sizes()
    first, second = stack(config), stack(config)
    want = second(X)
    prune(first, X)
    assert second.config is config
    assert second.parts[0].config is config
    assert torch.equal(second(X), want)
    prune(second, X, pruning_ratio=0.25)
    assert (first.config.width, second.config.width, config.width) == (4, 6, 8)


def test_a_config_follows_a_second_cut() -> None:
    model = stack()
    pruner = GroupNormPruner(model, X, iterative_steps=2)
    found = [pruner.step() and (model.config.width, model.config.inner) for _ in range(2)]
    assert found == [(6, 9), (4, 6)]
    fresh = stack()
    apply(fresh, pruner.plan)
    assert fresh.config == model.config


def test_an_integer_of_parts_of_unequal_width_stays_and_the_others_follow() -> None:
    """One ``inner`` cannot say 6 and 12."""
    model = stack()
    config = model.config
    pruner = GroupNormPruner(model, X, ignored_layers=[model.parts[1].up])
    pruner.step()
    assert model.parts[0].up.out_features == 6
    assert model.parts[1].up.out_features == 12
    assert config == Sizes()
    assert model.config == Sizes(width=model.enter.out_features)
    assert "it says [12, " in pruner.notes[-1]


def test_two_of_three_decide() -> None:
    model = stack(Sizes(depth=3))
    kept = {"up.weight:0": 7, "up.bias:0": 7, "down.weight:1": 7}
    cuts = narrower(model, {f"parts.{i}.{at}": n for i in (0, 1) for at, n in kept.items()})
    found, [note] = config_rewrites(model, cuts, (), frozenset())
    assert Rewrite("", "config.inner", 12, 7) in found
    assert "it says [7, 8] for parts.2.up.weight, [12, 8] is kept" in note


def test_a_config_that_refuses_the_new_sizes_is_left() -> None:
    """What its own check does not let pass could not be saved."""

    @dataclass
    class Even(Sizes):
        def validate(self) -> None:
            if self.inner % 4:
                raise ValueError("inner is no multiple of four")

    model = stack(Even())
    pruner = GroupNormPruner(model, X)
    pruner.step()
    assert model.parts[0].up.out_features == 6
    assert model.config == Even()
    assert "config is left as it was" in pruner.notes[-1]
    model = stack(Even(inner=16))
    prune(model, X)
    assert model.config == Even(width=4, inner=8)


@dataclass
class Lists:
    """Widths in a list, and a config inside the config."""

    widths: Any
    part_config: Any


def test_lists_and_configs_inside_a_config_follow() -> None:
    class Tower(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.config = config
            self.enter = nn.Linear(5, config.part_config.width)
            self.part = Part(config.part_config)
            self.gain = nn.Parameter(torch.ones(1, config.part_config.width) * 0.5)
            self.mid = nn.Linear(config.part_config.width, config.widths[0])
            self.last = nn.Linear(config.widths[0], config.widths[1])

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(torch.relu(self.mid(self.part(self.enter(x)) * self.gain)))
            return out

    inner = Sizes(width=8, inner=12)
    config = Lists([6, 3], inner)
    model = randomise(Tower(config), 0)
    pruner = GroupNormPruner(model, X)
    pruner.step()
    assert model.config == Lists([3, 3], Sizes(width=4, inner=6))
    assert model.part.config is model.config.part_config
    assert (config, inner) == (Lists([6, 3], inner), Sizes(width=8, inner=12))
    assert shapes(Tower(model.config)) == shapes(model)
    assert pruner.notes == ()


def test_the_integers_of_a_parameter_that_no_layer_owns_follow() -> None:
    """Nothing but the size of the bare weight says what ``inner`` is."""

    class Bare(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.config = config
            self.up = nn.Parameter(torch.empty(2 * config.inner, 5))
            self.down = nn.Parameter(torch.empty(3, config.inner))

        def forward(self, x: Tensor) -> Tensor:
            a, b = torch.nn.functional.linear(x, self.up).chunk(2, dim=-1)
            return torch.nn.functional.linear(a * b, self.down)

    model = randomise(Bare(Sizes()), 0)
    prune(model, X)
    assert tuple(model.up.shape) == (12, 5)
    assert model.config == Sizes(inner=6)


def test_a_config_whose_model_takes_more_than_a_config_is_left() -> None:
    class Wider(Stack):
        def __init__(self, config: Any, extra: int) -> None:
            super().__init__(config)
            self.extra = extra

    model = randomise(Wider(Sizes(), 3), 0)
    prune(model, X)
    assert model.enter.out_features == 4
    assert model.config == Sizes()


# -- by hand ---------------------------------------------------------------------


def test_rewrites_of_a_cut_made_by_hand() -> None:
    model = stack(Sizes(depth=1))
    cuts = narrower(model, {"parts.0.up.weight:0": 7, "parts.0.up.bias:0": 7, "parts.0.down.weight:1": 7})
    out = Rewrite("parts.0.up", "out_features", 12, 7)
    found, notes = config_rewrites(model, cuts, (out,), frozenset())
    assert Rewrite("", "config.inner", 12, 7) in found
    assert Rewrite("parts.0", "inner", 12, 7) in found
    assert not [r for r in found if r.path in ("config.width", "config.depth")]
    assert notes == ()


def test_what_the_forward_uses_is_decided_elsewhere() -> None:
    model = stack(Sizes(depth=1))
    cuts = narrower(model, {"parts.0.up.weight:0": 7, "parts.0.up.bias:0": 7, "parts.0.down.weight:1": 7})
    out = Rewrite("parts.0.up", "out_features", 12, 7)
    found, _ = config_rewrites(model, cuts, (out,), frozenset({("parts.0", "inner")}))
    assert ("parts.0", "inner") not in {(r.module, r.path) for r in found}


def test_a_config_that_cannot_be_true_is_noted() -> None:
    model = stack(Sizes(depth=2))
    cuts = narrower(model, {"parts.0.up.weight:0": 7, "parts.0.up.bias:0": 7, "parts.0.down.weight:1": 7})
    found, [note] = config_rewrites(model, cuts, (Rewrite("parts.0.up", "out_features", 12, 7),), frozenset())
    assert found == ()
    assert "config cannot tell all sizes that are kept, it says [12, 8] for parts.0.up.weight, [7, 8]" in note


def test_a_module_that_computes_in_another_way_is_noted() -> None:
    model = stack(Sizes(depth=1))
    cuts = narrower(model, {"parts.0.up.weight:0": 7, "parts.0.up.bias:0": 7, "parts.0.down.weight:1": 7})
    _, [note] = config_rewrites(model, cuts, (), frozenset(), frozenset({"parts.0"}))
    assert "not the scales" in note


def test_a_number_that_followed_a_size_is_noted() -> None:
    """The cut model keeps dividing by the root of 8; one built from its config would take that of 4."""

    class Scaled(Stack):
        def forward(self, x: Tensor) -> Tensor:
            x = self.enter(x)
            out: Tensor = self.leave(x * x.shape[-1] ** -0.5)
            return out

    model = randomise(Scaled(Sizes(depth=0)), 0)
    pruner = GroupNormPruner(model, X)
    plan = pruner.step()
    assert plan.patches
    assert model.config == Sizes(width=4, depth=0)
    assert sum("not the scales" in note for note in pruner.notes) == 1


def test_nothing_is_said_of_a_config_that_no_cut_concerns() -> None:
    assert config_rewrites(stack(), (), (), frozenset()) == ((), ())


def test_owners_are_the_outermost_and_hold_objects() -> None:
    inner, outer = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    shared = SimpleNamespace(width=2)
    outer.config, outer[0].config = shared, shared
    outer[1].config = {"width": 2}
    outer[2].config = SimpleNamespace(width=3)
    assert [(name, config) for name, _, config in owners(outer)] == [("", shared), ("2", outer[2].config)]
    inner.config = None
    assert list(owners(inner)) == []


# -- Hugging Face ------------------------------------------------------------------


def ids() -> dict[str, Tensor]:
    return {"input_ids": torch.tensor([[1, 5, 3], [7, 2, 2]])}


@pytest.fixture
def transformers() -> Any:
    return pytest.importorskip("transformers")


def llama(transformers: Any, config: Any = None) -> Any:
    config = config or transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=11, max_position_embeddings=16, pad_token_id=0,
    )  # fmt: skip
    return randomise(transformers.LlamaForCausalLM(config), 0)


def test_the_config_of_a_llama_is_true(transformers: Any) -> None:
    model = llama(transformers)
    prune(model, ids())
    config = model.config
    assert (config.hidden_size, config.intermediate_size, config.head_dim) == (8, 12, 2)
    assert (config.num_attention_heads, config.num_key_value_heads, config.num_hidden_layers) == (4, 2, 2)
    assert shapes(transformers.LlamaForCausalLM(config)) == shapes(model)


@pytest.mark.parametrize(
    "head_dims",
    [
        False,
        pytest.param(
            True,
            marks=pytest.mark.xfail(
                strict=True, reason="no config says which rotary frequencies and what scale were kept"
            ),
        ),
    ],
    ids=["whole heads", "head dimensions cut"],
)
def test_a_llama_can_be_built_again_from_its_config(transformers: Any, head_dims: bool) -> None:
    model = llama(transformers)
    prune(model, ids(), prune_head_dims=head_dims)
    config = model.config
    again = transformers.LlamaForCausalLM(config).eval()
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(again(**ids()).logits, model(**ids()).logits)


def test_the_config_that_a_llama_was_made_from_is_not_touched(transformers: Any) -> None:
    first = llama(transformers)
    config = first.config
    before = copy.deepcopy(config.to_dict())
    second = llama(transformers, config)
    want = second(**ids()).logits
    prune(first, ids())
    assert config.to_dict() == before
    assert second.config is config
    assert first.config is not config
    assert first.model.config is first.config
    assert torch.equal(second(**ids()).logits, want)


def test_a_llama_whose_heads_go_says_so(transformers: Any) -> None:
    model = llama(transformers)
    prune(model, ids(), pruning_ratio=0.0, prune_num_heads=True, head_pruning_ratio=0.5)
    config = model.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 1, 4)
    assert shapes(transformers.LlamaForCausalLM(config)) == shapes(model)


def test_the_layers_of_a_llama_know_their_width(transformers: Any) -> None:
    """The backbone alone: its width is an output and stays."""
    model = llama(transformers).model
    prune(model, ids())
    assert model.embed_tokens.embedding_dim == 16
    assert model.config.hidden_size == 16
    assert [layer.hidden_size for layer in model.layers] == [16, 16]


def test_the_config_of_a_bert_cannot_tell_the_size_of_its_heads(transformers: Any) -> None:
    """It has no head size of its own: with 4 heads of 2 in a width of 16, only the other sizes are told."""
    config = transformers.BertConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4, vocab_size=11,
        max_position_embeddings=16,
    )  # fmt: skip
    model = randomise(transformers.BertModel(config, add_pooling_layer=False), 0)
    plan = prune(model, ids())
    assert model.encoder.layer[0].attention.self.query.out_features == 8
    told = [(r.path, r.before, r.after) for r in plan.rewrites if r.path.startswith("config.")]
    assert told == [("config.intermediate_size", 24, 12)]
