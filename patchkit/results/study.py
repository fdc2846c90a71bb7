"""What the variable-binding study hands to the report: examples in words and what the chosen heads look at."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from patchkit.results.formats import read_model, write_model


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PromptExample(_Frozen):
    """One triple in words, with the model's answers without and with the patch."""

    desideratum: str
    original: list[str] = Field(description="tokens")
    alternate: list[str] = Field(description="tokens")
    position: int = Field(description="index of the patched token in `original`")
    original_answer: str
    alternate_answer: str
    target: str
    answer_with_patch: str


class AttentionExample(_Frozen):
    """Where one head looks from one token."""

    head: str
    tokens: list[str]
    query: int = Field(description="index of the token that attends")
    weights: list[float] = Field(description="attention probabilities over `tokens`, sum 1")


class FormScores(_Frozen):
    """Held-out scores of the chosen set on one surface form."""

    form: str
    trained: bool
    scores: dict[str, float]


class VariableBindingStudy(_Frozen):
    """Everything the page of the variable-binding study shows besides the mask itself."""

    schema_version: int = 1
    question: str
    model: str
    model_card: dict[str, str] = Field(
        default_factory=dict, description="label -> value, printed as they stand"
    )
    examples: list[PromptExample]
    attention: list[AttentionExample]
    attention_summary: dict[str, dict[str, float]] = Field(
        default_factory=dict,
        description="head -> mean attention from the last token to: the queried value, its name, other values, rest",
    )
    forms: list[FormScores]
    command: str = Field(description="the command that makes this again")
    seconds: float
    comparison: dict[str, str] = Field(
        default_factory=dict, description="published figure -> ours, when the model is theirs"
    )
    notes: list[str] = Field(default_factory=list)

    def save(self, directory: Path | str) -> None:
        """Writes study.json into `directory` by rename."""
        write_model(Path(directory) / "study.json", self)

    @classmethod
    def load(cls, directory: Path | str) -> VariableBindingStudy:
        """Reads study.json; InputError if it is missing or malformed."""
        return read_model(Path(directory) / "study.json", cls)
