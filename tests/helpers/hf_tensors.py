"""Names and shapes of the tensors in real checkpoints, derived family by family from config.json, independently of the
project's tables.
"""


def expected_tensors(config, mtp=True):
    """Return name and shape of every tensor in a released folder with this config.

    Args:
        mtp: whether the multi-token-prediction layers of the config are included.
    """
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    tensors = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    if not config.get("tie_word_embeddings", config["model_type"] == "gemma3_text"):
        tensors["lm_head.weight"] = (vocabulary, hidden)
    layer_tensors = _LAYERS[config["model_type"]]
    num_layers = config["num_hidden_layers"]
    for layer in range(num_layers):
        tensors |= _within(f"model.layers.{layer}.", layer_tensors(config, layer))
    for layer in range(num_layers, num_layers + (_mtp_layers(config) if mtp else 0)):
        tensors |= _within(f"model.layers.{layer}.", layer_tensors(config, layer) | _mtp_extras(hidden, vocabulary))
    return tensors


def _within(prefix, tensors):
    return {prefix + name: shape for name, shape in tensors.items()}


def _mtp_layers(config):
    return config.get("num_nextn_predict_layers", config.get("num_mtp_layers", 0))


def _mtp_extras(hidden, vocabulary):
    return {
        "embed_tokens.weight": (vocabulary, hidden),
        "enorm.weight": (hidden,),
        "hnorm.weight": (hidden,),
        "eh_proj.weight": (hidden, 2 * hidden),
        "shared_head.norm.weight": (hidden,),
        "shared_head.head.weight": (vocabulary, hidden),
    }


def _llama(config, layer):
    return _gqa(config) | _two_norms(config) | _mlp("mlp", config["hidden_size"], config["intermediate_size"])


def _qwen2(config, layer):
    head = config["hidden_size"] // config["num_attention_heads"]
    key_value = config["num_key_value_heads"] * head
    biases = {"self_attn.q_proj.bias": (config["hidden_size"],)}
    biases |= {"self_attn.k_proj.bias": (key_value,), "self_attn.v_proj.bias": (key_value,)}
    return _llama(config, layer) | biases


def _qwen3(config, layer):
    head_norms = {f"self_attn.{x}_norm.weight": (config["head_dim"],) for x in "qk"}
    return _llama(config, layer) | head_norms


def _qwen3_moe(config, layer):
    hidden, experts = config["hidden_size"], config["num_experts"]
    tensors = {name: shape for name, shape in _qwen3(config, layer).items() if not name.startswith("mlp.")}
    tensors["mlp.gate.weight"] = (experts, hidden)
    for expert in range(experts):
        tensors |= _mlp(f"mlp.experts.{expert}", hidden, config["moe_intermediate_size"])
    return tensors


def _deepseek_v3(config, layer):
    tensors = _mla(config, *(config[key] for key in _DEEPSEEK_MLA)) | _two_norms(config)
    if layer < config["first_k_dense_replace"]:
        return tensors | _mlp("mlp", config["hidden_size"], config["intermediate_size"])
    routed = config["n_routed_experts"]
    bias = {"mlp.gate.e_score_correction_bias": (routed,)}
    return tensors | _shared_and_routed(config, routed, config["n_shared_experts"]) | bias


_DEEPSEEK_MLA = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_PANGU_MLA = (
    *("attention_q_lora_dim", "attention_kv_lora_dim", "attention_qk_dim", "attention_qk_rope_dim", "attention_v_dim"),
)


def _pangu_ultra_moe(config, layer):
    hidden, remote_spelling = config["hidden_size"], "attention_q_lora_dim" in config
    tensors = _mla(config, *(config[key] for key in (_PANGU_MLA if remote_spelling else _DEEPSEEK_MLA)))
    tensors |= _two_norms(config) | {f"{x}_mlp_layernorm.weight": (hidden,) for x in ("pre", "post")}
    if layer < config["num_dense_layers" if remote_spelling else "first_k_dense_replace"]:
        return tensors | _mlp("mlp", hidden, config["intermediate_size"])
    routed = config["num_routed_experts" if remote_spelling else "n_routed_experts"]
    return tensors | _shared_and_routed(
        config, routed, config["num_shared_experts" if remote_spelling else "n_shared_experts"]
    )


def _glm4_moe(config, layer):
    head = config["head_dim"]
    tensors = _gqa(config) | _two_norms(config)
    if config["attention_bias"]:
        tensors |= {f"self_attn.{x}_proj.bias": tensors[f"self_attn.{x}_proj.weight"][:1] for x in "qkv"}
    if config["use_qk_norm"]:
        tensors |= {f"self_attn.{x}_norm.weight": (head,) for x in "qk"}
    if layer < config["first_k_dense_replace"]:
        return tensors | _mlp("mlp", config["hidden_size"], config["intermediate_size"])
    routed = config["n_routed_experts"]
    bias = {"mlp.gate.e_score_correction_bias": (routed,)}
    return tensors | _shared_and_routed(config, routed, config["n_shared_experts"]) | bias


def _deepseek_v32(config, layer):
    heads, head = config["index_n_heads"], config["index_head_dim"]
    indexer = {
        "wq_b.weight": (heads * head, config["q_lora_rank"]),
        "wk.weight": (head, config["hidden_size"]),
        "k_norm.weight": (head,),
        "k_norm.bias": (head,),
        "weights_proj.weight": (heads, config["hidden_size"]),
    }
    return _deepseek_v3(config, layer) | {f"self_attn.indexer.{name}": shape for name, shape in indexer.items()}


def _mixtral(config, layer):
    hidden, experts, columns = config["hidden_size"], config["num_local_experts"], config["intermediate_size"]
    tensors = _gqa(config) | _two_norms(config) | {"block_sparse_moe.gate.weight": (experts, hidden)}
    for expert in range(experts):
        shapes = {"w1": (columns, hidden), "w2": (hidden, columns), "w3": (columns, hidden)}
        tensors |= {f"block_sparse_moe.experts.{expert}.{name}.weight": shape for name, shape in shapes.items()}
    return tensors


def _gpt_oss(config, layer):
    hidden, experts, columns = config["hidden_size"], config["num_local_experts"], config["intermediate_size"]
    tensors = _gqa(config) | _two_norms(config) | {"self_attn.sinks": (config["num_attention_heads"],)}
    tensors |= {f"self_attn.{x}_proj.bias": tensors[f"self_attn.{x}_proj.weight"][:1] for x in "qkvo"}
    tensors |= {"mlp.router.weight": (experts, hidden), "mlp.router.bias": (experts,)}
    for expert in range(experts):  # parts of stacks
        shapes = {"gate_up_proj": (hidden, 2 * columns), "gate_up_proj_bias": (2 * columns,)}
        shapes |= {"down_proj": (columns, hidden), "down_proj_bias": (hidden,)}
        tensors |= {f"mlp.experts.{expert}.{name}": shape for name, shape in shapes.items()}
    return tensors


def _minimax_m2(config, layer):
    bias = {"block_sparse_moe.e_score_correction_bias": (config["num_local_experts"],)}
    return _mixtral(config, layer) | _norms_over_heads(config) | bias


def _phi3(config, layer):
    tensors, hidden = _llama(config, layer), config["hidden_size"]
    rows = sum(tensors.pop(f"self_attn.{x}_proj.weight")[0] for x in "qkv")
    columns = tensors.pop("mlp.gate_proj.weight")[0] + tensors.pop("mlp.up_proj.weight")[0]
    return tensors | {"self_attn.qkv_proj.weight": (rows, hidden), "mlp.gate_up_proj.weight": (columns, hidden)}


def _olmo2(config, layer):
    hidden = config["hidden_size"]
    norms = {f"post_{name}_layernorm.weight": (hidden,) for name in ("attention", "feedforward")}
    return _gqa(config) | norms | _norms_over_heads(config) | _mlp("mlp", hidden, config["intermediate_size"])


def _gemma3_text(config, layer):
    norms = {f"{x}_feedforward_layernorm.weight": (config["hidden_size"],) for x in ("pre", "post")}
    return _qwen3(config, layer) | norms


def _pangu_embedded(config, layer):
    tensors = _llama(config, layer)
    return tensors | {f"self_attn.{x}_proj.bias": tensors[f"self_attn.{x}_proj.weight"][:1] for x in "qkvo"}


def _norms_over_heads(config):
    tensors = _gqa(config)
    return {f"self_attn.{x}_norm.weight": tensors[f"self_attn.{x}_proj.weight"][:1] for x in "qk"}


_LAYERS = {
    "llama": _llama,
    "mistral": _llama,
    "ministral": _llama,
    "ministral3": _llama,
    "smollm3": _llama,
    "phi3": _phi3,
    "olmo2": _olmo2,
    "olmo3": _olmo2,
    "gemma3_text": _gemma3_text,
    "PanguEmbedded": _pangu_embedded,
    "glm4_moe": _glm4_moe,
    "mixtral": _mixtral,
    "minimax_m2": _minimax_m2,
    "gpt_oss": _gpt_oss,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "deepseek_v3": _deepseek_v3,
    "glm4_moe_lite": _deepseek_v3,
    "kimi_k2": _deepseek_v3,
    "deepseek_v32": _deepseek_v32,
    "glm_moe_dsa": _deepseek_v32,
    "pangu_ultra_moe": _pangu_ultra_moe,
}


def _two_norms(config):
    return {f"{name}_layernorm.weight": (config["hidden_size"],) for name in ("input", "post_attention")}


def _gqa(config):
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim", hidden // heads)
    key_value = config["num_key_value_heads"] * head
    return {
        "self_attn.q_proj.weight": (heads * head, hidden),
        "self_attn.k_proj.weight": (key_value, hidden),
        "self_attn.v_proj.weight": (key_value, hidden),
        "self_attn.o_proj.weight": (hidden, heads * head),
    }


def _mla(config, query_rank, rank, content, rope, value):
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    queries = {
        "self_attn.q_a_proj.weight": (query_rank, hidden),
        "self_attn.q_a_layernorm.weight": (query_rank,),
        "self_attn.q_b_proj.weight": (heads * (content + rope), query_rank),
    }
    if query_rank is None:
        queries = {"self_attn.q_proj.weight": (heads * (content + rope), hidden)}
    return queries | {
        "self_attn.kv_a_proj_with_mqa.weight": (rank + rope, hidden),
        "self_attn.kv_a_layernorm.weight": (rank,),
        "self_attn.kv_b_proj.weight": (heads * (content + value), rank),
        "self_attn.o_proj.weight": (hidden, heads * value),
    }


def _mlp(prefix, hidden, columns):
    return {
        f"{prefix}.gate_proj.weight": (columns, hidden),
        f"{prefix}.up_proj.weight": (columns, hidden),
        f"{prefix}.down_proj.weight": (hidden, columns),
    }


def _shared_and_routed(config, routed, shared):
    hidden, columns = config["hidden_size"], config["moe_intermediate_size"]
    tensors = {"mlp.gate.weight": (routed, hidden)} | _mlp("mlp.shared_experts", hidden, columns * shared)
    for expert in range(routed):
        tensors |= _mlp(f"mlp.experts.{expert}", hidden, columns)
    return tensors
