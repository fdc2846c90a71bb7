"""Backup behaviour by plain torch hooks, and a model in which the amount that is made up for is written into the weights.

`check_repair` is the comparison: the tests must pass it, and those of mutations must make it fail.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from patchkit.data import Pair
from patchkit.methods._edge_options import EdgeOptions
from patchkit.methods._evaluate_bootstrap import PairBootstrap
from patchkit.methods._evaluate_repair import find_group, self_repair
from patchkit.model import PatchModel
from patchkit.model.edges import EdgeGraph
from patchkit.results.evaluation import SelfRepair
from patchkit.zoo import handmade
from patchkit.zoo.load import load
from tests import oracles
from tests.comparisons import agree, pair
from tests.edge_oracle import Values, gain, node, put, replacement, sender_edits, tolerance_of
from tests.node_oracle import Score, logit_diff, prompts


def knocked(hf: PreTrainedModel, own: Values, new: Values, group: Sequence[str]) -> Values:
    """Site values in which all nodes of a group hold what is put in, the rest what they held."""
    values: Values = {}
    for what, layer, head in map(node, group):
        if what == "mlp":
            values["mlp_out", layer] = new["mlp_out", layer]
        else:
            z = values.setdefault(("z", layer), own["z", layer].clone())
            z[:, head] = new["z", layer][:, head]
    return values


def knocking(new: Values, group: Sequence[str]) -> dict[oracles.Place, oracles.Edit]:
    """Edits that knock a group out and leave the other heads to the run."""
    heads: dict[int, list[int]] = {}
    edits: dict[oracles.Place, oracles.Edit] = {}
    for what, layer, head in map(node, group):
        if what == "mlp":
            edits["mlp_out", layer] = lambda _, value=new["mlp_out", layer]: value.clone()
        else:
            heads.setdefault(layer, []).append(head)
    for layer, numbers in heads.items():

        def replace(z: Tensor, layer: int = layer, numbers: list[int] = numbers) -> Tensor:
            z[:, numbers] = new["z", layer][:, numbers]
            return z

        edits["z", layer] = replace
    return edits


def direct(
    hf: PreTrainedModel,
    ids: Sequence[int],
    gained: Tensor,
    edits: dict[oracles.Place, oracles.Edit],
) -> Tensor:
    """Logits of a run whose final stream has something added."""
    top = hf.config.num_hidden_layers - 1
    return oracles.patched_logits(hf, ids, edits | {("resid_post", top): lambda stream: stream + gained})


def expected_repair(
    hf: PreTrainedModel,
    pairs: Sequence[Pair],
    group: Sequence[str],
    others: Sequence[str],
    options: EdgeOptions,
    score: Score = logit_diff,
) -> dict[str, Tensor]:
    """`clean`, `knocked_out` and `expected` of every pair, and `before` and `after` of every other node."""
    found: dict[str, list[Tensor]] = {}
    for each in pairs:
        ids = prompts(each, options.direction)[0]
        own, logits = oracles.read(hf, ids)
        new = replacement(hf, pairs, each, options)
        tokens = range(len(ids))

        def value(run: Tensor, base: Tensor = logits, each: Pair = each) -> Tensor:
            return score(run, base, each)

        joint = torch.zeros_like(own["resid_post", 0])
        values = knocked(hf, own, new, group)
        for (kind, layer), changed in values.items():
            place = ("attn_out", layer) if kind == "z" else (kind, layer)
            alone = oracles.squeezed(oracles.run(hf, ids, put({(kind, layer): changed})).values)
            joint = joint + alone[place] - own[place]
        gone = knocking(new, group)
        without = oracles.run(hf, ids, gone)
        runs = {
            "before": (own, {}, logits),
            "after": (oracles.squeezed(without.values), gone, without.logits),
        }
        numbers = {
            "clean": value(logits),
            "knocked_out": value(without.logits),
            "expected": value(direct(hf, ids, joint, {})),
        }
        for name, (held, edits, end) in runs.items():
            effects = []
            for sender in map(node, others):
                changed = sender_edits(hf, sender, held, new, tokens)
                gained = gain(hf, ids, sender, held, changed)
                effects.append(value(direct(hf, ids, gained, edits)) - value(end))
            numbers[name] = torch.stack(effects)
        for name, number in numbers.items():
            found.setdefault(name, []).append(number.detach())
    return {name: torch.stack(parts) for name, parts in found.items()}


def check_repair(
    family: str,
    pairs: Sequence[Pair],
    group: Sequence[str],
    dtype: torch.dtype = torch.float64,
    score: Score = logit_diff,
    **options: object,
) -> SelfRepair:
    """Every number of a knock-out equals the oracle's."""
    model, twin = pair(family, dtype)
    asked = EdgeOptions(**options)  # type: ignore[arg-type]
    graph = EdgeGraph.of(model.dims)
    bootstrap = PairBootstrap(len(pairs), 50, 0)
    found = self_repair(model, pairs, find_group(graph, group), asked, bootstrap).repair
    others = [name for name in graph.senders if name not in ("input", *group)]
    expected = expected_repair(twin, pairs, group, others, asked, score)
    tolerance = tolerance_of(family, dtype)

    def same(number: float, values: Tensor, what: str) -> None:
        agree(torch.tensor(number, dtype=torch.float64), values.double().mean(), what, tolerance)

    same(found.clean, expected["clean"], "metric of the base run")
    same(found.knocked_out, expected["knocked_out"], "metric of the knocked-out run")
    same(found.expected, expected["expected"], "metric that was expected")
    assert [each.node for each in found.nodes] != [] and {each.node for each in found.nodes} == set(others)
    for each in found.nodes:
        column = others.index(each.node)
        before, after = expected["before"][:, column], expected["after"][:, column]
        same(each.before, before, f"direct effect of {each.node}")
        same(each.after, after, f"direct effect of {each.node} after the knock-out")
        same(each.change, after - before, f"change of {each.node}")
    sizes = [abs(each.change) for each in found.nodes]
    assert sizes == sorted(sizes, reverse=True), "nodes are not by size of their change"
    assert sizes[0] > 1e-3, "nothing changes: the comparison says little"
    return found


FOUND_TOO, SUPPLIED = 64, 0.6


@functools.cache
def with_backup() -> PatchModel:
    """The handmade model, reading the digit that a1.h2 finds; a1.h3 finds it too, and m1 hands it on if a1.h2 did not.

    m1 supplies 0.6 of what is lost, and nothing while a1.h2 does its work: its gate is silu(32 - 32 x digits found).
    """
    hf, tokenizer = handmade.build(handmade.SATURATED)
    with torch.no_grad():
        copy = handmade._Head(hf, 1, 3)
        handmade._write_lookup_head(copy, handmade.SATURATED)
        first = [
            hf.get_parameter(f"model.layers.1.mlp.{kind}_proj.weight") for kind in ("gate", "up", "down")
        ]
        gate, up, down = first
        unembedding = hf.get_parameter("lm_head.weight")
        unembedding.zero_()
        copy.o.zero_()
        for index, value in enumerate(handmade.VALUES):
            found = handmade.FOUND + handmade.TOKEN_IDS[value]
            copy.o[FOUND_TOO + index, index] = 1.0
            gate[index, handmade.ONE] = 32.0
            for other in handmade.VALUES:
                gate[index, handmade.FOUND + handmade.TOKEN_IDS[other]] = -32.0
            up[index, FOUND_TOO + index] = 1 / 32
            down[found, index] = SUPPLIED
            unembedding[handmade.TOKEN_IDS[value], found] = 10.0
    return load(hf, tokenizer=tokenizer)


def handmade_pairs(model: PatchModel, count: int, *, successor: bool = True) -> list[Pair]:
    """Prompts of one length whose answers differ."""
    drawn = handmade.sample_prompts(4 * count, 0, 3)
    made: list[Pair] = []
    assert model.tokenizer is not None
    for clean, corrupt in zip(drawn[::2], drawn[1::2], strict=True):
        ids = [tuple(model.tokenizer(prompt.text)["input_ids"]) for prompt in (clean, corrupt)]
        answers = [
            int(prompt.answer) if successor else (int(prompt.answer) - 1) % 8 for prompt in (clean, corrupt)
        ]
        if answers[0] != answers[1]:
            tokens = [handmade.TOKEN_IDS[str(answer)] for answer in answers]
            made.append(Pair(*ids, *tokens, {}, f"h{len(made)}"))  # type: ignore[arg-type]
    return made[:count]
