"""Score trained candidates of varbind-llama by the variable-binding study's mask, one row each.

    python scripts/search_zoo.py --out search.csv CANDIDATE_DIR...

A candidate is a directory written by `train_zoo.py`. The mask is learned on one surface form, on
the three desiderata of the study, and its chosen components are scored on held-out triples of every
form. A model suits the study if at most 14 % of the components reach 0.97 value dependence and
operation invariance in every form, while their complement, and random sets of their size, fail at
one of the two.
"""

import argparse
import csv
from pathlib import Path

import torch

from patchkit.data import Triple
from patchkit.methods import MaskOptions, learn_mask
from patchkit.methods.mask_scores import answers_with
from patchkit.model import PatchModel
from patchkit.studies.variable_binding import TRAINED
from patchkit.tasks.building import gather
from patchkit.tasks.language import FORMS
from patchkit.zoo.cards import read_card
from patchkit.zoo.load import load

TRAIN_FORM, N_TRAIN, N_TEST, N_TEST_PER_FORM, SEED = "order", 96, 100, 300, 0
OPTIONS = MaskOptions(
    train_on=tuple(desideratum.name for desideratum in TRAINED), seeds=(0,), own_masks=False, carried_limit=0
)


def triples(model: PatchModel, n: int, seed: int, split: str, form: str | None) -> list[Triple]:
    """`n` triples of each of the study's trained desiderata."""
    made = [(d.name, d(model.tokenizer, n, seed, split, form=form)) for d in TRAINED]
    return gather(made).triples()


def score(directory: Path) -> dict[str, str | int | float]:
    """One row: how the model was made, its worst accuracy, the chosen components, their scores, the
    baselines.
    """
    card, model = read_card(directory), load(directory)
    train = triples(model, N_TRAIN, SEED, "train", TRAIN_FORM)
    mask = learn_mask(model, train + triples(model, N_TEST, SEED, "test", None), OPTIONS)
    cells = {
        f"{d.name} {form}": [
            t for t in triples(model, N_TEST_PER_FORM, SEED + 1, "test", form) if t.desideratum == d.name
        ]
        for d in TRAINED
        for form in FORMS
    }
    scores, _answers = answers_with(model, cells, mask.chosen)
    row: dict[str, str | int | float] = {
        "layers": card.layers,
        "heads": card.heads,
        "kv_heads": card.kv_heads,
        "seed": "" if card.seed is None else card.seed,
        "steps": card.train_steps or "",
        "seconds": card.train_seconds or "",
        "worst_cell_accuracy": card.worst_accuracy,
        "components": len(mask.chosen),
        "of": mask.n_components,
        "share": len(mask.chosen) / mask.n_components,
        "chosen": " ".join(mask.chosen),
    }
    for desideratum in TRAINED:
        row[f"{desideratum.name}_worst_form"] = min(scores[f"{desideratum.name} {form}"] for form in FORMS)
    row["empty_joint"], row["complement_joint"] = mask.joint["empty"], mask.joint["complement"]
    row["random_joint_mean"] = sum(mask.random_joint) / len(mask.random_joint)
    row["random_joint_max"] = max(mask.random_joint)
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("candidates", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="the table to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [score(directory) for directory in options.candidates]
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
