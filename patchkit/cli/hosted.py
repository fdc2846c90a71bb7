"""Commands on a model that stays on its host: what they may be given, the log of what the host says, and what their
manifest keeps."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from patchkit.cli.console import say
from patchkit.errors import InputError, PatchkitError

if TYPE_CHECKING:
    from patchkit.cli.run_options import RunOptions
    from patchkit.model import PatchModel
    from patchkit.results.manifest import RunDir, Traffic

#: Of a host that cannot be reached, one line on the screen in so many seconds.
_EVERY = 30.0
_KEPT_FACTS = ("dtype", "device", "attn_implementation", "gradients")
_VERSIONS = ("python", "nnsight", "torch", "transformers")


def check_hosted(shared: RunOptions) -> None:
    """Raises InputError for options of hosted models without one, and with one for those that place a model."""
    own = (
        ("--host", shared.host),
        ("--remote-concurrency", shared.remote_concurrency),
        ("--job-timeout", shared.job_timeout),
        ("--job-seconds", shared.job_seconds),
        ("--patience", shared.patience),
    )
    if not shared.hosted:
        for option, value in own:
            if value is not None:
                raise InputError(f"{option} {value} belongs to --backend ndif; give both")
        return
    if shared.device_map is not None:
        raise InputError(
            f"--device-map {shared.device_map}: a hosted model stays where its host has put it; leave it out"
        )
    if shared.num_processes is not None:
        raise InputError(
            f"--num-processes {shared.num_processes} belongs to --backend accelerate; with --backend ndif give "
            "--remote-concurrency, the jobs that are under way at a time"
        )
    if shared.remote_concurrency is not None and shared.remote_concurrency < 1:
        raise InputError(f"--remote-concurrency {shared.remote_concurrency}: expected at least 1")
    if shared.job_timeout is not None and not shared.job_timeout > 0:
        raise InputError(f"--job-timeout {shared.job_timeout:g}: expected a number of seconds above 0")
    if shared.job_seconds is not None and not shared.job_seconds > 0:
        raise InputError(f"--job-seconds {shared.job_seconds:g}: expected a number of seconds above 0")
    if shared.patience is not None and not shared.patience >= 0:
        raise InputError(f"--patience {shared.patience:g}: expected a number of seconds of at least 0")
    if shared.host is not None:
        check_url(shared.host)


def check_url(host: str) -> None:
    """Raises InputError where `--host` is no URL of a server, or holds a key, which would be kept with the run."""
    parts = urlsplit(host)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise InputError(
            f"--host {host}: expected a URL such as http://127.0.0.1:8001 or https://api.ndif.us."
        )
    if "@" in parts.netloc or parts.query:
        raise InputError(
            f"--host {parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}: found a user, password or query in "
            "it, expected the address alone; a key belongs into NDIF_API_KEY."
        )


@contextmanager
def on_host(out: Path | None, quiet: bool) -> Iterator[None]:
    """Inside, what the host says goes to `host.log` of the run, if it has a directory; an error and an interrupt say what
    is there."""
    from patchkit.results.manifest import HOST_LOG
    from patchkit.runtime import current_execution

    with HostLog(None if out is None else out / HOST_LOG, quiet) as log:
        try:
            yield
        except PatchkitError:
            if log.errors and log.path is not None:
                say(f"What the host said, with its traceback, is in {log.path}")
            raise
        except KeyboardInterrupt:
            if count := 0 if out is None else _under_way(out):
                jobs = "1 job that was sent runs" if count == 1 else f"{count} jobs that were sent run"
                say(f"{jobs} on at the host, which cannot be told to stop; --resume takes up what they give.")
            raise
        finally:
            for host in current_execution().hosts.values():
                host.close()


class HostLog(logging.Handler):
    """A file for the messages of `patchkit.host`, which is there once there is one; a lost connection is also said on the
    screen, now and then.

    Attributes:
        errors: whether a job has failed.
    """

    def __init__(self, path: Path | None, quiet: bool = False) -> None:
        super().__init__(logging.INFO)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self.path, self.errors = path, False
        self._quiet, self._said = quiet, -_EVERY
        self._logger = logging.getLogger("patchkit.host")
        self._level = self._logger.level

    def __enter__(self) -> HostLog:
        self._logger.addHandler(self)
        self._logger.setLevel(logging.INFO)
        return self

    def __exit__(self, *error: object) -> None:
        self._logger.removeHandler(self)
        self._logger.setLevel(self._level)

    def emit(self, record: logging.LogRecord) -> None:
        self.errors |= record.levelno >= logging.ERROR
        if self.path is not None:
            self._write(self.path, self.format(record))
        if record.levelno == logging.WARNING and time.monotonic() - self._said >= _EVERY:
            self._said = time.monotonic()
            self._show(record.getMessage())

    def _write(self, path: Path, line: str) -> None:
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            # The run itself says more of a full disk; the log is not worth ending it.
            self.path = None
            self._show(f"{path} could not be written ({error.strerror}); the run goes on without it")

    def _show(self, text: str) -> None:
        from patchkit.runtime import current_execution

        watcher = current_execution().watcher
        if watcher is None:
            say(text, self._quiet)
        else:
            watcher.message(text)


def note_hosted(run: RunDir, models: Sequence[PatchModel]) -> None:
    """Notes where hosted models are and what they are there, and when the run ends, what went over the wire."""
    from patchkit.results.manifest import HostedModel

    found = [model.hosted for model in models if model.hosted is not None]
    if not found:
        return
    run.record(hosted=[HostedModel(host=each.url, key=each.key, facts=_kept(each.facts)) for each in found])
    earlier = run.manifest.traffic
    run.last_fields = lambda: {"traffic": _traffic(earlier)}


def _kept(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: facts[name] for name in _KEPT_FACTS} | {
        "versions": {name: facts[name] for name in _VERSIONS}
    }


def _traffic(earlier: Traffic | None) -> Traffic:
    """Of this run, with what it took before it was resumed."""
    from patchkit.results.manifest import Traffic
    from patchkit.runtime import current_execution

    parts: list[Any] = [host.traffic for host in current_execution().hosts.values()]
    parts += [] if earlier is None else [earlier]
    return Traffic(**{name: sum(getattr(part, name) for part in parts) for name in Traffic.model_fields})


def _under_way(out: Path) -> int:
    """Jobs that were sent and have not been taken back."""
    from patchkit.results.manifest import CHECKPOINT

    return len(list((out / CHECKPOINT).glob("**/jobs/*.json")))
