"""The directory a run lives in, and the manifest that says how its numbers came about.

`open_run_dir` is a context: it refuses a directory that holds another run, and what happens inside decides
the status that the manifest ends with. Options are kept whole, so `patchkit rerun` can do the same again.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from patchkit.errors import InputError, RunError
from patchkit.reading import exists
from patchkit.results.formats import read_model, write_model

MANIFEST = "manifest.json"
#: Where a run keeps what is finished of it, until it is done.
CHECKPOINT = "checkpoint"
PACKAGES = ("patchkit", "nnsight", "torch", "transformers")

#: Options that change where or how loudly a run goes on, never its numbers.
PLACE_OPTIONS = frozenset(
    {"out", "resume", "quiet", "backend", "num_processes", "gpus_per_replica", "max_failures"}
)
# What a resumed run may differ in: batches of another size give the same numbers, and may be why it is resumed.
_FREE_OPTIONS = PLACE_OPTIONS | {"max_batch_tokens"}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelRef(_Frozen):
    """Which model a run used; of several, what is said of each is joined by commas."""

    id: str = Field(description="embedded name, directory or hub name, as given")
    revision: str | None = Field(default=None, description="hub commit, when the model came from the hub")
    fingerprint: str = Field(description="hash of the weights' metadata: names, shapes, dtypes, sizes")


class InputFile(_Frozen):
    """A file that the command read, so that a rerun can tell whether it is still the same."""

    path: str = Field(description="absolute")
    sha256: str


class Failure(_Frozen):
    """One pair that gave no number, and why."""

    id: str
    reason: str


class PairCounts(_Frozen):
    """How many pairs (or triples) there were, how many gave numbers, and what became of the others."""

    total: int = Field(ge=0)
    used: int = Field(ge=0)
    failures: list[Failure] = Field(default_factory=list)


class Manifest(_Frozen):
    """manifest.json: everything that is needed to read a run's numbers, and to get them again."""

    schema_version: int = 1
    command: str = Field(description="name of the command, e.g. mask")
    options: dict[str, Any] = Field(description="every option with its value, defaults included")
    inputs: dict[str, InputFile] = Field(default_factory=dict, description="option -> the file it named")
    directory: str = Field(description="working directory, against which relative paths in options are read")
    started: str = Field(description="UTC, ISO 8601")
    status: Literal["running", "done", "interrupted", "failed"] = "running"
    error: str | None = Field(default=None, description="why it failed")
    versions: dict[str, str]
    model: ModelRef | None = None
    seed: int | None = None
    metric: str | None = None
    direction: Literal["denoise", "noise"] | None = None
    sign: str = Field(
        default="effect = metric(base run with the source's activation put in) - metric(base run)",
        description="what a positive number means",
    )
    ablation: str | None = None
    axes: dict[str, list[str]] = Field(default_factory=dict, description="tensor -> names of its axes")
    base_metric: float | None = Field(default=None, description="mean over pairs")
    source_metric: float | None = Field(default=None, description="mean over pairs")
    cost: float | None = Field(default=None, description="paid, in forward-equivalents of the base batch")
    seconds: float = Field(default=0.0, ge=0, description="wall time, summed over the times it was resumed")
    pairs: PairCounts | None = None


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
    _clock: float = field(default_factory=time.monotonic)

    @property
    def done(self) -> bool:
        """True when this run was already complete before it was resumed."""
        return self.resumed and self.manifest.status == "done"

    @property
    def checkpoint(self) -> Path:
        """Where what is finished of the run is kept until it is done; not there yet in a new run."""
        return self.path / CHECKPOINT

    def record(self, **fields: Any) -> Manifest:
        """Sets fields of the manifest and writes it. Unknown fields or wrong types raise pydantic's error."""
        seconds = self.manifest.seconds + time.monotonic() - self._clock
        merged = {**dict(self.manifest), "seconds": round(seconds, 6), **fields}
        manifest = Manifest.model_validate(merged)
        write_model(self.path / MANIFEST, manifest)
        self.manifest, self._clock = manifest, time.monotonic()
        return manifest

    def __enter__(self) -> RunDir:
        if not self.done:
            self.record(status="running", error=None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.done:
            return
        if kind is None:
            self.record(status="done")
            return
        if (
            not self.resumed
            and issubclass(kind, InputError)
            and set(_entries(self.path)) <= {MANIFEST, CHECKPOINT}
        ):
            shutil.rmtree(self.checkpoint, ignore_errors=True)
            (self.path / MANIFEST).unlink()
            for directory in self.created:
                if any(directory.iterdir()):
                    break
                directory.rmdir()
            return
        interrupted = issubclass(kind, KeyboardInterrupt)
        # When the disk is full the manifest cannot be written either; the first error is the one to show.
        with suppress(RunError):
            self.record(
                status="interrupted" if interrupted else "failed",
                error=None if interrupted else f"{kind.__name__}: {error}",
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
            raise InputError(
                f"{path} already holds a run: {_name(found)}. "
                "Choose another --out directory, or give --resume to go on with that run."
            )
        _require_same(path, found, manifest)
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
    """Names in a directory, less hidden ones (left by a killed process or a file manager); [] when absent."""
    if not exists(path):
        return []
    if not path.is_dir():
        raise InputError(f"{path}: expected a directory for --out, found a file. Choose another directory.")
    try:
        return sorted(item.name for item in path.iterdir() if not item.name.startswith("."))
    except OSError as error:
        raise InputError(
            f"{path}: cannot be looked into: {error.strerror}. Check its permissions."
        ) from error


def _name(manifest: Manifest) -> str:
    return f"`patchkit {manifest.command}`, started {manifest.started}, {manifest.status}"


def _require_same(path: Path, found: Manifest, wanted: Manifest) -> None:
    differences = []
    if found.command != wanted.command:
        differences.append(f"command {found.command!r} there, {wanted.command!r} here")
    else:
        differences += _differences("--{}", found.options, wanted.options)
        differences += _differences("content of --{}", _hashes(found), _hashes(wanted))
        differences += _differences("version of {}", found.versions, wanted.versions)
    if differences:
        raise InputError(
            f"{path} holds another run ({_name(found)}), which --resume cannot go on with: "
            f"{'; '.join(differences)}. Give the same options, or another --out directory."
        )


def _hashes(manifest: Manifest) -> dict[str, str]:
    return {name: file.sha256[:12] for name, file in manifest.inputs.items()}


def _differences(label: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    names = sorted((there.keys() | here.keys()) - _FREE_OPTIONS)
    return [
        f"{label.format(name.replace('_', '-'))} {there.get(name)!r} there, {here.get(name)!r} here"
        for name in names
        if there.get(name) != here.get(name)
    ]
