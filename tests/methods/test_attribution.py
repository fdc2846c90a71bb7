"""AtP and its corrections equal plain autograd with detached forwards and triple loops, and hold what they promise."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from patchkit.data import Pair
from patchkit.errors import InputError
from patchkit.methods._node_options import NodeOptions
from patchkit.methods.activation_patching import patch_nodes
from patchkit.methods.attribution import METHODS, Method, attribute
from patchkit.model import PatchModel
from patchkit.zoo.load import load
from tests.attribution_oracle import check_estimates
from tests.comparisons import agree, pair
from tests.families import VOCAB
from tests.node_oracle import DENSE_BY_LANE, LONG, MIDDLE, SHORT, kinds_of

PAIRS = [LONG, SHORT]
#: AtP's finite correction, and the two that need gradients under drops, have a case each in every family.
PLACES = {"atp": "s,-1", "atp-qk": "0,2,-1", "atp-graddrop": "all", "atp-star": "all"}


# Against the oracle.


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", DENSE_BY_LANE)
def test_every_node_of_every_family_beside_padding(family: str, method: Method) -> None:
    check_estimates(family, PAIRS, method, positions=PLACES[method])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama-gqa", "gpt2", "gemma2-post-norms-softcap"])
def test_denoising_each_position_and_single_precision(family: str, method: Method) -> None:
    check_estimates(family, [LONG, MIDDLE], method, positions="each", kinds=("q", "k", "z", "resid_mid"))
    check_estimates(family, PAIRS, method, torch.float32, positions="s,-1", direction="denoise")


def test_neurons_alone() -> None:
    check_estimates("gpt2", PAIRS, "atp-graddrop", positions="last", kinds=("neuron",))
    model, _ = pair("gpt2", torch.float64)
    alone, grouped = (
        attribute(model, PAIRS, NodeOptions(nodes=("neuron",), group=group)).effects for group in (1, 8)
    )
    # AtP is linear: a group's estimate is the sum of its neurons'.
    agree(alone.unflatten(1, (-1, 8)).sum(2), grouped, "groups of neurons", 1e-12)


def five_layers() -> PatchModel:
    torch.manual_seed(0)
    module: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=20,
            num_hidden_layers=5,
            num_attention_heads=2,
            max_position_embeddings=32,
            pad_token_id=0,
        )
    )
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.mul_(10)
    return load(module.double().eval())


@pytest.mark.parametrize("method", ["atp-graddrop", "atp-star"])
def test_shared_backwards_are_counted_and_are_half_of_a_square(method: Method) -> None:
    three, _ = pair("llama-gqa", torch.float64)
    assert attribute(three, PAIRS, method=method).layer_backwards == 3 * 2 // 2
    five = five_layers()
    for nodes in (("resid_pre", "q", "mlp_out"), ("z",)):
        assert attribute(five, PAIRS, NodeOptions(nodes=nodes), method).layer_backwards == 5 * 4 // 2
    # Nodes of the upper layers only need what lies above them.
    some = NodeOptions(nodes=("z",), layers=(3, 4))
    assert attribute(five, PAIRS, some, method).layer_backwards == 2 * 1 // 2
    for plain in ("atp", "atp-qk"):
        assert attribute(five, PAIRS, method=plain).layer_backwards == 0


def test_five_layers_against_the_oracle() -> None:
    from tests import attribution_oracle

    model = five_layers()
    scores = attribute(
        model, [SHORT], NodeOptions(nodes=("q", "z", "mlp_out", "resid_mid", "resid_post")), "atp-star"
    )
    covered = [tuple(range(len(SHORT.clean_ids)))]
    signed, magnitude = attribution_oracle.estimates(
        model.hf, SHORT, covered, scores.grid, "noise", "atp-star"
    )  # type: ignore[arg-type]
    agree(scores.effects[0], signed, "estimates", 1e-12)
    agree(scores.magnitudes[0], magnitude, "magnitudes", 1e-12)


# What must hold whatever the oracle.


def linear_model() -> PatchModel:
    """Two layers; norms are the identity (as in `patchkit.zoo.handmade`) and the MLP of the last adds nothing."""
    torch.manual_seed(1)
    module: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=20,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=float(2**40),
            pad_token_id=0,
        )
    )
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "norm" in name:
                parameter.fill_(2.0**20)
            else:
                parameter.mul_(0.0 if "layers.1.mlp" in name else 20.0)
    return load(module.double().eval())


def test_estimates_are_exact_where_the_model_is_linear_in_the_node() -> None:
    """The last layer is linear in its values, its heads and everything behind them."""
    model = linear_model()
    nodes = ("v.1.h0", "v.1.h1", "v_proj.1.h0", "a1.h0", "a1.h3", "attn_out.1", "mlp_out", "resid_post.1")
    options = NodeOptions(nodes=nodes, positions="s,-1", layers=(1,))
    exact = patch_nodes(model, PAIRS, options)
    for method in METHODS:
        found = attribute(model, PAIRS, options, method)
        agree(found.effects.nan_to_num(), exact.effects.nan_to_num(), method, 1e-6)
    assert exact.effects.nan_to_num().abs().max() > 0.1
    # Not so below: the values of layer 0 move the pattern of layer 1.
    below = NodeOptions(nodes=("v",), layers=(0,))
    gap = attribute(model, PAIRS, below).effects - patch_nodes(model, PAIRS, below).effects
    assert gap.abs().nan_to_num().max() > 1e-2


def test_the_qk_fix_is_exact_where_only_the_softmax_is_not_linear() -> None:
    model = linear_model()
    for positions in ("s,-1", "all"):
        options = NodeOptions(nodes=("q", "k"), positions=positions, layers=(1,))
        exact = patch_nodes(model, PAIRS, options).effects.nan_to_num()
        agree(attribute(model, PAIRS, options, "atp-qk").effects.nan_to_num(), exact, positions, 1e-6)
        assert (attribute(model, PAIRS, options, "atp").effects.nan_to_num() - exact).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2", "neox-parallel"])
def test_a_node_with_a_direct_effect_only_has_its_first_order_score_under_drops(family: str) -> None:
    """L - 1 drops leave it alone and its own takes it away: L / (L - 1) brings back what AtP says."""
    model, _ = pair(family, torch.float64)
    options = NodeOptions(nodes=("z", "attn_out", "neuron", "mlp_out", "v"), layers=(2,))
    plain = attribute(model, PAIRS, options, "atp")
    dropped = attribute(model, PAIRS, options, "atp-graddrop")
    agree(dropped.effects.nan_to_num(), plain.effects.nan_to_num(), "signed", 1e-12)
    agree(dropped.magnitudes.nan_to_num(), plain.magnitudes.nan_to_num(), "magnitude", 1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_absolute_values_are_taken_inside_the_means(method: Method) -> None:
    model, _ = pair("gpt2")
    scores = attribute(model, [LONG, MIDDLE], NodeOptions(nodes=kinds_of(model)), method)
    assert bool((scores.magnitudes >= scores.effects.abs() - 1e-6).all())
    assert bool((scores.mean_abs() >= scores.mean().abs() - 1e-6).all())
    larger = scores.magnitudes > scores.effects.abs() + 1e-4
    # Signs differ between drops only where there are drops; between pairs for every method.
    assert bool(larger.any()) == (method in ("atp-graddrop", "atp-star"))
    assert bool((scores.mean_abs() > scores.mean().abs() + 1e-4).any())


def test_dot_products_are_added_up_over_a_place_before_the_absolute_value() -> None:
    model, _ = pair("llama-gqa", torch.float64)
    each = attribute(model, [LONG], NodeOptions(nodes=("z", "mlp_out"), positions="each"))
    whole = attribute(model, [LONG], NodeOptions(nodes=("z", "mlp_out")))
    for kind in ("z", "mlp_out"):
        by_token = each.grid.split(each.effects[0])[kind]
        agree(by_token.sum(1), whole.grid.split(whole.effects[0])[kind], kind, 1e-12)
        magnitude = whole.grid.split(whole.magnitudes[0])[kind]
        assert bool((magnitude < by_token.abs().sum(1) - 1e-3).any())


@pytest.mark.parametrize("method", METHODS)
def test_numbers_do_not_depend_on_what_is_batched_together(method: Method) -> None:
    model, _ = pair("llama-gqa", torch.float64)
    pairs = [LONG, SHORT, MIDDLE]

    def run(pairs: list[Pair], tokens: int = 16384) -> Tensor:
        nodes = NodeOptions(nodes=("q", "k", "mlp_out"), positions="s,-1", max_batch_tokens=tokens)
        scores = attribute(model, pairs, nodes, method)
        return torch.stack([scores.effects, scores.magnitudes], dim=1)

    together = run(pairs)
    for row, each in enumerate(pairs):
        agree(run([each])[0], together[row], f"pair {each.id} alone", 1e-12)
    agree(run(pairs, tokens=1), together, "one pair a batch", 1e-12)


def test_only_the_nodes_that_are_asked_for_have_numbers() -> None:
    model, _ = pair("llama-gqa")
    options = NodeOptions(nodes=("a1.h3", "k", "m2@-1"), positions="0,-1", layers=(1, 2))
    for method in METHODS:
        scores = attribute(model, PAIRS, options, method)
        names = scores.grid.names(scores.computed.nonzero()[:, 0].tolist())
        ks = {f"k.{layer}.h{head}@{place}" for layer in (1, 2) for head in (0, 1) for place in ("0", "-1")}
        assert set(names) == {*ks, "a1.h3@0", "a1.h3@-1", "m2@-1"}
        assert torch.equal(scores.magnitudes.isnan(), scores.effects.isnan())


def test_what_is_put_in_is_that_of_the_ablation() -> None:
    model, _ = pair("llama-gqa", torch.float64)
    same_length = [LONG, MIDDLE]
    zero = attribute(model, same_length, NodeOptions(ablation="zero"))
    resample = attribute(model, same_length, NodeOptions(ablation="resample"))
    assert zero.convention.ablation == "zero" and not torch.allclose(zero.effects, resample.effects)
    alone = attribute(model, [LONG], NodeOptions(ablation="mean"), reference=[LONG])
    agree(alone.effects[0], resample.effects[0], "the mean of one is that one", 1e-12)
    noise = attribute(model, same_length, NodeOptions(ablation="noise", noise_scale=1e-3, seed=3))
    again = attribute(model, same_length[::-1], NodeOptions(ablation="noise", noise_scale=1e-3, seed=3))
    agree(again.effects.flip(0), noise.effects, "noise", 1e-12)
    exact = patch_nodes(model, same_length, NodeOptions(ablation="noise", noise_scale=1e-3, seed=3))
    # Small enough to be linear.
    gap = (exact.effects - noise.effects).abs().max()
    assert 0 < gap < 0.02 * noise.effects.abs().max()


# What is refused.


def users_metric(monkeypatch: pytest.MonkeyPatch, function: object) -> str:
    module = ModuleType("users_metrics")
    module.metric = function  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "users_metrics", module)
    return "users_metrics:metric"


@pytest.mark.parametrize("method", METHODS)
def test_kl_is_refused_with_the_reason(method: Method) -> None:
    says = "metric 'kl' measures the distance from the base run.*that distance is least: every estimate would be 0"
    with pytest.raises(InputError, match=says):
        attribute(pair("gpt2")[0], PAIRS, NodeOptions(metric="kl"), method)


def test_a_users_distance_from_the_base_run_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    name = users_metric(monkeypatch, lambda logits, reference: ((logits - reference) ** 2).sum(-1))
    with pytest.raises(InputError, match=f"metric '{name}' measures the distance from the base run"):
        attribute(pair("gpt2")[0], PAIRS, NodeOptions(metric=name))
    # One that refers to the base run and is not flat there is taken.
    name = users_metric(monkeypatch, lambda logits, reference: (logits * reference.softmax(-1)).sum(-1))
    assert attribute(pair("gpt2")[0], PAIRS, NodeOptions(metric=name)).effects.any()


@pytest.mark.parametrize(
    ("metric", "says"),
    [
        (lambda logits: logits.mean(), "must return one float per row"),
        (lambda logits: logits[:, :2], "must return one float per row"),
        (lambda logits: logits.argmax(-1).float(), "no gradient|does not depend on the logits"),
    ],
)
def test_metrics_without_one_number_or_gradient_a_row(
    metric: object, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = users_metric(monkeypatch, metric)
    for method in ("atp", "atp-star"):
        with pytest.raises(InputError, match=says):
            attribute(pair("gpt2")[0], PAIRS, NodeOptions(metric=name), method)


def test_drops_of_a_single_layer_are_refused() -> None:
    module: Any = GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2, n_positions=32, pad_token_id=0)
    )
    model = load(module.eval())
    for method in ("atp-graddrop", "atp-star"):
        with pytest.raises(InputError, match="has one layer: GradDrop averages over the other layers' drops"):
            attribute(model, PAIRS, method=method)
    assert attribute(model, PAIRS, method="atp-qk").effects.any()


def test_other_refusals() -> None:
    model, _ = pair("gpt2")
    with pytest.raises(InputError, match="need pairs of one length"):
        attribute(model, PAIRS, NodeOptions(positions="each"))
    with pytest.raises(InputError, match="needs a reference set"):
        attribute(model, PAIRS, NodeOptions(ablation="mean"))


def test_parameters_are_left_as_they_were() -> None:
    """No gradient is kept at them, and they need one again where they did."""
    model, twin = pair("llama-gqa")
    before = {name: each.requires_grad for name, each in model.hf.named_parameters()}
    for method in METHODS:
        attribute(model, PAIRS, method=method)
    assert {name: each.requires_grad for name, each in model.hf.named_parameters()} == before
    assert all(each.grad is None for each in model.hf.parameters())
    for (name, mine), theirs in zip(model.hf.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
