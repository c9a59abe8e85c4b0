"""LoRA runs on any number of processes."""

import hashlib
from collections import defaultdict
from typing import Any

import tiny
import torch
import torch.distributed as dist

from megaprune.mcore.lora import adapted_layers
from megaprune.mcore.weights_io import global_name
from megaprune.training.models import Models


def prune(argv: list[str]) -> None:
    """A run to its end. Fails where ranks differ in what they both hold of the adapters when training ends."""
    merge_and_round = Models.merge_and_round

    def checked(self: Models, student: Any, kept: Any) -> None:
        assert_copies_are_identical(student.model)
        merge_and_round(self, student, kept)

    Models.merge_and_round = checked
    try:
        tiny.run_here(argv)
    finally:
        Models.merge_and_round = merge_and_round


def assert_copies_are_identical(model: torch.nn.Module) -> None:
    """Ranks that hold the same adapter, or the same shard of it, hold the same bits."""
    held = {}
    for name, layer in adapted_layers(model).items():
        for which, cut in (("lora_a", layer.cut_a), ("lora_b", not layer.cut_a)):
            shard = layer.tp_group.rank() if cut else "whole"
            data = getattr(layer, which).detach().numpy().tobytes()
            held[global_name(name, model), which, shard] = hashlib.sha256(data).hexdigest()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, held)
    digests = defaultdict(set)
    for rank in everyone:
        for key, digest in rank.items():
            digests[key].add(digest)
    assert [key for key, found in digests.items() if len(found) > 1] == []
