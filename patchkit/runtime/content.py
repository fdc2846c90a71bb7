"""A digest of what something is: equal in every process, on every machine and under every Python, for equal content.

What finished work is known by. Every value is written as a tag of its type, its length and its bytes, so that no two
different values are written alike; the digest is of all that. Containers are taken by what they hold: a list is a tuple,
a mapping or a set has no order. Of a dataclass count its class's name and its fields, except those with `compare=False`:
whatever changes nothing about the result (the size of batches, an item's running number) is declared so.

Numbers of different types differ (1, 1.0, True), as do tensors of different dtypes. -0.0 is not 0.0, whose inverse has
the other sign; all NaNs are one, outside tensors and arrays, of which the bytes count.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Mapping, Set
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor

# hashlib has no public name for what it gives.
_Hash = Any


def content_digest(*values: Any) -> str:
    """Digest of some values, 32 hexadecimal digits.

    Raises:
        TypeError: a value, or one inside it, whose content cannot be known: it names the type and where it is.
    """
    hashed = hashlib.sha256()
    _write(hashed, values)
    return hashed.hexdigest()[:32]


def _write(to: _Hash, value: Any) -> None:
    # Most of what there is, so it goes first.
    if type(value) is int:
        return _leaf(to, b"i", str(value).encode())
    if type(value) is str:
        return _leaf(to, b"s", value.encode("utf-8", "surrogatepass"))
    # A class may be of several kinds (an enum of numbers, a tuple with names): the most particular one counts.
    match value:
        case None:
            _leaf(to, b"n", b"")
        case Enum():
            _leaf(to, b"e", f"{_name(type(value))}.{value.name}".encode())
        case bool():
            _leaf(to, b"b", bytes([value]))
        case int():
            # Decimal, which has no size to choose.
            _leaf(to, b"i", str(int(value)).encode())
        case float():
            _leaf(to, b"f", b"nan" if math.isnan(value) else struct.pack(">d", value))
        case str():
            _leaf(to, b"s", value.encode("utf-8", "surrogatepass"))
        case bytes():
            _leaf(to, b"y", value)
        case Tensor():
            _tensor(to, value)
        case np.ndarray() | np.generic():
            _array(to, np.asarray(value))
        case torch.dtype():
            _leaf(to, b"d", str(value).encode())
        case type():
            _leaf(to, b"c", _name(value).encode())
        case FunctionType() | BuiltinFunctionType():
            _leaf(to, b"r", _function(value).encode())
        case _ if is_dataclass(value):
            _fields(to, value, _compared(type(value)))
        case BaseModel():
            _fields(to, value, [*type(value).model_fields, *(value.model_extra or {})])
        case tuple() | list():
            named = getattr(value, "_fields", None)
            if named is None and set(map(type, value)) == {int}:
                # Token ids, of which there are many: at once.
                _leaf(to, b"j", ",".join(map(str, value)).encode())
            elif named is None:
                _head(to, b"l", len(value))
                for part in value:
                    _write(to, part)
            else:
                _fields(to, value, named)
        case Set():
            _unordered(to, b"u", [_digest(part) for part in value])
        case Mapping():
            _unordered(to, b"m", [_digest(key) + _digest(part) for key, part in value.items()])
        case _:
            raise TypeError(f"{_name(type(value))} has no content that could be known again")


def _head(to: _Hash, tag: bytes, length: int) -> None:
    to.update(tag + struct.pack(">Q", length))


def _leaf(to: _Hash, tag: bytes, data: bytes) -> None:
    to.update(tag + struct.pack(">Q", len(data)) + data)


@cache
def _compared(of: Any) -> tuple[str, ...]:
    """Names of a dataclass's fields that are content."""
    return tuple(field.name for field in fields(of) if field.compare)


def _fields(to: _Hash, value: Any, names: Any) -> None:
    """Something with named parts: its class, then name and content of each."""
    _leaf(to, b"o", _name(type(value)).encode())
    _head(to, b"p", len(names))
    for name in names:
        _leaf(to, b"k", name.encode())
        try:
            _write(to, getattr(value, name))
        except TypeError as error:
            raise TypeError(f"{type(value).__name__}.{name}: {error}") from None


def _unordered(to: _Hash, tag: bytes, digests: list[bytes]) -> None:
    _head(to, tag, len(digests))
    for digest in sorted(digests):
        to.update(digest)


def _digest(value: Any) -> bytes:
    hashed = hashlib.sha256()
    _write(hashed, value)
    return hashed.digest()


def _tensor(to: _Hash, value: Tensor) -> None:
    if value.is_meta or value.layout != torch.strided:
        raise TypeError(
            f"a tensor that is {'on the meta device' if value.is_meta else value.layout} has no values to know it by"
        )
    _leaf(to, b"t", str(value.dtype).encode())
    _write(to, tuple(value.shape))
    flat = value.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    # By way of bytes, since NumPy knows no bfloat16.
    data = flat.view(torch.uint8).numpy()
    _head(to, b"v", data.nbytes)
    to.update(memoryview(data))  # pyright: ignore[reportArgumentType]


def _array(to: _Hash, value: np.ndarray) -> None:
    if value.dtype.hasobject:
        raise TypeError("an array of Python objects has no content that could be known again")
    _leaf(to, b"a", value.dtype.str.encode())
    _write(to, value.shape)
    _leaf(to, b"v", value.tobytes())


def _function(value: FunctionType | BuiltinFunctionType) -> str:
    if isinstance(value, BuiltinFunctionType) and not isinstance(value.__self__, ModuleType):
        raise TypeError(f"{value.__qualname__} is bound to something, which has a content of its own")
    name = _name(value)
    if "<" in name:
        raise TypeError(
            f"{name} is a function that only exists inside another one, which could hold anything; "
            "give one that a module defines"
        )
    return name


def _name(of: Any) -> str:
    return f"{of.__module__}:{of.__qualname__}"
