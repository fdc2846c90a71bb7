"""What each head does on the prompts of indirect objects: where it looks, whether it copies names, what it writes.

The three questions of Wang et al. 2022 ("Interpretability in the Wild", arXiv 2211.00593), asked of every head:

- attention from the last token (END), from the second mention of the subject (S2), from the token after its first (S1+1),
  and from the tokens of the names' clause behind both names;
- the copying score: a name as it stands in the stream after the first block goes through the head's W_V and W_O and
  through the final norm to the unembedding; the share of names that are then among the top 5 (for a negative head: among
  the top 5 of the negated output). Biases, which say nothing about the name, are left out;
- what the head writes at END: whether IO (or S) is among the top 5 tokens that its output raises, above S (or IO).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchkit.data import Batch, Pair, positions
from patchkit.model import Dims, PatchModel, Site
from patchkit.results.ioi import QUERIES, TARGETS, Attention, HeadBehaviour
from patchkit.runtime import MAX_BATCH_TOKENS, Cost, run_program
from patchkit.studies._ioi_repeats import RepeatScores
from patchkit.tracing import attention_from, capture
from patchkit.tracing.senders import head_outputs

#: A name counts as raised where it is among so many tokens (Wang et al. 2022).
TOP = 5
_NAMES = ("io", "s1", "s2")


@dataclass(frozen=True, eq=False)
class Behaviours:
    """The behaviour of every head.

    Attributes:
        attention: mean attention mass from each of QUERIES to each of TARGETS; over targets it sums to 1.
        even: the same of a head that looks at all tokens alike.
        copying, negative_copying: share of names.
        writes: share of prompts whose IO, and whose S, is in the top 5 of what it writes at END, above the other.
        repeats: on random tokens that come twice.
    """

    attention: Float[Tensor, "query target layer head"]
    even: Float[Tensor, "query target"]
    copying: Float[Tensor, "layer head"]
    negative_copying: Float[Tensor, "layer head"]
    writes: Float[Tensor, "2 layer head"]
    repeats: RepeatScores

    def of(self, layer: int, head: int) -> HeadBehaviour:
        """The numbers of one head."""
        return HeadBehaviour(
            attention=named(self.attention[:, :, layer, head]),
            copying=float(self.copying[layer, head]),
            negative_copying=float(self.negative_copying[layer, head]),
            writes_io=float(self.writes[0, layer, head]),
            writes_s=float(self.writes[1, layer, head]),
            previous=float(self.repeats.previous[layer, head]),
            duplicate=float(self.repeats.duplicate[layer, head]),
            induction=float(self.repeats.induction[layer, head]),
        )


def named(masses: Float[Tensor, "query target"]) -> Attention:
    """Attention by the names of places."""
    return {
        query: dict(zip(TARGETS, row, strict=True))
        for query, row in zip(QUERIES, masses.tolist(), strict=True)
    }


def measure_behaviour(
    model: PatchModel, pairs: Sequence[Pair], repeats: RepeatScores, max_batch_tokens: int = MAX_BATCH_TOKENS
) -> Behaviours:
    """Everything but `repeats` on the clean prompts of `pairs`, which need the spans of the IOI task."""
    asks = [Asks(pair, query, token) for pair in pairs for query in QUERIES for token in asking(pair, query)]
    attention = run_program(Looks(), model, asks, max_batch_tokens=max_batch_tokens, label="attention")
    effects = run_program(Effects(), model, pairs, max_batch_tokens=max_batch_tokens, label="what heads do")
    attention, copied, written = (
        each.float() for each in (attention["mass"], effects["copied"], effects["written"])
    )
    names = len(_NAMES) * len(pairs)
    return Behaviours(
        attention=attention / len(pairs),
        even=_even(pairs),
        copying=copied[0] / names,
        negative_copying=copied[1] / names,
        writes=written / len(pairs),
        repeats=repeats,
    )


def asking(pair: Pair, query: str) -> list[int]:
    """The tokens whose attention is measured for one of QUERIES."""
    start, end = pair.spans[query]
    if query == "clause":
        start = max(pair.spans["io"][1], pair.spans["s1"][1])
        return list(range(start, end))
    return [end - 1]


def token_targets(pair: Pair, asks: int) -> list[str]:
    """Which of TARGETS each token of the prompt is, seen from token `asks`."""
    start, end = pair.spans["clause"]
    found = ["elsewhere"] * len(pair.clean_ids)
    found[0] = "first token"
    found[start:end] = ["rest of clause"] * (end - start)
    if asks:
        found[asks - 1] = "token before"
    for target in ("last", "s2", "s1+1", "s1", "io"):
        start, end = pair.spans[target]
        found[start:end] = [target] * (end - start)
    return found


def _even(pairs: Sequence[Pair]) -> Float[Tensor, "query target"]:
    """What each place gets where all tokens up to the one that attends get the same."""
    sums = torch.zeros(len(QUERIES), len(TARGETS))
    for number, query in enumerate(QUERIES):
        for pair in pairs:
            asks = asking(pair, query)
            for token in asks:
                for target in token_targets(pair, token)[: token + 1]:
                    sums[number, TARGETS.index(target)] += 1 / (len(asks) * (token + 1))
    return sums / len(pairs)


@dataclass(frozen=True)
class Asks:
    """One of QUERIES of a pair, and a token of it that attends."""

    pair: Pair
    query: str
    token: int


@dataclass(frozen=True)
class Looks:
    """Program: attention `mass` by places, added up over pairs; a query of several tokens counts as their mean."""

    @property
    def summed(self) -> frozenset[str]:
        return frozenset({"mass"})

    def tokens(self, item: Asks) -> int:
        return len(item.pair.clean_ids)

    def run(self, model: PatchModel, items: Sequence[Asks]) -> dict[str, Tensor]:
        batch = Batch.from_ids([item.pair.clean_ids for item in items], model.pad_id).to(model.embed_device)
        target = torch.zeros(len(items), batch.width, len(TARGETS))
        queries = torch.zeros(len(items), len(QUERIES))
        for row, item in enumerate(items):
            queries[row, QUERIES.index(item.query)] = 1 / len(asking(item.pair, item.query))
            places = token_targets(item.pair, item.token)
            for place, name in enumerate(places, batch.width - len(places)):
                target[row, place, TARGETS.index(name)] = 1
        columns = positions(batch, [item.token for item in items])
        found = attention_from(model, batch, range(model.dims.n_layers), columns)
        mass = [
            torch.einsum("bhw,bwt,bq->qth", pattern.cpu().float(), target, queries)
            for pattern in found.values()
        ]
        return {"mass": torch.stack(mass, dim=2)}

    def cost(self, dims: Dims, items: Sequence[Asks]) -> Cost:
        """A forward over every prompt, and what all heads give to all its tokens."""
        tokens = sum(len(item.pair.clean_ids) for item in items)
        return Cost(float(tokens), dims.itemsize * tokens * dims.n_layers * dims.n_heads)


@dataclass(frozen=True)
class Effects:
    """Program: in how many cases heads have `copied` a name, and `written` one of them, `[2, layer, head]`."""

    @property
    def summed(self) -> frozenset[str]:
        return frozenset({"copied", "written"})

    def tokens(self, item: Pair) -> int:
        return len(item.clean_ids)

    def run(self, model: PatchModel, items: Sequence[Pair]) -> dict[str, Tensor]:
        batch = Batch.from_ids([pair.clean_ids for pair in items], model.pad_id).to(model.embed_device)
        return {"copied": _copied(model, items, batch), "written": _written(model, items, batch)}

    def cost(self, dims: Dims, items: Sequence[Pair]) -> Cost:
        """Four forwards; of every pair what each head writes, and one head's logits with those it is compared with."""
        writes = (len(_NAMES) + 1) * dims.n_heads * dims.d_model + 3 * len(_NAMES) * dims.vocab_size
        forwards = (len(_NAMES) + 1) * sum(len(item.clean_ids) for item in items)
        return Cost(float(forwards), 4 * len(items) * writes)


def _copied(model: PatchModel, pairs: Sequence[Pair], batch: Batch) -> Float[Tensor, "2 layer head"]:
    """How many names each head raises, and how many its negated output does."""
    before, after = Site("resid_pre", 0), Site("resid_post", 0)
    streams = {before: [], after: []}
    ids: list[int] = []
    for name in _NAMES:
        at = [pair.spans[name][1] - 1 for pair in pairs]
        kept = capture(model, batch, (before, after), columns=positions(batch, at))
        ids += [pair.clean_ids[place] for pair, place in zip(pairs, at, strict=True)]
        for site, values in kept.values.items():
            streams[site].append(values)
    counts = torch.zeros(2, model.dims.n_layers, model.dims.n_heads)
    with torch.no_grad():
        for layer in range(model.dims.n_layers):
            stream = torch.cat(streams[after if layer else before])
            sent = _through(model, layer, stream)
            for head in range(model.dims.n_heads):
                raised = _raised(model, sent[:, head])
                tokens = torch.tensor(ids, device=raised.device)
                counts[0, layer, head] = _among_top(raised, tokens).sum()
                counts[1, layer, head] = _among_top(-raised, tokens).sum()
    return counts


def _written(model: PatchModel, pairs: Sequence[Pair], batch: Batch) -> Float[Tensor, "2 layer head"]:
    """In how many prompts each head's output at END raises IO more than S, and in how many S more than IO."""
    sites = [Site("z", layer) for layer in range(model.dims.n_layers)]
    found = capture(model, batch, sites, columns=positions(batch, -1))
    counts = torch.zeros(2, model.dims.n_layers, model.dims.n_heads)
    with torch.no_grad():
        for site in sites:
            sent = _behind(model, site.layer, head_outputs(model, site.layer, found.values[site]))
            for head in range(model.dims.n_heads):
                raised = _raised(model, sent[:, head])
                io = torch.tensor([pair.answer_id for pair in pairs], device=raised.device)
                subject = torch.tensor([pair.wrong_id for pair in pairs], device=raised.device)
                lead = (raised.gather(1, io[:, None]) - raised.gather(1, subject[:, None]))[:, 0]
                counts[0, site.layer, head] = (_among_top(raised, io) & (lead > 0)).sum()
                counts[1, site.layer, head] = (_among_top(raised, subject) & (lead < 0)).sum()
    return counts


def _through(
    model: PatchModel, layer: int, stream: Float[Tensor, "name d_model"]
) -> Float[Tensor, "name head d_model"]:
    """What each head writes where it attends to nothing but a token with this stream."""
    norm, value = model.attention_norm(layer), model.projections(layer)[2]
    read = stream if norm is None else norm.unit(stream) * norm.weight.to(stream.device)
    weight = value.weight.to(read)
    values = torch.einsum("nd,hde->nhe", read, weight)
    values = values.repeat_interleave(model.dims.n_heads // model.dims.n_kv_heads, dim=1)
    return _behind(model, layer, head_outputs(model, layer, values))


def _behind(
    model: PatchModel, layer: int, output: Float[Tensor, "name head d_model"]
) -> Float[Tensor, "name head d_model"]:
    """The direction of a head's output behind the norm between heads and stream, where there is one."""
    norm = model.attention_post_norm(layer)
    return output if norm is None else norm.unit(output) * norm.weight.to(output.device)


def _raised(model: PatchModel, written: Float[Tensor, "name d_model"]) -> Float[Tensor, "name vocab"]:
    """How much each token's logit is raised, up to a positive factor of each row."""
    norm = model.final_norm()
    unembedding = attrgetter(model.arch.unembed)(model.hf).weight
    normed = norm.unit(written) * norm.weight.to(written.device)
    return normed.to(unembedding.device) @ unembedding.to(normed.dtype).T


def _among_top(logits: Float[Tensor, "name vocab"], tokens: Int[Tensor, " name"]) -> Tensor:
    own = logits.gather(1, tokens[:, None])
    # A tie counts against: a head that writes nothing raises nothing.
    return (logits >= own).sum(1) <= TOP
