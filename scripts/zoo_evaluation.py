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
    return (guesses == torch.tensor(targets)).float().mean().item()


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
    """Share of the logit difference (IO minus giver) lost when a head is zeroed, at all positions; and, for
    the most needed early head, the share of that loss which is undone by holding the most needed later head
    at its clean output.
    """
    ids = {word: index for index, word in enumerate(ioi_language.VOCABULARY)}
    rng = random.Random(seed)
    stories = [ioi_language.sample_story(rng, n_pairs=2, n_bystanders=1, split="test") for _ in range(n)]
    rows = [[ids[word] for word in (ioi_language.BOS, *ioi_language.words(story))] for story in stories]
    right = torch.tensor([ids[ioi_language.answer(story)] for story in stories])
    wrong = torch.tensor([ids[story.giver] for story in stories])

    def difference() -> float:
        logits = last_logits(model, rows)
        return (logits.gather(1, right[:, None]) - logits.gather(1, wrong[:, None])).mean().item()

    clean: dict[int, Tensor] = {}

    def keep(layer: int, z: Tensor) -> Tensor:
        clean[layer] = z.clone()
        return z

    with head_outputs(model, keep):
        base = difference()

    def lost(zeroed: tuple[int, int], held: tuple[int, int] | None = None) -> float:
        def change(layer: int, z: Tensor) -> Tensor:
            z = z.clone()
            if layer == zeroed[0]:
                z[:, :, zeroed[1]] = 0
            if held is not None and layer == held[0]:
                z[:, :, held[1]] = clean[layer][:, :, held[1]]
            return z

        with head_outputs(model, change):
            return 1 - difference() / base

    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    losses = {(layer, head): lost((layer, head)) for layer in range(layers) for head in range(heads)}
    early = max((node for node in losses if node[0] == 0), key=lambda node: losses[node])
    late = max((node for node in losses if node[0] > 0), key=lambda node: losses[node])
    numbers = {"logit difference": base}
    numbers |= {f"lost without a{layer}.h{head}": value for (layer, head), value in losses.items()}
    through = 1 - lost(early, late) / losses[early]
    numbers[f"share of a{early[0]}.h{early[1]} through a{late[0]}.h{late[1]}"] = through
    return {name: round(value, 4) for name, value in numbers.items()}


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
    numbers: dict[str, float] = {}
    totals: dict[str, list[float]] = {}
    implementation = model.config._attn_implementation or "eager"
    model.set_attn_implementation("eager")
    try:
        for row in rows:
            with torch.no_grad():
                attentions = model(input_ids=torch.tensor([list(row)]), output_attentions=True).attentions
            follower = list(row).index(row[-1]) + 1
            for layer, weights in enumerate(attentions):
                for head, pattern in enumerate(weights[0]):
                    node = f"a{layer}.h{head}"
                    totals.setdefault(f"induction {node}", []).append(pattern[-1, follower].item())
                    previous = pattern.diagonal(-1)[1:].mean().item()
                    totals.setdefault(f"previous {node}", []).append(previous)
    finally:
        model.set_attn_implementation(implementation)
    numbers.update({name: sum(values) / len(values) for name, values in totals.items()})
    return numbers
