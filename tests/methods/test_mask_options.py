"""What cannot be learned is refused before anything is run, in words that say what to change."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from patchkit.errors import InputError
from patchkit.methods import MaskOptions, Objective, Schedule, desiderata_mask, learn_mask
from patchkit.methods._mask_layout import Layout
from patchkit.methods._mask_prepared import prepare
from patchkit.methods.mask_plans import PRUNED, mask_stages
from patchkit.methods.mask_scores import answers_with
from patchkit.runtime.plan import make_plan
from tests.comparisons import pair
from tests.methods.mask_cases import random_triples

HARD = Objective("cross-entropy", "hard-concrete")


def learn(family: str = "gpt2", **options: Any) -> None:
    model, _ = pair(family)
    learn_mask(model, random_triples(8), MaskOptions(**options))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"components": ("head", "expert")},
            "component kind 'expert' is not known; expected one of: head, mlp",
        ),
        ({"components": ("head", "mlp", "head")}, "a kind is given twice"),
        ({"components": ("head", "z")}, "a kind is given twice"),
        ({"components": ()}, "no components given"),
        ({"position": "subject"}, "no span 'subject'; it has: middle"),
        (
            {"train_on": ("value", "names")},
            "cannot train on 'names'; the desiderata given are: value, operation",
        ),
        ({"validation_fraction": 1.0}, "between 0 and 1, found 1.0"),
        ({"max_batch_tokens": 0}, "max_batch_tokens must be at least 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_mask_that_cannot_be_made(
    options: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("training began")

    monkeypatch.setattr(desiderata_mask, "train_path", never)
    with pytest.raises(InputError, match=words):
        learn(**options)


def test_a_parallel_block_has_no_stream_in_the_middle() -> None:
    with pytest.raises(
        InputError, match="resid_mid.0: this model's blocks run attention and MLP in parallel"
    ):
        learn("neox-parallel", components=("resid_mid",))
    assert Layout.build(("resid_mid",), pair("neox-sequential")[0].dims).size == 3


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MaskOptions(seeds=()), "expected at least one training seed"),
        (lambda: MaskOptions(seeds=(1, 1)), "each once"),
        (lambda: MaskOptions(random_sets=0), "nothing is claimed without a baseline"),
        (lambda: MaskOptions(slack=-0.1), "slack is -0.1"),
        (lambda: MaskOptions(slack=float("nan")), "slack is nan"),
        (lambda: Schedule(lambdas=()), "expected at least one number"),
        (lambda: Schedule(lambdas=(0.1, -0.2)), "none of them negative"),
        (lambda: Schedule(lambdas=(float("nan"),)), "lambdas is"),
        (lambda: Schedule(steps=0), "steps is 0; expected at least 1"),
        (lambda: Schedule(steps_after=0), "steps_after is 0"),
        (lambda: Schedule(check_every=0), "check_every is 0"),
        (lambda: Schedule(patience=-1), "patience is -1; expected at least 0"),
        (lambda: Schedule(lr=0.0), "lr is 0.0; expected a positive"),
        (
            lambda: MaskOptions(objective=HARD, schedule=Schedule(lambdas=(0.5, 1.0))),
            "between 0 and 1 as lambda",
        ),
        (lambda: MaskOptions(objective=HARD, schedule=Schedule(lambdas=(0.0,))), "between 0 and 1 as lambda"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_options_are_checked_when_they_are_made(make: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        make()


@pytest.mark.parametrize(("loss", "sparsity"), [("hinge", "l1"), ("published", "l0")])
def test_an_objective_that_is_not_known(loss: Any, sparsity: Any) -> None:
    with pytest.raises(InputError, match="is not known; expected one of: (published|l0.5)"):
        Objective(loss, sparsity)


def test_a_span_that_some_triple_lacks_or_that_is_longer_than_a_token() -> None:
    model, _ = pair("gpt2")
    triples = random_triples(8)
    options = MaskOptions(position="middle", schedule=Schedule(lambdas=(0.1,), steps=1))
    with pytest.raises(InputError, match="no span 'middle'; it has: none"):
        learn_mask(model, [*triples[:-1], replace(triples[-1], spans={})], options)
    longer = replace(triples[-1], spans={"middle": (0, 2)}, alternate_spans={"middle": (0, 2)})
    with pytest.raises(InputError, match="expected one token"):
        learn_mask(model, [*triples[:-1], longer], options)


def test_an_empty_desideratum_cannot_be_prepared() -> None:
    model, _ = pair("gpt2")
    with pytest.raises(InputError, match="desideratum 'none' has no triples"):
        prepare(model, Layout.build(("head",), model.dims), {"some": random_triples(1), "none": []})


def test_a_component_that_the_model_does_not_have_cannot_be_scored() -> None:
    model, _ = pair("gpt2")
    triples = {"any": random_triples(2)}
    with pytest.raises(InputError, match="component 'a3.h0' is not one of this model's head, mlp components"):
        answers_with(model, triples, ["a0.h0", "a3.h0"])
    with pytest.raises(InputError, match=r"'m0.n1' .* \(a0.h0 to m2\)"):
        answers_with(model, triples, ["m0.n1"])


@pytest.mark.parametrize(
    ("components", "size", "first", "last"),
    [
        (("head", "mlp"), 15, "a0.h0", "m2"),
        (("mlp", "head"), 15, "m0", "a2.h3"),
        (("layer",), 3, "resid_post.0", "resid_post.2"),
        (("k", "v"), 12, "k.0.h0", "v.2.h1"),
        (("neuron",), 120, "m0.n0", "m2.n39"),
    ],
)
def test_the_order_and_the_names_of_components(components: Any, size: int, first: str, last: str) -> None:
    model, _ = pair("llama-gqa")
    layout = Layout.build(components, model.dims)
    names = layout.names
    assert (layout.size, len(names), len(set(names)), names[0], names[-1]) == (size, size, size, first, last)
    keep = layout.keep_all_but([names.index(last)])
    per_site = layout.by_site(keep)
    (moved,) = [site for site, values in per_site.items() if not bool(values.all())]
    assert moved.layer == 2 and int((per_site[moved] == 0).nonzero()) == len(per_site[moved]) - 1
    assert {kind: tuple(part.shape)[0] for kind, part in layout.by_kind(keep).items()} == dict.fromkeys(
        components, 3
    )


def test_the_cost_of_a_mask_by_hand() -> None:
    """Twelve triples of two prompts each, opened once; then tokens under a mask, forward and backward in training."""
    model, _ = pair("llama-gqa")
    triples = random_triples(6, names=("value", "other"), lengths=(6, 3))
    triples = [replace(each, split="test" if number % 2 else "train") for number, each in enumerate(triples)]
    options = MaskOptions(
        schedule=Schedule(lambdas=(0.1,), steps=10, patience=0),
        seeds=(0,),
        own_masks=False,
        random_sets=1,
        carried_limit=0,
        validation_fraction=0.0,
    )
    (stage,) = mask_stages(model, triples, options)
    (found,) = make_plan(model.dims, [stage], [6], max_batch_tokens=1000, results=0.0).stages
    training, tested = 6, 6
    opened = len(triples) * (6 + 3)
    # Chosen, none, all, complement, soft; one random set; one lambda; of the seed its set, complement and random set.
    scored = 5 + 1 + 1 + 1 * (3 + 1)
    under_masks = 2 * 10 * training + PRUNED * training + scored * tested
    assert found.forwards == pytest.approx(opened + under_masks)
    # On a host: opened in three parts, of which a plan makes one batch; one path, its pruning, what is left on validation
    # and on training triples; all sets together on test triples, and the soft mask.
    assert found.batches == 1 and found.requests == 1 + 2 + 4 + 2
