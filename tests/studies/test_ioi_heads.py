"""What heads are seen to do, and what they are called for it: on a model written by hand and on a trained induction."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from patchkit import load, tasks, zoo
from patchkit.data import Pair
from patchkit.errors import InputError
from patchkit.model import PatchModel
from patchkit.results.ioi import QUERIES, TARGETS, HeadBehaviour
from patchkit.studies._ioi_behaviour import Behaviours, asking, measure_behaviour, named, token_targets
from patchkit.studies._ioi_heads import (
    CLASSES,
    Known,
    Thresholds,
    classes_of,
    evidence,
    members,
    nearest,
    rules,
)
from patchkit.studies._ioi_repeats import repeat_scores
from patchkit.studies._ioi_words import looks, unnamed
from tests.studies import ioi_handmade


@pytest.fixture(scope="module")
def handmade() -> PatchModel:
    return load(ioi_handmade.build()[0])


@pytest.fixture(scope="module")
def embedded() -> PatchModel:
    return load("ioi-gpt2")


@pytest.fixture(scope="module")
def induction() -> PatchModel:
    return load("induction-2l")


@pytest.fixture(scope="module")
def found(handmade: PatchModel) -> Behaviours:
    repeats = repeat_scores(handmade, 48, 12, seed=0)
    return measure_behaviour(handmade, ioi_handmade.prompts(12, 0), repeats, max_batch_tokens=100)


def known(behaviours: Behaviours, layers: int, heads: int, **more: dict[str, float]) -> dict[str, Known]:
    """All heads; `more` gives what path patching and knock-outs would have found."""
    even = named(behaviours.even)
    return {
        name: Known(behaviours.of(layer, head), even, **{key: value.get(name) for key, value in more.items()})
        for layer in range(layers)
        for head in range(heads)
        for name in [f"a{layer}.h{head}"]
    }


def test_heads_written_by_hand_are_called_what_they_are(found: Behaviours) -> None:
    heads = known(found, 3, 4, inhibits={"a1.h1": 0.9}, takes_over={})
    thresholds = Thresholds()
    called = {one.name: members(one, heads, thresholds) for one in CLASSES}
    assert called == ioi_handmade.TRUE
    assert [one.name for one in classes_of(heads["a2.h0"], thresholds)] == ["name mover"]
    assert evidence(classes_of(heads["a2.h0"], thresholds), heads["a2.h0"]) == (
        "attention END → IO 0.94, copying score 1.00"
    )
    # Without path patching nothing is known to act on the movers' queries.
    unpatched = known(found, 3, 4)
    inhibition = next(one for one in CLASSES if one.name == "S-inhibition")
    assert members(inhibition, unpatched, thresholds) == []
    assert "effect through the queries of name movers not measured" in inhibition.said(unpatched["a1.h1"])


def test_a_head_that_takes_over_is_a_backup(found: Behaviours) -> None:
    heads = known(found, 3, 4, takes_over={"a2.h3": 0.2, "a2.h2": -0.2, "a2.h1": 0.009})
    backup = next(one for one in CLASSES if one.name == "backup")
    assert members(backup, heads, Thresholds()) == ["a2.h3"]


def test_rules_say_who_comes_nearest_where_nobody_does(found: Behaviours) -> None:
    heads = known(found, 3, 4)
    strict = Thresholds(attends=0.97)
    said = {rule.name: rule for rule in rules(heads, strict)}
    assert said["name mover"].heads == []
    assert said["name mover"].criterion == "attention END → IO at least 0.97, copying score at least 0.5"
    assert said["name mover"].nearest == "nearest a2.h0: attention END → IO 0.94, copying score 1.00"
    assert said["backup"].nearest == "no head comes after a mover that was knocked out"
    assert said["S-inhibition"].nearest == "there are no name movers whose queries heads could act on"
    met = {rule.name: rule for rule in rules(heads, Thresholds())}
    assert met["name mover"].nearest is None and met["induction"].heads == ["a1.h0"]
    assert nearest(CLASSES[0], {}, strict) is None


def loop_attention(model: PatchModel, pair: Pair, asks: int) -> dict[str, torch.Tensor]:
    """Attention mass by target from the eager implementation's own probabilities."""
    model.hf.set_attn_implementation("eager")
    patterns = model.hf(torch.tensor([pair.clean_ids]), output_attentions=True).attentions
    sums = {target: torch.zeros(len(patterns), patterns[0].shape[1]) for target in TARGETS}
    for layer, pattern in enumerate(patterns):
        for token in range(len(pair.clean_ids)):
            inside = [name for name in ("io", "s1", "s1+1", "s2", "last") if pair.spans[name][0] == token]
            if inside:
                target = inside[0]
            elif token == asks - 1:
                target = "token before"
            elif pair.spans["clause"][0] <= token < pair.spans["clause"][1]:
                target = "rest of clause"
            else:
                target = "first token" if token == 0 else "elsewhere"
            sums[target][layer] += pattern[0, :, asks, token]
    return sums


def test_attention_is_that_of_the_model(handmade: PatchModel, found: Behaviours) -> None:
    pairs = ioi_handmade.prompts(12, 0)
    for i, query in enumerate(QUERIES):
        # Behind the names stand `met` and the comma.
        asked = [[4, 5] if query == "clause" else [pair.spans[query][0]] for pair in pairs]
        expected = [
            [loop_attention(handmade, p, token) for token in a] for p, a in zip(pairs, asked, strict=True)
        ]
        for j, target in enumerate(TARGETS):
            means = [torch.stack([one[target] for one in several]).mean(0) for several in expected]
            torch.testing.assert_close(found.attention[i, j], torch.stack(means).mean(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.attention.sum(1), torch.ones(4, 3, 4), atol=1e-5, rtol=0)


def test_every_token_has_one_place() -> None:
    (pair,) = ioi_handmade.prompts(1, 0)
    assert token_targets(pair, 8) == [
        "first token", "io", "rest of clause", "s1", "s1+1", "rest of clause", "s2", "token before", "last",
    ]  # fmt: skip
    assert token_targets(pair, 6)[4:7] == ["s1+1", "token before", "s2"]
    assert [asking(pair, query) for query in QUERIES] == [[8], [6], [4], [4, 5]]


def test_even_attention_is_that_of_a_head_without_weights(found: Behaviours) -> None:
    for layer, head in ((0, 2), (1, 3), (2, 2)):
        torch.testing.assert_close(found.attention[:, :, layer, head], found.even, atol=1e-5, rtol=0)


def test_attention_to_much_of_the_prompt_is_no_look(found: Behaviours) -> None:
    """A head without weights gives the rest of the clause 0.25 and more, because it is so long."""
    even = named(found.even)
    assert even["s2"]["rest of clause"] > 0.25 or even["last"]["rest of clause"] > 0.2
    silent = found.of(1, 3)
    assert not looks(silent, even, Thresholds()).clear
    assert unnamed(silent, even, Thresholds()).startswith("spreads its attention (most from ")
    mover = found.of(2, 0)
    look = looks(mover, even, Thresholds())
    assert (look.query, look.target, round(look.mass, 1), look.clear) == ("last", "io", 0.9, True)
    assert unnamed(mover, even, Thresholds()) == (
        f"looks from END at IO ({look.mass:.2f}); writes IO at END (100\u00a0% of prompts); would copy a name "
        "(100\u00a0% of names)"
    )
    # What is not far above even attention is no class either: long prompts ask for less of it than short ones.
    known_silent = Known(silent, even)
    previous = next(one for one in CLASSES if one.name == "previous token")
    least = previous.needs[0].least(known_silent, Thresholds())
    assert least == pytest.approx(2 * even["s1+1"]["s1"]) and least > 0.25


def test_a_head_that_writes_nothing_copies_nothing(found: Behaviours) -> None:
    silent = [(0, 2), (0, 3), (1, 2), (1, 3), (2, 2), (2, 3)]
    for layer, head in silent:
        behaviour = found.of(layer, head)
        assert (
            behaviour.copying == behaviour.negative_copying == behaviour.writes_io == behaviour.writes_s == 0
        )
    assert found.of(2, 0).writes_io == 1 and found.of(2, 1).writes_io == 0


def loop_copying(model: PatchModel, pairs: Sequence[Pair]) -> dict[tuple[int, int], tuple[float, float]]:
    """The copying scores by the model's own modules, the biases of GPT-2 taken off again where a norm adds them."""
    size, width, final = model.dims.d_head, model.dims.d_model, model.hf.transformer.ln_f
    counts: dict[tuple[int, int], list[int]] = {}
    for pair in pairs:
        states = model.hf(torch.tensor([pair.clean_ids]), output_hidden_states=True).hidden_states
        for place in (pair.spans[name][0] for name in ("io", "s1", "s2")):
            for layer, block in enumerate(model.hf.transformer.h):
                stream = states[1 if layer else 0][0, place]
                values = (block.ln_1(stream) - block.ln_1.bias) @ block.attn.c_attn.weight[:, 2 * width :]
                for head in range(model.dims.n_heads):
                    part = slice(head * size, (head + 1) * size)
                    written = values[part] @ block.attn.c_proj.weight[part]
                    order = model.hf.lm_head(final(written) - final.bias).argsort(descending=True).tolist()
                    rank = order.index(pair.clean_ids[place])
                    count = counts.setdefault((layer, head), [0, 0])
                    count[0] += rank < 5
                    count[1] += rank >= len(order) - 5
    names = 3 * len(pairs)
    return {place: (up / names, down / names) for place, (up, down) in counts.items()}


def test_copying_is_that_of_the_models_modules(embedded: PatchModel) -> None:
    model, pairs = embedded, tasks.pairs("ioi", embedded.tokenizer, 5, 3)
    behaviours = measure_behaviour(model, pairs, repeat_scores(model, 1, 4, 0))
    with torch.no_grad():
        expected = loop_copying(model, pairs)
    assert len(expected) == 24
    for (layer, head), scores in expected.items():
        own = behaviours.of(layer, head)
        assert (own.copying, own.negative_copying) == pytest.approx(scores), f"a{layer}.h{head}"


def induction_prompts(n: int) -> list[Pair]:
    """Random tokens, of which one comes twice: what followed it first is what an induction head looks at."""
    rng = random.Random(1)
    made = []
    for number in range(n):
        tokens = rng.sample(range(3, 51), 14)
        ids = (1, *tokens, tokens[4], tokens[13] if tokens[13] != tokens[4] else 3)
        spans = {
            "io": (2, 3),
            "s1": (5, 6),
            "s1+1": (6, 7),
            "s2": (15, 16),
            "last": (16, 17),
            "clause": (2, 9),
        }
        made.append(Pair(ids, ids, tokens[1], tokens[4], spans=spans, id=str(number)))
    return made


def test_the_heads_of_a_trained_induction_are_found(induction: PatchModel) -> None:
    scores = repeat_scores(induction, 64, 20, seed=0)
    behaviours = measure_behaviour(induction, induction_prompts(48), scores)
    heads = known(behaviours, 2, 4)
    called = {one.name: members(one, heads, Thresholds()) for one in CLASSES}
    assert called["induction"] == ["a1.h0", "a1.h1", "a1.h2", "a1.h3"]
    assert called["previous token"] == ["a0.h1"]
    assert not any(called[name] for name in called if name not in ("induction", "previous token"))


def test_repeats_that_cannot_be_made_are_refused(induction: PatchModel) -> None:
    with pytest.raises(InputError, match="takes sequences of up to 48 different tokens twice, found 49"):
        repeat_scores(induction, 2, 49, 0)
    with pytest.raises(InputError, match="at least 1 sequence of at least 4 tokens, found 2 of 3"):
        repeat_scores(induction, 2, 3, 0)
    with pytest.raises(InputError, match="threshold lift must be at least 1, found 0.5"):
        Thresholds(lift=0.5)
    with pytest.raises(InputError, match="threshold attends must be above 0 and at most 1, found 0.0"):
        Thresholds(attends=0.0)


def test_repeats_are_those_of_the_models_card(induction: PatchModel) -> None:
    """The card's scores were measured by other code, on other sequences."""
    scores = repeat_scores(induction, 128, 16, seed=3)
    card = zoo.card("induction-2l").measurements
    for layer in range(2):
        for head in range(4):
            assert float(scores.induction[layer, head]) == pytest.approx(
                card[f"induction a{layer}.h{head}"], abs=0.08
            )
            assert float(scores.previous[layer, head]) == pytest.approx(
                card[f"previous a{layer}.h{head}"], abs=0.2
            )


def test_behaviour_does_not_depend_on_batches(handmade: PatchModel, found: Behaviours) -> None:
    whole = measure_behaviour(handmade, ioi_handmade.prompts(12, 0), found.repeats)
    torch.testing.assert_close(whole.attention, found.attention, atol=1e-6, rtol=0)
    assert torch.equal(whole.copying, found.copying) and torch.equal(whole.writes, found.writes)


def test_a_behaviour_is_between_nothing_and_all(found: Behaviours) -> None:
    for layer in range(3):
        for head in range(4):
            behaviour: HeadBehaviour = found.of(layer, head)
            numbers = [mass for row in behaviour.attention.values() for mass in row.values()]
            numbers += [behaviour.previous, behaviour.duplicate, behaviour.induction]
            assert all(-1e-6 <= number <= 1 + 1e-6 for number in numbers)
