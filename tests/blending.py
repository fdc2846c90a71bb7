"""What the tests of masks check, as functions: blended runs agree with the hook oracle, with and without reuse."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from patchkit.data.batch import Batch, positions
from patchkit.model import KINDS, PatchModel, Site
from patchkit.tracing import Blend, Prefix, blended_logits, capture, compute_prefix
from tests import oracles
from tests.comparisons import PROMPTS, agree, kinds_of, metric, pair

#: As long as PROMPTS, other tokens.
OTHERS = ((4, 4, 31, 7, 19, 2, 13), (25, 12, 36, 1), (10, 22, 2, 9, 3, 17, 6, 5, 29, 8))


def alternates(model: PatchModel, sites: Sequence[Site]) -> dict[Site, Tensor]:
    """Activations of OTHERS at their last tokens."""
    other = Batch.from_ids(OTHERS, pad_id=model.pad_id)
    return dict(capture(model, other, sites, columns=positions(other, -1)).values)


def sites_of_kinds(model: PatchModel, kinds: Sequence[str]) -> list[Site]:
    """In an order that is not that of execution."""
    return [Site(kind, layer) for kind in kinds for layer in reversed(range(model.dims.n_layers))]


def masks(model: PatchModel, sites: Sequence[Site], rows: int | None = None) -> dict[Site, Tensor]:
    """Random leaves between 0 and 1: one mask for all rows, or one a row."""
    generator = torch.Generator().manual_seed(0)
    shape = () if rows is None else (rows,)
    return {
        site: torch.rand(*shape, KINDS[site.kind].count(model.dims), generator=generator).requires_grad_()
        for site in sites
    }


def blends(keep: dict[Site, Tensor], alternate: dict[Site, Tensor]) -> list[Blend]:
    return [Blend(site, keep[site], alternate[site]) for site in keep]


def with_gradients(
    model: PatchModel,
    run: Batch | Prefix,
    keep: dict[Site, Tensor],
    alternate: dict[Site, Tensor],
    columns: Tensor,
) -> tuple[Tensor, list[Tensor]]:
    """Logits by patchkit, and the gradient of the metric's sum over rows in each mask."""
    logits = blended_logits(model, run, blends(keep, alternate), columns)
    return logits.detach(), list(torch.autograd.grad(metric(logits).sum(), list(keep.values())))


def by_oracle(
    family: str, keep: dict[Site, Tensor], alternate: dict[Site, Tensor], places: Sequence[int]
) -> tuple[Tensor, list[Tensor]]:
    """The same by hooks, one prompt at a time; `places` count unpadded tokens from the end."""
    _, twin = pair(family)
    logits, total = [], [torch.zeros_like(value) for value in keep.values()]
    for row, (ids, place) in enumerate(zip(PROMPTS, places, strict=True)):
        edits = {}
        for site, value in keep.items():
            mine = value if value.ndim == 1 else value[row]
            per_node = mine[:, None] if KINDS[site.kind].unit in ("head", "kv_head") else mine
            edits[site.kind, site.layer] = _blending(per_node, alternate[site][row], len(ids) + place)
        run = oracles.run(twin, ids, edits, grad=True)
        found = torch.autograd.grad(metric(run.logits[None]).sum(), list(keep.values()), allow_unused=True)
        total = [t if g is None else t + g for t, g in zip(total, found, strict=True)]
        logits.append(run.logits.detach())
    return torch.stack(logits), total


def _blending(keep: Tensor, alternate: Tensor, place: int) -> oracles.Edit:
    def edit(activation: Tensor) -> Tensor:
        mixed = keep * activation[place] + (1 - keep) * alternate
        return torch.cat([activation[:place], mixed[None], activation[place + 1 :]])

    return edit


def agree_on_gradients(
    found: list[Tensor], expected: list[Tensor], keep: dict[Site, Tensor], what: str
) -> None:
    """On the scale of all masks' gradients together: a single mask's may cancel to almost nothing."""
    floor = max(float(value.abs().max()) for value in expected)
    assert floor > 1e-3, f"{what}: gradients too small to compare"
    for site, mine, theirs in zip(keep, found, expected, strict=True):
        agree(mine, theirs, f"{what}: gradient of the mask of {site}", 1e-5, floor)


def check_blends(family: str, kinds: Sequence[str], places: Sequence[int], starts: Sequence[int]) -> None:
    """Logits and gradients, of the whole sequence and from prefixes, at one position a row."""
    model, _ = pair(family)
    batch = Batch.from_ids(PROMPTS, pad_id=model.pad_id)
    sites = sites_of_kinds(model, [kind for kind in kinds if kind in kinds_of(family)])
    keep, alternate = masks(model, sites), alternates(model, sites)
    logits, gradients = by_oracle(family, keep, alternate, places)
    columns = positions(batch, places)
    runs: dict[str, Batch | Prefix] = {"plain": batch}
    runs |= {f"prefix of {start}": compute_prefix(model, batch, start) for start in starts}
    for name, run in runs.items():
        found, mine = with_gradients(model, run, keep, alternate, columns)
        agree(found, logits, name)
        agree_on_gradients(mine, gradients, keep, name)
