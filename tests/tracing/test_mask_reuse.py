"""Blending: against the hook oracle, and with a reused prefix against the whole sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from patchkit.data.batch import Batch, positions
from patchkit.errors import InputError
from patchkit.model import KINDS, Site
from patchkit.tracing import Blend, Prefix, blended_logits, capture, compute_prefix
from tests.blending import (
    OTHERS,
    agree_on_gradients,
    alternates,
    blends,
    by_oracle,
    check_blends,
    masks,
    sites_of_kinds,
    with_gradients,
)
from tests.comparisons import PROMPTS, agree, kinds_of, pair
from tests.families import FAMILIES, WITHOUT_NEURONS

#: The kinds that masks are made of, and each group of kinds that is reached in one way.
GROUPS = (
    ("z", "mlp_out"),
    ("neuron",),
    ("q", "k", "v"),
    ("q_proj", "k_proj", "v_proj"),
    ("resid_mid", "attn_out"),
)
every_family = pytest.mark.parametrize("family", FAMILIES)


@every_family
def test_keeping_everything_is_the_clean_run(family: str) -> None:
    model, _ = pair(family)
    batch = Batch.from_ids(PROMPTS, pad_id=model.pad_id)
    sites = sites_of_kinds(model, kinds_of(family))
    keep = {site: torch.ones(KINDS[site.kind].count(model.dims)) for site in sites}
    clean = capture(model, batch, []).logits
    last = positions(batch, -1)
    for run in (batch, compute_prefix(model, batch)):
        agree(blended_logits(model, run, blends(keep, alternates(model, sites)), last), clean, "keep = 1")
        agree(blended_logits(model, run, [], last), clean, "no masks")


@every_family
def test_keeping_nothing_at_the_last_token_is_the_alternate_run(family: str) -> None:
    """With every kind replaced the last residual stream is the alternate's, and so are the logits."""
    model, _ = pair(family)
    batch = Batch.from_ids(PROMPTS, pad_id=model.pad_id)
    sites = sites_of_kinds(model, kinds_of(family))
    keep = {site: torch.zeros(KINDS[site.kind].count(model.dims)) for site in sites}
    expected = capture(model, Batch.from_ids(OTHERS, pad_id=model.pad_id), []).logits
    for run in (batch, compute_prefix(model, batch)):
        found = blended_logits(model, run, blends(keep, alternates(model, sites)), positions(batch, -1))
        agree(found, expected, "keep = 0")


@every_family
@pytest.mark.parametrize("kinds", GROUPS, ids="+".join)
def test_blends_equal_the_oracle_with_and_without_reuse(family: str, kinds: tuple[str, ...]) -> None:
    """At the last token, and at another position in each row; from the shortest and the longest prefix that can be."""
    if kinds == ("neuron",) and family in WITHOUT_NEURONS:
        pytest.skip("a family without neurons")
    check_blends(family, kinds, places=(-1, -1, -1), starts=(0, 9))
    check_blends(family, kinds, places=(-1, -3, -2), starts=(7,))


@every_family
def test_prompts_shorter_than_the_window_and_one_of_a_single_token(family: str) -> None:
    """Rows whose whole prefix is padding too."""
    model, _ = pair(family)
    prompts = [(5, 9, 30), (7,), (11, 3)]
    batch = Batch.from_ids(prompts, pad_id=model.pad_id)
    sites = sites_of_kinds(model, ["z", "mlp_out"])
    keep, alternate = masks(model, sites), alternates(model, sites)
    columns = positions(batch, -1)
    logits, gradients = with_gradients(model, batch, keep, alternate, columns)
    for start in (0, 1, 2):
        found, mine = with_gradients(model, compute_prefix(model, batch, start), keep, alternate, columns)
        agree(found, logits, f"prefix of {start}")
        agree_on_gradients(mine, gradients, keep, f"prefix of {start}")
    for row, ids in enumerate(prompts):
        alone = Batch.from_ids([ids])
        single = blended_logits(
            model,
            alone,
            blends(keep, {site: value[row : row + 1] for site, value in alternate.items()}),
            positions(alone, -1),
        )
        agree(single[0].detach(), logits[row], f"row {row} alone")


@pytest.mark.parametrize("family", ["llama-gqa", "neox-parallel"])
def test_a_mask_a_row_is_that_rows_own(family: str) -> None:
    model, _ = pair(family)
    batch = Batch.from_ids(PROMPTS, pad_id=model.pad_id)
    sites = sites_of_kinds(model, ["k", "z", "neuron", "mlp_out"])
    keep, alternate = masks(model, sites, rows=3), alternates(model, sites)
    expected, _ = by_oracle(family, keep, alternate, (-1, -1, -1))
    for run in (batch, compute_prefix(model, batch)):
        found = blended_logits(model, run, blends(keep, alternate), positions(batch, -1))
        agree(found.detach(), expected, "a mask a row")
        # A row's logits do not depend on the masks of other rows.
        (gradient,) = torch.autograd.grad(found[1].sum(), [keep[Site("z", 1)]])
        assert gradient[1].abs().max() > 0 and not gradient[[0, 2]].any()


@pytest.mark.parametrize("family", ["llama-gqa", "mistral-window", "gemma2-post-norms-softcap", "gpt2"])
def test_a_run_leaves_the_prefix_as_it_was(family: str) -> None:
    model, _ = pair(family)
    batch = Batch.from_ids(PROMPTS, pad_id=model.pad_id)
    sites = sites_of_kinds(model, kinds_of(family))
    keep, alternate = masks(model, sites), alternates(model, sites)
    prefix = compute_prefix(model, batch, 6)
    layers: list[Any] = prefix.cache.layers
    before = [(layer.keys.clone(), layer.values.clone(), layer.get_seq_length()) for layer in layers]
    first = blended_logits(model, prefix, blends(keep, alternate), positions(batch, -1))
    second = blended_logits(model, prefix, blends(keep, alternate), positions(batch, -1))
    assert torch.equal(first, second)
    assert len(layers) == model.dims.n_layers
    for layer, (keys, values, length) in zip(layers, before, strict=True):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
        assert layer.get_seq_length() == length == 6
        assert not layer.keys.requires_grad


def test_the_alternates_of_rows_are_not_mixed_up() -> None:
    """Blending whole residual streams of the last layer gives each row its own alternate's logits."""
    model, _ = pair("llama-gqa")
    batch = Batch.from_ids(PROMPTS, pad_id=model.pad_id)
    site = Site("resid_post", model.dims.n_layers - 1)
    keep = {site: torch.zeros(1)}
    found = blended_logits(model, batch, blends(keep, alternates(model, [site])), positions(batch, -1))
    agree(found, capture(model, Batch.from_ids(OTHERS), []).logits, "alternates")


def test_what_does_not_fit_is_refused_by_name() -> None:
    model, _ = pair("llama-gqa")
    batch = Batch.from_ids(PROMPTS, pad_id=model.pad_id)
    site = Site("z", 1)
    good = Blend(site, torch.ones(4), torch.zeros(3, 4, 8))
    last = positions(batch, -1)

    def refused(
        message: str, blend: Blend | None = None, columns: Tensor = last, run: Batch | Prefix = batch
    ) -> None:
        with pytest.raises(InputError, match=message):
            blended_logits(model, run, [blend or good], columns)

    refused(
        r"mask of z.1: shape \(2,\), expected \(4,\) or \(3, 4\)", Blend(site, torch.ones(2), good.alternate)
    )
    refused(r"shape \(1, 4\)", Blend(site, torch.ones(1, 4), good.alternate))
    refused(r"alternate .* \(1, 4, 8\), expected \(3, 4, 8\)", Blend(site, good.keep, torch.zeros(1, 4, 8)))
    refused("z.7: layer 7 is out of range", Blend(Site("z", 7), good.keep, good.alternate))
    refused(r"row 1 has its tokens at columns 6 to 9, found 5", columns=torch.tensor([9, 5, 9]))
    refused("found 10", columns=torch.tensor([9, 9, 10]))
    refused("found -1", columns=torch.tensor([-1, 9, 9]))
    refused(
        "lies in the prefix, which ends at column 8",
        columns=torch.tensor([9, 7, 9]),
        run=compute_prefix(model, batch, 8),
    )
    with pytest.raises(InputError, match="two masks of one site: z.1"):
        blended_logits(model, batch, [good, good], last)
    with pytest.raises(InputError, match="prefix of 10 columns: expected 0 to 9"):
        compute_prefix(model, batch, 10)
    with pytest.raises(InputError, match="run attention and MLP in parallel"):
        parallel, _ = pair("neox-parallel")
        blended_logits(
            parallel, batch, [Blend(Site("resid_mid", 0), torch.ones(1), torch.zeros(3, 32))], last
        )


def test_masks_of_a_bfloat16_model_have_float32_gradients() -> None:
    """Close to those of the same model in float32; a mask of ones leaves the run as it is to the last bit."""
    model, _ = pair("llama-gqa", torch.bfloat16)
    exact, _ = pair("llama-gqa")
    batch = Batch.from_ids(PROMPTS, pad_id=model.pad_id)
    sites = sites_of_kinds(model, ["z", "mlp_out"])
    keep, alternate, columns = masks(model, sites), alternates(exact, sites), positions(batch, -1)
    _, gradients = with_gradients(model, compute_prefix(model, batch), keep, alternate, columns)
    _, expected = with_gradients(exact, batch, keep, alternate, columns)
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    assert torch.nn.functional.cosine_similarity(torch.cat(gradients), torch.cat(expected), dim=0) > 0.99
    ones = {site: torch.ones_like(value) for site, value in keep.items()}
    found = blended_logits(model, batch, blends(ones, alternate), columns)
    assert torch.equal(found, capture(model, batch, []).logits)
