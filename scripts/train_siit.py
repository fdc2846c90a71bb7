"""Train a model with a forced circuit from its standard random initialisation and write it with its card.

    python scripts/train_siit.py --case siit-add-llama --out DIR [--seed S] [--max-steps N]

The same seed gives the same weights on the same machine and versions. What the model learns is in
`patchkit/zoo/siit.py`, how in siit_training.py, its shape and schedule in siit_recipes.py. The card's numbers are
those of the written weights, rounded to float16, on prompts of another seed than any that was trained on.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from siit_recipes import RECIPES, SiitRecipe
from siit_training import SiitTrainer, train
from zoo_training import TrainingRecord

from patchkit.studies.siit_checks import interchange_accuracy, non_circuit_change
from patchkit.zoo.cards import ModelCard, write_card
from patchkit.zoo.load import load
from patchkit.zoo.siit import CASES, SiitCase

PROMPTS = 500
DOES_NOT_SHOW = (
    "how such a task is done by a model that is trained on it alone: the circuit was forced on this one; nor that a "
    "node does nothing else: variables are nodes as a whole, at all positions, and edges are not told apart by query, "
    "key and value; prompts of the test are drawn like those of the training, and short ones may be the same"
)


def make(name: str, recipe: SiitRecipe, seed: int, out: Path, prompts: int) -> ModelCard:
    """Train, write the weights in float16, measure what was written."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    case = CASES[name]
    trainer = SiitTrainer(recipe.build(len(case.tokenizer())), case, recipe.curriculum, seed)
    record = train(trainer, out / "training_log.csv")
    trainer.model.half().save_pretrained(out)
    (out / "generation_config.json").unlink(missing_ok=True)
    case.tokenizer().save_pretrained(out)
    card = describe(case, recipe, seed, record, out, prompts)
    write_card(out, card)
    return card


def describe(
    case: SiitCase, recipe: SiitRecipe, seed: int, record: TrainingRecord, out: Path, prompts: int
) -> ModelCard:
    """The card of the model that is written in `out`, measured on it."""
    model = load(out, dtype="float32")
    followed = interchange_accuracy(model, case, prompts, seed=1)
    changed = non_circuit_change(model, case, prompts, seed=1)
    dims, config = model.dims, model.config
    measured = {
        **{f"interchange accuracy, {name}": value for name, value in followed.variables.items()},
        "interchange accuracy, random sets of variables": followed.subsets,
        "answers changed, all other nodes from another prompt": changed.resample,
        "answers changed, all other nodes by their mean": changed.mean,
        "answers changed, all other nodes by zeros": changed.zero,
        "answers changed, the worst other node alone": max(changed.single.values()),
    }
    carried = ", ".join(f"{name} in {node}" for name, node in case.variables.items())
    return ModelCard(
        name=case.name,
        architecture=type(model.hf).__name__,
        layers=dims.n_layers,
        heads=dims.n_heads,
        kv_heads=dims.n_kv_heads,
        d_model=dims.d_model,
        d_mlp=dims.d_mlp,
        vocab_size=config.vocab_size,
        parameters=sum(parameter.numel() for parameter in model.hf.parameters()),
        bytes=(out / "model.safetensors").stat().st_size,
        task=case.task,
        shows=f"a circuit forced by training (SIIT): {carried}; edges {', '.join(case.edges)}",
        does_not_show=DOES_NOT_SHOW,
        command=f"python scripts/train_siit.py --case {case.name} --seed {seed} --out DIR",
        seed=seed,
        train_steps=record.steps,
        train_seconds=round(record.seconds, 1),
        prompts_per_cell=prompts,
        accuracy={"prompts": {"answer": round(followed.plain, 4)}},
        measurements={name: round(value, 4) for name, value in measured.items()},
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=sorted(RECIPES), required=True)
    parser.add_argument("--out", type=Path, required=True, help="directory to write; made if absent")
    parser.add_argument("--seed", type=int, help="default: the seed of the model that ships")
    parser.add_argument("--max-steps", type=int, help="stop early, for trying the script out")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="held-out prompts per measurement")
    options = parser.parse_args()
    recipe = RECIPES[options.case]
    if options.max_steps is not None:
        schedule = replace(recipe.curriculum.schedule, max_steps=options.max_steps)
        recipe = replace(recipe, curriculum=replace(recipe.curriculum, schedule=schedule))
    seed = recipe.seed if options.seed is None else options.seed
    card = make(options.case, recipe, seed, options.out, options.prompts)
    print(f"{card.name}: seed {seed}, {card.train_steps} steps, {card.train_seconds} s, {card.bytes} bytes")
    print(f"  {'accuracy':55} {card.worst_accuracy:.4f}")
    for name, value in card.measurements.items():
        print(f"  {name:55} {value:.4f}")


if __name__ == "__main__":
    main()
