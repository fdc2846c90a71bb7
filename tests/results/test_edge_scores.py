"""Scores of edges come back from their directory as they went, by query head too, and what does not fit is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from patchkit.errors import InputError, RunError
from patchkit.model import EdgeGraph
from patchkit.results import edge_scores
from patchkit.results.circuit import Circuit, top_n
from patchkit.results.compare import compare_runs
from patchkit.results.convention import Convention
from patchkit.results.edge_scores import EdgeMethod, EdgeScores
from patchkit.results.formats import load_metadata, load_tensors, save_tensors
from patchkit.results.graph_files import read_graph
from patchkit.results.query_heads import by_query_graph, native_receivers, sum_groups

NAN = float("nan")
PLAIN = EdgeGraph(2, 2, 2, False, 6)
GROUPED = EdgeGraph(2, 4, 2, False, 8)
CONVENTION = Convention(
    metric="prob-diff", direction="noise", ablation="mean", positions="all", patching="edge"
)


def numbers(shape: tuple[int, ...], real: Tensor, seed: int) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.where(real, NAN)


def make(
    graph: EdgeGraph = PLAIN, *, places: int = 0, by_query: bool = False, pairs: bool = True, **changed: Any
) -> EdgeScores:
    shape = ((places,) if places else ()) + tuple(graph.real.shape)
    wide = by_query_graph(graph)
    wide_shape = shape[:-1] + (wide.n_receivers,)
    query = (numbers(wide_shape, wide.real, 3), numbers(wide_shape, wide.real, 4).abs())
    fields: dict[str, Any] = {
        "graph": graph,
        "method": EdgeMethod(name="eap-ig-inputs", steps=5, rule="repo"),
        "convention": CONVENTION.model_copy(update={"positions": "each" if places else "all"}),
        "pair_ids": ("a", "ü", "c"),
        "mean": sum_groups(graph, query[0]) if by_query else numbers(shape, graph.real, 1),
        "mean_abs": numbers(shape, graph.real, 2).abs(),
        "base_metric": torch.tensor([1.0, NAN, 3.0]),
        "source_metric": torch.tensor([0.5, 0.25, 1.5]),
        "cost": 3.25,
        "places": tuple(map(str, range(places))) if places else ("all",),
        "placed": bool(places),
        "by_query": query if by_query else None,
        "per_pair": numbers((3, *shape), graph.real, 5) if pairs else None,
    }
    return EdgeScores(**(fields | changed))


def same(left: Tensor, right: Tensor) -> bool:
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and torch.equal(left.isnan(), right.isnan())
        and torch.equal(left.nan_to_num(), right.nan_to_num())
    )


CASES: dict[str, EdgeScores] = {
    "plain": make(),
    "without-pairs": make(pairs=False),
    "grouped": make(GROUPED, by_query=True),
    "grouped-without-query-heads": make(GROUPED),
    "positions": make(places=3),
    "grouped-positions": make(GROUPED, places=2, by_query=True),
    "circuit": make(circuit=top_n(PLAIN, numbers(tuple(PLAIN.real.shape), PLAIN.real, 1), 7, absolute=False)),
    "grouped-circuit": make(GROUPED, circuit=Circuit.of_names(GROUPED, ["input->a0.h1<k>", "m0->logits"])),
    "parallel-acdc": make(
        EdgeGraph(2, 2, 2, True, 6),
        method=EdgeMethod(name="acdc", threshold=0.1, order="reverse"),
        circuit=Circuit.empty(EdgeGraph(2, 2, 2, True, 6)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(CASES))
def test_scores_come_back_whole(tmp_path: Path, case: str) -> None:
    scores = CASES[case]
    scores.save(tmp_path)
    back = EdgeScores.load(tmp_path)
    for name in ("mean", "mean_abs", "base_metric", "source_metric"):
        assert same(getattr(back, name), getattr(scores, name)), name
    for name in ("graph", "method", "convention", "pair_ids", "cost", "places", "placed"):
        assert getattr(back, name) == getattr(scores, name), name
    for name in ("per_pair", "by_query", "circuit"):
        assert (getattr(back, name) is None) == (getattr(scores, name) is None), name
    if scores.per_pair is not None and back.per_pair is not None:
        assert same(back.per_pair, scores.per_pair)
    for left, right in zip(back.by_query or (), scores.by_query or (), strict=True):
        assert same(left, right)
    if scores.circuit is not None and back.circuit is not None:
        assert torch.equal(back.circuit.edges, scores.circuit.edges)
        assert back.circuit.requested == scores.circuit.requested
    assert set(compare_runs(tmp_path, tmp_path).values()) == {0.0}


def test_files_are_what_the_contract_says(tmp_path: Path) -> None:
    make(pairs=False).save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "edges.json",
        "edges.safetensors",
        "graph.json",
        "graph.pt",
        "pairs.parquet",
    ]
    with safe_open(tmp_path / "edges.safetensors", "pt") as file:
        metadata, scores = file.metadata(), file.get_tensor("scores")
    senders, receivers = json.loads(metadata["senders"]), json.loads(metadata["receivers"])
    assert scores.dtype == torch.float32 and scores.shape == (len(senders), len(receivers))
    assert senders == ["input", "a0.h0", "a0.h1", "m0", "a1.h0", "a1.h1", "m1"]
    assert receivers[:7] == ["a0.h0<q>", "a0.h1<q>", "a0.h0<k>", "a0.h1<k>", "a0.h0<v>", "a0.h1<v>", "m0"]
    assert receivers[-1] == "logits"
    assert int((~scores.isnan()).sum()) == 46
    # By layer, in the order of execution: a head is read by the MLP of its layer and not by the heads of it.
    assert scores[1, receivers.index("a0.h1<q>")].isnan() and not scores[1, receivers.index("m0")].isnan()
    table = pq.read_table(tmp_path / "pairs.parquet")
    assert table.column_names == ["id", "base_metric", "source_metric"]


def test_the_scores_of_every_pair_are_a_wide_column(tmp_path: Path) -> None:
    scores = make()
    scores.save(tmp_path)
    table = pq.read_table(tmp_path / "pairs.parquet")
    assert table.schema.field("effect.edges").type == pa.list_(pa.float32())
    assert scores.per_pair is not None
    assert same(torch.tensor(table["effect.edges"][1].as_py()).reshape(7, 15), scores.per_pair[1])


# What other programs read.


@pytest.mark.parametrize("suffix", ["json", "pt"])
def test_graph_files_hold_the_effects(tmp_path: Path, suffix: str) -> None:
    scores = CASES["circuit"]
    scores.save(tmp_path)
    file = read_graph(tmp_path / f"graph.{suffix}")
    assert same(file.scores, scores.mean)
    assert file.circuit is not None and scores.circuit is not None
    assert torch.equal(file.in_graph, scores.circuit.edges)
    assert file.origin is not None and file.origin.convention == scores.convention
    assert file.importance is not None and same(file.importance, scores.importance)


def test_grouped_heads_have_scores_of_their_own_or_none(tmp_path: Path) -> None:
    scores = make(GROUPED, by_query=True)
    scores.save(tmp_path)
    file = read_graph(tmp_path / "graph.pt")
    assert scores.by_query is not None and same(file.scores, scores.by_query[0])
    assert file.origin is not None and file.origin.shared == "scored"
    assert same(sum_groups(GROUPED, file.scores), scores.mean)

    unscored = make(GROUPED)
    unscored.save(tmp_path)
    file = read_graph(tmp_path / "graph.json")
    wide = file.graph
    assert file.origin is not None and file.origin.shared == "unscored"
    shared = torch.tensor(["<k>" in name or "<v>" in name for name in wide.receivers])
    assert bool(file.scores[:, shared].isnan().all())
    for name in ("input->a1.h3<q>", "a0.h2->m0", "m1->logits"):
        assert file.scores[wide.find_edge(name)] == unscored.mean[GROUPED.find_edge(name)]
    header = json.loads((tmp_path / "edges.json").read_text(encoding="utf-8"))
    assert "those of a group are not split up" in header["notes"][0]
    assert not read_graph(tmp_path / "graph.pt").in_graph.any()


def test_heads_that_share_nothing_keep_their_scores() -> None:
    """With one query head a KV head there is nothing to split."""
    graph = EdgeGraph(2, 3, 3, False, 6)
    assert make(graph).to_graph_file().origin == make(graph, mean=-make(graph).mean).to_graph_file().origin
    assert same(make(graph).to_graph_file().scores, make(graph).mean)


def test_circuits_of_grouped_heads_go_to_every_head_of_the_group(tmp_path: Path) -> None:
    CASES["grouped-circuit"].save(tmp_path)
    file = read_graph(tmp_path / "graph.json")
    assert file.circuit is not None
    assert file.circuit.names() == ["input->a0.h2<k>", "input->a0.h3<k>", "m0->logits"]


def test_positions_add_up_or_are_left_out(tmp_path: Path) -> None:
    scores = make(places=3)
    scores.save(tmp_path)
    assert torch.allclose(
        read_graph(tmp_path / "graph.json").scores.nan_to_num(), scores.mean.sum(0).nan_to_num(), atol=1e-6
    )
    for method in (
        EdgeMethod(name="exact"),
        EdgeMethod(name="eap", qk_fix=True),
        EdgeMethod(name="eap-ig-activations"),
        EdgeMethod(name="ifr"),
    ):
        others = make(places=3, method=method)
        others.save(tmp_path)
        assert not (tmp_path / "graph.json").exists() and not (tmp_path / "graph.pt").exists()
        assert EdgeScores.load(tmp_path).method == method
        with pytest.raises(InputError, match="their format has no positions"):
            others.to_graph_file()
    spans = make(places=2, convention=CONVENTION.model_copy(update={"positions": "s,-1"}))
    with pytest.raises(InputError, match="positions 's,-1' do not add up"):
        spans.to_graph_file()


def test_json_of_the_largest_graphs_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make().save(tmp_path)
    monkeypatch.setattr(edge_scores, "_LARGEST_JSON", 45)
    make().save(tmp_path)
    assert not (tmp_path / "graph.json").exists() and (tmp_path / "graph.pt").exists()
    header = json.loads((tmp_path / "edges.json").read_text(encoding="utf-8"))
    assert header["graph_files"] == ["graph.pt"] and "46 edges are too many" in header["notes"][0]


def test_a_directory_is_complete_when_it_has_its_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one whose scores are written over: old words never stand beside new numbers."""
    make().save(tmp_path)

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(edge_scores, "write_graph", full)
    with pytest.raises(OSError, match="disk full"):
        make(GROUPED).save(tmp_path)
    with pytest.raises(InputError, match=r"edges\.json: no such file"):
        EdgeScores.load(tmp_path)


def test_a_place_that_cannot_be_written_to_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="a file is where a directory should be"):
        make().save(tmp_path / "file")
    (tmp_path / "edges.json").mkdir()
    with pytest.raises(RunError, match=r"edges\.json: could not be written"):
        make().save(tmp_path)


def test_scores_without_pairs_are_scores(tmp_path: Path) -> None:
    """As they come from a graph file."""
    nothing = torch.empty(0)
    make(pair_ids=(), base_metric=nothing, source_metric=nothing, per_pair=None).save(tmp_path)
    back = EdgeScores.load(tmp_path)
    assert back.pair_ids == () and back.base_metric.shape == (0,) and same(back.mean, make().mean)


def test_numbers_of_a_float64_model_are_whole_in_memory_and_float32_in_files(tmp_path: Path) -> None:
    exact = make(mean=make().mean.double() / 3, per_pair=make().pair_importance.double() / 3)
    assert exact.mean.dtype == torch.float64
    exact.save(tmp_path)
    assert same(EdgeScores.load(tmp_path).mean, exact.mean.float())
    assert load_tensors(tmp_path / "edges.safetensors")["scores"].dtype == torch.float32


# What is asked of scores.


def test_importance_turns_the_sign_where_corruption_breaks() -> None:
    scores = make()
    assert same(scores.importance, -scores.mean)
    assert scores.per_pair is not None and same(scores.pair_importance, -scores.per_pair)
    back = make(convention=CONVENTION.model_copy(update={"direction": "denoise"}))
    assert same(back.importance, back.mean)
    flow = make(method=EdgeMethod(name="ifr"))
    assert same(flow.importance, flow.mean)
    # A distance from the base run, which cutting what matters raises.
    away = make(convention=CONVENTION.model_copy(update={"metric": "kl"}))
    assert same(away.importance, away.mean)
    with pytest.raises(InputError, match="keep them"):
        _ = make(pairs=False).pair_importance


def test_the_largest_come_first_and_ties_by_number() -> None:
    size = torch.ones(PLAIN.real.shape).where(PLAIN.real, NAN)
    size[PLAIN.find_edge("m0->a1.h1<v>")] = 3.0
    size[PLAIN.find_edge("input->a0.h0<q>")] = NAN
    scores = make(mean=-size, mean_abs=size)
    assert scores.top(3) == [
        ("m0->a1.h1<v>", -3.0, 3.0),
        ("input->a0.h1<q>", -1.0, 1.0),
        ("input->a0.h0<k>", -1.0, 1.0),
    ]
    assert len(scores.top(1000)) == 45
    placed = make(places=2)
    assert placed.top(1)[0][0].endswith(("@0", "@1"))


def test_tables_have_a_row_an_edge() -> None:
    table = CASES["circuit"].to_pandas()
    scores = CASES["circuit"]
    assert list(table.columns) == [
        "edge", "sender", "receiver", "effect", "effect_abs", "importance", "in_circuit",
    ]  # fmt: skip
    assert len(table) == 46 and int(table["in_circuit"].sum()) == 7
    for number, row in list(table.iterrows())[::5]:
        where = PLAIN.find_edge(row["edge"])
        assert scores.name(int(str(number))) == row["edge"] == f"{row['sender']}->{row['receiver']}"
        assert row["effect"] == float(scores.mean[where]) == -row["importance"]
    placed = make(places=3).to_pandas()
    assert len(placed) == 3 * 46 and list(placed["position"].unique()) == ["0", "1", "2"]
    assert float(placed.iloc[50]["effect"]) == float(make(places=3).mean.flatten()[placed.index[50]])


def test_edges_without_a_score_are_not_rows() -> None:
    mean = make().mean.clone()
    mean[0] = NAN
    assert not any(make(mean=mean).to_pandas()["sender"] == "input")
    assert int(make(mean=mean).scored.sum()) == 46 - 15


def test_groups_add_up_by_loops() -> None:
    graph = EdgeGraph(2, 6, 2, True, 12)
    wide = by_query_graph(graph)
    values = numbers((4, *wide.real.shape), wide.real, 0)
    summed = sum_groups(graph, values)
    for sender, receiver in graph.real.nonzero().tolist()[::7]:
        name = graph.receiver_name(receiver)
        names = [name]
        if name.endswith(("<k>", "<v>")):
            head, letter = int(name[name.index("h") + 1 : name.index("<")]), name[-2]
            names = [f"{name.split('.')[0]}.h{3 * head + each}<{letter}>" for each in range(3)]
        expected = sum(values[:, sender, wide.find_receiver(each)] for each in names)
        assert torch.allclose(summed[:, sender, receiver], torch.as_tensor(expected), atol=1e-6)
    assert torch.equal(native_receivers(wide), torch.arange(wide.n_receivers))


def test_scores_of_other_shapes_are_refused() -> None:
    for changed, words in (
        (
            {"mean": torch.zeros(7, 14), "mean_abs": torch.zeros(7, 14), "per_pair": None},
            r"mean .* shape \[7, 15\]",
        ),
        ({"pair_ids": ("a",)}, r"per_pair .* expected shape \[1, 7, 15\], found \[3, 7, 15\]"),
        ({"pair_ids": ("a",), "per_pair": None}, r"base_metric of 1 pairs"),
        ({"by_query": (torch.zeros(7, 14), torch.zeros(7, 15))}, r"by_query\[0\] .* found \[7, 14\]"),
        ({"circuit": Circuit.empty(GROUPED)}, "the circuit of these edges: expected one of"),
        ({"placed": True}, r"mean of these edges: expected shape \[1, 7, 15\]"),
    ):
        with pytest.raises(InputError, match=words):
            EdgeScores(**(vars(make()) | changed))


# Damaged directories.


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        path = directory / "edges.json"
        data = json.loads(path.read_text(encoding="utf-8"))
        change(data)
        path.write_text(json.dumps(data), encoding="utf-8")

    return apply


def tensors(
    change: Callable[[dict[str, Tensor]], Any], names: Callable[[dict[str, str]], Any] = dict
) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        path = directory / "edges.safetensors"
        found, metadata = load_tensors(path), load_metadata(path)
        change(found)
        names(metadata)
        save_tensors(path, found, metadata)

    return apply


def table(change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        path = directory / "pairs.parquet"
        pq.write_table(change(pq.read_table(path)), path)

    return apply


def cut(name: str) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        payload = (directory / name).read_bytes()
        (directory / name).write_bytes(payload[: len(payload) // 2])

    return apply


def nothing(_: object) -> None:
    pass


def put(name: str, where: tuple[int, int], value: float) -> Callable[[dict[str, Tensor]], None]:
    return lambda found: found[name].__setitem__(where, value)


def turned(found: dict[str, Tensor]) -> None:
    found["scores"] = found["scores"].T


def swapped(metadata: dict[str, str]) -> None:
    names = json.loads(metadata["senders"])
    names[2], names[3] = names[3], names[2]
    metadata["senders"] = json.dumps(names)


DAMAGES: list[tuple[Callable[[Path], Any], str]] = [
    (lambda d: (d / "edges.json").unlink(), r"edges\.json: no such file"),
    (lambda d: (d / "edges.safetensors").unlink(), r"edges\.safetensors: no such file"),
    (lambda d: (d / "pairs.parquet").unlink(), r"pairs\.parquet: no such file"),
    (cut("edges.json"), r"edges\.json, line \d+"),
    (cut("edges.safetensors"), r"edges\.safetensors: expected a safetensors file"),
    (cut("pairs.parquet"), r"pairs\.parquet: expected a parquet file"),
    (lambda d: (d / "edges.json").write_text("[]"), r"expected a JSON object that holds a EdgeHeader"),
    (edit(lambda data: data.pop("graph")), r"not a valid EdgeHeader: field graph"),
    (edit(lambda data: data.update(schema_version=9)), r"expected schema_version 1, found 9"),
    (edit(lambda data: data.update(colour="red")), r"field colour"),
    (edit(lambda data: data["graph"].update(n_layers=0)), r"field graph\.n_layers"),
    (edit(lambda data: data["graph"].update(n_layers=10**13)), r"graph: expected the sizes of a model"),
    (edit(lambda data: data["graph"].update(n_kv_heads=3)), r"n_heads to be a multiple of n_kv_heads, found 4 and 3"),
    (edit(lambda data: data["graph"].update(n_layers=3)), r"tensor 'scores': expected float32 of shape \[16, 28\]"),
    (edit(lambda data: data["graph"].update(parallel=True)), r"expected NaN at a0\.h0->m0, which is no edge"),
    (edit(lambda data: data["method"].update(name=3)), r"field method\.name"),
    (edit(lambda data: data["convention"].update(direction="up")), r"field convention\.direction"),
    (edit(lambda data: data.update(places=[])), r"field places"),
    (edit(lambda data: data.update(places=["a", "b"])), r"places: expected one where edges have no position, found 2"),
    (edit(lambda data: data.update(placed=True)), r"expected float32 of shape \[1, 11, 19\]"),
    (edit(lambda data: data.update(pairs=-1)), r"field pairs"),
    (edit(lambda data: data.update(pairs=4)), r"expected 4 pairs as edges\.json says, found 3 rows"),
    (edit(lambda data: data.update(requested=-4)), r"field requested"),
    (tensors(lambda found: found.pop("scores")), r"no tensor 'scores', found in_circuit, scores_abs"),
    (tensors(lambda found: found.pop("scores_abs_by_query")), r"no tensor 'scores_abs_by_query'"),
    (tensors(turned), r"\[11, 19\] as edges\.json says, found float32 of shape \[19, 11\]"),
    (tensors(lambda found: found.update(scores=found["in_circuit"])), r"expected float32 .* found bool"),
    (tensors(put("scores", (1, 0), 0.0)), r"'scores': expected NaN at a0\.h0->a0\.h0<q>, which is no edge, found 0\.0"),
    (tensors(put("scores_abs", (0, 2), torch.inf)), r"expected a finite score of edge input->a0\.h2<q>, found inf"),
    (tensors(put("scores_by_query", (0, 2), -torch.inf)), r"'scores_by_query': expected a finite score"),
    (tensors(lambda found: found.update(in_circuit=found["scores"])), r"'in_circuit': expected booleans"),
    (tensors(put("in_circuit", (5, 0), True)), r"'in_circuit': there is no edge m0->a0\.h0<q>"),
    (tensors(nothing, lambda names: names.pop("senders")), r"JSON list of names in the header metadata 'senders'"),
    (tensors(nothing, lambda names: names.update(receivers="[1")), r"header metadata 'receivers', found none"),
    (tensors(nothing, lambda names: names.update(receivers='["q"]')), r"expected the 19 of edges\.json, found 1, other"),
    (tensors(nothing, swapped), r"senders .* other names from number 2 on"),
    (table(lambda found: found.slice(0, 2)), r"expected 3 pairs as edges\.json says, found 2 rows"),
    (table(lambda found: found.drop_columns(["effect.edges"])), r"no column 'effect\.edges'"),
    (table(lambda found: found.drop_columns(["id"])), r"no column 'id'"),
    (table(lambda found: found.set_column(3, "effect.edges", pa.array([[1.0]] * 3))), r"expected 209 float32"),
    (table(lambda found: found.set_column(1, "base_metric", pa.array(["x"] * 3))), r"column 'base_metric'"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "words"), DAMAGES)
def test_damaged_directories_are_refused_in_one_line(
    tmp_path: Path, damage: Callable[[Path], Any], words: str
) -> None:
    circuit = Circuit.of_names(GROUPED, ["input->logits"])
    make(GROUPED, by_query=True, circuit=circuit).save(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=words) as caught:
        EdgeScores.load(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["edges.json", "edges.safetensors", "pairs.parquet"]),
    edits=st.lists(
        st.tuples(st.floats(0, 1), st.binary(max_size=3), st.integers(0, 40)), min_size=1, max_size=3
    ),
)
def test_bytes_changed_anywhere_make_scores_or_an_input_error(
    tmp_path: Path, name: str, edits: list[tuple[float, bytes, int]]
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    if not broken.exists():
        make(GROUPED, by_query=True, circuit=Circuit.of_names(GROUPED, ["input->logits"])).save(whole)
    shutil.copytree(whole, broken, dirs_exist_ok=True)
    payload = (whole / name).read_bytes()
    for where, inserted, removed in edits:
        start = int(where * len(payload))
        payload = payload[:start] + inserted + payload[start + removed :]
    (broken / name).write_bytes(payload)
    try:
        EdgeScores.load(broken)
    except InputError as error:
        assert "\n" not in str(error) and str(broken) in str(error)
