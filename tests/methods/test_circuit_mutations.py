"""The comparisons of circuits and of ACDC are able to fail: mistakes that give plausible, wrong numbers are caught.

Each test plants one mistake and expects the very functions that the tests of circuits and ACDC run to refuse it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from patchkit.methods import _acdc_runs as trying
from patchkit.methods import _acdc_search as searching
from patchkit.methods import circuits as running
from patchkit.methods._acdc_order import known_at
from patchkit.methods._acdc_trials import Trials
from patchkit.methods._pair_batch import PairBatch
from patchkit.model import PatchModel
from patchkit.model.edges import EdgeGraph
from patchkit.model.weights import Projection
from patchkit.results.circuit import Circuit
from patchkit.tracing import _circuit_cut, circuit
from patchkit.tracing._circuit_inputs import Inputs
from tests.acdc_oracle import check_acdc, tiny
from tests.circuit_oracle import check_circuits, graphs_of, random_circuits
from tests.comparisons import pair
from tests.node_oracle import LONG, SHORT

#: Beside `make test`, in a lane of its own.
pytestmark = pytest.mark.slow

PAIRS = [LONG, SHORT]
FAMILY, POST_NORMS = "llama-gqa", "gemma2-post-norms-softcap"
FAMILIES = (FAMILY, POST_NORMS, "gpt2", "neox-parallel", "olmo2", "qwen2-biases")
ACDC: dict[str, Any] = {"name": "llama-gqa", "tau": 0.02}


def native(family: str, shares: Sequence[float] = (0.5,)) -> list[Circuit]:
    return random_circuits(graphs_of(pair(family, torch.float64)[0])[0], shares)


def wide(family: str) -> list[Circuit]:
    return random_circuits(graphs_of(pair(family, torch.float64)[0])[1], (0.5,))


def refused(
    family: str, circuits: Sequence[Circuit] | None = None, match: str = "circuit 0", **options: Any
) -> None:
    circuits = native(family) if circuits is None else circuits
    with pytest.raises(AssertionError, match=match):
        check_circuits(family, PAIRS, circuits=circuits, **options)


def refused_acdc(match: str = "effect of|kept edges", **changed: Any) -> None:
    with pytest.raises(AssertionError, match=match):
        check_acdc(**ACDC | changed)


@pytest.fixture(scope="module", autouse=True)
def opened() -> None:
    """Models are opened before anything is broken: validation on load would refuse it before the checks here see it."""
    for family in FAMILIES:
        pair(family, torch.float64)
    tiny(ACDC["name"])


def test_without_a_mistake_the_checks_pass() -> None:
    for family in FAMILIES:
        check_circuits(family, PAIRS, circuits=native(family))
    check_circuits(FAMILY, PAIRS, circuits=wide(FAMILY))
    check_circuits("gpt2", PAIRS, circuits=native("gpt2"), ablation="zero")
    check_acdc(**ACDC)


# What edges carry.


@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_source_and_base_swapped(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = PairBatch.of.__func__  # type: ignore[attr-defined]

    def wrong(cls: type, model: PatchModel, pairs: Any, covered: Any, direction: str) -> PairBatch:
        return right(cls, model, pairs, covered, "denoise" if direction == "noise" else "noise")

    monkeypatch.setattr(PairBatch, "of", classmethod(wrong))
    refused(FAMILY, match="base run of", direction=direction)


def test_the_base_runs_value_for_the_circuits_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """An edge inside carries what its sender holds in this run, not what it held in the base run."""
    right = circuit.circuit_logits

    def wrong(model: PatchModel, cut: Any, graph: EdgeGraph, circuits: Any) -> Tensor:
        (own, _), other = circuit_senders(model, cut.batch), cut.other
        return right(model, cut, graph, circuits, circuit.start_at(model, own, other, graph, graph.n_senders))

    circuit_senders = running.capture_senders
    monkeypatch.setattr(circuit, "first_receiver", lambda *_: 0)
    monkeypatch.setattr(running, "circuit_logits", wrong)
    refused(FAMILY)


def test_a_sender_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an MLP's stream was begun with is added once more."""
    right = Inputs.add
    monkeypatch.setattr(
        Inputs,
        "add",
        lambda inputs, total, receivers, sums, since: right(inputs, total, receivers, sums, (0,)),
    )
    for family in (FAMILY, POST_NORMS):
        refused(family)


def test_a_layers_heads_left_out_of_its_mlp(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Inputs.add

    def wrong(inputs: Inputs, total: Tensor | None, receivers: Tensor, sums: Any, since: Any) -> Tensor:
        return right(inputs, total, receivers, sums, since if total is None else inputs.filled)

    monkeypatch.setattr(Inputs, "add", wrong)
    for family in (FAMILY, POST_NORMS):
        refused(family)
    # In a parallel block they are none of its senders.
    check_circuits("neox-parallel", PAIRS, circuits=native("neox-parallel"))


@pytest.mark.parametrize("ablation", ["resample", "zero"])
def test_the_mlp_of_a_parallel_block_behind_its_attention(
    ablation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def behind(cut: Any) -> Any:
        after = zip(cut.before[1:], cut.other.mlps, strict=True)
        return replace(cut, between=tuple(stream - mlp for stream, mlp in after))

    both, made = circuit.run_both, circuit.cut_run
    monkeypatch.setattr(running, "run_both", lambda *given: (behind(both(*given)[0]), *both(*given)[1:]))
    monkeypatch.setattr(running, "cut_run", lambda *given: behind(made(*given)))
    refused("neox-parallel", ablation=ablation)
    # In a sequential block that is what it reads.
    check_circuits(FAMILY, PAIRS, circuits=native(FAMILY), ablation=ablation)


def test_positions_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    right = circuit.run_both
    monkeypatch.setattr(
        running, "run_both", lambda *given: (replace(right(*given)[0], placed=False), *right(*given)[1:])
    )
    refused("gpt2")
    # A rotary model has none.
    check_circuits(FAMILY, PAIRS, circuits=native(FAMILY))


def test_no_bias_behind_the_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    right = _circuit_cut.heads_sum

    def wrong(model: PatchModel, layer: int, z: Tensor) -> Tensor:
        bias = model.b_o(layer)
        return right(model, layer, z) - (0 if bias is None else bias)

    monkeypatch.setattr(_circuit_cut, "heads_sum", wrong)
    refused("gpt2", match="every edge cut", ablation="zero")
    check_circuits(FAMILY, PAIRS, circuits=native(FAMILY), ablation="zero")


# Heads.


def test_keys_and_values_of_another_group(monkeypatch: pytest.MonkeyPatch) -> None:
    right = circuit.skip_projections
    for rolled in ((1, 0), (0, 1)):

        def wrong(model: PatchModel, layer: int, q: Tensor, *others: Tensor, rolled: Any = rolled) -> None:
            right(model, layer, q, *(each.roll(by, 2) for each, by in zip(others, rolled, strict=True)))

        monkeypatch.setattr(circuit, "skip_projections", wrong)
        refused(FAMILY)


def test_keys_of_another_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    right = circuit.skip_projections

    def wrong(model: PatchModel, layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        right(model, layer, q, torch.cat(k.chunk(2)[::-1]) if len(k) > len(PAIRS) else k, v)

    monkeypatch.setattr(circuit, "skip_projections", wrong)
    refused(FAMILY, wide(FAMILY))
    # Without a key for each query head there is one copy.
    check_circuits(FAMILY, PAIRS, circuits=native(FAMILY))


def test_projections_without_their_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    right = PatchModel.projections

    def wrong(model: PatchModel, layer: int) -> tuple[Projection, ...]:
        return tuple(Projection(each.weight, None) for each in right(model, layer))

    monkeypatch.setattr(PatchModel, "projections", wrong)
    refused("qwen2-biases")
    check_circuits(FAMILY, PAIRS, circuits=native(FAMILY))


def test_a_joint_norm_over_some_of_the_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pair("olmo2", torch.float64)[0]
    edges = ["input->a0.h1<k>", "input->a0.h1<v>", "m0->a1.h0<q>", "a0.h3->a1.h0<k>", "input->a1.h0<v>"]
    edges += ["a0.h3->m0", "input->m0", "a1.h0->logits"]
    few = [Circuit.of_names(graphs_of(model)[0], edges)]
    check_circuits("olmo2", PAIRS, circuits=few)
    monkeypatch.setattr(model, "arch", replace(model.arch, joint_qk_norm=False))
    refused("olmo2", few)


def test_the_norm_behind_the_heads_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(circuit._Run, "_behind_heads", lambda run, layer, total: total)
    refused(POST_NORMS)
    refused("olmo2")
    check_circuits(FAMILY, PAIRS, circuits=native(FAMILY))


def test_heads_through_that_norm_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Inputs._add_heads

    def wrong(inputs: Inputs, total: Tensor, part: Any, layer: int, heads: slice, *rest: Any) -> None:
        for head in range(heads.start, heads.stop):
            right(inputs, total, part, layer, slice(head, head + 1), *rest)

    monkeypatch.setattr(Inputs, "_add_heads", wrong)
    refused(POST_NORMS)


def test_the_first_position_for_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    right = circuit._Run._last
    monkeypatch.setattr(
        circuit._Run,
        "_last",
        lambda run, value: right(run, value.unflatten(0, (run.pairs, run.width)).roll(1, 1).flatten(0, 1)),
    )
    refused(FAMILY)


# ACDC.


def test_candidates_that_start_a_layer_too_high(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(graph: EdgeGraph, receiver: int) -> int:
        return min(known_at(graph, receiver) + graph.n_heads + 1, graph.n_senders)

    monkeypatch.setattr(searching, "known_at", wrong)
    # That a start misses edges is refused by name otherwise.
    monkeypatch.setattr(circuit, "first_receiver", lambda *_: 0)
    refused_acdc()


def test_a_start_with_the_wrong_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    right = trying.start_at

    def wrong(*given: Any) -> Any:
        start = right(*given)
        start.differences[:, -1] = 0
        return start

    monkeypatch.setattr(trying, "start_at", wrong)
    refused_acdc()


def test_one_pair_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Trials.metrics
    monkeypatch.setattr(
        Trials,
        "metrics",
        lambda tried, circuits, known: right(tried, circuits, known)[:1].expand(len(PAIRS), -1),
    )
    refused_acdc()


def test_the_earliest_sender_first(monkeypatch: pytest.MonkeyPatch) -> None:
    right = searching.Search.visit
    monkeypatch.setattr(
        searching.Search, "visit", lambda search, receiver, senders: right(search, receiver, senders[::-1])
    )
    refused_acdc()
    refused_acdc(tau=0.05, order="by-size")


def changed_search(monkeypatch: pytest.MonkeyPatch, name: str, value: Callable[[Any], Any]) -> None:
    right = searching.Search.__init__

    def wrong(search: Any, *given: Any) -> None:
        right(search, *given)
        setattr(search, name, value(search))

    monkeypatch.setattr(searching.Search, "__init__", wrong)


def test_gain_taken_for_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    changed_search(monkeypatch, "turned", lambda search: -search.turned)
    refused_acdc()


def test_the_metric_of_the_whole_model_for_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Effects measured from the base run, and not from the circuit as it stands."""
    right = searching.Search._decide

    def wrong(search: Any, *given: Any) -> int:
        search.current = search.trials.base
        return right(search, *given)

    monkeypatch.setattr(searching.Search, "_decide", wrong)
    refused_acdc()


def test_what_was_not_as_expected_is_taken_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group goes on behind an edge that was kept, with circuits that lack it."""
    right = searching.Search._decide

    def wrong(search: Any, receiver: int, senders: Sequence[int], group: Sequence[Tensor]) -> int:
        metrics = search.trials.metrics(group, known_at(search.graph, receiver))
        known: Callable[..., Tensor] = search.trials.metrics
        for place in range(len(group)):
            search.trials.metrics = lambda *_, place=place: metrics[:, place : place + 1]
            right(search, receiver, senders[place : place + 1], group[place : place + 1])
        search.trials.metrics = known
        search.at_once = 4
        return len(group)

    monkeypatch.setattr(searching.Search, "_decide", wrong)
    refused_acdc()


def test_dead_ends_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    right = searching.Search.visit

    def wrong(search: Any, receiver: int, senders: Sequence[int]) -> int:
        owners = search.graph.owner
        search.graph.__dict__["owner"] = torch.ones_like(owners)
        try:
            return right(search, receiver, senders)
        finally:
            search.graph.__dict__["owner"] = owners

    monkeypatch.setattr(searching.Search, "visit", wrong)
    refused_acdc(match="was not to be tried")
