"""openPangu-Ultra-MoE, for which transformers has no class: a tiny random checkpoint and a reference implementation.

The reference is plain PyTorch on a checkpoint's names, written from the published architecture. It shares nothing
with the tables and layers under test.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

CONFIG = dict(
    model_type="pangu_ultra_moe",
    architectures=["PanguUltraMoEForCausalLM"],
    auto_map={
        "AutoConfig": "configuration_openpangu_moe.PanguUltraMoEConfig",
        "AutoModelForCausalLM": "modeling_openpangu_moe.PanguUltraMoEForCausalLM",
    },
    vocab_size=331,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=5,
    num_dense_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    attention_q_lora_dim=24,
    attention_kv_lora_dim=16,
    attention_qk_dim=16,
    attention_qk_rope_dim=8,
    attention_v_dim=12,
    num_routed_experts=8,
    num_experts_per_tok=2,
    num_shared_experts=1,
    moe_intermediate_size=40,
    routed_scaling_factor=2.5,
    num_mtp_layers=0,
    sandwich_norm=True,
    hidden_act="silu",
    rms_norm_eps=1e-5,
    rope_theta=25600000.0,
    max_position_embeddings=256,
    tie_word_embeddings=False,
    torch_dtype="float32",
)
REMOTE_CODE = ("configuration_openpangu_moe.py", "modeling_openpangu_moe.py")


def make_checkpoint(folder: Path, dtype: torch.dtype = torch.float32, config: dict = CONFIG) -> Path:
    """Save a random model, with placeholder files for its remote code."""
    folder.mkdir(parents=True)
    c, generator = config, torch.Generator().manual_seed(0)
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    nope, rope, value = c["attention_qk_dim"], c["attention_qk_rope_dim"], c["attention_v_dim"]
    shapes = {"model.embed_tokens.weight": (c["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    shapes["lm_head.weight"] = (c["vocab_size"], hidden)

    def mlp(prefix: str, size: int) -> None:
        shapes[f"{prefix}.gate_proj.weight"] = shapes[f"{prefix}.up_proj.weight"] = (size, hidden)
        shapes[f"{prefix}.down_proj.weight"] = (hidden, size)

    for layer in range(c["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        sandwiched = ("pre_mlp", "post_mlp") if c.get("sandwich_norm") else ()
        for norm in ("input", "post_attention", *sandwiched):
            shapes[f"{at}.{norm}_layernorm.weight"] = (hidden,)
        shapes[f"{at}.self_attn.q_a_proj.weight"] = (c["attention_q_lora_dim"], hidden)
        shapes[f"{at}.self_attn.q_a_layernorm.weight"] = (c["attention_q_lora_dim"],)
        shapes[f"{at}.self_attn.q_b_proj.weight"] = (heads * (nope + rope), c["attention_q_lora_dim"])
        shapes[f"{at}.self_attn.kv_a_proj_with_mqa.weight"] = (c["attention_kv_lora_dim"] + rope, hidden)
        shapes[f"{at}.self_attn.kv_a_layernorm.weight"] = (c["attention_kv_lora_dim"],)
        shapes[f"{at}.self_attn.kv_b_proj.weight"] = (heads * (nope + value), c["attention_kv_lora_dim"])
        shapes[f"{at}.self_attn.o_proj.weight"] = (hidden, heads * value)
        if layer < c["num_dense_layers"]:
            mlp(f"{at}.mlp", c["intermediate_size"])
            continue
        shapes[f"{at}.mlp.gate.weight"] = (c["num_routed_experts"], hidden)
        if c.get("router_enable_expert_bias"):
            shapes[f"{at}.mlp.e_score_correction_bias"] = (c["num_routed_experts"],)
        mlp(f"{at}.mlp.shared_experts", c["moe_intermediate_size"] * c["num_shared_experts"])
        for expert in range(c["num_routed_experts"]):
            mlp(f"{at}.mlp.experts.{expert}", c["moe_intermediate_size"])
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        scale = 0.3 if "embed" in name or "lm_head" in name or "mlp.gate.weight" in name else 0.1
        tensors[name] = (1 + 0.2 * noise if "norm" in name else scale * noise).to(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(c, indent=2))
    for name in REMOTE_CODE:
        (folder / name).write_text("raise RuntimeError('remote code must not run unasked')\n")
    return folder


@torch.no_grad()
def logits(folder: Path, tokens: Tensor) -> Tensor:
    """Return the logits [b, s, vocab] of tokens [b, s], in fp32."""
    config = json.loads((folder / "config.json").read_text())
    weights: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        weights |= {name: tensor.float() for name, tensor in load_file(path).items()}
    x = weights["model.embed_tokens.weight"][tokens]
    for layer in range(config["num_hidden_layers"]):
        own = {n.removeprefix(p): t for n, t in weights.items() if n.startswith(p := f"model.layers.{layer}.")}

        def norm(name: str, y: Tensor, own: dict[str, Tensor] = own) -> Tensor:
            return _rms_norm(y, own[f"{name}_layernorm.weight"], config)

        attended = _attention(norm("input", x), own, config)
        feed_forward = _mlp if layer < config["num_dense_layers"] else _experts
        if config.get("sandwich_norm"):
            x = x + norm("post_attention", attended)
            x = x + norm("post_mlp", feed_forward(norm("pre_mlp", x), own, "mlp.", config))
        else:
            x = x + attended
            x = x + feed_forward(norm("post_attention", x), own, "mlp.", config)
    return _rms_norm(x, weights["model.norm.weight"], config) @ weights["lm_head.weight"].T


def _rms_norm(x: Tensor, weight: Tensor, config: dict) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).rsqrt() * weight


def _attention(x: Tensor, own: dict[str, Tensor], config: dict) -> Tensor:
    batch, length, _ = x.shape
    heads, latent = config["num_attention_heads"], config["attention_kv_lora_dim"]
    nope, rope, value = (config[f"attention_{name}_dim"] for name in ("qk", "qk_rope", "v"))
    queries = _rms_norm(x @ own["self_attn.q_a_proj.weight"].T, own["self_attn.q_a_layernorm.weight"], config)
    queries = (queries @ own["self_attn.q_b_proj.weight"].T).view(batch, length, heads, nope + rope)
    compressed = x @ own["self_attn.kv_a_proj_with_mqa.weight"].T
    shared_key = _rotate(compressed[..., latent:].unsqueeze(2), config)
    compressed = _rms_norm(compressed[..., :latent], own["self_attn.kv_a_layernorm.weight"], config)
    expanded = (compressed @ own["self_attn.kv_b_proj.weight"].T).view(batch, length, heads, nope + value)
    queries = torch.cat([queries[..., :nope], _rotate(queries[..., nope:], config)], -1)
    keys = torch.cat([expanded[..., :nope], shared_key.expand(-1, -1, heads, -1)], -1)
    scores = torch.einsum("bqhd,bkhd->bhqk", queries, keys) * (nope + rope) ** -0.5
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    shares = scores.masked_fill(future, -torch.inf).softmax(-1)
    mixed = torch.einsum("bhqk,bkhd->bqhd", shares, expanded[..., nope:]).flatten(2)
    return mixed @ own["self_attn.o_proj.weight"].T


def _rotate(x: Tensor, config: dict) -> Tensor:
    """Rotate neighboring pairs of x, [b, s, heads, d], by the angles of their positions, as complex numbers."""
    size = x.shape[-1]
    theta = config["rope_theta"] if "rope_theta" in config else config["rope_parameters"]["rope_theta"]
    frequencies = theta ** (-torch.arange(0, size, 2) / size)
    angles = torch.arange(x.shape[1])[:, None] * frequencies
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(
        torch.ones_like(angles), angles
    ).unsqueeze(1)
    return torch.view_as_real(turned).flatten(-2)


def _mlp(x: Tensor, own: dict[str, Tensor], prefix: str, config: dict) -> Tensor:
    gate, up = (x @ own[f"{prefix}{name}_proj.weight"].T for name in ("gate", "up"))
    return (F.silu(gate) * up) @ own[f"{prefix}down_proj.weight"].T


def _experts(x: Tensor, own: dict[str, Tensor], prefix: str, config: dict) -> Tensor:
    scores = (x @ own[f"{prefix}gate.weight"].T).sigmoid()
    biased = scores + own[bias] if (bias := f"{prefix}e_score_correction_bias") in own else scores
    chosen = biased.topk(config["num_experts_per_tok"]).indices
    best = scores.gather(-1, chosen)
    weights = torch.zeros_like(scores).scatter(-1, chosen, best / best.sum(-1, keepdim=True))
    total = _mlp(x, own, f"{prefix}shared_experts.", config)
    for expert in range(config["num_routed_experts"]):
        share = config["routed_scaling_factor"] * weights[..., expert : expert + 1]
        total = total + share * _mlp(x, own, f"{prefix}experts.{expert}.", config)
    return total
