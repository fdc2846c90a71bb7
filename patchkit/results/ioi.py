"""What the IOI study returns: how a model finds the indirect object, head by head, and whether its circuit holds.

`IoiStudy` is saved as `ioi.json`; the models below are its schema. Classes are names for behaviour that was measured,
under thresholds that are kept beside them; nothing here is taken from what is published about another model.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from patchkit.results.convention import Convention
from patchkit.results.evaluation import Evaluation
from patchkit.results.formats import read_model, write_model
from patchkit.results.paths import PathResult
from patchkit.results.study import AttentionExample

IOI = "ioi.json"

#: Tokens whose attention is measured: the end of the prompt, the second mention of S, the token after its first, and the
#: tokens of the names' clause behind both names (their mean).
QUERIES = ("last", "s2", "s1+1", "clause")
#: What it goes to; every token of a prompt is one of these, the first that fits. The clause is that of both names.
TARGETS = ("io", "s1", "s1+1", "s2", "last", "token before", "rest of clause", "first token", "elsewhere")

#: The stage of the logits, and the words for the inputs of heads in the names of the others.
DIRECT = "on the logits"
INPUTS = {"q": "queries", "k": "keys", "v": "values"}
_STAGE = re.compile(r"on the (?P<word>queries|keys|values) of group (?P<group>[0-9]+)")


def stage_name(letter: str, group: int) -> str:
    """The name of the stage of the queries (`q`), keys or values of a group, counted from 1."""
    return f"on the {INPUTS[letter]} of group {group}"


def read_stage(name: str) -> tuple[str, int] | None:
    """(letter, group) of a stage; None for that of the logits."""
    match = _STAGE.fullmatch(name)
    if match is None:
        return None
    return next(letter for letter, word in INPUTS.items() if word == match["word"]), int(match["group"])


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


#: From -> to -> attention mass; sums to 1 over `to`.
Attention = dict[str, dict[str, float]]


class HeadBehaviour(_Frozen):
    """What one head does, in numbers: means over prompts, all between 0 and 1."""

    attention: Attention = Field(description="means over prompts, from each of QUERIES to each of TARGETS")
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


class Look(_Frozen):
    """Where a head looks most beyond what even attention would: between named places, its own left out."""

    query: str = Field(description="one of last, s2, s1+1, clause (behind both names)")
    target: str = Field(description="one of the targets of attention, or names: both of them together")
    mass: float = Field(description="mean attention")
    clear: bool = Field(description="whether it is enough, and far enough above even attention, to say so")


class StageShare(_Frozen):
    """The effect of a head on one set of receivers, as path patching found it under one corruption."""

    corruption: str
    stage: str = Field(description="e.g. 'on the logits', 'on the values of group 1'")
    share: float = Field(description="effect / (clean - corrupt): -1 breaks all of the behaviour")
    chosen: bool


class HeadRow(_Frozen):
    """One head: what it is called, why, and its numbers."""

    head: str
    classes: list[str] = Field(description="every class whose rule it meets; empty for an unnamed head")
    evidence: str = Field(description="why, or what an unnamed head does, with numbers")
    in_circuit: bool
    stages: list[StageShare] = Field(description="those in which it was a sender, as they were run")
    behaviour: HeadBehaviour
    looks: Look
    takes_over: float | None = Field(
        default=None,
        description="what its direct effect helps more when the movers are knocked out, in units of (clean - corrupt); "
        "None for a head that was knocked out itself, or where nothing was",
    )


class Rule(_Frozen):
    """A class and what a head must do to be called so."""

    name: str
    criterion: str = Field(description="in words, with its thresholds")
    heads: list[str] = Field(description="that meet it, in the circuit or not")
    nearest: str | None = Field(
        default=None,
        description="where none does: the head that comes nearest, with its numbers, or why none could",
    )


class ProtocolScore(_Frozen):
    """The circuit under one protocol: the same heads may score from nothing to everything under another."""

    circuit: Literal["all edges", "traced edges"] = Field(
        description="all edges among its nodes, or between heads only those that were traced"
    )
    corruption: str
    ablation: str
    patching: Literal["edge", "node"]
    template: str | None = Field(
        default=None, description="the one template of the pairs; the means are then its own"
    )
    pairs: int
    n_edges: int
    clean_metric: float
    circuit_metric: float
    corrupt_metric: float
    faithfulness: float | None
    interval: tuple[float, float] | None = Field(default=None, description="95 % bootstrap of faithfulness")


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
    examples: list[dict[str, str]] = Field(
        description="prompts in words: clean, answer, wrong, and the corrupt prompt under each corruption's name"
    )
    convention: Convention
    pairs: int = Field(description="that paths were patched on and heads were watched on")
    seeds: dict[str, int] = Field(description="what was drawn -> its seed")
    parameters: dict[str, str] = Field(description="label -> value: sizes and thresholds")
    accuracy: Accuracy
    even: Attention = Field(description="what a head would do that looks at all tokens before it alike")
    paths: dict[str, PathResult] = Field(description="corruption -> stages from the logits backwards")
    groups: list[list[str]] = Field(
        description="heads by how they were found: group 1 acts on the logits, group 2 on the inputs of group 1, ..."
    )
    heads: list[HeadRow] = Field(description="all heads of the model, by layer")
    rules: list[Rule]
    attention: list[AttentionExample] = Field(description="circuit heads on one prompt")
    circuit_nodes: list[str] = Field(description="heads and MLPs; the input besides")
    traced_edges: list[str] = Field(
        description="edges between heads, and from heads to the logits, that were traced"
    )
    evaluation: Evaluation = Field(description="of the circuit with all edges, under node patching")
    protocols: list[ProtocolScore] = Field(description="the circuit under this and other protocols")
    knocked_out: str = Field(
        description="what the group is that was knocked out, in words; empty where none was"
    )
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
