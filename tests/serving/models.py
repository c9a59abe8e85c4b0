"""Tiny models of every family, of sizes that vLLM's CPU backend takes."""

import json
import shutil
from pathlib import Path
from typing import Any

from tests.helpers import pangu, tiny

# Heads of 32, the least that the backend's attention takes, and experts of a multiple of 32.
_HEADS = dict(hidden_size=128, num_attention_heads=4, head_dim=32)
EXPERTS = dict(moe_intermediate_size=64)
# The backend's latent attention has one size: a latent of 512 and 64 dimensions with RoPE, as DeepSeek's.
LATENT = dict(hidden_size=128, q_lora_rank=64, kv_lora_rank=512, qk_nope_head_dim=64, qk_rope_head_dim=64)
LATENT |= dict(v_head_dim=64)
_PANGU_NAMES = {
    "attention_q_lora_dim": "q_lora_rank",
    "attention_kv_lora_dim": "kv_lora_rank",
    "attention_qk_dim": "qk_nope_head_dim",
    "attention_qk_rope_dim": "qk_rope_head_dim",
    "attention_v_dim": "v_head_dim",
}
# In place of the code that comes with openPangu: a config that holds what config.json says.
_PANGU_CODE = """from transformers import PretrainedConfig


class PanguUltraMoEConfig(PretrainedConfig):
    model_type = "pangu_ultra_moe"
"""
PANGU, KIMI = pangu.CONFIG["model_type"], "kimi_k2"
FAMILIES = (*tiny.FAMILIES, *tiny.MOE_FAMILIES, KIMI, PANGU)


def make_model(folder: Path, family: str) -> Path:
    """Save a random model and its tokenizer."""
    if family == PANGU:
        settings: dict[str, Any] = {theirs: LATENT[ours] for theirs, ours in _PANGU_NAMES.items()}
        # what vLLM reads, and the family's pruned models have
        settings |= LATENT | EXPERTS | dict(n_routed_experts=8, n_shared_experts=1, first_k_dense_replace=2)
        tiny.make_model(folder, family, **settings, norm_topk_prob=True, num_nextn_predict_layers=0)
        (folder / pangu.REMOTE_CODE[0]).write_text(_PANGU_CODE)
        return folder
    base = "deepseek_v3" if family == KIMI else family
    if base in tiny.FAMILIES:
        return tiny.make_model(folder, base, **_HEADS)
    tiny.make_model(folder, base, **EXPERTS, **(LATENT if base == "deepseek_v3" else _HEADS))
    if base == "deepseek_v3":  # as the makers' own config.json has them; transformers writes neither
        edit_config(folder, model_type=family, topk_method="noaux_tc", scoring_func="sigmoid")
    return folder


def as_transformers_reads_it(folder: Path) -> Path:
    """Return the folder, or for Kimi-K2, which transformers has no class for, a copy as the DeepSeek-V3 that it is."""
    if json.loads((folder / "config.json").read_text())["model_type"] != KIMI:
        return folder
    copy = folder.with_name(f"{folder.name}-as-deepseek")
    shutil.copytree(folder, copy)
    edit_config(copy, model_type="deepseek_v3")
    return copy


def edit_config(folder: Path, **changed: Any) -> None:
    """Change settings in config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text()) | changed
    kept = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept, indent=2))
