"""A property that is worked out once for each object."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

Value = TypeVar("Value")


class once(Generic[Value]):  # noqa: N801 - used as a decorator
    """Like `functools.cached_property`, which holds a lock before Python 3.12 and so cannot travel to a hosted model with
    the class that it is in.

    Two threads that come first at the same time may both work it out; the objects here give the same value to both.
    """

    def __init__(self, function: Callable[[Any], Value]) -> None:
        self.function = function
        self.__doc__ = function.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner: type) -> once[Value]: ...
    @overload
    def __get__(self, instance: object, owner: type) -> Value: ...
    def __get__(self, instance: object | None, owner: type) -> once[Value] | Value:
        if instance is None:
            return self
        # Found there first the next time, before this descriptor.
        value = instance.__dict__[self.name] = self.function(instance)
        return value
