"""A host of models (an NDIF server) over HTTP: sending jobs, asking after them, fetching what they gave.

Every call has a time limit. What fails because the connection does is tried again, slower and slower, for as long as the
user's patience; jobs have no effects but their results, so that one may be sent twice.
"""

from __future__ import annotations

import logging
import math
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, TypeVar

import httpx
from nnsight import CONFIG
from nnsight.schema.request import RequestModel
from nnsight.schema.response import ResponseModel, Status

from patchkit.errors import InputError, RunError

logger = logging.getLogger("patchkit.host")
# Silent, unless whoever uses it asks to hear: a host's tracebacks are long.
logger.addHandler(logging.NullHandler())
Value = TypeVar("Value")

#: Seconds: to connect, and to read or write a piece of an answer.
CONNECT_SECONDS, READ_SECONDS = 10.0, 120.0
#: A job of which nothing is heard for so long, where something should be, is lost.
LOST_SECONDS = 60.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
#: The server is there but cannot just now.
_LATER = (408, 425, 429, 500, 502, 503, 504)
HIDDEN = "[key]"


class Unreachable(Exception):
    """A call that may be tried again."""


@dataclass(frozen=True)
class Answer:
    """The state of a job: `result` once it is done, `error` where it failed, neither as long as it runs."""

    status: str
    result: bytes | None = None
    error: str | None = None

    @property
    def over(self) -> bool:
        return self.result is not None or self.error is not None


@dataclass
class Watch:
    """A job that is waited for: when that began, and what was heard of it last, in seconds of the monotonic clock."""

    began: float = field(default_factory=time.monotonic)
    known: float = field(default_factory=time.monotonic)
    changed: float = field(default_factory=time.monotonic)
    status: str = ""

    def lost(self, answer: Answer | None, host: Host) -> bool:
        """Whether a job that is not over must be taken for lost: its host knows of none, or was away in the meantime and
        has left its state as it was since. (A queue that is killed leaves the last state of its jobs for ever.)"""
        now = time.monotonic()
        if answer is None:
            return now - self.known > LOST_SECONDS
        self.known = now
        if answer.status != self.status:
            self.status, self.changed = answer.status, now
        return host.back > self.began and now - max(host.back, self.changed) > LOST_SECONDS


@dataclass
class Traffic:
    """What went over the wire."""

    requests: int = 0
    jobs: int = 0
    sent: int = 0
    received: int = 0


@dataclass
class Host:
    """An NDIF server.

    Attributes:
        url: where it is.
        patience: seconds for which a lost connection is tried again.
        back: when it could be reached again after it could not, of the monotonic clock.
        job_seconds: that a job may take there, as far as its time limit has shown.
    """

    url: str
    patience: float = 600.0
    traffic: Traffic = field(default_factory=Traffic)
    back: float = -math.inf
    job_seconds: float = math.inf

    def __post_init__(self) -> None:
        self.url = self.url.rstrip("/")
        if not self.url.startswith(("http://", "https://")):
            raise InputError(
                f"host '{self.url}': expected a URL such as http://127.0.0.1:8001 or https://api.ndif.us"
            )
        self._client = httpx.Client(timeout=httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS))
        # Its connections are held open for the next call, and closed when nobody can call any more.
        self._closing = weakref.finalize(self, self._client.close)

    def close(self) -> None:
        self._closing()

    def send(self, model_key: str, env: dict[str, Any], blob: bytes) -> str:
        """Sends a job; its id.

        Raises:
            InputError: the host does not take this key, or knows nothing of such requests.
            RunError: it cannot be reached, or has refused the job.
        """
        request = RequestModel(model_key=model_key, compress=True, env=env)
        headers = {
            "ndif-timestamp": repr(time.time()),
            "nnsight-version": version("nnsight"),
            "python-version": sys.version,
        }

        def post() -> str:
            answer = self._call(
                "POST",
                f"{self.url}/request",
                data={"data": request.metadata()},
                files={"blob": ("request", blob, "application/octet-stream")},
                headers=headers,
            )
            return ResponseModel.model_validate_json(answer.text).id

        sent = self.patiently(post)
        self.traffic.jobs += 1
        self.traffic.sent += len(blob)
        logger.info("job %s: sent, %d bytes", sent, len(blob))
        return sent

    def look(self, job: str) -> Answer | None:
        """How a job stands; None where the host knows of none (yet, or any more)."""
        found = self.patiently(lambda: self._call("GET", f"{self.url}/response/{job}", missing=True))
        if found is None:
            return None
        response = ResponseModel.model_validate_json(found.text)
        status = response.status.value
        if response.status == Status.ERROR:
            text = hide(response.description or "no reason was given")
            logger.error("job %s failed on the host:\n%s", job, text)
            return Answer(status, error=text)
        if response.status != Status.COMPLETED:
            return Answer(status)
        data = self.patiently(lambda: self._download(str(response.data)))
        self.traffic.received += len(data)
        logger.info("job %s: %d bytes back", job, len(data))
        return Answer(status, result=data)

    def patiently(self, call: Callable[[], Value]) -> Value:
        """The call's value, tried again while the connection fails."""
        began, pause = time.monotonic(), _FIRST_PAUSE
        while True:
            try:
                value = call()
                if pause > _FIRST_PAUSE:
                    self.back = time.monotonic()
                return value
            except Unreachable as error:
                waited = time.monotonic() - began
                if waited + pause > self.patience:
                    raise RunError(
                        f"{self.url} could not be reached for {waited:.0f} s ({error}). What is finished is kept; go on "
                        "with --resume when it is back"
                    ) from error
                logger.warning("%s: %s; tried again in %.1f s", self.url, error, pause)
            self.wait(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def wait(self, seconds: float) -> None:
        """Before the next look, or the next try."""
        time.sleep(seconds)

    def _download(self, url: str) -> bytes:
        # A link that is signed by itself: the key stays away from it.
        return self._call("GET", url, with_key=False).content

    def _call(
        self, method: str, url: str, *, missing: bool = False, with_key: bool = True, **given: Any
    ) -> Any:
        """The response; None for a 404 that is `missing`."""
        headers = dict(given.pop("headers", {}))
        key = CONFIG.API.APIKEY
        if key and with_key:
            headers["ndif-api-key"] = key
        self.traffic.requests += 1
        try:
            answer = self._client.request(method, url, headers=headers, **given)
        except httpx.HTTPError as error:
            raise Unreachable(hide(f"{type(error).__name__}: {error}")) from None
        if answer.status_code == 404 and missing:
            return None
        if answer.status_code < 400:
            return answer
        said = _detail(answer)
        if answer.status_code in _LATER:
            raise Unreachable(f"HTTP {answer.status_code}: {said}")
        if answer.status_code in (401, 403) or "API key" in said:
            raise InputError(
                f"{self.url} refuses the key (HTTP {answer.status_code}: {said}). Set NDIF_API_KEY, or nnsight's "
                "CONFIG.API.APIKEY, to a key of this host; " + ("one is set" if key else "none is set")
            )
        raise InputError(f"{self.url} refuses the request (HTTP {answer.status_code}: {said})")


def hide(text: str) -> str:
    """The text without the user's key."""
    key = CONFIG.API.APIKEY
    return text.replace(key, HIDDEN) if key else text


def _detail(answer: httpx.Response) -> str:
    try:
        body = answer.json()
        said = body.get("detail", body) if isinstance(body, dict) else body
    except ValueError:
        said = answer.text
    return hide(" ".join(str(said).split())[:500]) or "no reason was given"
