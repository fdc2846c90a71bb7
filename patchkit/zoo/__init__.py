"""The models that come with the package: small trained ones, and some written by hand whose circuit is known.

names()                what there is, but the many of `patchkit.zoo.programs`
embedded(name)         whether it is one of them, or one of the programs
card(name)             how it was made, its accuracy, what it shows and does not show
find(name)             the directory of a trained model in the installed package, or None
build(name)            (module, tokenizer), in float32 and without gradients, for every name
"""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from patchkit.errors import InputError
from patchkit.zoo import handmade, programs
from patchkit.zoo.cards import ModelCard, read_card
from patchkit.zoo.programs.cards import program_card

MODELS = Path(__file__).parent / "models"
_WRITTEN: dict[str, float] = {
    "handmade-llama": handmade.GRADED,
    "handmade-llama-saturated": handmade.SATURATED,
}


def names() -> list[str]:
    """The embedded models: those with weights in the package, then those built in code."""
    return sorted(path.parent.name for path in MODELS.glob("*/card.json")) + list(_WRITTEN)


def embedded(name: str) -> bool:
    """Whether `build` knows the name."""
    return name in names() or name in programs.names()


def find(name: str) -> Path | None:
    """The directory of a trained model's weights, tokenizer and card; None for any other name."""
    directory = MODELS / name
    return directory if name in names() and (directory / "card.json").is_file() else None


def card(name: str) -> ModelCard:
    """The model's card. InputError for a name that is not embedded."""
    directory = find(_known(name))
    if name in programs.names():
        return program_card(name, *programs.find(name))
    return handmade.card(name, _WRITTEN[name]) if directory is None else read_card(directory)


def build(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A fresh module in float32, in evaluation mode and without gradients, and its tokenizer."""
    directory = find(_known(name))
    if name in programs.names():
        return programs.build(name)
    if directory is None:
        return handmade.build(_WRITTEN[name])
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    return model.eval().requires_grad_(False), tokenizer


def _known(name: str) -> str:
    if not embedded(name):
        raise InputError(
            f"no embedded model is called {name!r}; there are: {', '.join(names())}, and handmade-PROGRAM-SHAPE with "
            f"PROGRAM one of {', '.join(programs.PROGRAMS)} and SHAPE one of {', '.join(programs.SHAPES)}"
        )
    return name
