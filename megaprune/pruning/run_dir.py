"""The folder of a run: what stands where, and whose run it is."""

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
    """``--save``."""

    path: Path

    @property
    def hf(self) -> Path:
        """The pruned model; it appears last, so it says that the run is done."""
        return self.path / "hf"

    @property
    def adapter(self) -> Path:
        """The trained adapter, with ``--export-adapter``."""
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
    def data_cache(self) -> Path:
        return self.path / "data-cache"

    @property
    def lock(self) -> Path:
        return self.path / LOCK_NAME

    @property
    def _settings(self) -> Path:
        return self.path / "run.json"

    def check(self, settings: Mapping[str, object]) -> None:
        """Check that the folder is free, or holds this very run.

        Args:
            settings: what the run that began it must have in common with this one, by the flags' names.

        Raises:
            MegapruneError: it holds something else; names the setting that differs.
        """
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise MegapruneError(f"--save {self.path} is a file: choose a folder")
        if not self._settings.is_file():
            if any(path != self.lock for path in self.path.iterdir()):
                raise MegapruneError(f"--save {self.path} holds files that are no run's: choose another folder")
            return
        try:
            saved = dict(json.loads(self._settings.read_text()))
        except (ValueError, TypeError):
            raise MegapruneError(f"{self._settings} is damaged: remove {self.path} to start anew") from None
        for name, value in settings.items():
            if name in saved and saved[name] != value:
                raise MegapruneError(
                    f"--save {self.path} holds a run with another --{name.replace('_', '-')} ({saved[name]}, now "
                    f"{value}): choose another folder, or repeat that run's command to go on with it"
                )

    def begin(self, settings: Mapping[str, object]) -> None:
        """Make the folder and mark it as this run's.

        Raises:
            MegapruneError: the folder can't be made or written to, or became another's since it was checked.
        """
        self.check(settings)
        if self.hf.exists():
            raise MegapruneError(f"--save {self.path}: another process has finished this run meanwhile: {self.hf}")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self._settings, dict(settings))
        except OSError as error:
            raise MegapruneError(f"--save {self.path} can't be written ({error.strerror}): choose another") from None

    @contextmanager
    def undone_if_refused(self) -> Iterator[None]:
        """A block that begins the run and fills the folder. Where the block is refused with nothing to resume from,
        what it added goes again, and so do the folder and its parents if it made them."""
        missing = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        before = self._entries()
        try:
            yield
        except MegapruneError:
            if not self.checkpoints.exists():
                for path in self._entries() - before:
                    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
                with suppress(OSError):  # never made, or by now it holds what others put there
                    for folder in missing:
                        folder.rmdir()
            raise

    def _entries(self) -> set[Path]:
        return set(self.path.iterdir()) if self.path.is_dir() else set()
