"""recall.json: what is written is read again, curves keep their ends, and settings are compared by aggregate."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from patchkit.errors import InputError
from patchkit.results.convention import Convention
from patchkit.results.recall import MethodRecall, RecallSetting, RecallStudy, log_spaced, thin


def method(name: str, aggregate: float) -> MethodRecall:
    return MethodRecall(
        name=name,
        preparation=4.0,
        aggregate=aggregate,
        unprepared=1.0,
        per_pair=[aggregate],
        ranks=[1, 3],
        cost=[5.0, 9.0],
    )


def setting(model: str, **aggregates: float) -> RecallSetting:
    return RecallSetting(
        model=model,
        material="ioi",
        evidence="pair",
        node_class="attention nodes",
        kinds=["q", "k", "v", "z"],
        convention=Convention(metric="logit-diff", direction="noise", ablation="resample", positions="each"),
        nodes=3,
        recalled=[3],
        pairs=1,
        methods=[method(name.replace("_", "-"), value) for name, value in aggregates.items()],
    )


def study() -> RecallStudy:
    return RecallStudy(
        settings=[setting("one", atp=2.0, atp_star=3.0, random=2.5), setting("two", atp=2.0, atp_star=1.5)],
        seeds={"pairs": 0},
        left_out=["nothing"],
        findings=["AtP is cheaper in one"],
        command="patchkit study attribution-recall",
        seconds=1.5,
    )


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    made = study()
    made.save(tmp_path)
    assert RecallStudy.load(tmp_path) == made
    (tmp_path / "recall.json").write_text('{"settings": []}')
    with pytest.raises(InputError, match=r"recall\.json: not a valid RecallStudy: field seeds"):
        RecallStudy.load(tmp_path)


def test_settings_are_compared_where_both_methods_ran() -> None:
    made = study()
    assert [s.model for s in made.cheaper("atp", "atp-star")] == ["one"]
    assert [s.model for s in made.cheaper("atp-star", "atp")] == ["two"]
    assert [s.model for s in made.cheaper("atp", "random")] == ["one"]
    assert [m.name for m in made.settings[0].ranking()] == ["atp", "random", "atp-star"]
    assert made.settings[0].method("random").relative == [5.0, 3.0]
    with pytest.raises(KeyError):
        made.settings[1].method("random")


@pytest.mark.parametrize("length", [1, 2, 7, 199, 200, 201, 5000, 123_457])
def test_thinned_curves_keep_first_and_last(length: int) -> None:
    ranks = log_spaced(length)
    assert ranks[0] == 1 and ranks[-1] == length
    assert ranks == sorted(set(ranks)) and len(ranks) <= 200
    if length <= 200:
        assert ranks == list(range(1, length + 1))
    assert thin([10.0 * x for x in range(1, length + 1)]) == (ranks, [10.0 * rank for rank in ranks])


def test_no_curve_is_an_empty_curve() -> None:
    assert thin([]) == ([], [])


@pytest.mark.parametrize(("ranks", "words"), [([1], "1 ranks for 2 costs"), ([3, 1], "ranks must ascend")])
def test_a_curve_that_does_not_fit_is_refused(ranks: list[int], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        MethodRecall(
            name="x", preparation=0, aggregate=1, unprepared=1, per_pair=[1], ranks=ranks, cost=[1.0, 2.0]
        )
