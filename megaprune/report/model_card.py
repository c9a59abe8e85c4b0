"""The model card (README.md) of a pruned model: writing it, and reading its window length."""

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from megaprune.report.run_report import Report, ideal_speedup, loss_recovered, measured_losses, perplexity
from megaprune.utils.text import number_ranges

CARD_NAME = "README.md"


def model_card(
    report: Report, *, source_name: str, command: str, license: str | None = None, adapter: bool = False
) -> str:
    """Return the model card of the pruned model, a README.md with Hugging Face's YAML front matter.

    Args:
        report: report.json's contents.
        source_name: the source model's hub id, or the path of its folder; only the folder's name is shown.
        command: the command line that made the model.
        license: the source's license identifier, where known; a pruned model inherits it.
        adapter: whether a LoRA adapter was trained, which is not part of the model.
    """
    base_model = _public_name(source_name)
    front_matter = yaml.safe_dump(
        _metadata(report, base_model, license), sort_keys=False, default_flow_style=None, width=100
    )
    before = report.num_layers + len(report.pruned_layers)
    return f"""---
{front_matter}---

# {base_model}, pruned to {report.num_layers} of {before} layers

This model is `{base_model}` without {len(report.pruned_layers)} of its transformer layers.
They were chosen with the method `{report.method}` of megaprune, which then removed them and
{_training_clause(report, adapter)}. It is an ordinary checkpoint of its architecture and needs no special code:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/model")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/model")
```

## What changed

| | source | pruned |
| --- | ---: | ---: |
| layers | {before} | {report.num_layers} |
| parameters | {report.params_before:,} | {report.params_after:,} |
{_mixture_rows(report)}
- kept layers (source indices, from 0): {number_ranges(report.kept_layers)}
- removed layers: {number_ranges(report.pruned_layers)}
- ideal speed-up, if time were spent in layers alone: {ideal_speedup(report):.2f}x
{_quality(report, adapter)}
## How it was made

- training tokens: {report.tokens_seen:,}, in windows of {report.seq_length:,}
- seed: {report.seed}
- versions: {", ".join(f"{name} {version}" for name, version in report.versions.items())}

```bash
{command}
```
"""


def read_seq_length(hf_dir: str | Path) -> int | None:
    """Return `megaprune.seq_length` from the card of the model in `hf_dir`: the window length of its training.

    None if there is no card, or none that megaprune wrote.
    """
    card = Path(hf_dir) / CARD_NAME
    if not card.is_file():
        return None
    match = re.match(r"---\r?\n(.*?\n)---\s*$", card.read_text(errors="replace"), re.DOTALL | re.MULTILINE)
    try:
        metadata = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return None
    ours = metadata.get("megaprune") if isinstance(metadata, dict) else None
    seq_length = ours.get("seq_length") if isinstance(ours, dict) else None
    return seq_length if isinstance(seq_length, int) and seq_length > 0 else None


def _public_name(source_name: str) -> str:
    """Return a hub id unchanged, and only the last part of a local path: the rest is private."""
    path = Path(source_name)
    try:
        validate_repo_id(source_name)
    except HFValidationError:
        return path.resolve().name
    return path.resolve().name if path.is_dir() else source_name


def _metadata(report: Report, base_model: str, license: str | None) -> dict[str, Any]:
    return {
        **({"license": license} if license else {}),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": base_model,
        "tags": ["megaprune", "layer-pruning"],
        "megaprune": {
            "method": report.method,
            "kept_layers": report.kept_layers,
            "seq_length": report.seq_length,
        },
    }


def _training_clause(report: Report, adapter: bool) -> str:
    if adapter:
        return f"trained a LoRA adapter on {report.tokens_seen:,} tokens, which is not part of these weights"
    if report.tokens_seen:
        return f"trained the model on {report.tokens_seen:,} tokens"
    return "left all remaining weights unchanged"


def _mixture_rows(report: Report) -> str:
    """Rows with the change of a model with experts by kind of layer; nothing for a dense model."""
    before, after = report.layer_kinds_before, report.layer_kinds_after
    if not before["moe"]:
        return ""
    return f"""| dense layers | {before["dense"]} | {after["dense"]} |
| MoE layers | {before["moe"]} | {after["moe"]} |
| parameters active in a token | {report.active_params_before:,} | {report.active_params_after:,} |
"""


def _quality(report: Report, adapter: bool) -> str:
    losses = measured_losses(report.valid)
    if not losses:
        return ""
    recovered = "this model with its adapter" if adapter else "this model"
    names = {
        "teacher": "source",
        "pruned": "pruned, before recovery",
        "stitched": "stitched, before recovery",
        "recovered": recovered,
    }
    if "recovered" not in losses:
        names["pruned"] = "this model"
    share = loss_recovered(report)
    regained = [] if share is None else ["", f"Recovery regained {share:.1%} of the loss that pruning cost."]
    rows = [f"| {names[name]} | {loss:.4f} | {perplexity(loss):,.2f} |" for name, loss in losses.items()]
    return "\n".join(
        [
            "",
            "## Quality",
            "",
            f"Next-token cross-entropy on held-out text, windows of {report.seq_length:,} tokens.",
            "",
            "| model | loss (nats) | perplexity |",
            "| --- | ---: | ---: |",
            *rows,
            *regained,
            "",
        ]
    )
