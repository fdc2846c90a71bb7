"""Files that results are written to and read from: tensors as safetensors, the rest as JSON, nothing pickled.

A file is either the old one or the complete new one, never half of it: `atomic_write` writes beside the
target, flushes to the disk and renames. A failure to write is a `RunError` (the run was fine, the disk was
not); a file that is missing or malformed when read is an `InputError` that names the file and, where there is
one, the line or field.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, float32

from patchkit.errors import InputError, RunError
from patchkit.files import atomic_write
from patchkit.reading import parse_json, read_bytes, read_text, require_file

Model = TypeVar("Model", bound=BaseModel)

_SHOWN_FIELDS = 5
# What may be a number that is not finite, or a whole one beyond all floats.
_BEYOND = re.compile("NaN|Infinity|[0-9]{309}")


def write_json(path: Path | str, value: Any) -> None:
    """Writes `value` (dicts, lists, strings, finite numbers, booleans, None) as indented JSON, atomically.

    Raises RunError naming the field when a number is NaN or infinite: JSON has no such numbers, and a reader
    in another language would fail on them. A value that is not defined is None.
    """
    for field, number in _numbers(value):
        if not _is_finite(number):
            raise RunError(
                f"{path}: cannot write field {field or '(top level)'}: it is {number}, and JSON has no such "
                "number. Nothing was written. A value that is not defined must be None."
            )
    atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path | str, *, finite: bool = False) -> Any:
    """Reads a JSON file. InputError names the file, and line and column where it is malformed.

    `finite` refuses NaN and infinities, which are not JSON, though graph files hold them.
    """
    path = Path(path)
    text = read_text(path, "a JSON file")
    try:
        return parse_json(text, finite=finite)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg}). "
            "The file was cut short or edited; write it again."
        ) from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON that can be read: {error}. Write it again.") from error


def write_model(path: Path | str, model: BaseModel) -> None:
    """Writes a pydantic model as JSON, atomically; fields declared `exclude=True` (tensors) are left out."""
    write_json(path, model.model_dump(mode="json"))


def read_model(path: Path | str, cls: type[Model], extra: Mapping[str, Any] | None = None) -> Model:
    """Reads what `write_model` wrote. `extra` gives the fields that are kept elsewhere, such as tensors.

    InputError names the file and each field that is missing, of the wrong type or unknown; a file of another
    `schema_version` is refused by that name rather than by its fields. Nothing is converted: `"3"` and `true` are no
    numbers, and a number is finite.
    """
    path, extra = Path(path), extra or {}
    data = read_json(path, finite=True)
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a JSON object that holds a {cls.__name__}, found {_kind(data)}.")
    version = cls.model_fields.get("schema_version")
    if version is not None and data.get("schema_version", version.default) != version.default:
        raise InputError(
            f"{path}: expected schema_version {version.default}, found {data['schema_version']!r}. "
            "Another version of patchkit wrote it: read it with that version, or run the command again."
        )
    found, problems = _read_fields(path, cls, data)
    problems = [
        problem for problem in problems if problem["type"] != "missing" or problem["loc"][0] not in extra
    ]
    if problems:
        raise InputError(_validation_message(path, cls, problems))
    if found is not None:
        return found.model_copy(update=extra) if extra else found
    # What is kept elsewhere is no JSON; all that is has been looked at.
    return cls.model_validate({**data, **extra})


def validated(path: Path, cls: type[Model], data: Any) -> Model:
    """A pydantic model of JSON values read from `path`; InputError names the file and the fields that are wrong."""
    found, problems = _read_fields(path, cls, data)
    if found is None:
        raise InputError(_validation_message(path, cls, problems))
    return found


def _read_fields(path: Path, cls: type[Model], data: Any) -> tuple[Model | None, list[Any]]:
    """(model, []), or (None, what is wrong with its fields).

    Raises:
        InputError: a number that no float can hold, or values that are none of JSON.
    """
    try:
        text = json.dumps(data)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: expected plain values for a {cls.__name__}, found others ({error})."
        ) from error
    if _BEYOND.search(text):
        for field, number in _numbers(data):
            if not _is_finite(number):
                raise InputError(
                    f"{path}: field {field}: expected a finite number, as large as a float can hold. "
                    "Run the command that writes it again."
                )
    try:
        return cls.model_validate_json(text, strict=True), []
    except ValidationError as error:
        return None, list(error.errors(include_url=False))


def save_tensors(
    path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes tensors of any shape as safetensors, atomically; floating tensors are stored as float32 always.

    `metadata` (strings to strings) goes into the file's header, where `load_metadata` finds it.
    """
    stored = {name: _storable(tensor) for name, tensor in tensors.items()}
    atomic_write(path, safetensors.torch.save(stored, metadata=dict(metadata) if metadata else None))


def load_tensors(path: Path | str) -> dict[str, Tensor]:
    """Reads every tensor of a safetensors file onto the CPU. InputError when it is missing or malformed."""
    path = Path(path)
    payload = read_bytes(path)
    try:
        return safetensors.torch.load(payload)
    except SafetensorError as error:
        raise _not_safetensors(path, error) from error


def load_metadata(path: Path | str) -> dict[str, str]:
    """Reads the header metadata of a safetensors file ({} without one). Errors as `load_tensors`."""
    path = Path(path)
    require_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise _not_safetensors(path, error) from error


def _storable(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().to("cpu")
    if tensor.is_floating_point():
        tensor = tensor.to(float32)
    # A copy of its own: safetensors refuses tensors that share memory, such as two views of one mask.
    return tensor.contiguous().clone()


def _not_safetensors(path: Path, error: Exception) -> InputError:
    return InputError(f"{path}: expected a safetensors file, found something else ({error}). Write it again.")


def _is_finite(number: int | float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:
        return False


def _numbers(value: Any, field: str = "") -> Iterator[tuple[str, int | float]]:
    """Every number inside nested dicts and lists, with the path that leads to it."""
    if isinstance(value, int | float):
        yield field, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _numbers(item, f"{field}.{key}" if field else str(key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _numbers(item, f"{field}[{index}]")


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _validation_message(path: Path, cls: type[BaseModel], problems: Sequence[Any]) -> str:
    lines = []
    for problem in problems[:_SHOWN_FIELDS]:
        field = ".".join(str(part) for part in problem["loc"]) or "(top level)"
        found = "" if problem["type"] == "missing" else f", found {str(problem['input'])[:60]!r}"
        lines.append(f"field {field}: {problem['msg']}{found}")
    more = len(problems) - _SHOWN_FIELDS
    if more > 0:
        lines.append(f"and {more} more")
    return f"{path}: not a valid {cls.__name__}: {'; '.join(lines)}. Run the command that writes it again."
