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
        top1_agreement: share of tokens where both rank the same token first.
        tasks: metrics by task, as lm-evaluation-harness gives them.
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

    def to_dict(self) -> dict[str, Any]:
        """Return what was measured, as the command writes it."""
        measured = {name: value for name, value in asdict(self).items() if value is not None}
        found: dict[str, Any] = json.loads(strict_json(measured))
        return found
