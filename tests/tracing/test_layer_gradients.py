"""Gradients layer by layer: each drop is a backward with one block held fixed, and backwards are shared and counted."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from patchkit.data import Batch
from patchkit.errors import InputError
from patchkit.model import Site
from patchkit.tracing import gradients as gradients_module
from patchkit.tracing.gradients import LayerGradients, reduce_gradients
from tests import oracles
from tests.attribution_oracle import STREAM, gradients_at
from tests.comparisons import agree, pair
from tests.node_oracle import LONG, SHORT, kinds_of

PAIRS = (LONG, SHORT)
FAMILIES = ("llama-gqa", "gpt2", "neox-parallel", "gemma2-post-norms-softcap")


@dataclass
class Keep:
    """Keeps everything that a reduction is given; `order` notes the layers."""

    order: list[int] = field(default_factory=list)
    attention: dict[int, object] = field(default_factory=dict)

    def __call__(self, layer: LayerGradients) -> dict[str, Tensor]:
        self.order.append(layer.layer)
        self.attention[layer.layer] = layer.attention
        kept = {f"value {kind}": value.clone() for kind, value in layer.values.items()}
        for kind, parts in layer.gradients.items():
            for number, (weight, gradient) in enumerate(parts):
                kept[f"{kind} {number} {weight}"] = gradient.clone()
        return kept


def batch_of(family: str) -> Batch:
    return Batch.from_ids([each.clean_ids for each in PAIRS], pair(family)[0].pad_id)


def metric(logits: Tensor) -> Tensor:
    answers = torch.tensor([[each.answer_id, each.wrong_id] for each in PAIRS])
    picked = logits.gather(1, answers)
    return picked[:, 0] - picked[:, 1]


def by_drop(kept: dict[str, Tensor], kind: str) -> list[tuple[int, Tensor]]:
    parts = [name.split() for name in kept if name.split()[0] == kind]
    return [(int(weight), kept[f"{kind} {number} {weight}"]) for _, number, weight in parts]


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradients_under_drops_are_those_of_detached_forwards(
    family: str, batched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which drop is which is not said, so their weighted sums and sums of squares are compared."""
    if not batched:
        monkeypatch.setattr(gradients_module, "BATCHED_BACKWARD", 1)
    model, twin = pair(family, torch.float64)
    kinds = kinds_of(model)
    sites = [Site(kind, layer) for kind in kinds for layer in range(3)]
    found = reduce_gradients(model, batch_of(family), sites, metric, Keep(), drop_layers=True)
    assert found.layer_backwards == 3
    for row, each in enumerate(PAIRS):
        drops = [gradients_at(twin, each, "noise", dropped) for dropped in range(3)]
        real = slice(len(LONG.clean_ids) - len(each.clean_ids), None)
        for site in sites:
            parts = by_drop(found.layers[site.layer], site.kind)
            assert sum(weight for weight, _ in parts) == (3 if site.kind in STREAM else 2), site
            for power in (1, 2):
                mine = sum(weight * gradient[row, real] ** power for weight, gradient in parts)
                theirs = sum(drop[site.kind, site.layer] ** power for drop in drops)
                agree(torch.as_tensor(mine), torch.as_tensor(theirs), f"{site}, power {power}", 1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_drops_there_is_one_gradient_of_weight_one(family: str) -> None:
    model, twin = pair(family, torch.float64)
    sites = [Site("mlp_out", 0), Site("k", 2), Site("resid_pre", 1), Site("z", 1)]
    keep = Keep()
    found = reduce_gradients(model, batch_of(family), sites, metric, keep, attention=[1])
    assert found.layer_backwards == 0 and set(found.layers) == {0, 1, 2}
    assert keep.attention[0] is None and keep.attention[1] is not None
    for row, each in enumerate(PAIRS):
        expected = gradients_at(twin, each, "noise")
        values, logits = oracles.read(twin, each.clean_ids)
        agree(found.metric[row], logits[each.answer_id] - logits[each.wrong_id], "metric", 1e-12)
        real = slice(len(LONG.clean_ids) - len(each.clean_ids), None)
        for site in sites:
            ((weight, gradient),) = by_drop(found.layers[site.layer], site.kind)
            assert weight == 1
            agree(gradient[row, real], expected[site.kind, site.layer], str(site), 1e-12)
            value = found.layers[site.layer][f"value {site.kind}"]
            agree(value[row, real], values[site.kind, site.layer], f"value of {site}", 1e-12)


def test_only_layers_above_the_lowest_site_are_gone_through() -> None:
    model, _ = pair("llama-gqa")
    for sites, backwards in (
        ([Site("z", 2)], 0),
        ([Site("z", 1), Site("z", 2)], 1),
        ([Site("resid_pre", 1)], 1),
        ([Site("z", 0)], 3),
        ([Site("resid_post", 0)], 1),
        ([Site("resid_post", 2)], 0),
    ):
        found = reduce_gradients(model, batch_of("llama-gqa"), sites, metric, Keep(), drop_layers=True)
        assert found.layer_backwards == backwards, sites
        assert set(found.layers) == {site.layer for site in sites}


def test_the_attention_that_is_handed_over_is_the_layers_own() -> None:
    """Windows and caps of a Gemma, whose layers take turns; padding sees itself alone."""
    model, twin = pair("gemma2-post-norms-softcap", torch.float64)
    keep, batch = Keep(), batch_of("gemma2-post-norms-softcap")
    reduce_gradients(
        model, batch, [Site("q", layer) for layer in range(3)], metric, keep, attention=[0, 1, 2]
    )
    for layer in range(3):
        given = keep.attention[layer]
        assert isinstance(given, gradients_module.Attention)
        assert (given.softcap, given.scaling) == (2.0, model.config.query_pre_attn_scalar**-0.5)
        window = oracles.window_of(twin.config, layer) or 99
        for row, each in enumerate(PAIRS):
            first = 7 - len(each.clean_ids)
            for query in range(7):
                expected = [
                    key == query or (first <= key < query and query - key < window) for key in range(7)
                ]
                assert given.allowed[row, query].tolist() == expected, (layer, row, query)
    assert {oracles.window_of(twin.config, layer) for layer in range(3)} == {4, None}


def test_what_is_refused() -> None:
    model, _ = pair("llama-gqa")
    batch = batch_of("llama-gqa")
    with pytest.raises(InputError, match="layer 3 is out of range"):
        reduce_gradients(model, batch, [Site("z", 3)], metric, Keep())
    with pytest.raises(InputError, match="does not depend on the logits in a way that has a gradient"):
        reduce_gradients(model, batch, [Site("z", 1)], lambda logits: logits.argmax(-1).float(), Keep())


def test_no_gradient_is_left_behind() -> None:
    model, _ = pair("gpt2")
    reduce_gradients(model, batch_of("gpt2"), [Site("z", 0)], metric, Keep(), drop_layers=True)
    assert all(each.grad is None and each.requires_grad for each in model.hf.parameters())
