"""Sets of triples: by desideratum, by split, and the checks that a run needs before it starts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from patchkit.data.desiderata import Split, Triple
from patchkit.errors import InputError


def group(triples: Sequence[Triple], split: Split) -> dict[str, list[Triple]]:
    """The triples of one split by desideratum, in the order of first appearance.

    InputError if a triple has no split, or if a desideratum has none in this one.
    """
    groups: dict[str, list[Triple]] = {triple.desideratum: [] for triple in triples}
    for triple in triples:
        if triple.split is None:
            raise InputError(f"{_name(triple)} has no split; give `split` to all lines, or split them first")
        if triple.split == split:
            groups[triple.desideratum].append(triple)
    empty = [name for name, members in groups.items() if not members]
    if empty or not groups:
        raise InputError(
            f"desideratum {(empty or ['any'])[0]!r} has no {split} triples; expected at least one"
        )
    return groups


def split_if_needed(triples: Sequence[Triple], seed: int, test_fraction: float = 0.5) -> list[Triple]:
    """The same triples, each with a split; those of a file that has splits are returned as they are.

    Original prompts are dealt at random, desideratum by desideratum, so that no original prompt is in both
    splits and every desideratum has about `test_fraction` of its prompts in test. InputError where that is
    impossible.
    """
    if not 0 < test_fraction < 1:
        raise InputError(f"test_fraction must be between 0 and 1, found {test_fraction}")
    if all(triple.split is not None for triple in triples):
        return list(triples)
    rng = random.Random(seed)
    side: dict[tuple[int, ...], Split] = {}
    names = list(dict.fromkeys(triple.desideratum for triple in triples))
    for name in names:
        prompts = list(dict.fromkeys(triple.original_ids for triple in triples if triple.desideratum == name))
        wanted = min(max(1, round(test_fraction * len(prompts))), len(prompts) - 1)
        fresh = [prompt for prompt in prompts if prompt not in side]
        rng.shuffle(fresh)
        missing = max(0, wanted - sum(side.get(prompt) == "test" for prompt in prompts))
        side.update({prompt: "test" if index < missing else "train" for index, prompt in enumerate(fresh)})
        if {side[prompt] for prompt in prompts} != {"train", "test"}:
            raise InputError(
                f"desideratum {name!r} has {len(prompts)} different original prompts, too few to hold some "
                "out for "
                "testing; give more triples, or `split` in the file"
            )
    return [replace(triple, split=side[triple.original_ids]) for triple in triples]


def require_disjoint(triples: Sequence[Triple]) -> None:
    """InputError, naming both lines, if an original prompt is in train and in test: held-out scores would not
    be.
    """
    first: dict[tuple[int, ...], Triple] = {}
    for triple in triples:
        other = first.setdefault(triple.original_ids, triple)
        if other.split != triple.split:
            raise InputError(
                f"{_name(triple)} has the same original prompt as {_name(other)}, one is {triple.split} and "
                "one is "
                f"{other.split}; keep a prompt in one split"
            )


def require_equal_lengths(triples: Sequence[Triple]) -> None:
    """InputError, naming the triple, if original and alternate differ in length.

    It matters where anything but the last token or a named span is patched: positions would not correspond.
    """
    for triple in triples:
        if len(triple.original_ids) != len(triple.alternate_ids):
            raise InputError(
                f"{_name(triple)}: original has {len(triple.original_ids)} tokens and alternate "
                f"{len(triple.alternate_ids)}; patching positions other than `last` or a named span needs "
                "equal lengths"
            )


def span_positions(triples: Sequence[Triple], name: str) -> tuple[list[int], list[int]]:
    """Unpadded token indices, one per triple, of a span of one token: in the originals and in the alternates.

    `last` is every prompt's last token. InputError names the triple that has no such span or one that is
    longer.
    """
    if name == "last":
        return [len(t.original_ids) - 1 for t in triples], [len(t.alternate_ids) - 1 for t in triples]
    originals, alternates = [], []
    for triple in triples:
        original, alternate = triple.span(name)
        if original[1] - original[0] != 1:
            raise InputError(f"{_name(triple)}: span {name!r} is {list(original)}; expected one token")
        originals.append(original[0])
        alternates.append(alternate[0])
    return originals, alternates


def drop_uninformative(triples: Sequence[Triple]) -> tuple[list[Triple], dict[str, int]]:
    """The triples whose target can tell success from failure, and how many of the others there were, by
    reason.

    Left out: an invariance whose alternate has the original's answer too, because then patching everything
    would pass. Triples whose answers are not known are kept.
    """
    kept, excluded = [], {}
    for triple in triples:
        if triple.kind == "invariance" and triple.alternate_answer_id == triple.original_answer_id:
            reason = f"{triple.desideratum}: the alternate has the original's answer"
            excluded[reason] = excluded.get(reason, 0) + 1
        else:
            kept.append(triple)
    return kept, excluded


def _name(triple: Triple) -> str:
    return f"{triple.where or 'a triple'} ({triple.desideratum})"
