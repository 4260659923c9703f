"""Hugging Face transformers: every family from a small configuration of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from zoo.cases import ZooCase, draw, tokens
from zoo.operators import import_torchvision

WORDS = 96  # size of every vocabulary

_SMALL = {
    "vocab_size": WORDS,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_SMALL, "num_key_value_heads": 2}

# Config class, model class and sizes of each.
_CAUSAL: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _GROUPED),
    "mistral": ("MistralConfig", "MistralForCausalLM", _GROUPED),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _GROUPED),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_GROUPED, "head_dim": 16}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {**_GROUPED, "head_dim": 16}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**_GROUPED, "head_dim": 16}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**_GROUPED, "head_dim": 16}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", _GROUPED),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {
            "vocab_size": WORDS,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _SMALL),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {**_SMALL, "ffn_dim": 128, "word_embed_proj_dim": 64},
    ),
    "bloom": (
        "BloomConfig",
        "BloomForCausalLM",
        {"vocab_size": WORDS, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    ),
    "falcon": (
        "FalconConfig",
        "FalconForCausalLM",
        {**_SMALL, "num_kv_heads": 2, "new_decoder_architecture": True},
    ),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**_GROUPED, "num_local_experts": 4}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {**_GROUPED, "num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {
            **_SMALL,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 32,
            "n_routed_experts": 8,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "q_lora_rank": 32,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
        },
    ),
    "mamba": ("MambaConfig", "MambaForCausalLM", {**_SMALL, "state_size": 8, "time_step_rank": 8}),
}

_ENCODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertConfig", "BertForSequenceClassification", _SMALL),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification", _SMALL),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertForSequenceClassification",
        {
            "vocab_size": WORDS,
            "dim": 64,
            "hidden_dim": 128,
            "n_layers": 2,
            "n_heads": 4,
            "max_position_embeddings": 64,
        },
    ),
    "albert": ("AlbertConfig", "AlbertForSequenceClassification", {**_SMALL, "embedding_size": 32}),
    "electra": ("ElectraConfig", "ElectraForSequenceClassification", {**_SMALL, "embedding_size": 32}),
    "deberta_v2": (
        "DebertaV2Config",
        "DebertaV2ForSequenceClassification",
        {**_SMALL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "pooler_hidden_size": 64},
    ),
    "modernbert": (
        "ModernBertConfig",
        "ModernBertForSequenceClassification",
        {**_SMALL, "cls_token_id": 1, "sep_token_id": 2},
    ),
}

_VIT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
_PICTURES: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "vit": ("ViTConfig", "ViTForImageClassification", _VIT, 32),
    "dinov2": ("Dinov2Config", "Dinov2ForImageClassification", _VIT, 32),
    "swin": (
        "SwinConfig",
        "SwinForImageClassification",
        {
            "image_size": 64,
            "patch_size": 4,
            "embed_dim": 32,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": 4,
        },
        64,
    ),
    "convnext": (
        "ConvNextConfig",
        "ConvNextForImageClassification",
        {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1], "image_size": 64},
        64,
    ),
    "segformer": (
        "SegformerConfig",
        "SegformerForSemanticSegmentation",
        {
            "hidden_sizes": [16, 32, 48, 64],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 4, 4],
            "decoder_hidden_size": 32,
        },
        64,
    ),
    "mobilevit": (
        "MobileViTConfig",
        "MobileViTForImageClassification",
        {
            "hidden_sizes": [32, 48, 64],
            "neck_hidden_sizes": [8, 16, 24, 32, 48, 64, 128],
            "image_size": 64,
            "num_attention_heads": 4,
        },
        64,
    ),
}


def transformers() -> Any:
    """Import the library, after the torchvision that it imports where it finds one."""
    import_torchvision()
    library = import_module("transformers")
    library.logging.disable_progress_bar()
    return library


def _build(config: str, model: str, sizes: dict[str, Any]) -> nn.Module:
    library = transformers()
    return getattr(library, model)(getattr(library, config)(**sizes))


def _ids() -> dict[str, Tensor]:
    return {"input_ids": tokens(WORDS)}


def _text() -> dict[str, Tensor]:
    ids = tokens(WORDS)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _both() -> dict[str, Tensor]:
    return {"input_ids": tokens(WORDS), "decoder_input_ids": tokens(WORDS, 5)}


def _pixels(size: int) -> dict[str, Tensor]:
    return {"pixel_values": draw(2, 3, size, size)}


# --- models of several parts ---

_SEQ = {
    "vocab_size": WORDS,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}


def _t5() -> nn.Module:
    sizes = {
        "vocab_size": WORDS,
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 128,
        "num_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": 0,
    }
    return _build("T5Config", "T5ForConditionalGeneration", sizes)


def _bart() -> nn.Module:
    sizes = {**_SEQ, "max_position_embeddings": 64, "forced_eos_token_id": None}
    return _build("BartConfig", "BartForConditionalGeneration", sizes)


def _whisper() -> nn.Module:
    sizes = {**_SEQ, "num_mel_bins": 16, "max_source_positions": 32, "max_target_positions": 32}
    return _build("WhisperConfig", "WhisperForConditionalGeneration", sizes)


def _sounds() -> dict[str, Tensor]:
    return {"input_features": draw(2, 16, 64), "decoder_input_ids": tokens(WORDS, 5)}


def _wav2vec2() -> nn.Module:
    sizes = {
        **_SMALL,
        "conv_dim": (32, 32, 32),
        "conv_stride": (5, 2, 2),
        "conv_kernel": (10, 3, 3),
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
        "mask_time_prob": 0.0,
        "layerdrop": 0.0,
    }
    return _build("Wav2Vec2Config", "Wav2Vec2ForCTC", sizes)


def _two_towers(name: str) -> nn.Module:
    text = {**_SMALL, "max_position_embeddings": 16}
    shared = {"projection_dim": 32} if name == "CLIP" else {}
    return _build(f"{name}Config", f"{name}Model", {"text_config": text, "vision_config": _VIT, **shared})


def _text_and_pixels() -> dict[str, Tensor]:
    return {"input_ids": tokens(WORDS), **_pixels(32)}


def _detr() -> nn.Module:
    library = transformers()
    backbone = library.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    sizes = {k: v for k, v in _SEQ.items() if "token" not in k and k != "vocab_size"}
    config = library.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone_config=backbone,
        num_queries=6,
        **sizes,
    )
    return library.DetrForObjectDetection(config)


def _sam() -> nn.Module:
    library = transformers()
    vision = library.SamVisionConfig(
        hidden_size=32,
        output_channels=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=64,
        patch_size=8,
        mlp_dim=64,
        window_size=4,
        global_attn_indexes=[1],
        num_pos_feats=16,
    )
    prompt = library.SamPromptEncoderConfig(
        hidden_size=32, image_size=64, patch_size=8, mask_input_channels=8
    )
    mask = library.SamMaskDecoderConfig(
        hidden_size=32, mlp_dim=64, num_attention_heads=4, iou_head_hidden_dim=32, num_hidden_layers=2
    )
    return library.SamModel(
        library.SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=mask)
    )


def _prompted() -> dict[str, Tensor]:
    return {"pixel_values": draw(1, 3, 64, 64), "input_points": torch.tensor([[[[20.0, 30.0]]]])}


_PARTS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], bool]] = {
    "t5": (_t5, _both, True),
    "bart": (_bart, _both, True),
    "whisper": (_whisper, _sounds, False),
    "wav2vec2": (_wav2vec2, lambda: {"input_values": draw(2, 800)}, False),
    "clip": (partial(_two_towers, "CLIP"), _text_and_pixels, False),
    "siglip": (partial(_two_towers, "Siglip"), _text_and_pixels, False),
    "detr": (_detr, partial(_pixels, 64), False),
    "sam": (_sam, _prompted, False),
}

# Shapes after half is gone, by hand, of the first layer (they start with its name where that is left out):
# 64 wide -> 32; 128 (256) inner channels -> 64 (128); 8 rotary pairs -> 4, so heads of 16 are heads of 8.
_LLAMA = {
    "model.embed_tokens.weight": (WORDS, 32),
    "self_attn.q_proj.weight": (4 * 8, 32),
    "self_attn.k_proj.weight": (2 * 8, 32),
    "self_attn.v_proj.weight": (2 * 8, 32),
    "self_attn.o_proj.weight": (32, 4 * 8),
    "model.rotary_emb.inv_freq": (4,),
}
_FFN = {
    "mlp.gate_proj.weight": (64, 32),
    "mlp.up_proj.weight": (64, 32),
    "mlp.down_proj.weight": (32, 64),
}
_GEMMA3 = {n.replace("inv_freq", "sliding_attention_inv_freq"): s for n, s in _LLAMA.items()}
_KEPT: dict[str, dict[str, tuple[int, ...]]] = {
    **{key: {**_LLAMA, **_FFN} for key in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2")},
    "gemma3": {**_GEMMA3, **_FFN},
    "phi3": {
        "model.embed_tokens.weight": (WORDS, 32),
        "self_attn.qkv_proj.weight": ((4 + 2 + 2) * 8, 32),
        "self_attn.o_proj.weight": (32, 4 * 8),
        "mlp.gate_up_proj.weight": (2 * 64, 32),
        "mlp.down_proj.weight": (32, 64),
        "model.rotary_emb.inv_freq": (4,),
    },
    "gpt2": {
        "transformer.wte.weight": (WORDS, 32),
        "attn.c_attn.weight": (32, 3 * 4 * 8),
        "attn.c_proj.weight": (4 * 8, 32),
        "mlp.c_fc.weight": (32, 128),
        "mlp.c_proj.weight": (128, 32),
    },
    "gpt_neox": {  # a quarter of its 16 head dimensions rotate: 2 pairs
        "gpt_neox.embed_in.weight": (WORDS, 32),
        "attention.query_key_value.weight": (3 * 4 * 8, 32),
        "attention.dense.weight": (32, 4 * 8),
        "mlp.dense_h_to_4h.weight": (64, 32),
        "mlp.dense_4h_to_h.weight": (32, 64),
        "gpt_neox.rotary_emb.inv_freq": (1,),
    },
    "opt": {
        "model.decoder.embed_tokens.weight": (WORDS, 32),
        **{f"self_attn.{n}_proj.weight": (4 * 8, 32) for n in "qkv"},
        "self_attn.out_proj.weight": (32, 4 * 8),
        "fc1.weight": (64, 32),
        "fc2.weight": (32, 64),
    },
    "bloom": {
        "transformer.word_embeddings.weight": (WORDS, 32),
        "self_attention.query_key_value.weight": (3 * 4 * 8, 32),
        "self_attention.dense.weight": (32, 4 * 8),
        "mlp.dense_h_to_4h.weight": (128, 32),
        "mlp.dense_4h_to_h.weight": (32, 128),
    },
    "falcon": {
        "transformer.word_embeddings.weight": (WORDS, 32),
        "self_attention.query_key_value.weight": ((4 + 2 + 2) * 8, 32),
        "self_attention.dense.weight": (32, 4 * 8),
        "mlp.dense_h_to_4h.weight": (128, 32),
        "mlp.dense_4h_to_h.weight": (32, 128),
        "transformer.rotary_emb.inv_freq": (4,),
    },
    "mixtral": {
        **_LLAMA,
        "mlp.gate.weight": (4, 32),
        "mlp.experts.gate_up_proj": (4, 2 * 64, 32),
        "mlp.experts.down_proj": (4, 32, 64),
    },
    "qwen2_moe": {
        **_LLAMA,
        "mlp.gate.weight": (4, 32),
        "mlp.experts.gate_up_proj": (4, 2 * 16, 32),
        "mlp.experts.down_proj": (4, 32, 16),
        "mlp.shared_expert.up_proj.weight": (32, 32),
    },
    "deepseek_v3": {  # 3 of 4 pairs can go, which are taken from index 1 on: 2 of them stay beside the first
        "model.embed_tokens.weight": (WORDS, 32),
        "self_attn.q_a_proj.weight": (16, 32),
        "self_attn.q_b_proj.weight": (4 * (8 + 2 * 3), 16),
        "self_attn.kv_a_proj_with_mqa.weight": (8 + 2 * 3, 32),
        "self_attn.kv_b_proj.weight": (4 * (8 + 8), 8),
        "self_attn.o_proj.weight": (32, 4 * 8),
        **_FFN,
        "model.rotary_emb.inv_freq": (3,),
    },
    "mamba": {
        "backbone.embeddings.weight": (WORDS, 32),
        "mixer.in_proj.weight": (2 * 64, 32),
        "mixer.x_proj.weight": (4 + 2 * 4, 64),
        "mixer.dt_proj.weight": (64, 4),
        "mixer.A_log": (64, 4),
        "mixer.out_proj.weight": (32, 64),
    },
}
# Half of the kv heads with their query heads, of 16 dimensions each; everything else stays.
_LLAMA_HEADS = {
    "model.embed_tokens.weight": (WORDS, 64),
    "self_attn.q_proj.weight": (2 * 16, 64),
    "self_attn.k_proj.weight": (1 * 16, 64),
    "self_attn.v_proj.weight": (1 * 16, 64),
    "self_attn.o_proj.weight": (64, 2 * 16),
}
_KEPT_HEADS: dict[str, dict[str, tuple[int, ...]]] = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "mixtral", "qwen2_moe"),
        _LLAMA_HEADS,
    ),
    "phi3": {
        "self_attn.qkv_proj.weight": ((2 + 1 + 1) * 16, 64),
        "self_attn.o_proj.weight": (64, 2 * 16),
    },
    "gpt2": {"attn.c_attn.weight": (64, 3 * 2 * 16), "attn.c_proj.weight": (2 * 16, 64)},
    "gpt_neox": {
        "attention.query_key_value.weight": (3 * 2 * 16, 64),
        "attention.dense.weight": (64, 2 * 16),
        "gpt_neox.rotary_emb.inv_freq": (2,),
    },
    "opt": {
        **{f"self_attn.{n}_proj.weight": (2 * 16, 64) for n in "qkv"},
        "self_attn.out_proj.weight": (64, 2 * 16),
    },
    "falcon": {
        "self_attention.query_key_value.weight": ((2 + 1 + 1) * 16, 64),
        "self_attention.dense.weight": (64, 2 * 16),
    },
    "deepseek_v3": {
        "self_attn.q_b_proj.weight": (2 * (16 + 8), 32),
        "self_attn.kv_b_proj.weight": (2 * (16 + 16), 16),
        "self_attn.o_proj.weight": (64, 2 * 16),
    },
}
_LAYERS = {
    "gpt2": "transformer.h.0.",
    "gpt_neox": "gpt_neox.layers.0.",
    "opt": "model.decoder.layers.0.",
    "bloom": "transformer.h.0.",
    "falcon": "transformer.h.0.",
    "mamba": "backbone.layers.0.",
}


def _whole_names(name: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Put the name of the first layer before what has none."""
    layer = _LAYERS.get(name, "model.layers.0.")
    root = layer.partition(".")[0] + "."
    return {n if n.startswith(root) else layer + n: shape for n, shape in shapes.items()}


_HEADS = {"pruning_ratio": 0.0, "prune_num_heads": True, "head_pruning_ratio": 0.5}
_WITHOUT_HEADS = ("mamba", "bloom")

HUGGINGFACE = [
    *(
        ZooCase(
            f"huggingface/{name}",
            partial(_build, *spec),
            _ids,
            generates=True,
            shapes=_whole_names(name, _KEPT[name]),
        )
        for name, spec in _CAUSAL.items()
    ),
    *(
        ZooCase(
            f"huggingface/{name}+heads",
            partial(_build, *spec),
            _ids,
            options=_HEADS,
            generates=True,
            shapes=_whole_names(name, _KEPT_HEADS[name]),
        )
        for name, spec in _CAUSAL.items()
        if name not in _WITHOUT_HEADS
    ),
    *(ZooCase(f"huggingface/{name}", partial(_build, *spec), _text) for name, spec in _ENCODERS.items()),
    *(
        ZooCase(f"huggingface/{name}", partial(_build, config, model, sizes), partial(_pixels, size))
        for name, (config, model, sizes, size) in _PICTURES.items()
    ),
    *(
        ZooCase(f"huggingface/{name}", build, inputs, generates=generates)
        for name, (build, inputs, generates) in _PARTS.items()
    ),
]
