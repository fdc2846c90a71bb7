"""Scoring a given set of components on any triples: forms it was not trained on, other tasks, other people's sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from patchkit.data import Triple
from patchkit.errors import InputError
from patchkit.methods._mask_evaluate import evaluate_sets, share_by_name
from patchkit.methods._mask_layout import Layout
from patchkit.methods._mask_prepared import prepare
from patchkit.methods.cross_model import check_alike
from patchkit.model import PatchModel
from patchkit.runtime import MAX_BATCH_TOKENS, SecondModel


def answers_with(
    model: PatchModel,
    triples: Mapping[str, Sequence[Triple]],
    components: Sequence[str],
    *,
    kinds: Sequence[str] = ("head", "mlp"),
    position: str = "last",
    max_batch_tokens: int = MAX_BATCH_TOKENS,
) -> tuple[dict[str, float], list[int]]:
    """Patches exactly these components: (accuracy by group, the answer to every triple in order).

    Args:
        triples: by any grouping, e.g. desideratum and form.
        components: names such as `a1.h0` and `m3`, of the given kinds.

    Raises:
        InputError: a component that these kinds do not have in this model.
    """
    layout = Layout.build(kinds, model.dims)
    chosen = _numbers(layout, components)
    prepared = prepare(model, layout, triples, position=position, max_batch_tokens=max_batch_tokens)
    try:
        answers = prepared.answers(layout.keep_all_but(chosen))
    finally:
        prepared.close()
    return share_by_name(prepared, answers == prepared.target), answers.tolist()


def scores_of_sets(
    model: PatchModel,
    triples: Mapping[str, Sequence[Triple]],
    sets: Sequence[Sequence[str]],
    *,
    donor: PatchModel | None = None,
    kinds: Sequence[str] = ("head", "mlp"),
    position: str = "last",
    max_batch_tokens: int = MAX_BATCH_TOKENS,
) -> list[dict[str, float]]:
    """Patches exactly the components of each set in turn: accuracy by group of triples, for each set.

    Args:
        triples, kinds: as `answers_with` takes them.
        donor: the model that runs the alternates, so that another model's activations are put in; None: the same.

    Raises:
        InputError: a component that these kinds do not have in this model, a donor of another architecture.
    """
    layout = Layout.build(kinds, model.dims)
    chosen = [_numbers(layout, components) for components in sets]
    second = None
    if donor is not None:
        check_alike(model, donor)
        second = SecondModel.of(donor)
    prepared = prepare(
        model, layout, triples, position=position, max_batch_tokens=max_batch_tokens, donor=second
    )
    try:
        return list(evaluate_sets(layout, prepared, chosen))
    finally:
        prepared.close()


def _numbers(layout: Layout, components: Sequence[str]) -> list[int]:
    """Places of components in the layout; InputError for one that it does not have."""
    places = {name: place for place, name in enumerate(layout.names)}
    unknown = [name for name in components if name not in places]
    if unknown:
        raise InputError(
            f"component '{unknown[0]}' is not one of this model's {', '.join(layout.kinds)} components "
            f"({layout.names[0]} to {layout.names[-1]})"
        )
    return [places[name] for name in components]
