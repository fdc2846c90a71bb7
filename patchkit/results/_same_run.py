"""Whether the run that a directory holds is the one that is to go on: a difference is refused by its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from patchkit.errors import InputError
from patchkit.results._manifest_fields import Manifest, ModelRef

#: Options that change where or how loudly a run goes on, never its numbers.
PLACE_OPTIONS = frozenset(
    {"out", "resume", "quiet", "backend", "num_processes", "gpus_per_replica", "max_failures"}
    | {"host", "remote_concurrency", "job_timeout", "job_seconds", "patience"}
)
# What a resumed run may differ in beside those. Batches of another size, and devices that the model is spread over
# otherwise, give the same numbers but for rounding, and may be why a run is resumed, on another machine perhaps. The
# dtype and the implementation of attention change what every number is, to more than rounding of the last digit: half
# of the pairs in one way and half in the other would be the result of neither.
_FREE_OPTIONS = PLACE_OPTIONS | {"max_batch_tokens", "device_map"}

_OF_A_MODEL = {
    "id": "model",
    "revision": "revision of the model",
    "fingerprint": "fingerprint of the weights' names, shapes and dtypes and of the config",
    "content": "fingerprint of the weights' values",
}


def require_same(path: Path, found: Manifest, wanted: Manifest) -> None:
    """Raises InputError unless command, options, input files and package versions are the same."""
    differences = []
    if found.command != wanted.command:
        differences.append(f"command {found.command!r} there, {wanted.command!r} here")
    else:
        differences += _differences("--{}", found.options, wanted.options)
        differences += _differences("content of --{}", _hashes(found), _hashes(wanted))
        differences += _differences("version of {}", found.versions, wanted.versions)
    _refuse(path, found, differences, "options")


def require_same_model(path: Path, found: Manifest, model: ModelRef) -> None:
    """Raises InputError unless all that is known of both models is the same."""
    known = [] if found.model is None else [(name, getattr(found.model, name)) for name in _OF_A_MODEL]
    differences = [
        f"{_OF_A_MODEL[name]} {there!r} there, {here!r} here"
        for name, there in known
        if (here := getattr(model, name)) != there and None not in (there, here)
    ]
    _refuse(path, found, differences, "model")


def taken(path: Path, found: Manifest) -> InputError:
    """What to say where a run is in the way of a new one."""
    return InputError(
        f"{path} already holds a run: {_name(found)}. "
        "Choose another --out directory, or give --resume to go on with that run."
    )


def _refuse(path: Path, found: Manifest, differences: Sequence[str], what: str) -> None:
    if differences:
        raise InputError(
            f"{path} holds another run ({_name(found)}), which --resume cannot go on with: "
            f"{'; '.join(differences)}. Give the same {what}, or another --out directory."
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


def _name(manifest: Manifest) -> str:
    return f"`patchkit {manifest.command}`, started {manifest.started}, {manifest.status}"
