"""Metrics of a training run: JSON lines, TensorBoard, Weights & Biases and the console.

`metrics.jsonl` holds everything; `pandas.read_json(path, lines=True)` reads it. A resumed run first cuts it back to
its checkpoint, so that it reads like that of an uninterrupted run.
"""

import datetime
import json
import sys
import uuid
from collections import deque
from pathlib import Path
from typing import Any

from megaprune.report.performance import speed_text
from megaprune.utils.errors import MegapruneError
from megaprune.utils.files import strict_json, whole_file
from megaprune.utils.progress import TRAINING, bars_are_shown
from megaprune.utils.text import first_line

JSONL_NAME = "metrics.jsonl"


class MetricsLogger:
    """The only writer of a run's metrics: one record per training iteration.

    Args:
        run_dir: gets `metrics.jsonl` and `tensorboard/`.
        enabled: true on global rank 0 only. Elsewhere every method does nothing.
        total_iterations: iterations of search and recovery together, for the ETA.
        tokens_per_iteration: tokens of one global batch; the console's tokens/s comes from it.
        log_interval: iterations between two lines where stderr is not a terminal.
        tensorboard_dir: instead of `run_dir/tensorboard`.
        wandb_project: also logs to this Weights & Biases project. A resumed run continues the same W&B run.
        start_iteration: iterations done when this process starts (the checkpoint's; 0 for a new run). Later
            records are removed, because these iterations are logged again.

    Raises:
        MegapruneError: `wandb_project` is given and wandb isn't installed or can't start; or
            `metrics.jsonl` is damaged anywhere but in its last line.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        enabled: bool,
        total_iterations: int,
        tokens_per_iteration: int,
        log_interval: int,
        tensorboard_dir: str | Path | None = None,
        wandb_project: str | None = None,
        start_iteration: int = 0,
    ) -> None:
        self._sinks: list[Any] = []
        self._tensorboard: _TensorBoard | None = None
        if not enabled:
            return
        run_dir = Path(run_dir)
        # First, because only it needs a login: the file is cut back only if the run will continue.
        if wandb_project:
            self._sinks.append(_WeightsAndBiases(wandb_project, run_dir, start_iteration))
        self._sinks.append(_JsonLines(run_dir, start_iteration))
        self._tensorboard = _TensorBoard(tensorboard_dir or run_dir / "tensorboard", start_iteration)
        self._sinks.append(self._tensorboard)
        pace = _Pace(total_iterations, tokens_per_iteration, window=log_interval)
        bar = bars_are_shown() and sys.stderr.isatty()
        self._sinks.append(_ProgressBar(pace, start_iteration) if bar else _Lines(pace, log_interval))

    def log(self, record: dict[str, Any]) -> None:
        """Log one iteration.

        Keys: `iteration` (count done, from 1), `stage` ("search" or "recovery"), `loss` (nats), `lr`,
        `grad_norm`, `num_kept` (layers in the mask), `tokens` (since the run's start), `seconds` (this
        iteration's); `kd_loss`, `lm_loss`, `mtp_1_loss` and `hidden_loss` where the loss has several parts; in the
        search also `temperature`, `scores` and `mask` (one number per source layer).
        The speed of each step: `tflops` (TFLOP/s per device), `mfu` (its share of the peak, where that is known),
        `compute_seconds`, `teacher_seconds`, `data_seconds` and `memory_gib` (peak so far) of rank 0. Where a log
        interval ends, also over all ranks: `compute_seconds_min`, `compute_seconds_max` and the `slowest_rank`,
        `teacher_seconds_max`, `data_seconds_max` (means of the interval's steps) and `memory_gib_max`.
        Numbers that aren't finite are null in `metrics.jsonl`.
        """
        for sink in self._sinks:
            sink.log(record)

    def figure(self, tag: str, path: str | Path) -> None:
        """Show the PNG at `path` among TensorBoard's images, at the last logged iteration."""
        if self._tensorboard:
            self._tensorboard.figure(tag, path)

    def close(self) -> None:
        """Flush and close everything. Calling it again does nothing."""
        while self._sinks:
            self._sinks.pop().close()
        self._tensorboard = None


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """Return the records of `run_dir/metrics.jsonl` in the order logged; [] if there is no file.

    A truncated last line, left by a process that was killed while writing, is ignored.

    Raises:
        MegapruneError: any other line can't be read.
    """
    path = Path(run_dir) / JSONL_NAME
    if not path.is_file():
        return []
    lines = path.read_text().rstrip("\n").split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise MegapruneError(
                    f"{path}, line {number}: not JSON; remove this line and run the same command again"
                ) from None
    return records


class _JsonLines:
    """metrics.jsonl, each record flushed as it comes."""

    def __init__(self, run_dir: Path, start_iteration: int) -> None:
        kept = [record for record in read_metrics(run_dir) if record["iteration"] <= start_iteration]
        with whole_file(run_dir / JSONL_NAME) as aside:
            aside.write_text("".join(strict_json(record) + "\n" for record in kept))
        # Line-buffered, so that a killed run loses no record.
        self._file = (run_dir / JSONL_NAME).open("a", buffering=1)

    def log(self, record: dict[str, Any]) -> None:
        self._file.write(strict_json(record) + "\n")

    def close(self) -> None:
        self._file.close()


class _TensorBoard:
    def __init__(self, folder: str | Path, start_iteration: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        try:
            # purge_step hides what a stopped run had logged beyond its checkpoint.
            self._writer = SummaryWriter(str(folder), purge_step=start_iteration + 1, flush_secs=10)
        except OSError as error:
            raise MegapruneError(
                f"{folder} can't be written ({error.strerror}): choose another folder with --tensorboard-dir"
            ) from None
        self._iteration = start_iteration

    def log(self, record: dict[str, Any]) -> None:
        self._iteration = record["iteration"]
        for name, value in _numbers(record).items():
            self._writer.add_scalar(f"train/{name}", value, self._iteration)

    def figure(self, tag: str, path: str | Path) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        self._writer.add_image(tag, pixels, self._iteration, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, project: str, run_dir: Path, start_iteration: int) -> None:
        wandb = import_wandb()
        run_dir.mkdir(parents=True, exist_ok=True)  # wandb would turn to the temporary folder without a word
        id_file = run_dir / "wandb_run_id"
        resumed = start_iteration > 0 and id_file.is_file()
        run_id = id_file.read_text() if resumed else uuid.uuid4().hex
        try:
            self._run = wandb.init(project=project, dir=run_dir, id=run_id, resume="allow")
        except wandb.errors.Error as error:
            raise MegapruneError(
                f"--wandb-project {project}: wandb can't start ({first_line(error)}); run `wandb login`, or set "
                "WANDB_MODE=offline"
            ) from error
        with whole_file(id_file) as aside:
            aside.write_text(run_id)

    def log(self, record: dict[str, Any]) -> None:
        numbers = {f"train/{name}": value for name, value in _numbers(record).items()}
        self._run.log(numbers, step=record["iteration"])

    def close(self) -> None:
        self._run.finish()


class _Pace:
    """Tokens per second and time left, from the last `window` iterations: search and recovery differ in speed."""

    def __init__(self, total_iterations: int, tokens_per_iteration: int, window: int) -> None:
        self.total_iterations = total_iterations
        self._tokens_per_iteration = tokens_per_iteration
        self._seconds: deque[float] = deque(maxlen=window)

    def add(self, seconds: float) -> None:
        self._seconds.append(seconds)

    @property
    def tokens_per_second(self) -> float:
        return self._tokens_per_iteration * len(self._seconds) / max(sum(self._seconds), 1e-9)

    def eta(self, iteration: int) -> datetime.timedelta:
        mean = sum(self._seconds) / len(self._seconds)
        return datetime.timedelta(seconds=round(mean * (self.total_iterations - iteration)))


class _ProgressBar:
    def __init__(self, pace: _Pace, start_iteration: int) -> None:
        from tqdm import tqdm

        self._pace = pace
        # tqdm's own rate and ETA count validation and checkpoints in, so the postfix shows ours instead.
        self._bar = tqdm(
            total=pace.total_iterations,
            initial=start_iteration,
            file=sys.stderr,
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
        )

    def log(self, record: dict[str, Any]) -> None:
        self._pace.add(record["seconds"])
        self._bar.set_description_str(record["stage"], refresh=False)
        self._bar.set_postfix_str(
            f"loss {record['loss']:.4f}, kept {record['num_kept']}, "
            f"{self._pace.tokens_per_second:,.0f} tokens/s, ETA {self._pace.eta(record['iteration'])}",
            refresh=False,
        )
        self._bar.update(record["iteration"] - self._bar.n)

    def close(self) -> None:
        self._bar.close()


class _Lines:
    """One line every `log_interval` iterations and for the last one, for the log of a batch job."""

    def __init__(self, pace: _Pace, log_interval: int) -> None:
        self._pace = pace
        self._log_interval = log_interval

    def log(self, record: dict[str, Any]) -> None:
        self._pace.add(record["seconds"])
        iteration, total = record["iteration"], self._pace.total_iterations
        if iteration % self._log_interval and iteration != total:
            return
        grad_norm = "–" if record["grad_norm"] is None else f"{record['grad_norm']:.3f}"
        TRAINING.info(
            f"iteration {iteration:>{len(str(total))}}/{total} | {record['stage']:<8} | "
            f"loss {record['loss']:.4f} | lr {record['lr']:.3e} | grad norm {grad_norm} | "
            f"kept {record['num_kept']} | {self._pace.tokens_per_second:,.0f} tokens/s{speed_text(record)} | "
            f"ETA {self._pace.eta(iteration)}"
        )

    def close(self) -> None:
        pass


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    """The record's numbers by name, without the iteration, which is the x axis."""
    return {
        name: value
        for name, value in record.items()
        if name != "iteration" and isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def import_wandb() -> Any:
    """Import wandb.

    Raises:
        MegapruneError: it isn't installed.
    """
    try:
        import wandb
    except ImportError as error:
        raise MegapruneError("--wandb-project: wandb isn't installed; run `pip install 'megaprune[wandb]'`") from error
    return wandb
