"""The comparisons of the tracing tests are able to fail: mistakes that give plausible, wrong numbers are caught.

Each test plants one mistake and expects the very functions that the family matrix and the tests of masks run to refuse
it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from nnsight.intervention.interleaver import OutOfOrderError
from torch import Tensor

from patchkit.data.batch import Batch, positions
from patchkit.errors import InputError
from patchkit.model import KINDS, PatchModel, Site, access
from patchkit.tracing import Patch, Prefix
from patchkit.tracing.validate import validate
from tests import comparisons
from tests.blending import check_blends
from tests.comparisons import check_attention, check_gradients, check_patches, check_reads, pair

#: Beside `make test`, in a lane of its own.
pytestmark = pytest.mark.slow

# `patchkit.tracing` also has functions of these names.
CAPTURE, PATCH, MASK = (import_module(f"patchkit.tracing.{name}") for name in ("capture", "patch", "mask"))
HEADS = ("q_proj", "q", "z")


@pytest.fixture(scope="module", autouse=True)
def opened() -> None:
    """Models are opened before anything is broken: validation on load would refuse it before the checks here see it."""
    for family in ("llama-gqa", "gpt2", "neox-parallel"):
        pair(family)


def test_without_a_mistake_the_checks_pass() -> None:
    for family in ("llama-gqa", "gpt2"):
        check_reads(*pair(family), ["z", "q", "mlp_out"])
        check_gradients(*pair(family), ["z", "mlp_out"])
        check_patches(*pair(family), ["z", "q"])
        check_attention(*pair(family))
        check_blends(family, ["z", "mlp_out"], (-1, -1, -1), (9,))


# Head order under GQA: head g * size + i of KV group g, numbered as i * groups + g.


def regrouped(value: Tensor, model: PatchModel) -> Tensor:
    return value.unflatten(-2, (model.dims.group, model.dims.n_kv_heads)).transpose(-3, -2).flatten(-3, -2)


def put_back(value: Tensor, model: PatchModel) -> Tensor:
    return value.unflatten(-2, (model.dims.n_kv_heads, model.dims.group)).transpose(-3, -2).flatten(-3, -2)


@pytest.fixture
def wrong_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    right = access.canonical

    def wrong(model: PatchModel, site: Site, raw: Tensor) -> Tensor:
        value = right(model, site, raw)
        return regrouped(value, model) if site.kind in HEADS else value

    monkeypatch.setattr(access, "canonical", wrong)
    monkeypatch.setattr(CAPTURE, "canonical", wrong)


@pytest.fixture
def wrong_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    right = access.write_site

    def wrong(model: PatchModel, site: Site, value: Tensor) -> None:
        right(model, site, put_back(value, model) if site.kind in HEADS else value)

    monkeypatch.setattr(PATCH, "write_site", wrong)
    monkeypatch.setattr(MASK, "write_site", wrong)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.usefixtures("wrong_reading")
def test_wrong_head_order_in_reading(kind: str) -> None:
    with pytest.raises(AssertionError, match=rf"{kind}\.\d, row"):
        check_reads(*pair("llama-gqa"), [kind])
    with pytest.raises(AssertionError, match=rf"gradient at {kind}"):
        check_gradients(*pair("llama-gqa"), [kind])


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.usefixtures("wrong_writing")
def test_wrong_head_order_in_writing(kind: str) -> None:
    with pytest.raises(AssertionError, match=f"patch of {kind}"):
        check_patches(*pair("llama-gqa"), [kind])


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.usefixtures("wrong_reading", "wrong_writing")
def test_wrong_head_order_in_both_is_no_excuse(kind: str) -> None:
    """What is read can be written back, and still each head has another's name."""
    with pytest.raises(AssertionError, match=f"patch of {kind}"):
        check_patches(*pair("llama-gqa"), [kind])
    with pytest.raises(AssertionError, match=f"gradient of the mask of {kind}|plain"):
        check_blends("llama-gqa", [kind], (-1, -1, -1), ())


def test_wrong_pairing_of_queries_and_keys_in_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    right = access.attention_arguments

    def wrong(model: PatchModel, layer: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
        queries, keys, keywords = right(model, layer)
        return regrouped(queries, model), keys, keywords

    monkeypatch.setattr(CAPTURE, "attention_arguments", wrong)
    with pytest.raises(AssertionError, match="attention of layer"):
        check_attention(*pair("llama-gqa"))


@pytest.mark.parametrize("order", [(1, 0, 2), (0, 2, 1)], ids=["q-k", "k-v"])
def test_parts_of_a_fused_projection_in_the_wrong_order(
    order: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without GQA all three have one shape."""
    right = access._unpack
    monkeypatch.setattr(access, "_unpack", lambda model, fused: [right(model, fused)[part] for part in order])
    for family in ("gpt2", "neox-parallel"):
        with pytest.raises(AssertionError, match=r"._proj\.\d, row"):
            check_reads(*pair(family), ["q_proj", "k_proj", "v_proj"])


@pytest.mark.parametrize("packing", ["per_head", "stacked"])
def test_a_fused_projection_unpacked_in_the_other_way(packing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation on load refuses it too, by the value heads that one written head reaches."""
    model, twin = pair("gpt2" if packing == "per_head" else "neox-parallel")
    monkeypatch.setattr(model, "arch", replace(model.arch, packing=packing))
    with pytest.raises(AssertionError, match=r"._proj\.\d, row"):
        check_reads(model, twin, ["q_proj", "k_proj", "v_proj"])
    with pytest.raises(InputError, match="is `packing` right"):
        validate(model)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "resid_post"])
def test_a_write_without_effect_is_refused_on_load(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = access.write_site

    def wrong(model: PatchModel, site: Site, value: Tensor) -> None:
        if site.kind != kind:
            right(model, site, value)

    monkeypatch.setattr(PATCH, "write_site", wrong)
    with pytest.raises(InputError, match=rf"writing (one head of )?'{kind}'"):
        validate(pair("llama-gqa")[0])


# Positions under padding.


@pytest.mark.parametrize("family", ["gpt2", "llama-gqa"])
def test_positions_that_ignore_padding(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary attention does not notice, as it sees differences only; the queries and keys themselves do."""
    counted = property(lambda batch: torch.arange(batch.width).expand(batch.rows, -1))
    monkeypatch.setattr(Batch, "position_ids", counted)
    with pytest.raises(AssertionError, match=r"logits of row 0|[qk]\.\d, row 0"):
        check_reads(*pair(family), ["q", "k"])


@pytest.mark.parametrize("family", ["gpt2", "llama-gqa"])
def test_positions_that_start_at_one_in_padded_rows(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Batch.position_ids.fget
    assert right is not None
    shifted = property(lambda batch: right(batch) + (batch.offset > 0)[:, None])
    monkeypatch.setattr(Batch, "position_ids", shifted)
    with pytest.raises(AssertionError, match=r"logits of row 0|[qk]\.\d, row 0"):
        check_reads(*pair(family), ["q", "k"])


def test_columns_off_by_one_in_padded_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(batch: Batch, index: Any) -> Tensor:
        return positions(batch, index) - (batch.offset > 0).long()

    monkeypatch.setattr(comparisons, "positions", wrong)
    with pytest.raises(AssertionError, match="row 0, one column"):
        check_reads(*pair("llama-gqa"), ["z"])
    with pytest.raises(AssertionError, match="attention of layer"):
        check_attention(*pair("llama-gqa"))


def test_patches_one_column_to_the_left_of_where_they_belong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Patch.apply

    def wrong(patch: Patch, activation: Tensor) -> Tensor:
        return right(
            patch if patch.columns is None else replace(patch, columns=patch.columns - 1), activation
        )

    monkeypatch.setattr(Patch, "apply", wrong)
    for kind in ("z", "k", "resid_pre", "neuron"):
        with pytest.raises(AssertionError, match=f"patch of {kind}"):
            check_patches(*pair("llama-gqa"), [kind])


@pytest.mark.parametrize("family", ["gpt2", "llama-gqa"])
def test_a_last_token_at_the_wrong_position_after_a_prefix(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Prefix.inputs

    def wrong(prefix: Prefix) -> dict[str, Any]:
        inputs = right(prefix)
        return inputs | {"position_ids": inputs["position_ids"] - 1}

    monkeypatch.setattr(Prefix, "inputs", wrong)
    with pytest.raises(AssertionError, match="prefix of 9"):
        check_blends(family, ["z", "mlp_out"], (-1, -1, -1), (9,))


def test_a_prefix_that_forgets_which_columns_are_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Prefix.inputs

    def wrong(prefix: Prefix) -> dict[str, Any]:
        return right(prefix) | {"attention_mask": torch.ones_like(prefix.batch.attention_mask)}

    monkeypatch.setattr(Prefix, "inputs", wrong)
    with pytest.raises(AssertionError, match="prefix of 9"):
        check_blends("llama-gqa", ["z", "mlp_out"], (-1, -1, -1), (9,))


# Sites that are not visited in execution order.


def heads_first(sites: Iterable[Site]) -> list[Site]:
    """All heads, then all MLPs: the order in which people write components down."""
    return sorted(set(sites), key=lambda site: (site.kind != "z", site))


@pytest.mark.parametrize(
    "order", [lambda sites: list(dict.fromkeys(sites)), heads_first], ids=["as given", "heads first"]
)
def test_unsorted_sites(order: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (CAPTURE, PATCH):
        monkeypatch.setattr(module, "in_order", order)
    kinds = ["mlp_out", "z"]
    for check in (check_reads, check_gradients):
        with pytest.raises((AssertionError, OutOfOrderError)):
            check(*pair("llama-gqa"), kinds)
    with pytest.raises((AssertionError, OutOfOrderError)):
        check_patches(*pair("llama-gqa"), kinds)


def test_unsorted_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MASK, "sorted", lambda blends, key: list(blends), raising=False)
    with pytest.raises((AssertionError, OutOfOrderError)):
        check_blends("llama-gqa", ["z", "mlp_out"], (-1, -1, -1), ())
