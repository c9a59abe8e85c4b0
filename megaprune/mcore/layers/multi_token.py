"""Multi-token prediction (DeepSeek-V3): layers after the model that predict the tokens after the next one."""

import copy
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megaprune.mcore.layers.local import RMSNorm


class LogitsModel(GPTModel):
    """GPT model that returns logits [s, b, vocab / tp] when it is given labels; the loss is computed outside.

    Without labels, the core's model would copy the logits to [b, s, vocab / tp]. While `predicts_ahead` is set, the
    logits of the MTP layers follow along the first dimension: [(1 + MTP layers) x s, b, vocab / tp].
    """

    predicts_ahead = False

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits unchanged."""
        return logits

    def _postprocess(self, hidden_states: torch.Tensor, **given: Any) -> torch.Tensor:
        """Return the logits on the last stage. The core's own method would compute the losses of MTP layers as means
        over each micro-batch.
        """
        if not self.mtp_process:
            return super()._postprocess(hidden_states, **given)
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        if not self.predicts_ahead:
            return self.output_layer(hidden_states, weight=weight)[0]
        passed = ("input_ids", "position_ids", "attention_mask", "rotary_pos_emb", "rotary_pos_cos", "rotary_pos_sin")
        states = self.mtp(hidden_states=hidden_states, embedding=self.embedding, **{key: given[key] for key in passed})
        return torch.cat([self.output_layer(part, weight=weight)[0] for part in states.chunk(1 + len(self.mtp.layers))])


def layer_within(mtp_layer: torch.nn.Module) -> Any:
    """Return the transformer layer of an MTP layer. The attribute has another name from 0.17 on."""
    return mtp_layer.mtp_model_layer if hasattr(mtp_layer, "mtp_model_layer") else mtp_layer.transformer_layer


def mtp_spec(
    config: TransformerConfig, layers: TransformerBlockSubmodules, transformer_engine: bool
) -> MultiTokenPredictionBlockSubmodules | None:
    """Return the spec of the MTP layers, which are on the last pipeline stage; None on other stages.

    Args:
        layers: spec whose last layer is that of the MTP layers.
    """
    spec = copy.deepcopy(get_gpt_mtp_block_spec(config, layers, transformer_engine)) if config.mtp_num_layers else None
    for layer in spec.layer_specs if spec is not None and not transformer_engine else ():
        layer.submodules.enorm = layer.submodules.hnorm = layer.submodules.layer_norm = RMSNorm
    return spec
