"""What does not fit the batch or the model is refused by name, before anything runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from patchkit.data.batch import Batch, positions
from patchkit.errors import InputError
from patchkit.model import Site
from patchkit.tracing import Patch, attention_from, capture, capture_gradients, run_patched
from tests.comparisons import PROMPTS, agree, metric, pair

BATCH = Batch.from_ids(PROMPTS)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ([9, 5, 9], "row 1 has its tokens at columns 6 to 9, found 5"),
        ([9, 9, 10], "row 2 has its tokens at columns 0 to 9, found 10"),
        ([-1, 9, 9], "row 0 has its tokens at columns 3 to 9, found -1"),
        ([9, 9], r"expected one padded column a row, \(3,\), found \(2,\)"),
    ],
)
def test_columns(columns: list[int], message: str) -> None:
    model, _ = pair("llama-gqa")
    with pytest.raises(InputError, match=message):
        capture(model, BATCH, [Site("z", 0)], columns=torch.tensor(columns))
    with pytest.raises(InputError, match=message):
        attention_from(model, BATCH, [0], torch.tensor(columns))


def test_sites_the_model_does_not_have() -> None:
    model, _ = pair("neox-parallel")
    for site, message in (
        (Site("z", 3), "z.3: layer 3 is out of range, the model has layers 0 to 2"),
        (Site("resid_mid", 0), "in parallel"),
    ):
        with pytest.raises(InputError, match=message):
            capture(model, BATCH, [site])
        with pytest.raises(InputError, match=message):
            capture_gradients(model, BATCH, [site], metric)
        with pytest.raises(InputError, match=message):
            run_patched(model, BATCH, [], read=[site])
        with pytest.raises(InputError, match=message):
            run_patched(model, BATCH, [Patch(site, torch.zeros(1, 10, 32), torch.tensor([0]))])
    with pytest.raises(InputError, match="layer 5 is out of range"):
        attention_from(model, BATCH, [0, 5], positions(BATCH, -1))


def patch(kind: str, shape: tuple[int, ...], **places: list[int]) -> Patch:
    return Patch(
        Site(kind, 1), torch.zeros(shape), **{name: torch.tensor(place) for name, place in places.items()}
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (patch("z", (1, 4, 8), rows=[3], columns=[9]), r"row 3..3 is out of range, expected 0 to 2"),
        (patch("z", (1, 4, 8), rows=[-1], columns=[9]), "row -1..-1 is out of range"),
        (
            patch("z", (2, 4, 8), rows=[0, 1], columns=[9, 10]),
            "column 9..10 is out of range, expected 0 to 9",
        ),
        (patch("z", (1, 4, 8), rows=[1], columns=[5]), "a column falls on padding; positions count unpadded"),
        (patch("z", (1, 8), rows=[0], columns=[9], index=[4]), "index 4..4 is out of range, expected 0 to 3"),
        (patch("k", (1, 8), rows=[0], columns=[9], index=[2]), "index 2..2 is out of range, expected 0 to 1"),
        (patch("neuron", (1,), rows=[0], columns=[9], index=[40]), "index 40..40 .* 0 to 39"),
        (
            patch("mlp_out", (1, 32), rows=[0], columns=[9], index=[0]),
            "one vector a position, it takes no index",
        ),
        # These would be broadcast to something plausible.
        (patch("z", (1, 8), rows=[0], columns=[9]), r"values of shape \(1, 8\), expected \(1, 4, 8\)"),
        (patch("z", (4, 8), rows=[0], columns=[9]), r"values of shape \(4, 8\), expected \(1, 4, 8\)"),
        (patch("mlp_out", (1, 32), rows=[0]), r"values of shape \(1, 32\), expected \(1, 10, 32\)"),
        (patch("z", (1, 4, 8), rows=[0, 1], columns=[9, 9]), r"expected \(2, 4, 8\)"),
        (
            patch("neuron", (1, 1), rows=[0], columns=[9], index=[3]),
            r"values of shape \(1, 1\), expected \(1,\)",
        ),
    ],
)
def test_patches(wrong: Patch, message: str) -> None:
    with pytest.raises(InputError, match=f"patch of {wrong.site}: .*{message}"):
        run_patched(pair("llama-gqa")[0], BATCH, [wrong])


def test_lengths_that_differ() -> None:
    """Under the tests the dataclass refuses them itself; elsewhere the run must."""
    wrong = patch("z", (2, 4, 8), rows=[0, 1], columns=[9, 9])
    object.__setattr__(wrong, "columns", torch.tensor([9]))
    with pytest.raises(InputError, match=r"column has shape \(1,\), expected one for each of the 2 rows"):
        run_patched(pair("llama-gqa")[0], BATCH, [wrong])


def test_no_patches_are_no_patches() -> None:
    model, _ = pair("llama-gqa")
    nothing: dict[str, Any] = {"rows": [], "columns": [], "index": []}
    clean = capture(model, BATCH, []).logits
    empty = Patch(
        Site("z", 1), torch.zeros(0, 8), **{k: torch.tensor(v, dtype=torch.long) for k, v in nothing.items()}
    )
    assert torch.equal(run_patched(model, BATCH, [empty]).logits, clean)
    assert torch.equal(run_patched(model, BATCH, []).logits, clean)


def test_patches_of_one_site_are_applied_in_the_order_given() -> None:
    model, _ = pair("llama-gqa")
    site, row, last = Site("z", 1), torch.tensor([0]), torch.tensor([9])
    ones, twos = torch.ones(1, 4, 8), 2 * torch.ones(1, 8)
    run = run_patched(
        model, BATCH, [Patch(site, ones, row, last), Patch(site, twos, row, last, row)], read=[site]
    )
    assert torch.equal(run.values[site][0, 9], torch.cat([twos, ones[0, 1:]]))
    run = run_patched(
        model, BATCH, [Patch(site, twos, row, last, row), Patch(site, ones, row, last)], read=[site]
    )
    assert torch.equal(run.values[site][0, 9], ones[0])


def test_a_patched_site_is_read_as_patched_and_the_others_as_they_become() -> None:
    """Reading beside patching, at every layer and in no order; what lies below a patch is unchanged."""
    model, _ = pair("gemma2-post-norms-softcap")
    kinds = ("resid_post", "z", "resid_mid", "q", "resid_pre")
    sites = [Site(kind, layer) for kind in kinds for layer in (2, 0, 1)]
    clean = capture(model, BATCH, sites)
    site = Site("resid_mid", 1)
    values = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    run = run_patched(model, BATCH, [Patch(site, values, torch.tensor([1]), torch.tensor([7]))], read=sites)
    expected = clean.values[site].clone()
    expected[1, 7] = values[0]
    agree(run.values[site], expected, "the patched site")
    for other in sites:
        if other < site:
            agree(run.values[other], clean.values[other], other)
        # Other rows, and earlier tokens of the same row.
        agree(run.values[other][[0, 2]], clean.values[other][[0, 2]], other)
        agree(run.values[other][1, 6:7], clean.values[other][1, 6:7], other)
    assert not torch.allclose(
        run.values[Site("resid_post", 1)][1, 7], clean.values[Site("resid_post", 1)][1, 7]
    )
    assert not torch.allclose(run.values[Site("q", 2)][1, 7], clean.values[Site("q", 2)][1, 7])
