"""A small DeepSeek model with a multi-token-prediction layer, and its losses by modules of transformers."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from tests.helpers import tiny

NUM_LAYERS = 5
_PREFIX = f"model.layers.{NUM_LAYERS}."


def make_model(folder: Path, **changed: Any) -> Path:
    """Save a model and its tokenizer. The MTP layer's transformer layer is the last one of a longer model, which is
    saved in ``longer`` beside it.

    Args:
        changed: settings of the config in place of `tiny`'s own.
    """
    model_type, settings = tiny.MOE_FAMILIES["deepseek_v3"]
    settings = settings | changed | {"num_hidden_layers": NUM_LAYERS + 1}
    generator = torch.Generator().manual_seed(3)
    longer = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in longer.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.1 * noise)
    longer.save_pretrained(folder / "longer")
    tensors = tiny.read_tensors(folder / "longer")
    hidden = settings["hidden_size"]
    norms = ("enorm.weight", "hnorm.weight", "shared_head.norm.weight")
    tensors |= {_PREFIX + name: 1 + 0.2 * torch.randn(hidden, generator=generator) for name in norms}
    tensors[_PREFIX + "eh_proj.weight"] = 0.1 * torch.randn(hidden, 2 * hidden, generator=generator)
    tensors[_PREFIX + "embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[_PREFIX + "shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "longer" / "config.json").read_text())
    counts = {"num_hidden_layers": NUM_LAYERS, "num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(config | counts))
    tiny.make_tokenizer().save_pretrained(folder)
    return folder


class Reference:
    """The model without some layers, and its MTP layer, as modules of transformers."""

    def __init__(self, folder: Path, kept: list[int]) -> None:
        own = tiny.read_tensors(folder)
        self.model, ahead = tiny.load_hf(folder / "longer"), tiny.load_hf(folder / "longer").model
        self.model.model.layers = torch.nn.ModuleList([self.model.model.layers[layer] for layer in kept])
        ahead.layers = ahead.layers[NUM_LAYERS:]
        ahead.norm.weight.data = own[_PREFIX + "shared_head.norm.weight"].clone()
        self._ahead = ahead
        self._norms = [type(ahead.norm)(len(ahead.norm.weight), eps=ahead.norm.variance_epsilon) for _ in range(2)]
        for norm, name in zip(self._norms, ("enorm", "hnorm"), strict=True):
            norm.weight.data = own[f"{_PREFIX}{name}.weight"].clone()
        self._proj = torch.nn.Parameter(own[_PREFIX + "eh_proj.weight"].clone())

    def losses(self, batches: list) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean cross-entropy of the model's predictions and of the MTP layer's."""
        sums, counts = torch.zeros(2), torch.zeros(2)
        for batch in batches:
            states = self.model.model(batch.tokens, use_cache=False).last_hidden_state
            # the batch's labels are its next tokens
            embedded = self.model.model.embed_tokens(batch.labels)
            joined = torch.cat([self._norms[0](embedded), self._norms[1](states)], dim=-1) @ self._proj.t()
            ahead = self._ahead(inputs_embeds=joined, use_cache=False).last_hidden_state
            for which, (found, shift) in enumerate([(states, 0), (ahead, 1)]):
                length = batch.tokens.shape[1] - shift
                logits, labels = self.model.lm_head(found[:, :length]), batch.labels[:, shift:]
                mask = batch.loss_mask[:, shift:]
                each = cross_entropy(logits.transpose(1, 2), labels, reduction="none") * mask
                sums[which], counts[which] = sums[which] + each.sum(), counts[which] + mask.sum()
        own, further = sums / counts
        return own, further

    def grad_norm(self) -> float:
        """Return the norm of the gradients that `losses` have left."""
        layer, norm = self._ahead.layers.parameters(), self._ahead.norm.parameters()
        ahead = [*layer, *norm, *self._norms[0].parameters(), *self._norms[1].parameters(), self._proj]
        grads = [p.grad.norm() for p in (*self.model.parameters(), *ahead) if p.grad is not None]
        return torch.stack(grads).norm().item()
