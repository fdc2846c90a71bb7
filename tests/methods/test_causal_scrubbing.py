"""Causal scrubbing against a brute-force replay of its draws, its identities, the handmade model, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from patchkit import InputError, load
from patchkit.data import Pair
from patchkit.methods import causal_scrubbing
from patchkit.methods._scrub_draws import Draws, draw
from patchkit.methods._scrub_hypothesis import OUTPUT
from patchkit.methods._scrub_reading import read_hypothesis
from patchkit.methods.causal_scrubbing import Hypothesis, Interpretation, ScrubOptions, scrub
from patchkit.model import EdgeGraph
from patchkit.results.scrubbing import ScrubResult
from patchkit.zoo import handmade
from tests.comparisons import pair
from tests.scrub_oracle import anything, check_scrubbing, mixed, odd, prompts, third, whole

FAMILIES = (
    "llama-gqa",
    "qwen3-qk-norm",
    "gemma2-post-norms-softcap",
    "gpt2",
    "neox-parallel",
    "olmo2",
)
FAMILY = "gpt2"
ALL = ("input", "a0.h0", "a0.h1", "a0.h2", "a0.h3", "m0", "a1.h0", "a1.h1", "a1.h2", "a1.h3", "m1")
TOP = ("a2.h0", "a2.h1", "a2.h2", "a2.h3", "m2")


def run(hypothesis: Hypothesis, pairs: list[Pair], family: str = FAMILY, **options: Any) -> ScrubResult:
    pool = options.pop("pool", None)
    return scrub(pair(family, torch.float64)[0], pairs, hypothesis, ScrubOptions(**options), pool=pool)


# Against the oracle.


@pytest.mark.parametrize("family", FAMILIES)
def test_scrubbed_runs_are_those_of_the_replay(family: str) -> None:
    exact = family in ("gpt2", "neox-parallel")
    hypothesis = mixed(pair(family, torch.float64)[0].dims.group)
    # The RMSNorm of transformers computes in float32 always.
    tolerance = 1e-10 if exact else 1e-6
    result = check_scrubbing(family, prompts(2, seed=1), hypothesis, tolerance=tolerance, pool=prompts(4))
    assert [node.occurrences for node in result.nodes] == [1, 2, 1, 2, 2, 1, 2]


def test_float32_too() -> None:
    check_scrubbing("llama-gqa", prompts(1), mixed(2), torch.float32, tolerance=1e-4, pool=prompts(3, seed=1))


@pytest.mark.slow
def test_references_that_are_drawn_from_and_several_runs_of_each() -> None:
    result = check_scrubbing(FAMILY, prompts(3), mixed(1), samples=2, seed=3)
    assert (result.pool, len(result.inputs), result.samples) == (3, 3, 2)
    assert all(each.spread is not None and each.spread > 0 for each in result.inputs)


# Identities.


def test_everything_by_the_whole_input_recovers_the_model() -> None:
    pairs = prompts(6, lengths=(6,))
    one = Hypothesis("one", (Interpretation("all", whole, (*ALL, *TOP)),), ("all",))
    # Each node on inputs of its own, which are all the reference; the output reads the stream from all of them.
    nodes = (
        Interpretation("top", whole, TOP, children=("below",)),
        Interpretation("below", whole, ALL),
    )
    two = Hypothesis("two", nodes, ("top", "below"))
    for family, tolerance in (("gpt2", 1e-10), ("llama-gqa", 1e-6), ("gemma2-post-norms-softcap", 1e-5)):
        for hypothesis in (one, two):
            result = run(hypothesis, pairs, family)
            assert result.recovered == pytest.approx(1, abs=tolerance)
            assert result.gap == pytest.approx(0, abs=tolerance)
            assert result.vacuous == 1


def test_nothing_claimed_is_the_random_baseline_exactly() -> None:
    result = run(Hypothesis("nothing"), prompts(8), samples=3)
    assert result.recovered == 0 and result.scrubbed_metric == result.random_metric
    assert all(each.scrubbed == each.random for each in result.inputs)
    assert result.notes == ["Nothing is claimed: every activation is that of an unrelated input."]


def test_with_two_prompts_the_baseline_is_the_other_ones_logits() -> None:
    pairs = prompts(2, lengths=(6,))
    result = run(Hypothesis("nothing"), pairs)
    model, _ = pair(FAMILY, torch.float64)
    logits = causal_scrubbing.run_plain(
        model, causal_scrubbing.Batch.from_ids([each.clean_ids for each in pairs]), ()
    ).logits
    for row, (each, found) in enumerate(zip(pairs, result.inputs, strict=True)):
        other = logits[1 - row]
        assert found.random == pytest.approx(float(other[each.answer_id] - other[each.wrong_id]), abs=1e-12)
        assert found.model == pytest.approx(
            float(logits[row][each.answer_id] - logits[row][each.wrong_id]), abs=1e-12
        )


def test_the_recovered_share_is_the_ratio_of_the_means() -> None:
    result = run(mixed(1), prompts(6), samples=2)
    means = [sum(getattr(i, name) for i in result.inputs) / 6 for name in ("scrubbed", "random", "model")]
    assert result.recovered == pytest.approx((means[0] - means[1]) / (means[2] - means[1]))
    assert result.gap == pytest.approx(
        sum(abs(i.model - i.scrubbed) for i in result.inputs) / 6 / abs(means[2] - means[1])
    )
    assert result.recovered_interval is not None
    assert result.recovered_interval[0] <= result.recovered <= result.recovered_interval[1]
    assert result.quantiles[2] == pytest.approx(sorted(i.scrubbed for i in result.inputs)[2:4][0], abs=10)


def test_kl_is_measured_from_the_references_own_run() -> None:
    result = run(mixed(1), prompts(4), metric="kl")
    assert result.model_metric == pytest.approx(0, abs=1e-12)
    assert result.random_metric > 0 and result.scrubbed_metric > 0


# The model whose mechanism is known.


@pytest.fixture(scope="module")
def bindings() -> list[Pair]:
    made = []
    tokenizer = handmade.build_tokenizer()
    for number, prompt in enumerate(handmade.sample_prompts(180, seed=0, n_bindings=2)):
        ids: Any = tokenizer(prompt.text)["input_ids"]
        answer = prompt.answer
        wrong = handmade.TOKEN_IDS[handmade.VALUES[(int(answer) + 3) % 8]]
        said = {"letters": prompt.keys, "digits": prompt.values, "asked": prompt.query, "answer": answer}
        made.append(
            Pair(tuple(ids), tuple(ids), handmade.TOKEN_IDS[answer], wrong, id=str(number), meta=said)
        )
    return made


def says(*names: str) -> Callable[[Pair], Hashable]:
    def key(pair: Pair) -> Hashable:
        return tuple(pair.meta[name] for name in names)

    key.__doc__ = " and ".join(names)
    return key


def mechanism(found: str = "answer", owners: str = "letters", digits: str = "digits") -> Hypothesis:
    """Every true edge of the handmade model; the parameters are what its nodes are said to compute."""
    nodes = (
        Interpretation("successor", says("answer"), ("m2",), positions="last", children=("found",)),
        Interpretation("found", says(found), ("a1.h2@last",), children=("asked", "owners", "digits")),
        Interpretation("asked", says("asked"), edges=("input->a1.h2<q>",), positions="last"),
        Interpretation("owners", says(owners), edges=("a0.h1->a1.h2<k>",), children=("letters",)),
        Interpretation("letters", says(owners), edges=("input->a0.h1<v>",)),
        Interpretation("digits", says(digits), edges=("input->a1.h2<v>",)),
    )
    return Hypothesis("mechanism", nodes, ("successor",))


def test_the_handmade_mechanism_is_recovered_and_false_ones_are_not(bindings: list[Pair]) -> None:
    model = load("handmade-llama-saturated")
    true = scrub(model, bindings, mechanism())
    assert true.recovered == pytest.approx(1, abs=1e-6) and true.gap == pytest.approx(0, abs=1e-6)
    assert true.vacuous < 0.05
    false = {"found": "asked", "owners": "digits", "digits": "letters"}
    for what, key in false.items():
        result = scrub(model, bindings, mechanism(**{what: key}))
        assert result.recovered_interval is not None
        # With two letters, a lookup that compares with the wrong ones still hits by chance.
        assert result.recovered_interval[1] < (0.75 if what == "owners" else 0.3), what


def test_a_node_left_out_of_a_true_mechanism_breaks_it(bindings: list[Pair]) -> None:
    model = load("handmade-llama-saturated")
    whole_mechanism = mechanism()
    without = tuple(
        replace(node, children=tuple(child for child in node.children if child != "asked"))
        for node in whole_mechanism.nodes
        if node.name != "asked"
    )
    result = scrub(model, bindings, Hypothesis("without the question", without, ("successor",)))
    assert result.recovered is not None and result.recovered < 0.3


# Draws.


def by_hand(keys: str, seed: int = 0) -> list[Pair]:
    """Pairs with one letter each as their key."""
    return [
        replace(each, meta={"letter": letter})
        for each, letter in zip(prompts(len(keys), seed), keys, strict=True)
    ]


LETTERED = Hypothesis("lettered", (Interpretation("letter", says("letter"), ("m2@last",)),), ("letter",))


def check_draws(hypothesis: Hypothesis, draws: Draws) -> None:
    """Every draw of every tree obeys the rules."""
    prompt = [each.clean_ids for each in draws.inputs]
    for tree in draws.trees:
        for each in tree.occurrences():
            assert [child.node for child in each.children] == list(hypothesis.children_of(each.node))
            assert (each.unrelated is None) == (each.node != OUTPUT and not each.children)
            if each.unrelated is not None:
                assert each.unrelated < draws.pool, f"{each.node}: unrelated input outside the pool"
                assert prompt[each.unrelated] != prompt[each.input], (
                    f"{each.node}: the same prompt as unrelated"
                )
            for child in each.children:
                key = hypothesis.node(child.node).key
                assert key(draws.inputs[child.input]) == key(draws.inputs[each.input]), (
                    f"{child.node}: other key"
                )
                same = [
                    other
                    for other in range(draws.pool)
                    if key(draws.inputs[other]) == key(draws.inputs[each.input])
                    and prompt[other] != prompt[each.input]
                ]
                assert (child.input in same) if same else (child.input == each.input), (
                    f"{child.node}: own prompt"
                )


def check_fresh(pairs: list[Pair]) -> None:
    """Occurrences of one node are drawn apart, and every input is drawn."""
    nodes = (
        node("left", nodes=("m2@last",), children=("both",)),
        node("right", nodes=("a2.h0@last",), children=("both",)),
        node("both", nodes=("m0@last",)),
    )
    draws = draw(Hypothesis("shared", nodes, ("left", "right")), pairs, samples=20)
    drawn = [[each.input for each in tree.occurrences() if each.node == "both"] for tree in draws.trees]
    apart = sum(one != other for one, other in drawn) / len(drawn)
    assert apart > 0.7, f"occurrences have one draw in {1 - apart:.0%} of the trees"
    unrelated = [tree.unrelated for tree in draws.trees if tree.input == 0]
    assert set(unrelated) == set(range(1, len(pairs))), "some inputs are never drawn"


def test_draws_obey_the_rules() -> None:
    hypothesis, pairs = mixed(1), prompts(9)
    check_draws(hypothesis, draw(hypothesis, pairs, samples=5, seed=2))
    check_draws(hypothesis, draw(hypothesis, prompts(3, seed=8), pairs, samples=5))
    # Prompts that come twice are not drawn for one another.
    check_draws(hypothesis, draw(hypothesis, [*pairs, *pairs[:3]], samples=5))
    check_fresh(pairs)


def test_buckets_counted_by_hand() -> None:
    draws = draw(LETTERED, by_hand("AABCCC"))
    buckets = draws.buckets["letter"]
    assert (buckets.count, buckets.smallest, buckets.middle, buckets.largest) == (3, 1, 2.0, 3)
    assert (buckets.singletons, buckets.empty, buckets.draws, buckets.vacuous) == (1, 0, 6, 1)
    # A pool of other prompts: nobody has D, and B's only member is another prompt than the reference.
    buckets = draw(LETTERED, by_hand("ABDD", seed=1), by_hand("AABCCC"), samples=2).buckets["letter"]
    assert (buckets.singletons, buckets.empty, buckets.draws, buckets.vacuous) == (1, 1, 8, 4)


def test_vacuous_draws_are_said() -> None:
    result = run(LETTERED, by_hand("AABCCC"))
    (node,) = result.nodes
    assert (node.buckets, node.bucket_sizes, node.singletons, node.vacuous) == (3, (1, 2.0, 3), 1, 1)
    assert len(result.notes) == 1
    assert "'letter': 1 of 6 draws were vacuous" in result.notes[0]
    assert run(LETTERED, by_hand("AABB")).notes == []


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers_and_another_others() -> None:
    first, again, other = (run(mixed(1), prompts(5), seed=seed) for seed in (4, 4, 5))
    assert first == again
    assert first.scrubbed_metric != other.scrubbed_metric and first.model_metric == other.model_metric


def test_draws_of_a_reference_do_not_depend_on_the_others() -> None:
    pool = prompts(9)
    few, many = (draw(mixed(1), pool[:n], pool, seed=1).trees for n in (2, 5))
    assert few == many[:2]


def test_numbers_do_not_depend_on_the_batches() -> None:
    one, many = (run(mixed(1), prompts(6), max_batch_tokens=tokens) for tokens in (1, 10000))
    for a, b in zip(one.inputs, many.inputs, strict=True):
        for name in ("model", "random", "scrubbed"):
            assert getattr(a, name) == pytest.approx(getattr(b, name), abs=1e-10)
    # Alone, each run pays for its own inputs; together, an input is run once.
    assert one.forwards > many.forwards


def test_forwards_are_counted() -> None:
    model, _ = pair(FAMILY, torch.float64)
    assert run(Hypothesis("nothing"), prompts(4)).forwards == 4
    # m2 and a2.h1, and m1 and a1.h1, and m0 and a0.h1 twice: a half of a layer each, of three.
    again = (2 + 2 * 2 + 2 * 2) / 6
    result = run(mixed(1), prompts(4))
    assert model.dims.n_layers == 3
    assert result.forwards == pytest.approx(4 + 4 * again)
    draws = draw(mixed(1), prompts(4))
    reading = read_hypothesis(mixed(1), EdgeGraph.of(model.dims), draws.inputs)
    items = [causal_scrubbing.ScrubItem(tree, 7) for tree in draws.trees]
    cost = causal_scrubbing.Scrub(reading, draws.inputs, "logit-diff").cost(model.dims, items)
    # The output, eleven occurrences and the reference, as if no input came twice; every prompt counted as the longest.
    assert cost.forwards == pytest.approx(4 * 7 * (13 + again)) and cost.bytes > 0


@pytest.mark.slow
def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair(FAMILY, torch.float64)
    options = ScrubOptions(max_batch_tokens=1)
    small = Hypothesis(
        "small",
        (
            node(key=odd, nodes=("m2@last", "a2.h0@last"), children=("m",)),
            node("m", key=third, nodes=("m1@last",)),
        ),
        ("n",),
    )
    right = causal_scrubbing.Scrub.run
    calls: list[int] = []

    def failing(program: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return right(program, *args)

    monkeypatch.setattr(causal_scrubbing.Scrub, "run", failing)
    with pytest.raises(KeyboardInterrupt):
        scrub(model, prompts(4), small, options, checkpoint=tmp_path)
    resumed = scrub(model, prompts(4), small, options, checkpoint=tmp_path)
    assert len(calls) == 3 + 2
    assert resumed == scrub(model, prompts(4), small, options)
    # Another hypothesis, or other draws, do not take its batches.
    scrub(model, prompts(4), small, replace(options, seed=1), checkpoint=tmp_path)
    assert len(calls) == 5 + 4 + 4


# Refusals.


def node(
    name: str = "n", key: Any = anything, nodes: tuple[str, ...] = ("m2@last",), **more: Any
) -> Interpretation:
    return Interpretation(name, key, nodes, **more)


def test_hypotheses_that_are_none() -> None:
    with pytest.raises(InputError, match="go round in a circle: a -> b -> a"):
        Hypothesis("h", (node("a", children=("b",)), node("b", children=("a",))), ("a",))
    with pytest.raises(InputError, match="'a' has the child 'x', which is none of its nodes"):
        Hypothesis("h", (node("a", children=("x",)),), ("a",))
    with pytest.raises(InputError, match="'output' has the child 'x'"):
        Hypothesis("h", (), ("x",))
    with pytest.raises(InputError, match="two nodes are called 'a'"):
        Hypothesis("h", (node("a"), node("a")), ("a",))
    with pytest.raises(InputError, match="'b' is nobody's child"):
        Hypothesis("h", (node("a"), node("b")), ("a",))
    with pytest.raises(InputError, match="name a node twice"):
        Hypothesis("h", (node("a"),), ("a", "a"))
    with pytest.raises(InputError, match="either nodes or edges"):
        Interpretation("a", odd)
    with pytest.raises(InputError, match="either nodes or edges.*found both"):
        Interpretation("a", odd, ("m2",), ("m1->logits",))
    with pytest.raises(InputError, match="name 'm2' twice"):
        node("a", nodes=("m2", "m2"))
    with pytest.raises(InputError, match="not 'output'"):
        node("output")


@pytest.mark.parametrize(
    ("nodes", "children", "match"),
    [
        ((node(nodes=("m7",)),), ("n",), "'n': sender 'm7': expected"),
        ((node(nodes=("a0.h9",)),), ("n",), "sender 'a0.h9'"),
        ((node(nodes=(), edges=("m1->m0",)),), ("n",), "m1 is not upstream of m0"),
        ((node(nodes=("m2@nowhere",)),), ("n",), "node 'n': .* has no span 'nowhere'"),
        ((node(nodes=("m2",), positions="each"),), ("n",), "positions 'each' have no meaning"),
        ((node(nodes=("m2", "m2@last")),), ("n",), "m2 and m2@last share tokens"),
        ((node(nodes=("m2@0",)),), ("n",), "'n' .* is not upstream of any model node of its parent 'output'"),
        ((node("a", children=("b",)), node("b", nodes=("m2@0",))), ("a",), "not upstream of .* parent 'a'"),
        (
            (node("a", nodes=("a1.h0@last",), children=("b",)), node("b", nodes=("m1@0",))),
            ("a",),
            "not upstream of .* parent 'a'",
        ),
        (
            (node("a", nodes=("m2@last",), children=("b",)), node("b", nodes=("m0@last", "m0@0"))),
            ("a",),
            "m0@0 of 'b' is not upstream of any model node of 'a'",
        ),
        ((node("a"), node("b")), ("a", "b"), "'a' and 'b' both say what m2->logits carries to 'output'"),
        (
            (node("a", nodes=("m1@last", "m2@last"), children=("b",)), node("b", nodes=("m1@last",))),
            ("a",),
            "'a' and 'b' both say what m1->m2 carries to 'a'",
        ),
        (
            (node("a", nodes=("input", "m2"), children=("b",)), node("b", nodes=("m1",))),
            ("a",),
            "`input` an interpretation node of its own",
        ),
        (
            (node(nodes=(), edges=("m1->logits", "m1->m2"), positions="last"),),
            ("n",),
            "the edge m1->m2 ends at no model node of its parents",
        ),
    ],
)
def test_hypotheses_that_do_not_fit(
    nodes: tuple[Interpretation, ...], children: tuple[str, ...], match: str
) -> None:
    with pytest.raises(InputError, match=match):
        run(Hypothesis("h", nodes, children), prompts(3, lengths=(5,)))


def test_the_same_sender_along_different_edges_or_tokens_is_no_conflict() -> None:
    nodes = (
        node("a", nodes=("m2@last", "a2.h0@last"), children=("b", "c", "d")),
        node("b", nodes=(), edges=("m1->m2",), positions="last"),
        node("c", nodes=(), edges=("m1->a2.h0<q>",), positions="last"),
        node("d", nodes=("m1@0",)),
    )
    run(Hypothesis("h", nodes, ("a",)), prompts(3))


def test_places_that_differ_between_pairs() -> None:
    everything = Hypothesis("h", (node(nodes=("m2",)),), ("n",))
    with pytest.raises(InputError, match="node 'n': 'all' covers 7 tokens in pair '0-0' and 5 in pair '0-1'"):
        run(everything, prompts(3))
    longer = [*prompts(2), replace(prompts(3)[2], spans={"s": (0, 3)})]
    with pytest.raises(InputError, match="'s' covers 2 tokens"):
        run(Hypothesis("h", (node("n", nodes=("m2@last", "m2@s")),), ("n",)), longer)


def failing(pair: Pair) -> Hashable:
    return pair.meta["nothing"]


def listed(pair: Pair) -> Any:
    return [1]


def tensor(pair: Pair) -> Hashable:
    return torch.tensor(1)


@pytest.mark.parametrize(
    ("key", "match"),
    [
        (failing, "key function failed on pair '0-0' with KeyError"),
        (listed, "the key of pair '0-0' is a list that cannot be hashed"),
        (tensor, "not equal, so no input could share it"),
        (lambda pair: float("nan"), "not equal"),
    ],
)
def test_keys_that_are_none(key: Any, match: str) -> None:
    with pytest.raises(InputError, match=match):
        run(Hypothesis("h", (node(key=key),), ("n",)), prompts(3))


def test_too_few_inputs_and_too_many_occurrences() -> None:
    with pytest.raises(InputError, match="fewer than two different clean prompts"):
        run(Hypothesis("h"), prompts(1))
    with pytest.raises(InputError, match="fewer than two different clean prompts"):
        run(Hypothesis("h"), prompts(1) * 3)
    with pytest.raises(InputError, match="no prompt pairs"):
        run(Hypothesis("h"), [], pool=prompts(3))
    with pytest.raises(InputError, match="samples must be at least 1"):
        ScrubOptions(samples=0)
    with pytest.raises(InputError, match="unknown metric"):
        run(Hypothesis("h"), prompts(2), metric="loss")
    layers = 11
    nodes = tuple(
        node(f"n{layer}{side}", children=(f"n{layer + 1}a", f"n{layer + 1}b") if layer < layers else ())
        for layer in range(layers + 1)
        for side in "ab"
    )
    with pytest.raises(InputError, match="occur more than 1,024 times"):
        run(Hypothesis("h", nodes, ("n0a", "n0b")), prompts(3))


def test_third_is_a_key_with_words() -> None:
    assert node(key=third).key_words == "the first token modulo 3"
    assert node(key=anything).key_words == "anything"
