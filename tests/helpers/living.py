"""Record of the models that a run builds, and of how much of them is still in memory at its transitions."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch

from megaprune.mcore import gradients
from megaprune.mcore.optimizer import Trainer
from megaprune.pruning import export, models


@dataclass
class Living:
    """Weak references to the tensors of each model and trainer, in the order in which they were built.

    `moments` are the points at which another model was built or the export began: for each, the names of what was
    alive, with the number of tensors.
    """

    tensors: dict[str, list[weakref.ref]] = field(default_factory=dict)
    moments: list[tuple[str, dict[str, int]]] = field(default_factory=list)

    def add(self, name: str, tensors) -> None:
        """Watch tensors under a name."""
        self.tensors.setdefault(name, []).extend(weakref.ref(tensor) for tensor in tensors)

    def note(self, what: str) -> None:
        """Record what is alive at a point of the run."""
        alive = {name: sum(each() is not None for each in refs) for name, refs in self.tensors.items()}
        self.moments.append((what, {name: count for name, count in alive.items() if count}))


@contextmanager
def watched() -> Iterator[Living]:
    """Watch the runs within the block. Garbage is collected only where the run itself asks for it."""
    living, count = Living(), [0, 0]
    gc.collect()
    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            _watch_models(living, count, patch)
            _watch_trainers(living, count, patch)
            _watch_wrappers(living, patch)
            exported = export.export
            patch.setattr(
                "megaprune.pruning.runner.export", lambda *given: (living.note("export"), exported(*given))[1]
            )
            yield living
    finally:
        gc.enable()


def _watch_models(living: Living, count: list[int], patch: pytest.MonkeyPatch) -> None:
    build = models.build_model

    def build_model(*given):
        count[0] += 1
        name = f"model {count[0]}"
        living.note(name)
        model = build(*given)
        living.add(name, model.parameters())
        return model

    patch.setattr(models, "build_model", build_model)


def _watch_trainers(living: Living, count: list[int], patch: pytest.MonkeyPatch) -> None:
    begin, step = Trainer.__init__, Trainer.step

    def __init__(self, *given):
        begin(self, *given)
        count[1] += 1
        self.name = f"trainer {count[1]}"
        living.add(self.name, [self, self.optimizer, *self.ddp.scheduled, *_gradients(self.ddp.scheduled)])

    def watched_step(self, *given):
        found = step(self, *given)
        if not living.tensors.get(f"{self.name} state"):
            living.add(f"{self.name} state", _states(self.optimizer))
        return found

    patch.setattr(Trainer, "__init__", __init__)
    patch.setattr(Trainer, "step", watched_step)


def _watch_wrappers(living: Living, patch: pytest.MonkeyPatch) -> None:
    """Watch the gradients of the first-order importance, which has wrappers without a trainer."""
    wrap = gradients.DistributedDataParallel

    def wrapped(*given):
        wrapper = wrap(*given)
        living.add("importance", [wrapper, *_gradients([wrapper])])
        return wrapper

    patch.setattr(gradients, "DistributedDataParallel", wrapped)


def _gradients(wrappers) -> list[torch.Tensor]:
    return [buffer.grad_data for each in wrappers for buffer in (*each.buffers, *each.expert_parallel_buffers)]


def _states(optimizer) -> list[torch.Tensor]:
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    states = [state for part in parts if part.optimizer is not None for state in part.optimizer.state.values()]
    return [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
