"""Every family x every node kind: reading, patching, gradients and attention agree with plain torch hooks."""

from __future__ import annotations

import pytest
import torch

from patchkit.data.batch import Batch, positions
from patchkit.model import KINDS, Site
from patchkit.tracing import Patch, attention_from, run_patched
from tests import oracles
from tests.comparisons import (
    LAYERS,
    PROMPTS,
    agree,
    check_attention,
    check_gradients,
    check_patches,
    check_reads,
    kinds_of,
    pair,
)
from tests.families import FAMILIES, WITHOUT_NEURONS, build

every_family = pytest.mark.parametrize("family", FAMILIES)
#: Rotary with GQA; q/k norms, post-norms and a window; a fused projection with biases.
exact_families = pytest.mark.parametrize("family", ["llama-gqa", "gemma3-two-thetas", "gpt2"])


def test_every_node_kind_is_in_the_matrix() -> None:
    """Parallel blocks have no stream between attention and MLP, and experts no neurons; all others have every kind."""
    absent = {"neox-parallel": {"resid_mid"}} | {family: {"neuron"} for family in WITHOUT_NEURONS}
    for family in FAMILIES:
        missing = absent.get(family, set())
        assert set(kinds_of(family)) == KINDS.keys() - missing


@every_family
def test_reads_equal_the_oracle(family: str) -> None:
    check_reads(*pair(family), kinds_of(family))


@every_family
def test_gradients_equal_the_oracle(family: str) -> None:
    check_gradients(*pair(family), kinds_of(family))


@every_family
def test_patches_equal_the_oracle(family: str) -> None:
    check_patches(*pair(family), kinds_of(family))


@exact_families
def test_float64_agrees_to_1e_10(family: str) -> None:
    model, twin = pair(family, torch.float64)
    check_reads(model, twin, kinds_of(family), tolerance=1e-10)
    check_gradients(model, twin, kinds_of(family), tolerance=1e-10)
    check_patches(model, twin, kinds_of(family), tolerance=1e-10)
    check_attention(model, twin, tolerance=1e-10)


@every_family
def test_a_batch_equals_its_prompts_one_by_one(family: str) -> None:
    """Through patchkit itself: the same patches, batched with padding and alone."""
    model, _ = pair(family)
    batch = Batch.from_ids(PROMPTS, pad_id=model.pad_id)
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(3, model.dims.d_head, generator=generator)
    site, heads = Site("z", 1), torch.tensor([0, 3, 2])
    together = run_patched(
        model, batch, [Patch(site, values, torch.arange(3), positions(batch, [0, 2, -3]), heads)], read=[site]
    )
    for row, (ids, position) in enumerate(zip(PROMPTS, [0, 2, -3], strict=True)):
        alone = Batch.from_ids([ids])
        single = run_patched(
            model,
            alone,
            [
                Patch(
                    site,
                    values[row : row + 1],
                    torch.tensor([0]),
                    positions(alone, position),
                    heads[row : row + 1],
                )
            ],
            read=[site],
        )
        agree(together.logits[row], single.logits[0], f"row {row}")
        agree(together.values[site][row, -len(ids) :], single.values[site][0], f"row {row}")


@every_family
def test_queries_and_keys_are_what_norms_and_rotary_make_of_the_projections(family: str) -> None:
    """The oracle itself is held to the papers: rotary and norms by hand, position by position."""
    _, twin = pair(family)
    for ids in PROMPTS:
        values, _ = oracles.read(twin, ids)
        for layer in LAYERS:
            for kind in ("q", "k"):
                by_hand = oracles.rotated_by_hand(twin, layer, kind, values[f"{kind}_proj", layer])
                agree(values[kind, layer], by_hand, f"{kind} of layer {layer}")


@every_family
@pytest.mark.parametrize("position", [-1, 1])
def test_attention_equals_the_oracle(family: str, position: int) -> None:
    check_attention(*pair(family), position)


@every_family
def test_attention_equals_the_models_own_probabilities(family: str) -> None:
    """`output_attentions` of the eager implementation, for the same padded batch."""
    model, _ = pair(family)
    eager = build(family)
    eager.set_attn_implementation("eager")
    batch = Batch.from_ids(PROMPTS, pad_id=model.pad_id)
    found = attention_from(model, batch, LAYERS, positions(batch, -1))
    with torch.no_grad():
        theirs = eager(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            output_attentions=True,
            use_cache=False,
        ).attentions
    for layer in LAYERS:
        agree(found[layer], theirs[layer][:, :, -1], f"attention of layer {layer}")


def test_windows_and_caps_of_the_cases_are_felt() -> None:
    """Otherwise the tests above could not tell a window or a cap that was forgotten."""
    long = PROMPTS[2]
    for family in (
        "mistral-window",
        "gemma2-post-norms-softcap",
        "gemma3-two-thetas",
        "qwen2-window-above-layer-0",
    ):
        _, twin = pair(family)
        attention = oracles.run(twin, long).attention
        windowed = [layer for layer in LAYERS if oracles.window_of(twin.config, layer)]
        assert windowed
        for layer in LAYERS:
            assert bool((attention[layer][:, -1, 0] == 0).all()) == (layer in windowed)
