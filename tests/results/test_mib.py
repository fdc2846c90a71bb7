"""Submissions to MIB: folders as it wants them, circuits within their sizes, and folders that are none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from patchkit.errors import InputError
from patchkit.model import EdgeGraph
from patchkit.results.circuit import Circuit, greedy, top_n
from patchkit.results.convention import Convention
from patchkit.results.edge_scores import EdgeMethod, EdgeScores
from patchkit.results.graph_files import GraphFile, read_graph, write_graph
from patchkit.results.mib import (
    LIMITS,
    limits_of,
    read_folder,
    select_circuits,
    write_circuits,
    write_importances,
)
from patchkit.results.query_heads import by_query_graph, sum_groups

NAN = float("nan")
PLAIN = EdgeGraph(3, 4, 4, False, 8)
GROUPED = EdgeGraph(3, 4, 2, False, 8)


def scores(
    graph: EdgeGraph, *, by_query: bool = False, places: int = 0, direction: str = "noise", **changed: Any
) -> EdgeScores:
    wide = by_query_graph(graph)
    lead = (places,) if places else ()
    values = torch.randn(*lead, *wide.real.shape, generator=torch.Generator().manual_seed(1)).where(
        wide.real, NAN
    )
    native = sum_groups(graph, values)
    fields: dict[str, Any] = {
        "graph": graph,
        "method": EdgeMethod(name="eap"),
        "convention": Convention(
            metric="logit-diff",
            direction="denoise" if direction == "denoise" else "noise",
            ablation="resample",
            positions="each" if places else "all",
            patching="edge",
        ),
        "pair_ids": ("a",),
        "mean": native,
        "mean_abs": native.abs(),
        "base_metric": torch.ones(1),
        "source_metric": torch.zeros(1),
        "cost": 1.0,
        "places": tuple(map(str, range(places))) if places else ("all",),
        "placed": bool(places),
        "by_query": (values, values.abs()) if by_query else None,
    }
    return EdgeScores(**(fields | changed))


def same(left: Tensor | None, right: Tensor) -> bool:
    return (
        left is not None
        and torch.equal(left.isnan(), right.isnan())
        and torch.equal(left.nan_to_num(), right.nan_to_num())
    )


@pytest.mark.parametrize("suffix", [".pt", ".json"])
@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_importances_are_positive_where_an_edge_helps(tmp_path: Path, direction: str, suffix: Any) -> None:
    given = scores(PLAIN, direction=direction, circuit=Circuit.full(PLAIN))
    folder = write_importances(tmp_path, "ioi", "gpt2", given, ranking="absolute", suffix=suffix)
    assert folder == tmp_path / "ioi_gpt2"
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", f"importances{suffix}"]
    # What the leaderboard reads: the numbers as they stand.
    found = read_folder(folder)
    assert (found.task, found.model, found.circuits) == ("ioi", "gpt2", ())
    assert found.importances is not None and same(found.importances.scores, given.importance)
    assert same(found.importances.importance, given.importance)
    assert found.importances.circuit is None
    assert found.importances.origin is not None and found.importances.origin.ranking == "absolute"
    words = (folder / "README.md").read_text(encoding="utf-8")
    assert "A positive number: the edge helps" in words and "absolute" in words and "resample" in words


def test_importances_of_grouped_models_are_by_query_head(tmp_path: Path) -> None:
    given = scores(GROUPED, by_query=True)
    assert given.by_query is not None
    found = read_folder(write_importances(tmp_path, "arc-easy", "llama3", given))
    assert found.importances is not None and same(found.importances.scores, -given.by_query[0])
    with pytest.raises(
        InputError, match=r"edge input->a0\.h0<k> has no score .* score the edges by query head too"
    ):
        write_importances(tmp_path, "arc-easy", "llama3", scores(GROUPED))


def test_limits_are_shares_of_all_edges_by_query_head() -> None:
    small = EdgeGraph(12, 12, 12, False, 768)
    assert limits_of(small) == [32, 64, 162, 324, 649, 1624, 3249, 6498, 16245]
    assert limits_of(by_query_graph(EdgeGraph(32, 32, 8, False, 4096)))[0] == 1592
    # A thousandth of a thousand, in floating point.
    assert [100 * limit for limit in LIMITS] == pytest.approx([0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50])


@pytest.mark.parametrize("absolute", [False, True])
def test_circuits_are_the_selections_at_every_size(absolute: bool) -> None:
    given = scores(GROUPED, by_query=True)
    wide = by_query_graph(GROUPED)
    assert given.by_query is not None
    for selection, choose in (("top", top_n), ("greedy", greedy)):
        found = select_circuits(
            given, absolute=absolute, selection="greedy" if selection == "greedy" else "top"
        )
        expected = [choose(wide, -given.by_query[0], n, absolute=absolute).pruned() for n in limits_of(wide)]
        assert [circuit.names() for circuit in found] == [circuit.names() for circuit in expected]


@pytest.mark.parametrize("places", [0, 2])
def test_native_scores_select_as_many_edges_as_the_limits_allow(places: int) -> None:
    given = scores(GROUPED, places=places)
    importance = given.importance.sum(0) if places else given.importance
    found = select_circuits(given, absolute=False)
    sizes = [
        top_n(GROUPED, importance, n, absolute=False).by_query_head().n_edges
        for n in range(GROUPED.n_edges + 1)
    ]
    for circuit, limit in zip(found, limits_of(by_query_graph(GROUPED)), strict=True):
        n = max(n for n, size in enumerate(sizes) if size <= limit)
        expected = top_n(GROUPED, importance, n, absolute=False).by_query_head().pruned()
        assert circuit.names() == expected.names() and circuit.n_edges <= limit
    assert found[-1].n_edges > 20


@pytest.mark.parametrize("suffix", [".pt", ".json"])
def test_nine_circuits_come_back(tmp_path: Path, suffix: Any) -> None:
    circuits = select_circuits(scores(GROUPED), absolute=True)
    folder = write_circuits(
        tmp_path, "mcqa", "qwen2.5", circuits, method="eap", ranking="absolute", suffix=suffix
    )
    names = [f"circuit_{size}{suffix}" for size in ("0.1", "0.2", "0.5", "1", "2", "5", "10", "20", "50")]
    assert sorted(path.name for path in folder.iterdir()) == sorted(["README.md", *names])
    found = read_folder(folder)
    assert (found.task, found.model, found.importances) == ("mcqa", "qwen2.5", None)
    assert [
        torch.equal(file.in_graph, circuit.edges)
        for file, circuit in zip(found.circuits, circuits, strict=True)
    ] == [True] * 9
    assert "Nine circuits of at most 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50 %" in (
        folder / "README.md"
    ).read_text(encoding="utf-8")
    # The same folder again, and native circuits.
    native = [Circuit.empty(GROUPED)] * 9
    write_circuits(tmp_path, "mcqa", "qwen2.5", native, method="given", suffix=suffix)
    assert all(not file.in_graph.any() for file in read_folder(folder).circuits)


def test_circuits_without_scores_are_read_as_mib_describes_them(tmp_path: Path) -> None:
    """Nearly the same format, but without scores."""
    folder = write_circuits(
        tmp_path, "ioi", "gpt2", [Circuit.empty(PLAIN)] * 9, method="given", suffix=".json"
    )
    for path in folder.glob("*.json"):
        data = json.loads(path.read_text(encoding="utf-8"))
        del data["patchkit"]
        for edge in data["edges"].values():
            del edge["score"]
        path.write_text(json.dumps(data), encoding="utf-8")
    assert all(file.importance is None for file in read_folder(folder).circuits)


def test_what_mib_would_not_take_is_refused(tmp_path: Path) -> None:
    given, nine = scores(PLAIN), [Circuit.empty(PLAIN)] * 9
    for task, model in (("ioi_x", "gpt2"), ("ioi", "../gpt2"), ("", "gpt2"), ("ioi", "gpt_2")):
        with pytest.raises(InputError, match=r"expected letters, digits, '\.' and '-', such as"):
            write_importances(tmp_path, task, model, given)
    with pytest.raises(InputError, match="every score is 0"):
        write_importances(tmp_path, "ioi", "gpt2", scores(PLAIN, mean=torch.zeros(PLAIN.real.shape)))
    with pytest.raises(InputError, match="their format has no positions"):
        write_importances(tmp_path, "ioi", "gpt2", scores(PLAIN, places=2, method=EdgeMethod(name="exact")))
    with pytest.raises(InputError, match="expected 9 circuits, found 8"):
        write_circuits(tmp_path, "ioi", "gpt2", nine[1:], method="given")
    large = [Circuit.of_names(PLAIN, ["input->logits", "input->m0"]), *nine[1:]]
    with pytest.raises(InputError, match=r"expected a circuit of at most 0 edges, 0\.1 % of 262, found 2"):
        write_circuits(tmp_path, "ioi", "gpt2", large, method="given")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "ioi_gpt2").mkdir()
    (tmp_path / "ioi_gpt2" / "old.pt").touch()
    with pytest.raises(
        InputError, match=r"expected an empty folder or this submission's files, found old\.pt"
    ):
        write_importances(tmp_path, "ioi", "gpt2", given)


def renamed(folder: Path) -> Path:
    return folder.rename(folder.with_name("ioi"))


def overfull(folder: Path) -> None:
    write_graph(folder / "circuit_0.1.pt", GraphFile.of_circuit(Circuit.full(PLAIN)))


def other_model(folder: Path) -> None:
    write_graph(folder / "circuit_2.pt", GraphFile.of_circuit(Circuit.empty(EdgeGraph(1, 1, 1, False, 8))))


def alone(folder: Path) -> None:
    for path in sorted(folder.glob("circuit_*"))[1:]:
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: folder / "none", r"expected a folder <task>_<model>, found none"),
        (lambda folder: folder / "README.md", r"expected a folder <task>_<model>, found a file"),
        (renamed, r"expected a name <task>_<model>, such as ioi_gpt2, found 'ioi'"),
        (lambda folder: (folder / "circuit_5.pt").unlink(), r"one file of importances or 9 circuits .*, found 8"),
        (lambda folder: (folder / "extra.json").write_text("{}"), r"found 10"),
        (lambda folder: (folder / "circuit_5.pt").write_bytes(b"x"), r"circuit_5\.pt: expected tensors"),
        (overfull, r"expected a circuit of at most 131 edges, 50 % of 262, found 262"),
        (other_model, r"circuit_2\.pt: expected a circuit of the same model as circuit_0\.1\.pt"),
        (alone, r"circuit_0\.1\.pt: expected importances of edges, found none"),
    ],
)  # fmt: skip
def test_folders_that_are_none_are_refused(tmp_path: Path, damage: Callable[[Path], Any], words: str) -> None:
    folder = write_circuits(tmp_path, "ioi", "gpt2", [Circuit.empty(PLAIN)] * 9, method="given")
    found = damage(folder)
    with pytest.raises(InputError, match=words) as caught:
        read_folder(found if isinstance(found, Path) else folder)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_single_file_of_the_repository_is_read(tmp_path: Path) -> None:
    """Without patchkit's words in it, scores are importances as they are."""
    importance = torch.randn(PLAIN.real.shape).where(PLAIN.real, NAN)
    nothing = torch.zeros_like(PLAIN.real)
    write_graph(
        tmp_path / "ioi_gpt2" / "importances.json", GraphFile(PLAIN, importance, nothing, nothing[:, 0])
    )
    found = read_folder(tmp_path / "ioi_gpt2").importances
    assert found is not None and found.origin is None and same(found.importance, importance)
    assert read_graph(tmp_path / "ioi_gpt2" / "importances.json").circuit is None
