"""Masks of a hosted model: whole loops in one job, or in as many as there must be, and the mask that is learned here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.methods import hosted_masks
from tests.plain_commands import plain_environment

# Some eighty jobs, each of which takes a second to pack.
pytestmark = pytest.mark.slow

#: Of a run in which nothing goes wrong: three parts opened; a path; its pruning; validation and training scores of the
#: chosen set; all sets on the test triples, and the soft mask.
JOBS = hosted_masks.OPENED + 6
STEPS = 6


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    ended = subprocess.run(
        [sys.executable, "-m", "tests.methods.hosted_masks", str(tmp_path_factory.mktemp("masks"))],
        env=os.environ | plain_environment(),
        capture_output=True,
        text=True,
        timeout=600,
        cwd=Path(__file__).parents[2],
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


def test_a_whole_mask_takes_a_few_jobs(found: dict[str, Any]) -> None:
    assert found["whole"] == {"same": True, "chosen": found["whole"]["chosen"], "jobs": JOBS, "limit": None}
    assert found["whole"]["chosen"] > 0


def test_a_step_a_job_gives_the_same_gates(found: dict[str, Any]) -> None:
    """The published loss: its desiderata are opened one by one, and five steps are five jobs."""
    assert found["steps"]["same"] and found["steps"]["jobs"] > JOBS + 4


def test_a_job_over_the_hosts_time_limit_is_sent_again_with_half_the_time(found: dict[str, Any]) -> None:
    assert found["time limit"] == found["whole"] | {"jobs": JOBS + 1, "limit": 150.0}


def test_a_step_that_is_too_long_by_itself_says_so(found: dict[str, Any]) -> None:
    said = found["too long"]["error"]
    assert said.startswith("StepOverTime: training seed 1: a job took longer than http://127.0.0.1")
    assert "it was a single step" in said
    # Two seconds, one, and a step.
    assert found["too long"]["jobs"] == hosted_masks.OPENED + 3


def test_a_cancelled_job_is_sent_again(found: dict[str, Any]) -> None:
    assert found["cancelled"] == found["whole"] | {"jobs": JOBS + 1}


def test_an_interrupted_path_goes_on_in_the_middle_of_a_lambda(found: dict[str, Any]) -> None:
    case = found["interrupted"]
    assert case["first"]["error"].startswith("KeyboardInterrupt")
    assert "seed 1.state.pt" in case["left"] and "seed 1.json" not in case["left"]
    assert case["second"]["same"] and case["steps"] == list(range(4, STEPS + 1))
    assert case["kept"] == ["seed 1.json", "seed 1.safetensors"]


def test_a_job_that_runs_on_is_taken_up_again(found: dict[str, Any]) -> None:
    case = found["taken up"]
    assert "longer than --job-timeout allows" in case["first"]["error"]
    assert case["second"] == found["whole"] | {"jobs": JOBS - 1}
