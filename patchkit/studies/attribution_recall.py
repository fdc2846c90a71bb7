"""The recall study: what AtP, AtP* and the searches pay until the nodes that matter most are verified.

After the evaluation of "AtP*" (arXiv 2403.00745), on models small enough that every node is patched: the task each
model was trained on and random text, single pairs and distributions, attention nodes and neurons apart. Costs are
counted in forwards per pair, not timed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from patchkit.data import Pair
from patchkit.errors import InputError
from patchkit.model import PatchModel
from patchkit.results.manifest import CHECKPOINT
from patchkit.results.recall import Evidence, Material, NodeClass, RecallSetting, RecallStudy
from patchkit.runtime import Progress
from patchkit.studies._finished_parts import OTHER_MODELS, Checkpoint
from patchkit.studies._recall_material import random_text_pairs, task_of, task_pairs
from patchkit.studies._recall_settings import Cell, SearchOptions, geometric_mean, measure

MODELS = ("varbind-llama", "ioi-gpt2")
EVIDENCE: tuple[Evidence, ...] = ("pair", "distribution")
NODE_CLASSES: tuple[NodeClass, ...] = ("attention nodes", "neuron nodes")
_SPOKEN = {"atp-qk": "AtP with the QK fix", "atp-graddrop": "AtP with GradDrop", "atp-star": "AtP*"}
_GRADIENT = ("atp", *_SPOKEN)


@dataclass(frozen=True)
class RecallOptions:
    """How much is measured.

    Attributes:
        pairs: single pairs of each material, at every position; of the task, the shortest of `pool`.
        distribution: pairs of a distribution, positions patched together.
        random_tokens: length of random text.
        group: neighbouring neurons that make one node.
        seed: of pairs and searches; the distribution's pairs have the next.
        searches: parameters of the searches.
    """

    pairs: int = 4
    distribution: int = 16
    pool: int = 64
    random_tokens: int = 12
    group: int = 1
    seed: int = 0
    searches: SearchOptions = field(default_factory=SearchOptions)

    def __post_init__(self) -> None:
        for name in ("pairs", "distribution"):
            if getattr(self, name) < 1:
                raise InputError(f"recall study: {name} must be at least 1, found {getattr(self, name)}")


def run_recall(
    models: Sequence[PatchModel],
    out: Path,
    options: RecallOptions | None = None,
    *,
    command: str = "patchkit study attribution-recall",
    progress: Progress | None = None,
) -> RecallStudy:
    """Runs the study and writes `recall.json` into `out`; the report is made from it.

    A study that was interrupted goes on after the settings that were finished in `out/journal`.

    Raises:
        InputError: a model without a tokenizer, or with one that speaks no task's language.
    """
    options = options or RecallOptions()
    started = time.monotonic()
    say = progress or (lambda stage, done, total: None)
    cells = [
        Cell(model, material, evidence, node_class, options.group)
        for model in models
        for material, evidence, node_class in product(_materials(model), EVIDENCE, NODE_CLASSES)
    ]
    settings: list[RecallSetting] = []
    for number, cell in enumerate(cells):
        say(f"{cell.model.name}, {cell.material}, {cell.node_class}", number, len(cells))
        settings.append(_measured(cell, options, out / CHECKPOINT, f"setting-{number}"))
    say("done", len(cells), len(cells))
    study = RecallStudy(
        settings=settings,
        seeds={"single pairs and searches": options.seed, "pairs of distributions": options.seed + 1},
        parameters=options.searches.described
        | {
            "single pairs": str(options.pairs),
            "pairs of a distribution": str(options.distribution),
            "tokens of random text": str(options.random_tokens),
            "neurons of a node": str(options.group),
        },
        left_out=_left_out(options, settings),
        findings=findings(settings),
        command=command,
        seconds=time.monotonic() - started,
    )
    study.save(out)
    return study


def _measured(cell: Cell, options: RecallOptions, journal: Path, name: str) -> RecallSetting:
    """The setting, from its file if it was finished before."""
    run = f"{cell.model.content_key()} {cell.material} {cell.evidence} {cell.node_class} {options}"

    def made() -> RecallSetting:
        return measure(cell, _pairs(cell, options), options.searches, options.seed)

    return Checkpoint(journal, run, OTHER_MODELS).part(name, RecallSetting, made)


def _materials(model: PatchModel) -> tuple[Material, ...]:
    return task_of(model), "random-text"


def _pairs(cell: Cell, options: RecallOptions) -> list[Pair]:
    single = cell.evidence == "pair"
    n, seed = (options.pairs, options.seed) if single else (options.distribution, options.seed + 1)
    if cell.material == "random-text":
        return random_text_pairs(cell.model, n, options.random_tokens, seed)
    return task_pairs(cell.model, n, seed, options.pool if single else 0)


def _left_out(options: RecallOptions, settings: Sequence[RecallSetting]) -> list[str]:
    silent = [f"{s.name}: in {', '.join(s.silent)} no node has an effect" for s in settings if s.silent]
    return [
        f"Nodes whose true |effect| is at most {options.searches.floor:g} (rounding) are equal, and no search is asked "
        "for them; it pays for those that it verifies on its way.",
        "atp-qk and atp-graddrop on neuron nodes: without query and key nodes they are atp and atp-star.",
        f"Single pairs of a task are the shortest of {options.pool}: every node is patched at every position.",
        "The models of the paper (Pythia): not all of their nodes can be patched here. These figures are of small "
        "models, in which one block of a few is a large part of the whole, and say nothing about large ones.",
        *silent,
    ]


def findings(settings: Sequence[RecallSetting]) -> list[str]:
    """In words: what the corrections of AtP bring on attention nodes, where AtP beats AtP*, the best other search."""
    attention = [s for s in settings if s.node_class == "attention nodes"]
    groups = {
        "single pairs": [s for s in attention if s.evidence == "pair"],
        "distributions": [s for s in attention if s.evidence == "distribution"],
        "pairs and distributions": attention,
    }
    said = [
        _against_atp(name, words, chosen, spoken)
        for spoken, chosen in groups.items()
        for name, words in _SPOKEN.items()
        if chosen
    ]
    losing = [s for s in settings if s.aggregate("atp") < s.aggregate("atp-star")]
    said.append(f"AtP beats AtP* in {len(losing)} of {len(settings)} settings{':' if losing else '.'}")
    said += [_where_atp_wins(setting) for setting in losing]
    for setting in settings:
        best = next(method for method in setting.ranking() if method.name not in _GRADIENT)
        if best.aggregate < setting.aggregate("atp"):
            said.append(
                f"AtP is beaten by {best.name} on {setting.name}: {best.aggregate:.2f} against AtP's "
                f"{setting.aggregate('atp'):.2f}."
            )
    return said


def _against_atp(name: str, words: str, settings: Sequence[RecallSetting], spoken: str) -> str:
    ratio = geometric_mean([s.aggregate(name) / s.aggregate("atp") for s in settings])
    order = geometric_mean([s.method(name).unprepared / s.method("atp").unprepared for s in settings])
    return (
        f"Attention nodes, {spoken}: {words} costs {ratio:.2f} times AtP, and its order alone, without preparation, "
        f"{order:.2f} times (geometric means over {len(settings)} settings; below 1 is better than AtP)."
    )


def _where_atp_wins(setting: RecallSetting) -> str:
    atp, star = setting.method("atp"), setting.method("atp-star")
    return (
        f"AtP beats AtP* on {setting.name}: {atp.aggregate:.2f} against {star.aggregate:.2f}; the order alone, without "
        f"preparation, {atp.unprepared:.2f} against {star.unprepared:.2f}."
    )
