"""The page of path patching: stages in columns, maps and tables against the effects, both directions, and odd results."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.patches import PathPatch

from patchkit.report import paths_page, write_report
from patchkit.report._canvas import to_svg
from patchkit.report._paths_plot import MOST_PILLS, letters_of, moved, paths_figure, said_of, shown
from patchkit.report._paths_sections import headline, stage_figure, warnings
from patchkit.results.convention import Convention
from patchkit.results.formats import write_model
from patchkit.results.paths import PathEffect, PathResult, Stage
from tests.report_pages import EVIL, check_page, pictures, sections, tables, text

KEPT = Convention(
    metric="logit-diff", direction="noise", ablation="resample", positions="all", patching="edge"
)
PAIRS = 6


def effect(sender: str, value: float, **changed: Any) -> PathEffect:
    fields: dict[str, Any] = {
        "sender": sender, "effect": value, "effect_abs": abs(value) + 0.01, "share": value / 4.0,
        "interval": (value - 0.25, value + 0.25), "per_pair": [value] * PAIRS,
    }  # fmt: skip
    return PathEffect(**(fields | changed))


def build(**changed: Any) -> PathResult:
    """Three stages on a model of 3 layers x 4 heads: movers, what their queries read, and what that reads."""
    movers = [effect(f"a2.h{head}", value) for head, value in enumerate((-0.1, -2.0, 0.5, -1.0))]
    movers += [effect(f"a1.h{head}", 0.01 * head) for head in range(4)]
    inhibitors = [
        effect(f"a{layer}.h{head}", -0.4 * (layer == 1 and head == 2))
        for layer in (0, 1)
        for head in range(4)
    ]
    inhibitors += [effect("m0", -0.2), effect("m1", 0.0)]
    early = [effect("input", -1.5), *(effect(f"a0.h{head}", -0.1 * head) for head in range(4))]
    fields: dict[str, Any] = {
        "convention": KEPT,
        "model": "ioi-gpt2",
        "mlps": "recomputed",
        "positions": "all",
        "pair_ids": [f"p{i}" for i in range(PAIRS)],
        "base_metric": 3.0,
        "source_metric": -1.0,
        "iterative": True,
        "stages": [
            Stage(name="movers", receivers=["logits"], effects=movers, chosen=["a2.h1", "a2.h3"]),
            Stage(
                name="inhibitors",
                receivers=["a2.h1<q>", "a2.h3<q>"],
                effects=inhibitors,
                chosen=["a1.h2", "m0"],
            ),
            Stage(
                name="early",
                receivers=["a1.h2<k>", "a1.h2<v>", "m0"],
                effects=early,
                chosen=["input", "a0.h3"],
            ),
        ],
        "cost": 55.5,
        "notes": ["not run: `the rest`"],
    }
    return PathResult(**(fields | changed))


def one_stage(**changed: Any) -> PathResult:
    effects = [effect(f"a0.h{head}", -0.1 * head) for head in range(4)] + [effect("m0", 0.7)]
    stage = Stage(name="paths", receivers=["a1.h2<v>", "m1"], effects=effects, chosen=[])
    return build(**({"iterative": False, "stages": [stage], "notes": []} | changed))


@pytest.fixture(scope="module")
def page() -> str:
    return paths_page(build())


def test_the_page_is_whole_and_has_the_numbers(page: str) -> None:
    check_page(page)
    assert sections(page) == ["stages", "stage1", "stage2", "stage3", "notes", "conventions"]
    assert page.count('href="#stage') == 4
    (table,) = tables(page, "stage1")
    assert table[0] == ["sender", "mean effect", "95 % interval", "mean |effect|", "share, %"]
    assert table[1] == ["a2.h1", "−2.000", "−2.250 to −1.750", "2.010", "−50.0"]
    assert [row[0] for row in table[1:5]] == ["a2.h1", "a2.h3", "a2.h2", "a2.h0"]
    said = text(page)
    for words in (
        "Path patching in ioi-gpt2",
        "From the logits backwards: movers (a2.h1, a2.h3) act on the logits; inhibitors (a1.h2, m0) act on movers's "
        "queries; early (input, a0.h3) act on inhibitors's keys and values. Patching a2.h1 along its paths changes "
        "logit-diff by −2.00 (−50.0 % of the whole difference).",
        "not run: the rest",
        "at −100 % the metric has moved all the way to the corrupt run's",
        "55.5 forward-equivalents",
        "recomputed on the way from sender to receivers.",
    ):
        assert words in said
    assert len(re.findall(r'<tr class="mine">', page)) == 6


def test_stages_are_columns_joined_by_their_paths(page: str) -> None:
    figure = paths_figure(build())
    written = {str(text.get_text()): text.get_position() for text in figure.axes[0].texts}
    # From the right: the logits, who acts on them, who acts on these.
    assert written["logits"][0] > written["a2.h1"][0] > written["a1.h2"][0] > written["input"][0]
    assert written["a2.h1"][1] > written["a2.h3"][1]
    for words in (
        "movers",
        "to logits",
        "inhibitors",
        "to queries of movers",
        "to keys, values of inhibitors",
        "lowers the metric",
    ):
        assert words in written
    assert written["−50.0\u00a0%"][1] == written["a2.h1"][1]
    assert "raises it" not in written
    # One line for each sender, and one for each receiver's box: 2 + 1, 2 + 2 and 2 + 2.
    assert len([patch for patch in figure.axes[0].patches if isinstance(patch, PathPatch)]) == 11
    letters = [str(text.get_text()) for text in figure.axes[0].texts if text.get_text() in ("q", "k", "v")]
    # The MLP of the second stage has no letters.
    assert sorted(letters) == ["k", "q", "q", "v"]
    assert letters_of(build().stages[2]) == "kv"
    again = to_svg(paths_figure(build()), "alt", "x")
    assert again == to_svg(figure, "alt", "x") and "$" not in again
    assert len(pictures(page, "stages")) == 1


def test_maps_have_each_sender_in_its_cell() -> None:
    made = stage_figure(build().stages[1])
    assert made is not None
    (heads, mlps), rows = made
    assert rows == ["0", "1"]
    assert float(heads.cells[1, 2]) == pytest.approx(-0.1) and float(mlps.cells[0, 0]) == pytest.approx(-0.05)
    assert heads.outlined == {(1, 2)} and mlps.outlined == {(0, 0)}
    only = Stage(name="x", receivers=["m0"], effects=[effect("input", -1.0)], chosen=[])
    assert stage_figure(only) is None
    missing = stage_figure(Stage(name="x", receivers=["logits"], effects=[effect("a1.h1", -1.0)], chosen=[]))
    assert missing is not None and bool(missing[0][0].cells[0].isnan().all())


def test_a_plain_run_shows_the_largest_senders_and_its_receivers() -> None:
    plain = one_stage()
    body = paths_page(plain)
    check_page(body)
    assert sections(body) == ["stages", "stage1", "notes", "conventions"]
    assert headline(plain).startswith("Of 5 senders, m0, a0.h3, a0.h2 act most on a1.h2<v>, m1: patching m0")
    listed, more = shown(plain.stages[0])
    # A sender without an effect is not drawn.
    assert [e.sender for e in listed] == ["m0", "a0.h3", "a0.h2", "a0.h1"] and more == 0
    written = {str(text.get_text()) for text in paths_figure(plain).axes[0].texts}
    assert {"a1.h2<v>", "m1", "receivers", "2 together", "raises it", "lowers the metric"} <= written
    assert not {"q", "k", "v"} & written


def test_long_columns_are_cut_and_counted() -> None:
    many = [effect(f"a{layer}.h{head}", -0.1 - 0.01 * head) for layer in range(3) for head in range(12)]
    stage = Stage(name="all", receivers=["logits"], effects=many, chosen=[e.sender for e in many])
    long = build(stages=[stage])
    listed, more = shown(stage)
    assert len(listed) == MOST_PILLS - 1 and more == len(many) - len(listed)
    assert f"and {more} more" in {str(text.get_text()) for text in paths_figure(long).axes[0].texts}
    assert f"At most {MOST_PILLS} a column." in text(paths_page(long))


def test_under_denoise_raising_the_metric_is_the_whole_way() -> None:
    kept = KEPT.model_copy(update={"direction": "denoise"})
    restored = effect("a2.h1", 2.0, share=-0.5)
    found = build(
        convention=kept, base_metric=-1.0, source_metric=3.0,
        stages=[Stage(name="movers", receivers=["logits"], effects=[restored], chosen=["a2.h1"])],
    )  # fmt: skip
    assert moved(restored) == 0.5 and said_of(restored) == "+50.0\u00a0%"
    assert warnings(found) == []
    said = text(paths_page(found))
    assert "at +100 % the metric has moved all the way to the clean run's" in said
    assert "changes logit-diff by +2.00 (+50.0 % of the whole difference)" in said
    assert warnings(build(base_metric=-2.0)) and warnings(build(convention=kept))


def test_no_effect_no_stage_and_no_share() -> None:
    nothing = one_stage(
        stages=[Stage(name="x", receivers=["logits"], effects=[effect("m0", 0.0)], chosen=[])]
    )
    body = paths_page(nothing)
    check_page(body)
    assert "No sender changes logit-diff along the paths that were patched." in text(body)
    assert "stages" not in sections(body)
    empty = build(stages=[])
    check_page(paths_page(empty))
    assert to_svg(paths_figure(empty), "alt", "x")
    ended = build(
        stages=[
            build().stages[0],
            Stage(name="early", receivers=["a2.h1<q>"], effects=[effect("m0", 0.0)], chosen=[]),
        ]
    )
    check_page(paths_page(ended))
    assert "none" in {str(text.get_text()) for text in paths_figure(ended).axes[0].texts}
    flat = one_stage(source_metric=3.0)
    bare = [each.model_copy(update={"share": None, "interval": None}) for each in flat.stages[0].effects]
    flat = flat.model_copy(update={"stages": [flat.stages[0].model_copy(update={"effects": bare})]})
    body = paths_page(flat)
    check_page(body)
    assert tables(body, "stage1")[0][1] == ["m0", "+0.7000", "–", "0.7100", "–"]


def test_one_pair_has_no_means() -> None:
    body = paths_page(one_stage(pair_ids=["p"]))
    assert tables(body, "stage1")[0][0] == ["sender", "effect", "|effect|", "share, %"]
    assert "There is one pair" in text(body)


@pytest.mark.parametrize(
    ("value", "said"), [(-0.5, "−12.5\u00a0%"), (0.0, "0.0\u00a0%"), (-0.0004, "−0.0100\u00a0%")]
)
def test_small_shares_keep_their_digits(value: float, said: str) -> None:
    assert said_of(effect("m0", value)) == said


def test_text_of_users_is_only_text(make: Any) -> None:
    stage = Stage(name=EVIL, receivers=["logits", EVIL], effects=[effect(EVIL, -1.0)], chosen=[EVIL])
    evil = build(
        model=EVIL,
        notes=[EVIL],
        positions=EVIL,
        convention=KEPT.model_copy(update={"metric": EVIL}),
        stages=[stage],
    )
    check_page(paths_page(evil, make.manifest(options={"model": EVIL}), place=EVIL))


def test_a_directory_of_paths_gets_its_page_and_picture(tmp_path: Path, make: Any) -> None:
    run = tmp_path / "run"
    build().save(run)
    write_model(run / "manifest.json", make.manifest(command="paths"))
    assert write_report(run) == run / "report.html"
    assert {path.name for path in run.glob("*.png")} == {"paths.png"}
    assert "patchkit rerun run" in (run / "report.html").read_text(encoding="utf-8")
    build(stages=[]).save(run)
    write_report(run)
    assert not list(run.glob("*.png"))
