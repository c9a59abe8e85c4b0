"""The model card (README.md) of a pruned model: writing it, and reading its window length."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megaprune.report.card_results import loss_results, model_index
from megaprune.report.front_matter import CARD_NAME, join_card, read_front_matter
from megaprune.report.public_names import is_hub_id, public_name, without_paths
from megaprune.report.run_report import Report, ideal_speedup, loss_recovered, measured_losses, perplexity
from megaprune.utils.text import number_ranges

__all__ = ["CARD_NAME", "MADE", "model_card", "read_seq_length"]

# The section that the command stands in, always the last one.
MADE = "## How it was made\n"


def model_card(
    report: Report,
    *,
    source_name: str,
    command: str,
    license: str | None = None,
    source_card: Mapping[str, Any] | None = None,
    adapter: bool = False,
) -> str:
    """Return the model card of the pruned model, a README.md with Hugging Face's YAML front matter.

    Args:
        report: report.json's contents.
        source_name: the source model's hub id, or the path of its folder; only the folder's name is shown.
        command: the command line that made the model; of local paths in it, only the last parts are shown.
        license: a license identifier; it replaces that of `source_card`.
        source_card: fields of the source's card that a pruned model inherits (`front_matter.inherited`).
        adapter: whether a LoRA adapter was trained, which is not part of the model.
    """
    base_model = public_name(source_name)
    before = report.num_layers + len(report.pruned_layers)
    own = {"license": license} if license else dict(source_card or {})
    text = f"""
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
{MADE}
- training tokens: {report.tokens_seen:,}, in windows of {report.seq_length:,}
- seed: {report.seed}
- versions: {", ".join(f"{name} {version}" for name, version in report.versions.items())}

```bash
{without_paths(command)}
```
"""
    return join_card(own | _metadata(report, base_model, adapter), text)


def read_seq_length(hf_dir: str | Path) -> int | None:
    """Return `megaprune.seq_length` from the card of the model in `hf_dir`: the window length of its training.

    None if there is no card, or none that megaprune wrote.
    """
    ours = read_front_matter(hf_dir).get("megaprune")
    seq_length = ours.get("seq_length") if isinstance(ours, dict) else None
    return seq_length if isinstance(seq_length, int) and seq_length > 0 else None


def _metadata(report: Report, base_model: str, adapter: bool) -> dict[str, Any]:
    losses = measured_losses(report.valid)
    untrained = losses.get("stitched", losses.get("pruned"))
    last = untrained if adapter else losses.get("recovered", untrained)
    results = [] if last is None else loss_results(last, report.seq_length)
    name = f"{base_model.rpartition('/')[2]}-{report.num_layers}-layers"
    return {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        # the hub refuses a card whose base model is not one of its own
        **({"base_model": base_model, "base_model_relation": "finetune"} if is_hub_id(base_model) else {}),
        "tags": ["megaprune", "layer-pruning"],
        "megaprune": {
            "method": report.method,
            "kept_layers": report.kept_layers,
            "seq_length": report.seq_length,
        },
        **({"model-index": model_index(name, results)} if results else {}),
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
