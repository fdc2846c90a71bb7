"""Edge attribution: every edge's effect at once, from gradients, on the model as it is.

    score(u -> v) = sum over tokens of (what the stream gains when u is replaced) . (gradient at the stream v reads)

    eap                 gradient at the base run (Syed et al. 2023, arXiv:2310.10348)
    eap-ig-inputs       averaged along a path of token embeddings (Hanna et al. 2024, arXiv:2403.17806)
    eap-ig-activations  averaged along a path of each sender's activation
    clean-corrupted     averaged over the base and the source run
    ifr                 no gradient: information-flow routes (Ferrando and Voita 2024, arXiv:2403.00824)

`qk_fix` puts finite changes of attention probabilities in place of gradients at queries and keys, `grad_drop` averages
over drops of each block in turn: with both, `eap` is AtP* for edges (Kramar et al. 2024, arXiv:2403.00745).

Receivers' gradients come from an ordinary forward and backward, carried back through projections and norms by arithmetic
(`_edge_receivers.py`); edge products are made in blocks (`_edge_products.py`). The stream is never split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from patchkit.data import Pair, read_places, resolve_metric
from patchkit.errors import InputError
from patchkit.methods._edge_activation_paths import along_senders, along_sites
from patchkit.methods._edge_batch import EdgeBatch, EdgeSums, refuse_infinite
from patchkit.methods._edge_cost import attribution_cost, attribution_forwards
from patchkit.methods._edge_drops import corrected
from patchkit.methods._edge_flow import flow_scores
from patchkit.methods._edge_options import EdgeOptions
from patchkit.methods._edge_products import SenderChanges, edge_products
from patchkit.methods._edge_replacement import EdgeReplacement, edge_replacement
from patchkit.methods._edge_runs import Integrated, along_inputs, at_base, at_both_ends
from patchkit.methods._pair_batch import PairBatch
from patchkit.methods.activation_patching import CPU_FORWARD
from patchkit.methods.attribution import PairItem, refuse_flat_metric
from patchkit.model import Dims, EdgeGraph, PatchModel
from patchkit.results.convention import Convention
from patchkit.results.edge_scores import EdgeMethod, EdgeScores
from patchkit.results.query_heads import native_receivers
from patchkit.runtime import Cost, Journal, Progress, run_program
from patchkit.runtime.batch_memory import forward_tokens

EdgeMethodName = Literal["eap", "eap-ig-inputs", "eap-ig-activations", "clean-corrupted", "ifr"]
EDGE_METHODS: tuple[EdgeMethodName, ...] = (
    "eap",
    "eap-ig-inputs",
    "eap-ig-activations",
    "clean-corrupted",
    "ifr",
)
RULES = ("repo", "midpoint")
#: What a rule is unless it is said: the EAP-IG repository's for inputs, a sender's own path for activations.
DEFAULT_RULE = {"eap-ig-inputs": "repo", "eap-ig-activations": "midpoint"}
#: Methods whose gradients are taken between two prompts' runs, so that what is put in must be the other prompt's.
_BETWEEN_RUNS = ("eap-ig-inputs", "clean-corrupted")


@dataclass(frozen=True, eq=False)
class EdgeAttribution:
    """The Program of edge attribution.

    `run` gives sums over pairs: `signed.native` and `magnitude.native` (`[places, senders, receivers]`), the same by
    query head where keys are shared; for each pair the metric of the `base` and `source` runs, the `work` paid in
    token-forwards, and `pairs`, its scores, if they are kept.
    """

    method: EdgeMethod
    metric: str
    direction: str
    replacement: EdgeReplacement
    by_query: bool
    keep_pairs: bool
    max_batch_tokens: int = field(compare=False)

    @property
    def summed(self) -> frozenset[str]:
        return frozenset(
            f"{what}.{graph}" for what in ("signed", "magnitude") for graph in ("native", "by_query")
        )

    @property
    def backward(self) -> bool:
        return self.method.name != "ifr"

    def tokens(self, item: PairItem) -> int:
        """Counts the rows of a sender's path, which are run together."""
        paths = self.method.name == "eap-ig-activations" and self.method.rule == "midpoint"
        return len(item.pair.clean_ids) * ((self.method.steps or 1) if paths else 1)

    def run(self, model: PatchModel, items: Sequence[PairItem]) -> dict[str, Tensor]:
        with torch.no_grad():
            pairs = PairBatch.of(model, [i.pair for i in items], [i.covered for i in items], self.direction)
            if self.replacement.causal and self.method.name != "ifr":
                # Routes are looked for at every token.
                pairs = pairs.behind_prefix(model)
            graph = EdgeGraph.of(model.dims, by_query_head=self.by_query)
            batch = EdgeBatch(model, graph, pairs, resolve_metric(self.metric), self.replacement)
            sums = EdgeSums(EdgeGraph.of(model.dims), graph, self.keep_pairs)
            name, steps = self.method.name, self.method.steps or 1
            if self.method.qk_fix or self.method.grad_drop:
                found = corrected(batch, self.method.qk_fix, self.method.grad_drop)
                self._add(batch, sums, 0, found.signed, found.magnitude)
                base, source = found.base, found.source
            elif name == "ifr":
                scores, base, source = flow_scores(batch)
                self._add(batch, sums, 0, scores)
            elif name == "eap-ig-activations":
                on_cpu = model.embed_device.type == "cpu"
                at_once = min(self.max_batch_tokens, CPU_FORWARD) if on_cpu else self.max_batch_tokens
                rows = at_once // pairs.base.width
                midpoint = self.method.rule == "midpoint"
                scores, base, source = (
                    along_senders(batch, steps, rows) if midpoint else along_sites(batch, steps)
                )
                self._add(batch, sums, 0, scores)
            else:
                made = self._integrated(batch, steps)
                changes = SenderChanges(model, graph, made.own, made.other, batch.real)
                for rows, scores in edge_products(changes, made.vectors, pairs.cover):
                    self._add(batch, sums, rows.start, scores)
                base, source = made.base, made.source
            return {**sums.tensors(), "base": base, "source": source, "work": self._work(batch)}

    def cost(self, dims: Dims, items: Sequence[PairItem]) -> Cost:
        """See `_edge_cost.py`."""
        lengths = [len(item.pair.clean_ids) for item in items]
        at_once = forward_tokens(dims, self.max_batch_tokens)
        return attribution_cost(dims, lengths, self.method, self.by_query, at_once)

    def _work(self, batch: EdgeBatch) -> Tensor:
        """Token-forwards of each pair as they were run."""
        dims, pairs = batch.model.dims, batch.pairs
        run = zip(pairs.base.lengths.tolist(), batch.real_keys.sum(1).tolist(), strict=True)
        work = [attribution_forwards(dims, tokens, keys, self.method, batch.graph) for tokens, keys in run]
        return torch.tensor(work, dtype=torch.float64) + pairs.shared / len(work)

    def _integrated(self, batch: EdgeBatch, steps: int) -> Integrated:
        match self.method.name:
            case "eap":
                return at_base(batch)
            case "clean-corrupted":
                return at_both_ends(batch)
        return along_inputs(batch, steps, self.method.rule or "repo")

    def _add(
        self, batch: EdgeBatch, sums: EdgeSums, first: int, signed: Tensor, magnitude: Tensor | None = None
    ) -> None:
        refuse_infinite(signed, batch.pairs, first, batch.graph, batch.metric.name)
        sums.add(signed, magnitude)


def attribute_edges(
    model: PatchModel,
    pairs: Sequence[Pair],
    options: EdgeOptions | None = None,
    method: EdgeMethodName = "eap-ig-inputs",
    *,
    steps: int = 5,
    rule: str | None = None,
    qk_fix: bool = False,
    grad_drop: bool = False,
    reference: Sequence[Pair] | None = None,
    keep_pairs: bool = False,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> EdgeScores:
    """Estimates the effect of every edge; see the module's docstring for the methods.

    Args:
        steps: of the integral, for the two EAP-IG methods.
        rule: of the integral: `repo` as the EAP-IG repository has it, or `midpoint`. Default: `repo` for eap-ig-inputs
            (k = 0..m-1 from the source end), `midpoint` on each sender's own path for eap-ig-activations.
        qk_fix, grad_drop: for `eap`.
        reference: prompt pairs whose source prompts the two means are taken over; default: the pairs themselves.
        keep_pairs: keep every pair's scores: as many numbers as edges, for each pair.
        checkpoint: a directory for finished batches, from which an interrupted run goes on.

    Returns:
        `EdgeScores`: signed means and means of |score|; scores of `ifr` are importances without sign.

    Raises:
        InputError: options that contradict each other or the pairs, KL as the metric of a gradient at the base run, a
            metric whose gradient is absent or not finite, GradDrop on a model of one layer.
    """
    options = options or EdgeOptions()
    made_of = edge_method(method, steps, rule, qk_fix, grad_drop)
    metric = resolve_metric(options.metric)
    if method == "eap":
        refuse_flat_metric(metric)
    if method in _BETWEEN_RUNS and options.ablation != "resample":
        raise InputError(
            f"{method} takes gradients at the other prompt's run, so what is put in must be that prompt's activations: "
            f"ablation resample; found '{options.ablation}'. Use eap, eap-ig-activations or exact with it"
        )
    if method == "ifr" and options.ablation != "resample":
        raise InputError(
            f"ifr replaces nothing: it has no ablation; found '{options.ablation}', leave it at resample"
        )
    places = read_places(options.positions, pairs)
    replacement = edge_replacement(model, pairs, options, reference)
    # Dropped gradients are not carried to every query head's own copy of a key; routes do not depend on who reads.
    by_query = model.dims.group > 1 and not (qk_fix or grad_drop or method == "ifr")
    program = EdgeAttribution(
        made_of,
        options.metric,
        options.direction,
        replacement,
        by_query,
        keep_pairs,
        options.max_batch_tokens,
    )
    items = [PairItem(pair, covered) for pair, covered in zip(pairs, places.covered, strict=True)]
    found = run_program(
        program,
        model,
        items,
        max_batch_tokens=options.max_batch_tokens,
        progress=progress,
        label=method,
        journal=None if checkpoint is None else Journal(checkpoint),
    )
    return _scores(model, pairs, options, program, found, places.labels, places.placed)


def _scores(
    model: PatchModel,
    pairs: Sequence[Pair],
    options: EdgeOptions,
    program: EdgeAttribution,
    found: dict[str, Tensor],
    places: tuple[str, ...],
    placed: bool,
) -> EdgeScores:
    graph = EdgeGraph.of(model.dims)

    def mean(name: str, of: EdgeGraph) -> Tensor:
        value = (found[name] / len(pairs)).float()
        value = value.masked_fill(~of.real, torch.nan)
        return value if placed else value[0]

    by_query = None
    if program.by_query:
        wide = EdgeGraph.of(model.dims, by_query_head=True)
        by_query = (mean("signed.by_query", wide), mean("magnitude.by_query", wide))
    elif program.method.name == "ifr" and model.dims.group > 1:
        columns = native_receivers(graph)
        by_query = (
            mean("signed.native", graph)[..., columns],
            mean("magnitude.native", graph)[..., columns],
        )
    per_pair = found.get("pairs")
    if per_pair is not None:
        per_pair = per_pair.masked_fill(~graph.real, torch.nan)
        per_pair = per_pair if placed else per_pair[:, 0]
    tokens = sum(len(pair.clean_ids) for pair in pairs)
    return EdgeScores(
        graph=graph,
        method=program.method,
        convention=_convention(options, program.method.name),
        pair_ids=tuple(pair.id for pair in pairs),
        mean=mean("signed.native", graph),
        mean_abs=mean("magnitude.native", graph),
        base_metric=found["base"],
        source_metric=found["source"],
        cost=float(found["work"].sum()) / tokens,
        places=places,
        placed=placed,
        by_query=by_query,
        per_pair=per_pair,
    )


def _convention(options: EdgeOptions, method: str) -> Convention:
    if method == "ifr":
        # Neither a metric nor another prompt has a part in it.
        return options.convention.model_copy(update={"metric": "none", "ablation": "none"})
    return options.convention


def edge_method(name: str, steps: int, rule: str | None, qk_fix: bool, grad_drop: bool) -> EdgeMethod:
    """How edges are scored, as options say it; InputError where they contradict each other."""
    if name not in EDGE_METHODS:
        raise InputError(f"method '{name}' is not known; expected one of: {', '.join(EDGE_METHODS)}")
    integrated = name in DEFAULT_RULE
    if integrated and steps < 1:
        raise InputError(f"{name} with {steps} steps: expected at least 1")
    if rule is not None and (not integrated or rule not in RULES):
        expected = f"one of: {', '.join(RULES)}" if integrated else "none, since this method has no integral"
        raise InputError(f"rule '{rule}' of {name}: expected {expected}")
    if (qk_fix or grad_drop) and name != "eap":
        raise InputError(
            f"the QK fix and GradDrop correct the gradient at one run and are for eap; found {name}"
        )
    return EdgeMethod(
        name=name,
        steps=steps if integrated else None,
        rule=(rule or DEFAULT_RULE[name]) if integrated else None,
        qk_fix=qk_fix,
        grad_drop=grad_drop,
    )
