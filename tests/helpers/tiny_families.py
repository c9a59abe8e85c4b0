"""Tiny configs of all families, by the names of their cases: the model type, and the settings."""

# No multiple of 128, so that the vocabulary is padded; at TP 2 the second rank's part is mostly padding.
VOCAB_SIZE = 331

_COMMON = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    tie_word_embeddings=False,
)
_LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
_YARN = dict(
    rope_type="yarn",
    rope_theta=10000.0,
    factor=4.0,
    beta_fast=32.0,
    beta_slow=1.0,
    mscale=1.0,
    mscale_all_dim=1.0,
    original_max_position_embeddings=64,
)
FAMILIES = {
    "llama2": ("llama", _COMMON | dict(num_hidden_layers=6, num_key_value_heads=4, rms_norm_eps=1e-5)),
    "llama3": ("llama", _COMMON | dict(num_hidden_layers=8, rms_norm_eps=1e-5, rope_parameters=_LLAMA3_ROPE)),
    "llama_tied": ("llama", _COMMON | dict(num_hidden_layers=6, tie_word_embeddings=True)),
    "qwen2": ("qwen2", _COMMON | dict(num_hidden_layers=7, tie_word_embeddings=True)),
    "qwen3": ("qwen3", _COMMON | dict(num_hidden_layers=7, head_dim=32)),
    # as the small ones of Qwen3 are
    "qwen3_tied": ("qwen3", _COMMON | dict(num_hidden_layers=7, head_dim=32, tie_word_embeddings=True)),
}
_MINISTRAL3_ROPE = _YARN | dict(llama_4_scaling_beta=0.1, original_max_position_embeddings=32)
# Windows are shorter than the tests' sequences.
FAMILIES |= {
    "llama_biased": ("llama", _COMMON | dict(num_hidden_layers=4, attention_bias=True, mlp_bias=True)),
    "qwen2_windows": (
        "qwen2",
        _COMMON | dict(num_hidden_layers=5, use_sliding_window=True, sliding_window=24, max_window_layers=2),
    ),
    "qwen3_windows": (
        "qwen3",
        _COMMON
        | dict(
            num_hidden_layers=4,
            head_dim=32,
            attention_bias=True,
            use_sliding_window=True,
            sliding_window=17,
            layer_types=["full_attention", "sliding_attention"] * 2,
        ),
    ),
    "mistral": ("mistral", _COMMON | dict(num_hidden_layers=4, head_dim=24, sliding_window=40)),
    "ministral": (
        "ministral",
        _COMMON
        | dict(
            num_hidden_layers=4,
            head_dim=16,
            sliding_window=24,
            layer_types=["full_attention", *["sliding_attention"] * 3],
        ),
    ),
    "ministral3": ("ministral3", _COMMON | dict(num_hidden_layers=4, head_dim=24, rope_parameters=_MINISTRAL3_ROPE)),
    "phi3": ("phi3", _COMMON | dict(num_hidden_layers=4, sliding_window=50, pad_token_id=0)),
    "phi3_partial": (
        "phi3",
        _COMMON
        | dict(
            num_hidden_layers=4,
            tie_word_embeddings=True,
            pad_token_id=0,
            rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.75),
        ),
    ),
    "smollm3": (
        "smollm3",
        _COMMON
        | dict(
            num_hidden_layers=5,
            tie_word_embeddings=True,
            no_rope_layer_interval=3,
            use_sliding_window=True,
            sliding_window=24,
            pad_token_id=0,
        ),
    ),
    "pangu_embedded": ("llama", _COMMON | dict(num_hidden_layers=4, attention_bias=True)),
    "olmo2": ("olmo2", _COMMON | dict(num_hidden_layers=4)),
    "olmo3": (
        "olmo3",
        _COMMON
        | dict(
            num_hidden_layers=4,
            sliding_window=24,
            attention_bias=True,
            rope_parameters=dict(
                full_attention={key: value for key, value in _YARN.items() if not key.startswith("mscale")},
                sliding_attention=dict(rope_type="default", rope_theta=5e5),
            ),
        ),
    ),
    "gemma3": (
        "gemma3_text",
        _COMMON
        | dict(
            num_hidden_layers=7,
            head_dim=32,
            sliding_window=24,
            query_pre_attn_scalar=40,
            tie_word_embeddings=True,
            layer_types=["sliding_attention", "sliding_attention", "full_attention", *["sliding_attention"] * 4],
            rope_parameters=dict(
                full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e6),
                sliding_attention=dict(rope_type="default", rope_theta=1e4),
            ),
        ),
    ),
}
_PIXTRAL = dict(
    model_type="pixtral",
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=2,
    head_dim=16,
    image_size=28,
    patch_size=14,
)
# Language models within multimodal ones.
NESTED = ("mistral3", "kimi_k25")
FAMILIES["mistral3"] = (
    "mistral3",
    dict(
        tie_word_embeddings=False,
        text_config=_COMMON | dict(model_type="mistral", num_hidden_layers=4, head_dim=16, sliding_window=None),
        vision_config=_PIXTRAL,
    ),
)
# Experts have a dimension of their own and rows that tensor parallelism cuts within the RoPE part of MLA's latent.
MOE_FAMILIES = {
    "deepseek_v3": (
        "deepseek_v3",
        _COMMON
        | dict(
            num_hidden_layers=5,
            num_key_value_heads=4,
            first_k_dense_replace=2,
            q_lora_rank=24,
            kv_lora_rank=16,
            qk_nope_head_dim=16,
            qk_rope_head_dim=8,
            v_head_dim=12,
            n_routed_experts=8,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            n_shared_experts=1,
            moe_intermediate_size=40,
            routed_scaling_factor=2.5,
            rope_parameters=_YARN,
            num_nextn_predict_layers=0,
        ),
    ),
    "qwen3_moe": (
        "qwen3_moe",
        _COMMON
        | dict(
            num_hidden_layers=4,
            head_dim=16,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=40,
            mlp_only_layers=[1],
            norm_topk_prob=True,
        ),
    ),
}

_SIGMOID_ROUTED = dict(
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_shared_experts=1,
    moe_intermediate_size=40,
    routed_scaling_factor=1.8,
    num_nextn_predict_layers=0,
)
_LATENT = dict(
    num_key_value_heads=4, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12
)
_BLOCK_SPARSE = dict(num_hidden_layers=5, intermediate_size=40, num_local_experts=8, num_experts_per_tok=2)
MOE_FAMILIES |= {
    "glm4_moe": (
        "glm4_moe",
        _COMMON
        | _SIGMOID_ROUTED
        | dict(
            num_hidden_layers=5,
            head_dim=24,
            attention_bias=True,
            use_qk_norm=True,
            first_k_dense_replace=1,
            n_group=2,
            topk_group=1,
            rope_parameters=dict(rope_type="default", rope_theta=1e6, partial_rotary_factor=0.5),
        ),
    ),
    "glm4_moe_lite": ("glm4_moe_lite", _COMMON | _SIGMOID_ROUTED | _LATENT | dict(num_hidden_layers=4)),
    "deepseek_v32": (
        "deepseek_v32",
        _COMMON
        | _SIGMOID_ROUTED
        | _LATENT
        | dict(
            num_hidden_layers=4,
            first_k_dense_replace=1,
            n_group=2,
            topk_group=1,
            index_topk=128,
            index_n_heads=4,
            index_head_dim=16,
            rope_parameters=_YARN,
        ),
    ),
    "glm_moe_dsa": (
        "glm_moe_dsa",
        _COMMON
        | _SIGMOID_ROUTED
        | _LATENT
        | dict(num_hidden_layers=4, first_k_dense_replace=2, index_topk=128, index_n_heads=4, index_head_dim=16),
    ),
    "minimax_m2": (
        "minimax_m2",
        _COMMON
        | _BLOCK_SPARSE
        | dict(head_dim=24, rope_parameters=dict(rope_type="default", rope_theta=5e6, partial_rotary_factor=0.5)),
    ),
    "kimi_k25": (
        "kimi_k25",
        dict(
            tie_word_embeddings=False,
            projection_hidden_size=32,
            text_config=_COMMON
            | _SIGMOID_ROUTED
            | _LATENT
            | dict(model_type="deepseek_v3", num_hidden_layers=4, first_k_dense_replace=1, n_group=1, topk_group=1),
            vision_config=dict(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=1,
                num_attention_heads=2,
                pos_emb_height=4,
                pos_emb_width=4,
            ),
        ),
    ),
    "gpt_oss": (
        "gpt_oss",
        _COMMON
        | _BLOCK_SPARSE
        | dict(
            intermediate_size=96,
            head_dim=16,
            sliding_window=24,
            swiglu_limit=1.5,
            rope_parameters=_YARN | dict(mscale=None, mscale_all_dim=None, truncate=False),
        ),
    ),
    "mixtral": ("mixtral", _COMMON | _BLOCK_SPARSE | dict(head_dim=16, sliding_window=40)),
}
