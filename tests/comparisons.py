"""What the tracing tests check, as functions: a model read and patched by patchkit agrees with the hook oracle.

They are shared by the family matrix, which must pass, and by the tests of mutations, which must make them fail.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from patchkit.data.batch import Batch, positions
from patchkit.model import KINDS, PatchModel, Site
from patchkit.tracing import Patch, attention_from, capture, capture_gradients, run_patched
from patchkit.tracing.validate import available_kinds
from patchkit.zoo.load import load
from tests import oracles
from tests.families import build

#: Three lengths, so that two rows are padded; the longest is wider than the sliding windows.
PROMPTS = ((5, 9, 30, 2, 17, 8, 21), (11, 3, 7, 4), (6, 1, 35, 20, 14, 14, 9, 28, 33, 12))
LAYERS = range(3)


@functools.cache
def pair(family: str, dtype: torch.dtype = torch.float32) -> tuple[PatchModel, PreTrainedModel]:
    """A model opened by patchkit, and its twin that nnsight never saw."""
    return load(build(family, dtype=dtype)), build(family, dtype=dtype)


def agree(found: Tensor, expected: Tensor, what: object, tolerance: float = 1e-5, floor: float = 1.0) -> None:
    """Equal to `tolerance` of the largest number, or of `floor` where that is larger."""
    assert found.shape == expected.shape, (
        f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    )
    assert found.dtype == expected.dtype, f"{what}: {found.dtype}, expected {expected.dtype}"
    gap = float((found - expected).abs().max()) / max(float(expected.abs().max()), floor)
    assert gap <= tolerance, f"{what}: relative difference {gap:.2g}, allowed {tolerance:.0e}"


def metric(logits: Tensor) -> Tensor:
    """A difference of two logits, and something that is not linear in them."""
    return logits[:, 3] - logits[:, 7] + logits.softmax(-1)[:, 5]


def shuffled_sites(model: PatchModel, kinds: Iterable[str], seed: int = 0) -> list[Site]:
    """Every site of these kinds, in no order."""
    sites = [Site(kind, layer) for kind in kinds for layer in range(model.dims.n_layers)]
    random.Random(seed).shuffle(sites)
    return sites


def check_reads(
    model: PatchModel,
    twin: PreTrainedModel,
    kinds: Sequence[str],
    prompts: Sequence[Sequence[int]] = PROMPTS,
    tolerance: float = 1e-5,
) -> None:
    """Every site, every token of every prompt of a padded batch, and the logits, against one prompt at a time."""
    batch = Batch.from_ids(prompts, pad_id=model.pad_id)
    sites = shuffled_sites(model, kinds)
    run = capture(model, batch, sites)
    last = capture(model, batch, sites, columns=positions(batch, -2))
    for row, ids in enumerate(prompts):
        values, logits = oracles.read(twin, ids)
        agree(run.logits[row], logits, f"logits of row {row}", tolerance)
        for site in sites:
            expected = values[site.kind, site.layer]
            agree(run.values[site][row, -len(ids) :], expected, f"{site}, row {row}", tolerance)
            agree(last.values[site][row], expected[-2], f"{site}, row {row}, one column", tolerance)


def check_gradients(
    model: PatchModel,
    twin: PreTrainedModel,
    kinds: Sequence[str],
    prompts: Sequence[Sequence[int]] = PROMPTS,
    tolerance: float = 1e-5,
) -> None:
    """The gradient of each row's own metric at every token of every site, against backward through the twin."""
    batch = Batch.from_ids(prompts, pad_id=model.pad_id)
    sites = shuffled_sites(model, kinds, seed=1)
    run = capture_gradients(model, batch, sites, metric)
    for row, ids in enumerate(prompts):
        expected, score = oracles.gradients(twin, ids, metric)
        values, _ = oracles.read(twin, ids)
        agree(run.metric[row], score, f"metric of row {row}", tolerance)
        for site in sites:
            place = (site.kind, site.layer)
            found = run.gradients[site][row]
            # No floor: a gradient is compared on its own scale, however small that is.
            agree(found[-len(ids) :], expected[place], f"gradient at {site}, row {row}", tolerance, 1e-12)
            agree(run.values[site][row, -len(ids) :], values[place], f"{site}, row {row}", tolerance)
            padding = found[: -len(ids)]
            assert not padding.any(), f"gradient at {site}, row {row}: not zero on padding"


def check_attention(
    model: PatchModel,
    twin: PreTrainedModel,
    position: int = -1,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    tolerance: float = 1e-5,
) -> None:
    """Attention from one token of each row of a padded batch, against the oracle's; none of it to padding."""
    batch = Batch.from_ids(prompts, pad_id=model.pad_id)
    found = attention_from(model, batch, [2, 0, 1], positions(batch, position))
    assert list(found) == [0, 1, 2]
    for row, ids in enumerate(prompts):
        expected = oracles.run(twin, ids).attention
        for layer, pattern in found.items():
            what = f"attention of layer {layer}, row {row}"
            agree(pattern[row, :, -len(ids) :], expected[layer][:, position], what, tolerance)
            assert not pattern[row, :, : -len(ids)].any(), f"{what}: to padding"


#: What a patch covers: (one node or the whole site, one position or all of them).
SCOPES = ((True, True), (False, True), (True, False), (False, False))


def check_patches(
    model: PatchModel,
    twin: PreTrainedModel,
    kinds: Sequence[str],
    prompts: Sequence[Sequence[int]] = PROMPTS,
    tolerance: float = 1e-5,
) -> None:
    """Patches of every scope and at every layer: each row of a padded batch carries a different one, in two turns."""
    batch = Batch.from_ids(prompts, pad_id=model.pad_id)
    generator = torch.Generator().manual_seed(7)
    unpatched = capture(model, batch, shuffled_sites(model, kinds))
    for kind in kinds:
        moved = 0
        for turn in range(2):
            patches, edits = [], []
            scopes = [SCOPES[(row + 3 * turn) % len(SCOPES)] for row in range(len(prompts))]
            for row, ids in enumerate(prompts):
                site = Site(kind, (row + turn) % model.dims.n_layers)
                own = unpatched.values[site][row, -len(ids) :]
                patch, edit = _random_patch(site, scopes[row], row, own, batch, generator)
                patches.append(patch)
                edits.append({(kind, site.layer): edit})
            run = run_patched(model, batch, patches)
            for row, ids in enumerate(prompts):
                what = f"patch of {patches[row].site}, row {row}, (one node, one position) {scopes[row]}"
                expected = oracles.patched_logits(twin, ids, edits[row])
                agree(run.logits[row], expected, what, tolerance)
                moved += bool((run.logits[row] - unpatched.logits[row]).abs().max() > 1e-3)
        # Most patches of a position before the last cannot be seen in the last layers, the others must be.
        assert moved >= 2, f"only {moved} patches of {kind} changed the logits: the comparison says little"


def _random_patch(
    site: Site,
    scope: tuple[bool, bool],
    row: int,
    own: Tensor,
    batch: Batch,
    generator: torch.Generator,
) -> tuple[Patch, Callable[[Tensor], Tensor]]:
    """A patch for patchkit and the same as an edit of the unpadded activation `[position, ...]`."""
    one_node, one_position = scope
    one_node = one_node and KINDS[site.kind].unit != "vector"
    length = len(own)
    position = int(torch.randint(length, (), generator=generator))
    node = int(torch.randint(own.shape[1], (), generator=generator))
    where = (position if one_position else slice(None), *((node,) if one_node else ()))
    noise = torch.randn(own[where].shape, generator=generator, dtype=torch.float64).to(own)
    values = noise * own.abs().mean() - own[where]

    def edit(activation: Tensor) -> Tensor:
        activation[where] = values
        return activation

    column = batch.width - length + position
    if not one_position:
        # What stands on padding must not matter.
        values_padded = torch.full((batch.width, *values.shape[1:]), 3.0, dtype=own.dtype)
        values_padded[-length:] = values
    patch = Patch(
        site,
        (values if one_position else values_padded)[None],
        rows=torch.tensor([row]),
        columns=torch.tensor([column]) if one_position else None,
        index=torch.tensor([node]) if one_node else None,
    )
    return patch, edit


def kinds_of(family: str) -> list[str]:
    """The node kinds this case has, by name."""
    return available_kinds(pair(family)[0])
