"""Train a tiny Qwen3 with transformers. It has the architecture of the demo's teacher.

    python examples/demo/train_teacher.py --save runs/teacher --steps 1300

The result differs from `teacher/`, which was trained on four times this text in two runs (see README.md).
"""

from __future__ import annotations

import argparse
import io
import json
import math
import random
from pathlib import Path

import torch
import zstandard
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

HERE = Path(__file__).resolve().parent
END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = [END_OF_TEXT, "<|im_start|>", "<|im_end|>"]
WARMUP_STEPS = 100
MIN_LR_RATIO = 0.03


def read_texts(path: Path) -> list[str]:
    """Return the `text` field of every line of a .jsonl or .jsonl.zst file."""
    with path.open("rb") as raw:
        stream = zstandard.ZstdDecompressor().stream_reader(raw) if path.suffix == ".zst" else raw
        return [json.loads(line)["text"] for line in io.TextIOWrapper(stream, encoding="utf-8")]


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def teacher_config(vocab_size: int, num_layers: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Return the ids of all documents, shuffled, each followed by the end-of-text token, as one row."""
    documents = random.Random(0).sample(texts, len(texts))
    return torch.tensor(
        [token for ids in tokenizer(documents)["input_ids"] for token in [*ids, tokenizer.eos_token_id]]
    )


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return the learning rate: linear warm-up, then a cosine decay to MIN_LR_RATIO of the peak."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return peak * min(1.0, (step + 1) / WARMUP_STEPS) * (MIN_LR_RATIO + (1 - MIN_LR_RATIO) * cosine)


def next_token_loss(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy, in nats, of windows [b, s + 1]."""
    logits = model(tokens[:, :-1]).logits  # [b, s, v]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def train(model: torch.nn.Module, tokens: torch.Tensor, args: argparse.Namespace) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        starts = torch.randint(0, len(tokens) - args.seq_length, (args.batch_size,))
        loss = next_token_loss(model, torch.stack([tokens[i : i + args.seq_length + 1] for i in starts]))
        optimizer.zero_grad()
        loss.backward()
        # A gradient that is not finite would destroy every weight: skip such a step.
        if torch.isfinite(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)):
            optimizer.step()
        if step % 50 == 0 or step + 1 == args.steps:
            print(f"step {step:5d}  loss {loss.item():.4f}", flush=True)


@torch.no_grad()
def evaluate(model: torch.nn.Module, tokens: torch.Tensor, args: argparse.Namespace) -> float:
    """Return the mean loss, in nats, over consecutive windows."""
    count = len(tokens) // (args.seq_length + 1)
    windows = tokens[: count * (args.seq_length + 1)].view(count, -1)
    batches = windows.split(args.batch_size)
    return sum(next_token_loss(model, batch).item() * len(batch) for batch in batches) / count


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a tiny Qwen3 of the demo teacher's architecture.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--save", type=Path, required=True, help="folder for the model and tokenizer")
    parser.add_argument("--data", type=Path, default=HERE / "train.jsonl.zst", help=".jsonl or .jsonl.zst")
    parser.add_argument("--valid-data", type=Path, default=HERE / "valid.jsonl", help=".jsonl or .jsonl.zst")
    parser.add_argument("--num-layers", type=int, default=16, help="decoder layers")
    parser.add_argument("--vocab-size", type=int, default=2048, help="tokens of the BPE vocabulary")
    parser.add_argument("--steps", type=int, default=1300, help="training steps")
    parser.add_argument("--batch-size", type=int, default=8, help="windows per step")
    parser.add_argument("--seq-length", type=int, default=256, help="tokens per window")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (3e-3 diverged)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and the data order")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    texts = read_texts(args.data)
    tokenizer = train_tokenizer(texts, args.vocab_size)
    model = AutoModelForCausalLM.from_config(teacher_config(len(tokenizer), args.num_layers), dtype=torch.float32)
    train(model, tokenize(tokenizer, texts), args)
    valid = tokenize(tokenizer, read_texts(args.valid_data))
    print(f"valid loss {evaluate(model, valid, args):.4f} nats")
    model.to(torch.bfloat16).save_pretrained(args.save)
    tokenizer.save_pretrained(args.save)


if __name__ == "__main__":
    main()
