"""What `patchkit doctor --host` looks at: is the server there, does it fit what runs here, can it do what is needed."""

from __future__ import annotations

import os
import platform
import statistics
import time
from importlib.metadata import version
from typing import Any

import httpx
from nnsight import CONFIG

from patchkit.cli.checks import Check
from patchkit.cli.hosted import HostLog, check_url
from patchkit.errors import PatchkitError
from patchkit.model import PatchModel
from patchkit.runtime import Execution, load_hosted, use_execution
from patchkit.runtime.probe import run_alone

_MUST_MATCH = ("nnsight", "torch", "transformers")
_SHOWN_MODELS = 6
_ROUND_TRIPS = 3
#: Of a job that asks for a model, which a host may have to bring up first.
_JOB_SECONDS = 600.0
#: A round trip that takes longer is most of what small batches take.
_LONG_TRIP = 5.0


def host_checks(host: str, timeout: float = 10.0, model: str | None = None) -> list[Check]:
    """Whether an NDIF server answers at `host`, has its workers, and runs what runs here; with a model, what it can do.

    Raises InputError when `host` is not an http(s) URL. `timeout` is in seconds, for each request.
    """
    check_url(host)
    base = host.rstrip("/")
    try:
        _get(f"{base}/ping", timeout)
    except httpx.HTTPError as error:
        return [Check("host", "failed", f"{base}: {_reason(error)}", _host_todo(error))]
    checks = [Check("host", "ok", f"{base} answers"), _key(base, timeout)]
    try:
        _get(f"{base}/connected", timeout)
        checks.append(Check("host workers", "ok", "connected"))
    except httpx.HTTPError as error:
        todo = "Wait a minute and ask again; the server is up, its workers are not."
        checks.append(Check("host workers", "failed", _reason(error), todo))
    checks.append(_models(base, timeout))
    try:
        env = _get(f"{base}/env", timeout).json()
        checks += [_python(env), _packages(env)]
    except (httpx.HTTPError, ValueError) as error:
        todo = "Ask its operator for its Python, nnsight, torch and transformers; they must be those that are here."
        checks.append(Check("host versions", "warning", _reason(error), todo))
    return checks if model is None else [*checks, *model_checks(base, timeout, model)]


def model_checks(host: str, timeout: float, name: str) -> list[Check]:
    """What the host has under a model's name, whether it differentiates, and how long an empty job takes."""
    execution = Execution(patience=timeout, job_timeout=_JOB_SECONDS)
    with use_execution(execution), HostLog(None, quiet=True):
        try:
            model = load_hosted(name, host)
        except PatchkitError as error:
            todo = "Check its name, and ask the host's operator whether it is deployed."
            return [Check("model there", "failed", str(error), todo)]
        try:
            return [_deployed(model), _gradients(model), _round_trip(model)]
        except PatchkitError as error:
            return [Check("round trip", "failed", str(error), "Try again, or ask the host's operator.")]
        finally:
            for each in execution.hosts.values():
                each.close()


def _deployed(model: PatchModel) -> Check:
    assert model.hosted is not None
    facts = model.hosted.facts
    where = f"{facts['dtype']}, attention {facts['attn_implementation']}, on {facts['device']}"
    return Check("model there", "ok", f"{model.name}: {where}; sites read and patched as they should be")


def _gradients(model: PatchModel) -> Check:
    assert model.hosted is not None
    if model.hosted.gradients:
        return Check("gradients there", "ok", "a job can differentiate: every method works")
    why = model.hosted.facts.get("no_gradients") or "it does not say why"
    todo = (
        "Methods of forward passes work there: patch, paths, edges --method exact or acdc, evaluate. For the others ask "
        "its operator to trust your key."
    )
    return Check("gradients there", "warning", f"none: {why}", todo)


def _round_trip(model: PatchModel) -> Check:
    times = []
    for _ in range(_ROUND_TRIPS):
        began = time.monotonic()
        run_alone(model, nothing)
        times.append(time.monotonic() - began)
    middle = statistics.median(times)
    todo = "Larger --max-batch-tokens make fewer jobs, a higher --remote-concurrency more at a time."
    return Check(
        "round trip",
        "ok",
        f"{middle:.2f} s for an empty job (median of {_ROUND_TRIPS})",
        todo if middle > _LONG_TRIP else "",
    )


def nothing(model: PatchModel) -> dict[str, Any]:
    """Job: what every job takes, and no more."""
    return {"ok": True}


def _key(base: str, timeout: float) -> Check:
    """Whether a key is set, and whether the host knows it; the key itself is shown nowhere."""
    key, where = os.environ.get("NDIF_API_KEY"), "NDIF_API_KEY"
    if not key:
        key, where = CONFIG.API.APIKEY, "nnsight's CONFIG.API.APIKEY"
    if not key:
        todo = "If the host wants a key: export NDIF_API_KEY=..., or run `nnsight login`."
        return Check("host key", "ok", "NDIF_API_KEY is not set", todo)
    try:
        said = _get(f"{base}/whoami", timeout, {"ndif-api-key": key}).json()
    except (httpx.HTTPError, ValueError):
        said = None
    if isinstance(said, dict) and said.get("email"):
        return Check("host key", "ok", f"{where} is set, and the host knows it")
    todo = "If jobs are refused, it is none of this host's: ask its operator for one."
    return Check("host key", "ok", f"{where} is set; the host asks for none, or does not know it", todo)


def _models(base: str, timeout: float) -> Check:
    todo = "Hosts do not list all that they have: ask for one with --model NAME."
    try:
        found = _get(f"{base}/status", timeout).json()["deployments"]
        up = {
            str(each.get("repo_id", key)): None
            for key, each in found.items()
            if "RUNNING" in (each.get("application_state"), each.get("state"))
        }
    except (httpx.HTTPError, ValueError, KeyError, TypeError, AttributeError) as error:
        return Check("models up", "warning", f"it does not say ({_reason(error)})", todo)
    if not up:
        return Check("models up", "warning", "it lists none", todo)
    more = f" and {len(up) - _SHOWN_MODELS:,} more" if len(up) > _SHOWN_MODELS else ""
    return Check("models up", "ok", f"{', '.join(list(up)[:_SHOWN_MODELS])}{more}")


def _python(env: Any) -> Check:
    said = str(env.get("python_version") or "") if isinstance(env, dict) else ""
    here = platform.python_version()
    if not said:
        todo = f"Ask its operator: it must be Python {_minor(here)}, as here."
        return Check("host Python", "warning", "it does not say", todo)
    there = said.split()[0]
    if _minor(there) == _minor(here):
        return Check("host Python", "ok", f"{there}; here {here}")
    todo = f"Make an environment with Python {_minor(there)} here: jobs hold bytecode, which fits one version alone."
    return Check("host Python", "failed", f"{there}; here {here}", todo)


def _minor(number: str) -> str:
    return ".".join(number.split(".")[:2])


def _packages(env: Any) -> Check:
    packages = env.get("packages", {}) if isinstance(env, dict) else {}
    there = {name: str(packages[name]).split("+")[0] for name in _MUST_MATCH if name in packages}
    here = {name: version(name).split("+")[0] for name in there}
    shown = ", ".join(f"{name} {number}" for name, number in there.items()) or "it does not say"
    other = [name for name in there if there[name] != here[name]]
    if not there or other:
        lines = " ".join(f"{name}=={there[name]}" for name in other)
        todo = (
            f"To match it here: pip install {lines}" if other else "Ask its operator which nnsight it runs."
        )
        return Check("host packages", "warning", shown, todo)
    return Check("host packages", "ok", shown)


def _get(url: str, timeout: float, headers: dict[str, str] | None = None) -> httpx.Response:
    """Redirects are not followed: they might lead the key elsewhere."""
    answer = httpx.get(url, timeout=timeout, headers={"User-Agent": "patchkit-doctor", **(headers or {})})
    if not answer.is_success:
        raise httpx.HTTPStatusError(
            f"HTTP status {answer.status_code} {answer.reason_phrase}",
            request=answer.request,
            response=answer,
        )
    return answer


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _host_todo(error: httpx.HTTPError) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        return "Something else than an NDIF server may be there: check address, port and path."
    if isinstance(error, httpx.TimeoutException):
        return "Check that the server runs, and that no firewall or proxy stands between."
    return "Check the address, and start the server if it is yours; local runs need none (--backend local)."
