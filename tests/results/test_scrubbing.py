"""Scrubbing results: saved and read as they are, and said in lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from patchkit import InputError
from patchkit.results.convention import Convention
from patchkit.results.scrubbing import SCRUBBING, ScrubbedInput, Scrubbing, ScrubNode, ScrubResult


def result(name: str = "value", recovered: float | None = 0.9, vacuous: int = 1) -> ScrubResult:
    node = ScrubNode(
        name="carried",
        key="the value of the queried variable",
        nodes=["a1.h0@last"],
        edges=[],
        positions="last",
        children=[],
        occurrences=1,
        buckets=3,
        bucket_sizes=(1, 2.0, 3),
        singletons=1,
        empty=0,
        draws=4,
        vacuous=vacuous,
    )
    return ScrubResult(
        hypothesis=name,
        claim="the head carries the value",
        model="m",
        convention=Convention(metric="logit-diff", direction="noise", ablation="resample", positions="last"),
        samples=2,
        seed=0,
        children=["carried"],
        nodes=[node],
        pool=6,
        inputs=[ScrubbedInput(id="0", model=4.0, random=0.0, scrubbed=3.6, spread=0.1)],
        model_metric=4.0,
        random_metric=0.0,
        scrubbed_metric=3.6,
        scrubbed_interval=(3.4, 3.8),
        recovered=recovered,
        recovered_interval=None if recovered is None else (0.85, 0.95),
        gap=0.1,
        kept=1.0,
        quantiles=(3.4, 3.5, 3.6, 3.7, 3.8),
        forwards=12.0,
        notes=["'carried': 1 of 4 draws were vacuous"],
    )


def test_what_is_saved_is_what_is_read(tmp_path: Path) -> None:
    kept = Scrubbing(question="?", results=[result(), result("name", None)], findings=["so"], seconds=1.5)
    kept.save(tmp_path)
    assert Scrubbing.load(tmp_path) == kept
    assert json.loads((tmp_path / SCRUBBING).read_text())["results"][1]["recovered"] is None
    assert kept.result("name").recovered is None
    with pytest.raises(KeyError, match="no hypothesis 'other' here, only value, name"):
        kept.result("other")


def test_one_result_is_a_file_of_its_own(tmp_path: Path) -> None:
    result().save(tmp_path)
    assert Scrubbing.load(tmp_path).results == [result()]


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        Scrubbing.load(tmp_path)
    (tmp_path / SCRUBBING).write_text('{"results": [{"hypothesis": "h"}]}')
    with pytest.raises(InputError, match="not a valid Scrubbing"):
        Scrubbing.load(tmp_path)
    (tmp_path / SCRUBBING).write_text('{"schema_version": 2, "results": []}')
    with pytest.raises(InputError, match="schema_version 1"):
        Scrubbing.load(tmp_path)


def test_lines_say_the_share_its_interval_and_the_notes() -> None:
    first, metrics, note = result().lines
    assert first == "value: recovered 0.900 [0.850, 0.950]"
    assert metrics == "  logit-diff: model 4, scrubbed 3.6, random 0 (1 inputs, 2 run(s) of each)"
    assert note == "  'carried': 1 of 4 draws were vacuous"
    assert result(recovered=None).lines[0] == "value: recovered undefined"


def test_the_share_of_vacuous_draws() -> None:
    assert result().vacuous == 0.25
    assert result().model_copy(update={"nodes": []}).vacuous == 0
