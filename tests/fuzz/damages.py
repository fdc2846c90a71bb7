"""Kinds of damage to a file, each with a name: what became of its bytes, of its place, or of a value inside its JSON."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEEP = 200_000


@dataclass(frozen=True)
class Damage:
    """One kind of damage.

    Attributes:
        do: makes a sound file a damaged one.
        harmless: what is read is the same.
        applies: whether a file of this content can have it.
    """

    name: str
    do: Callable[[Path], object]
    harmless: bool = False
    applies: Callable[[bytes], bool] = lambda content: True


def of_bytes(name: str, change: Callable[[bytes], bytes], *, harmless: bool = False) -> Damage:
    def do(path: Path) -> None:
        path.write_bytes(change(path.read_bytes()))

    return Damage(name, do, harmless, lambda content: change(content) != content)


def _middle(content: bytes, inserted: bytes) -> bytes:
    half = len(content) // 2
    return content[:half] + inserted + content[half:]


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _absent(path: Path) -> None:
    path.unlink()


def _dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("is not there"))


def _loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def _linked(path: Path) -> None:
    path.rename(path.with_name("moved.bin"))
    path.symlink_to(path.with_name("moved.bin"))


#: Of any file at all.
PLACES = (
    Damage("absent", _absent),
    Damage("a directory in its place", _directory),
    Damage("a link to nothing", _dangling),
    Damage("a link to itself", _loop),
    Damage("a link to the file", _linked, harmless=True),
)
BINARY = (
    of_bytes("empty", lambda content: b""),
    of_bytes("one byte", lambda content: content[:1]),
    of_bytes("cut in the middle", lambda content: content[: len(content) // 2]),
    of_bytes("without its last byte", lambda content: content.rstrip()[:-1]),
    of_bytes("without its first byte", lambda content: content[1:]),
    of_bytes("all zero bytes", lambda content: bytes(len(content))),
    of_bytes("all bytes 255", lambda content: b"\xff" * len(content)),
    of_bytes("white space only", lambda content: b" \n\t\n"),
    of_bytes("a web page", lambda content: b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>\n"),
    of_bytes(
        "a pointer of Git LFS",
        lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    ),
    of_bytes("a zip archive", lambda content: b"PK\x03\x04" + bytes(60)),
    of_bytes("a gzip file", lambda content: b"\x1f\x8b\x08\x00" + content),
    of_bytes("a picture", lambda content: b"\x89PNG\r\n\x1a\n" + bytes(100)),
)
#: Of text.
TEXT = (
    of_bytes("a byte-order mark in front", lambda content: b"\xef\xbb\xbf" + content, harmless=True),
    of_bytes(
        "lines end as on Windows",
        lambda content: content.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"),
        harmless=True,
    ),
    of_bytes("line breaks after the end", lambda content: content + b"\n\n\n", harmless=True),
    of_bytes("UTF-16", lambda content: content.decode().encode("utf-16")),
    of_bytes("UTF-16 without a mark", lambda content: content.decode().encode("utf-16-be")),
    of_bytes("UTF-32", lambda content: content.decode().encode("utf-32")),
    of_bytes("a zero byte inside", lambda content: _middle(content, b"\0")),
    of_bytes("zero bytes at the end", lambda content: content + bytes(512)),
    of_bytes("a byte that is not UTF-8", lambda content: _middle(content, b"\xff")),
    of_bytes("Latin-1 text", lambda content: _middle(content, b"\xe9t\xe9")),
    of_bytes("half a character of UTF-8", lambda content: _middle(content, b"\xe2\x82")),
    of_bytes("a surrogate in UTF-8", lambda content: _middle(content, b"\xed\xa0\x80")),
    of_bytes("nested 200,000 deep", lambda content: b"[" * DEEP + b"]" * DEEP),
    of_bytes("objects nested 200,000 deep", lambda content: b'{"a":' * DEEP + b"1" + b"}" * DEEP),
    of_bytes("one line of a million letters", lambda content: b"a" * 1_000_000),
    of_bytes("itself twice", lambda content: content.rstrip() + content),
    of_bytes(
        "its second half first", lambda content: content[len(content) // 2 :] + content[: len(content) // 2]
    ),
)
#: Of one JSON document.
DOCUMENTS = (
    of_bytes("a list around it", lambda content: b"[" + content + b"]"),
    of_bytes("null", lambda content: b"null"),
    of_bytes("a number", lambda content: b"3"),
    of_bytes("a string", lambda content: b'"text"'),
    of_bytes("an empty object", lambda content: b"{}"),
    of_bytes("an empty list", lambda content: b"[]"),
    of_bytes("a comma too many", lambda content: content.rstrip()[:-1] + b",}"),
    of_bytes("single quotes", lambda content: content.replace(b'"', b"'")),
    of_bytes("a comment in front", lambda content: b"// written by hand\n" + content),
    of_bytes(
        "without quotes around names", lambda content: content.replace(b'":', b":", 1).replace(b'"', b"", 1)
    ),
    of_bytes("a key twice", lambda content: _twice(content)),
)


def _twice(content: bytes) -> bytes:
    """The document's first key once more, with its own value."""
    data = json.loads(content)
    if not isinstance(data, dict):
        return content
    key = next(iter(data))
    text = content.decode().lstrip()
    return ("{" + f"{json.dumps(key)}: {json.dumps(data[key])}, " + text[1:]).encode()


# Values inside JSON.

HUGE = 10**400
#: What may stand where something else belongs, by the kind of what belonged there.
WRONG: dict[str, tuple[tuple[str, Any], ...]] = {
    "text": (
        ("a number for text", 3),
        ("a boolean for text", True),
        ("null for text", None),
        ("a list for text", ["a"]),
        ("an object for text", {"a": 1}),
        ("half a surrogate pair in text", "\ud800"),
    ),
    "whole": (
        ("text for a whole number", "3x"),
        ("digits in quotes for a whole number", "3"),
        ("a boolean for a whole number", True),
        ("a fraction for a whole number", 2.5),
        ("a list for a whole number", [1]),
        ("an object for a whole number", {}),
        ("NaN for a whole number", float("nan")),
        ("infinity for a whole number", float("inf")),
    ),
    "fraction": (
        ("text for a fraction", "wide"),
        ("digits in quotes for a fraction", "0.5"),
        ("a boolean for a fraction", False),
        ("a list for a fraction", [0.5]),
        ("an object for a fraction", {}),
        ("NaN for a fraction", float("nan")),
        ("infinity for a fraction", float("-inf")),
        ("a number beyond all floats", HUGE),
    ),
    "boolean": (
        ("text for a boolean", "true"),
        ("a number for a boolean", 1),
        ("a fraction for a boolean", 0.0),
        ("null for a boolean", None),
        ("a list for a boolean", [True]),
    ),
    "list": (
        ("text for a list", "a, b"),
        ("a number for a list", 3),
        ("an object for a list", {"0": 1}),
        ("a boolean for a list", False),
        ("null for a list", None),
    ),
    "object": (
        ("text for an object", "{}"),
        ("a list for an object", []),
        ("a number for an object", 0),
        ("a boolean for an object", True),
        ("null for an object", None),
    ),
}


MISSING, UNKNOWN = "a field that is missing", "a field that nobody knows"
FIELDS = (MISSING, UNKNOWN, *(name for kinds in WRONG.values() for name, _ in kinds))


def kind_of(value: Any) -> str:
    match value:
        case bool():
            return "boolean"
        case int():
            return "whole"
        case float():
            return "fraction"
        case str():
            return "text"
        case list():
            return "list"
        case dict():
            return "object"
    return "null"


def places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Paths to the values inside a JSON value; of items that are alike the first stands for all."""
    if path:
        yield path
    if isinstance(value, dict):
        shapes = {tuple(item) if isinstance(item, dict) else None for item in value.values()}
        alike = len(value) > 1 and len(shapes) == 1 and None not in shapes
        for key, item in list(value.items())[: 1 if alike else None]:
            yield from places(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value[:1]):
            yield from places(item, (*path, index))


def at(value: Any, path: tuple[str | int, ...]) -> Any:
    for step in path:
        value = value[step]
    return value


def replaced(value: Any, path: tuple[str | int, ...], new: Any) -> Any:
    """A copy with another value at a path."""
    changed = copy.deepcopy(value)
    at(changed, path[:-1])[path[-1]] = new
    return changed


def removed(value: Any, path: tuple[str | int, ...]) -> Any:
    changed = copy.deepcopy(value)
    del at(changed, path[:-1])[path[-1]]
    return changed


def said(path: tuple[str | int, ...]) -> str:
    return ".".join(map(str, path))


# Safetensors.


def header_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def packed(header: Any, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def _first(header: dict[str, Any]) -> dict[str, Any]:
    return next(entry for name, entry in header.items() if name != "__metadata__")


def in_header(name: str, change: Callable[[dict[str, Any]], Any]) -> Damage:
    """A lie in the entry of the first tensor."""

    def do(path: Path) -> None:
        header, body = header_of(path.read_bytes())
        change(_first(header))
        path.write_bytes(packed(header, body))

    return Damage(name, do)


def _entry(key: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda entry: entry.update({key: value})


def _length(path: Path, length: int) -> None:
    content = path.read_bytes()
    path.write_bytes(struct.pack("<Q", length) + content[8:])


SAFETENSORS = (
    Damage("a header of length 0", lambda path: _length(path, 0)),
    Damage("a header longer than the file", lambda path: _length(path, 1 << 20)),
    Damage("a header of 2^63 bytes", lambda path: _length(path, 1 << 63)),
    Damage("a header of 2^64 - 1 bytes", lambda path: _length(path, (1 << 64) - 1)),
    Damage("a header that ends too early", lambda path: _length(path, 12)),
    Damage("a header that is a list", lambda path: path.write_bytes(packed([], b""))),
    Damage("a header without tensors", lambda path: path.write_bytes(packed({}, b""))),
    Damage("a header that is not UTF-8", lambda path: path.write_bytes(packed(b'{"\xff": 1}', b""))),
    in_header("a shape that is not that of the bytes", _entry("shape", [1_000_003])),
    in_header("a shape below zero", _entry("shape", [-1])),
    in_header("a shape of 2^63", _entry("shape", [1 << 63])),
    in_header("a shape that overflows", _entry("shape", [1 << 33, 1 << 33])),
    in_header("a shape in words", _entry("shape", "all")),
    in_header("a shape of fractions", _entry("shape", [1.5])),
    in_header("a type that there is not", _entry("dtype", "F31")),
    in_header("a type that torch has not", _entry("dtype", "F6_E2M3")),
    in_header("a type of another width", _entry("dtype", "F64")),
    in_header("a type that is a number", _entry("dtype", 32)),
    in_header("offsets behind the end", _entry("data_offsets", [0, 1 << 40])),
    in_header("offsets the wrong way round", _entry("data_offsets", [64, 0])),
    in_header("offsets below zero", _entry("data_offsets", [-8, 0])),
    in_header("offsets of three numbers", _entry("data_offsets", [0, 4, 8])),
    in_header("no offsets", lambda entry: entry.pop("data_offsets")),
    in_header("no shape", lambda entry: entry.pop("shape")),
    in_header("no type", lambda entry: entry.pop("dtype")),
    of_bytes("a byte between header and tensors", lambda c: packed(header_of(c)[0], b"\0" + header_of(c)[1])),
    of_bytes("bytes after the tensors", lambda content: content + bytes(64)),
    of_bytes("tensors cut short", lambda content: content[:-4]),
    of_bytes("tensors that overlap", lambda content: _overlapping(content)),
    of_bytes("a tensor under another name", lambda content: _renamed(content)),
    of_bytes(
        "metadata of numbers",
        lambda c: packed({**header_of(c)[0], "__metadata__": {"a": 1}}, header_of(c)[1]),
    ),
    of_bytes(
        "metadata that is a list", lambda c: packed({**header_of(c)[0], "__metadata__": []}, header_of(c)[1])
    ),
)


def _overlapping(content: bytes) -> bytes:
    header, body = header_of(content)
    header["twin"] = dict(_first(header))
    return packed(header, body)


def _renamed(content: bytes) -> bytes:
    header, body = header_of(content)
    return packed({name if name == "__metadata__" else f"{name}x": e for name, e in header.items()}, body)
