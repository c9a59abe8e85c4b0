"""The gradient of a half-open gate, against the exact effect of removal, on the demo's trained teacher."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from megaprune.distillation.teachers import vocab_shard
from megaprune.importance.measures import mask_gradient, mask_losses
from megaprune.mcore.builder import EngineOptions, build_model
from megaprune.mcore.hf_weights import import_weights
from megaprune.mcore.layers.gated import LayerGate
from megaprune.mcore.parallel import ParallelSizes
from megaprune.selection.measured_topk import PROBE
from megaprune.weights.source import HFSource
from tests.helpers import tiny

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_process")]

DEMO = Path(__file__).parents[2] / "examples" / "demo"
GONE = [4, 6, 7, 8, 9, 10, 11, 13]
KEPT = [1, 2, 3, 5, 12, 14]


def rank_correlation(found, expected):
    ranks = torch.stack([value.argsort().argsort().double() for value in (found, expected)])
    return torch.corrcoef(ranks)[0, 1].item()


def test_half_open_gates_measure_the_effect_of_removal():
    source, gate = HFSource(DEMO / "teacher"), LayerGate()
    arch = source.family.architecture(source.config)
    model = build_model(arch, [arch.num_layers], EngineOptions(ParallelSizes()), gate)
    import_weights(model, source)
    tokenizer, shard = AutoTokenizer.from_pretrained(DEMO / "teacher"), vocab_shard(arch)
    texts = [json.loads(line)["text"] for line in (DEMO / "valid.jsonl").read_text().splitlines()]
    long = [ids for ids in (tokenizer(text).input_ids for text in texts) if len(ids) > 128]
    batch = tiny.make_batch(torch.tensor([ids[:129] for ids in long[:6]]))

    mask = torch.ones(arch.num_layers)
    mask[GONE] = 0
    toggled = mask.repeat(arch.num_layers, 1)
    toggled.diagonal().sub_(1).abs_()
    half_open = mask.repeat(arch.num_layers, 1)
    half_open.diagonal().fill_(PROBE)
    base, *losses = mask_losses(model, gate, [batch], torch.cat([mask[None], toggled]), shard, "kl")
    exact = (torch.stack(losses) - base) * (2 * mask - 1)  # the loss without the layer, less the loss with it
    found = torch.tensor([-mask_gradient(model, gate, [batch], row, shard)[1][i] for i, row in enumerate(half_open)])
    straight = -mask_gradient(model, gate, [batch], mask, shard)[1]

    assert rank_correlation(found[KEPT], exact[KEPT]) >= 0.8
    assert rank_correlation(found[GONE], exact[GONE]) >= 0.8
    assert found[KEPT].mean() == pytest.approx(exact[KEPT].mean().item(), rel=0.15)
    assert found[GONE].mean() == pytest.approx(exact[GONE].mean().item(), rel=0.15)
    # the gradient where the gates are underestimates kept layers, and overestimates removed ones
    assert straight[KEPT].mean() < 0.5 * exact[KEPT].mean()
    assert straight[GONE].mean() > 1.2 * exact[GONE].mean()
