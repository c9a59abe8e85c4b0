"""The configuration of `generate-data`."""

from dataclasses import dataclass
from typing import Literal

from megaprune.config.fields import flag, required


@dataclass
class GenerateConfig:
    """The flags of `generate-data`: the model, its prompts, and the sampling."""

    hf_model: str = required("model that writes: a folder or a hub id")
    output: str = required(
        "file of JSON lines to write; unfinished work is stored next to it, and the same command continues it"
    )
    prompts: list[str] = flag(
        "texts to continue or chats to answer: .jsonl, .jsonl.zst or .parquet files, folders of these, or hub dataset "
        "ids (default: none, and the model begins by itself)",
        [],
    )
    text_key: str = flag("key of the text in each row", "text")
    messages_key: str = flag("key of the chat messages in each row", "messages")
    prompt_tokens: int = flag("tokens at the start of each text that are the prompt", 64, least=1)
    chat: bool = flag("without --prompts: write chats, the user's question by the model too", False)
    num_samples: int | None = flag(
        "number of texts or chats (default: one for each prompt; if larger, the prompts are used several times)",
        least=1,
    )
    max_new_tokens: int = flag(
        "maximum number of tokens that the model writes, in a chat for each message", 256, least=1
    )
    temperature: float = flag("sampling temperature; 0 always takes the most probable token", 1.0, least=0)
    top_p: float = flag("sample from the most probable tokens whose probabilities add up to this", 1.0, above=0, most=1)
    seed: int = flag("seed of the sampling", 1234, least=0)
    engine: Literal["auto", "vllm", "transformers"] = flag(
        "library that runs the model; auto is vLLM where it is installed and there is a GPU", "auto"
    )
    batch_size: int | None = flag("prompts in a batch (default: 32 with transformers, 512 with vLLM)", least=1)
    bf16: bool = flag("compute in bfloat16 (default: float32 on a CPU, the model's own dtype on a GPU)", False)
    trust_remote_code: bool = flag("run code that comes with the model", False)
