"""The directory a run lives in, and the manifest that says how its numbers came about.

`open_run_dir` is a context: it refuses a directory that holds another run, and what happens inside decides
the status that the manifest ends with. Options are kept whole, so `patchkit rerun` can do the same again.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

from patchkit.errors import InputError, RunError
from patchkit.reading import exists, names_in
from patchkit.results._manifest_fields import Failure as Failure
from patchkit.results._manifest_fields import HostedModel as HostedModel
from patchkit.results._manifest_fields import InputFile as InputFile
from patchkit.results._manifest_fields import Manifest as Manifest
from patchkit.results._manifest_fields import ModelRef as ModelRef
from patchkit.results._manifest_fields import PairCounts as PairCounts
from patchkit.results._manifest_fields import Traffic as Traffic
from patchkit.results._run_lock import RunLock
from patchkit.results._same_run import PLACE_OPTIONS as PLACE_OPTIONS
from patchkit.results._same_run import require_same, require_same_model, taken
from patchkit.results.formats import read_model, write_model

MANIFEST = "manifest.json"
#: Where a run keeps what is finished of it, until all of it is in the results.
CHECKPOINT = "journal"
#: What the model's host said. It stays when the rest of a run goes that was of bad input, and is in no new run's way.
HOST_LOG = "host.log"
PACKAGES = ("patchkit", "nnsight", "torch", "transformers")


@dataclass
class RunDir:
    """An open run. Leaving its `with` block writes the final status; `record` adds what becomes known.

    Bad input that is found before any result was written leaves no trace, so that the corrected command can use the
    same directory without being told that it holds another run. What was finished until then goes too: it is of the
    input that was bad.
    """

    path: Path
    manifest: Manifest
    resumed: bool
    #: Directories that were not there before, this one first.
    created: tuple[Path, ...]
    #: Fields that are known when the run ends, however it does.
    last_fields: Callable[[], dict[str, Any]] = dict
    _clock: float = field(default_factory=time.monotonic)
    _lock: RunLock | None = field(default=None, repr=False)
    #: As a resumed run's was before this attempt, and whether it is put back since this is no attempt at that run.
    _found: Manifest | None = field(default=None, repr=False)
    _refused: bool = False

    @property
    def done(self) -> bool:
        """True when this run was already complete before it was resumed. Pairs that failed are tried again."""
        return self.resumed and self.manifest.complete

    @property
    def checkpoint(self) -> Path:
        """Where what is finished of the run is kept until it is done; not there yet in a new run."""
        return self.path / CHECKPOINT

    def record_model(self, model: ModelRef) -> None:
        """Notes the model, before the work.

        Raises:
            InputError: the run that is gone on with is one of another model.
        """
        if self._found is not None:
            try:
                require_same_model(self.path, self._found, model)
            except InputError:
                self._refused = True
                raise
        self.record(model=model)

    def record(self, **fields: Any) -> Manifest:
        """Sets fields of the manifest and writes it. Unknown fields or wrong types raise pydantic's error."""
        seconds = self.manifest.seconds + time.monotonic() - self._clock
        merged = {**dict(self.manifest), "seconds": round(seconds, 6), **fields}
        manifest = Manifest.model_validate(merged)
        write_model(self.path / MANIFEST, manifest)
        self.manifest, self._clock = manifest, time.monotonic()
        return manifest

    def __enter__(self) -> RunDir:
        if self.done:
            return self
        self._lock = RunLock(self.path)
        try:
            self._look_again()
            if not self.done:
                self.record(status="running", error=None)
                return self
        except BaseException:
            self._unlock()
            raise
        self._unlock()
        return self

    def _look_again(self) -> None:
        """Sees what another process did between the first look and the lock."""
        if self.resumed:
            self._found = self.manifest = read_manifest(self.path)
        elif MANIFEST in _entries(self.path):
            raise taken(self.path, read_manifest(self.path))

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is None:
            return
        try:
            self._close(kind, error)
        finally:
            self._unlock()
        if kind is not None and issubclass(kind, InputError):
            for directory in self.created:
                if any(directory.iterdir()):
                    break
                directory.rmdir()

    def _close(self, kind: type[BaseException] | None, error: BaseException | None) -> None:
        """Writes how the run ended."""
        if kind is None:
            self.record(status="done", **self.last_fields())
            # All of it is in the results now, but for pairs that failed, which may be tried again.
            if self.manifest.complete:
                shutil.rmtree(self.checkpoint, ignore_errors=True)
            return
        if (
            not self.resumed
            and issubclass(kind, InputError)
            and set(_entries(self.path)) <= {MANIFEST, CHECKPOINT}
        ):
            shutil.rmtree(self.checkpoint, ignore_errors=True)
            (self.path / MANIFEST).unlink()
            return
        interrupted = issubclass(kind, KeyboardInterrupt)
        # When the disk is full the manifest cannot be written either; the first error is the one to show.
        with suppress(RunError):
            if self._refused and self._found is not None:
                write_model(self.path / MANIFEST, self._found)
                return
            self.record(
                status="interrupted" if interrupted else "failed",
                error=None if interrupted else f"{kind.__name__}: {error}",
                **self.last_fields(),
            )


def open_run_dir(path: Path | str, command: str, options: Mapping[str, Any], resume: bool = False) -> RunDir:
    """Opens `path` for a run of `command` with `options`; use it as `with open_run_dir(...) as run`.

    An absent or empty directory starts a run. One that holds a run is refused (InputError, naming that run),
    unless `resume` is set and command, options, input files and package versions are the same: then that run
    goes on, and a difference is refused by its name. A directory with other files is refused. Nothing is
    written before the `with` block is entered. Options that are `Path`s of existing files are fingerprinted.
    """
    path = Path(path)
    manifest = _new_manifest(command, options)
    existing = _entries(path)
    if MANIFEST in existing:
        found = read_manifest(path)
        if not resume:
            raise taken(path, found)
        require_same(path, found, manifest)
        return RunDir(path, found, resumed=True, created=())
    if existing:
        shown = ", ".join(existing[:3]) + (", ..." if len(existing) > 3 else "")
        raise InputError(
            f"{path} is not empty and holds no {MANIFEST} (found {shown}). "
            "Choose an empty or new directory for --out, so that results are not mixed with other files."
        )
    created = tuple(directory for directory in (path, *path.parents) if not exists(directory))
    return RunDir(path, manifest, resumed=False, created=created)


def read_manifest(directory: Path | str) -> Manifest:
    """Reads the manifest of a run. InputError when the directory holds none or it is malformed."""
    return read_model(Path(directory) / MANIFEST, Manifest)


def file_sha256(path: Path | str) -> str:
    """Hash of a file's content, in hexadecimal. InputError where the file cannot be read."""
    digest = hashlib.sha256()
    try:
        with Path(path).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}. Check its permissions.") from error
    return digest.hexdigest()


def package_versions() -> dict[str, str]:
    """Versions of the packages that numbers depend on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def _new_manifest(command: str, options: Mapping[str, Any]) -> Manifest:
    inputs = {
        name: InputFile(path=str(value.resolve()), sha256=file_sha256(value))
        for name, value in options.items()
        if isinstance(value, Path) and exists(value) and value.is_file()
    }
    return Manifest(
        command=command,
        options={name: plain(value) for name, value in options.items()},
        inputs=inputs,
        directory=str(Path.cwd()),
        started=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions=package_versions(),
    )


def plain(value: Any) -> Any:
    """Options as JSON holds them, so that a value compares equal after a round trip."""
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _entries(path: Path) -> list[str]:
    """Names in a directory, less a host's log and hidden ones (left by a killed process or a file manager); [] when
    absent."""
    if not exists(path):
        return []
    if not path.is_dir():
        raise InputError(f"{path}: expected a directory for --out, found a file. Choose another directory.")
    return [name for name in names_in(path) if not name.startswith(".") and name != HOST_LOG]
