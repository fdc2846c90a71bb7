"""Planted mistakes in circuits, files and statistics: the tests beside this one have to see each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from patchkit.errors import InputError
from patchkit.model import EdgeGraph
from patchkit.results import (
    _edge_graphs,
    _graph_file,
    _graph_json,
    circuit,
    circuit_source,
    curves,
    edge_scores,
    mib,
    overlap,
    query_heads,
    stability,
)
from patchkit.results.circuit import Circuit
from patchkit.results.graph_files import GraphFile
from tests.model import test_edges
from tests.results import (
    test_circuit,
    test_circuit_source,
    test_curves,
    test_edge_scores,
    test_graph_files,
    test_mib,
    test_overlap,
    test_stability,
)

#: Beside `make test`, in a lane of its own.
pytestmark = pytest.mark.slow


def refused(check: Callable[..., Any], *args: Any) -> None:
    """The check passes without the mistake (the tests beside this one say so) and not with it."""
    with pytest.raises((AssertionError, InputError, pytest.fail.Exception)):
        check(*args)


# The graph.


def test_heads_that_a_parallel_mlp_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    right = EdgeGraph.upstream.function
    monkeypatch.setattr(EdgeGraph, "upstream", property(lambda graph: right(replace(graph, parallel=False))))
    refused(test_edges.test_counts_are_the_published_ones, "Pythia-2.8B")
    refused(test_edges.test_a_parallel_block_has_no_edge_from_its_heads_to_its_mlp)
    test_edges.test_counts_are_the_published_ones("GPT-2 small")


def test_values_numbered_before_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    right = EdgeGraph.receivers_of
    swapped = {"q": "q", "k": "v", "v": "k"}
    monkeypatch.setattr(
        EdgeGraph, "receivers_of", lambda graph, layer, letter: right(graph, layer, swapped[letter])
    )
    drawn = (2, (4, 2), False)
    for check in (
        test_edges.test_names_come_back,
        test_edges.test_parts_of_a_layer_are_where_their_names_are,
    ):
        refused(check.hypothesis.inner_test, drawn)  # type: ignore[attr-defined]


# Circuits.


def test_pruning_that_stops_after_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def once(given: Circuit) -> Circuit:
        owner = given.graph.owner
        inward = (owner & given.edges.any(0)).any(1)
        inward[0] = True
        nodes = inward & given.edges.any(1)
        into = (owner & nodes[:, None]).any(0)
        into[given.graph.logits] = True
        return Circuit(given.graph, given.edges & nodes[:, None] & into, given.requested)

    monkeypatch.setattr(Circuit, "pruned", once)
    refused(test_circuit.test_pruning_goes_on_to_a_fixed_point)
    refused(test_circuit.test_selections_are_those_of_the_eap_ig_repository, "sequential")


def test_pruning_that_forgets_dead_ends_behind_a_shared_key(monkeypatch: pytest.MonkeyPatch) -> None:
    right = EdgeGraph.owner.function

    def wrong(graph: EdgeGraph) -> Tensor:
        owner = right(graph)
        for layer in range(graph.n_layers):
            for letter in "kv":
                # Each KV head is that of one query head.
                owner[graph.heads(layer), graph.receivers_of(layer, letter)] &= torch.eye(
                    graph.n_heads, graph.n_kv_heads, dtype=torch.bool
                )
        return owner

    monkeypatch.setattr(EdgeGraph, "owner", property(wrong))
    refused(test_circuit.test_an_edge_into_a_shared_key_needs_one_head_of_the_group)


def test_selection_by_size_where_the_sign_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    right = circuit._keys
    monkeypatch.setattr(circuit, "_keys", lambda graph, importance, absolute: right(graph, importance, True))
    for name in ("sequential", "parallel"):
        refused(test_circuit.test_selections_are_those_of_the_eap_ig_repository, name)


def test_heads_counted_round_the_groups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Head h in group h mod n instead of h // (heads a group)."""

    def wrong(graph: EdgeGraph) -> Tensor:
        numbers: list[int] = []
        for layer in range(graph.n_layers):
            for letter in "qkv":
                first = graph.receivers_of(layer, letter).start
                count = graph.n_heads if letter == "q" else graph.n_kv_heads
                numbers += [first + head % count for head in range(graph.n_heads)]
            numbers.append(graph.mlp_receiver(layer))
        return torch.tensor([*numbers, graph.logits])

    for module in (circuit, query_heads):
        monkeypatch.setattr(module, "native_receivers", wrong)
    refused(test_edge_scores.test_groups_add_up_by_loops)
    refused(test_graph_files.test_a_circuit_becomes_a_file_by_query_head, tmp_path)
    refused(test_edge_scores.test_circuits_of_grouped_heads_go_to_every_head_of_the_group, tmp_path)


# Files.


def test_scores_of_a_group_split_evenly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def wrong(graph: EdgeGraph, native: Tensor) -> Tensor:
        columns = query_heads.native_receivers(graph)
        return native[..., columns] / torch.bincount(columns)[columns]

    monkeypatch.setattr(_edge_graphs, "spread_groups", wrong)
    refused(test_edge_scores.test_grouped_heads_have_scores_of_their_own_or_none, tmp_path)


def test_exact_effects_of_a_group_added_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(edge_scores.EdgeMethod, "adds_heads", property(lambda _: True))
    refused(test_circuit_source.test_effects_that_do_not_add_up_stay_by_query_head, tmp_path)


def test_exact_effects_of_positions_added_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(edge_scores.EdgeMethod, "adds_positions", property(lambda _: True))
    refused(test_edge_scores.test_positions_add_up_or_are_left_out, tmp_path)


def test_effects_for_importances(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in (_graph_file, edge_scores, circuit_source):
        monkeypatch.setattr(module, "importance_sign", lambda *_: 1)
    refused(test_graph_files.test_importances_have_one_sign)
    refused(test_edge_scores.test_importance_turns_the_sign_where_corruption_breaks)
    monkeypatch.undo()
    monkeypatch.setattr(GraphFile, "importance", property(lambda file: file.scores))
    refused(test_mib.test_importances_are_positive_where_an_edge_helps, tmp_path, "noise", ".pt")
    monkeypatch.undo()
    monkeypatch.setattr(circuit_source, "importance_sign", lambda *_: 1)
    refused(test_circuit_source.test_scores_of_others_are_importances, tmp_path)


def test_zero_for_no_score(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = _graph_json._numbers
    monkeypatch.setattr(_graph_json, "_numbers", lambda values, _: right(values.nan_to_num(0.0), "0.0"))
    refused(test_graph_files.test_json_is_byte_for_byte_what_the_repository_writes, tmp_path, "parallel")
    refused(test_graph_files.test_files_come_back_as_they_went, tmp_path, "parallel", True, True, "json")


def test_all_queries_before_all_keys_in_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in the matrix, and not as in the repository's JSON; read by name, it is the same graph."""

    def wrong(graph: EdgeGraph) -> Any:
        for receiver in range(graph.n_receivers):
            yield range(int(graph.upstream[receiver])), [receiver]

    monkeypatch.setattr(_graph_json, "_blocks", wrong)
    refused(test_graph_files.test_json_is_byte_for_byte_what_the_repository_writes, tmp_path, "sequential")
    test_graph_files.test_files_come_back_as_they_went(tmp_path, "sequential", True, True, "json")


def test_circuits_larger_than_their_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Native edges counted once where MIB counts one a head."""
    right = mib.limits_of
    monkeypatch.setattr(mib, "limits_of", lambda graph: [limit + 1 for limit in right(graph)])
    refused(test_mib.test_native_scores_select_as_many_edges_as_the_limits_allow, 0)


# Statistics.


def test_ties_broken_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(scores: Tensor, truth: Tensor) -> float:
        ranks = torch.empty(len(scores), dtype=torch.float64)
        ranks[scores.argsort(stable=True)] = torch.arange(1.0, len(scores) + 1, dtype=torch.float64)
        positives = int(truth.sum())
        above = float(ranks[truth].sum()) - positives * (positives + 1) / 2
        return above / (positives * (len(truth) - positives))

    for module in (overlap, test_overlap):
        monkeypatch.setattr(module, "auroc", wrong)
    refused(test_overlap.test_auroc_knows_right_from_wrong)


def test_precision_for_recall(monkeypatch: pytest.MonkeyPatch) -> None:
    right = overlap.overlap
    monkeypatch.setattr(test_overlap, "overlap", lambda a, b, *rest, **more: right(b, a, *rest, **more))
    refused(test_overlap.test_the_truth_is_the_second)


def test_an_area_of_steps_and_a_logarithm_without_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    right = curves.area

    def steps(at: Any, values: Any, unit: float = 1.0) -> Any:
        return sum((high - low) * value for low, high, value in zip(at, at[1:], values, strict=False)) / unit

    monkeypatch.setattr(curves, "area", steps)
    refused(test_curves.test_the_weights_of_the_linear_axis)
    refused(test_curves.test_nothing_until_everything_is_the_random_baseline)
    monkeypatch.setattr(curves, "area", lambda at, values, unit=1.0: right(at, values))
    test_curves.test_the_weights_of_the_linear_axis()
    refused(test_curves.test_the_weights_of_the_logarithmic_axis)
    refused(test_curves.test_a_perfect_curve)


def test_draws_that_are_not_pruned_or_not_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    check = test_stability.test_draws_are_what_doing_them_one_by_one_gives
    monkeypatch.setattr(Circuit, "pruned", lambda given: given)
    monkeypatch.setattr(test_stability, "naive", pruned_naive)
    refused(check, "top", False)
    monkeypatch.undo()
    right = stability._means
    monkeypatch.setattr(stability, "_means", lambda weights, values: right((weights > 0).double(), values))
    refused(check, "top", True)


def pruned_naive(
    per_pair: Tensor, n: int, selection: str, absolute: bool, draws: int, seed: int
) -> list[set[str]]:
    """Selections of every draw, pruned with sets."""
    drawn = torch.randint(
        len(per_pair), (draws, len(per_pair)), generator=torch.Generator().manual_seed(seed)
    )
    found = []
    for row in drawn:
        mean = per_pair[row].double().mean(0)
        chosen = test_stability.SELECTIONS[selection](test_stability.GRAPH, mean, n, absolute=absolute)
        found.append(test_circuit.naive_prune(test_stability.GRAPH, set(chosen.names())))
    return found
