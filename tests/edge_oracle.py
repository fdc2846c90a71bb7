"""One edge at a time, one unpadded prompt, plain torch hooks: what exact edges and path patching are compared with.

Nothing of the stream is computed here by arithmetic: what a receiver makes of a changed stream is read off a run of its
own, in which the whole layer reads it, and put into the base run there alone. `check_edges` and `check_paths` are the
comparisons: the tests of the methods must pass them, and those of mutations must make them fail.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from operator import attrgetter

import torch
from torch import Tensor
from transformers import PreTrainedModel

from patchkit.data import Pair, read_places
from patchkit.methods._edge_options import EdgeOptions
from patchkit.methods.edge_patching import patch_edges
from patchkit.methods.path_patching import patch_paths
from patchkit.model import EdgeGraph, PatchModel
from patchkit.results.edge_scores import EdgeScores
from patchkit.results.paths import PathResult
from patchkit.results.query_heads import by_query_graph
from tests import oracles
from tests.comparisons import agree, pair
from tests.node_oracle import Score, logit_diff, prompts

#: Families whose norms have the model's own precision; those of all others are in float32 always.
PRECISE = ("gpt2", "neox-parallel", "neox-sequential")
Values = dict[oracles.Place, Tensor]
#: A sender or receiver: (what it is, layer, head). Letters q, k, v are a head's inputs.
Node = tuple[str, int, int]


def tolerance_of(family: str, dtype: torch.dtype) -> float:
    if dtype == torch.float32:
        return 1e-5
    return 1e-10 if family in PRECISE else 1e-6


def node(name: str) -> Node:
    """`input`, `logits`, `m2`, `a1.h3` or `a1.h3<k>` in parts."""
    if name in ("input", "logits"):
        return name, 0, 0
    if name[0] == "m":
        return "mlp", int(name[1:]), 0
    head, _, letter = name[1:].partition("<")
    layer, _, number = head.partition(".h")
    return letter[:1] or "head", int(layer), int(number)


def embedded(hf: PreTrainedModel, values: Values) -> Tensor:
    """Token embeddings as they enter the stream, without GPT-2's embedding of positions."""
    stream = values["resid_pre", 0]
    if hf.config.model_type != "gpt2":
        return stream
    return stream - attrgetter("transformer.wpe.weight")(hf).detach()[: len(stream)]


def senders_of(hf: PreTrainedModel, ids: Sequence[int]) -> Values:
    """What every sender of a run holds: z and MLP outputs by layer, and the `input`."""
    values, _ = oracles.read(hf, ids)
    kept = {place: value for place, value in values.items() if place[0] in ("z", "mlp_out")}
    return kept | {("input", 0): embedded(hf, values)}


def replacement(hf: PreTrainedModel, pairs: Sequence[Pair], each: Pair, options: EdgeOptions) -> Values:
    """What is put in for every sender in one pair."""
    source = senders_of(hf, prompts(each, options.direction)[1])
    if options.ablation == "resample":
        return source
    if options.ablation == "zero":
        return {place: torch.zeros_like(value) for place, value in source.items()}
    runs = [senders_of(hf, prompts(other, options.direction)[1]) for other in pairs]
    made = {}
    for place, value in source.items():
        if options.ablation == "mean":
            made[place] = torch.cat([run[place] for run in runs]).mean(0).expand_as(value)
        else:
            made[place] = torch.stack([run[place] for run in runs]).mean(0)
    return made


def at_tokens(own: Tensor, new: Tensor, tokens: Sequence[int]) -> Tensor:
    mixed = own.clone()
    mixed[list(tokens)] = new[list(tokens)]
    return mixed


def sender_edits(
    hf: PreTrainedModel, sender: Node, own: Values, new: Values, tokens: Sequence[int]
) -> Values:
    """Site values of the base run in which the sender alone is replaced, at some tokens."""
    what, layer, head = sender
    if what == "input":
        mixed = at_tokens(embedded(hf, own), new["input", 0], tokens)
        return {("resid_pre", 0): own["resid_pre", 0] - embedded(hf, own) + mixed}
    if what == "mlp":
        return {("mlp_out", layer): at_tokens(own["mlp_out", layer], new["mlp_out", layer], tokens)}
    z = own["z", layer].clone()
    z[:, head] = at_tokens(z[:, head], new["z", layer][:, head], tokens)
    return {("z", layer): z}


def put(values: Mapping[oracles.Place, Tensor]) -> dict[oracles.Place, oracles.Edit]:
    """Edits that replace whole activations."""
    return {place: (lambda _, value=value: value.clone()) for place, value in values.items()}


def gain(hf: PreTrainedModel, ids: Sequence[int], sender: Node, own: Values, edits: Values) -> Tensor:
    """What the stream gains right behind the sender when it is replaced."""
    what, layer, _ = sender
    if what == "head":
        run = oracles.squeezed(oracles.run(hf, ids, put(edits)).values)
        return run["attn_out", layer] - own["attn_out", layer]
    ((place, value),) = edits.items()
    return value - own[place]


def is_parallel(hf: PreTrainedModel) -> bool:
    return bool(getattr(hf.config, "use_parallel_residual", False))


def stream_read(hf: PreTrainedModel, receiver: Node) -> oracles.Place:
    """The stream that a receiver reads."""
    what, layer, _ = receiver
    if what == "logits":
        return "resid_post", hf.config.num_hidden_layers - 1
    return ("resid_mid" if what == "mlp" and not is_parallel(hf) else "resid_pre"), layer


def edge_logits(
    hf: PreTrainedModel, ids: Sequence[int], receiver: Node, own: Values, read: Values, by_query: bool
) -> Tensor:
    """Last-token logits of the base run in which one receiver alone reads another stream.

    Args:
        read: the values of a run in which everything that reads the receiver's stream reads that other one.
    """
    what, layer, head = receiver
    if what in ("logits", "mlp"):
        place = stream_read(hf, receiver) if what == "logits" else ("mlp_in", layer)
        return oracles.patched_logits(hf, ids, put({place: read[place]}))
    kind = f"{what}_proj"
    heads, kv_heads = oracles._heads(hf.config)
    number = head // (heads // kv_heads) if by_query and what != "q" else head
    value = own[kind, layer].clone()
    value[:, number] = read[kind, layer][:, number]
    if not by_query or what == "q":
        return oracles.patched_logits(hf, ids, put({(kind, layer): value}))
    # One query head alone sees the changed key or value of its group.
    seen = oracles.squeezed(oracles.run(hf, ids, put({(kind, layer): value})).values)
    z = own["z", layer].clone()
    z[:, head] = seen["z", layer][:, head]
    return oracles.patched_logits(hf, ids, put({("z", layer): z}))


class EdgeOracle:
    """Effects of edges in one pair at one place; runs that several edges share are made once."""

    def __init__(
        self,
        hf: PreTrainedModel,
        pairs: Sequence[Pair],
        each: Pair,
        tokens: Sequence[int],
        options: EdgeOptions,
        score: Score = logit_diff,
    ) -> None:
        self.hf, self.each, self.tokens, self.score = hf, each, tokens, score
        self.ids = prompts(each, options.direction)[0]
        self.own, self.logits = oracles.read(hf, self.ids)
        self.new = replacement(hf, pairs, each, options)
        self.gained = functools.cache(self._gained)
        self.read = functools.cache(self._read)

    def effects(self, edges: Sequence[str], *, by_query: bool = False) -> Tensor:
        """Of each edge, by name."""
        found = []
        for name in edges:
            sender, receiver = (node(end) for end in name.split("->"))
            read = self.read(sender, stream_read(self.hf, receiver))
            patched = edge_logits(self.hf, self.ids, receiver, self.own, read, by_query)
            found.append(self.score(patched, self.logits, self.each) - self.metric(self.logits))
        return torch.stack(found)

    def metric(self, logits: Tensor) -> Tensor:
        return self.score(logits, self.logits, self.each)

    def _gained(self, sender: Node) -> Tensor:
        edits = sender_edits(self.hf, sender, self.own, self.new, self.tokens)
        return gain(self.hf, self.ids, sender, self.own, edits)

    def _read(self, sender: Node, stream: oracles.Place) -> Values:
        changed = put({stream: self.own[stream] + self.gained(sender)})
        return oracles.squeezed(oracles.run(self.hf, self.ids, changed).values)


def some_edges(graph: EdgeGraph, per_type: int, seed: int = 0) -> list[str]:
    """Edges of every type of sender and receiver, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    by_type: dict[tuple[str, str], list[str]] = {}
    for sender, receiver in graph.real.nonzero().tolist():
        name = graph.edge_name(sender, receiver)
        start, _, end = name.partition("->")
        by_type.setdefault((node(start)[0], node(end)[0]), []).append(name)
    chosen: list[str] = []
    for names in by_type.values():
        order = torch.randperm(len(names), generator=generator)[:per_type]
        chosen += [names[place] for place in order.tolist()]
    return chosen


def check_edges(
    family: str,
    pairs: Sequence[Pair],
    edges: Sequence[str] | int = 1,
    dtype: torch.dtype = torch.float64,
    score: Score = logit_diff,
    by_query: bool = False,
    **options: object,
) -> EdgeScores:
    """Edges of a family (a number: so many of every type) equal the oracle in every pair, at every place."""
    model, twin = pair(family, dtype)
    tolerance = tolerance_of(family, dtype)
    return check_edges_of(model, twin, pairs, edges, score, tolerance, by_query, **options)


def check_edges_of(
    model: PatchModel,
    twin: PreTrainedModel,
    pairs: Sequence[Pair],
    edges: Sequence[str] | int,
    score: Score,
    tolerance: float,
    by_query: bool = False,
    **options: object,
) -> EdgeScores:
    asked = EdgeOptions(**options)  # type: ignore[arg-type]
    graph = EdgeGraph.of(model.dims)
    names = some_edges(graph, edges) if isinstance(edges, int) else list(edges)
    mask = graph.find_edges(names)
    scores = patch_edges(model, pairs, asked, edges=mask, keep_pairs=True, by_query=by_query)
    covered = read_places(asked.positions, pairs).covered
    by_hooks = [
        [EdgeOracle(twin, pairs, each, tokens, asked, score) for tokens in covered[row]]
        for row, each in enumerate(pairs)
    ]
    check_scores(scores, names, by_hooks, tolerance)
    for row, each in enumerate(pairs):
        first = by_hooks[row][0]
        logits = oracles.read(twin, prompts(each, asked.direction)[1])[1]
        for kind, expected in (("base", first.metric(first.logits)), ("source", first.metric(logits))):
            found = getattr(scores, f"{kind}_metric")[row]
            agree(found, expected, f"metric of the {kind} run of {each.id}", tolerance)
    assert (scores.by_query is not None) == (by_query and model.dims.group > 1)
    if scores.by_query is not None:
        check_copies(scores, names, [of_pair[0] for of_pair in by_hooks], tolerance)
    return scores


def check_scores(
    scores: EdgeScores, names: Sequence[str], by_hooks: Sequence[Sequence[EdgeOracle]], tolerance: float
) -> None:
    """Every pair's effects, at every place, and what is made of them."""
    assert scores.per_pair is not None
    moved = torch.zeros(len(names), dtype=torch.bool)
    for row, places in enumerate(by_hooks):
        for place, oracle in enumerate(places):
            mine = scores.per_pair[row, place] if scores.placed else scores.per_pair[row]
            for number, (name, wanted) in enumerate(zip(names, oracle.effects(names), strict=True)):
                what = f"effect of {name} in pair {oracle.each.id} at {scores.places[place]}"
                agree(mine[scores.graph.find_edge(name)], wanted, what, tolerance)
                moved[number] |= bool(wanted.abs() > 1e-4)
    assert moved.float().mean() > 0.3, "most of these edges change nothing: the comparison says little"
    asked = scores.graph.find_edges(names)
    assert bool(scores.mean[..., ~asked].isnan().all()) and not bool(scores.mean[..., asked].isnan().any())
    agree(scores.mean[..., asked], scores.per_pair[..., asked].mean(0), "mean over pairs", 1e-6)
    agree(scores.mean_abs[..., asked], scores.per_pair[..., asked].abs().mean(0), "mean of sizes", 1e-6)


def check_copies(
    scores: EdgeScores, names: Sequence[str], by_hooks: Sequence[EdgeOracle], tolerance: float
) -> None:
    """Means over pairs of the edges by query head, at one place."""
    native = scores.graph
    wide = by_query_graph(native)
    shared = [name for name in names if name.endswith(("<k>", "<v>"))]
    copies = [name for each in shared for name in copies_of(each, native.n_heads // native.n_kv_heads)]
    expected = torch.stack([oracle.effects(copies, by_query=True) for oracle in by_hooks])
    mean, mean_abs = scores.by_query or (scores.mean, scores.mean_abs)
    others = [name for name in names if name not in shared]
    for name in others:
        assert torch.equal(mean[wide.find_edge(name)], scores.mean[native.find_edge(name)]), name
    asked = wide.find_edges([*copies, *others])
    assert bool(mean[~asked].isnan().all()) and bool(mean_abs[~asked].isnan().all())
    for name, values in zip(copies, expected.T, strict=True):
        edge = wide.find_edge(name)
        agree(mean[edge], values.mean(), f"mean effect of {name} by query head", tolerance)
        agree(mean_abs[edge], values.abs().mean(), f"mean size of {name} by query head", tolerance)


def copies_of(native: str, group: int) -> list[str]:
    """The edges by query head of an edge into a key or value."""
    start, _, end = native.partition("->")
    what, layer, head = node(end)
    return [f"{start}->a{layer}.h{head * group + member}<{what}>" for member in range(group)]


# Path patching.


def path_logits(
    hf: PreTrainedModel,
    ids: Sequence[int],
    sender: Node,
    receivers: Sequence[Node],
    own: Values,
    new: Values,
    tokens: Sequence[int],
    mlps: str,
) -> Tensor:
    """Last-token logits of a sender's paths to some receivers, in two or three passes of hooks."""
    replaced = sender_edits(hf, sender, own, new, tokens)
    held = ("z",) if mlps == "recomputed" else ("z", "mlp_out")
    frozen = {place: value for place, value in own.items() if place[0] in held} | replaced
    second = oracles.run(hf, ids, put(frozen))
    if all(what == "logits" for what, _, _ in receivers):
        return second.logits
    seen = oracles.squeezed(second.values)
    inserted: dict[oracles.Place, oracles.Edit] = {}
    for what, layer, head in receivers:
        if what != "logits":
            place = ("mlp_in", layer) if what == "mlp" else (f"{what}_proj", layer)
            inserted[place] = inserting(inserted.get(place), seen[place], None if what == "mlp" else head)
    third = oracles.run(hf, ids, inserted)
    if all(what != "logits" for what, _, _ in receivers):
        return third.logits
    # The logits read the run in which the sender is replaced and heads are held at what the third pass gave.
    after = oracles.squeezed(third.values)
    edits = {place: value for place, value in after.items() if place[0] in held}
    if mlps == "recomputed":
        edits |= {place: seen[place] for place in inserted if place[0] == "mlp_in"}
    return oracles.run(hf, ids, put(edits | sender_edits(hf, sender, after, new, tokens))).logits


def inserting(before: oracles.Edit | None, new: Tensor, head: int | None) -> oracles.Edit:
    """An edit after another one: the whole activation, or one head of it."""

    def edit(value: Tensor) -> Tensor:
        value = value if before is None else before(value)
        if head is None:
            return new.clone()
        value[:, head] = new[:, head]
        return value

    return edit


def is_upstream(hf: PreTrainedModel, sender: Node, receiver: Node) -> bool:
    what, layer, _ = sender
    if what == "input" or receiver[0] == "logits":
        return True
    same_layer = receiver[0] == "mlp" and what == "head" and not is_parallel(hf)
    return layer < receiver[1] or (layer == receiver[1] and same_layer)


def path_effects(
    hf: PreTrainedModel,
    pairs: Sequence[Pair],
    each: Pair,
    tokens: Sequence[int],
    senders: Sequence[str],
    receivers: Sequence[str],
    options: EdgeOptions,
    mlps: str,
    score: Score = logit_diff,
) -> Tensor:
    ids = prompts(each, options.direction)[0]
    own, logits = oracles.read(hf, ids)
    new = replacement(hf, pairs, each, options)
    effects = []
    for name in senders:
        reached = [node(end) for end in receivers if is_upstream(hf, node(name), node(end))]
        if not reached:
            effects.append(torch.zeros((), dtype=logits.dtype))
            continue
        patched = path_logits(hf, ids, node(name), reached, own, new, tokens, mlps)
        effects.append(score(patched, logits, each) - score(logits, logits, each))
    return torch.stack(effects)


def check_paths(
    family: str,
    pairs: Sequence[Pair],
    senders: Sequence[str],
    receivers: Sequence[str],
    mlps: str = "recomputed",
    dtype: torch.dtype = torch.float64,
    score: Score = logit_diff,
    least: float = 0.3,
    **options: object,
) -> PathResult:
    """Effects along paths equal the oracle's in every pair; 0 where a sender is not upstream.

    `least` is the share of the effects that must not be nothing.
    """
    model, twin = pair(family, dtype)
    return check_paths_of(
        model, twin, pairs, senders, receivers, mlps, score, tolerance_of(family, dtype), least, **options
    )


def check_paths_of(
    model: PatchModel,
    twin: PreTrainedModel,
    pairs: Sequence[Pair],
    senders: Sequence[str],
    receivers: Sequence[str],
    mlps: str,
    score: Score,
    tolerance: float,
    least: float = 0.3,
    **options: object,
) -> PathResult:
    asked = EdgeOptions(**options)  # type: ignore[arg-type]
    result = patch_paths(model, pairs, senders, receivers, asked, mlps=mlps)  # type: ignore[arg-type]
    covered = read_places(asked.positions, pairs).covered
    (stage,) = result.stages
    by_name = {effect.sender: effect for effect in stage.effects}
    moved = 0
    for row, each in enumerate(pairs):
        expected = path_effects(twin, pairs, each, covered[row][0], senders, receivers, asked, mlps, score)
        for name, wanted in zip(senders, expected, strict=True):
            found = torch.tensor(by_name[name].per_pair[row], dtype=wanted.dtype)
            agree(found, wanted, f"effect of {name} along paths in pair {each.id}", tolerance)
            moved += bool(wanted.abs() > 1e-4)
            upstream = any(is_upstream(twin, node(name), node(end)) for end in receivers)
            assert upstream or found == 0.0, f"effect of {name}, which is upstream of no receiver, is {found}"
    share = moved / (len(pairs) * len(senders))
    assert share >= least, f"{share:.0%} of these paths change anything: the comparison says little"
    return result
