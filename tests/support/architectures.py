"""Sizes of tiny random models of many architectures, by `model_type`, and whether transformers separates packed documents."""

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}

CROSSING = {
    "bamba": {"attn_layer_indices": [1], **_MAMBA2},
    "bloom": {},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon_mamba": {"state_size": 4},
    "gpt_oss": {**_LOCAL, "head_dim": 8},
    "granitemoehybrid": {**_LOCAL, **_MAMBA2, "shared_intermediate_size": 16, "layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 4, "use_mamba_kernels": False},
    "mamba": {"state_size": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "minimax": {**_LOCAL, "head_dim": 8, "block_size": 4, "layer_types": ["linear_attention", "full_attention"]},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "qwen3_next": {
        **_EXPERTS,
        "head_dim": 8,
        "shared_expert_intermediate_size": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
}
"""Architectures whose attention or recurrent state crosses packed documents (transformers 5.17)."""

SEPARATING = {
    **dict.fromkeys(["gemma", "gemma3_text", "glm", "glm4", "llama", "mistral", "qwen2", "qwen3", "smollm3"], {"head_dim": 8}),
    **dict.fromkeys(["gpt2", "gpt_neox", "granite", "olmo", "olmo2", "phi", "phi3", "stablelm", "starcoder2"], {}),
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "first_k_dense_replace": 1,
    },
    "gptj": {"rotary_dim": 4},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**_EXPERTS, "head_dim": 8},
}
"""Architectures whose packed documents transformers separates by their position ids."""

ARCHITECTURES = CROSSING | SEPARATING
