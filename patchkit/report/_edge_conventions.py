"""What a page of edges says of every number's conventions, and of what the method cannot see."""

from __future__ import annotations

from patchkit.report._edge_words import flows, put_in, runs, scored
from patchkit.report._html import count, duration
from patchkit.report._words import where
from patchkit.results.edge_scores import EdgeScores
from patchkit.results.manifest import Manifest

_HOW = {
    "eap": "EAP (arXiv:2310.10348): (what the sender writes on the source run - what it writes on the base run) times "
    "the metric's gradient at the stream the receiver reads, taken at the base run.",
    "eap-ig-inputs": "EAP-IG (arXiv:2403.17806): as EAP, with the gradient averaged along a straight path between the "
    "two prompts' token embeddings.",
    "eap-ig-activations": "EAP-IG on activations: as EAP, with the gradient averaged along a straight path between the "
    "sender's two activations.",
    "clean-corrupted": "As EAP, with the gradient averaged over the base and the source run.",
    "exact": "Exact: each edge was cut by itself, in a run of its own; nothing is estimated.",
    "acdc": "ACDC (arXiv:2304.14997): from the logits backwards, an edge is cut for good where that costs less than "
    "the threshold; its effect is the one it had when it was visited, with the edges cut before it gone.",
    "ifr": "Information-flow routes (arXiv:2403.00824): how much of the stream that a receiver reads is the sender's. "
    "No gradient, no other prompt, no metric: shares from 0 to 1 without sign.",
}


def blind_spots(scores: EdgeScores) -> list[str]:
    """What the method cannot see, and what these scores in particular leave open."""
    name, notes = scores.method.name, []
    if name == "exact":
        notes.append(
            "An edge was cut alone: backups that step in for each other, and edges that only matter together, look weak."
        )
    elif name == "acdc":
        notes += [
            "ACDC depends on the order of its visits: what is cut first changes what the rest is worth. Another order "
            "can keep a very different set.",
            "|effect| decides, so edges that work against the behaviour are kept too."
            if scores.method.absolute
            else "An edge that works against the behaviour is cut, since that raises the metric; `--absolute` keeps it.",
        ]
    elif name == "ifr":
        notes += [
            "Routes say how much of a stream is whose, not what the task needs: they are the same for every metric.",
            "All queries, keys and values of a layer read one stream, and get one share.",
        ]
    else:
        notes.append(
            "An estimate is linear in what is put in: it is least sure for large effects and for edges early in the "
            "model. `--method exact` cuts them one by one."
        )
    if name == "eap" and not scores.method.qk_fix:
        notes.append(
            "Where attention is saturated, an edge into a query or key that would move the whole pattern has almost no "
            "gradient: its estimate is near 0, or of the wrong sign. `--qk-fix` recomputes the pattern."
        )
    if name == "eap" and not scores.method.grad_drop:
        notes.append(
            "A direct effect and an opposite one through later layers cancel in the gradient; `--graddrop` drops each "
            "layer's gradient in turn."
        )
    if scores.method.grad_drop:
        notes.append(
            "|effect| is a mean over drops and can be larger than the size of the mean effect: it ranks the edges; the "
            "signed mean is the one without drops."
        )
    if len(scores.pair_ids) == 1:
        notes.append("There is one pair: nothing here says how another prompt would come out.")
    elif scores.per_pair is None and name not in ("acdc",):
        notes.append(
            "The scores of single pairs were not kept, so nothing here says how much they spread; `--keep-pairs` keeps "
            "them."
        )
    if scores.convention.ablation == "zero":
        notes.append(
            "The ablation `zero` takes the model off its usual activations: an effect may come from that and not from "
            "what the edge carries."
        )
    notes.append(
        "Large edges are not yet a circuit: whether they are enough by themselves is what `patchkit evaluate` measures."
    )
    return notes


def conventions(scores: EdgeScores, manifest: Manifest | None) -> list[tuple[str, str]]:
    """Term and meaning of everything a number on the page depends on (text)."""
    base, source = runs(scores)
    kept, graph, method = scores.convention, scores.graph, scores.method
    entries = [("method", _HOW.get(method.name, method.name))]
    if flows(scores):
        entries += [
            ("score", "max(0, |x| - |x - y|) over the sum of those of all senders upstream, in the 1-norm: x what the "
             "receiver reads, y what the sender wrote. Mean over tokens and pairs."),
        ]  # fmt: skip
    else:
        entries += [
            ("effect", "of an edge u->v: metric(base run in which v reads what u writes on the source run) - "
             "metric(base run). Negative: cutting the edge lowers the metric."),
            ("helps", "the edge's effect is " + ("negative" if kept.direction == "noise" else "positive")
             + (": cutting it makes the behaviour weaker." if kept.direction == "noise"
                else ": putting in what it carries on the clean prompt makes the behaviour stronger.")),
            ("metric", f"{kept.metric}; higher is more of the behaviour, and it is never negated."),
            ("direction", f"{kept.direction}: the {base} prompt is run (base), the {source} prompt is the source."),
            ("ablation", f"{kept.ablation}: a cut edge carries {put_in(kept.ablation, source)}."),
            ("mean |effect|", "the absolute value of each pair's effect, then the mean: edges are ranked by it."),
        ]  # fmt: skip
    entries += _facts(scores)
    entries += [
        ("positions", _positions(scores)),
        ("edges", "senders write to the residual stream (input, heads, MLPs), receivers read it: <q>, <k> and <v> are "
         f"a head's query, key and value input, m5 an MLP's. {count(graph.n_edges)} edges from "
         f"{count(graph.n_senders)} senders to {count(graph.n_receivers)} receivers"
         + (", one key and one value a KV head." if not graph.by_query_head else ".")),
        ("cost", f"{scores.cost:,.1f} forward-equivalents; 1 is one forward over every base prompt."),
    ]  # fmt: skip
    if scores.per_pair is not None and len(scores.pair_ids) > 1:
        entries.append(("95 % interval", "of the mean: percentile bootstrap over pairs, 1,000 draws."))
    if manifest is not None:
        extra = (
            ("seed", None if manifest.seed is None else str(manifest.seed)),
            ("time", duration(manifest.seconds) if manifest.seconds else None),
        )
        entries += [(term, said) for term, said in extra if said]
    return entries


def _facts(scores: EdgeScores) -> list[tuple[str, str]]:
    method = scores.method
    facts = []
    if method.steps is not None:
        rule = {
            "repo": "k = 0 to m - 1 of m from the source end, as the EAP-IG repository has it",
            "midpoint": "the midpoints of m equal parts",
        }.get(method.rule or "", method.rule or "")
        if method.name == "eap-ig-activations" and method.rule == "repo":
            rule = "every site's path, with all receivers' gradients added up at each, as the EAP-IG repository has it"
        facts.append(("integral", f"{method.steps} steps; rule {method.rule}: {rule}."))
    if method.qk_fix:
        facts.append(
            (
                "QK fix",
                "for queries and keys the attention pattern is recomputed exactly and linear only after the softmax.",
            )
        )
    if method.grad_drop:
        facts.append(
            (
                "GradDrop",
                "|effect| is the mean over layers of |effect| without that layer's gradient, times L/(L-1).",
            )
        )
    if method.threshold is not None:
        order = f"; visited in the order {method.order}" if method.order else ""
        order += "; |effect| decides" if method.absolute else ""
        facts.append(("threshold", f"tau = {method.threshold:g}, of {scores.convention.metric}{order}."))
    if method.name == "acdc":
        visited = f"{count(scored(scores))} of {count(scores.graph.n_edges)} edges were cut to see"
        over = "; the others fell away with a node that nothing read any more"
        if method.untried:
            over = f"; the budget ended the run before {count(method.untried)} others"
        facts.append(("visits", f"{visited}{over}."))
    return facts


def _positions(scores: EdgeScores) -> str:
    text = scores.convention.positions
    if not scores.placed:
        return f"{text}: edges are cut {where(text)}."
    return f"{text}: one effect a place, where the sender's output is replaced. Positions count real tokens from 0."
