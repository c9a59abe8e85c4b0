"""The flags of an evaluation."""

from dataclasses import dataclass

from megaprune.config.fields import flag, required


@dataclass
class EvaluateConfig:
    """The model, what it is evaluated on, and how: the flags of `evaluate`."""

    hf_model: str = required("the model: a folder or a hub id")
    data: list[str] = flag("held-out text: .jsonl, .jsonl.zst, .parquet, folders of these, or hub dataset ids", [])
    teacher: str | None = flag("also measure KL and top-1 agreement against this model")
    tasks: str | None = flag("lm-evaluation-harness tasks, comma-separated (needs megaprune[eval])")
    seq_length: int | None = flag("tokens of a window (default: what the model card says, else at most 2048)")
    micro_batch_size: int = flag("windows in one forward pass", 8)
    dtype: str = flag("auto, fp32, bf16 or fp16; auto is fp32 on the CPU, the model's own on a GPU", "auto")
    text_key: str = flag("the key that holds a row's text", "text")
    messages_key: str = flag("the key that holds a row's chat", "messages")
    limit: int | None = flag("only the first so many windows, and examples of each task")
    trust_remote_code: bool = flag("run code that the model's repository brings", False)
