"""Scoring a given set of components on any triples: forms it was not trained on, other tasks, other people's sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from patchkit.data import Triple
from patchkit.errors import InputError
from patchkit.methods._mask_evaluate import share_by_name
from patchkit.methods._mask_layout import Layout
from patchkit.methods._mask_prepared import prepare
from patchkit.model import PatchModel
from patchkit.runtime import MAX_BATCH_TOKENS


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
    places = {name: place for place, name in enumerate(layout.names)}
    unknown = [name for name in components if name not in places]
    if unknown:
        raise InputError(
            f"component '{unknown[0]}' is not one of this model's {', '.join(kinds)} components "
            f"({layout.names[0]} to {layout.names[-1]})"
        )
    prepared = prepare(model, layout, triples, position=position, max_batch_tokens=max_batch_tokens)
    try:
        answers = prepared.answers(layout.keep_all_but([places[name] for name in components]))
    finally:
        prepared.close()
    return share_by_name(prepared, answers == prepared.target), answers.tolist()
