"""Graph files of the EAP-IG repository: read as it wrote them, written as it reads them, and refused when damaged."""

from __future__ import annotations

import io
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from patchkit.errors import InputError
from patchkit.model import EdgeGraph
from patchkit.results.circuit import Circuit
from patchkit.results.graph_files import (
    GraphFile,
    Origin,
    nodes_between,
    read_graph,
    write_graph,
    write_graph_json,
)
from tests.results.graph_cases import CONVENTION, GRAPHS, filled, loaded, write_ours

FIXTURE = Path(__file__).resolve().parent.parent / "fixtures" / "graph_files"
NAN = float("nan")


def same(left: Tensor | None, right: Tensor | None) -> bool:
    if left is None or right is None:
        return left is right
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    if left.dtype == torch.bool:
        return torch.equal(left, right)
    return torch.equal(left.isnan(), right.isnan()) and torch.equal(left.nan_to_num(), right.nan_to_num())


def agree(left: GraphFile, right: GraphFile, *, origin: bool = True) -> None:
    assert left.graph == right.graph
    for name in ("scores", "in_graph", "nodes", "node_scores", "neurons", "neuron_scores"):
        assert same(getattr(left, name), getattr(right, name)), name
    if origin:
        assert left.origin == right.origin


# The repository's files and its reader.


@pytest.mark.parametrize("suffix", ["json", "pt"])
@pytest.mark.parametrize("name", list(GRAPHS))
def test_files_of_the_repository_are_read(name: str, suffix: str) -> None:
    agree(read_graph(FIXTURE / f"peer_{name}.{suffix}"), filled(GRAPHS[name]))


@pytest.mark.parametrize("name", list(GRAPHS))
def test_scored_nodes_of_the_repository_are_read(name: str) -> None:
    agree(read_graph(FIXTURE / f"peer_{name}_nodes.pt"), filled(GRAPHS[name], nodes=True))


@pytest.mark.parametrize("name", list(GRAPHS))
def test_json_is_byte_for_byte_what_the_repository_writes(tmp_path: Path, name: str) -> None:
    write_graph(tmp_path / "graph.json", filled(GRAPHS[name]))
    assert (tmp_path / "graph.json").read_bytes() == (FIXTURE / f"peer_{name}.json").read_bytes()


@pytest.mark.parametrize("path", sorted(FIXTURE.glob("ours_*")), ids=lambda path: path.name)
def test_the_repository_has_read_what_is_written_here(tmp_path: Path, path: Path) -> None:
    """The fixture's files are what is written today, and the repository was seen to find in them what is in them."""
    write_ours(tmp_path)
    now = loaded(tmp_path / path.name)
    assert now == loaded(path)
    if path.suffix == ".json":
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    seen = json.loads((FIXTURE / f"read_{path.name.replace('.', '_')}.json").read_text(encoding="utf-8"))
    assert (seen["node_scores"] is not None) == (seen["neurons"] is not None) == ("nodes" in path.name)
    if path.name.endswith("nodes.json"):
        assert seen["neurons"] != now["neurons"], "the repository's reader has been mended"
        now |= mixed_up(now)
    assert seen == now


def mixed_up(content: dict[str, Any]) -> dict[str, Any]:
    """Columns as the repository reads them from JSON: every head of a layer gets what comes last among its heads."""
    rows = [content["neurons"][start : start + 3] for start in range(0, 30, 3)]
    scores = [list(row) for row in content["neuron_scores"]]
    for first in (1, 4, 7):
        rows[first] = rows[first + 1]
        for sender in (first, first + 1):
            given = [row for row in content["neuron_scores"][first : first + 2] if row != [None] * 3]
            scores[sender] = given[-1]
    return {"neurons": "".join(rows), "neuron_scores": scores}


def test_a_selection_of_nodes_marks_places_without_edges() -> None:
    """The repository fills whole rows; what is no edge is left out, and said."""
    file = read_graph(FIXTURE / "peer_selected_nodes.pt")
    raw = torch.load(FIXTURE / "peer_selected_nodes.pt", weights_only=True)["edges_in_graph"]
    unreal = int((raw & ~file.graph.real).sum())
    assert unreal > 10 and file.notes == (
        f"{unreal} marks where there is no edge, as a selection of nodes makes them, were left out",
    )
    assert torch.equal(file.in_graph, raw & file.graph.real)


# There and back.


@pytest.mark.parametrize("suffix", ["json", "pt"])
@pytest.mark.parametrize("nodes", [False, True])
@pytest.mark.parametrize("origin", [False, True])
@pytest.mark.parametrize("name", list(GRAPHS))
def test_files_come_back_as_they_went(
    tmp_path: Path, name: str, origin: bool, nodes: bool, suffix: str
) -> None:
    file = filled(GRAPHS[name], nodes=nodes, origin=origin)
    write_graph(tmp_path / f"graph.{suffix}", file)
    agree(read_graph(tmp_path / f"graph.{suffix}"), file)


def test_every_float32_comes_back(tmp_path: Path) -> None:
    graph = GRAPHS["sequential"]
    bits = torch.randint(-(2**31), 2**31 - 1, graph.real.shape, generator=torch.Generator().manual_seed(0))
    scores = bits.int().view(torch.float32)
    scores = scores.where(scores.isfinite(), NAN)
    scores[0, 0], scores[0, 1] = -0.0, 1e-45
    file = GraphFile(
        graph, scores, torch.zeros_like(graph.real), torch.zeros(graph.n_senders, dtype=torch.bool)
    )
    for name in ("a.json", "a.pt"):
        write_graph(tmp_path / name, file)
        back = read_graph(tmp_path / name)
        agree(back, file)
        assert back.scores[0, 0].signbit()


def test_edges_without_scores_are_nan_or_null(tmp_path: Path) -> None:
    file = filled(GRAPHS["sequential"], nodes=True)
    write_graph_json(tmp_path / "python.json", file)
    write_graph_json(tmp_path / "strict.json", file, strict=True)
    texts = [(tmp_path / name).read_text(encoding="utf-8") for name in ("python.json", "strict.json")]
    assert texts[0].replace("NaN", "null") == texts[1] and "NaN" in texts[0]

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    json.loads(texts[1], parse_constant=refuse)
    agree(read_graph(tmp_path / "strict.json"), file)
    whole = GraphFile(file.graph, file.scores.nan_to_num(1.0), file.in_graph, file.nodes)
    for strict in (False, True):
        write_graph_json(tmp_path / f"whole{strict}.json", whole, strict=strict)
    assert (tmp_path / "wholeFalse.json").read_bytes() == (tmp_path / "wholeTrue.json").read_bytes()


def test_edges_that_are_not_named_have_no_score(tmp_path: Path) -> None:
    graph = GRAPHS["parallel"]
    data = json.loads((FIXTURE / "peer_parallel.json").read_text(encoding="utf-8"))
    del data["edges"]["input->logits"], data["edges"]["m0->a1.h1<k>"]
    del data["edges"]["input->a0.h0<v>"]["score"]
    (tmp_path / "some.json").write_text(json.dumps(data), encoding="utf-8")
    file = read_graph(tmp_path / "some.json")
    for name in ("input->logits", "m0->a1.h1<k>", "input->a0.h0<v>"):
        assert file.scores[graph.find_edge(name)].isnan()
    assert not file.in_graph[graph.find_edge("input->logits")]
    assert (
        file.in_graph[graph.find_edge("input->a0.h0<v>")]
        == filled(graph).in_graph[graph.find_edge("input->a0.h0<v>")]
    )
    assert file.notes == ("2 edges that the file does not name have no score",)


def test_keys_of_others_are_passed_over(tmp_path: Path) -> None:
    data = json.loads((FIXTURE / "peer_parallel.json").read_text(encoding="utf-8"))
    data["cfg"]["model_name"], data["extra"] = "gpt2", [1]
    data["edges"]["input->logits"]["colour"] = "red"
    (tmp_path / "some.json").write_text(json.dumps(data), encoding="utf-8")
    agree(read_graph(tmp_path / "some.json"), filled(GRAPHS["parallel"]))


def test_scores_that_were_made_elsewhere_are_read(tmp_path: Path) -> None:
    """Other float types, and tensors that are views of larger ones."""
    content = torch.load(FIXTURE / "peer_sequential.pt", weights_only=True)
    content["edges_scores"] = torch.stack([content["edges_scores"].double()] * 2, 1)[:, 1].requires_grad_()
    torch.save(content, tmp_path / "a.pt")
    agree(read_graph(tmp_path / "a.pt"), filled(GRAPHS["sequential"]))


def test_the_graph_of_eight_billion_parameters_takes_seconds(tmp_path: Path) -> None:
    """1.6 million edges: as `.pt` within 5 seconds; as JSON, of which a fiftieth is tried, within 60.

    Checks of types at every call, which only tests make, cost three times the work on JSON.
    """
    start = time.process_time()
    timed(tmp_path / "large.pt", EdgeGraph(32, 32, 32, False, 4096), start, 5.0)
    small = EdgeGraph(12, 12, 12, False, 768)
    timed(tmp_path / "small.json", small, time.process_time(), 3 * 60 * small.n_edges / 1_592_881)


def timed(path: Path, graph: EdgeGraph, start: float, limit: float) -> None:
    scores = torch.randn(graph.real.shape)
    file = GraphFile(graph, scores, (scores > 1) & graph.real, scores[:, 0] > 0)
    write_graph(path, file)
    agree(read_graph(path), file)
    seconds = time.process_time() - start
    assert seconds < limit, f"{path.name}: {seconds:.2f} s of {limit:.2f} s"


# What the numbers mean.


def test_importances_have_one_sign() -> None:
    graph = GRAPHS["sequential"]

    def of(**origin: Any) -> Tensor | None:
        found = filled(graph)
        made = Origin(**{"method": "eap", "convention": CONVENTION} | origin) if origin else None
        return GraphFile(found.graph, found.scores, found.in_graph, found.nodes, origin=made).importance

    scores = filled(graph).scores
    denoise = CONVENTION.model_copy(update={"direction": "denoise"})
    assert same(of(), scores)
    assert same(of(scores="effect"), -scores)
    assert same(of(scores="effect", convention=denoise), scores)
    assert same(of(scores="effect", method="ifr"), scores)
    assert same(of(scores="importance"), scores)
    assert of(scores="membership") is None
    with pytest.raises(ValueError, match="effects need their convention"):
        Origin(scores="effect", method="eap")


def test_a_file_of_zeros_ranks_nothing_and_a_file_of_scores_is_no_circuit() -> None:
    graph = GRAPHS["sequential"]
    nothing = torch.zeros_like(graph.real)
    nodes = torch.zeros(graph.n_senders, dtype=torch.bool)
    empty = GraphFile(graph, torch.zeros(graph.real.shape), nothing, nodes)
    assert empty.importance is None and empty.circuit is None
    assert GraphFile(graph, torch.full(graph.real.shape, NAN), nothing, nodes).importance is None


def test_a_circuit_becomes_a_file_by_query_head(tmp_path: Path) -> None:
    native = EdgeGraph(2, 4, 2, False, 8)
    circuit = Circuit.of_names(native, ["input->a0.h1<k>", "a0.h3->m0", "m0->a1.h3<q>", "a0.h2->logits"])
    write_graph(tmp_path / "circuit.pt", GraphFile.of_circuit(circuit))
    file = read_graph(tmp_path / "circuit.pt")
    assert file.circuit is not None and file.circuit.names() == [
        "input->a0.h2<k>",
        "input->a0.h3<k>",
        "a0.h2->logits",
        "a0.h3->m0",
        "m0->a1.h3<q>",
    ]
    assert [file.graph.sender_name(i) for i in file.nodes.nonzero()[:, 0].tolist()] == [
        "input",
        "a0.h2",
        "a0.h3",
        "m0",
    ]
    assert torch.equal(file.scores == 1, file.in_graph) and file.importance is None


def test_nodes_need_an_edge_in_and_an_edge_out() -> None:
    graph = GRAPHS["sequential"]
    edges = graph.find_edges(["a0.h0->logits", "input->a0.h1<v>", "input->m0", "m0->logits"])
    assert [graph.sender_name(i) for i in nodes_between(graph, edges).nonzero()[:, 0].tolist()] == [
        "input",
        "m0",
    ]


def test_graphs_that_are_not_files_are_refused() -> None:
    file = filled(GRAPHS["sequential"], nodes=True)
    native = EdgeGraph(3, 2, 1, False, 3)
    arguments = {name: getattr(file, name) for name in ("graph", "scores", "in_graph", "nodes")}
    for changed, words in (
        ({"graph": native}, "by query head: expected a graph with 2 of them a layer, found 1"),
        (
            {name: arguments[name][1:] for name in ("scores", "in_graph", "nodes")},
            r"scores: expected shape \[10, 22\], found \[9, 22\]",
        ),
        (
            {"scores": file.scores.where(file.graph.real.logical_not(), torch.inf)},
            "scores: expected finite numbers",
        ),
        ({"in_graph": ~file.graph.real}, r"in_graph: there is no edge a0\.h0->a0\.h0<q>, found it marked"),
        (
            {"neurons": torch.ones(10, 4, dtype=torch.bool)},
            r"neurons: expected shape \[10, 3\], found \[10, 4\]",
        ),
    ):
        with pytest.raises(InputError, match=words):
            GraphFile(**(arguments | changed))
    with pytest.raises(InputError, match=r"expected a graph file, \.json or \.pt, found '\.txt'"):
        read_graph("graph.txt")
    with pytest.raises(InputError, match=r"found ''"):
        write_graph("graph", file)


# Damaged files.


def in_json(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Path]:
    def apply(directory: Path) -> Path:
        path = directory / "graph.json"
        write_graph(path, filled(GRAPHS["sequential"], nodes=True, origin=True))
        data = json.loads(path.read_text(encoding="utf-8"))
        found = change(data)
        path.write_text(found if isinstance(found, str) else json.dumps(data), encoding="utf-8")
        return path

    return apply


def in_pt(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Path]:
    def apply(directory: Path) -> Path:
        path = directory / "graph.pt"
        write_graph(path, filled(GRAPHS["sequential"], nodes=True, origin=True))
        data = torch.load(path, weights_only=True)
        found = change(data)
        if isinstance(found, bytes):
            path.write_bytes(found)
        else:
            torch.save(found if isinstance(found, list) else data, path)
        return path

    return apply


def cut(name: str, share: float) -> Callable[[Path], Path]:
    def apply(directory: Path) -> Path:
        path = directory / name
        write_graph(path, filled(GRAPHS["sequential"], nodes=True))
        whole = path.read_bytes()
        path.write_bytes(whole[: int(len(whole) * share)])
        return path

    return apply


def marked(data: dict[str, Any]) -> None:
    data["edges_in_graph"][1, 0] = True


DAMAGES: list[tuple[Callable[[Path], Path], str]] = [
    (lambda d: d / "none.json", r"none\.json: no such file"),
    (lambda d: d / "none.pt", r"none\.pt: no such file"),
    (cut("graph.json", 0.0), r"line 1, column 1: not valid JSON"),
    (cut("graph.json", 0.5), r"not valid JSON"),
    (cut("graph.pt", 0.0), r"expected tensors and plain containers"),
    (cut("graph.pt", 0.5), r"expected tensors and plain containers"),
    (cut("graph.pt", 0.98), r"expected tensors and plain containers"),
    (in_json(lambda d: "[1, 2]"), r"expected an object with cfg, nodes and edges, found \[1, 2\]"),
    (in_json(lambda d: "{}"), r"expected an object 'cfg', found nothing"),
    (in_json(lambda d: "[" * 100_000), r"not JSON that can be read"),
    (in_json(lambda d: json.dumps(d).replace('"m0": {', '"a0.h0": {', 1)), r"the key 'a0\.h0' appears twice"),
    (in_json(lambda d: d.pop("edges")), r"expected an object 'edges', found cfg, patchkit, nodes"),
    (in_json(lambda d: d.update(nodes=[])), r"expected an object 'nodes', found \[\]"),
    (in_json(lambda d: d["cfg"].pop("n_heads")), r"cfg: no 'n_heads', found n_layers, parallel_attn_mlp, d_model"),
    (in_json(lambda d: d["cfg"].update(n_heads=2.0)), r"cfg\.n_heads: expected a whole number from 1, found 2\.0"),
    (in_json(lambda d: d["cfg"].update(n_layers=0)), r"cfg\.n_layers: expected a whole number from 1, found 0"),
    (in_json(lambda d: d["cfg"].update(n_layers=True)), r"cfg\.n_layers: .* found True"),
    (in_json(lambda d: d["cfg"].update(parallel_attn_mlp=0)), r"cfg\.parallel_attn_mlp: expected true or false, found 0"),
    (in_json(lambda d: d["cfg"].update(n_layers=10**12)), r"nodes: expected 3000000000001 and the logits"),
    (in_json(lambda d: d["cfg"].update(parallel_attn_mlp=True)), r"there is no edge 'a0\.h0->m0'"),
    (in_json(lambda d: d["cfg"].update(d_model=4)), r"nodes\.input\.neurons: expected a list of 4, .* found 3 of them"),
    (in_json(lambda d: d["nodes"].pop("m1")), r"nodes: expected 10 and the logits, as cfg says, found 9"),
    (in_json(lambda d: d["nodes"].update(m3={"in_graph": True})), r"found 11"),
    (in_json(lambda d: d["nodes"].update(m7=d["nodes"].pop("m1"))), r"nodes: no 'm1', found"),
    (in_json(lambda d: d["nodes"].update(m1=True)), r"nodes\.m1: expected an object with in_graph, found True"),
    (in_json(lambda d: d["nodes"]["m1"].update(in_graph=1)), r"nodes\.m1\.in_graph: expected true or false, found 1"),
    (in_json(lambda d: d["nodes"]["m1"].update(score="x")), r"nodes\.m1\.score: expected a number, found 'x'"),
    (in_json(lambda d: d["nodes"]["m1"].update(neurons=True)), r"m1\.neurons: expected a list of 3, .* found True"),
    (in_json(lambda d: d["nodes"]["m1"].update(neurons=[1, 0, 1])), r"m1\.neurons: expected true or false, found 1"),
    (in_json(lambda d: d["nodes"]["m1"].update(neurons_scores=[1, 2])), r"neurons_scores: expected a list of 3"),
    (in_json(lambda d: d["nodes"]["m1"].update(neurons_scores=[1, "a", 2])), r"expected a number, found 'a'"),
    (in_json(lambda d: d["edges"].update({"m2->m1": {"score": 1.0, "in_graph": True}})), r"there is no edge 'm2->m1'"),
    (in_json(lambda d: d["edges"].update({"m0": {"score": 1.0, "in_graph": True}})), r"there is no edge 'm0'"),
    (in_json(lambda d: d["edges"].update({"m0->m1": 1.0})), r"m0->m1: expected an object with in_graph, found 1\.0"),
    (in_json(lambda d: d["edges"].update({"m0->m1": {"score": 1.0}})), r"m0->m1: expected an object with in_graph"),
    (in_json(lambda d: d["edges"]["m0->m1"].update(in_graph=None)), r"m0->m1\.in_graph: expected true or false"),
    (in_json(lambda d: d["edges"]["m0->m1"].update(score=[])), r"edges\.m0->m1\.score: expected a number, found \[\]"),
    (in_json(lambda d: d["edges"]["m0->m1"].update(score=float("inf"))), r"scores: expected finite numbers"),
    (in_json(lambda d: d["edges"]["m0->m1"].update(score=1e300)), r"scores: expected finite numbers"),
    (in_json(lambda d: d["edges"]["m0->m1"].update(score=10**400)), r"scores: expected finite numbers"),
    (in_json(lambda d: d["patchkit"].update(scores="vibes")), r"not a valid Origin: field scores"),
    (in_json(lambda d: d.update(patchkit=3)), r"not a valid Origin"),
    (in_json(lambda d: d["patchkit"].pop("convention")), r"effects need their convention"),
    (in_pt(lambda d: [1, 2]), r"expected a dict with cfg, src_nodes, .*, found \[1, 2\]"),
    (in_pt(lambda d: b"PK\x03\x04"), r"expected tensors and plain containers"),
    (in_pt(lambda d: d.pop("nodes_in_graph")), r"no 'nodes_in_graph', found cfg, src_nodes"),
    (in_pt(lambda d: d.update(cfg=[1])), r"cfg: expected n_layers, .*, found \[1\]"),
    (in_pt(lambda d: d.update(cfg=None)), r"no 'cfg', found cfg"),
    (in_pt(lambda d: d["cfg"].update(n_layers=2)), r"src_nodes: expected 7 names, as cfg says, found 10"),
    (in_pt(lambda d: d["cfg"].update(n_layers=10**15)), r"src_nodes: expected 3000000000000001 names"),
    (in_pt(lambda d: d["cfg"].update(n_heads=5, n_layers=1)), r"src_nodes: expected 7 names"),
    (in_pt(lambda d: d["cfg"].update(d_model=5)), r"neurons_in_graph: expected shape \[10, 5\], as cfg says"),
    (in_pt(lambda d: d.update(src_nodes="input")), r"src_nodes: expected 10 names, as cfg says, found 'input'"),
    (in_pt(lambda d: d["dst_nodes"].reverse()), r"dst_nodes: expected 'a0\.h0<q>', as cfg says, found 'logits'"),
    (in_pt(lambda d: d["src_nodes"].__setitem__(2, 7)), r"src_nodes: expected 'a0\.h1', as cfg says, found 7"),
    (in_pt(lambda d: d.update(edges_scores=d["edges_scores"].T)), r"expected shape \[10, 22\], .* found \[22, 10\]"),
    (in_pt(lambda d: d.update(edges_scores=d["edges_scores"].tolist())), r"expected a tensor of shape \[10, 22\]"),
    (in_pt(lambda d: d.update(edges_scores=d["edges_in_graph"].int())), r"expected floating-point numbers, found torch"),
    (in_pt(lambda d: d.update(edges_scores=d["edges_scores"].to_sparse())), r"edges_scores: expected a tensor"),
    (in_pt(lambda d: d.update(edges_scores=torch.full((10, 22), torch.inf))), r"scores: expected finite numbers"),
    (in_pt(lambda d: d.update(edges_in_graph=d["edges_scores"])), r"edges_in_graph: expected booleans, found torch\.flo"),
    (in_pt(marked), r"in_graph: there is no edge a0\.h0->a0\.h0<q>, found it marked"),
    (in_pt(lambda d: d.update(nodes_in_graph=d["nodes_in_graph"][:4])), r"nodes_in_graph: expected shape \[10\]"),
    (in_pt(lambda d: d.update(nodes_scores=d["edges_scores"])), r"nodes_scores: expected shape \[10\]"),
    (in_pt(lambda d: d.update(neurons_scores=torch.zeros(10, 3, dtype=torch.cfloat))), r"found torch\.complex64"),
    (in_pt(lambda d: d.update(patchkit={"scores": "effect"})), r"not a valid Origin: field method"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "words"), DAMAGES)
def test_damaged_files_are_refused_in_one_line(
    tmp_path: Path, damage: Callable[[Path], Path], words: str
) -> None:
    path = damage(tmp_path)
    with pytest.raises(InputError, match=words) as caught:
        read_graph(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


class Payload:
    """What a pickle runs when it is opened by one who trusts it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (warnings.warn, ("ran",))


def test_reading_runs_no_code(tmp_path: Path) -> None:
    content = torch.load(FIXTURE / "peer_sequential.pt", weights_only=True)
    torch.save(content | {"extra": Payload()}, tmp_path / "a.pt")
    # Were it run, its warning would be an error of another kind.
    with pytest.raises(InputError, match=r"a\.pt: expected tensors and plain containers"):
        read_graph(tmp_path / "a.pt")


def _whole(suffix: str) -> bytes:
    if suffix == "pt":
        return (FIXTURE / "ours_sequential_nodes.pt").read_bytes()
    return (FIXTURE / "ours_sequential_nodes.json").read_bytes()


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    suffix=st.sampled_from(["json", "pt"]),
    edits=st.lists(
        st.tuples(st.floats(0, 1), st.binary(max_size=3), st.integers(0, 40)), min_size=1, max_size=3
    ),
)
def test_bytes_changed_anywhere_make_a_graph_or_an_input_error(
    tmp_path: Path, suffix: str, edits: list[tuple[float, bytes, int]]
) -> None:
    payload = _whole(suffix)
    for where, inserted, removed in edits:
        start = int(where * len(payload))
        payload = payload[:start] + inserted + payload[start + removed :]
    path = tmp_path / f"graph.{suffix}"
    path.write_bytes(payload)
    try:
        file = read_graph(path)
    except InputError as error:
        assert "\n" not in str(error) and str(path) in str(error)
    else:
        assert file.scores.shape == file.graph.real.shape


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=json_values, draw=st.data())
def test_any_value_anywhere_makes_a_graph_or_an_input_error(tmp_path: Path, value: Any, draw: Any) -> None:
    """The same surgery on both formats: one entry, at any depth, becomes something else."""
    suffix = draw.draw(st.sampled_from(["json", "pt"]))
    if suffix == "json":
        data = json.loads(_whole("json"))
    else:
        data = torch.load(io.BytesIO(_whole("pt")), weights_only=True)
    parent: Any = data
    key = draw.draw(st.sampled_from(sorted(parent)))
    while isinstance(parent[key], (dict, list)) and len(parent[key]) and draw.draw(st.booleans()):
        parent = parent[key]
        key = draw.draw(st.sampled_from(sorted(parent) if isinstance(parent, dict) else range(len(parent))))
    parent[key] = value
    path = tmp_path / f"graph.{suffix}"
    if suffix == "json":
        path.write_text(json.dumps(data), encoding="utf-8")
    else:
        torch.save(data, path)
    try:
        read_graph(path)
    except InputError as error:
        assert "\n" not in str(error) and str(path) in str(error)
