"""The page of edges: what it says and shows for every method, with places, one pair, no scores, and hostile names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from patchkit.errors import InputError
from patchkit.model.edges import EdgeGraph
from patchkit.report import edges_page, write_edges_report, write_report
from patchkit.report._edge_conventions import blind_spots, conventions
from patchkit.report._edge_plots import layer_maps, needed, over_places, pictured, place_map, shares
from patchkit.report._edge_sections import onwards
from patchkit.report._edge_words import headline, method_name, warnings
from patchkit.report._html import arrows, signed
from patchkit.results.circuit import Circuit, top_n
from patchkit.results.convention import Convention
from patchkit.results.edge_scores import EdgeMethod, EdgeScores
from patchkit.results.formats import write_model
from tests.report_pages import EVIL, check_page, pictures, sections, tables, text

NAN = float("nan")
GRAPH = EdgeGraph(3, 4, 4, False, 32)
GROUPED = EdgeGraph(3, 4, 2, False, 32)
PLACES = ("subject", "verb", "-1")
WHOLE = ["circuit", "layers", "concentration", "top", "notes", "onwards", "conventions"]


def build(
    graph: EdgeGraph = GRAPH,
    pairs: int = 4,
    placed: bool = False,
    method: dict[str, Any] | None = None,
    **changed: Any,
) -> EdgeScores:
    """Scores with five large edges among many small ones; pairs that agree, and are kept."""
    generator = torch.Generator().manual_seed(0)
    places = (len(PLACES),) if placed else ()
    effects = 0.01 * torch.randn(pairs, *places, graph.n_senders, graph.n_receivers, generator=generator)
    large = {
        "input->m0": -3.0,
        "m0->a1.h1<q>": -2.0,
        "a1.h1->m2": -1.5,
        "m2->logits": -2.5,
        "a0.h1->a2.h1<k>": 1.0,
    }
    for name, value in large.items():
        sender, receiver = graph.find_edge(name)
        if placed:
            effects[:, 2, sender, receiver] += value
        else:
            effects[:, sender, receiver] += value
    effects = effects.masked_fill(~graph.real, NAN)
    fields: dict[str, Any] = {
        "graph": graph,
        "method": EdgeMethod(**({"name": "eap"} | (method or {}))),
        "convention": Convention(
            metric="logit-diff", direction="noise", ablation="resample", positions="each" if placed else "all",
            patching="edge",
        ),
        "pair_ids": tuple(f"p{i}" for i in range(pairs)),
        "mean": effects.mean(0),
        "mean_abs": effects.abs().mean(0),
        "base_metric": torch.full((pairs,), 3.25),
        "source_metric": torch.full((pairs,), -2.5),
        "cost": 4.0,
        "places": PLACES if placed else ("all",),
        "placed": placed,
        "per_pair": effects,
    }  # fmt: skip
    return EdgeScores(**(fields | changed))


def unscored(**changed: Any) -> EdgeScores:
    """Scores of which only the edges into the logits are known."""
    scores = build()
    known = torch.zeros_like(GRAPH.real)
    known[:, GRAPH.logits] = True
    mean = scores.mean.masked_fill(~known, NAN)
    return build(mean=mean, mean_abs=mean.abs(), per_pair=None, **changed)


@pytest.mark.parametrize("graph", [GRAPH, GROUPED], ids=["plain", "grouped"])
def test_the_page_is_whole_and_has_the_numbers(graph: EdgeGraph) -> None:
    scores = build(graph)
    page = edges_page(scores)
    check_page(page)
    assert sections(page) == WHOLE
    assert page.count("<svg") == 3
    (table,) = tables(page, "top")
    assert table[0] == [
        "",
        "edge",
        "mean effect",
        "95 % interval",
        "pairs of this sign, %",
        "mean |effect|",
        "of all, %",
    ]
    assert len(table) == 26
    total = float(scores.mean_abs.nansum())
    for rank, (row, (name, mean, size)) in enumerate(zip(table[1:], scores.top(25), strict=True)):
        assert row[:3] == [str(rank + 1), name, signed(mean, 3, plus=True)]
        low, high = (float(part.replace("−", "-")) for part in row[3].split(" to "))
        assert low <= mean + 1e-3 and mean - 1e-3 <= high
        assert row[5] == signed(size, 3)
        assert row[6] == f"{100 * size / total:.1f}"
    said = text(page)
    for words in (
        "Which edges matter: EAP",
        f"Of {graph.n_edges} edges, input->m0, m2->logits and m0->a1.h1<q> matter most. Cutting input->m0 is "
        "estimated to change logit-diff by −3.00 on average over 4 pairs; with every edge whole it is 3.25.",
        "Cut alone,",
        "--circuit DIR --top-n",
        "Negative: cutting the edge lowers the metric.",
    ):
        assert words in said
    assert ("one key and one value a KV head" in said) == (graph is GROUPED)


def test_one_pair_has_neither_means_nor_intervals() -> None:
    page = edges_page(build(pairs=1, per_pair=None))
    check_page(page)
    (table,) = tables(page, "top")
    assert table[0] == ["", "edge", "effect", "|effect|", "of all, %"]
    assert "by −3.01 on the one pair" in text(page) or "on the one pair" in text(page)
    assert "nothing here says how another prompt would come out" in text(page)


def test_places_have_a_map_and_sums_over_them() -> None:
    scores = build(placed=True)
    page = edges_page(scores)
    check_page(page)
    assert sections(page) == [*WHOLE[:4], "positions", *WHOLE[4:]]
    assert tables(page, "top")[0][1][1] == "input->m0@-1"
    made, names = place_map(scores)
    assert names[:2] == ["input->m0", "m2->logits"] and len(names) == 15
    assert torch.equal(made.cells[0], scores.mean[:, 0, GRAPH.find_receiver("m0")])
    totals = over_places(scores, scores.mean_abs)
    assert totals[GRAPH.find_edge("input->m0")] == pytest.approx(
        float(scores.mean_abs[:, 0, GRAPH.find_receiver("m0")].sum())
    )
    assert bool(totals[~GRAPH.real].isnan().all())


def test_the_largest_edges_are_pictured_and_no_others() -> None:
    scores = build()
    circuit = pictured(scores)
    assert circuit.n_edges == 40
    names = {name for name, _, _ in scores.top(40)}
    assert set(circuit.names()) == names
    (svg,) = pictures(edges_page(scores), "circuit")
    for name in ("input", "logits", "m0", "m2", "a1.h1", "works against it", "mean |effect|"):
        assert f">{name}" in svg


def test_layer_maps_add_up_to_all_effects() -> None:
    for graph in (GRAPH, GROUPED, EdgeGraph(3, 4, 4, True, 32)):
        scores = build(graph) if not graph.parallel else build(graph, mean=torch.ones(graph.real.shape).masked_fill(
            ~graph.real, NAN), mean_abs=torch.ones(graph.real.shape).masked_fill(~graph.real, NAN))  # fmt: skip
        maps, rows = layer_maps(scores)
        assert rows == ["input", "0", "1", "2"] and [len(made.columns) for made in maps] == [3, 3, 3, 3, 1]
        total = sum(float(made.cells.double().nansum()) for made in maps)
        assert total == pytest.approx(float(scores.mean_abs.double().nansum()), rel=1e-5)
        queries = scores.mean_abs[graph.heads(0), graph.receivers_of(2, "q")].sum() + scores.mean_abs[
            graph.mlp_sender(0), graph.receivers_of(2, "q")].sum()  # fmt: skip
        assert float(maps[0].cells[1, 2]) == pytest.approx(float(queries), rel=1e-5)
        # A cell is blank exactly where the graph has no edge.
        assert bool(maps[3].cells[1, 0].isnan()) == graph.parallel
        assert bool(maps[0].cells[1, 0].isnan())


def test_concentration_is_the_share_of_the_largest() -> None:
    sizes = torch.zeros(GRAPH.real.shape)
    sizes[0, :4] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    sizes = sizes.masked_fill(~GRAPH.real, NAN)
    scores = build(mean=-sizes, mean_abs=sizes, per_pair=None)
    held = shares(scores)
    assert held.tolist() == pytest.approx([0.4, 0.7, 0.9, 1.0])
    assert [needed(held, share) for share in (0.4, 0.5, 0.9, 0.95)] == [1, 2, 3, 4]
    assert f"Half of all mean |effect| is in the 2 largest of {GRAPH.n_edges} edges" in text(
        edges_page(scores)
    )


def test_routes_have_no_sign_and_leave_out_what_is_alone() -> None:
    ones = torch.rand(GRAPH.real.shape, generator=torch.Generator().manual_seed(0)) * 0.5
    ones[:, GRAPH.attention_receivers(0)] = 1.0
    ones = ones.masked_fill(~GRAPH.real, NAN)
    convention = Convention(
        metric="none", direction="noise", ablation="none", positions="all", patching="edge"
    )
    scores = build(method={"name": "ifr"}, mean=ones, mean_abs=ones, per_pair=None, convention=convention)
    page = edges_page(scores)
    check_page(page)
    said = text(page)
    assert "comes from" in said and "This says little" not in said
    assert not any("->a0." in row[1] for row in tables(page, "top")[0][1:])
    assert "Left out: receivers that have one sender only." in said
    assert ">helps<" not in pictures(page, "circuit")[0]
    # Each edge of a route ends at the logits or at a node that is read.
    circuit = pictured(scores)
    read = circuit.nodes
    owners = GRAPH.owner[read].any(0)
    owners[GRAPH.logits] = True
    assert bool(owners[circuit.edges.any(0)].all())


def test_what_acdc_kept_is_pictured_and_a_spent_budget_is_said() -> None:
    scores = build()
    circuit = top_n(GRAPH, scores.importance, 12, absolute=True)
    method = {"name": "acdc", "threshold": 0.5, "order": "reverse"}
    page = edges_page(build(method=method, circuit=circuit, per_pair=None, cost=321.5))
    check_page(page)
    said = text(page)
    assert f"ACDC kept 12 of {GRAPH.n_edges} edges" in said
    assert "cutting any one of the others cost less than 0.5 of logit-diff" in said
    assert "The circuit that ACDC kept" in said and "321.5 forward-equivalents" in said
    assert "The budget ended" not in said and "--top-n" not in said
    kept = {row[1]: row[-1] for row in tables(page, "top")[0][1:]}
    assert kept == {name: "yes" if name in circuit.names() else "no" for name, _, _ in scores.top(25)}
    spent = build(method={**method, "untried": 77}, circuit=circuit, per_pair=None)
    assert any("The budget ended before 77 edges were tried" in each for each in warnings(spent))
    assert "When its budget ended, ACDC had kept 12" in headline(spent)
    assert dict(conventions(spent, None))["visits"].endswith("the budget ended the run before 77 others.")
    nothing = build(method=method, circuit=Circuit.empty(GRAPH), per_pair=None)
    assert "ACDC kept none of" in headline(nothing)
    assert "circuit" not in sections(edges_page(nothing))


def test_edges_without_a_score_are_said_and_left_out() -> None:
    scores = unscored(method={"name": "exact"})
    page = edges_page(scores)
    check_page(page)
    missing = GRAPH.n_edges - GRAPH.n_senders
    assert f"{missing} of {GRAPH.n_edges} edges were not scored" in text(page)
    assert len(tables(page, "top")[0]) == 1 + GRAPH.n_senders
    nothing = torch.full(GRAPH.real.shape, NAN)
    bare = edges_page(build(mean=nothing, mean_abs=nothing, per_pair=None))
    check_page(bare)
    assert sections(bare) == ["notes", "onwards", "conventions"]
    assert "No edge was scored." in text(bare)
    flat = torch.zeros(GRAPH.real.shape).masked_fill(~GRAPH.real, NAN)
    assert f"None of {GRAPH.n_edges} edges changes logit-diff when it is cut." in text(
        edges_page(build(mean=flat, mean_abs=flat, per_pair=None))
    )


def test_effects_that_cancel_over_pairs_are_not_called_a_mean() -> None:
    scores = build()
    both = scores.per_pair.clone()  # type: ignore[union-attr]
    both[::2] *= -1
    changed = build(mean=both.mean(0), mean_abs=both.abs().mean(0), per_pair=both)
    assert "by 3.00 in size on average over 4 pairs, up and down (mean" in headline(changed)


@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_direction_turns_signs_and_the_warning(direction: str) -> None:
    kept = build().convention.model_copy(update={"direction": direction})
    scores = build(convention=kept)
    # Base metric is the larger: under denoise the corrupt prompts would then show the behaviour.
    assert bool(warnings(scores)) == (direction == "denoise")
    helps = dict(conventions(scores, None))["helps"]
    assert helps.startswith("the edge's effect is " + ("negative" if direction == "noise" else "positive"))
    svg = pictures(edges_page(scores), "circuit")[0]
    dashed = svg.count("stroke-dasharray") - svg.count("stroke-dasharray: 1")
    # All of the large edges but one lower the metric.
    solid = {"noise": 1, "denoise": 4}[direction]
    assert dashed >= solid


@pytest.mark.parametrize(
    ("method", "name", "words", "absent"),
    [
        ({"name": "eap"}, "EAP", "Where attention is saturated", "mean over drops"),
        ({"name": "eap", "qk_fix": True}, "EAP with the QK fix", "cancel in the gradient", "saturated"),
        ({"name": "eap", "grad_drop": True}, "EAP with GradDrop", "mean over drops", "cancel in the gradient"),
        ({"name": "eap", "qk_fix": True, "grad_drop": True}, "AtP* for edges", "mean over drops", "saturated"),
        ({"name": "eap-ig-inputs", "steps": 5, "rule": "repo"}, "EAP-IG (inputs)", "linear in what", "saturated"),
        ({"name": "exact"}, "exact edge patching", "An edge was cut alone", "linear"),
        ({"name": "acdc", "threshold": 0.1}, "ACDC", "order of its visits", "linear"),
        ({"name": "acdc", "threshold": 0.1, "absolute": True}, "ACDC", "are kept too", "`--absolute` keeps"),
        ({"name": "ifr"}, "information-flow routes", "not what the task needs", "linear"),
    ],
)  # fmt: skip
def test_each_method_says_what_it_is_and_cannot_see(
    method: dict[str, Any], name: str, words: str, absent: str
) -> None:
    scores = build(method=method)
    assert method_name(scores) == name
    said = " ".join(blind_spots(scores))
    assert words in said and absent not in said


def test_the_integral_is_spelled_out() -> None:
    facts = dict(conventions(build(method={"name": "eap-ig-inputs", "steps": 7, "rule": "midpoint"}), None))
    assert facts["integral"] == "7 steps; rule midpoint: the midpoints of m equal parts."
    repo = dict(conventions(build(method={"name": "eap-ig-activations", "steps": 5, "rule": "repo"}), None))
    assert "every site's path" in repo["integral"]


def test_text_of_users_is_only_text(make: Any) -> None:
    kept = Convention(metric=EVIL, direction="noise", ablation=EVIL, positions=EVIL, patching="edge")
    scores = build(placed=True, convention=kept, places=(EVIL, "b", "c"))
    page = edges_page(scores, make.manifest(options={"model": EVIL, "pairs": EVIL}), place=EVIL)
    check_page(page)
    assert arrows("a0.h1->m1<script>") == (
        '<span class="edge"><span class="nb">a0.h1-&gt;</span><wbr>m1&lt;script&gt;</span>'
    )


def test_a_directory_of_edges_gets_its_page_and_pictures(tmp_path: Path, make: Any) -> None:
    run = tmp_path / "run"
    build().save(run)
    write_model(run / "manifest.json", make.manifest(command="edges", options={"pairs": "pairs.jsonl"}))
    assert write_report(run) == run / "report.html"
    first = (run / "report.html").read_bytes()
    assert "patchkit evaluate --model varbind-llama --pairs pairs.jsonl --circuit run --top-n" in text(
        first.decode()
    )
    assert {path.name for path in run.glob("*.png")} == {"circuit.png", "layers.png", "concentration.png"}
    pngs = [path.read_bytes() for path in sorted(run.glob("*.png"))]
    assert all(png.startswith(b"\x89PNG") for png in pngs)
    write_edges_report(run)
    assert (run / "report.html").read_bytes() == first
    assert [path.read_bytes() for path in sorted(run.glob("*.png"))] == pngs
    nothing = torch.full(GRAPH.real.shape, NAN)
    build(mean=nothing, mean_abs=nothing, per_pair=None).save(run)
    write_report(run)
    assert not list(run.glob("*.png"))


def test_the_next_command_asks_for_other_pairs_and_quotes_names(make: Any) -> None:
    kept = build().convention.model_copy(update={"direction": "denoise", "ablation": "zero"})
    manifest = make.manifest(options={"task": "ioi", "model": "my models/one"}, seed=4)
    said = text(onwards(build(convention=kept), manifest, "ed ges"))
    assert "patchkit evaluate --model 'my models/one' --task ioi --circuit 'ed ges' --top-n " in said
    assert " --seed 5 --direction denoise --ablation zero --random 100 --out EVALUATION" in said
    assert "--positions all" in text(onwards(build(placed=True), manifest, "DIR"))


def test_a_directory_without_a_result_says_what_was_expected(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x", encoding="utf-8")
    with pytest.raises(
        InputError, match=r"edges\.json \(of `patchkit edges`\).*evaluation\.json.*paths\.json.*notes\.txt"
    ):
        write_report(tmp_path)
