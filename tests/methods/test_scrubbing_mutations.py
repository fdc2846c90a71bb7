"""The comparisons of causal scrubbing are able to fail: mistakes that give plausible, wrong numbers are caught.

Each test plants one mistake and expects the comparison with the replay, or the check of the draws, to refuse it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from patchkit.methods import _scrub_draws, causal_scrubbing
from patchkit.methods._scrub_draws import draw
from patchkit.methods._scrub_reading import Part
from patchkit.methods.causal_scrubbing import Scrub
from patchkit.model import EdgeGraph, PatchModel, Site
from patchkit.tracing import scrub as tracing
from tests.comparisons import pair
from tests.methods.test_causal_scrubbing import check_draws, check_fresh
from tests.scrub_oracle import check_scrubbing, mixed, prompts

#: Beside `make test`, in a lane of its own.
pytestmark = pytest.mark.slow

FAMILY = "gpt2"
POSTS, PARALLEL, GROUPED = "gemma2-post-norms-softcap", "neox-parallel", "llama-gqa"


def check(family: str = FAMILY, **options: Any) -> None:
    """One reference, whose tree holds everything that `mixed` has."""
    group = pair(family, torch.float64)[0].dims.group
    check_scrubbing(family, prompts(1, seed=1), mixed(group), pool=prompts(4), **options)


def refused(check: Callable[..., Any], *args: Any, match: str = "scrubbed metric of") -> None:
    with pytest.raises(AssertionError, match=match):
        check(*args)


@pytest.fixture(scope="module", autouse=True)
def opened() -> None:
    """Models are opened before anything is broken."""
    for family in (FAMILY, POSTS, PARALLEL, GROUPED):
        pair(family, torch.float64)


def test_without_a_mistake_the_checks_pass() -> None:
    check()
    check_draws(mixed(1), draw(mixed(1), prompts(8), samples=4))
    check_fresh(prompts(8))


# What the runs are made of.


def test_nodes_with_children_run_on_the_drawn_input(monkeypatch: pytest.MonkeyPatch) -> None:
    right = causal_scrubbing._Run.scrubbed

    def wrong(run: Any, name: str, draws: Sequence[Any]) -> Any:
        return right(run, name, [replace(each, unrelated=each.input) for each in draws])

    monkeypatch.setattr(causal_scrubbing._Run, "scrubbed", wrong)
    # Their prompts are run for the output's row only where they were drawn, so all are.
    monkeypatch.setattr(causal_scrubbing.ScrubItem, "prompts", property(lambda item: [4, 0, 1, 2, 3]))
    refused(check)


def test_leaves_taken_from_the_unrelated_input(monkeypatch: pytest.MonkeyPatch) -> None:
    right = causal_scrubbing._Run.replaced

    def wrong(run: Any, parent: str, draws: Sequence[Any]) -> Any:
        moved = [
            replace(
                each,
                children=tuple(
                    replace(child, input=each.unrelated) if not child.children else child
                    for child in each.children
                ),
            )
            for each in draws
        ]
        return right(run, parent, moved)

    monkeypatch.setattr(causal_scrubbing._Run, "replaced", wrong)
    refused(check)


def test_places_counted_from_the_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(run: Any, place: str, numbers: Sequence[int]) -> Tensor:
        return torch.tensor([run.reading.tokens[place][number] for number in numbers])

    monkeypatch.setattr(causal_scrubbing._Run, "columns", wrong)
    refused(check)


def test_the_edges_that_are_named_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    real = EdgeGraph.of(pair(FAMILY, torch.float64)[0].dims).real
    monkeypatch.setattr(Part, "readers", lambda part, parent: real[part.sender] & parent)
    refused(check)


def test_the_children_of_the_output_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deeper nodes are taken plain from their unrelated inputs."""
    right = causal_scrubbing.recompute
    monkeypatch.setattr(
        causal_scrubbing,
        "recompute",
        lambda model, plain, replaced, members: right(model, plain, [], members),
    )
    refused(check)


# How senders are computed again.


def test_members_that_do_not_read_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    right = tracing._Again._keep

    def wrong(again: Any, *args: Any, **options: Any) -> None:
        right(again, *args, **options)
        again.replaced.pop()

    monkeypatch.setattr(tracing._Again, "_keep", wrong)
    refused(check)


def test_influence_that_leaks_past_the_members(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream goes on as the members changed it: other nodes read them and are read."""
    right = tracing._Again._read_by_attention

    def wrong(again: Any, layer: int, reads: frozenset[int]) -> Tensor:
        below = {
            place
            for place, each in enumerate(again.replaced)
            if again.graph.layer_of_sender(each.sender) < layer
        }
        return right(again, layer, reads | below)

    monkeypatch.setattr(tracing._Again, "_read_by_attention", wrong)
    refused(check)


def test_what_is_put_in_added_to_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    right = tracing._Again._of_vectors

    def wrong(again: Any, layer: int, places: Sequence[int]) -> Tensor:
        change = right(again, layer, places)
        own = again.plain.input if layer < 0 else again.plain.mlps[layer]
        return torch.where(change != 0, change + own, change)

    monkeypatch.setattr(tracing._Again, "_of_vectors", wrong)
    refused(check)


def test_heads_put_in_behind_their_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PatchModel, "attention_post_norm", lambda model, layer: None)
    refused(check, POSTS)
    # Without such a norm it is no mistake.
    check(FAMILY)


def test_an_mlp_beside_the_attention_that_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    right = tracing._Again.reads

    def wrong(again: Any, receiver: int) -> frozenset[int]:
        graph = again.graph
        layer = graph.layer_of_receiver(receiver)
        if layer == graph.n_layers or receiver != graph.mlp_receiver(layer):
            return right(again, receiver)
        same = range(*graph.heads(layer).indices(graph.n_senders))
        return right(again, receiver) | {
            place for place, each in enumerate(again.replaced) if each.sender in same
        }

    monkeypatch.setattr(tracing._Again, "reads", wrong)
    refused(check, PARALLEL)


def test_keys_of_another_group(monkeypatch: pytest.MonkeyPatch) -> None:
    right = tracing.canonical

    def wrong(model: PatchModel, site: Site, raw: Tensor) -> Tensor:
        value = right(model, site, raw)
        return value.roll(1, 2) if site.kind == "k_proj" else value

    monkeypatch.setattr(tracing, "canonical", wrong)
    refused(check, GROUPED)


def test_streams_without_their_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(again: Any, layer: int, reads: frozenset[int]) -> Tensor:
        return again._changed(again.plain.attention[layer], reads)

    monkeypatch.setattr(tracing._Again, "_read_by_attention", wrong)
    refused(check)


# What is scored.


def test_the_answer_of_the_unrelated_input(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Scrub._score

    def wrong(program: Scrub, metric: Any, logits: Tensor, reference: Tensor, roots: Sequence[Any]) -> Tensor:
        return right(
            program, metric, logits, reference, [replace(root, input=root.unrelated) for root in roots]
        )

    monkeypatch.setattr(Scrub, "_score", wrong)
    refused(check, match="model metric of")


def test_rows_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    right = causal_scrubbing.logits_with
    monkeypatch.setattr(causal_scrubbing, "logits_with", lambda *args: right(*args).flip(0))

    def two() -> None:
        check_scrubbing(FAMILY, prompts(2, seed=1, lengths=(6,)), mixed(1), pool=prompts(4, lengths=(6,)))

    refused(two)


# Draws.


def drawn() -> None:
    check_draws(mixed(1), draw(mixed(1), prompts(8), samples=4))


def test_keys_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(dice: Any, name: str, number: int, rng: random.Random) -> int:
        return dice._another(range(dice.pool), number, rng)

    monkeypatch.setattr(_scrub_draws._Dice, "_equal", wrong)
    refused(drawn, match="other key")


def test_an_input_drawn_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(dice: Any, numbers: Sequence[int], number: int, rng: random.Random) -> int:
        return numbers[rng.randrange(len(numbers))]

    monkeypatch.setattr(_scrub_draws._Dice, "_another", wrong)
    refused(drawn, match="own prompt|the same prompt")


def test_one_draw_for_all_occurrences(monkeypatch: pytest.MonkeyPatch) -> None:
    class ByName(random.Random):
        def __init__(self, path: str) -> None:
            start, *names = path.split("/")
            super().__init__("/".join([start, *names[-1:]]))

    monkeypatch.setattr(_scrub_draws, "random", SimpleNamespace(Random=ByName))
    refused(check_fresh, prompts(8), match="occurrences have one draw")


def test_keys_of_the_reference_instead_of_the_parents_input(monkeypatch: pytest.MonkeyPatch) -> None:
    right = _scrub_draws._Dice._equal
    reference: list[int] = []

    def wrong(dice: Any, name: str, number: int, rng: random.Random) -> int:
        return right(dice, name, reference[-1], rng)

    tree = _scrub_draws._Dice.tree

    def noted(dice: Any, name: str, number: int, path: str) -> Any:
        if name == "output":
            reference.append(number)
        return tree(dice, name, number, path)

    monkeypatch.setattr(_scrub_draws._Dice, "tree", noted)
    monkeypatch.setattr(_scrub_draws._Dice, "_equal", wrong)
    refused(drawn, match="other key|own prompt")
