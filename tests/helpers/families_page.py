"""docs/families.md, generated from the families' tables, published configs and plans:

python -m tests.helpers.families_page > docs/families.md
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaprune.cli.main import attempt
from megaprune.models import family_of
from megaprune.models.sizes import inventory
from tests.helpers.newer_configs import NEWER_DENSE
from tests.helpers.newer_moe_configs import NEWER_MOE
from tests.helpers.real_configs import DENSE, MOE

_GIB = 2**30
_WORLD = 64
_CONFIGS = DENSE | NEWER_DENSE | MOE | NEWER_MOE


@dataclass(frozen=True)
class Row:
    """A model of the page: a family's largest or best known, its division over 64 GPUs, and what is particular."""

    model: str
    tensor: int
    pipeline: int
    expert: int = 1
    notes: str = ""


ROWS = (
    Row("llama-3.1-8b", 4, 2, notes="biases of attention and MLP; SmolLM2"),
    Row("qwen2.5-14b", 4, 2, notes="windows after the first layers"),
    Row("qwen3-32b", 8, 2, notes="windows by layer"),
    Row("mistral-small-24b", 8, 2, notes="a window in all layers or none"),
    Row("ministral-8b", 4, 2, notes="windows by layer"),
    Row("ministral-3-14b", 4, 2, notes="YaRN; queries that grow with their position"),
    Row("phi-4", 2, 4, notes="fused projections; not with `longrope`"),
    Row("smollm3-3b", 2, 2, notes="layers without RoPE"),
    Row("olmo-2-7b", 4, 2, notes="norms after attention and MLP, q/k norm over all heads"),
    Row("olmo-3-32b", 8, 2, notes="the same, with windows by layer and two RoPEs"),
    Row("gemma-3-1b", 1, 2, notes="four norms, windows by layer and two RoPEs"),
    Row("openpangu-embedded-7b", 4, 2, notes="biases of attention, under both names"),
    Row("qwen3-30b-a3b", 2, 2, 8),
    Row("mixtral-8x7b", 4, 2, 8),
    Row("glm-4.5", 8, 4, 16, "q/k/v biases, RoPE on half of each head"),
    Row("glm-4.5-air", 8, 2, 16),
    Row("glm-4.7-flash", 4, 2, 8, "latent attention, list of MLP types"),
    Row("glm-5", 8, 8, 8, "sequences of up to 2,048 tokens (`index_topk`); the indexer is carried"),
    Row("minimax-m2", 8, 4, 16, "q/k norm over all heads, RoPE on half of each head"),
    Row("deepseek-r1", 8, 8, 8),
    Row("deepseek-v3.2", 8, 8, 8, "sequences of up to 2,048 tokens (`index_topk`); the indexer is carried"),
    Row("kimi-k2-thinking", 8, 8, 8, "also within Kimi-K2.5 (`kimi_k25`)"),
    Row("openpangu-ultra", 8, 8, 8, "sandwich norms; both spellings of config.json"),
)
_SOURCES = {
    "deepseek_v3": "bf16, FP8 in blocks",
    "deepseek_v32": "bf16, FP8 in blocks",
    "minimax_m2": "bf16, FP8 in blocks",
    "glm4_moe": "bf16, FP8 by rows",
    "glm4_moe_lite": "bf16, FP8 by rows",
    "glm_moe_dsa": "bf16, FP8 in blocks",
    "kimi_k2": "bf16, FP8 in blocks, INT4",
}
_HEAD = """# Families

This page is generated: `python -m tests.helpers.families_page > docs/families.md`.

Every family has the same tests on tiny random models: fp32 logits within 1e-4 of `transformers` (openPangu: of an \
independent reference) on one process, at TP 2 with sequence parallelism, at PP 2 and, with experts, at EP 2; an \
import and export that return every tensor bit for bit; a pruned export that loads in `transformers` with nothing \
missing or unexpected, equals the masked model, and generates with its cache as without. Published configs are \
checked at full size: exact parameters, and each tensor covered once before and after pruning.

Tensor, pipeline and sequence parallelism, LoRA and every method work with every family; expert parallelism with \
every family that has experts. Sources may be in bf16, fp16 or fp32; the table names quantized formats that are \
released. Any family may be stored in any of them.

A key of config.json that is not known and switches something on is refused, as is a value that can't be expressed. \
`mistral3` (Mistral Small 3.1 and later, Ministral 3) and `kimi_k25` are multimodal models: their language model is \
pruned, and the other parts are copied. gpt-oss (`gpt_oss`) is refused: attention sinks, biases of experts and MXFP4 \
are missing.

| model | `model_type` | layers | parameters | active | MTP | sources | particular |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""
_PLANS = """
## Plans on 64 GPUs

Memory is the largest of all ranks during a search that removes an eighth of the layers, in bf16, with LoRA of rank \
64, the self teacher, full recomputation, and 64 windows of 4,096 tokens (DeepSeek-V3.2: 2,048) an iteration. It is \
computed as `plan.py` does: see [planning](planning.md). Parameters are those of the model after the cut.

| model | TP | PP | EP | layers after | parameters after | GiB per GPU |
| --- | --- | --- | --- | --- | --- | --- |
"""
_RECIPE = """
## Recipes

The plan of a model is that of the run with the same flags. For GLM-4.5:

```bash
torchrun --nnodes 8 --nproc-per-node 8 tools/prune.py --hf-model GLM-4.5 --train-data train.jsonl --save runs/glm \\
    {flags}
```

| model | flags beside the model, the data and the folder |
| --- | --- |
"""


def page() -> str:
    """Return the page."""
    first, recipes = parts_without_plans()
    return first + _PLANS + "".join(map(plan_row, ROWS)) + recipes


def parts_without_plans() -> tuple[str, str]:
    """Return the parts before and after the plans."""
    glm = next(row for row in ROWS if row.model == "glm-4.5")
    recipes = "".join(f"| {row.model} | `{' '.join(_flags(row))}` |\n" for row in ROWS)
    return _HEAD + "".join(map(_row, ROWS)), _RECIPE.format(flags=" ".join(_flags(glm))) + recipes


def plan_row(row: Row) -> str:
    """Return a model's row of the plans."""
    plan = _planned(row)
    after = plan["phases"][-1]
    memory = max(stage["memory"]["total"] for phase in plan["phases"] for stage in phase["stages"])
    kept = len(after["kept_layers"])
    numbers = f"{row.tensor} | {row.pipeline} | {row.expert} | {kept} | {after['parameters']:,} | {memory / _GIB:.1f}"
    return f"| {row.model} | {numbers} |\n"


def _row(row: Row) -> str:
    config = _CONFIGS[row.model]
    family, size = family_of(config), inventory(config).size
    mtp = "kept, dropped or trained" if family.mtp_keys and config.get(family.mtp_keys[0]) else ""
    sources = _SOURCES.get(family.model_type, "bf16")
    kind = f"`{family.model_type}`"
    layers = config["num_hidden_layers"]
    return f"| {row.model} | {kind} | {layers} | {size.total:,} | {size.active:,} | {mtp} | {sources} | {row.notes} |\n"


def _flags(row: Row) -> list[str]:
    config = _CONFIGS[row.model]
    flags = {"--num-layers-to-prune": config["num_hidden_layers"] // 8}
    flags |= {
        name: size
        for name, size in (
            ("--tensor-model-parallel-size", row.tensor),
            ("--pipeline-model-parallel-size", row.pipeline),
            ("--expert-model-parallel-size", row.expert),
        )
        if size > 1
    }
    if row.expert > 1:
        flags["--expert-tensor-parallel-size"] = 1
    flags |= {"--seq-length": min(4096, config.get("index_topk", 4096)), "--global-batch-size": 64}
    flags |= {"--train-iters": 1000, "--lora-rank": 64, "--teacher": "self", "--recompute-granularity": "full"}
    switches = ["--bf16", *(["--sequence-parallel"] if row.tensor > 1 else [])]
    return [*(str(word) for pair in flags.items() for word in pair), *switches]


def _planned(row: Row) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(_CONFIGS[row.model]))
        output = Path(folder) / "plan.json"
        words = ["--hf-model", folder, "--world-size", str(_WORLD), *_flags(row), "--output", str(output)]
        done = attempt("plan", words)
        assert done == (0, None), done
        return json.loads(output.read_text())


if __name__ == "__main__":
    import contextlib
    import sys

    with contextlib.redirect_stdout(sys.stderr):
        text = page()
    sys.stdout.write(text)
