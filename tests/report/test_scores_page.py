"""The page of scores: what it says, shows and refuses, for every shape of grid and kind of result."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from patchkit.errors import InputError
from patchkit.model import Dims, NodeGrid
from patchkit.report import scores_page, write_report, write_scores_report
from patchkit.report._calibration_plot import calibration_figure
from patchkit.report._canvas import to_png, to_svg
from patchkit.report._html import decimals, signed
from patchkit.report._scores_maps import blocks
from patchkit.report._scores_plots import MOST_CELLS, block_figure, scores_figure
from patchkit.results.formats import write_model
from patchkit.results.scores import Convention, Scores
from patchkit.results.verification import Bound, BoundStratum, Verification, VerifiedNode

NAN = float("nan")
DIMS = Dims(
    n_layers=3, n_heads=4, n_kv_heads=2, d_head=8, d_model=32, d_mlp=64, vocab_size=50, parallel=False
)
EVIL = "<script>alert('x')</script> & \"q\" $x$ --> </style>"
PLACES = tuple(str(i) for i in range(6))


def build(grid: NodeGrid | None = None, pairs: int = 5, **changed: Any) -> Scores:
    """Scores with a few large effects among small ones, and clean prompts above corrupt ones."""
    grid = grid or NodeGrid(DIMS, ("z", "mlp_out"))
    generator = torch.Generator().manual_seed(0)
    effects = 0.02 * torch.randn(pairs, len(grid), generator=generator)
    effects[:, ::7] -= 1.5
    effects[:, 3] += 2.25
    fields: dict[str, Any] = {
        "grid": grid,
        "method": "atp",
        "convention": Convention(
            metric="logit-diff", direction="noise", ablation="resample", positions="each" if grid.placed else "all"
        ),
        "pair_ids": tuple(f"p{i}" for i in range(pairs)),
        "effects": effects,
        "magnitudes": effects.abs(),
        "base_metric": torch.full((pairs,), 3.25),
        "source_metric": torch.full((pairs,), -2.5),
        "cost": 3.0,
    }  # fmt: skip
    return Scores(**(fields | changed))


def checked(scores: Scores, missed: bool = True, **changed: Any) -> Verification:
    """Six top nodes, overestimated by a tenth, and four of the rest; the last of them missed."""
    order = scores.order().tolist()
    nodes = []
    for place, number in enumerate([*order[:6], *order[-4:]]):
        size, mean = float(scores.mean_abs()[number]), float(scores.mean()[number])
        factor = 1000.0 if missed and place == 9 else 0.9
        nodes.append(
            VerifiedNode(
                node=scores.grid.name(number), number=number, estimate=size, signed=mean, exact=size * factor,
                exact_signed=mean * factor, group="top" if place < 6 else "sample", stratum="z.0",
            )
        )  # fmt: skip
    fields: dict[str, Any] = {
        "k": 6,
        "sampled": 4,
        "unverified": len(order) - 10,
        "rank_correlation": {"top": 0.75, "sample": None, "all": 0.625},
        "sign_agreement": {"top": 1.0, "sample": 0.5, "all": 0.8},
        "nodes": nodes,
        "cost": 9.5,
        "missed": [nodes[-1].node] if missed else [],
    }
    return Verification(**(fields | changed))


def bounded(strata: int = 2) -> Bound:
    return Bound(
        alpha=0.05,
        unverified=30,
        bound=0.25,
        familywise=0.5,
        strata=[
            BoundStratum(name=f"z.{i}", nodes=4, draws=64, p=0.25, bound=0.25, familywise=0.5) for i in range(strata)
        ],
        largest=[("a0.h2", -0.125, 0.5)],
        cost=64.0,
    )  # fmt: skip


class Tags(HTMLParser):
    """Checks that tags close in order, and keeps what would load or run something."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = dict(attrs)
        wanted = [value for name, value in attrs if name in ("src", "href") and value]
        self.loads += [value for value in wanted if not value.startswith(("#", "data:image/png"))]
        self.loads += [name for name in names if name.startswith("on")] + [tag] * (
            tag in ("script", "iframe")
        )
        if tag not in {"meta", "br", "wbr", "link", "img", "input", "hr"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def text(page: str) -> str:
    body = re.sub(r"<svg.*?</svg>|<style.*?</style>", "", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


def rows(page: str, anchor: str) -> list[list[str]]:
    table = page.split(f'<section id="{anchor}"')[1].split("<table")[1].split("</table>")[0]
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr.*?</tr>", table)]
    return [[html.unescape(re.sub(r"<[^>]*>", "", cell)) for cell in row] for row in cells]


def sections(page: str) -> list[str]:
    return re.findall(r'<section id="([^"]+)"', page)


GRIDS = [
    NodeGrid(DIMS, ("z", "mlp_out")),
    NodeGrid(DIMS, ("k", "z", "neuron", "attn_out", "resid_post")),
    NodeGrid(DIMS, ("q", "k", "v", "z"), PLACES, True),
    NodeGrid(DIMS, ("z", "resid_pre"), ("subject", "-1"), True),
    NodeGrid(DIMS, ("neuron",), PLACES, True, group=8),
    NodeGrid(DIMS, ("mlp_out",), PLACES, True),
]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("pairs", [1, 5])
def test_every_grid_has_a_whole_page(grid: NodeGrid, pairs: int) -> None:
    page = scores_page(build(grid, pairs))
    tags = Tags(page)
    assert tags.loads == []
    assert sections(page) == ["maps", "top", "notes", "conventions"]
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert "nan" not in text(page).lower()
    assert page.count("<svg") == len(blocks(build(grid, pairs)))


def test_the_headline_says_what_was_done_to_which_node() -> None:
    scores = build()
    said = text(scores_page(scores))
    name, mean, _ = scores.top(1)[0]
    assert "Of 15 nodes, a0.h3, " in said and " matter most." in said
    assert (
        f"Putting the corrupt prompt's {name} into the clean run is estimated to change logit-diff by "
        f"{signed(mean, 2, plus=True)} on average over 5 pairs; without a patch it is 3.25."
    ) in said


@pytest.mark.parametrize(
    ("convention", "words"),
    [
        ({"direction": "denoise"}, "Putting the clean prompt's a0.h3 into the corrupt run changes"),
        ({"ablation": "mean"}, "Putting the mean a0.h3 of the reference prompts into the clean run changes"),
        ({"ablation": "zero"}, "Setting a0.h3 to zero in the clean run changes"),
        ({"ablation": "noise"}, "Adding noise to a0.h3 in the clean run changes"),
        ({"metric": "kl"}, "changes kl by"),
    ],
)
def test_the_headline_follows_the_convention(convention: dict[str, str], words: str) -> None:
    kept = build().convention.model_copy(update=convention)
    assert words in text(scores_page(build(method="exact", convention=kept)))


def test_effects_that_cancel_over_pairs_are_not_called_a_mean() -> None:
    effects = torch.zeros(2, 15)
    effects[:, 4] = torch.tensor([2.0, -2.0])
    page = scores_page(build(pairs=2, effects=effects, magnitudes=effects.abs()))
    assert "by 2.00 in size on average over 2 pairs, up and down (mean 0.00)" in text(page)
    assert "The same maps of mean |effect|" in page
    assert "The same maps of mean |effect|" not in scores_page(build())


def test_no_effect_at_all_is_said_so() -> None:
    page = scores_page(build(effects=torch.zeros(5, 15), magnitudes=torch.zeros(5, 15)))
    assert "None of 15 nodes changes logit-diff when it is patched." in text(page)
    Tags(page)


@pytest.mark.parametrize(("clean", "warned"), [(3.0, False), (-2.5, True), (-4.0, True), (NAN, False)])
@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_pairs_without_the_behaviour_are_warned_of(clean: float, warned: bool, direction: str) -> None:
    metrics = [torch.full((5,), clean), torch.full((5,), -2.5)]
    base, source = metrics if direction == "noise" else metrics[::-1]
    kept = build().convention.model_copy(update={"direction": direction})
    page = scores_page(build(base_metric=base, source_metric=source, convention=kept))
    assert ("This says little" in text(page)) == warned


def test_the_table_has_the_numbers_of_the_scores() -> None:
    scores = build()
    low, high = scores.interval()
    head, *body = rows(scores_page(scores), "top")
    assert head == ["", "node", "mean effect", "95 % interval", "mean |effect|", "pairs of this sign, %"]
    assert len(body) == 15
    for rank, (row, (name, mean, size)) in enumerate(zip(body, scores.top(15), strict=True)):
        number = scores.grid.names().index(name)
        assert row == [
            str(rank + 1),
            name,
            signed(mean, 3, plus=True),
            f"{signed(float(low[number]), 3)} to {signed(float(high[number]), 3)}",
            signed(size, 3),
            row[5],
        ]
    assert body[0][5] == "100.0"
    assert len(rows(scores_page(build(GRIDS[2])), "top")) == 26


def test_one_pair_has_no_means_in_its_table() -> None:
    page = scores_page(build(pairs=1))
    assert rows(page, "top")[0] == ["", "node", "effect", "|effect|"]
    assert "nothing here says how another prompt would come out" in text(page)


def test_verified_nodes_show_their_exact_effects() -> None:
    scores = build()
    scores = build(verification=checked(scores), bound=bounded())
    page = scores_page(scores)
    Tags(page)
    assert sections(page) == ["maps", "top", "verification", "bound", "notes", "conventions"]
    head, *body = rows(page, "top")
    assert head[-2:] == ["exact effect", "exact |effect|"]
    _, mean, size = scores.top(1)[0]
    assert body[0][-2:] == [signed(0.9 * mean, 3, plus=True), signed(0.9 * size, 3)]
    assert body[7][-2:] == ["–", "–"]
    assert rows(page, "verification")[1:] == [
        ["top K by estimate", "6", "0.750", "100.0"],
        ["sample of the rest", "4", "–", "50.0"],
        ["both", "10", "0.625", "80.0"],
    ]
    said = text(page)
    assert "1 of the sampled have a larger exact |effect| than the least of the top 6" in said
    assert f"Missed: {scores.verification.missed[0]}" in said  # type: ignore[union-attr]
    assert "No estimate was checked" not in said
    assert "No unverified node has |effect| above 0.5 with confidence 95 %" in said
    assert "not its effect alone or on one pair" in said
    assert rows(page, "bound")[1] == ["z.0", "4", "64", "0.25", "0.250", "0.500"]
    assert "scores 3.0, exact checks 9.5, bound 64.0 forward-equivalents" in said


def test_nothing_missed_is_said_so() -> None:
    page = scores_page(build(verification=checked(build(), missed=False)))
    assert "No sampled node has a larger exact |effect| than the least of the top 6." in text(page)
    assert "Missed:" not in page


@pytest.mark.parametrize(("strata", "folded"), [(12, False), (13, True)])
def test_many_strata_fold(strata: int, folded: bool) -> None:
    page = scores_page(build(bound=bounded(strata)))
    assert (f"By kind and layer ({strata})" in page) == folded


@pytest.mark.parametrize(
    ("method", "kinds", "words", "absent"),
    [
        ("exact", ("q",), "A node was patched alone", "No estimate was checked"),
        ("atp", ("q", "z"), "Where attention is saturated", "mean over drops"),
        ("atp", ("z",), "cancel in the gradient", "Where attention is saturated"),
        ("atp", ("resid_pre",), "the linear estimate is poor", "Where attention is saturated"),
        ("atp-qk", ("q",), "cancel in the gradient", "Where attention is saturated"),
        ("atp-graddrop", ("k",), "Where attention is saturated", "cancel in the gradient"),
        ("atp-star", ("q",), "|effect| is a mean over drops", "Where attention is saturated"),
    ],
)
def test_each_method_says_what_it_cannot_see(
    method: str, kinds: tuple[str, ...], words: str, absent: str
) -> None:
    said = text(scores_page(build(NodeGrid(DIMS, kinds, PLACES, True), method=method)))
    assert words in said
    assert absent not in said


def test_text_of_users_is_only_text() -> None:
    grid = NodeGrid(DIMS, ("z", "resid_pre"), (EVIL, "end"), True)
    kept = Convention(metric=EVIL, direction="noise", ablation=EVIL, positions=EVIL)
    page = scores_page(build(grid, convention=kept, method=EVIL), place=EVIL)
    assert Tags(page).loads == []
    assert "<script" not in page


def test_maps_show_the_largest_over_the_axis_that_is_missing() -> None:
    grid = NodeGrid(DIMS, ("z",), PLACES, True)
    effects = torch.zeros(1, len(grid))
    effects[0, grid.find("a1.h2@4")] = -3.0
    effects[0, grid.find("a1.h2@1")] = 2.0
    effects[0, grid.find("a1.h0@4")] = 1.0
    effects[0, grid.find("a2.h3@0")] = NAN
    (block,) = blocks(build(grid, 1, effects=effects, magnitudes=effects.abs()))
    by_place, by_head = block.panels
    assert by_place.cells[1].tolist() == [0.0, 2.0, 0.0, 0.0, -3.0, 0.0]
    assert by_head.cells[1].tolist() == [1.0, 0.0, -3.0, 0.0]
    assert {(1, 4), (1, 1)} <= by_place.outlined
    assert {(1, 2), (1, 0)} <= by_head.outlined
    assert not bool(by_place.cells.isnan().any())


def test_whole_vectors_without_positions_share_a_map() -> None:
    scores = build(NodeGrid(DIMS, ("resid_pre", "z", "mlp_out")))
    vectors, heads = blocks(scores)
    assert vectors.kinds == ("resid_pre", "mlp_out")
    assert torch.equal(
        vectors.panels[0].cells, torch.stack([scores.mean("resid_pre"), scores.mean("mlp_out")], 1)
    )
    assert torch.equal(heads.panels[0].cells, scores.mean("z"))


def test_nodes_that_were_not_asked_for_are_blank() -> None:
    effects = build().effects.clone()
    effects[:, 4:] = NAN
    scores = build(effects=effects, magnitudes=effects.abs())
    page = scores_page(scores)
    assert "Blank cells were not asked for." in text(page)
    assert len(rows(page, "top")) == 5
    assert "Of 4 nodes" in text(page)


def test_pictures_can_be_drawn_and_follow_the_theme() -> None:
    scores = build(GRIDS[1])
    assert to_png(scores_figure(scores)).startswith(b"\x89PNG")
    for block in blocks(scores):
        svg = to_svg(block_figure(scores, block), block.alt, block.name)
        assert "var(--" in svg and "$" not in svg
    svg = to_svg(calibration_figure(checked(scores)), "alt", "cal")
    assert "estimate = exact" in svg and "$" not in svg


def test_dots_under_a_name_have_none_of_their_own() -> None:
    found = checked(build())
    same = [
        node.model_copy(update={"node": f"same{i}", "estimate": 1.0, "exact": 3.0})
        for i, node in enumerate(found.nodes)
    ]
    svg = to_svg(
        calibration_figure(found.model_copy(update={"nodes": same, "missed": ["same4"]})), "alt", "cal"
    )
    assert "same4" in svg and svg.count("same") == 1


def test_maps_of_very_many_cells_are_pictures() -> None:
    dims = Dims(
        n_layers=40, n_heads=80, n_kv_heads=8, d_head=2, d_model=160, d_mlp=9, vocab_size=9, parallel=False
    )
    scores = build(NodeGrid(dims, ("z", "k")))
    assert dims.n_layers * dims.n_heads > MOST_CELLS
    kv, heads = (to_svg(block_figure(scores, block), "alt", "x") for block in blocks(scores))
    assert "data:image/png" in heads and "data:image/png" not in kv
    assert Tags(scores_page(scores)).loads == []


def test_a_directory_of_scores_gets_its_page_and_pictures(tmp_path: Path, make: Any) -> None:
    run = tmp_path / "run"
    build(verification=checked(build())).save(run)
    write_model(run / "manifest.json", make.manifest(command="attribute", options={"model": EVIL}))
    assert write_report(run) == run / "report.html"
    page = (run / "report.html").read_text(encoding="utf-8")
    assert Tags(page).loads == []
    assert "Which nodes matter in varbind-llama: AtP" in text(page)
    assert "patchkit rerun run" in page
    assert "pairs used" in page
    assert {path.name for path in run.glob("*.png")} == {"scores.png", "calibration.png"}
    build().save(run)
    write_scores_report(run)
    assert {path.name for path in run.glob("*.png")} == {"scores.png"}


def test_a_spoilt_directory_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    build().save(tmp_path)
    (tmp_path / "pairs.parquet").unlink()
    with pytest.raises(InputError, match=r"pairs\.parquet: no such file"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("value", "places", "plus", "shown"),
    [
        (1.239, 2, False, "1.24"),
        (1.239, 2, True, "+1.24"),
        (-1.239, 1, True, "−1.2"),
        (-0.001, 2, False, "0.00"),
        (0.001, 2, True, "0.00"),
        (-12345.6, 0, False, "−12,346"),
        (float("inf"), 1, False, "inf"),
        (NAN, 1, False, "–"),
        (None, 1, False, "–"),
    ],
)
def test_signed_numbers(value: float | None, places: int, plus: bool, shown: str) -> None:
    assert signed(value, places, plus) == shown


@pytest.mark.parametrize(
    ("scale", "places"),
    [(250.0, 0), (12.0, 1), (3.0, 2), (0.3, 3), (0.02, 4), (1e-9, 4), (0.0, 2), (NAN, 2)],
)
def test_decimals_show_about_three_digits(scale: float, places: int) -> None:
    assert decimals(scale) == places
