"""Pruned Hugging Face models on disk: saved by themselves, loaded bit for bit, or refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nets import randomise
from torch import Tensor, nn

from lightning_prune import CheckpointMismatchError, GroupNormPruner, from_pretrained, load_pruned_state
from lightning_prune.checkpoint import record
from lightning_prune.plan import Cut, Plan, Rewrite
from lightning_prune.surgery.manifests import KEY, pack, tell_configs, unpack
from lightning_prune.surgery.structure import note

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def transformers() -> Any:
    library = pytest.importorskip("transformers")
    library.logging.disable_progress_bar()
    library.logging.set_verbosity_error()
    return library


def ids() -> dict[str, Tensor]:
    return {"input_ids": torch.tensor([[1, 5, 3], [7, 6, 4]])}


def llama(transformers: Any, **sizes: Any) -> Any:
    config = transformers.LlamaConfig(**{
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 11, "max_position_embeddings": 16, "pad_token_id": 0, **sizes,
    })  # fmt: skip
    return randomise(transformers.LlamaForCausalLM(config), 0)


def prune(model: Any, **options: Any) -> GroupNormPruner:
    pruner = GroupNormPruner(model, ids(), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner.step()
    return pruner


@torch.no_grad()
def logits(model: Any) -> Tensor:
    out: Tensor = model(**ids()).logits
    return out


def assert_same(model: Any, loaded: Any) -> None:
    """Same outputs, tensors (those that no file holds too) and config."""
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded), logits(model))
    mine, other = dict(model.named_buffers()), dict(loaded.named_buffers())
    assert mine.keys() == other.keys()
    assert all(torch.equal(other[name], buffer) for name, buffer in mine.items())
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()


# -- there and back --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "save"),
    [
        ({}, {}),
        ({"pruning_ratio": 0.0, "prune_num_heads": True, "head_pruning_ratio": 0.5}, {}),
        ({}, {"max_shard_size": "4KB"}),
    ],
    ids=["head dims", "heads", "several files"],
)
def test_a_llama_comes_back_bit_for_bit(
    transformers: Any, tmp_path: Path, options: dict[str, Any], save: dict[str, Any]
) -> None:
    model = llama(transformers)
    prune(model, **options)
    model.save_pretrained(tmp_path, **save)
    assert (tmp_path / WEIGHTS).exists() != bool(save)
    loaded = from_pretrained(transformers.LlamaForCausalLM, tmp_path)
    assert_same(model, loaded)
    asked = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(loaded.generate(**ids(), **asked), model.generate(**ids(), **asked))


def test_rotary_frequencies_are_those_that_were_kept(transformers: Any, tmp_path: Path) -> None:
    model = llama(transformers, hidden_size=32, num_attention_heads=2, num_key_value_heads=1)
    dense = model.model.rotary_emb.inv_freq.clone()
    pruner = prune(model)
    kept = next(c.keep for c in pruner.plan.cuts if c.tensor == "model.rotary_emb.inv_freq")
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(transformers.LlamaForCausalLM, tmp_path)
    assert torch.equal(loaded.model.rotary_emb.inv_freq, dense[list(kept)])
    assert loaded.model.layers[0].self_attn.scaling == 16**-0.5
    assert loaded.config.head_dim == 8


def test_tied_weights_are_tied(transformers: Any, tmp_path: Path) -> None:
    model = llama(transformers, tie_word_embeddings=True)
    prune(model)
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(transformers.LlamaForCausalLM, tmp_path)
    assert_same(model, loaded)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_replaced_computation_is_replaced_again(transformers: Any, tmp_path: Path) -> None:
    """Falcon takes the scale of its attention from the size of a head, which is half of what it was."""
    config = transformers.FalconConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=11, num_kv_heads=1,
        new_decoder_architecture=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = randomise(transformers.FalconForCausalLM(config), 0)
    pruner = prune(model)
    assert pruner.plan.patches
    model.save_pretrained(tmp_path)
    assert_same(model, from_pretrained(transformers.FalconForCausalLM, tmp_path))


def test_half_precision_stays(transformers: Any, tmp_path: Path) -> None:
    model = llama(transformers)
    prune(model)
    model.save_pretrained(tmp_path / "float")
    half = from_pretrained(transformers.LlamaForCausalLM, tmp_path / "float", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    half.save_pretrained(tmp_path / "half")
    assert_same(half, from_pretrained(transformers.LlamaForCausalLM, tmp_path / "half"))


def test_a_loaded_model_is_pruned_again_and_saved_again(transformers: Any, tmp_path: Path) -> None:
    model = llama(transformers)
    prune(model, pruning_ratio=0.25, round_to=4)
    assert (model.config.hidden_size, model.config.intermediate_size) == (12, 16)
    model.save_pretrained(tmp_path / "first")
    loaded = from_pretrained(transformers.LlamaForCausalLM, tmp_path / "first")
    prune(loaded, pruning_ratio=0.3, round_to=4)
    assert (loaded.config.hidden_size, loaded.config.intermediate_size) == (8, 8)
    loaded.save_pretrained(tmp_path / "second")
    assert_same(loaded, from_pretrained(transformers.LlamaForCausalLM, tmp_path / "second"))


def test_sizes_that_its_config_refuses_are_saved_all_the_same(transformers: Any, tmp_path: Path) -> None:
    """A width of 12 is no multiple of 8 heads: such a config could not even be written."""
    model = llama(transformers, num_attention_heads=8, head_dim=4)
    notes = prune(model, pruning_ratio=0.25).notes
    assert model.lm_head.in_features == 12
    assert model.config.hidden_size == 16
    assert "config is left as it was" in notes[-1]
    model.save_pretrained(tmp_path)
    assert_same(model, from_pretrained(transformers.LlamaForCausalLM, tmp_path))


def test_its_state_dict_goes_into_a_dense_model_and_that_saves_itself(
    transformers: Any, tmp_path: Path
) -> None:
    model = llama(transformers)
    record(model, prune(model).plan)
    fresh = llama(transformers)
    load_pruned_state(fresh, model.state_dict())
    fresh.save_pretrained(tmp_path)
    assert torch.equal(logits(fresh), logits(model))
    assert_same(fresh, from_pretrained(transformers.LlamaForCausalLM, tmp_path))


def test_what_the_config_tells_whole_transformers_loads_alone(transformers: Any, tmp_path: Path) -> None:
    model = llama(transformers)
    assert prune(model, prune_head_dims=False).notes == ()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(transformers.LlamaForCausalLM.from_pretrained(tmp_path)), logits(model))


# -- refused -----------------------------------------------------------------------------------------


def edited(path: Path, change: Callable[[Any], Any]) -> None:
    data = json.loads((path / "config.json").read_text())
    change(data)
    (path / "config.json").write_text(json.dumps(data))


def replanned(path: Path, change: Callable[[Any], Any]) -> None:
    """Change the plan in the config."""

    def rewrite(config: Any) -> None:
        plan = json.loads(config[KEY])
        change(plan)
        config[KEY] = json.dumps(plan)

    edited(path, rewrite)


def without(name: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        from safetensors.torch import load_file, save_file

        state = load_file(path / WEIGHTS)
        del state[name]
        save_file(state, path / WEIGHTS, metadata={"format": "pt"})

    return damage


def reshaped(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(path / WEIGHTS)
    state["model.layers.0.mlp.up_proj.weight"] = torch.zeros(11, 8)
    save_file(state, path / WEIGHTS, metadata={"format": "pt"})


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a weight is missing": (
        without("model.layers.1.mlp.up_proj.weight"),
        r"model\.layers\.1\.mlp\.up_proj\.weight' is missing from",
    ),
    "a weight has another shape": (
        reshaped,
        r"model\.layers\.0\.mlp\.up_proj\.weight of shape \[11, 8\], this model would have \[12, 8\]",
    ),
    "the weights are cut short": (
        lambda p: (p / WEIGHTS).write_bytes((p / WEIGHTS).read_bytes()[:-40]) and None,
        "cannot be read",
    ),
    "the weights are gone": (lambda p: (p / WEIGHTS).unlink(), "cannot be read"),
    "the config is gone": (lambda p: (p / "config.json").unlink(), "config of .* cannot be read"),
    "the config is no JSON": (
        lambda p: (p / "config.json").write_text("{") and None,
        "config of .* cannot be read",
    ),
    "the config was edited": (
        lambda p: edited(p, lambda c: c.update(hidden_size=12)),
        r"config\.json says 12 for config\.hidden_size, it was left with 8",
    ),
    "the plan is gone": (lambda p: edited(p, lambda c: c.pop(KEY)), "names no plan"),
    "the plan is of another format": (
        lambda p: replanned(p, lambda c: c.update(format=99)),
        "format 99",
    ),
    "the plan is no plan": (lambda p: edited(p, lambda c: c.update({KEY: [1]})), "plan in the config of"),
    "the bits go on for ever": (
        lambda p: replanned(p, lambda c: c["cuts"][0].__setitem__(3, "f" * 10_000)),
        "10000 hexadecimal digits",
    ),
    "the plan is for another model": (
        lambda p: replanned(p, lambda c: c["sizes"].__setitem__(0, ["lm_head.weight", [11, 99]])),
        r"lm_head\.weight",
    ),
    "the plan rewrites what is not there": (
        lambda p: replanned(p, lambda c: c["rewrites"].append(["model", "nothing", 1, 2])),
        "nothing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused(transformers: Any, tmp_path: Path, damage: str) -> None:
    model = llama(transformers)
    prune(model)
    model.save_pretrained(tmp_path)
    change, message = DAMAGES[damage]
    change(tmp_path)
    with pytest.raises(CheckpointMismatchError, match=message):
        from_pretrained(transformers.LlamaForCausalLM, tmp_path)


def test_a_dense_model_is_sent_to_its_own_loader(transformers: Any, tmp_path: Path) -> None:
    llama(transformers).save_pretrained(tmp_path)
    with pytest.raises(CheckpointMismatchError, match=r"call LlamaForCausalLM\.from_pretrained"):
        from_pretrained(transformers.LlamaForCausalLM, tmp_path)


def test_another_class_is_refused(transformers: Any, tmp_path: Path) -> None:
    model = llama(transformers)
    prune(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointMismatchError, match="pass the class of the model itself"):
        from_pretrained(transformers.AutoModelForCausalLM, tmp_path)
    with pytest.raises(CheckpointMismatchError, match="takes no config"):
        from_pretrained(transformers.LlamaForCausalLM, tmp_path, config=model.config)
    with pytest.raises(CheckpointMismatchError, match=r"lm_head\.weight|model\."):
        from_pretrained(transformers.LlamaModel, tmp_path)


# -- the manifest --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cut",
    [
        Cut("w", 0, 70, tuple(range(0, 70, 3))),
        Cut("w", 0, 4, (3, 0)),
        Cut("w", 1, 3, (0, 2, 1, 2), rows=2),
        Cut("w", 1, 3, (2, 0, 1, 2), rows=2),
        Cut("w", 0, 4, ()),
    ],
    ids=["bits", "out of order", "rows", "rows out of order", "nothing"],
)
def test_a_packed_plan_is_read_again(cut: Cut) -> None:
    plan = Plan((cut,), (Rewrite("", "n", 4, 2),), sizes=(("w", (4, 3)),))
    assert unpack(pack(plan)) == plan


class Saved(SimpleNamespace):
    """A config that writes itself."""

    def save_pretrained(self, path: Any) -> None:
        raise NotImplementedError(path)


def test_a_config_below_gets_its_part_and_other_models_nothing() -> None:
    config = Saved(width=4)
    inner, other = nn.Linear(3, 4), nn.Linear(3, 4)
    inner.config = other.config = config
    root = nn.ModuleDict({"net": inner, "rest": nn.Linear(4, 4)})
    cuts = Cut("net.weight", 0, 4, (0, 2)), Cut("rest.weight", 1, 4, (0, 2))
    plan = Plan(
        cuts, (Rewrite("net", "out_features", 4, 2),), sizes=(("net.weight", (4, 3)), ("rest.weight", (4, 4)))
    )
    tell_configs(root, plan)
    assert unpack(vars(inner.config)[KEY]) == Plan(
        (Cut("weight", 0, 4, (0, 2)),), (Rewrite("", "out_features", 4, 2),), sizes=(("weight", (4, 3)),)
    )
    assert other.config is config
    assert KEY not in vars(config)


def test_a_config_forgets_the_plan_with_the_model() -> None:
    model = nn.Linear(3, 4)
    model.config = Saved(width=4)
    note(model, Plan((Cut("weight", 0, 4, (0, 2)),), sizes=(("weight", (4, 3)),)))
    assert KEY in vars(model.config)
    note(model, Plan())
    assert KEY not in vars(model.config)


def test_a_config_that_is_not_saved_with_its_model_is_left() -> None:
    model = nn.Linear(3, 4)
    model.config = config = SimpleNamespace(width=4)
    note(model, Plan((Cut("weight", 0, 4, (0, 2)),), sizes=(("weight", (4, 3)),)))
    assert model.config is config
    assert vars(config) == {"width": 4}
