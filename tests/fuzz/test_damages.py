"""How many kinds of damage are tried: each has a name of its own."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.fuzz import test_commands, test_lines, test_models, test_permissions, test_values
from tests.fuzz.damages import BINARY, DOCUMENTS, FIELDS, PLACES, SAFETENSORS, TEXT

#: Beside `make test`, in a lane of its own.
pytestmark = pytest.mark.slow

OF_FILES = [damage for kind in (PLACES, BINARY, TEXT, DOCUMENTS, SAFETENSORS) for damage in kind]
NAMES = [
    *(damage.name for damage in OF_FILES if not damage.harmless),
    *FIELDS,
    *test_lines.NAMES,
    *test_values.NAMES,
    *test_models.NAMES,
    *test_commands.NAMES,
    *test_permissions.NAMES,
]


def test_there_are_more_than_a_hundred_kinds_of_damage() -> None:
    twice = [name for name, count in Counter(NAMES).items() if count > 1]
    assert twice == [] and len(NAMES) >= 300
