"""Causal scrubbing by brute force: one unpadded prompt at a time, plain torch hooks, one forward for every receiver.

The draws are replayed from the tree that `draw` gives. What a receiver reads is put into a whole forward as the residual
stream at its place, so nothing here knows of norms or projections; what replaced heads write is the change of the
attention's output in a forward in which their z is replaced. `check_scrubbing` is the comparison itself.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from patchkit.data import Pair, read_places
from patchkit.methods._scrub_draws import Draw, draw
from patchkit.methods._scrub_hypothesis import OUTPUT, Hypothesis, Interpretation
from patchkit.methods.causal_scrubbing import ScrubOptions, scrub
from patchkit.results.scrubbing import ScrubResult
from tests import oracles
from tests.comparisons import agree, pair

#: (sender's name, tokens, what it holds there, names of the edges along which it does or None for all).
Claim = tuple[str, tuple[int, ...], Tensor, tuple[str, ...] | None]


class Oracle:
    """One hypothesis on one model, replayed."""

    def __init__(self, hf: Any, hypothesis: Hypothesis, inputs: Sequence[Pair]) -> None:
        self.hf, self.hypothesis, self.inputs = hf, hypothesis, inputs
        config: Any = hf.config
        self.layers = config.num_hidden_layers
        self.heads = config.num_attention_heads
        self.kv_heads = getattr(config, "num_key_value_heads", None) or self.heads
        self.parallel = config.model_type == "gpt_neox" and config.use_parallel_residual
        self._plain: dict[int, tuple[dict[Any, Tensor], Tensor]] = {}

    def plain(self, number: int) -> tuple[dict[Any, Tensor], Tensor]:
        if number not in self._plain:
            self._plain[number] = oracles.read(self.hf, self.inputs[number].clean_ids)
        return self._plain[number]

    def logits(self, tree: Draw) -> Tensor:
        """Of the scrubbed run."""
        assert tree.unrelated is not None
        claims = [claim for child in tree.children for claim in self.claims(child, tree.unrelated)]
        return self.logits_from(tree.unrelated, self.stream(tree.unrelated, "logits", claims))

    def logits_from(self, number: int, final: Tensor) -> Tensor:
        edit = {("resid_post", self.layers - 1): lambda _: final}
        return oracles.patched_logits(self.hf, self.inputs[number].clean_ids, edit)

    def claims(self, tree: Draw, into: int) -> list[Claim]:
        """What the parts of an occurrence hold, at their tokens in the run on input `into`."""
        found = []
        for name, place, edges, value in self.scrubbed(tree):
            found.append((name, self.tokens(place, into), value, edges))
        return found

    def scrubbed(self, tree: Draw) -> list[tuple[str, str, tuple[str, ...] | None, Tensor]]:
        node = self.hypothesis.node(tree.node)
        named = [
            (said.partition("@")[0], said.partition("@")[2] or node.positions, None) for said in node.nodes
        ]
        named += [
            (sender, node.positions, node.edges)
            for sender in dict.fromkeys(edge.split("->")[0] for edge in node.edges)
        ]
        named.sort(key=lambda part: self.order(part[0]))
        if not tree.children:
            return [
                (name, place, edges, self.held(tree.input, name)[list(self.tokens(place, tree.input))])
                for name, place, edges in named
            ]
        number = tree.unrelated
        assert number is not None
        claims = [claim for child in tree.children for claim in self.claims(child, number)]
        found = []
        for name, place, edges in named:
            tokens = self.tokens(place, number)
            value = self.again(number, name, claims)[list(tokens)]
            claims.append((name, tokens, value, None))
            found.append((name, place, edges, value))
        return found

    def again(self, number: int, name: str, claims: Sequence[Claim]) -> Tensor:
        """A head or an MLP computed from what its receivers read: `[token, width]`."""
        ids, layer = self.inputs[number].clean_ids, int(name.split(".")[0][1:])
        if name[0] == "m":
            stream = self.stream(number, name, claims)
            at = ("resid_pre" if self.parallel else "resid_mid", layer)
            return oracles.squeezed(oracles.run(self.hf, ids, {at: lambda _: stream}).values)[
                "mlp_out", layer
            ]
        head, edits = int(name.split("h")[1]), {}
        for letter in "qkv":
            unit = head if letter == "q" else head // (self.heads // self.kv_heads)
            stream = self.stream(number, f"a{layer}.h{unit}<{letter}>", claims)
            if torch.equal(stream, self.plain(number)[0]["resid_pre", layer]):
                continue
            run = oracles.run(self.hf, ids, {("resid_pre", layer): lambda _, stream=stream: stream})
            projected = oracles.squeezed(run.values)[f"{letter}_proj", layer][:, unit]

            def edit(value: Tensor, unit: int = unit, projected: Tensor = projected) -> Tensor:
                value[:, unit] = projected
                return value

            edits[f"{letter}_proj", layer] = edit
        return oracles.squeezed(oracles.run(self.hf, ids, edits).values)["z", layer][:, head]

    def stream(self, number: int, receiver: str, claims: Sequence[Claim]) -> Tensor:
        """What a receiver reads."""
        values, _ = self.plain(number)
        layer = self.layers if receiver == "logits" else int(receiver.split(".")[0].strip("am"))
        kind = "resid_pre"
        if receiver == "logits":
            kind, layer = "resid_post", self.layers - 1
        elif receiver[0] == "m" and not self.parallel:
            kind = "resid_mid"
        stream = values[kind, layer].clone()
        read = [
            claim
            for claim in claims
            if (claim[3] is None or f"{claim[0]}->{receiver}" in claim[3]) and self.before(claim[0], receiver)
        ]
        for name in dict.fromkeys(claim[0] for claim in read if claim[0][0] in "im"):
            own = self.held(number, name)
            for _, tokens, value, _ in [claim for claim in read if claim[0] == name]:
                for token, each in zip(tokens, value, strict=True):
                    stream[token] += each - own[token]
        for layer in range(self.layers):
            mine = [claim for claim in read if claim[0].startswith(f"a{layer}.")]

            def edit(z: Tensor, mine: Sequence[Claim] = mine) -> Tensor:
                for name, tokens, value, _ in mine:
                    for token, each in zip(tokens, value, strict=True):
                        z[token, int(name.split("h")[1])] = each
                return z

            if mine:
                run = oracles.run(self.hf, self.inputs[number].clean_ids, {("z", layer): edit})
                stream += oracles.squeezed(run.values)["attn_out", layer] - values["attn_out", layer]
        return stream

    def order(self, name: str) -> tuple[int, int, int]:
        if name == "input":
            return (-1, 0, 0)
        layer = int(name.split(".")[0][1:])
        return (layer, 0, int(name.split("h")[1])) if name[0] == "a" else (layer, 1, 0)

    def before(self, sender: str, receiver: str) -> bool:
        if receiver == "logits" or sender == "input":
            return True
        mine, its = self.order(sender), self.order(receiver.partition("<")[0])
        same_block = mine[0] == its[0] and mine[1] == 0 and its[1] == 1 and not self.parallel
        return mine[0] < its[0] or same_block

    def held(self, number: int, name: str) -> Tensor:
        """What a sender holds in a plain run, at every token."""
        values, _ = self.plain(number)
        if name == "input":
            # Layer 0 reads nothing else, except in GPT-2.
            stream, hf = values["resid_pre", 0], self.hf
            return (
                stream - hf.transformer.wpe.weight[: len(stream)]
                if hf.config.model_type == "gpt2"
                else stream
            )
        layer = int(name.split(".")[0][1:])
        return values["mlp_out", layer] if name[0] == "m" else values["z", layer][:, int(name.split("h")[1])]

    def tokens(self, place: str, number: int) -> tuple[int, ...]:
        covered = read_places(place, [self.inputs[number]]).covered[0]
        return tuple(sorted({token for each in covered for token in each}))


def logit_diff(logits: Tensor, each: Pair) -> Tensor:
    return logits[each.answer_id] - logits[each.wrong_id]


def check_scrubbing(
    family: str,
    pairs: Sequence[Pair],
    hypothesis: Hypothesis,
    dtype: torch.dtype = torch.float64,
    tolerance: float | None = None,
    pool: Sequence[Pair] | None = None,
    samples: int = 1,
    **options: Any,
) -> ScrubResult:
    """A hypothesis scrubbed by patchkit and replayed by the oracle from the same draws, reference by reference."""
    model, twin = pair(family, dtype)
    result = scrub(model, pairs, hypothesis, ScrubOptions(samples=samples, **options), pool=pool)
    check_result(twin, result, pairs, hypothesis, pool, tolerance or 1e-6)
    return result


def check_result(
    twin: PreTrainedModel,
    result: ScrubResult,
    pairs: Sequence[Pair],
    hypothesis: Hypothesis,
    pool: Sequence[Pair] | None,
    tolerance: float,
) -> None:
    """Metrics of the model, of the scrubbed run and of the random one, of every reference."""
    draws = draw(hypothesis, pairs, pool, samples=result.samples, seed=result.seed)
    oracle = Oracle(twin, hypothesis, draws.inputs)
    by_reference = [draws.trees[i : i + result.samples] for i in range(0, len(draws.trees), result.samples)]
    moved = 0.0
    for each, trees, found in zip(pairs, by_reference, result.inputs, strict=True):
        assert all(tree.node == OUTPUT and draws.inputs[tree.input] is each for tree in trees)
        expected = {
            "model": [oracle.plain(tree.input)[1] for tree in trees],
            "random": [oracle.plain(tree.unrelated or 0)[1] for tree in trees],
            "scrubbed": [oracle.logits(tree) for tree in trees],
        }
        metrics = {
            name: torch.stack([logit_diff(row, each) for row in logits]) for name, logits in expected.items()
        }
        for name, values in metrics.items():
            mean = values.double().mean()
            agree(
                torch.tensor(getattr(found, name), dtype=torch.float64),
                mean,
                f"{name} metric of {each.id}",
                tolerance,
            )
        moved = max(moved, float((metrics["scrubbed"] - metrics["random"]).abs().max()))
    assert moved > 1e-3 or not hypothesis.nodes, "scrubbed runs are random ones: the comparison says little"


# Prompts and hypotheses for the tests.


def prompts(n: int, seed: int = 0, lengths: Sequence[int] = (7, 5)) -> list[Pair]:
    """Random prompts of several lengths, with a span `s` of two tokens."""
    rng, made = random.Random(seed), []
    for number in range(n):
        length = lengths[number % len(lengths)]
        ids = tuple(rng.randrange(3, 37) for _ in range(length))
        answer, wrong = rng.sample(range(3, 37), 2)
        start = rng.randrange(length - 2)
        made.append(Pair(ids, ids, answer, wrong, {"s": (start, start + 2)}, f"{seed}-{number}"))
    return made


def odd(pair: Pair) -> Hashable:
    """whether the last token is odd"""
    return pair.clean_ids[-1] % 2


def third(pair: Pair) -> Hashable:
    """the first token modulo 3"""
    return pair.clean_ids[0] % 3


def anything(pair: Pair) -> Hashable:
    return 0


def whole(pair: Pair) -> Hashable:
    """the whole prompt"""
    return pair.clean_ids


def mixed(group: int) -> Hypothesis:
    """Heads and MLPs, in groups that feed themselves, at places and spans, along some edges; one node at two places of
    the graph, one sender at two places of the prompt.

    Args:
        group: query heads that share a KV head.
    """
    key, value = f"a0.h{1 // group}<k>", f"a0.h{1 // group}<v>"
    edges = ("input->m0", "input->a0.h1<q>", f"input->{key}", f"input->{value}")
    nodes = (
        Interpretation("top", odd, ("m2", "a2.h1"), positions="last", children=("mid", "shown", "side")),
        Interpretation("mid", third, ("m1@s", "a1.h1@last", "m1@-1"), children=("low", "keys")),
        Interpretation("side", anything, edges=("a1.h2->a2.h1<q>", "a0.h1->m2"), positions="last"),
        Interpretation("low", odd, ("m0@s", "a0.h1@last"), children=("read",)),
        Interpretation(
            "keys",
            third,
            edges=(f"a0.h0->a1.h{1 // group}<k>", f"input->a1.h{1 // group}<k>"),
            positions="s",
        ),
        Interpretation("shown", odd, ("input@last",)),
        Interpretation("read", odd, edges=edges, positions="s,-1"),
    )
    return Hypothesis("mixed", nodes, ("top", "mid"), "Something about everything.")
