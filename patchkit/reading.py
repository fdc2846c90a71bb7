"""Reading a file whole, as bytes, text or JSON: whatever is wrong with it is an `InputError` that names it.

The counterpart of `files`. Text is UTF-8; a byte-order mark and line ends of Windows are no part of it.
"""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any, NoReturn

from patchkit.errors import InputError

# The longest first: that of UTF-32 begins as that of UTF-16 does.
_OTHER_MARKS = (
    ("UTF-32", (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)),
    ("UTF-16", (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)),
)


def exists(path: Path) -> bool:
    """Whether there is something at a path, links followed.

    Raises:
        InputError: the system does not let it be looked for, or the name cannot be one.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: cannot be looked at: {_reason(error)}. Check the name and its permissions."
        ) from error
    return True


def is_directory(path: Path) -> bool:
    """Whether there is a directory at a path. InputError as `exists`."""
    return exists(path) and path.is_dir()


def names_in(directory: Path) -> list[str]:
    """Names of what is in a directory, sorted. InputError where the system does not say."""
    try:
        return sorted(item.name for item in directory.iterdir())
    except OSError as error:
        raise InputError(
            f"{directory}: cannot be looked into: {_reason(error)}. Check its permissions."
        ) from error


def require_file(path: Path, what: str = "a file") -> None:
    """Raises InputError where there is no file at a path; `what` says what was expected."""
    if not exists(path):
        beside = "" if path.parent.is_dir() else f" (there is no directory {path.parent})"
        link = f" (it is a link to {path.readlink()})" if path.is_symlink() else beside
        raise InputError(
            f"{path}: no such file{link}; expected {what}. Check the path, or run the command that writes it."
        )
    if path.is_dir():
        raise InputError(f"{path}: expected {what}, found a directory. Give the file inside it.")


def read_bytes(path: Path, what: str = "a file") -> bytes:
    """The content of a file. InputError where it is missing, is no file (as `require_file`), or cannot be read."""
    require_file(path, what)
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {_reason(error)}. Check its permissions.") from error


def read_text(path: Path, what: str = "a file") -> str:
    """The text of a file, its lines ended by line feeds.

    Raises:
        InputError: as `read_bytes`; or it is not UTF-8, or has zero bytes in it, as text never has.
    """
    content = read_bytes(path, what)
    for encoding, marks in _OTHER_MARKS:
        if content.startswith(marks):
            raise InputError(f"{path}: expected UTF-8 text, found {encoding}. Save it as UTF-8.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: expected UTF-8 text, found byte {error.start} that is not. Save it as UTF-8, or get the file again."
        ) from error
    if "\0" in text:
        raise InputError(
            f"{path}: expected text, found a zero byte at {content.index(0)}: the file is binary, in UTF-16, or was "
            "damaged. Save it as UTF-8, or get the file again."
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parse_json(text: str, *, finite: bool = True) -> Any:
    """The value that a JSON text stands for.

    Args:
        finite: NaN and infinities are refused, which are not JSON though Python writes them.

    Raises:
        JSONDecodeError: where the text is not JSON.
        ValueError: a key that is there twice, a number that is none, brackets without end, half a surrogate pair.
    """
    try:
        value = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_refuse_constant if finite else None
        )
        # Half of a surrogate pair can be escaped in JSON, but is no text: it can be neither printed nor written.
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("it has half of a surrogate pair in a text, which stands for no letter") from None
    except ValueError as error:
        if "integer string conversion" in str(error):
            raise ValueError("it has a whole number of thousands of digits") from None
        raise
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(
            f"the key {next(key for key in keys if keys.count(key) > 1)!r} appears twice; keep one of them"
        )
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
