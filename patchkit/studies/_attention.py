"""What the chosen heads look at from the last token: examples for the eye, and means over many prompts."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from patchkit.data import Triple
from patchkit.model import PatchModel, parse_node
from patchkit.results.study import AttentionExample
from patchkit.studies._attention_rows import Looking, attention_rows

#: Named spans of a triple that the summary tells apart. The comma that closes the queried binding is one of its own:
#: models keep what a clause said at the token that ends it.
_SPANS = {"value": "its value", "name": "its name", "operation": "operation", "query": "itself"}
_AFTER = "the comma after its value"


def _heads(model: PatchModel, chosen: Sequence[str]) -> dict[str, tuple[int, int]]:
    """The heads among chosen components: name -> (layer, head)."""
    parsed = {name: parse_node(name, model.dims) for name in chosen if name.startswith("a")}
    return {name: (site.layer, index) for name, (site, index) in parsed.items()}


def _from_last(
    model: PatchModel, heads: dict[str, tuple[int, int]], triples: Sequence[Triple]
) -> list[dict[int, Float[Tensor, "head token"]]]:
    items = [Looking(triple.original_ids, -1) for triple in triples]
    return attention_rows(model, [layer for layer, _ in heads.values()], items)


def attention_examples(
    model: PatchModel, chosen: Sequence[str], triples: Sequence[Triple]
) -> list[AttentionExample]:
    """Attention from the last token of every prompt, one entry a prompt and chosen head."""
    heads = _heads(model, chosen)
    if not heads or not triples or model.tokenizer is None:
        return []
    examples = []
    for triple, patterns in zip(triples, _from_last(model, heads, triples), strict=True):
        tokens: list[str] = model.tokenizer.convert_ids_to_tokens(list(triple.original_ids))  # pyright: ignore
        for name, (layer, head) in heads.items():
            weights = patterns[layer][head].tolist()
            examples.append(
                AttentionExample(head=name, tokens=tokens, query=len(tokens) - 1, weights=weights)
            )
    return examples


def attention_summary(
    model: PatchModel, chosen: Sequence[str], triples: Sequence[Triple]
) -> dict[str, dict[str, float]]:
    """head -> mean attention from the last token to each named part of the prompt; each head's numbers sum to 1."""
    heads = _heads(model, chosen)
    if not heads or not triples:
        return {}
    looks = _from_last(model, heads, triples)
    summary: dict[str, dict[str, float]] = {}
    for name, (layer, head) in heads.items():
        sums = {label: 0.0 for label in (*_SPANS.values(), _AFTER, "first token", "the rest")}
        for triple, patterns in zip(triples, looks, strict=True):
            weights = patterns[layer][head]
            left = float(weights.sum())
            for span, label in _SPANS.items():
                start, end = triple.spans[span]
                share = float(weights[start:end].sum())
                sums[label] += share
                left -= share
            after = float(weights[triple.spans["value"][1]])
            sums[_AFTER] += after
            sums["first token"] += float(weights[0])
            sums["the rest"] += left - after - float(weights[0])
        summary[name] = {label: value / len(triples) for label, value in sums.items()}
    return summary
