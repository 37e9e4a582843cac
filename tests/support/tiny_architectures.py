"""A tiny random checkpoint of every causal language model that the installed transformers has.

A family's config is shrunk field by field (SIZES), and where that is not enough by values of its own (OVERRIDES).
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.support.tiny_model import BOS_ID, EOS_ID, MAX_MODEL_LEN, PAD_ID, VOCAB_SIZE

# Those of which no tiny model can be made here, and why.
NOT_MADE = {
    "blt": "its four parts share no sizes that could be shrunk one by one",
    "cohere_compass_text": "its rotary parameters are given for each kind of layer",
    "dots3_note": "its vision tower's width is that of the text",
    "dots3_note_text": "its window layers have sizes of their own, of a large model",
    "gemma3n": "its vision tower needs PIL and timm",
    "gemma4_assistant": "it drafts for another model and has no layers that produce keys",
    "gemma4_unified_assistant": "it drafts for another model and has no layers that produce keys",
    "musicgen": "its config is of three parts, and AutoModelForCausalLM makes no model of it",
    "musicgen_melody": "its config is of three parts, and AutoModelForCausalLM makes no model of it",
    "phi4_multimodal": "its vision and audio towers have fixed sizes",
    "qwen4_exp": "its hashed embeddings have sizes that follow from each other",
    "qwen4_exp_text": "its hashed embeddings have sizes that follow from each other",
    "reformer": "its axial positions have sizes that follow from each other",
    "zamba": "its shared layers are told by fixed indices",
}
FAMILIES: tuple[str, ...] = tuple(name for name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) if name not in NOT_MADE)

_LAYERS, _WIDTH, _HEADS, _INNER = 3, 32, 4, 48
_GROUPS: tuple[tuple[int, str], ...] = (
    (VOCAB_SIZE, "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size"),
    (_LAYERS, "num_hidden_layers num_layers n_layer n_layers decoder_layers encoder_layers num_blocks"),
    (_LAYERS, "num_decoder_layers num_encoder_layers num_layers_per_stack"),
    (_WIDTH, "hidden_size d_model n_embd emb_dim embedding_dim embedding_size word_embed_proj_dim"),
    (_WIDTH, "attention_hidden_size input_embedding_size output_embedding_size lru_width ple_embed_dim"),
    (_HEADS, "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads"),
    (_HEADS, "attention_heads num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads"),
    (2, "num_key_value_heads swa_num_key_value_heads num_experts_per_tok num_experts_per_token num_kv_heads"),
    (2, "moe_topk moe_k moe_top_k linear_num_key_heads"),
    (_INNER, "intermediate_size ffn_dim n_inner decoder_ffn_dim encoder_ffn_dim ffn_hidden_size dff d_inner"),
    (_INNER, "intermediate_size_mlp dense_intermediate_size feed_forward_size dim_ff"),
    (MAX_MODEL_LEN, "max_position_embeddings n_positions n_ctx max_seq_len context_length model_max_length"),
    (MAX_MODEL_LEN, "max_target_positions"),
    (4, "num_experts num_local_experts n_routed_experts moe_num_experts linear_num_value_heads rotary_dim"),
    (4, "index_n_heads index_topk mamba_d_state state_size time_step_rank mamba_dt_rank laurel_rank"),
    (4, "mamba_n_heads qk_rope_head_dim"),
    (8, "head_dim swa_head_dim kv_lora_rank q_lora_rank qk_nope_head_dim v_head_dim index_head_dim"),
    (8, "hidden_size_per_layer_input linear_key_head_dim linear_value_head_dim kv_channels d_kv"),
    (8, "attention_head_size"),
    (16, "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size"),
    (16, "expert_ffn_hidden_size shared_intermediate_size moe_shared_expert_intermediate_size router_hidden_size"),
    (7, "sliding_window window_size sliding_window_size attention_window_size local_attention"),
    (1, "n_group topk_group"),
    (PAD_ID, "pad_token_id"),
    (BOS_ID, "bos_token_id decoder_start_token_id"),
    (EOS_ID, "eos_token_id"),
)
SIZES: dict[str, int] = {name: value for value, names in _GROUPS for name in names.split()}

_ABSENT = object()  # the family's own default instead of SIZES
_DECODER = {"is_decoder": True}  # of encoders that can be made decoders
_NUMBERED = {**_DECODER, "pad_token_id": 1}  # whose positions begin behind the padding's id
_MLA = {"head_dim": 4, "num_key_value_heads": 4}
_HYBRID = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
_SHORT_CONVOLUTIONS = {"layer_types": ["conv", "full_attention", "conv"]}
_VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 16,
}  # fmt: skip

_ALIKE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("bert bert-generation big_bird electra ernie megatron-bert rembert roformer", _DECODER),
    ("camembert data2vec-text roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl", _NUMBERED),
    ("axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa hy_v4 longcat_flash", _MLA),
    ("minicpm3 youtu", _MLA),
    ("qwen3_5_text qwen3_5_moe_text qwen3_next", _HYBRID),
    ("lfm2 lfm2_moe lfm3", _SHORT_CONVOLUTIONS),
)
OVERRIDES: dict[str, dict[str, Any]] = {
    **{family: values for families, values in _ALIKE for family in families.split()},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"sliding_window": 7, "max_window_layers": 2, "n_shared_experts": 1},
    "gemma3": {"vision_config": _VISION},
    "gemma3n_text": {"num_hidden_layers": 10, "num_kv_shared_layers": 5},
    "git": {"vision_config": _VISION},
    "got_ocr2": {
        "vision_config": {
            **_VISION, "window_size": 2, "global_attn_indexes": [0], "mlp_dim": 16, "output_channels": 8,
        }
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4},
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4, **_MLA},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2},
    "moss_transcribe_diarize": {
        "audio_config": {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
    },
    "prophetnet": {"pad_token_id": 1},
    "roc_bert": {
        **_NUMBERED, "pronunciation_vocab_size": 9, "shape_vocab_size": 9, "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "xmod": {**_NUMBERED, "default_language": "en_XX"},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid", "mamba"], "hybrid_layer_ids": [1], "mamba_headdim": 8,
        "n_mamba_heads": 8, "mamba_ngroups": 1, "attention_head_dim": 16, "attention_hidden_size": 64,
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def tiny_config(family: str) -> Any:
    return AutoConfig.for_model(family, **_shrunk(AutoConfig.for_model(family), family))


def _shrunk(config: Any, family: str) -> dict[str, Any]:
    known = set(config.to_dict())
    values: dict[str, Any] = {name: value for name, value in SIZES.items() if name in known}
    for name in config.sub_configs:
        sub = getattr(config, name, None)
        if sub is not None and "text" in name:
            values[name] = _shrunk(sub, sub.model_type)
    return {name: value for name, value in {**values, **OVERRIDES.get(family, {})}.items() if value is not _ABSENT}
