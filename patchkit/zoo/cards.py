"""The card of an embedded model: how it was made, how well it does, and what it can and cannot show."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field


class ModelCard(BaseModel):
    """One embedded model. Read from `card.json` beside the weights; the handmade models state
    theirs in code.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    architecture: str = Field(description="the Hugging Face class")
    layers: int
    heads: int
    kv_heads: int
    d_model: int
    d_mlp: int
    vocab_size: int
    parameters: int
    bytes: int = Field(description="size of the weights file; 0 for a model built in code")
    task: str = Field(description="what the model does, in a sentence, with an example")
    shows: str = Field(description="what has been measured on it")
    does_not_show: str = Field(description="what it must not be taken as evidence for")
    command: str | None = Field(
        default=None, description="what makes it again; None for a model built in code"
    )
    seed: int | None = None
    train_steps: int | None = None
    train_seconds: float | None = None
    prompts_per_cell: int = Field(description="how many held-out prompts each accuracy was measured on")
    accuracy: dict[str, dict[str, float]] = Field(
        description="row (surface form) -> column (operation) -> accuracy on held-out prompts, 0..1"
    )
    measurements: dict[str, float] = Field(default_factory=dict, description="other numbers, by name")

    @property
    def worst_accuracy(self) -> float:
        """The smallest number of the accuracy table."""
        return min(value for row in self.accuracy.values() for value in row.values())


def read_card(directory: Path) -> ModelCard:
    """The card beside the weights in `directory`."""
    return ModelCard.model_validate_json((directory / "card.json").read_text(encoding="utf-8"))


def write_card(directory: Path, card: ModelCard) -> None:
    """Write `card.json` beside the weights in `directory`."""
    (directory / "card.json").write_text(card.model_dump_json(indent=2) + "\n", encoding="utf-8")
