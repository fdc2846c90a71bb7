"""What causal scrubbing found: how much of the behaviour is left when all is resampled that a hypothesis leaves free.

    recovered = (scrubbed - random) / (model - random)

is 1 where the hypothesis explains the behaviour and about 0 where it explains nothing; it may lie outside.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from patchkit.results.convention import Convention
from patchkit.results.formats import read_model, write_model

SCRUBBING = "scrubbing.json"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ScrubNode(_Frozen):
    """One interpretation node, and how well the inputs could test it."""

    name: str
    key: str = Field(description="what it is said to compute: the key function's docstring, or its name")
    nodes: list[str] = Field(description="senders of the model, at their tokens, e.g. `a1.h3@last`")
    edges: list[str] = Field(description="edges, where it stands for these alone; else empty")
    positions: str
    children: list[str]
    occurrences: int = Field(description="in the treeified graph: paths from the output")
    buckets: int = Field(description="different keys among the inputs to draw from")
    bucket_sizes: tuple[int, float, int] = Field(description="smallest, median, largest")
    singletons: int = Field(description="buckets that hold one input")
    empty: int = Field(description="keys that were asked for and that no input to draw from has")
    draws: int
    vacuous: int = Field(
        description="draws that could give nothing but the prompt that was to be replaced: nothing was tested"
    )


class ScrubbedInput(_Frozen):
    """One reference input; numbers are means over its scrubbed runs."""

    id: str
    model: float
    random: float = Field(
        description="metric of the whole model on the unrelated input, with this one's answer"
    )
    scrubbed: float
    spread: float | None = Field(description="standard deviation over its scrubbed runs; None with one run")


class ScrubResult(_Frozen):
    """One hypothesis, scrubbed."""

    hypothesis: str
    claim: str = Field(description="what it says, in words")
    model: str
    convention: Convention
    samples: int = Field(description="scrubbed runs of each reference input")
    seed: int
    children: list[str] = Field(description="the nodes that the output is said to be computed from")
    nodes: list[ScrubNode]
    pool: int = Field(description="inputs to draw from")
    inputs: list[ScrubbedInput]
    model_metric: float = Field(description="mean over reference inputs")
    random_metric: float
    scrubbed_metric: float
    scrubbed_interval: tuple[float, float] = Field(
        description="95 % bootstrap over reference inputs of the mean"
    )
    recovered: float | None = Field(
        description="(scrubbed - random) / (model - random); None where model and random are one"
    )
    recovered_interval: tuple[float, float] | None = Field(
        description="95 % bootstrap over reference inputs; None where undefined"
    )
    gap: float | None = Field(
        description="mean over inputs of |model - scrubbed|, in units of |model - random|: inputs cannot cancel in it"
    )
    kept: float | None = Field(
        description="share of inputs whose scrubbed metric lies nearer to the model's mean than to the random one"
    )
    quantiles: tuple[float, float, float, float, float] = Field(
        description="5, 25, 50, 75 and 95 % of the scrubbed metric over reference inputs"
    )
    forwards: float = Field(description="prompts run, a part of the layers counting as that part")
    notes: list[str] = Field(default_factory=list, description="what a reader must know")

    @property
    def vacuous(self) -> float:
        """Share of all draws that tested nothing."""
        draws = sum(node.draws for node in self.nodes)
        return sum(node.vacuous for node in self.nodes) / draws if draws else 0.0

    @property
    def lines(self) -> list[str]:
        """The result in a few lines of text."""
        share = "undefined" if self.recovered is None else f"{self.recovered:.3f}"
        if self.recovered_interval is not None:
            share += " [{:.3f}, {:.3f}]".format(*self.recovered_interval)
        return [
            f"{self.hypothesis}: recovered {share}",
            f"  {self.convention.metric}: model {self.model_metric:.4g}, scrubbed {self.scrubbed_metric:.4g}, "
            f"random {self.random_metric:.4g} ({len(self.inputs)} inputs, {self.samples} run(s) of each)",
            *(f"  {note}" for note in self.notes),
        ]

    def save(self, directory: Path | str) -> None:
        """Writes scrubbing.json with this hypothesis alone."""
        Scrubbing(results=[self]).save(directory)


class Scrubbing(_Frozen):
    """Hypotheses about one model on the same inputs, side by side: `scrubbing.json`."""

    schema_version: int = 1
    question: str = ""
    results: list[ScrubResult]
    findings: list[str] = Field(default_factory=list, description="what the numbers say, in words")
    command: str = ""
    seconds: float = 0.0

    def result(self, hypothesis: str) -> ScrubResult:
        """The result of a hypothesis by name; KeyError that names those there are."""
        for result in self.results:
            if result.hypothesis == hypothesis:
                return result
        raise KeyError(
            f"no hypothesis '{hypothesis}' here, only {', '.join(r.hypothesis for r in self.results)}"
        )

    def save(self, directory: Path | str) -> None:
        """Writes scrubbing.json by rename."""
        write_model(Path(directory) / SCRUBBING, self)

    @classmethod
    def load(cls, directory: Path | str) -> Scrubbing:
        """Reads scrubbing.json; InputError if it is missing or malformed."""
        return read_model(Path(directory) / SCRUBBING, cls)
