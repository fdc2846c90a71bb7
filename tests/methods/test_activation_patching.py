"""Exact patching equals plain hooks, one patch at a time and unpadded, whatever is restarted and batched together."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from patchkit.data import Pair
from patchkit.errors import InputError
from patchkit.methods import activation_patching
from patchkit.methods._node_options import NodeOptions
from patchkit.methods.activation_patching import patch_nodes, patch_sets
from patchkit.model import KINDS
from tests.comparisons import agree, pair
from tests.node_oracle import (
    DENSE_BY_LANE,
    LONG,
    MIDDLE,
    SHORT,
    check_scores,
    check_sets,
    check_sweep,
    kinds_of,
)

#: Those that the promise names; every other one is swept once.
NAMED = (
    *("llama-gqa", "gpt2", "neox-parallel"),
    *("gemma2-post-norms-softcap", "qwen2-biases", "qwen3-qk-norm"),
)
#: Of two lengths, so that one is padded.
PAIRS = [LONG, SHORT]


# Against the oracle.


@pytest.mark.parametrize("family", DENSE_BY_LANE)
def test_every_node_of_every_family_beside_padding(family: str) -> None:
    check_sweep(family, PAIRS, per_layer=None if family in NAMED else 3)


@pytest.mark.parametrize("family", NAMED)
@pytest.mark.parametrize(
    ("positions", "direction"), [("last", "denoise"), ("s,-1", "noise"), ("0,2,-2", "denoise")]
)
def test_nodes_of_every_kind_at_places_in_both_directions(
    family: str, positions: str, direction: str
) -> None:
    check_sweep(family, PAIRS, per_layer=1, positions=positions, direction=direction)


@pytest.mark.parametrize("family", NAMED)
def test_single_precision_and_single_positions(family: str) -> None:
    dtype = torch.float32
    check_sweep(family, [SHORT], dtype=dtype, per_layer=1)
    check_sweep(family, PAIRS, dtype=dtype, per_layer=2, direction="denoise")
    kinds = ("resid_pre", "q_proj", "k", "z", "neuron")
    check_sweep(family, [LONG, MIDDLE], dtype=dtype, per_layer=1, kinds=kinds, positions="each")


@pytest.mark.parametrize("family", ["mistral-window", "gemma3-two-thetas", "qwen2-window-above-layer-0"])
def test_keys_out_of_a_sliding_windows_sight_when_restarting_in_the_middle(family: str) -> None:
    check_sweep(family, PAIRS, per_layer=2, positions="-3,-1")


@pytest.mark.parametrize("group", [1, 7, 64])
def test_neurons_alone_and_in_groups(group: int) -> None:
    model, twin = pair("gpt2", torch.float64)
    scores = patch_nodes(model, PAIRS, NodeOptions(nodes=("neuron",), positions="last", group=group))
    check_scores(twin, PAIRS, scores, per_layer=8)
    assert scores.grid.shape("neuron") == (3, -(-128 // group))


def test_restarts_in_the_middle_of_a_batch_with_every_column_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small batches are run from a common column; here none is small."""
    from patchkit.methods import _set_rows

    monkeypatch.setattr(_set_rows, "SMALL_FORWARD", 0)
    for family in ("llama-gqa", "gpt2", "gemma2-post-norms-softcap"):
        check_sweep(family, PAIRS, per_layer=1, positions="0,2,-1")


# Sets.


SETS = (
    ("a0.h1", "a2.h3"),
    ("q.1.h2", "k.1.h0", "v.1.h1", "m1"),
    ("a1.h0", "a1.h3", "attn_out.2", "neuron"),
    ("resid_mid.0", "m0", "m2", "a2.h0"),
    ("resid_pre.2", "v_proj.0.h1", "k_proj.2.h0", "q_proj.1.h3"),
    ("m2",),
    ("resid_post.0", "resid_post.2", "a1.h1"),
    ("attn_out.1", "a1.h2", "q.2.h1"),
)


def sets_of(family: str) -> list[tuple[str, ...]]:
    model, _ = pair(family, torch.float64)
    neurons = tuple(f"m{layer}.n{neuron}" for layer in (0, 1) for neuron in (0, 3, 39))
    return [
        tuple(name for word in names for name in (neurons if word == "neuron" else (word,)))
        for names in SETS
        if not (model.dims.parallel and "resid_mid.0" in names)
    ] + [()]


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2", "neox-parallel", "gemma2-post-norms-softcap"])
def test_sets_over_layers_and_kinds_patched_together(family: str) -> None:
    """A KV head has the number of a query head that both families have."""
    heads = pair(family)[0].dims.n_kv_heads
    sets = [tuple(name.replace("k.1.h0", f"k.1.h{heads - 1}") for name in names) for names in sets_of(family)]
    check_sets(family, PAIRS, sets)
    check_sets(family, PAIRS, sets[:4], positions="last", direction="denoise")


def test_sets_of_different_places() -> None:
    sets = [
        ("a0.h1@0", "a0.h1@-1"),
        ("m1@-1", "a2.h3@s"),
        ("k.2.h1@s", "a2.h1@-1", "resid_mid.2@0"),
        ("resid_post.2@0", "q.2.h0@s"),
        ("a1.h2", "m1"),
    ]
    check_sets("llama-gqa", PAIRS, sets, positions="0,s,-1")


def test_sets_of_one_node_are_the_sweep() -> None:
    model, _ = pair("llama-gqa", torch.float64)
    options = NodeOptions(nodes=("q", "k", "v", "z", "mlp_out"), positions="s,-1")
    scores = patch_nodes(model, PAIRS, options)
    rows = [(number, node) for node in range(len(scores.grid)) for number in range(len(PAIRS))]
    nodes, numbers = [torch.tensor([node]) for _, node in rows], [number for number, _ in rows]
    found = patch_sets(model, PAIRS, nodes, numbers, options).effects
    agree(found.reshape(-1, len(PAIRS)).T, scores.effects, "sets of one node", 1e-12)


def test_sets_are_refused_that_are_not_of_the_grid() -> None:
    model, _ = pair("llama-gqa")
    options = NodeOptions(nodes=("mlp_out",))
    with pytest.raises(InputError, match="2 sets of nodes for 1 pair numbers"):
        patch_sets(model, PAIRS, [torch.tensor([0]), torch.tensor([1])], [0], options)
    with pytest.raises(InputError, match="node 3, outside the grid of 3 nodes"):
        patch_sets(model, PAIRS, [torch.tensor([0, 3])], [0], options)
    for number in (2, -1):
        with pytest.raises(InputError, match=f"pair number {number}: there are 2 pairs, numbered from 0"):
            patch_sets(model, PAIRS, [torch.tensor([0])], [number], options)


# Which nodes.


def test_only_the_nodes_that_are_asked_for_have_numbers() -> None:
    model, _ = pair("llama-gqa", torch.float64)
    whole = patch_nodes(model, PAIRS, NodeOptions(nodes=("q", "z", "mlp_out"), positions="0,-1"))
    some = patch_nodes(
        model,
        PAIRS,
        NodeOptions(nodes=("a1.h3", "q", "m0@-1", "m2"), positions="0,-1", layers=(0, 1)),
    )
    assert some.grid == whole.grid
    names = some.grid.names(some.computed.nonzero()[:, 0].tolist())
    assert set(names) == {
        *(f"q.{layer}.h{head}@{place}" for layer in (0, 1) for head in range(4) for place in ("0", "-1")),
        *("a1.h3@0", "a1.h3@-1", "m0@-1"),
    }
    agree(some.effects[:, some.computed], whole.effects[:, some.computed], "some of the nodes", 1e-12)
    assert some.effects[:, ~some.computed].isnan().all()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"nodes": ("heads",)}, "'heads' is neither a node kind"),
        ({"nodes": ("a3.h0",)}, "layer 3 is out of range, the model has layers 0 to 2"),
        ({"nodes": ("a0.h4",)}, "index 4 is out of range, layer 0 has 0 to 3"),
        ({"layers": (3,)}, "layer 3 is out of range"),
        ({"positions": "each"}, "'each' need pairs of one length"),
        ({"positions": "verb"}, "pair 'long' has no span 'verb'"),
        ({"metric": "loss"}, "unknown metric 'loss'"),
        ({"group": 2}, "group 2: .* needs the node kind 'neuron'"),
        ({"max_batch_tokens": 0}, "max_batch_tokens must be at least 1"),
    ],
)
def test_what_the_model_or_the_pairs_do_not_have(options: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        patch_nodes(pair("llama-gqa")[0], PAIRS, NodeOptions(**options))  # type: ignore[arg-type]


def test_options_that_mean_nothing() -> None:
    with pytest.raises(InputError, match="noise_scale must be above 0, found 0.0"):
        NodeOptions(noise_scale=0.0)
    with pytest.raises(InputError, match="in parallel, so there is no residual stream between them"):
        patch_nodes(pair("neox-parallel")[0], PAIRS, NodeOptions(nodes=("resid_mid",)))


# Metrics.


def prob_diff(logits: Tensor, _: Tensor, pair: Pair) -> Tensor:
    odds = logits.exp() / logits.exp().sum()
    return odds[pair.answer_id] - odds[pair.wrong_id]


def kl(logits: Tensor, base: Tensor, _: Pair) -> Tensor:
    p, q = base.exp() / base.exp().sum(), logits.exp() / logits.exp().sum()
    return (p * (p / q).log()).sum()


def target_logprob(logits: Tensor, _: Tensor, pair: Pair) -> Tensor:
    return (logits.exp()[pair.answer_id] / logits.exp().sum()).log()


@pytest.mark.parametrize("direction", ["noise", "denoise"])
@pytest.mark.parametrize(
    ("metric", "score"), [("prob-diff", prob_diff), ("kl", kl), ("target-logprob", target_logprob)]
)
def test_metrics(metric: str, score: object, direction: str) -> None:
    """The answer is the clean prompt's in both directions, and KL is from the base run."""
    kinds = ("resid_pre", "z", "mlp_out")
    scores = check_sweep("llama-gqa", PAIRS, kinds=kinds, metric=metric, score=score, direction=direction)  # type: ignore[arg-type]
    if metric == "kl":
        assert not scores.base_metric.any() and bool((scores.effects >= 0).all())


def users_metric(monkeypatch: pytest.MonkeyPatch, function: object) -> str:
    module = ModuleType("users_metrics")
    module.metric = function  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "users_metrics", module)
    return "users_metrics:metric"


def test_a_metric_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    name = users_metric(monkeypatch, lambda logits, answer: logits.gather(-1, answer[:, None])[:, 0] ** 2)
    check_sweep(
        *("llama-gqa", PAIRS),
        kinds=("z", "mlp_out"),
        metric=name,
        score=lambda logits, _, pair: logits[pair.answer_id] ** 2,
    )


@pytest.mark.parametrize("wrong", [lambda logits: logits.mean(), lambda logits: logits])
def test_a_metric_that_is_not_one_number_a_row(wrong: object, monkeypatch: pytest.MonkeyPatch) -> None:
    name = users_metric(monkeypatch, wrong)
    with pytest.raises(InputError, match="must return one float per row"):
        patch_nodes(pair("llama-gqa")[0], PAIRS, NodeOptions(metric=name))


# What must hold whatever the model.


@pytest.mark.parametrize("family", NAMED)
@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_the_whole_stream_before_layer_0_is_the_source_run(family: str, direction: str) -> None:
    model, _ = pair(family, torch.float64)
    scores = patch_nodes(model, PAIRS, NodeOptions(nodes=("resid_pre.0",), direction=direction))  # type: ignore[arg-type]
    agree(scores.effects[:, 0], scores.source_metric - scores.base_metric, family, 1e-10)


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2"])
def test_a_pair_of_one_prompt_has_no_effects_at_all(family: str) -> None:
    same = Pair(LONG.clean_ids, LONG.clean_ids, 4, 6, {}, "same")
    model, _ = pair(family)
    options = NodeOptions(nodes=tuple(kinds_of(model)), positions="0,-1")
    scores = patch_nodes(model, [same, SHORT], options)
    assert not scores.effects[0].any() and scores.effects[1].any()


def test_denoising_a_pair_is_noising_it_the_other_way_round() -> None:
    model, _ = pair("llama-gqa", torch.float64)
    turned = [Pair(p.corrupt_ids, p.clean_ids, p.answer_id, p.wrong_id, p.spans, p.id) for p in PAIRS]
    nodes = kinds_of(model)
    one = patch_nodes(model, PAIRS, NodeOptions(nodes=nodes, direction="denoise"))
    other = patch_nodes(model, turned, NodeOptions(nodes=nodes, direction="noise"))
    assert torch.equal(one.effects, other.effects) and torch.equal(one.base_metric, other.base_metric)


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2", "mistral-window"])
def test_nothing_changes_before_the_prompts_differ_nor_behind_the_last_token_read(family: str) -> None:
    model, _ = pair(family)
    scores = patch_nodes(model, [MIDDLE], NodeOptions(nodes=kinds_of(model), positions="each"))
    where = scores.grid.locate(torch.arange(len(scores.grid)))
    effects = scores.effects[0]
    assert not effects[where.place < 3].any(), "the prompts differ from token 3 on"
    # In the last layer only what attention reads moves to the last position.
    carried = torch.tensor(
        [kind in ("resid_pre", "k_proj", "v_proj", "k", "v") for kind in scores.grid.kinds]
    )
    late = (where.layer == 2) & (where.place < 6) & ~carried[where.kind]
    assert not effects[late].any()
    for kind in scores.grid.kinds:
        values = scores.grid.split(effects)[kind]
        # A head whose source value differs is seen; the MLP of the first layer at the changed token too.
        assert values[0, 3].any() and (kind not in ("resid_post", "mlp_out", "z") or values[2, 6].any()), kind


# A matrix product of other sizes rounds differently: in float32 the last digit or two of a logit.
@pytest.mark.parametrize(
    ("family", "dtype", "tolerance"),
    [
        ("llama-gqa", torch.float32, 1e-5),
        ("llama-gqa", torch.float64, 1e-12),
        ("gemma2-post-norms-softcap", torch.float64, 1e-12),
    ],
)
def test_numbers_do_not_depend_on_what_is_batched_together(
    family: str, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = pair(family, dtype)
    pairs = [*PAIRS, MIDDLE]

    def sweep(pairs: list[Pair], tokens: int = 16384) -> Tensor:
        options = NodeOptions(nodes=("k", "z", "resid_mid"), positions="2,-1", max_batch_tokens=tokens)
        return patch_nodes(model, pairs, options).effects

    together = sweep(pairs)
    for row, each in enumerate(pairs):
        agree(sweep([each])[0], together[row], f"pair {each.id} alone", tolerance)
    agree(sweep(pairs[::-1]), together.flip(0), "pairs in another order", tolerance)
    for tokens in (1, 50):
        agree(sweep(pairs, tokens), together, f"at most {tokens} tokens", tolerance)
    monkeypatch.setattr(activation_patching, "NODES_AN_ITEM", 5)
    agree(sweep(pairs), together, "five nodes an item", tolerance)


def test_scores_say_what_they_are_of_and_what_they_cost() -> None:
    model, _ = pair("llama-gqa")
    options = NodeOptions(nodes=("resid_pre", "mlp_out"), direction="denoise")
    scores = patch_nodes(model, [LONG], options)
    assert (scores.method, scores.pair_ids, scores.convention) == ("exact", ("long",), options.convention)
    assert scores.convention.direction == "denoise" and scores.layer_backwards == 0
    assert torch.equal(scores.magnitudes, scores.effects.abs())
    # Two whole forwards for the runs of the pair. Patches at `all` restart at the first token of their layer: three
    # layers, two, one. The MLP of the last layer is patched at the last token alone.
    assert scores.cost == pytest.approx(2 + (3 + 2 + 1) / 3 + (3 + 2) / 3 + 1 / 3 / 7, rel=1e-6)


def test_kinds_are_all_tested() -> None:
    assert set(kinds_of(pair("llama-gqa")[0])) == set(KINDS)
