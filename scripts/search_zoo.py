"""Score trained candidates of varbind-llama by the mask of the variable-binding study, one row each.

    python scripts/search_zoo.py --out search.csv CANDIDATE_DIR...

A candidate is a directory written by `train_zoo.py`. The mask is learned on one form and scored on held-out
triples of every form. A model suits the study if few components reach 0.97 value dependence and operation
invariance in every form, while their complement and random sets of their size fail at one of the two.
"""

import argparse
import csv
import tempfile
from pathlib import Path

import torch

from patchkit.methods import MaskOptions
from patchkit.studies.variable_binding import StudyOptions, run_study
from patchkit.zoo.cards import read_card
from patchkit.zoo.load import load

OPTIONS = StudyOptions(
    train_form="order", n_train=96, n_test=400, mask=MaskOptions(seeds=(0,), own_masks=False)
)


def score(directory: Path) -> dict[str, str | int | float]:
    """One row: how the model was made, its worst accuracy, the chosen components, their scores, the baselines."""
    card, model = read_card(directory), load(directory)
    with tempfile.TemporaryDirectory() as out:
        mask, study = run_study(model, Path(out), OPTIONS)
    trained = [scores.name for scores in mask.desiderata if scores.trained]
    worst = {name: min(form.scores[name] for form in study.forms) for name in trained}
    row: dict[str, str | int | float] = {
        "layers": card.layers,
        "heads": card.heads,
        "kv_heads": card.kv_heads,
        "seed": card.seed if card.seed is not None else "",
        "steps": card.train_steps if card.train_steps is not None else "",
        "seconds": card.train_seconds if card.train_seconds is not None else "",
        "worst_cell_accuracy": card.worst_accuracy,
        "components": len(mask.chosen),
        "of": mask.n_components,
        "share": len(mask.chosen) / mask.n_components,
        "chosen": " ".join(mask.chosen),
    }
    row |= {f"{name}_worst_form": value for name, value in worst.items()}
    row |= {f"{kind}_joint": mask.joint[kind] for kind in ("empty", "complement")}
    row |= {
        "random_joint_mean": sum(mask.random_joint) / len(mask.random_joint),
        "random_joint_max": max(mask.random_joint),
    }
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
