"""The checks of evaluations are able to fail: mistakes that give plausible, wrong numbers are caught.

Each test plants one mistake and expects the very tests and comparisons that evaluations pass to refuse it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from patchkit.methods import (
    _evaluate_bootstrap,
    _evaluate_completeness,
    _evaluate_minimality,
    _evaluate_random,
    _evaluate_repair,
    _evaluate_sizes,
)
from patchkit.methods._evaluate_bootstrap import PairBootstrap
from patchkit.methods._evaluate_runs import CircuitRunner
from patchkit.methods._evaluate_sampler import _Grown
from patchkit.methods._evaluate_sizes import Chosen
from patchkit.methods._pair_batch import PairBatch
from patchkit.results.circuit import Circuit
from patchkit.results.edge_scores import EdgeScores
from tests.comparisons import pair
from tests.methods import test_evaluate as checks
from tests.methods import test_evaluate_models as models
from tests.methods.standing_in import GRAPH
from tests.node_oracle import SHORT
from tests.repair_oracle import check_repair

#: Beside `make test`, in a lane of its own.
pytestmark = pytest.mark.slow

#: The room; its name is also its function's.
evaluate = import_module("patchkit.methods.evaluate")
GROUP = ["a0.h1", "a1.h0", "a1.h2", "m1"]
Patch = pytest.MonkeyPatch


def refused(check: Callable[..., Any], *args: Any, **options: Any) -> None:
    with pytest.raises(AssertionError):
        check(*args, **options)


@pytest.fixture(scope="module", autouse=True)
def opened() -> None:
    """Models are opened before anything is broken: validation on load would refuse it before the checks here see it."""
    for family in ("gpt2", "gemma2-post-norms-softcap"):
        pair(family, torch.float64)
    models.known()


# Faithfulness and sizes.


def test_the_two_ends_swapped(monkeypatch: Patch) -> None:
    right = CircuitRunner.ends.fget
    assert right is not None
    monkeypatch.setattr(CircuitRunner, "ends", property(lambda runner: right(runner)[::-1]))
    refused(checks.test_a_circuit_by_hand, monkeypatch)
    refused(checks.test_signed_and_absolute_selection, monkeypatch)


def test_a_mean_of_ratios(monkeypatch: Patch) -> None:
    right = _evaluate_sizes.circuit_run

    def wrong(chosen: Any, metric: Tensor, runner: CircuitRunner, *rest: Any) -> Any:
        ratios = (metric - runner.corrupt) / (runner.clean - runner.corrupt)
        found = right(chosen, metric, runner, *rest)
        return found.model_copy(update={"faithfulness": float(ratios.mean())})

    monkeypatch.setattr(evaluate, "circuit_run", wrong)
    # Where every pair has one ratio nothing tells them apart.
    checks.test_a_circuit_by_hand(monkeypatch)
    refused(checks.test_faithfulness_is_a_ratio_of_means_not_a_mean_of_ratios, monkeypatch)


def test_draws_of_their_own_for_each_mean(monkeypatch: Patch) -> None:
    drawn = iter(range(10**9))

    def wrong(bootstrap: PairBootstrap, values: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(next(drawn))
        index = torch.randint(bootstrap.pairs, (300, bootstrap.pairs), generator=generator)
        return values.double()[index].mean(1)

    monkeypatch.setattr(PairBootstrap, "means", wrong)
    refused(checks.test_a_circuit_by_hand, monkeypatch)
    refused(checks.test_intervals_cover_as_they_say)


def test_an_interval_of_the_pairs_themselves(monkeypatch: Patch) -> None:
    """Of single pairs, not of their mean: far too wide."""
    monkeypatch.setattr(PairBootstrap, "means", lambda bootstrap, values: values.double())
    refused(checks.test_intervals_cover_as_they_say)


def test_circuits_that_are_not_pruned(monkeypatch: Patch) -> None:
    monkeypatch.setattr(
        Chosen, "of", classmethod(lambda cls, circuit, n, name, absolute: cls(circuit, n, name, absolute, 0))
    )
    refused(checks.test_sizes_are_selected_pruned_and_counted, monkeypatch)
    refused(checks.test_an_empty_circuit_is_said, monkeypatch)
    refused(checks.test_edges_of_a_given_circuit_that_lead_nowhere_are_pruned_and_said, monkeypatch)


def test_effects_taken_for_importances(monkeypatch: Patch) -> None:
    monkeypatch.setattr(EdgeScores, "importance", property(lambda scores: scores.mean))
    refused(checks.test_sizes_are_selected_pruned_and_counted, monkeypatch)
    refused(checks.test_signed_and_absolute_selection, monkeypatch)


def test_rankings_mixed_up(monkeypatch: Patch) -> None:
    right = _evaluate_sizes.select
    swapped = lambda scores, n, name, absolute: right(scores, n, name, not absolute)  # noqa: E731
    monkeypatch.setattr(_evaluate_sizes, "select", swapped)
    refused(checks.test_signed_and_absolute_selection, monkeypatch)
    refused(checks.test_curves_have_mibs_sizes_and_both_rankings, monkeypatch)


def test_sizes_rounded_up(monkeypatch: Patch) -> None:
    right = _evaluate_sizes.math.floor
    monkeypatch.setattr(_evaluate_sizes.math, "floor", lambda value: right(value) + 1)
    with pytest.raises((AssertionError, checks.InputError)):
        checks.test_curves_have_mibs_sizes_and_both_rankings(monkeypatch)


# Completeness and minimality.


def test_nodes_taken_from_the_circuit_alone(monkeypatch: Patch) -> None:
    right = CircuitRunner.without

    def wrong(runner: CircuitRunner, circuit: Circuit, nodes: Tensor) -> Circuit:
        return circuit if circuit.n_edges == GRAPH.n_edges else right(runner, circuit, nodes)

    monkeypatch.setattr(CircuitRunner, "without", wrong)
    checks.test_completeness_finds_the_backup_that_is_missing(monkeypatch)
    refused(checks.test_with_both_backups_the_circuit_is_complete, monkeypatch)


def test_nodes_taken_from_the_model_alone(monkeypatch: Patch) -> None:
    right = CircuitRunner.without

    def wrong(runner: CircuitRunner, circuit: Circuit, nodes: Tensor) -> Circuit:
        return right(runner, circuit, nodes) if circuit.n_edges == GRAPH.n_edges else circuit

    monkeypatch.setattr(CircuitRunner, "without", wrong)
    refused(checks.test_completeness_finds_the_backup_that_is_missing, monkeypatch)
    refused(checks.test_minimality_sees_a_backup_and_calls_the_idle_node_superfluous, monkeypatch)


def test_a_greedy_set_of_one_step(monkeypatch: Patch) -> None:
    monkeypatch.setattr(_evaluate_completeness, "GREEDY_NODES", 1)
    checks.test_completeness_finds_the_backup_that_is_missing(monkeypatch)
    refused(checks.test_the_greedy_set_grows_while_the_gap_does, monkeypatch)


def test_random_sets_of_half_the_nodes(monkeypatch: Patch) -> None:
    def wrong(nodes: Tensor, draws: int, generator: torch.Generator) -> list[Tensor]:
        return [nodes & (torch.rand(len(nodes), generator=generator) < 0.5) for _ in range(draws)]

    monkeypatch.setattr(checks, "random_subsets", wrong)
    refused(checks.test_random_subsets_are_of_all_sizes_and_mostly_small)


def test_minimality_without_partners(monkeypatch: Patch) -> None:
    """Each node alone: a backup hides the node that it makes up for."""
    monkeypatch.setattr(_evaluate_minimality, "_partners", lambda circuit, numbers, most: [[]] * len(numbers))
    refused(checks.test_minimality_sees_a_backup_and_calls_the_idle_node_superfluous, monkeypatch)
    refused(checks.test_partners_that_hide_a_node_together_are_taken_away_together, monkeypatch)


def test_partners_one_at_a_time_only(monkeypatch: Patch) -> None:
    monkeypatch.setattr(_evaluate_minimality, "TOGETHER", 0.0)
    checks.test_minimality_sees_a_backup_and_calls_the_idle_node_superfluous(monkeypatch)
    refused(checks.test_partners_that_hide_a_node_together_are_taken_away_together, monkeypatch)


def test_a_change_against_the_whole_circuit(monkeypatch: Patch) -> None:
    """F(C without K and v) - F(C): whatever stands beside a needed node seems needed."""
    right = _evaluate_minimality._beside_partners

    def wrong(runner: CircuitRunner, nodes: Any, alone: Any) -> Any:
        found = right(runner, nodes, alone)
        own = {int(number): changes[0][1] for number, changes in zip(nodes.numbers, alone, strict=True)}
        return [
            [(taken, change + own[int(taken.nonzero()[0])]) for taken, change in changes] for changes in found
        ]

    monkeypatch.setattr(_evaluate_minimality, "_beside_partners", wrong)
    refused(checks.test_an_idle_node_beside_a_needed_one, monkeypatch)


def test_node_patching_that_cuts_edges(monkeypatch: Patch) -> None:
    """A node whose only reader was taken away is not itself taken away under node patching."""
    monkeypatch.setattr(CircuitRunner, "without", lambda runner, circuit, nodes: circuit.without(nodes))
    refused(checks.test_node_patching_takes_away_the_node_alone, monkeypatch)


# Random circuits.


def test_random_edges_that_lead_nowhere(monkeypatch: Patch) -> None:
    """Pruned they are empty, and everything is better than chance."""

    def wrong(graph: Any, n: int, quotas: Tensor, generator: torch.Generator) -> Circuit:
        edges = graph.real.nonzero()[torch.randperm(graph.n_edges, generator=generator)[:n]]
        mask = torch.zeros_like(graph.real)
        mask[edges[:, 0], edges[:, 1]] = True
        return Circuit(graph, mask, n)

    monkeypatch.setattr(checks, "random_circuit", wrong)
    refused(checks.test_random_circuits_have_no_dead_ends_and_the_very_size)


def test_random_circuits_of_another_size(monkeypatch: Patch) -> None:
    """Larger ones add up more: p of a circuit that is random itself is not uniform."""
    right = checks.random_circuit
    sizes = iter([24, *[30] * 9] * 20)
    monkeypatch.setattr(checks, "random_circuit", lambda graph, n, *rest: right(graph, next(sizes), *rest))
    refused(checks.check_uniform, 20)


def test_quotas_that_are_not_kept(monkeypatch: Patch) -> None:
    right = _Grown.__init__

    def wrong(grown: _Grown, graph: Any, quotas: Tensor, random: Any) -> None:
        right(grown, graph, torch.zeros_like(quotas), random)

    monkeypatch.setattr(_Grown, "__init__", wrong)
    refused(checks.test_random_circuits_go_into_the_same_receivers_as_far_as_they_can)


@pytest.mark.parametrize("mistake", ["without the circuit itself", "ties forgotten", "further away"])
def test_another_p(mistake: str, monkeypatch: Patch) -> None:
    def wrong(found: float, random: list[float]) -> float:
        gaps = [abs(1 - each) for each in random]
        mine = abs(1 - found)
        if mistake == "without the circuit itself":
            return sum(gap <= mine for gap in gaps) / len(gaps)
        if mistake == "ties forgotten":
            return (1 + sum(gap < mine for gap in gaps)) / (1 + len(gaps))
        return (1 + sum(each >= found for each in random)) / (1 + len(random))

    monkeypatch.setattr(checks, "p_value", wrong)
    refused(checks.test_ties_count_against_the_circuit)
    monkeypatch.setattr(_evaluate_random, "p_value", lambda found, random: 1 / (1 + len(random)))
    refused(checks.test_the_test_against_chance, monkeypatch)


# Knock-outs.


def test_base_and_source_swapped(monkeypatch: Patch) -> None:
    right = PairBatch.of.__func__  # type: ignore[attr-defined]

    def wrong(cls: type, model: Any, pairs: Any, covered: Any, direction: str) -> PairBatch:
        return right(cls, model, pairs, covered, "denoise" if direction == "noise" else "noise")

    monkeypatch.setattr(PairBatch, "of", classmethod(wrong))
    refused(check_repair, "gpt2", [SHORT], GROUP)


def test_effects_after_measured_in_the_base_run(monkeypatch: Patch) -> None:
    right = _evaluate_repair._Reader.all_effects
    base: list[Any] = []

    def wrong(reader: Any, run: Any, put_in: Any) -> Tensor:
        base.append(run)
        return right(reader, base[0], put_in)

    monkeypatch.setattr(_evaluate_repair._Reader, "all_effects", wrong)
    refused(check_repair, "gpt2", [SHORT], GROUP)


def test_the_group_knocked_out_at_the_last_token_alone(monkeypatch: Patch) -> None:
    right = _evaluate_repair.run_to_end

    def wrong(model: Any, batch: Any, group: Any = None, put_in: Any = None, where: Any = None) -> Any:
        if where is not None:
            where = where & (torch.arange(where.shape[1]) == where.shape[1] - 1)
        return right(model, batch, group, put_in, where)

    monkeypatch.setattr(_evaluate_repair, "run_to_end", wrong)
    refused(check_repair, "gpt2", [SHORT], GROUP)


def test_a_joint_effect_that_is_a_sum_of_metrics(monkeypatch: Patch) -> None:
    """Behind the final norm direct effects do not add up."""
    right = _evaluate_repair.DirectEffects.run

    def wrong(program: Any, model: Any, items: Any) -> dict[str, Tensor]:
        found = right(program, model, items)
        return found | {"expected": found["clean"] + found["before"][:, program.group].sum(1)}

    monkeypatch.setattr(_evaluate_repair.DirectEffects, "run", wrong)
    refused(check_repair, "gpt2", [SHORT], GROUP)


def test_heads_that_add_up_in_front_of_a_norm(monkeypatch: Patch) -> None:
    """The sum of what each head of a layer changes alone: right but for a norm behind the heads."""
    from patchkit.tracing.direct import single_changes

    def wrong(model: Any, own: Any, put_in: Any, nodes: Tensor) -> Tensor:
        return sum(
            changes[:, nodes[numbers]].sum(1) for numbers, changes in single_changes(model, own, put_in)
        )  # type: ignore[return-value]

    monkeypatch.setattr(_evaluate_repair, "joint_change", wrong)
    check_repair("gpt2", [SHORT], GROUP)
    refused(check_repair, "gemma2-post-norms-softcap", [SHORT], GROUP)


def test_a_share_of_all_that_was_lost(monkeypatch: Patch) -> None:
    """(knocked out - expected) / (clean - knocked out)."""
    right = _evaluate_repair.self_repair

    def wrong(*args: Any, **given: Any) -> Any:
        found = right(*args, **given)
        r = found.repair
        share = (r.knocked_out - r.expected) / (r.clean - r.knocked_out)
        return found._replace(repair=r.model_copy(update={"repaired": share}))

    monkeypatch.setattr(evaluate, "self_repair", wrong)
    refused(models.test_the_amount_of_self_repair_is_the_one_written_into_the_weights)


def test_a_faithfulness_of_nothing(monkeypatch: Patch) -> None:
    """Runs that do not differ get a number."""
    monkeypatch.setattr(_evaluate_bootstrap, "same_metric", lambda clean, corrupt: False)
    with pytest.raises((AssertionError, ZeroDivisionError)):
        checks.test_runs_that_do_not_differ_have_no_faithfulness(monkeypatch)


def test_without_a_mistake_the_checks_pass(monkeypatch: Patch) -> None:
    models.check_true_circuit("resample", "edge")
    check_repair("gpt2", [SHORT], GROUP)
    check_repair("gemma2-post-norms-softcap", [SHORT], GROUP)
    checks.test_a_circuit_by_hand(monkeypatch)
    checks.test_the_test_against_chance(monkeypatch)
