"""Every method and node kind on a real server: the numbers are those of the model here, and little comes back.

The table is printed when all tests have run (`conftest.py`).
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from patchkit.model import PatchModel
from patchkit.runtime import Execution, load_hosted, use_execution
from patchkit.zoo.load import load
from tests.method_cases import cases, gap
from tests.remote.conftest import Row, Server

pytestmark = pytest.mark.remote

MODELS = ("varbind-llama", "varbind-llama-gqa")
#: The names are the same for every model.
NAMES = tuple(cases(load(MODELS[1])))
#: What is the same on every model is run on one of them.
TWICE = (
    "patch z",
    "patch k",
    "attribute, atp-star",
    "edges, eap",
    "edges, eap-ig-inputs",
    "paths",
    "circuits",
)


@pytest.fixture(scope="module")
def models(server: Server) -> dict[str, tuple[PatchModel, PatchModel]]:
    return {name: (load(name), load_hosted(name, server.url)) for name in MODELS}


@pytest.mark.parametrize(
    ("name", "case"),
    [("varbind-llama-gqa", case) for case in NAMES] + [("varbind-llama", case) for case in TWICE],
)
def test_a_method_gives_the_same_there(
    name: str, case: str, models: dict[str, tuple[PatchModel, PatchModel]], rows: list[Row]
) -> None:
    here, there = models[name]
    call = cases(here)[case]
    expected = call(here)
    execution = Execution()
    with use_execution(execution):
        found = call(there)
    traffic = execution.hosts[there.hosted.url].traffic  # type: ignore[union-attr]
    difference = gap(found, expected)
    rows.append(Row(name, case, difference, traffic.jobs, traffic.sent, traffic.received))
    assert difference <= 1e-6
    # Numbers by pair and node or edge; a mean that is put in is the one activation that travels, once.
    if case != "patch, mean":
        assert traffic.received < 20_000 * traffic.jobs, "more came back than numbers by node or edge"


def test_the_package_is_not_there(server: Server) -> None:
    assert not list(Path(server.python).parents[1].glob("lib/python*/site-packages/patchkit*"))
    assert Path(sys.executable) != server.python
