"""Benchmark tasks in a comparison: the teacher, each mask before recovery, and every recovered model."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaprune.comparison.grid import PlannedRun, TaskSettings
from megaprune.evaluation.harness import run_harness
from megaprune.evaluation.run import open_model
from megaprune.evaluation.task_files import load_tasks
from megaprune.mcore import parallel
from megaprune.pruning.resolve import open_run
from megaprune.utils.files import write_json
from megaprune.utils.progress import say
from megaprune.weights.surgery import write_pruned_config, write_pruned_weights
from megaprune.weights.writer import parse_size

Scores = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class TaskScorer:
    """Scores of models, each measured once and then read.

    Args:
        save: the comparison's folder; `save`/tasks holds the scores of teachers and of masks before recovery. Those of
            a recovered model are in its run's folder.
    """

    settings: TaskSettings
    save: Path

    def scores(self, planned: PlannedRun) -> dict[str, Scores]:
        """Return the harness's metrics by task, of the run's "teacher", "pruned" and "recovered" model."""
        report = json.loads((planned.folder / "report.json").read_text())
        kept, pruned = report["kept_layers"], report["pruned_layers"]
        every = sorted([*kept, *pruned])
        folder, model = self.save / "tasks", planned.model
        teacher = folder / ("-".join(filter(None, ["teacher", model])) + ".json")
        mask = folder / ("-".join(filter(None, ["pruned", model, "+".join(map(str, pruned))])) + ".json")
        found = {"teacher": self._measured(planned, teacher, every if planned.config.model.hf_model is None else None)}
        if self.settings.pruned:
            found["pruned"] = self._measured(planned, mask, kept)
        return found | {"recovered": self._measured(planned, planned.folder / "tasks.json", None)}

    def _measured(self, planned: PlannedRun, cache: Path, kept: Sequence[int] | None) -> Scores:
        """Return the scores in a file, after measuring those that are missing there.

        Args:
            kept: the layers of the original model to keep; None for a model that is a folder already.
        """
        how = self.settings.how()
        stored = json.loads(cache.read_text()) if cache.is_file() else {}
        known: dict[str, Scores] = stored.get("tasks", {}) if stored.get("how") == how else {}
        missing = [name for name in self.settings.names if name not in known]
        if missing:
            say(f"\ntasks {', '.join(missing)} for {cache}")
            with self._folder_of(planned, cache, kept) as hf_model:
                trusted = planned.config.model.trust_remote_code
                model, tokenizer = open_model(hf_model, self.settings.dtype, trusted)
                for name in missing:
                    options = self.settings.options(name)
                    known[name] = run_harness(model, tokenizer, load_tasks([name], options.path), options)
                    cache.parent.mkdir(parents=True, exist_ok=True)
                    write_json(cache, {"how": how, "tasks": known})
        return {task: metrics for name in self.settings.names for task, metrics in known[name].items()}

    @contextmanager
    def _folder_of(self, planned: PlannedRun, cache: Path, kept: Sequence[int] | None) -> Iterator[str]:
        """Provide the HF folder or hub id of a model. One that has lost layers alone exists for this long."""
        if kept is None:
            recovered = cache.parent == planned.folder
            yield str(planned.folder / "hf") if recovered else str(planned.config.model.hf_model)
            return
        options, source = open_run(planned.config, parallel.world_size())
        with tempfile.TemporaryDirectory(dir=self.save, prefix="pruned-") as folder:
            write_pruned_weights(source, kept, Path(folder), parse_size("5GB"), options.model.keep_mtp)
            write_pruned_config(source, kept, Path(folder), options.model.keep_mtp)
            yield folder
