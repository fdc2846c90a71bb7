"""Trying circuits during ACDC: all pairs, opened once, wherever their batches are run.

What every trial gave is kept in the journal under what was tried, so that a search that is begun again with the same one
takes the same decisions without running anything until it comes to where it was.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Bool, Float
from torch import Tensor

from patchkit.methods._acdc_runs import Ends, Try, pack, together
from patchkit.methods._circuit_work import circuit_work
from patchkit.model.edges import EdgeGraph
from patchkit.runtime import Journal, Session, length_buckets


class Trials:
    """Circuits tried on every pair.

    Attributes:
        spent: what the search takes, in forward-equivalents, whether it was run now or before, and counted as if every
            prompt were run whole: a budget ends it at the same place however pairs are batched.
        base, source: the metric of both runs of each pair.
        sizes: of each sender, the norm of the change when it is replaced.
        at_once: how many circuits are best run together.
    """

    def __init__(
        self, pairs: Session, graph: EdgeGraph, max_batch_tokens: int, journal: Journal | None
    ) -> None:
        self.session, self.graph, self.journal = pairs, graph, journal
        self.max_batch_tokens = max_batch_tokens
        ends = pairs.run(Ends(), journal=journal)
        self.base, self.source, self.sizes = ends["base"], ends["source"], ends["squares"].sqrt()
        self.spent = 2.0
        # From the pairs alone, and not from what memory is free: a search that goes on tries the same ones together.
        lengths = [len(pair.clean_ids) for pair in pairs.items]
        buckets = length_buckets([pairs.opener.tokens(pair) for pair in pairs.items], max_batch_tokens)
        tokens = max(len(bucket) * max(lengths[number] for number in bucket) for bucket in buckets)
        self.at_once = together(pairs.model, graph, tokens, max_batch_tokens)

    def metrics(
        self, circuits: Sequence[Bool[Tensor, "senders receivers"]], known: int
    ) -> Float[Tensor, "pairs circuits"]:
        """The metric of circuits that hold every edge below the first `known` senders."""
        step = Try(known, tuple(map(pack, circuits)), self.max_batch_tokens)
        found = self.session.run(step, journal=self.journal)["metric"]
        self.spent += sum(self.work(edges, known) for edges in circuits)
        return found

    def work(self, edges: Bool[Tensor, "senders receivers"], known: int) -> float:
        """Forward-equivalents of one circuit."""
        return circuit_work(self.session.model.dims, self.graph, edges, known)
