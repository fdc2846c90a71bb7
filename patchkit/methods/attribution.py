"""Attribution patching: every node's effect at once, from gradients (Nanda 2023; AtP*, arXiv:2403.00745).

    atp            I(n) = (put in - own) . dJ/dn at the base run: two forwards and one backward, whatever the nodes
    atp-qk         the same, with finite changes of attention probabilities for q and k nodes (`_qk_fix.py`)
    atp-graddrop   |I(n)| averaged over the drops of each block in turn (`patchkit.tracing.gradients`)
    atp-star       both: the QK fix with the dropped gradients, and GradDrop on all nodes

A node in a block is dropped with its own block, and that term is zero, so the mean over L drops is multiplied by
L / (L - 1), which gives a node with a direct effect only its AtP score; a node on the residual stream keeps the skip
path under every drop, and its mean is over L.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchkit.data import Metric, Pair, kl, resolve_metric
from patchkit.errors import InputError
from patchkit.methods._node_gradients import NodeReduction
from patchkit.methods._node_memory import attribution_bytes
from patchkit.methods._node_options import Asked, NodeOptions, ask
from patchkit.methods._pair_batch import PairBatch
from patchkit.methods._replacements import Replacement, replacement
from patchkit.model import Dims, NodeGrid, PatchModel, Site
from patchkit.results.scores import Scores
from patchkit.runtime import Cost, Journal, Progress, run_program
from patchkit.runtime.batch_memory import Shape
from patchkit.tracing import capture
from patchkit.tracing.gradients import reduce_gradients
from patchkit.tracing.suffix import whole_mask

Method = Literal["atp", "atp-qk", "atp-graddrop", "atp-star"]
METHODS: tuple[Method, ...] = ("atp", "atp-qk", "atp-graddrop", "atp-star")


@dataclass(frozen=True)
class PairItem:
    """A pair and the tokens of each place in it."""

    pair: Pair
    covered: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class Attribution:
    """The Program of AtP and its corrections.

    `run` gives for each pair `signed` and `magnitude` (`[pairs, nodes]`, NaN at layers without a site), the metric of
    the `base` and `source` runs, the number of `layer_backwards`, and the `work` paid, in token-forwards.
    """

    grid: NodeGrid
    sites: tuple[Site, ...]
    metric: str
    direction: str
    replacement: Replacement
    qk_fix: bool
    grad_drop: bool

    @property
    def backward(self) -> bool:
        return True

    def tokens(self, item: PairItem) -> int:
        return len(item.pair.clean_ids)

    def run(self, model: PatchModel, items: Sequence[PairItem]) -> dict[str, Tensor]:
        batch = PairBatch.of(model, [i.pair for i in items], [i.covered for i in items], self.direction)
        if self.replacement.causal:
            batch = batch.behind_prefix(model)
        metric = resolve_metric(self.metric)
        own = capture(model, batch.base, self.sites).values if self.replacement.needs_own else {}
        put_in, source_logits = self.replacement.values(model, batch, self.sites, own)
        fixed = [site.layer for site in self.sites if self.qk_fix and site.kind in ("q", "k")]
        read = {*self.sites, *(Site(kind, layer) for layer in fixed for kind in ("q", "k", "v", "z"))}

        def score(logits: Tensor) -> Tensor:
            # The reference is the base run itself, which is this very run.
            values = batch.score(metric, logits, logits.detach())
            if not values.requires_grad:
                raise InputError(
                    f"metric '{metric.name}' has no gradient (an argmax or a comparison has none); use one that changes "
                    "smoothly with the logits, or `patchkit patch`, which needs none"
                )
            return values

        found = reduce_gradients(
            model,
            batch.base,
            sorted(read),
            score,
            NodeReduction(self.grid, put_in, batch.cover, self.qk_fix),
            drop_layers=self.grad_drop,
            attention=sorted(set(fixed)),
        )
        # A metric that refers to the base run needs its logits; for every other one they are not used.
        reference = capture(model, batch.base, ()).logits if "reference" in metric.needs else source_logits
        return {
            "signed": self._flat(found.layers, "signed", len(items)),
            "magnitude": self._flat(found.layers, "magnitude", len(items)),
            "base": found.metric,
            "source": batch.score(metric, source_logits, reference),
            "layer_backwards": torch.full((len(items),), found.layer_backwards),
            "work": self._work(model.dims, batch),
        }

    def cost(self, dims: Dims, items: Sequence[PairItem]) -> Cost:
        """Two forwards and one backward a pair; GradDrop adds (L - 1) / 2 backwards; the QK fix scores of attention."""
        lengths = torch.tensor([self.tokens(item) for item in items])
        kept, passes = attribution_bytes(
            dims,
            Shape.of(lengths.tolist()),
            self.sites,
            self.replacement.ablation,
            len(self.grid.places),
            self.qk_fix,
            self.grad_drop,
        )
        return Cost(float(self._forwards(dims, lengths, lengths).sum()), kept, passes)

    def _work(self, dims: Dims, batch: PairBatch) -> Tensor:
        """Token-forwards of each pair as they were run."""
        queries = batch.base.lengths.cpu()
        keys = whole_mask(batch.base).sum(1).cpu()
        return self._forwards(dims, queries, keys) + batch.shared / len(queries)

    def _forwards(
        self, dims: Dims, queries: Int[Tensor, " items"], keys: Int[Tensor, " items"]
    ) -> Float[Tensor, " items"]:
        """Token-forwards of prompts that run so many tokens, which attend to so many."""
        lowest = min(site.layer for site in self.sites)
        above = dims.n_layers - lowest
        passes = 3.0 + (1.0 if self.replacement.needs_own else 0.0)
        extra = above * (above - 1) / 2 / dims.n_layers if self.grad_drop else 0.0
        fixed = [site.layer for site in self.sites if self.qk_fix and site.kind in ("q", "k")]
        # Products of keys with queries: the own and the patched run's scores, and the gradient for every drop.
        products = 2 * len(fixed) + len(set(fixed)) * (dims.n_layers if self.grad_drop else 1)
        layer = (
            2 * dims.d_model * (dims.n_heads + dims.n_kv_heads) * dims.d_head + 3 * dims.d_model * dims.d_mlp
        )
        queries = queries.double()
        scores = queries * keys * dims.n_heads * dims.d_head
        return queries * (passes + extra) + products * scores / (layer * dims.n_layers)

    def _flat(self, layers: Mapping[int, dict[str, Tensor]], name: str, pairs: int) -> Tensor:
        """The layers' tensors as `[pairs, nodes]`."""
        device = next(iter(next(iter(layers.values())).values())).device
        parts = []
        for kind in self.grid.kinds:
            _, places, units = self.grid.full_shape(kind)
            blank = None
            stack = []
            for layer in range(self.grid.dims.n_layers):
                here = layers.get(layer, {}).get(f"{name}.{kind}")
                if here is None:
                    if blank is None:
                        blank = torch.full((pairs, places, units), torch.nan, device=device)
                    here = blank
                stack.append(here.to(device))
            parts.append(torch.stack(stack, dim=1).flatten(1))
        return torch.cat(parts, dim=1)


def attribute(
    model: PatchModel,
    pairs: Sequence[Pair],
    options: NodeOptions | None = None,
    method: Method = "atp",
    *,
    reference: Sequence[Pair] | None = None,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Estimates the effect of every node that is asked for from gradients; see the module's docstring for the methods.

    Args:
        reference: prompt pairs whose source prompts the ablation `mean` is taken over.
        checkpoint: a directory for finished batches, from which an interrupted run goes on.

    Returns:
        `Scores`: `effects` are signed (under GradDrop the mean over drops), `magnitudes` have the absolute value inside
        every mean: c(n) of the paper.

    Raises:
        InputError: a node, position or metric that does not exist, pairs that do not align, KL as the metric or one
            whose gradient is absent or not finite, GradDrop on a model of one layer.
    """
    if method not in METHODS:
        raise InputError(f"method '{method}' is not known; expected one of: {', '.join(METHODS)}")
    asked = ask(model, pairs, options or NodeOptions())
    refuse_flat_metric(asked.metric)
    options = asked.options
    made = replacement(model, pairs, options, asked.grid.sites(asked.ids), reference)
    program, items = attribution_work(asked, made, method)
    found = run_program(
        program,
        model,
        items,
        max_batch_tokens=options.max_batch_tokens,
        progress=progress,
        label=method,
        journal=None if checkpoint is None else Journal(checkpoint),
    )
    if "reference" in asked.metric.needs and not bool(found["magnitude"].nan_to_num(0.0).any()):
        raise InputError(_flat(asked.metric.name))
    wrong = (~found["signed"][:, asked.ids].isfinite()).nonzero()
    if len(wrong):
        pair, node = pairs[int(wrong[0, 0])].id, asked.grid.name(int(asked.ids[wrong[0, 1]]))
        raise InputError(
            f"the gradient of metric '{asked.metric.name}' is not finite at node '{node}' of pair {pair!r}; check the "
            "metric at the base run, or give another dtype"
        )
    unasked = torch.ones(len(asked.grid), dtype=torch.bool)
    unasked[asked.ids] = False
    cost = float(found["work"].sum()) / sum(program.tokens(item) for item in items)
    return Scores(
        grid=asked.grid,
        method=method,
        convention=options.convention,
        pair_ids=tuple(pair.id for pair in pairs),
        effects=found["signed"].masked_fill(unasked, torch.nan),
        magnitudes=found["magnitude"].masked_fill(unasked, torch.nan),
        base_metric=found["base"],
        source_metric=found["source"],
        cost=cost,
        layer_backwards=int(found["layer_backwards"].max()),
    )


def attribution_work(asked: Asked, made: Replacement, method: Method) -> tuple[Attribution, list[PairItem]]:
    """The Program of a method, and its items."""
    options, sites = asked.options, tuple(asked.grid.sites(asked.ids))
    qk_fix, grad_drop = method in ("atp-qk", "atp-star"), method in ("atp-graddrop", "atp-star")
    program = Attribution(asked.grid, sites, options.metric, options.direction, made, qk_fix, grad_drop)
    items = [PairItem(pair, covered) for pair, covered in zip(asked.pairs, asked.places.covered, strict=True)]
    return program, items


def refuse_flat_metric(metric: Metric) -> None:
    """Raises InputError for KL, whose gradient at the base run is zero."""
    if metric.function is kl:
        raise InputError(_flat(metric.name))


def _flat(name: str) -> str:
    return (
        f"metric '{name}' measures the distance from the base run, and gradients are taken at the base run itself, where "
        "that distance is least: every estimate would be 0. Use logit-diff, prob-diff or target-logprob, or "
        "`patchkit patch`, which is exact"
    )
