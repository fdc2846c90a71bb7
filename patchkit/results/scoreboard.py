"""What the ground-truth study returns: every method on every case whose circuit is known. Saved as `scoreboard.json`.

Cases are of three families. In `handmade` ones the circuit is written into the weights; in `siit` ones training has
forced it; in `natural` ones it is what exhaustive exact patching finds. Ranks are by |score|, whatever the sign.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from patchkit.results.convention import Convention
from patchkit.results.formats import read_model, write_model

SCOREBOARD = "scoreboard.json"

Family = Literal["handmade", "siit", "natural"]
Interval = tuple[float, float]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Missed(_Frozen):
    """How many of the truth's items of one kind are not among a method's top items, as many as the truth has."""

    kind: str = Field(description="why a method may miss them; '' for those that nothing was planted at")
    missed: int
    total: int
    names: list[str] = Field(default_factory=list, description="those that were missed")


class Ranking(_Frozen):
    """How well scores tell the truth's items from the others: of nodes, or of edges."""

    auroc: float | None = Field(description="ties count half; None where everything or nothing is true")
    interval: Interval | None = Field(default=None, description="95 % bootstrap over pairs of the AUROC")
    single: float | None = Field(
        default=None,
        description="mean AUROC of scores of one pair alone; None where a method has none of single pairs",
    )
    precision: float = Field(
        description="share of true items among the top ones, as many as the truth has; an item without a score, or "
        "with one that is rounding, is not found"
    )
    missed: list[Missed] = Field(description="the others of the truth, by kind of failure")


class MethodOnCase(_Frozen):
    """One method on one case."""

    method: str
    cost: float = Field(description="of the scores, in forwards a pair; a backward counts 1")
    nodes: Ranking | None = Field(description="of heads and MLPs, which every method ranks")
    inputs: Ranking | None = Field(
        default=None, description="of queries, keys and values; None for methods that do not rank them"
    )
    edges: Ranking | None = Field(
        description="of edges; of a node method each edge has its weaker end's score"
    )
    faithfulness: float | None = Field(
        description="of its circuit at the true size, on held-out pairs: nodes for node methods, edges for edge methods"
    )
    n_edges: int | None = Field(
        default=None, description="of that circuit after pruning; None for a circuit of nodes"
    )
    overlap: float | None = Field(default=None, description="Jaccard index of that circuit with the true one")
    cpr: float | None = Field(default=None, description="area under faithfulness against size (MIB)")
    cmd: float | None = Field(default=None, description="area between the curve and 1 (MIB)")
    curve: list[float | None] = Field(
        default_factory=list, description="faithfulness at each of the scoreboard's fractions of all edges"
    )
    seeds: list[float] = Field(
        default_factory=list,
        description="node AUROC by seed, of methods that draw at random; the other numbers are of the first seed",
    )
    note: str = Field(default="", description="what a reader must know of this cell")


class Case(_Frozen):
    """A model, a task, and what is true of it."""

    name: str
    family: Family
    title: str = Field(description="the program, the task or the case without the model's shape")
    model: str
    architecture: str
    task: str
    shows: str = Field(description="what is planted, or what was trained for")
    layers: int
    heads: int
    kv_heads: int
    pairs: int
    test_pairs: int
    n_nodes: int = Field(description="heads and MLPs")
    n_edges: int
    true_nodes: int
    true_edges: int
    silent: list[str] = Field(
        description="of the truth's nodes and edges those that change nothing when patched alone"
    )
    unlabelled_edges: int = Field(default=0, description="edges counted neither way")
    base_metric: float
    source_metric: float
    truth_faithfulness: float | None = Field(description="of the true circuit itself, on held-out pairs")
    truth_rule: str = Field(description="where the truth comes from")
    methods: list[MethodOnCase]
    seconds: float

    def of(self, method: str) -> MethodOnCase | None:
        """The row of a method."""
        return next((row for row in self.methods if row.method == method), None)


class Recovery(_Frozen):
    """Planted items of one kind in one case that AtP misses: which of them AtP* finds, and why not the others."""

    case: str
    kind: str
    missed: list[str] = Field(description="by AtP: nodes and inputs")
    recovered: list[str] = Field(description="of those, by AtP*")
    left: list[str]
    why: str = Field(default="", description="why what is left is left; '' where nothing is")


class Mean(_Frozen):
    """A mean over the cases of one family, or of all, with a 95 % bootstrap over cases."""

    method: str
    family: Family | Literal["all"]
    measure: str = Field(description="node auroc, edge auroc, single node auroc, faithfulness, cmd, ...")
    mean: float
    interval: Interval | None
    cases: int


class Scoreboard(_Frozen):
    """Everything that `patchkit study ground-truth` found."""

    schema_version: int = 1
    question: str
    date: str
    versions: dict[str, str]
    convention: Convention
    parameters: dict[str, str] = Field(description="label and value, for a reader")
    fractions: list[float] = Field(description="of all edges, at which curves are given")
    methods: dict[str, str] = Field(description="method -> what it is, in the order of the tables")
    kinds: dict[str, str] = Field(description="kind of failure -> why it makes a method miss, in words")
    cases: list[Case]
    means: list[Mean]
    recovery: list[Recovery] = Field(
        default_factory=list, description="of every planted saturation and cancellation"
    )
    findings: list[str]
    best: dict[str, str] = Field(
        description="question -> which method is best for it, in words that numbers choose"
    )
    command: str
    seconds: float

    def mean_of(self, method: str, measure: str, family: str = "all") -> Mean | None:
        """The mean of one measure, if it has one."""
        return next(
            (
                each
                for each in self.means
                if (each.method, each.measure, each.family) == (method, measure, family)
            ),
            None,
        )

    def of_edges(self, method: str) -> bool:
        """Whether a method scores edges: its circuits are of edges in some case."""
        rows = (case.of(method) for case in self.cases)
        return any(row is not None and row.n_edges is not None for row in rows)

    @property
    def families(self) -> list[Family]:
        """Those that cases are of, in their order."""
        return list(dict.fromkeys(case.family for case in self.cases))

    def missed(self, method: str, what: Literal["nodes", "inputs", "edges"]) -> dict[str, tuple[int, int]]:
        """Kind of failure -> (missed, total), over all cases."""
        found: dict[str, tuple[int, int]] = {}
        for each in self._missed(method, what):
            missed, total = found.get(each.kind, (0, 0))
            found[each.kind] = (missed + each.missed, total + each.total)
        return found

    def _missed(self, method: str, what: str) -> Iterable[Missed]:
        for case in self.cases:
            row = case.of(method)
            ranking = None if row is None else getattr(row, what)
            yield from () if ranking is None else ranking.missed

    def save(self, directory: Path | str) -> None:
        """Writes scoreboard.json into `directory` by rename."""
        write_model(Path(directory) / SCOREBOARD, self)

    @classmethod
    def load(cls, directory: Path | str) -> Scoreboard:
        """Reads scoreboard.json; InputError if it is missing or malformed."""
        return read_model(Path(directory) / SCOREBOARD, cls)
