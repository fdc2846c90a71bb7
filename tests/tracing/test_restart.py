"""A restart anywhere at or before a patch gives what the whole forward gives; one that would miss it is refused."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from patchkit.data import Batch
from patchkit.errors import InputError
from patchkit.model import KINDS, Site
from patchkit.tracing import capture
from patchkit.tracing.restart import BEHIND_ATTENTION, BaseRun, Swap, compute_base, run_swapped
from tests import oracles
from tests.comparisons import agree, pair

PROMPTS = ((5, 9, 30, 2, 17, 8, 21), (11, 3, 7, 4))
WIDTH, PADDING = 7, (0, 3)
FAMILIES = ("llama-gqa", "gpt2", "neox-parallel", "gemma2-post-norms-softcap", "mistral-window")


def base_of(family: str, behind: Sequence[int] = ()) -> BaseRun:
    model, _ = pair(family, torch.float64)
    return compute_base(model, Batch.from_ids(PROMPTS, model.pad_id), behind_attention=behind)


def swap_at(
    family: str, site: Site, rows: Sequence[int], columns: Sequence[int], nodes: Sequence[int]
) -> Swap:
    """Random values at some columns and nodes of every row."""
    model, _ = pair(family)
    kind = KINDS[site.kind]
    generator = torch.Generator().manual_seed(site.layer)
    values = torch.randn(
        (len(PROMPTS), WIDTH, *kind.shape(model.dims)), generator=generator, dtype=torch.float64
    )
    where = torch.zeros(len(rows), WIDTH, kind.count(model.dims), dtype=torch.bool)
    for column in columns:
        where[:, column, list(nodes)] = True
    return Swap(site, where, values)


def by_hooks(family: str, swaps: Sequence[Swap], row: int, of: int) -> Tensor:
    """Last-token logits of one unpadded prompt under the same swaps."""
    _, twin = pair(family, torch.float64)
    edits = {}
    for swap in swaps:
        where, values = swap.where[row, PADDING[of] :], swap.values[of, PADDING[of] :]
        per_head = KINDS[swap.site.kind].unit in ("head", "kv_head")

        def edit(activation: Tensor, where=where[..., None] if per_head else where, values=values) -> Tensor:
            return torch.where(where, values, activation)

        edits[swap.site.kind, swap.site.layer] = edit
    return oracles.patched_logits(twin, PROMPTS[of], edits)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_restart_that_changes_nothing_is_the_base_run(family: str) -> None:
    model, twin = pair(family, torch.float64)
    base = base_of(family)
    for of, prompt in enumerate(PROMPTS):
        agree(base.logits[of], oracles.read(twin, prompt)[1], "the base run", 1e-10)
    rows = torch.tensor([1, 0, 1])
    for layer in range(3):
        for start in (0, 3, WIDTH - 1):
            logits = run_swapped(model, base, rows, [], layer=layer, start=start)
            agree(logits, base.logits[rows], f"layer {layer}, column {start}", 1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_and_column_at_or_before_the_patch(family: str) -> None:
    model, _ = pair(family, torch.float64)
    base, rows = base_of(family), (1, 0, 1)
    for kind in ("resid_pre", "k", "z", "neuron", "mlp_out"):
        swaps = [swap_at(family, Site(kind, 1), rows, (4, 5), (0,))]
        for layer, start in ((1, 4), (1, 2), (0, 4), (0, 0)):
            logits = run_swapped(model, base, torch.tensor(rows), swaps, layer=layer, start=start)
            for row, of in enumerate(rows):
                what = f"{kind} from layer {layer}, column {start}, row {row}"
                agree(logits[row], by_hooks(family, swaps, row, of), what, 1e-10)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_restarts_behind_the_attention(family: str, layer: int) -> None:
    """With and without the shortcut, which takes the heads' values from the base run."""
    model, _ = pair(family, torch.float64)
    rows = (1, 0)
    kinds = [kind for kind in BEHIND_ATTENTION if kind != "resid_mid" or not model.dims.parallel]
    for kind in kinds:
        # In the last layer a patch before the last token changes nothing.
        for columns in ((4, 6), (4, 5)) if layer == 2 else ((4, 5),):
            swaps = [swap_at(family, Site(kind, layer), rows, columns, (0,))]
            for behind in ((), (layer,)):
                logits = run_swapped(
                    *(model, base_of(family, behind), torch.tensor(rows), swaps), layer=layer, start=4
                )
                for row, of in enumerate(rows):
                    what = f"{kind} at columns {columns}, behind attention {behind}, row {row}"
                    agree(logits[row], by_hooks(family, swaps, row, of), what, 1e-10)


@pytest.mark.parametrize("family", ["llama-gqa", "neox-parallel", "gemma2-post-norms-softcap"])
def test_patches_at_many_sites_at_once(family: str) -> None:
    model, _ = pair(family, torch.float64)
    rows = (0, 1)
    for sites in (
        ("z.0", "mlp_out.0", "q.1", "v.2", "neuron.2"),
        ("k.1", "attn_out.1", "resid_post.1"),
        ("attn_out.0", "k_proj.2", "z.2"),
    ):
        swaps = [
            swap_at(family, Site(name.split(".")[0], int(name.split(".")[1])), rows, (4, 6), (0,))
            for name in sites
        ]
        layer = min(swap.site.layer for swap in swaps)
        logits = run_swapped(
            *(model, base_of(family, (layer,)), torch.tensor(rows), swaps), layer=layer, start=4
        )
        for row in rows:
            agree(logits[row], by_hooks(family, swaps, row, row), f"{sites}, row {row}", 1e-10)


def test_what_a_base_run_keeps() -> None:
    model, twin = pair("mistral-window", torch.float64)
    batch = Batch.from_ids(PROMPTS, model.pad_id)
    base = compute_base(model, batch, [Site("q", 1), Site("neuron", 0)], behind_attention=[2])
    assert set(base.heads) == {2} and set(base.own) == {Site("q", 1), Site("neuron", 0)}
    for of, prompt in enumerate(PROMPTS):
        values, _ = oracles.read(twin, prompt)
        real = slice(PADDING[of], None)
        for layer in range(3):
            agree(base.streams[layer][of, real], values["resid_pre", layer], f"stream {layer}", 1e-10)
            # All of them, also those that the sliding window of 4 has lost sight of at the end.
            agree(base.keys[layer][of, :, real].transpose(0, 1), values["k", layer], f"keys {layer}", 1e-10)
            agree(
                base.values[layer][of, :, real].transpose(0, 1), values["v", layer], f"values {layer}", 1e-10
            )
        agree(base.heads[2][of, real], values["z", 2], "heads", 1e-10)
        agree(base.own[Site("q", 1)][of, real], values["q", 1], "queries", 1e-10)


def test_the_base_run_is_not_written_into() -> None:
    model, _ = pair("llama-gqa", torch.float64)
    base = base_of("llama-gqa", (0, 1, 2))
    kept = [each.clone() for each in (*base.streams, *base.keys, *base.values, *base.heads.values())]
    for kind in ("z", "k", "resid_pre", "resid_mid", "mlp_out"):
        swaps = [swap_at("llama-gqa", Site(kind, 1), (0, 1), (4, 5), (0,))]
        run_swapped(model, base, torch.tensor([0, 1]), swaps, layer=1, start=4)
    after = (*base.streams, *base.keys, *base.values, *base.heads.values())
    assert all(torch.equal(one, other) for one, other in zip(kept, after, strict=True))


def test_the_model_runs_as_before_afterwards() -> None:
    model, twin = pair("gpt2", torch.float64)
    base = base_of("gpt2", (1,))
    swaps = [swap_at("gpt2", Site("z", 1), (0,), (4,), (0,))]
    run_swapped(model, base, torch.tensor([0]), swaps, layer=1, start=4)
    run = capture(model, Batch.from_ids(PROMPTS, model.pad_id), [Site("mlp_out", 2)])
    for of, prompt in enumerate(PROMPTS):
        agree(run.logits[of], oracles.read(twin, prompt)[1], "a plain run", 1e-10)


def test_restarts_that_would_miss_a_patch_are_refused() -> None:
    model, _ = pair("llama-gqa", torch.float64)
    base, rows = base_of("llama-gqa"), torch.tensor([0, 1])
    swap = swap_at("llama-gqa", Site("z", 1), (0, 1), (4,), (0,))

    def run(swap: Swap, layer: int = 1, start: int = 4) -> None:
        run_swapped(model, base, rows, [swap], layer=layer, start=start)

    with pytest.raises(InputError, match="swap at z.1: the run restarts at layer 2 and would miss it"):
        run(swap, layer=2)
    with pytest.raises(InputError, match="restarts at column 5 and would miss columns before it"):
        run(swap, start=5)
    with pytest.raises(InputError, match=r"`where` of shape \(1, 7, 4\), expected \(2, 7, 4\)"):
        run(Swap(swap.site, swap.where[:1], swap.values))
    with pytest.raises(InputError, match=r"values of shape \(2, 6, 4, 8\), expected \(2, 7, 4, 8\)"):
        run(Swap(swap.site, swap.where, swap.values[:, 1:]))
    with pytest.raises(InputError, match="layer 3 is out of range"):
        run(Swap(Site("z", 3), swap.where, swap.values))
    with pytest.raises(InputError, match="layer 7 is out of range"):
        compute_base(model, base.batch, [Site("z", 7)])
