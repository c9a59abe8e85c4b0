"""The configuration of an evaluation."""

from dataclasses import dataclass

from megaprune.config.fields import flag, required


@dataclass
class EvaluateConfig:
    """The flags of `evaluate`: the model, the data and the settings."""

    hf_model: str = required("model to evaluate: a folder or a hub id")
    data: list[str] = flag(
        "held-out data: .jsonl, .jsonl.zst or .parquet files, folders of these, or hub dataset ids", []
    )
    teacher: str | None = flag("reference model; enables the KL divergence and the top-1 agreement with it")
    tasks: str | None = flag("lm-evaluation-harness tasks, separated by commas (needs megaprune[eval])")
    task_path: str | None = flag("folder of task files, or of JSON lines for the tasks that come with megaprune")
    task_limit: int | None = flag("maximum number of items of each task (default: --limit)")
    task_batch_size: int = flag("sequences in one forward pass of the tasks", 8)
    num_fewshot: int | None = flag("solved items before each item of the tasks (default: the task's own)", least=0)
    seq_length: int | None = flag("tokens in a window (default: as in the model card, otherwise at most 2048)")
    micro_batch_size: int = flag("windows in one forward pass", 8)
    dtype: str = flag("auto, fp32, bf16 or fp16; auto is fp32 on a CPU and the dtype of the model on a GPU", "auto")
    text_key: str = flag("key of the text in each row", "text")
    messages_key: str = flag("key of the chat messages in each row", "messages")
    limit: int | None = flag("maximum number of windows, and of items of each task")
    trust_remote_code: bool = flag("run code that comes with the model", False)
