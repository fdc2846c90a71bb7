"""Train one of the embedded models from its standard random initialisation and write it with its card.

    python scripts/train_zoo.py --model varbind-llama --out DIR [--seed S] [--max-steps N]

The same seed gives the same weights on the same machine and versions. Nothing is planted: the model starts
as transformers initialises it, and learns from the stream of batches alone (see zoo_curricula.py and
zoo_recipes.py).
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel
from zoo_recipes import RECIPES, Recipe
from zoo_training import TrainingRecord, train

from patchkit.zoo.cards import ModelCard, write_card

PROMPTS_PER_CELL = 500


def make(name: str, recipe: Recipe, seed: int, out: Path, prompts: int) -> ModelCard:
    """Train, round the weights to float16, write everything to `out`, measure what was written."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    model = recipe.build()
    record = train(model, recipe.stream(seed), recipe.schedule, out / "training_log.csv")
    return write(name, recipe, seed, model, record, out, prompts)


def write(
    name: str,
    recipe: Recipe,
    seed: int,
    model: PreTrainedModel,
    record: TrainingRecord,
    out: Path,
    prompts: int,
) -> ModelCard:
    """Write weights, tokenizer and card; the card's numbers are those of the weights after rounding."""
    model.half().save_pretrained(out)
    (out / "generation_config.json").unlink(missing_ok=True)
    recipe.tokenizer().save_pretrained(out)
    model.float().eval()
    measured, config = recipe.measure(model, prompts), model.config
    card = ModelCard(
        name=name,
        architecture=type(model).__name__,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=getattr(config, "num_key_value_heads", config.num_attention_heads),
        d_model=config.hidden_size,
        d_mlp=getattr(config, "intermediate_size", None) or config.n_inner,
        vocab_size=config.vocab_size,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        bytes=(out / "model.safetensors").stat().st_size,
        task=recipe.task,
        shows=recipe.shows,
        does_not_show=recipe.does_not_show,
        command=f"python scripts/train_zoo.py --model {name} --seed {seed} --out DIR",
        seed=seed,
        train_steps=record.steps,
        train_seconds=round(record.seconds, 1),
        prompts_per_cell=measured.prompts_per_cell,
        accuracy=measured.accuracy,
        measurements={**recipe.notes, **measured.measurements},
    )
    write_card(out, card)
    return card


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(RECIPES), required=True)
    parser.add_argument("--out", type=Path, required=True, help="directory to write; made if absent")
    parser.add_argument("--seed", type=int, help="default: the seed of the model that ships")
    parser.add_argument("--max-steps", type=int, help="stop early, for trying the script out")
    parser.add_argument("--prompts", type=int, default=PROMPTS_PER_CELL, help="held-out prompts per accuracy")
    options = parser.parse_args()
    recipe = RECIPES[options.model]
    if options.max_steps is not None:
        recipe = replace(recipe, schedule=replace(recipe.schedule, max_steps=options.max_steps))
    seed = recipe.seed if options.seed is None else options.seed
    card = make(options.model, recipe, seed, options.out, options.prompts)
    print(f"{card.name}: seed {seed}, {card.train_steps} steps, {card.train_seconds} s, {card.bytes} bytes")
    for row, cells in card.accuracy.items():
        print(f"  {row:10}", "  ".join(f"{column} {value:.3f}" for column, value in cells.items()))


if __name__ == "__main__":
    main()
