"""Triples of some desiderata that are ready for masked runs, as the method sees them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchkit.data import Triple, span_positions
from patchkit.errors import InputError
from patchkit.methods._mask_layout import Layout
from patchkit.methods._mask_prepare import Masked, Preparation
from patchkit.methods._mask_steps import Answers, Facts, Gradient
from patchkit.model import PatchModel
from patchkit.runtime import MAX_BATCH_TOKENS, SecondModel, Session
from patchkit.runtime.held import Held

#: Masks of one step: here so few that Ctrl-C and the progress do not wait long. A job takes more, as long as they are
#: few numbers to send.
_TOGETHER, _SENT_NUMBERS = 16, 1 << 22


@dataclass
class Tally:
    """What was really paid, in token-forwards (see `patchkit.runtime.Cost`)."""

    token_forwards: float = 0.0


@dataclass(frozen=True, eq=False)
class Prepared:
    """All triples of some desiderata, ready for masked runs; every run is added to `tally`.

    Attributes:
        names: the desiderata; `group` counts them.
        sizes: triples in each.
        kinds: `dependence`, `invariance` or `mixed`.
        sessions: where the triples are open, one after the other; in a job on a model's host, what it holds open.
        group, target, original_answer: of each triple; the answer is the model's own.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    kinds: tuple[str, ...]
    sessions: tuple[Session | Held, ...]
    group: Int[Tensor, " triple"]
    target: Int[Tensor, " triple"]
    original_answer: Int[Tensor, " triple"]
    tally: Tally

    @property
    def hosted(self) -> bool:
        """Whether every step is sent to a host."""
        return self.sessions[0].model.hosted is not None

    def answers(self, keep: Float[Tensor, " n"]) -> Int[Tensor, " triple"]:
        """The model's answer to every original under a mask: the argmax over the whole vocabulary."""
        return self.answers_under(keep[None])[:, 0]

    def answers_under(self, keeps: Float[Tensor, "mask n"]) -> Int[Tensor, "triple mask"]:
        """The answers under each of some masks, in one step; see `together`."""
        return torch.cat([self._run(session, Answers(keeps))["answer"] for session in self.sessions])

    def together(self, n: int) -> int:
        """Of many masks over `n` components, how many to give to one step."""
        return max(1, _SENT_NUMBERS // n) if self.hosted else _TOGETHER

    def gradient(
        self, loss: str, keep: Float[Tensor, " n"], weights: Float[Tensor, " triple"]
    ) -> tuple[float, Float[Tensor, " n"]]:
        """The weighted loss under a mask and its gradient; not of triples that were pooled."""
        (session,) = self.sessions
        found = self._run(session, Gradient(loss, keep, weights))
        return float(found["loss"]), found["gradient"].to(keep.dtype)

    def close(self) -> None:
        """Lets go of what is kept of the triples."""
        for session in self.sessions:
            session.close()

    def _run(self, session: Session | Held, step: Gradient | Answers) -> dict[str, Tensor]:
        found = session.run(step)
        self.tally.token_forwards += float(found["paid"])
        return found


def prepare(
    model: PatchModel,
    layout: Layout,
    triples: Mapping[str, Sequence[Triple]],
    *,
    position: str = "last",
    reuse: bool = True,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    tally: Tally | None = None,
    donor: SecondModel | None = None,
) -> Prepared:
    """Caches everything about the triples that no mask changes.

    Args:
        triples: by desideratum.
        position: `last`, or the name of a one-token span that every triple has.
        reuse: see `Preparation`.
        tally: where the cost is counted.
        donor: see `Preparation`.

    Raises:
        InputError: a triple without the span, an empty desideratum.
    """
    for name, members in triples.items():
        if not members:
            raise InputError(f"desideratum '{name}' has no triples")
    members = [triple for each in triples.values() for triple in each]
    sizes = tuple(len(each) for each in triples.values())
    group = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    places = zip(members, *span_positions(members, position), strict=True)
    items = [Masked(*place, number) for number, place in enumerate(places)]
    session = Session(
        Preparation(layout, reuse, donor), model, items, max_batch_tokens=max_batch_tokens, label="mask"
    )
    tally = tally or Tally()
    try:
        found = session.run(Facts())
    except BaseException:
        session.close()
        raise
    tally.token_forwards += float(found["paid"])
    kinds = tuple(_kind(found["invariant"][group == number]) for number in range(len(sizes)))
    return Prepared(
        tuple(triples), sizes, kinds, (session,), group, found["target"], found["original_answer"], tally
    )


def pool(parts: Sequence[Prepared]) -> Prepared:
    """All triples of several preparations as one, desiderata of one name together; nothing is run again."""
    names = tuple(dict.fromkeys(name for part in parts for name in part.names))
    sizes, kinds = dict.fromkeys(names, 0), {}
    for part in parts:
        for name, size, kind in zip(part.names, part.sizes, part.kinds, strict=True):
            sizes[name] += size
            kinds[name] = kind if kinds.get(name, kind) == kind else "mixed"
    groups = [torch.tensor([names.index(name) for name in part.names])[part.group] for part in parts]
    return Prepared(
        names,
        tuple(sizes.values()),
        tuple(kinds[name] for name in names),
        tuple(session for part in parts for session in part.sessions),
        torch.cat(groups),
        torch.cat([part.target for part in parts]),
        torch.cat([part.original_answer for part in parts]),
        parts[0].tally,
    )


def _kind(invariant: Bool[Tensor, " triple"]) -> str:
    if bool(invariant.all()):
        return "invariance"
    return "mixed" if bool(invariant.any()) else "dependence"
