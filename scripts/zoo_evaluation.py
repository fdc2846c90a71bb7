"""How the embedded models are measured: accuracy on held-out prompts, and a few ablations, with plain torch
hooks.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from patchkit.tasks import ioi_language, language


@dataclass(frozen=True)
class Measured:
    """An accuracy table (row -> column -> 0..1) and other numbers by name."""

    prompts_per_cell: int
    accuracy: dict[str, dict[str, float]]
    measurements: dict[str, float] = field(default_factory=dict)


def last_logits(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """Logits [B V] at the last token of each row; rows are padded on the left with id 0."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -1]


def hit_rate(model: PreTrainedModel, rows: Sequence[Sequence[int]], targets: Sequence[int]) -> float:
    """The share of rows whose most likely next token is the target."""
    guesses = torch.cat([last_logits(model, rows[i : i + 250]).argmax(-1) for i in range(0, len(rows), 250)])
    return round((guesses == torch.tensor(targets)).float().mean().item(), 4)


def binding_prompts(
    form: str, operation: str, n: int, seed: int
) -> list[tuple[language.Context, language.Query]]:
    """Held-out prompts of one cell: 2 to 6 variables, 0 to 3 distractors."""
    rng = random.Random(f"{seed} {form} {operation}")
    contexts = [language.sample_context(rng, form=form, split="test") for _ in range(n)]
    return [(context, language.sample_query(rng, context, operation=operation)) for context in contexts]


def binding_accuracy(model: PreTrainedModel, n: int, seed: int = 99) -> Measured:
    """Accuracy in every form x operation cell."""
    ids = {word: index for index, word in enumerate(language.VOCABULARY)}
    table: dict[str, dict[str, float]] = {}
    for form in language.FORMS:
        table[form] = {}
        for operation in language.OPERATIONS:
            prompts = binding_prompts(form, operation, n, seed)
            rows = [[ids[word] for word in (language.BOS, *language.words(*prompt))] for prompt in prompts]
            table[form][operation] = hit_rate(
                model, rows, [ids[language.answer(*prompt)] for prompt in prompts]
            )
    return Measured(n, table)


@contextmanager
def head_outputs(model: PreTrainedModel, change: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Within the block, every layer's z [B T H d_head] goes through `change(layer, z)` before the output
    projection.
    """
    heads, handles = model.config.num_attention_heads, []

    def hook_for(layer: int) -> Callable[..., tuple[Tensor]]:
        def hook(_module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            z = args[0]
            return (change(layer, z.unflatten(-1, (heads, -1))).flatten(-2),)

        return hook

    names = ("self_attn.o_proj", "attn.c_proj")
    projections = [module for name, module in model.named_modules() if name.endswith(names)]
    try:
        for layer, module in enumerate(projections):
            handles.append(module.register_forward_pre_hook(hook_for(layer)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def indirect_object_accuracy(model: PreTrainedModel, n: int, seed: int = 99) -> Measured:
    """Accuracy by number of pairs and bystanders, and how heads of two layers depend on each other."""
    ids = {word: index for index, word in enumerate(ioi_language.VOCABULARY)}

    def row(story: ioi_language.Story) -> list[int]:
        return [ids[word] for word in (ioi_language.BOS, *ioi_language.words(story))]

    table: dict[str, dict[str, float]] = {}
    for pairs in range(1, ioi_language.MAX_PAIRS + 1):
        table[f"{pairs} pairs"] = {}
        for bystanders in range(ioi_language.MAX_BYSTANDERS + 1):
            rng = random.Random(f"{seed} {pairs} {bystanders}")
            stories = [
                ioi_language.sample_story(rng, n_pairs=pairs, n_bystanders=bystanders, split="test")
                for _ in range(n)
            ]
            targets = [ids[ioi_language.answer(story)] for story in stories]
            table[f"{pairs} pairs"][f"{bystanders} bystanders"] = hit_rate(
                model, [row(story) for story in stories], targets
            )
    return Measured(n, table, _composition(model, n, seed))


def _composition(model: PreTrainedModel, n: int, seed: int) -> dict[str, float]:
    """Where the partner is looked up and how it gets to the end, in stories with two pairs and a bystander.

    For each layer's attention: the logit difference (partner minus giver) that is left, as a share of the whole,
    when all heads are zeroed, everywhere or at the end only; the share of answers that become the other giver's
    partner when all its heads' outputs at the end, or at S2, are put in from the same story with a giver of the
    other pair (and the largest such share for one head); and the largest mean attention of a head from the end to
    S2 and to IO.
    """
    ids = {word: index for index, word in enumerate(ioi_language.VOCABULARY)}
    rng = random.Random(seed)
    stories = [ioi_language.sample_story(rng, n_pairs=2, n_bystanders=1, split="test") for _ in range(n)]
    others = [ioi_language.with_giver(story, ioi_language.other_pair(story)[0]) for story in stories]
    rows, other_rows = (
        [[ids[word] for word in (ioi_language.BOS, *ioi_language.words(story))] for story in batch]
        for batch in (stories, others)
    )
    right, moved = (
        torch.tensor([ids[ioi_language.answer(story)] for story in batch]) for batch in (stories, others)
    )
    wrong = torch.tensor([ids[story.giver] for story in stories])
    spans = [ioi_language.spans(story) for story in stories]
    # Rows are padded on the left: a place counts from the right end.
    places = {
        place: torch.tensor([span[place][0] - len(row) for span, row in zip(spans, rows, strict=True)])
        for place in ("S2", "end")
    }
    each = torch.arange(n)

    def difference() -> float:
        logits = last_logits(model, rows)
        return (logits.gather(1, right[:, None]) - logits.gather(1, wrong[:, None])).mean().item()

    def kept(zeroed: int, place: str | None) -> float:
        def change(layer: int, z: Tensor) -> Tensor:
            if layer != zeroed:
                return z
            if place is None:
                return torch.zeros_like(z)
            z = z.clone()
            z[each, places[place]] = 0
            return z

        with head_outputs(model, change):
            return difference() / base

    sources: dict[int, Tensor] = {}

    def keep(layer: int, z: Tensor) -> Tensor:
        sources[layer] = z.clone()
        return z

    def answers_moved(patched: int, heads: slice, place: str) -> float:
        def change(layer: int, z: Tensor) -> Tensor:
            if layer == patched:
                z = z.clone()
                z[each, places[place], heads] = sources[layer][each, places[place], heads]
            return z

        with head_outputs(model, change):
            return (last_logits(model, rows).argmax(-1) == moved).float().mean().item()

    base = difference()
    with head_outputs(model, keep):
        last_logits(model, other_rows)
    attention = _attention_from_the_end(model, rows, spans)
    numbers = {"logit difference": base}
    for layer in range(model.config.num_hidden_layers):
        numbers[f"layer {layer} zeroed"] = kept(layer, None)
        numbers[f"layer {layer} zeroed at the end"] = kept(layer, "end")
        for place in ("S2", "end"):
            numbers[f"layer {layer} moved at {place}"] = answers_moved(layer, slice(None), place)
        numbers[f"layer {layer} moved at the end by one head"] = max(
            answers_moved(layer, slice(head, head + 1), "end")
            for head in range(model.config.num_attention_heads)
        )
        for name in ("S2", "IO"):
            numbers[f"layer {layer} attention from the end to {name}"] = attention[name][layer].max().item()
    return {name: round(value, 4) for name, value in numbers.items()}


def _attention_from_the_end(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], spans: Sequence[dict[str, tuple[int, int]]]
) -> dict[str, Tensor]:
    """Mean attention [layers heads] from the last token to S2 and to IO."""
    totals: dict[str, list[Tensor]] = {"S2": [], "IO": []}
    for row, span in zip(rows, spans, strict=True):
        patterns = attention_patterns(model, row)
        for name, values in totals.items():
            values.append(patterns[:, :, -1, span[name][0]])
    return {name: torch.stack(values).mean(0) for name, values in totals.items()}


def attention_patterns(model: PreTrainedModel, row: Sequence[int]) -> Tensor:
    """Attention weights [layers heads T T] on one prompt."""
    implementation = model.config._attn_implementation or "eager"
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            attentions = model(input_ids=torch.tensor([list(row)]), output_attentions=True).attentions
    finally:
        model.set_attn_implementation(implementation)
    return torch.cat(attentions)


def induction_accuracy(model: PreTrainedModel, n: int, seed: int = 99) -> Measured:
    """Accuracy on the second copy by length, each head's induction and previous-token score, and accuracy
    without MLPs.
    """
    vocabulary = model.config.vocab_size
    table: dict[str, dict[str, float]] = {"repeated": {}}
    for length in (8, 16, 24):
        rows, targets = _repeated(random.Random(f"{seed} {length}"), vocabulary, length, n)
        table["repeated"][f"length {length}"] = hit_rate(model, rows, targets)
    rows, targets = _repeated(random.Random(seed), vocabulary, 16, n)
    numbers = attention_scores(model, rows)
    handles = [
        module.register_forward_hook(lambda _module, _args, output: torch.zeros_like(output))
        for name, module in model.named_modules()
        if name.endswith(".mlp")
    ]
    try:
        numbers["accuracy without MLPs"] = hit_rate(model, rows, targets)
    finally:
        for handle in handles:
            handle.remove()
    return Measured(n, table, {name: round(value, 4) for name, value in numbers.items()})


def _repeated(rng: random.Random, vocabulary: int, length: int, n: int) -> tuple[list[list[int]], list[int]]:
    """Distinct random tokens twice, cut within the second copy: the next token is known. 1 + length + k
    tokens.
    """
    rows, targets = [], []
    for _ in range(n):
        tokens = rng.sample(range(3, vocabulary), length)
        cut = rng.randrange(1, length)
        rows.append([1, *tokens, *tokens[:cut]])
        targets.append(tokens[cut])
    return rows, targets


def attention_scores(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> dict[str, float]:
    """Mean attention at the last token to the one after its first occurrence (`induction`), and, over all
    tokens, to the one before (`previous`), for every head.
    """
    totals: dict[str, list[float]] = {}
    for row in rows:
        follower = list(row).index(row[-1]) + 1
        for layer, heads in enumerate(attention_patterns(model, row)):
            for head, pattern in enumerate(heads):
                node = f"a{layer}.h{head}"
                totals.setdefault(f"induction {node}", []).append(pattern[-1, follower].item())
                totals.setdefault(f"previous {node}", []).append(pattern.diagonal(-1)[1:].mean().item())
    return {name: sum(values) / len(values) for name, values in totals.items()}
