"""Whatever `--circuit` may name is read as what it is: a circuit, scores, or both, with one sign."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from patchkit.errors import InputError
from patchkit.model import Dims, EdgeGraph
from patchkit.results.circuit import Circuit, top_n
from patchkit.results.circuit_source import read_circuit
from patchkit.results.convention import Convention
from patchkit.results.edge_scores import EdgeMethod, EdgeScores
from patchkit.results.graph_files import GraphFile, Origin, nodes_between, write_graph
from patchkit.results.query_heads import by_query_graph, sum_groups

NAN = float("nan")


def dims(**changed: Any) -> Dims:
    sizes = {
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "d_head": 2,
        "d_model": 8,
        "d_mlp": 5,
        "vocab_size": 9,
    }
    return Dims(**(sizes | {"parallel": False} | changed))


GROUPED, PLAIN = dims(), dims(n_kv_heads=4)
NATIVE, WIDE = EdgeGraph.of(GROUPED), EdgeGraph.of(PLAIN)
CONVENTION = Convention(metric="kl", direction="denoise", ablation="mean", positions="all", patching="edge")


def values(graph: EdgeGraph, seed: int = 0) -> Tensor:
    return torch.randn(graph.real.shape, generator=torch.Generator().manual_seed(seed)).where(graph.real, NAN)


def scores(graph: EdgeGraph, **changed: Any) -> EdgeScores:
    by_query = values(by_query_graph(graph))
    native = sum_groups(graph, by_query)
    fields: dict[str, Any] = {
        "graph": graph,
        "method": EdgeMethod(name="eap"),
        "convention": CONVENTION,
        "pair_ids": ("a",),
        "mean": native,
        "mean_abs": native.abs(),
        "base_metric": torch.ones(1),
        "source_metric": torch.ones(1),
        "cost": 2.0,
        "by_query": None if graph.by_query_head else (by_query, by_query.abs()),
    }
    return EdgeScores(**(fields | changed))


def foreign(
    edges: Tensor | None = None, importance: Tensor | None = None, origin: Origin | None = None
) -> GraphFile:
    edges = torch.zeros_like(WIDE.real) if edges is None else edges
    importance = torch.zeros(WIDE.real.shape) if importance is None else importance
    return GraphFile(WIDE, importance, edges, nodes_between(WIDE, edges), origin=origin)


def close(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left.isnan(), right.isnan()) and torch.allclose(
        left.nan_to_num(), right.nan_to_num(), atol=1e-6
    )


# patchkit's own.


def test_a_run_has_scores_and_maybe_a_circuit(tmp_path: Path) -> None:
    for name, circuit in (("scores", None), ("both", top_n(NATIVE, values(NATIVE), 9, absolute=True))):
        scores(NATIVE, circuit=circuit).save(tmp_path / name)
        read = read_circuit(tmp_path / name, GROUPED)
        assert isinstance(read.source, EdgeScores) and read.notes == ()
        assert close(read.source.importance, scores(NATIVE).importance)
        assert read.source.method.name == "eap" and read.source.convention == CONVENTION
        assert (read.source.circuit is None) == (circuit is None)


def test_a_saved_circuit_is_a_circuit(tmp_path: Path) -> None:
    circuit = top_n(NATIVE, values(NATIVE), 9, absolute=True)
    circuit.save(tmp_path)
    for path in (tmp_path, tmp_path / "circuit.json"):
        read = read_circuit(path, GROUPED)
        assert isinstance(read.source, Circuit) and torch.equal(read.source.edges, circuit.edges)
        assert read.source.requested == 9
    circuit.by_query_head().save(tmp_path)
    assert read_circuit(tmp_path, GROUPED).source.graph == WIDE


# Graph files.


@pytest.mark.parametrize("suffix", ["json", "pt"])
def test_a_graph_file_that_patchkit_wrote_says_what_its_numbers_are(tmp_path: Path, suffix: str) -> None:
    given = scores(NATIVE, circuit=top_n(NATIVE, values(NATIVE), 9, absolute=True))
    write_graph(tmp_path / f"graph.{suffix}", given.to_graph_file())
    read = read_circuit(tmp_path / f"graph.{suffix}", GROUPED)
    assert isinstance(read.source, EdgeScores)
    # Of a gradient method, heads that share a key add up to the native score exactly.
    assert read.source.graph == NATIVE and close(read.source.importance, given.importance)
    assert read.source.convention == CONVENTION and read.source.method.name == "eap"
    assert read.source.circuit is not None and given.circuit is not None
    assert torch.equal(read.source.circuit.edges, given.circuit.edges)
    assert read.notes == (
        "scores of heads that share a key or value are summed, which is exact for this method",
    )


def test_effects_that_do_not_add_up_stay_by_query_head(tmp_path: Path) -> None:
    given = scores(NATIVE, method=EdgeMethod(name="exact"))
    assert given.by_query is not None
    write_graph(tmp_path / "graph.pt", given.to_graph_file())
    read = read_circuit(tmp_path / "graph.pt", GROUPED)
    assert isinstance(read.source, EdgeScores) and read.source.graph == WIDE
    assert close(read.source.importance, given.by_query[0])
    assert read.notes == ("scores are by query head and stay so: those of a group's heads need not add up",)


def test_scores_of_others_are_importances(tmp_path: Path) -> None:
    importance = values(WIDE)
    write_graph(tmp_path / "graph.json", foreign(importance=importance))
    for sizes in (PLAIN, GROUPED):
        read = read_circuit(tmp_path / "graph.json", sizes)
        assert isinstance(read.source, EdgeScores) and read.source.circuit is None
        assert read.source.graph == WIDE and close(read.source.importance, importance)
        assert read.source.method.name == "unknown" and read.source.convention.metric == "unknown"
        assert read.notes[0] == "scores are taken as they are for importances: positive = the edge helps"
        assert len(read.notes) == (1 if sizes is PLAIN else 2)
        # As an evaluation selects from them.
        assert (
            top_n(WIDE, read.source.importance, 5, absolute=False).names()
            == top_n(WIDE, importance, 5, absolute=False).names()
        )


def test_membership_alone_is_a_circuit(tmp_path: Path) -> None:
    native = Circuit.of_names(NATIVE, ["input->a0.h1<k>", "a0.h2->logits"])
    write_graph(tmp_path / "ours.pt", GraphFile.of_circuit(native))
    write_graph(tmp_path / "theirs.pt", foreign(edges=native.by_query_head().edges))
    for name in ("ours.pt", "theirs.pt"):
        read = read_circuit(tmp_path / name, GROUPED)
        assert isinstance(read.source, Circuit) and read.source.graph == NATIVE and read.notes == ()
        assert torch.equal(read.source.edges, native.edges)
        assert read_circuit(tmp_path / name, PLAIN).source.graph == WIDE


def test_heads_of_a_group_that_differ_stay_apart(tmp_path: Path) -> None:
    edges = WIDE.find_edges(["input->a0.h2<k>", "a0.h2->logits"])
    write_graph(tmp_path / "circuit.pt", foreign(edges=edges))
    read = read_circuit(tmp_path / "circuit.pt", GROUPED)
    assert isinstance(read.source, Circuit) and read.source.graph == WIDE
    assert read.notes == ("heads of a group differ in the circuit, so it is kept by query head",)
    # Scores that would add up too: one graph for both.
    origin = Origin(scores="importance", method="eap", convention=CONVENTION, shared="scored")
    write_graph(tmp_path / "both.pt", foreign(edges, values(WIDE), origin))
    both = read_circuit(tmp_path / "both.pt", GROUPED)
    assert isinstance(both.source, EdgeScores) and both.source.graph == WIDE
    assert both.source.circuit is not None and torch.equal(both.source.circuit.edges, edges)


def test_scores_that_a_file_could_not_hold_are_missed(tmp_path: Path) -> None:
    write_graph(tmp_path / "graph.pt", scores(NATIVE, by_query=None).to_graph_file())
    read = read_circuit(tmp_path / "graph.pt", GROUPED)
    assert isinstance(read.source, EdgeScores)
    assert len(read.notes) == 1
    assert "have no score in this file; the run's directory has them (edges.json)" in read.notes[0]
    with pytest.raises(InputError, match="has no score"):
        top_n(read.source.graph, read.source.importance, 3, absolute=True)


# Names.


def test_names_of_edges_are_a_circuit(tmp_path: Path) -> None:
    names = ["input->a0.h1<k>", "a0.h2->logits", "m0->a1.h3<q>"]
    (tmp_path / "a.json").write_text(f"\n {json.dumps(names)}", encoding="utf-8")
    text = "\ufeff# found by hand\n\n  input->a0.h1<k>\r\na0.h2->logits # why\n m0->a1.h3<q>"
    for name in ("a.txt", "circuit"):
        (tmp_path / name).write_text(text, encoding="utf-8")
    for name in ("a.json", "a.txt", "circuit"):
        read = read_circuit(tmp_path / name, GROUPED)
        assert (
            isinstance(read.source, Circuit) and read.source.graph == NATIVE and read.source.requested is None
        )
        assert sorted(read.source.names()) == sorted(names)


# Refusals.


def written(name: str, content: str | bytes) -> Callable[[Path], Path]:
    def apply(directory: Path) -> Path:
        path = directory / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return apply


def saved(source: EdgeScores | Circuit | GraphFile, name: str = "") -> Callable[[Path], Path]:
    def apply(directory: Path) -> Path:
        if isinstance(source, GraphFile):
            write_graph(directory / name, source)
            return directory / name
        source.save(directory)
        return directory

    return apply


OTHER = EdgeGraph.of(dims(n_layers=3, d_model=6))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda d: d / "none", r"none: no such file"),
        (lambda d: d / "none.pt", r"none\.pt: no such file"),
        (lambda d: d / "none.json", r"none\.json: no such file"),
        (lambda d: d, r"expected the finished run of a command that scores edges \(edges\.json\) .* found nothing"),
        (lambda d: written("importances.pt", b"")(d).parent, r"found importances\.pt\. Of a folder"),
        (saved(scores(OTHER)), r"not of this model: expected n_layers 2, found 3; d_model 8, found 6"),
        (saved(Circuit.empty(EdgeGraph.of(dims(parallel=True)))), r"expected parallel False, found True"),
        (saved(Circuit.empty(EdgeGraph.of(dims(n_kv_heads=1)))), r"not of this model: expected n_kv_heads 2, found 1"),
        (saved(GraphFile.of_circuit(Circuit.full(OTHER)), "a.pt"), r"a\.pt: not of this model: expected n_layers 2"),
        (saved(foreign(), "a.pt"), r"a\.pt: expected a circuit or scores, found no edge"),
        (written("a.pt", b"x"), r"a\.pt: expected tensors and plain containers"),
        (written("a.json", "3"), r"a\.json: expected an object with cfg, nodes and edges"),
        (written("a.json", "[]"), r"a\.json: expected names of edges, .* found none"),
        (written("a.json", '["input->logits", 3]'), r"a\.json, item 2: expected the name of an edge, found 3"),
        (written("a.json", '["input->logits", "m0"]'), r"a\.json, item 2: edge 'm0': expected sender->receiver"),
        (written("a.json", '["input->logits"'), r"a\.json, line 1, column"),
        (written("a.txt", "# nothing\n"), r"a\.txt: expected names of edges, .* found none"),
        (written("a.txt", "input->logits\nm0->a1.h2<k>\n"), r"a\.txt, line 2: receiver 'a1\.h2<k>'.*value heads 0 to 1"),
        (written("a.txt", b"\xff\xfe\x00"), r"a\.txt: expected UTF-8 text, found UTF-16"),
        (written("circuit.json", "{}"), r"circuit\.json: not a valid CircuitHeader"),
    ],
)  # fmt: skip
def test_what_is_no_circuit_is_refused_in_one_line(
    tmp_path: Path, make: Callable[[Path], Path], words: str
) -> None:
    path = make(tmp_path)
    with pytest.raises(InputError, match=words) as caught:
        read_circuit(path, GROUPED)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_scores_of_single_positions_are_refused(tmp_path: Path) -> None:
    placed = values(NATIVE)[None].repeat(2, 1, 1)
    given = scores(NATIVE, mean=placed, mean_abs=placed.abs(), places=("0", "1"), placed=True, by_query=None)
    given.save(tmp_path)
    with pytest.raises(
        InputError, match=r"expected one score an edge, found one a position \(0, 1, \.\.\.\)"
    ):
        read_circuit(tmp_path, GROUPED)
