"""Prompts in words, and where heads of the circuit look in one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from patchkit.data import Batch, Pair, positions
from patchkit.model import PatchModel, parse_node
from patchkit.results.study import AttentionExample
from patchkit.tracing import attention_from


def prompt_examples(pairs: Sequence[Pair]) -> list[dict[str, str]]:
    """Clean and corrupt prompt, answer and wrong answer of some pairs."""
    return [
        {name: str(pair.meta[name]) for name in ("clean", "corrupt", "answer", "wrong")} for pair in pairs
    ]


def attention_examples(model: PatchModel, pair: Pair, asked: Mapping[str, str]) -> list[AttentionExample]:
    """The attention of some heads on the clean prompt of a pair.

    Args:
        asked: head -> the span whose last token attends.
    """
    if model.tokenizer is None:
        return []
    tokens: list[str] = model.tokenizer.convert_ids_to_tokens(list(pair.clean_ids))  # pyright: ignore
    batch = Batch.from_ids([pair.clean_ids], model.pad_id).to(model.embed_device)
    examples = []
    for span in dict.fromkeys(asked.values()):
        query = pair.spans[span][1] - 1
        heads = {name: parse_node(name, model.dims) for name in asked if asked[name] == span}
        layers = sorted({site.layer for site, _ in heads.values()})
        patterns = attention_from(model, batch, layers, positions(batch, query))
        examples += [
            AttentionExample(
                head=name, tokens=tokens, query=query, weights=patterns[site.layer][0, head].tolist()
            )
            for name, (site, head) in heads.items()
        ]
    return examples
