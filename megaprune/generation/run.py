"""Text and chats written by a model itself, for its calibration and recovery."""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megaprune.data.sources import FileSource, find_sources, source_identity
from megaprune.data.tokenizer import tokenizer_identity, tokenizer_in, vocabulary_size
from megaprune.generation.engines import BATCH_SIZES, Completion, Engine, Sampling, load_engine, resolve_engine
from megaprune.generation.progress import Progress
from megaprune.generation.prompts import Prompt, Writer
from megaprune.utils.disk import one_line
from megaprune.utils.errors import MegapruneError, UsageError
from megaprune.utils.locks import lock_beside, locked
from megaprune.utils.progress import bars_are_shown
from megaprune.utils.ranks import world_size
from megaprune.weights.hub import resolve_hf_model

# What the rows do not depend on, or what is described otherwise.
_UNSTORED = ("hf_model", "output", "prompts", "trust_remote_code", "num_samples")


@dataclass(frozen=True)
class GenerateOptions:
    """Settings of `generate_data`; see the flags of the same names."""

    hf_model: str
    output: str
    prompts: Sequence[str]
    text_key: str
    messages_key: str
    prompt_tokens: int
    chat: bool
    num_samples: int | None
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    engine: str
    batch_size: int | None
    bf16: bool
    trust_remote_code: bool


@dataclass(frozen=True)
class Generated:
    """The result of `generate_data`.

    Args:
        samples: the number of texts and chats in the output.
        new_tokens: tokens that the model wrote, without the prompts.
        cut: texts and chats that reached the limit of new tokens.
        seconds: time of this call; an earlier one may have done a part of the work.
        tokens_per_second: of this call; 0 if it only finished earlier work.
    """

    output: str
    samples: int
    new_tokens: int
    cut: int
    engine: str
    seconds: float
    tokens_per_second: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def generate_data(options: GenerateOptions) -> Generated:
    """Let the model write, and store what it wrote. The same call continues interrupted work, to the same bytes.

    Raises:
        MegapruneError: the model or the prompts can't be used, or the output can't be written.
        UsageError: an option is wrong.
    """
    output = Path(options.output)
    _check(options, output)
    engine = resolve_engine(options.engine)
    folder = resolve_hf_model(options.hf_model)
    config = _config(folder, options.hf_model)
    tokenizer = tokenizer_in(folder, options.trust_remote_code)
    sources = find_sources(options.prompts, "--prompts") if options.prompts else []
    writer = Writer(tokenizer, options.prompt_tokens, options.max_new_tokens, config.get("max_position_embeddings"))
    if sources:
        prompts = writer.prompts(sources, options.text_key, options.messages_key, options.num_samples)
    else:
        prompts = [writer.own_beginning(options.chat)]
    job = _Job(options, engine, folder, tokenizer, writer, prompts, config.get("vocab_size"))
    settings = {
        **{name: value for name, value in asdict(options).items() if name not in _UNSTORED},
        "engine": engine,
        "batch_size": job.batch_size,
        "num_samples": job.num_samples,
        "prompts": source_identity(sources),
        "model": _identity(folder, tokenizer),
    }
    with locked(lock_beside(output), f"--output {output}"), one_line(output):
        _refuse_existing(output)  # again, now that the lock keeps other processes out
        progress = Progress(output, settings)
        try:
            return job.run(progress)
        finally:
            progress.close()


class _Job:
    def __init__(
        self,
        options: GenerateOptions,
        engine: str,
        folder: Path,
        tokenizer: Any,
        writer: Writer,
        prompts: Sequence[Prompt],
        vocab_size: int | None,
    ) -> None:
        self.options, self.engine, self.folder, self.writer, self.prompts = options, engine, folder, writer, prompts
        self.batch_size = options.batch_size or BATCH_SIZES[engine]
        self.num_samples = options.num_samples or len(prompts)
        known = vocabulary_size(tokenizer)
        self.sampling = Sampling(
            options.temperature, options.top_p, options.max_new_tokens, min(known, vocab_size or known)
        )
        # In a text, any special token ends it: it has no other meaning there, and decoding would drop it.
        ends = _end_tokens(folder) | ({tokenizer.eos_token_id} - {None})
        self.stops = {True: ends, False: ends | frozenset(tokenizer.all_special_ids)}

    def run(self, progress: Progress) -> Generated:
        """Write the rows that are missing, then the output."""
        batches = [batch for batch in self._batches() if any(index not in progress.done for index in batch)]
        # In whole batches, so that each row is computed in the same company as without an interruption.
        missing = sum(map(len, batches))
        engine: Engine | None = None
        begin, tokens = time.perf_counter(), 0
        bar = tqdm(
            total=self.num_samples,
            initial=self.num_samples - missing,
            unit=" rows",
            desc="generating",
            disable=not bars_are_shown(),
        )
        with bar:
            for batch in batches:
                if engine is None:
                    engine = load_engine(
                        self.engine,
                        self.folder,
                        self.options.bf16,
                        self.sampling,
                        self.options.trust_remote_code,
                    )
                    begin = time.perf_counter()
                rows = self._write(engine, batch)
                progress.add(rows)
                tokens += sum(row["tokens"] for row in rows.values())
                bar.set_postfix_str(f"{tokens / (time.perf_counter() - begin):,.0f} tokens/s", refresh=False)
                bar.update(len(batch))
        seconds = time.perf_counter() - begin
        progress.finish()
        done = progress.done.values()
        return Generated(
            self.options.output,
            len(done),
            sum(row["tokens"] for row in done),
            sum(row["cut"] for row in done),
            self.engine,
            seconds,
            tokens / seconds if tokens else 0.0,
        )

    def _batches(self) -> Iterator[list[int]]:
        """Yield the rows of each batch: prompts of similar length, the longest first."""
        lengths = [len(self.writer.first_tokens(prompt)) for prompt in self.prompts]
        order = sorted(range(self.num_samples), key=lambda index: (-lengths[index % len(lengths)], index))
        for start in range(0, len(order), self.batch_size):
            yield order[start : start + self.batch_size]

    def _write(self, engine: Engine, batch: Sequence[int]) -> dict[int, dict[str, Any]]:
        def complete(given: Sequence[Sequence[int]], seeds: Sequence[int], chats: bool) -> list[Completion]:
            return engine.complete(given, seeds, self.stops[chats])

        seeds = [f"{self.options.seed} {index}" for index in batch]
        written = self.writer.write([self.prompts[index % len(self.prompts)] for index in batch], seeds, complete)
        return {index: asdict(row) for index, row in zip(batch, written, strict=True)}


def _check(options: GenerateOptions, output: Path) -> None:
    if world_size() > 1:
        raise UsageError("generate-data runs in one process: start it without torchrun")
    if output.is_dir():
        raise UsageError(f"--output {output} is a folder: give the name of a .jsonl file")
    if not output.name.endswith(".jsonl"):
        raise UsageError(f"--output {output}: the rows are JSON lines; give a name that ends with .jsonl")
    _refuse_existing(output)
    if options.prompts and options.chat:
        raise UsageError(
            "--chat can't be combined with --prompts: the model asks its own questions; without --chat, rows with "
            "--messages-key are answered as chats"
        )
    if not options.prompts and options.num_samples is None:
        raise UsageError("--num-samples is required without --prompts")


def _refuse_existing(output: Path) -> None:
    if output.exists():
        raise MegapruneError(f"--output {output} already exists: remove it first, or choose another name")


def _config(folder: Path, name: str) -> Mapping[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise MegapruneError(f"--hf-model {name}: it contains no config.json; a finished run's model is in RUN_DIR/hf")
    config = _json(path)
    return config.get("text_config", config)


def _end_tokens(folder: Path) -> frozenset[int]:
    """Return the tokens that end a generation, as the model's own files name them."""
    found: set[Any] = set()
    for name in ("config.json", "generation_config.json"):
        given = _json(folder / name).get("eos_token_id") if (folder / name).is_file() else None
        found |= set(given if isinstance(given, list) else [given])
    return frozenset(token for token in found if isinstance(token, int))


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MegapruneError(f"{path} can't be read ({error}): download it again") from error
    if not isinstance(found, dict):
        raise MegapruneError(f"{path} holds no JSON object: download it again")
    return found


def _identity(folder: Path, tokenizer: Any) -> str:
    """Return a digest of a model and its tokenizer."""
    files = [path for pattern in ("*config.json", "*.safetensors") for path in sorted(folder.glob(pattern))]
    described = [source_identity([FileSource(path, path.name) for path in files]), tokenizer_identity(tokenizer)]
    return hashlib.blake2b(json.dumps(described, default=str).encode(), digest_size=16).hexdigest()
