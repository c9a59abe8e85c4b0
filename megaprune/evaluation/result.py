"""The result of an evaluation."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from megaprune.utils.files import strict_json


@dataclass(frozen=True)
class Evaluation:
    """The loss of a model in nats per token, its distance from a teacher, and the scores of tasks, where measured.

    Args:
        tokens: tokens that were predicted.
        kl: mean KL divergence of the model from the teacher, in nats per token.
        top1_agreement: share of positions where both rank the same token first.
        tasks: lm-evaluation-harness's metrics by task, with the number of `items`.
        tasks_mean: mean `score` of the tasks, and its `stderr`. A task's score is its accuracy, normalized by length
            where the task has that, or its exact match.
    """

    hf_model: str
    data: list[str] | None = None
    seq_length: int | None = None
    dtype: str | None = None
    tokens: int | None = None
    loss: float | None = None
    perplexity: float | None = None
    teacher: str | None = None
    kl: float | None = None
    top1_agreement: float | None = None
    tasks: dict[str, dict[str, Any]] | None = None
    tasks_mean: dict[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the measured values, as the command writes them."""
        measured = {name: value for name, value in asdict(self).items() if value is not None}
        found: dict[str, Any] = json.loads(strict_json(measured))
        return found
