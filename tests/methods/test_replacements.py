"""What is put in: the other run's values, a mean over a reference set, zeros, or noise of the site's own size."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from patchkit.data import Pair, read_places
from patchkit.errors import InputError
from patchkit.methods._node_options import NodeOptions
from patchkit.methods._pair_batch import PairBatch
from patchkit.methods._replacements import Replacement, replacement
from patchkit.methods.activation_patching import patch_nodes, patch_sets
from patchkit.model import NodeGrid, Site
from patchkit.results.scores import Scores
from patchkit.tracing import capture
from tests import oracles
from tests.comparisons import agree, pair
from tests.node_oracle import LONG, MIDDLE, SHORT, exact, prompts

KINDS = ("resid_pre", "k", "z", "neuron", "mlp_out")
FAMILIES = ("llama-gqa", "gpt2")
#: The reference set of the mean: three prompts of the length of `LONG`.
REFERENCE = [
    MIDDLE,
    Pair((8, 9, 10, 11, 12, 13, 14), (7, 7, 30, 31, 32, 2, 2), 1, 2, {}, "r"),
    Pair((3, 4, 3, 4, 3, 4, 3), (5, 6, 5, 6, 5, 6, 5), 1, 2, {}, "s"),
]


def against_oracle(
    family: str, pairs: Sequence[Pair], scores: Scores, put_in: object, tolerance: float = 1e-10
) -> None:
    _, twin = pair(family, torch.float64)
    covered = read_places(scores.convention.positions, pairs).covered
    nodes = [[number] for number in range(0, len(scores.grid), 3)]
    for row, each in enumerate(pairs):
        expected = exact(
            twin, each, covered[row], scores.grid, nodes, scores.convention.direction, put_in=put_in
        )  # type: ignore[arg-type]
        found = scores.effects[row, torch.tensor(nodes)[:, 0]]
        agree(found, expected, f"{scores.convention.ablation} in pair {each.id}", tolerance)
        assert expected.abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_zero_puts_in_zeros_also_where_the_prompts_are_the_same(family: str) -> None:
    model, _ = pair(family, torch.float64)
    options = NodeOptions(nodes=KINDS, positions="0,-1", ablation="zero", group=9)
    scores = patch_nodes(model, [MIDDLE, SHORT], options)
    against_oracle(family, [MIDDLE, SHORT], scores, lambda source, own, kind, layer: torch.zeros_like(own))
    where = scores.grid.locate(torch.arange(len(scores.grid)))
    first = (where.place == 0) & (where.layer == 0)
    assert scores.effects[0, first].any(), "the prompts are the same there, and zeros are not"


@pytest.mark.parametrize("direction", ["noise", "denoise"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_mean_is_that_of_a_loop_over_the_reference_sets_sources(family: str, direction: str) -> None:
    model, twin = pair(family, torch.float64)
    total: dict[tuple[str, int], Tensor] = {}
    for each in REFERENCE:
        values, _ = oracles.read(twin, prompts(each, direction)[1])
        for place, value in values.items():
            total[place] = total.get(place, 0) + value
    options = NodeOptions(
        nodes=KINDS,
        positions="2,-1",
        ablation="mean",
        group=9,
        direction=direction,  # type: ignore[arg-type]
        max_batch_tokens=16,
    )
    scores = patch_nodes(model, [LONG, MIDDLE], options, reference=REFERENCE)
    against_oracle(family, [LONG, MIDDLE], scores, lambda source, own, kind, layer: total[kind, layer] / 3)


def test_the_mean_needs_a_reference_set_of_the_pairs_length() -> None:
    model, _ = pair("llama-gqa")
    mean = NodeOptions(ablation="mean")
    for reference in (None, []):
        with pytest.raises(
            InputError, match="the ablation 'mean' needs a reference set to take the mean over"
        ):
            patch_nodes(model, [LONG], mean, reference=reference)
    says = r"must all have one length; found lengths 5 \('short'\), 7 \('long'\)"
    with pytest.raises(InputError, match=says):
        patch_nodes(model, [LONG], mean, reference=[SHORT])
    with pytest.raises(InputError, match=says):
        patch_nodes(model, [LONG, SHORT], mean, reference=[LONG])
    for ablation in ("resample", "zero", "noise"):
        with pytest.raises(
            InputError, match=f"a reference set is for the ablation 'mean'; found '{ablation}'"
        ):
            patch_nodes(model, [LONG], NodeOptions(ablation=ablation), reference=[LONG])  # type: ignore[arg-type]


def noised(pairs: Sequence[Pair], sites: Sequence[Site], **options: object) -> dict[str, dict[Site, Tensor]]:
    """What noise puts in at real tokens, by pair and site, and the padding as it was."""
    model, _ = pair("llama-gqa", torch.float64)
    asked = NodeOptions(ablation="noise", **options)  # type: ignore[arg-type]
    batch = PairBatch.of(model, pairs, read_places("all", pairs).covered, asked.direction)
    own = capture(model, batch.base, sites).values
    values, _ = replacement(model, pairs, asked, sites, None).values(model, batch, sites, own)
    found = {}
    for row, each in enumerate(pairs):
        offset = int(batch.base.offset[row])
        for site in sites:
            assert torch.equal(values[site][row, :offset], own[site][row, :offset]), "padding was changed"
        found[each.id] = {site: values[site][row, offset:] - own[site][row, offset:] for site in sites}
    return found


SITES = [Site("z", 0), Site("neuron", 1), Site("resid_pre", 2)]


def test_noise_is_the_same_for_a_pair_whatever_its_batch() -> None:
    together, again = noised([LONG, SHORT, MIDDLE], SITES), noised([MIDDLE, SHORT], SITES)
    for name in ("short", "middle"):
        for site in SITES:
            agree(again[name][site], together[name][site], f"{site} of {name}", 1e-12)
    other = noised([SHORT], SITES, seed=1)["short"]
    larger = noised([SHORT], SITES, noise_scale=3.0)["short"]
    for site in SITES:
        assert not torch.allclose(other[site], together["short"][site])
        agree(larger[site], 3 * together["short"][site], "three times the scale", 1e-6)
    drawn = [together[name][site].flatten()[:20] for name in ("long", "short") for site in SITES]
    assert len({tuple((part / part.abs().max()).tolist()) for part in drawn}) == len(drawn)


def test_noise_has_the_size_of_the_sites_own_values() -> None:
    model, twin = pair("llama-gqa", torch.float64)
    long = Pair(tuple(range(3, 33)), tuple(range(4, 34)), 1, 2, {}, "thirty")
    added = noised([long, SHORT], SITES, noise_scale=0.5)["thirty"]
    values, _ = oracles.read(twin, long.clean_ids)
    for site in SITES:
        own = values[site.kind, site.layer]
        # Of 900 draws and more.
        ratio = float(added[site].std() / own.std(correction=0))
        assert ratio == pytest.approx(0.5, rel=0.12)
        assert abs(float(added[site].mean())) < 0.1 * float(own.std())


def test_noise_in_a_sweep_is_what_the_oracle_gives_for_it() -> None:
    model, _ = pair("llama-gqa", torch.float64)
    grid = NodeGrid(model.dims, ("z", "mlp_out"))
    sites = grid.sites(torch.arange(len(grid)))
    for direction in ("noise", "denoise"):
        options = NodeOptions(nodes=("z", "mlp_out"), ablation="noise", seed=4, direction=direction)  # type: ignore[arg-type]
        scores = patch_nodes(model, [LONG, SHORT], options)
        added = noised([LONG, SHORT], sites, seed=4, direction=direction)
        for row, each in enumerate([LONG, SHORT]):
            one = Scores(
                **(vars(scores) | {name: getattr(scores, name)[row : row + 1] for name in ROWS}),
            )
            mine = added[each.id]
            against_oracle(
                *("llama-gqa", [each], one),
                lambda source, own, kind, layer, mine=mine: own + mine[Site(kind, layer)],
                1e-8,
            )


ROWS = ("pair_ids", "effects", "magnitudes", "base_metric", "source_metric")


@pytest.mark.parametrize("ablation", ["zero", "mean", "noise"])
def test_ablations_do_not_depend_on_what_is_batched_together(ablation: str) -> None:
    model, _ = pair("gpt2", torch.float64)
    pairs = [LONG, MIDDLE]
    reference = REFERENCE if ablation == "mean" else None

    def sweep(pairs: list[Pair], tokens: int = 16384) -> Tensor:
        options = NodeOptions(positions="2,-1", ablation=ablation, max_batch_tokens=tokens)  # type: ignore[arg-type]
        return patch_nodes(model, pairs, options, reference=reference).effects

    together = sweep(pairs)
    agree(sweep(pairs[::-1]).flip(0), together, "another order", 1e-12)
    agree(sweep(pairs, 1), together, "one pair and one patch at a time", 1e-12)
    agree(sweep([MIDDLE])[0], together[1], "alone", 1e-12)


def test_sets_take_an_ablation_too() -> None:
    model, twin = pair("llama-gqa", torch.float64)
    options = NodeOptions(nodes=("z", "mlp_out"), ablation="zero")
    grid = NodeGrid(model.dims, options.nodes)
    members = torch.cat([grid.find(name) for name in ("a0.h1", "m1", "a2.h2")])
    found = patch_sets(model, [LONG], [members], [0], options).effects
    covered = [tuple(range(7))]
    expected = exact(
        *(twin, LONG, covered, grid, [members.tolist()]),
        put_in=lambda source, own, kind, layer: torch.zeros_like(own),
    )
    agree(found, expected, "a set of zeros", 1e-10)


def test_the_source_run_is_scored_whatever_is_put_in() -> None:
    model, _ = pair("llama-gqa", torch.float64)
    source = patch_nodes(model, [LONG]).source_metric
    for ablation in ("zero", "noise"):
        agree(
            patch_nodes(model, [LONG], NodeOptions(ablation=ablation)).source_metric, source, ablation, 1e-12
        )  # type: ignore[arg-type]


def test_only_the_other_run_is_the_same_before_the_prompts_differ() -> None:
    assert [Replacement(name).causal for name in ("resample", "mean", "zero", "noise")] == [
        True,
        *[False] * 3,
    ]
    assert [Replacement(name).needs_own for name in ("resample", "mean", "zero", "noise")] == [
        *[False] * 3,
        True,
    ]
