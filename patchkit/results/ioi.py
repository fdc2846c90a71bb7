"""What the IOI study returns: how a model finds the indirect object, head by head, and whether its circuit holds.

`IoiStudy` is saved as `ioi.json`; the models below are its schema. Classes are names for behaviour that was measured,
under thresholds that are kept beside them; nothing here is taken from what is published about another model.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from patchkit.results.convention import Convention
from patchkit.results.evaluation import Evaluation
from patchkit.results.formats import read_model, write_model
from patchkit.results.paths import PathResult
from patchkit.results.study import AttentionExample

IOI = "ioi.json"

#: Tokens whose attention is measured: the end of the prompt, the second mention of S, the token after its first.
QUERIES = ("last", "s2", "s1+1")
#: What it goes to; every token of a prompt is one of these, the first that fits. The clause is that of both names.
TARGETS = ("io", "s1", "s1+1", "s2", "last", "token before", "rest of clause", "first token", "elsewhere")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class HeadBehaviour(_Frozen):
    """What one head does, in numbers: means over prompts, all between 0 and 1."""

    attention: dict[str, dict[str, float]] = Field(
        description="from (last, s2, s1+1) -> to -> mean attention mass; sums to 1 over `to`"
    )
    copying: float = Field(
        description="share of names that its W_V W_O puts among the top 5 tokens (Wang et al. 2022)"
    )
    negative_copying: float = Field(description="the same for its negated output")
    writes_io: float = Field(
        description="share of prompts whose IO is among the top 5 tokens that its output at the end raises, above S"
    )
    writes_s: float = Field(description="the same for S, above IO")
    previous: float = Field(description="on random tokens twice: mean attention to the token before")
    duplicate: float = Field(description="there: to the same token's first place")
    induction: float = Field(description="there: to the token after its first place")


class StageShare(_Frozen):
    """The effect of a head on one set of receivers, as path patching found it."""

    stage: str
    share: float = Field(description="of (clean - corrupt); -1 breaks all of the behaviour")
    chosen: bool


class HeadRow(_Frozen):
    """One head: what it is called, why, and its numbers."""

    head: str
    classes: list[str] = Field(description="every class whose rule it meets; empty for an unnamed head")
    evidence: str = Field(description="why, or what an unnamed head does, with numbers")
    in_circuit: bool
    stages: list[StageShare] = Field(description="those stages in which it is upstream")
    behaviour: HeadBehaviour
    direct_after: float | None = Field(
        default=None,
        description="change of its direct effect when the movers are knocked out, in units of (clean - corrupt); None "
        "for a head that was knocked out itself, or where nothing was",
    )


class Rule(_Frozen):
    """A class and what a head must do to be called so."""

    name: str
    criterion: str = Field(description="in words, with its thresholds")
    heads: list[str] = Field(description="that meet it, in the circuit or not")
    nearest: str | None = Field(
        default=None, description="where none does: the head that comes nearest, with its numbers"
    )


class TemplateScore(_Frozen):
    """The circuit on the prompts of one template, what is outside of it replaced by the template's means over ABC."""

    template: str
    pairs: int
    clean_metric: float
    circuit_metric: float
    corrupt_metric: float
    faithfulness: float | None


class Accuracy(_Frozen):
    """Whether the model does the task at all, on the prompts of the study."""

    prefers_io: float = Field(description="share of prompts with logit(IO) > logit(S)")
    says_io: float = Field(description="share of prompts whose most likely next token is IO")


class IoiStudy(_Frozen):
    """Everything that `patchkit study ioi` found."""

    schema_version: int = 1
    question: str
    model: str
    model_card: dict[str, str] = Field(
        default_factory=dict, description="label -> value, printed as they stand"
    )
    examples: list[dict[str, str]] = Field(description="prompts in words: clean, corrupt, answer, wrong")
    convention: Convention
    corruption: str
    pairs: int
    seeds: dict[str, int] = Field(description="what was drawn -> its seed")
    parameters: dict[str, str] = Field(description="label -> value: sizes and thresholds")
    accuracy: Accuracy
    paths: PathResult
    heads: list[HeadRow] = Field(description="all heads of the model, by layer")
    rules: list[Rule]
    attention: list[AttentionExample] = Field(description="circuit heads on one prompt")
    circuit_nodes: list[str]
    circuit_edges: list[str]
    evaluation: Evaluation
    templates: list[TemplateScore]
    comparison: dict[str, str] = Field(
        default_factory=dict, description="published figure -> ours, when the model is theirs"
    )
    findings: list[str]
    notes: list[str]
    command: str = Field(description="the command that makes this again")
    seconds: float

    def head(self, name: str) -> HeadRow:
        """One head by its name; KeyError where the model has none of it."""
        return {row.head: row for row in self.heads}[name]

    def of_class(self, name: str) -> list[str]:
        """The heads that meet the rule of a class; KeyError for a class that no rule is of."""
        return {rule.name: rule for rule in self.rules}[name].heads

    def save(self, directory: Path | str) -> None:
        """Writes ioi.json into `directory` by rename."""
        write_model(Path(directory) / IOI, self)

    @classmethod
    def load(cls, directory: Path | str) -> IoiStudy:
        """Reads ioi.json; InputError if it is missing or malformed."""
        return read_model(Path(directory) / IOI, cls)
