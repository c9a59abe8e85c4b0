"""Steps on artificial gradients."""

import hashlib
from collections.abc import Iterator, Sequence

import torch

from megaprune.mcore.optimizer import Trainer


def parameters(trainer: Trainer, kept: Sequence[int] | None = None) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield the parameters under their names in the source model."""
    for name, parameter in trainer.model.named_parameters():
        if kept is not None and name.startswith("decoder.layers."):
            words = name.split(".")
            words[2] = str(kept[int(words[2])])
            name = ".".join(words)
        yield name, parameter


def step(trainer: Trainer, iteration: int, kept: Sequence[int] | None = None) -> None:
    """Take a step on artificial gradients, which are the same for a parameter of the source in any model."""
    trainer.zero_grad()
    for name, parameter in parameters(trainer, kept):
        seed = int.from_bytes(hashlib.sha256(f"{name} {iteration}".encode()).digest()[:4], "little")
        parameter.main_grad.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    trainer.step(iteration)
