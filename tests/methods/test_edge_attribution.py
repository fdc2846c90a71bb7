"""Edge attribution against clones of the residual stream: every family, every method, padded beside unpadded."""

from __future__ import annotations

import pytest
import torch

from patchkit.data import Pair
from patchkit.errors import InputError
from patchkit.methods._edge_options import EdgeOptions
from patchkit.methods.activation_patching import NodeOptions, patch_nodes
from patchkit.methods.edge_attribution import attribute_edges
from tests.comparisons import agree, pair
from tests.edge_gradient_oracle import check_by_query, check_edges
from tests.node_oracle import DENSE, LONG, MIDDLE, SHORT

PAIRS = [LONG, SHORT]
every_family = pytest.mark.parametrize("family", DENSE)
#: Rotary with GQA; norms behind the heads and soft-capped scores; LayerNorm with biases; parallel blocks.
some_families = pytest.mark.parametrize(
    "family", ["llama-gqa", "gemma2-post-norms-softcap", "gpt2", "neox-parallel"]
)


@every_family
def test_eap_equals_clones_of_the_stream(family: str) -> None:
    check_edges(family, PAIRS, "eap")


@every_family
def test_eap_in_float32(family: str) -> None:
    check_edges(family, PAIRS, "eap", dtype=torch.float32)


@some_families
@pytest.mark.parametrize("rule", ["repo", "midpoint"])
def test_integrated_inputs_equal_clones_of_the_stream(family: str, rule: str) -> None:
    check_edges(family, PAIRS, "eap-ig-inputs", rule=rule, steps=3)


@some_families
def test_both_ends_equal_clones_of_the_stream(family: str) -> None:
    check_edges(family, PAIRS, "clean-corrupted")


@some_families
def test_integrated_activations_equal_clones_of_the_stream(family: str) -> None:
    check_edges(family, [SHORT, MIDDLE], "eap-ig-activations")


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2"])
def test_the_repositorys_integral_over_activations(family: str) -> None:
    check_edges(family, [SHORT], "eap-ig-activations", rule="repo")


@pytest.mark.parametrize("family", ["llama-gqa", "gemma2-post-norms-softcap"])
@pytest.mark.parametrize("method", ["eap", "eap-ig-inputs"])
def test_keys_and_values_by_query_head(family: str, method: str) -> None:
    check_by_query(family, PAIRS, method)


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2", "neox-parallel"])
@pytest.mark.parametrize("qk_fix", [False, True])
def test_dropped_blocks(family: str, qk_fix: bool) -> None:
    check_edges(family, PAIRS, "eap", grad_drop=True, qk_fix=qk_fix)


@pytest.mark.parametrize("family", ["mistral-window", "qwen3-qk-norm", "gemma2-post-norms-softcap"])
def test_the_qk_fix(family: str) -> None:
    check_edges(family, PAIRS, "eap", qk_fix=True)


@pytest.mark.parametrize(
    ("method", "positions"),
    [("eap", "last"), ("eap", "s,-1"), ("eap", "each"), ("eap-ig-activations", "s,-1")],
)
def test_positions(method: str, positions: str) -> None:
    pairs = [LONG, MIDDLE] if positions == "each" else PAIRS
    check_edges("llama-gqa", pairs if method == "eap" else pairs[:1], method, positions=positions)


def test_the_qk_fix_at_positions() -> None:
    check_edges("llama-gqa", PAIRS, "eap", qk_fix=True, positions="s,-1")


@pytest.mark.parametrize("method", ["eap", "eap-ig-inputs"])
def test_denoising(method: str) -> None:
    check_edges("llama-gqa", PAIRS, method, direction="denoise")


def test_positions_add_up() -> None:
    """Sums over tokens: what a place has is the sum of what its tokens have."""
    model = pair("gpt2", torch.float64)[0]
    each = attribute_edges(model, [LONG, MIDDLE], EdgeOptions(positions="each"), "eap")
    every = attribute_edges(model, [LONG, MIDDLE], EdgeOptions(), "eap")
    agree(each.mean.nan_to_num(0.0).sum(0), every.mean.nan_to_num(0.0), "sum over positions", 1e-6)


@pytest.mark.parametrize("family", ["llama-gqa", "gemma3-two-thetas", "gpt2", "neox-parallel"])
def test_a_senders_own_path_adds_up_to_its_effect(family: str) -> None:
    """As the steps grow, the scores of a sender's edges add up to what replacing the sender does."""
    model = pair(family, torch.float64)[0]
    nodes = ("resid_pre.0", "a0.h2", "a1.h0", "a2.h1", "m0", "m1", "m2")
    gaps = []
    for steps in (2, 16):
        scores = attribute_edges(model, [LONG], EdgeOptions(), "eap-ig-activations", steps=steps)
        found = []
        for name in nodes:
            exact = patch_nodes(model, [LONG], NodeOptions(nodes=(name,))).effects.nansum()
            sender = 0 if name == "resid_pre.0" else scores.graph.find_sender(name)
            found.append(float((scores.mean[sender].nansum() - exact).abs()))
        gaps.append(max(found))
    assert gaps[1] < 2e-2 and gaps[1] < gaps[0] / 8, gaps


def test_results_do_not_depend_on_the_batch() -> None:
    model = pair("qwen2-biases")[0]
    whole = attribute_edges(model, [LONG, SHORT, MIDDLE], EdgeOptions(), "eap-ig-inputs")
    single = attribute_edges(model, [MIDDLE, SHORT, LONG], EdgeOptions(max_batch_tokens=1), "eap-ig-inputs")
    for name in ("mean", "mean_abs"):
        agree(getattr(whole, name).nan_to_num(0.0), getattr(single, name).nan_to_num(0.0), name, 2e-6)


def test_blocks_of_senders_and_pairs_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from patchkit.methods import _edge_products

    model = pair("gpt2", torch.float64)[0]
    whole = attribute_edges(model, [LONG, SHORT, MIDDLE], EdgeOptions(), "eap")
    drops = attribute_edges(model, [LONG, SHORT, MIDDLE], EdgeOptions(), "eap", grad_drop=True)
    # A budget of one layer's receivers over one pair, and of less than one layer's senders.
    for pairs, layers in ((1, 2), (2, 1), (1, 1)):
        cut = _edge_products.Blocks(pairs, layers)
        monkeypatch.setattr(_edge_products.Blocks, "of", classmethod(lambda *_, cut=cut: cut))
        for before, options in ((whole, {}), (drops, {"grad_drop": True})):
            found = attribute_edges(model, [LONG, SHORT, MIDDLE], EdgeOptions(), "eap", **options)
            agree(found.mean.nan_to_num(0.0), before.mean.nan_to_num(0.0), f"blocks {cut}", 1e-7)


def test_routes_are_shares() -> None:
    """Importances into a receiver are a share of 1 a token, equal for all inputs of a layer's attention."""
    model = pair("llama-gqa")[0]
    scores = attribute_edges(model, PAIRS, EdgeOptions(), "ifr")
    total = scores.mean.nansum(0)
    agree(total, torch.ones_like(total), "importances into each receiver")
    graph = scores.graph
    assert scores.convention.metric == "none" and bool((scores.importance.nan_to_num(0.0) >= 0).all())
    first = scores.mean[:3, graph.attention_receivers(2)]
    agree(first, first[:, :1].expand_as(first), "queries, keys and values of a layer")


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("eap", {"options": EdgeOptions(metric="kl")}, "every estimate would be 0"),
        ("eap-ig-inputs", {"options": EdgeOptions(ablation="zero")}, "ablation resample; found 'zero'"),
        ("clean-corrupted", {"options": EdgeOptions(ablation="mean")}, "ablation resample; found 'mean'"),
        ("ifr", {"options": EdgeOptions(ablation="zero")}, "ifr replaces nothing"),
        ("eap-ig-inputs", {"steps": 0}, "0 steps: expected at least 1"),
        ("eap", {"rule": "repo"}, "expected none, since this method has no integral"),
        ("eap-ig-inputs", {"rule": "left"}, "expected one of: repo, midpoint"),
        ("eap-ig-inputs", {"qk_fix": True}, "are for eap; found eap-ig-inputs"),
        ("eap", {"reference": [LONG]}, "a reference set is for the ablations mean"),
        ("eap", {"options": EdgeOptions(positions="each")}, "positions 'each' need pairs of one length"),
        (
            "eap",
            {"options": EdgeOptions(ablation="mean-positional")},
            "must all have one length; found lengths 5",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(method: str, options: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        attribute_edges(pair("gpt2")[0], PAIRS, method=method, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("ablation", ["zero", "mean", "mean-positional"])
def test_other_ablations(ablation: str) -> None:
    """EAP is linear in what is put in: scores of an ablation are those of its difference, which is checked by hand."""
    from patchkit.data import Batch
    from patchkit.tracing.senders import capture_senders

    model = pair("gpt2", torch.float64)[0]
    pairs = [LONG, MIDDLE]
    found = attribute_edges(model, pairs, EdgeOptions(ablation=ablation), "eap", keep_pairs=True)  # type: ignore[arg-type]
    plain = attribute_edges(model, pairs, EdgeOptions(), "eap", keep_pairs=True)
    assert found.per_pair is not None and plain.per_pair is not None
    own, _ = capture_senders(model, Batch.from_ids([each.clean_ids for each in pairs]))
    other, _ = capture_senders(model, Batch.from_ids([each.corrupt_ids for each in pairs]))
    logits = found.graph.logits
    gradient = _gradient_at_the_end(pairs)
    for layer in range(3):
        put_in = {
            "zero": torch.zeros_like(other.mlps[layer]),
            "mean": other.mlps[layer].mean((0, 1), keepdim=True).expand_as(other.mlps[layer]),
            "mean-positional": other.mlps[layer].mean(0, keepdim=True).expand_as(other.mlps[layer]),
        }[ablation]
        expected = ((put_in - own.mlps[layer])[:, -1] * gradient).sum(-1)
        agree(found.per_pair[:, found.graph.mlp_sender(layer), logits], expected, f"m{layer}->logits", 1e-11)


def _gradient_at_the_end(pairs: list[Pair]) -> torch.Tensor:
    from tests.edge_gradient_oracle import diff, gradients, split_run

    twin = pair("gpt2", torch.float64)[1]
    runs = [(each, split_run(twin, each.clean_ids)) for each in pairs]
    return torch.stack([gradients(run, diff(run.logits, each))["logits"][-1] for each, run in runs])
