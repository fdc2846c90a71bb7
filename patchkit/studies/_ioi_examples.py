"""Prompts in words, and where heads of the circuit look in one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from patchkit.data import Pair
from patchkit.model import PatchModel, parse_node
from patchkit.results.study import AttentionExample
from patchkit.studies._attention_rows import Looking, attention_rows


def prompt_examples(pairs: Mapping[str, Sequence[Pair]], n: int) -> list[dict[str, str]]:
    """The shortest prompts in words: `clean`, `answer`, `wrong`, and the corrupt one under each corruption's name.

    Clean prompts of one seed are the same under every corruption.
    """
    examples = []
    ordered = sorted(zip(*pairs.values(), strict=True), key=lambda several: len(several[0].clean_ids))
    for several in ordered[:n]:
        one = {name: str(several[0].meta[name]) for name in ("clean", "answer", "wrong")}
        examples.append(
            one | {name: str(pair.meta["corrupt"]) for name, pair in zip(pairs, several, strict=True)}
        )
    return examples


def attention_examples(model: PatchModel, pair: Pair, asked: Mapping[str, str]) -> list[AttentionExample]:
    """The attention of some heads on the clean prompt of a pair.

    Args:
        asked: head -> the span whose last token attends.
    """
    if model.tokenizer is None:
        return []
    tokens: list[str] = model.tokenizer.convert_ids_to_tokens(list(pair.clean_ids))  # pyright: ignore
    examples = []
    for span in dict.fromkeys(asked.values()):
        query = pair.spans[span][1] - 1
        heads = {name: parse_node(name, model.dims) for name in asked if asked[name] == span}
        layers = [site.layer for site, _ in heads.values()]
        (patterns,) = attention_rows(model, layers, [Looking(pair.clean_ids, query)])
        examples += [
            AttentionExample(
                head=name, tokens=tokens, query=query, weights=patterns[site.layer][head].tolist()
            )
            for name, (site, head) in heads.items()
        ]
    return examples
