"""Folder of a run: its paths, and the settings of the run that it belongs to."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from megaprune.utils.errors import MegapruneError
from megaprune.utils.files import write_json
from megaprune.utils.locks import LOCK_NAME


@dataclass(frozen=True)
class RunDir:
    """The folder given with ``--save``."""

    path: Path

    @property
    def hf(self) -> Path:
        """Return the folder of the pruned model. It appears last and thereby marks the run as finished."""
        return self.path / "hf"

    @property
    def adapter(self) -> Path:
        """Return the folder of the trained adapter, with ``--export-adapter``."""
        return self.path / "adapter"

    @property
    def report(self) -> Path:
        return self.path / "report.json"

    @property
    def plots(self) -> Path:
        return self.path / "plots"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def measurements(self) -> Path:
        """Return the file of what was measured of the layers and on validation data."""
        return self.path / "measurements.jsonl"

    @property
    def _rounds(self) -> Path:
        return self.path / "rounds"

    def of_round(self, number: int) -> "RunDir":
        """Return the folder of one of a run's rounds, from 1."""
        return RunDir(self._rounds / str(number))

    @property
    def stitch(self) -> Path:
        """Return the file of the maps of ``--stitch``."""
        return self.path / "stitch.safetensors"

    @property
    def stitch_parts(self) -> Path:
        """Return the folder of the maps of single cuts, and of the sums of interrupted passes; removed at the end."""
        return self.path / "stitch-parts"

    @property
    def candidates(self) -> Path:
        """Return the folder of the candidates that are trained until one is chosen."""
        return self.path / "candidates"

    @property
    def data_cache(self) -> Path:
        return self.path / "data-cache"

    @property
    def lock(self) -> Path:
        return self.path / LOCK_NAME

    @property
    def _settings(self) -> Path:
        return self.path / "run.json"

    def check(self, settings: Mapping[str, object]) -> None:
        """Check that the folder is free, or belongs to this run.

        Args:
            settings: settings that must equal those of the run that began the folder, by flag name.

        Raises:
            MegapruneError: the folder holds something else, or a setting differs; the message names it.
        """
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise MegapruneError(f"--save {self.path} is a file: choose a folder")
        if not self._settings.is_file():
            if any(path != self.lock for path in self.path.iterdir()):
                raise MegapruneError(f"--save {self.path} is not empty and holds no run: choose another folder")
            return
        try:
            saved = dict(json.loads(self._settings.read_text()))
        except (ValueError, TypeError):
            raise MegapruneError(f"{self._settings} is damaged: remove {self.path} to start again") from None
        for name, value in settings.items():
            if name in saved and saved[name] != value:
                raise MegapruneError(
                    f"--save {self.path} holds a run with another --{name.replace('_', '-')} ({saved[name]}, now "
                    f"{value}): choose another folder, or repeat that run's command to continue it"
                )

    def begin(self, settings: Mapping[str, object]) -> None:
        """Create the folder and record the run's settings in it.

        Raises:
            MegapruneError: the folder can't be created or written to, or another run has taken it since the check.
        """
        self.check(settings)
        if self.hf.exists():
            raise MegapruneError(
                f"--save {self.path}: another process has finished this run in the meantime: {self.hf}"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self._settings, dict(settings))
        except OSError as error:
            raise MegapruneError(f"--save {self.path} can't be written ({error.strerror}): choose another") from None

    @contextmanager
    def undone_if_refused(self) -> Iterator[None]:
        """Begin the run for the duration of a block that fills the folder. If the block fails and there is nothing to
        resume from, remove everything that it added, including the folder and any parents that were created.
        """
        missing = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        before = self._entries()
        try:
            yield
        except MegapruneError as error:
            if not (error.keeps_progress or self.checkpoints.exists() or self._rounds.exists()):
                for path in self._entries() - before:
                    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
                with suppress(OSError):  # never created, or it now contains files of others
                    for folder in missing:
                        folder.rmdir()
            raise

    def _entries(self) -> set[Path]:
        return set(self.path.iterdir()) if self.path.is_dir() else set()
