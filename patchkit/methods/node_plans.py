"""What node patching and attribution will run, as stages of a plan: the same Programs and items, without weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from patchkit.data import Pair
from patchkit.methods._node_options import Asked, NodeOptions, ask
from patchkit.methods._replacements import Replacement, SourceSums
from patchkit.methods._restart_memory import site_numbers
from patchkit.methods.activation_patching import exact_items, set_items, sets_program
from patchkit.methods.attribution import Method, attribution_work, refuse_flat_metric
from patchkit.methods.diagnostics import BoundOptions, bound_effects
from patchkit.methods.verification import strata_of
from patchkit.model import PatchModel
from patchkit.runtime.plan import Stage

#: Bytes that come back beside a pair's effects: both metrics and the work.
_ENDS = 16


def patching_stages(
    model: PatchModel, pairs: Sequence[Pair], options: NodeOptions, reference: Sequence[Pair] | None = None
) -> list[Stage]:
    """Of `patch_nodes`.

    Raises:
        InputError: as `patch_nodes`.
    """
    asked = ask(model, pairs, options)
    return [*_means(asked, reference), _exact("patching", asked, asked.ids)]


def sets_stage(
    model: PatchModel,
    pairs: Sequence[Pair],
    sets: Sequence[Sequence[str]],
    options: NodeOptions,
    label: str,
) -> Stage:
    """Sets of nodes, by name, patched at once in every pair.

    Raises:
        InputError: a node or position that does not exist.
    """
    asked = ask(model, pairs, options)
    numbers = [asked.grid.select(tuple(names)) for names in sets]
    each = [number for _ in pairs for number in numbers]
    items, _ = set_items(asked, each, [pair for pair in range(len(pairs)) for _ in numbers])
    program = sets_program(asked, _replacement(options), items)
    return Stage(label, program, items, back=4 * program.most + _ENDS)


def attribution_stages(
    model: PatchModel,
    pairs: Sequence[Pair],
    options: NodeOptions,
    method: Method,
    *,
    verify: int | None = None,
    sample: int | None = None,
    bound: BoundOptions | None = None,
    reference: Sequence[Pair] | None = None,
) -> list[Stage]:
    """Of `attribute`, and of the proofs that go with it.

    Which nodes come out on top is not known yet: those that are verified are taken evenly from all.

    Raises:
        InputError: as `attribute`.
    """
    asked = ask(model, pairs, options)
    refuse_flat_metric(asked.metric)
    program, items = attribution_work(asked, _replacement(options), method)
    nodes = len(asked.grid)
    stages = [*_means(asked, reference), Stage(method, program, items, back=2 * 4 * nodes + _ENDS)]
    checked = torch.zeros(0, dtype=torch.long)
    if verify is not None:
        count = min(len(asked.ids), verify + (verify if sample is None else sample))
        checked = asked.ids[torch.linspace(0, len(asked.ids) - 1, count).long()]
        stages.append(_exact("verification", asked, checked))
    if bound is not None:
        rest = asked.ids[~torch.isin(asked.ids, checked)]
        stages.append(_bound(asked, rest, bound))
    return stages


def _means(asked: Asked, reference: Sequence[Pair] | None) -> list[Stage]:
    """Running the prompts that a mean is taken over."""
    if not reference:
        return []
    sites = tuple(asked.grid.sites(asked.ids))
    width = max(len(pair.clean_ids) for pair in reference)
    sums = 8 * width * site_numbers(asked.grid.dims, sites)
    return [Stage("means", SourceSums(sites, asked.options.direction), list(reference), back_of_batch=sums)]


def _replacement(options: NodeOptions) -> Replacement:
    return Replacement(options.ablation, options.noise_scale, options.seed)


def _exact(label: str, asked: Asked, ids: Tensor) -> Stage:
    items = exact_items(asked, ids)
    program = sets_program(asked, _replacement(asked.options), items)
    return Stage(label, program, items, back=4 * program.most + _ENDS)


def _bound(asked: Asked, rest: Tensor, options: BoundOptions) -> Stage:
    """The random subsets that the bound draws, which depend on nothing that is measured."""
    drawn: list[tuple[Sequence[Tensor], Sequence[int]]] = []

    def note(sets: Sequence[Tensor], numbers: Sequence[int]) -> Tensor:
        drawn.append((sets, numbers))
        return torch.zeros(len(sets))

    names = ["" for _ in range(len(rest))]
    chosen = replace(options, seed=asked.options.seed)
    bound_effects(note, rest, strata_of(asked.grid, rest), names, len(asked.pairs), chosen)
    items = [item for sets, numbers in drawn for item in set_items(asked, sets, numbers)[0]]
    program = sets_program(asked, _replacement(asked.options), items)
    return Stage("bound", program, items, back=4 * program.most + _ENDS)
