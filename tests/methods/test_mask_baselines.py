"""What a learned mask is compared with: identities that hold for every family, and every score against brute force."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from patchkit.data import Batch, Triple, positions
from patchkit.methods import MaskOptions, Schedule, learn_mask
from patchkit.methods._mask_baselines import Scorer
from patchkit.methods._mask_evaluate import evaluate_mask, random_sets
from patchkit.methods._mask_layout import Layout
from patchkit.methods._mask_prepare import masked_logits
from patchkit.methods._mask_prepared import prepare
from patchkit.results.mask import MaskResult
from tests.comparisons import agree, pair
from tests.families import FAMILIES, VOCAB, WITHOUT_NEURONS
from tests.methods.mask_cases import chunks
from tests.methods.planted import FAMILY, KINDS, answers, planted, prompts

every_family = pytest.mark.parametrize("family", FAMILIES)


def matched(n: int = 4) -> list[Triple]:
    """Original and alternate end with the same token and are of one length; what comes before differs."""
    rng = random.Random(1)
    triples = []
    for index in range(n):
        length, last = (4, 9, 6)[index % 3], rng.randrange(3, VOCAB)
        ids = [(*(rng.randrange(3, VOCAB) for _ in range(length - 1)), last) for _ in range(2)]
        triples.append(Triple("any", ids[0], ids[1], rng.randrange(3, VOCAB)))
    return triples


def twin_logits(family: str, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    _, twin = pair(family)
    with torch.no_grad():
        return torch.stack([twin(input_ids=torch.tensor([list(ids)])).logits[0, -1] for ids in rows])


@every_family
@pytest.mark.parametrize(
    "components", [("head", "mlp"), ("attn_out", "mlp_out"), ("neuron", "head"), ("layer",)], ids="+".join
)
def test_all_components_at_the_last_token_give_the_alternate_and_none_the_original(
    family: str, components: tuple[str, ...]
) -> None:
    if "neuron" in components and family in WITHOUT_NEURONS:
        pytest.skip("a family without neurons")
    model, _ = pair(family)
    layout = Layout.build(components, model.dims)
    triples = matched()
    if components == ("layer",):
        # The whole residual stream: the last token and the length may differ too.
        triples = [replace(t, alternate_ids=(*t.alternate_ids, 5)) for t in triples]
    prepared = prepare(model, layout, {"any": triples}, max_batch_tokens=24)
    assert len(chunks(prepared)) > 1
    alternate = twin_logits(family, [t.alternate_ids for t in triples])
    original = twin_logits(family, [t.original_ids for t in triples])
    every, none = torch.zeros(layout.size), torch.ones(layout.size)
    with torch.no_grad():
        for chunk in chunks(prepared):
            agree(masked_logits(model, chunk, every), alternate[chunk.numbers], "all", 1e-4)
            agree(masked_logits(model, chunk, none), original[chunk.numbers], "none", 1e-4)
    assert prepared.answers(every).tolist() == alternate.argmax(-1).tolist()
    targets = torch.tensor([t.target_id for t in triples])
    hit = [replace(t, target_id=int(a)) for t, a in zip(triples, original.argmax(-1), strict=True)]
    mixed = prepare(model, layout, {"hit": hit, "any": triples}, max_batch_tokens=24)
    expected = {"hit": 1.0, "any": float((original.argmax(-1) == targets).double().mean())}
    assert evaluate_mask(mixed, none) == pytest.approx(expected)
    moved = float((original.argmax(-1) != alternate.argmax(-1)).double().mean())
    scorer = Scorer(layout, mixed, (), 1, lambda stage, done, total: None)
    assert scorer.moved(range(layout.size)) == pytest.approx({"hit": moved, "any": moved})
    assert scorer.moved([]) == {"hit": 0.0, "any": 0.0}


def test_a_mask_at_another_position_moves_that_position_only() -> None:
    """Patching the whole residual stream after layer 0 at a token equals a run whose lower layers saw another token."""
    model, twin = pair("llama-gqa")
    layout = Layout.build(("layer",), model.dims)
    triple = replace(matched(2)[1], spans={"here": (3, 4)}, alternate_spans={"here": (2, 3)})
    prepared = prepare(model, layout, {"any": [triple]}, position="here")
    (chunk,) = chunks(prepared)
    assert chunk.columns.tolist() == positions(Batch.from_ids([triple.original_ids]), 3).tolist()
    with torch.no_grad():
        hidden = twin(input_ids=torch.tensor([triple.alternate_ids]), output_hidden_states=True).hidden_states
    assert torch.allclose(chunk.alternates[layout.sites[0]], hidden[1][:, 2], atol=1e-4), (
        "the alternate's activation is its own span's"
    )


FLAT = {
    name: place for place, name in enumerate(["attn_out.0", "attn_out.1", "attn_out.2", "m0", "m1", "m2"])
}


@functools.cache
def halves() -> list[Triple]:
    """Two desiderata that patching attn_out.1 and m2 satisfies, half of each held out, and one asked only."""
    moves = [replace(t, desideratum="moves") for t in planted({1, 5})]
    reached, own = answers(frozenset({1, 5})), answers(frozenset())
    stays = [
        Triple("stays", o, (*a[:-1], b), mine, original_answer_id=mine, alternate_answer_id=mine + 1)
        for (o, a), mine, b in zip(prompts(), own, range(3, 30), strict=False)
    ]
    asked = [replace(t, desideratum="asked", split="test") for t in moves[::2]]
    assert len(moves) > 8 and reached != own
    sides = {ids: ("train", "test")[i % 2] for i, (ids, _) in enumerate(prompts())}
    dealt = [replace(t, split=sides[t.original_ids]) for t in (*moves, *stays)]  # type: ignore[arg-type]
    return dealt + [replace(t, original_ids=t.original_ids) for t in asked if sides[t.original_ids] == "test"]


@functools.cache
def learned() -> MaskResult:
    options = MaskOptions(
        components=KINDS,
        seeds=(0, 3),
        train_on=("moves", "stays"),
        random_sets=4,
        slack=0.0,
        validation_fraction=0.4,
        schedule=Schedule(lambdas=(0.01, 0.05), steps=30, steps_after=15, lr=0.05),
    )
    return learn_mask(pair(FAMILY)[0], halves(), options, descriptions={"moves": "must follow"})


@functools.cache
def direct(components: frozenset[int]) -> dict[str, float]:
    """Held-out accuracy of a set by the plain oracle, one prompt at a time."""
    hits: dict[str, list[bool]] = {}
    for t, answer in zip(held_out(), direct_answers(components), strict=True):
        hits.setdefault(t.desideratum, []).append(answer == t.target_id)
    return {name: sum(found) / len(found) for name, found in hits.items()}


@functools.cache
def direct_answers(components: frozenset[int]) -> list[int]:
    from tests import oracles
    from tests.methods.planted import PLACES, _replace_last

    _, twin = pair(FAMILY)
    found = []
    for t in held_out():
        values, _ = oracles.read(twin, t.alternate_ids)
        edits = {PLACES[c]: _replace_last(values[PLACES[c]][-1]) for c in components}
        found.append(int(oracles.patched_logits(twin, t.original_ids, edits).argmax()))
    return found


def held_out() -> list[Triple]:
    return [t for t in halves() if t.split == "test"]


def patched(names: Sequence[str]) -> frozenset[int]:
    return frozenset(FLAT[name] for name in names)


@pytest.mark.slow
def test_every_baseline_is_what_the_oracle_finds() -> None:
    found = learned()
    chosen = patched(found.chosen)
    assert chosen and len(chosen) < 6 and found.n_components == 6 and not found.diverged
    sets = [frozenset(s) for s in random_sets(6, len(chosen), 4, seed=0)]
    assert [d.name for d in found.desiderata] == ["moves", "stays", "asked"]
    for d in found.desiderata:
        of = {name: direct(s)[d.name] for name, s in _compared(chosen).items()}
        assert {name: getattr(d.test, name) for name in of} == pytest.approx(of)
        assert d.test.random == pytest.approx([direct(s)[d.name] for s in sets])
        assert d.n_test == sum(t.desideratum == d.name for t in held_out())
        assert d.n_train == (
            sum(t.desideratum == d.name and t.split == "train" for t in halves()) if d.trained else 0
        )
        assert (d.kind, d.trained) == {
            "moves": ("dependence", True), "stays": ("invariance", True), "asked": ("dependence", False)
        }[d.name]  # fmt: skip
        assert (d.train_accuracy is not None) == d.trained
    assert found.desiderata[0].description == "must follow"


def _compared(chosen: frozenset[int]) -> dict[str, frozenset[int]]:
    every = frozenset(range(6))
    return {"chosen": chosen, "empty": frozenset(), "all": every, "complement": every - chosen}


def worst(components: frozenset[int]) -> float:
    """The joint score: the minimum over what was trained on."""
    return min(direct(components)[name] for name in ("moves", "stays"))


def test_joint_scores_are_minima_over_what_was_trained_on() -> None:
    found = learned()
    chosen = patched(found.chosen)
    for name, components in _compared(chosen).items():
        assert found.joint[name] == pytest.approx(worst(components))
    random_joint = [worst(frozenset(s)) for s in random_sets(6, len(chosen), 4, seed=0)]
    assert found.random_joint == pytest.approx(random_joint)
    assert found.joint["random"] == pytest.approx(sum(random_joint) / 4)
    assert found.joint["soft"] == min(d.test.soft for d in found.desiderata if d.trained)


def test_every_seed_has_baselines_of_its_own() -> None:
    found = learned()
    assert [run.seed for run in found.seeds] == [0, 3]
    for run in found.seeds:
        chosen = patched(run.chosen)
        assert run.test == pytest.approx(direct(chosen)) and run.joint == pytest.approx(worst(chosen))
        assert run.complement_joint == pytest.approx(worst(frozenset(range(6)) - chosen))
        sets = random_sets(6, len(chosen), 4, seed=run.seed)
        assert run.random_joint == pytest.approx([worst(frozenset(s)) for s in sets])
    for row, one in enumerate(found.seeds):
        for column, other in enumerate(found.seeds):
            a, b = set(one.chosen), set(other.chosen)
            assert found.jaccard[row][column] == pytest.approx(len(a & b) / len(a | b) if a | b else 1)


def test_masks_of_one_desideratum_are_scored_on_all() -> None:
    own = learned().own_masks
    assert [mask.trained_on for mask in own] == ["moves", "stays"]
    for mask in own:
        assert mask.test == pytest.approx(direct(patched(mask.chosen)))


def test_what_a_component_carries_is_what_it_moves_alone_and_what_is_lost_without_it() -> None:
    found = learned()
    assert [row.component for row in found.carried] == found.chosen
    unpatched, whole = direct_answers(frozenset()), direct(patched(found.chosen))
    for row in found.carried:
        alone = direct_answers(patched([row.component]))
        rest = direct(patched([name for name in found.chosen if name != row.component]))
        for name in whole:
            moved = [
                a != u for a, u, t in zip(alone, unpatched, held_out(), strict=True) if t.desideratum == name
            ]
            assert row.alone[name] == pytest.approx(sum(moved) / len(moved))
            assert row.missed[name] == pytest.approx(whole[name] - rest[name])


def test_the_path_and_the_training_curve() -> None:
    found = learned()
    assert [point.lam for point in found.lambda_path] == [0.01, 0.05]
    for point in found.lambda_path:
        assert point.joint == min(point.test["moves"], point.test["stays"])
        assert set(point.test) == {"moves", "stays", "asked"}
        assert 0 <= point.soft_size <= 6 and 0 < point.steps <= 30
    assert {row["lambda"] for row in found.history} == {0.01, 0.05}
    assert [tuple(found.values[kind].shape) for kind in KINDS] == [(3, 1), (3, 1)]


def test_the_result_survives_the_disk(tmp_path: Path) -> None:
    found = learned()
    found.save(tmp_path)
    again = MaskResult.load(tmp_path)
    assert again.model_dump(exclude={"values"}) == found.model_dump(exclude={"values"})
    assert all(torch.equal(again.values[kind], found.values[kind]) for kind in KINDS)
