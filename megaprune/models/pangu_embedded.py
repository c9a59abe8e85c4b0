"""openPangu-Embedded (``model_type: PanguEmbedded``): Llama's layers with a bias on query, key, value and output.

config.json calls the bias ``bias``, as the model's own code does, or ``attention_bias``, as vLLM does.
"""

from dataclasses import replace

from megaprune.models.gqa import dense_layer_rules, gqa_architecture
from megaprune.models.settings import HFConfig, flag
from megaprune.models.tables import MODEL_RULES, Architecture, Family
from megaprune.models.windows import no_windows
from megaprune.utils.errors import MegapruneError

_SPELLINGS = ("bias", "attention_bias")


def _architecture(config: HFConfig) -> Architecture:
    name, said = config.get("model_type"), {key: flag(config, key, False) for key in _SPELLINGS if key in config}
    if len(set(said.values())) > 1:
        raise MegapruneError(
            f"{name}: 'bias' and 'attention_bias' in config.json are one setting, but hold {said['bias']!r} and "
            f"{said['attention_bias']!r}"
        )
    if not said:
        raise MegapruneError(f"{name}: config.json lacks the key 'bias', which says whether attention has biases")
    arch = gqa_architecture(config, max_positions=32768, **no_windows(config))
    return replace(arch, output_bias=any(said.values()), mlp_bias=flag(config, "mlp_bias", False))


FAMILY = Family(
    model_type="PanguEmbedded",
    describe=_architecture,
    model_rules=MODEL_RULES,
    layer_rules=dense_layer_rules,
    stacks_experts=False,
    ignored=(r"rotary_emb\.inv_freq$",),
)
