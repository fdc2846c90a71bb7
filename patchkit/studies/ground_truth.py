"""The ground-truth study: every method of the library against circuits that are known.

Three families of cases: programs written into the weights of Llama and GPT-2, models whose circuit training has forced
(SIIT), and embedded trained models in which exhaustive exact patching is the truth. See `_truth_cases.py` for what is
true, `_truth_methods.py` for the methods, `_truth_measures.py` for the measures.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import version
from pathlib import Path

from patchkit.errors import InputError
from patchkit.methods import EdgeOptions
from patchkit.model import PatchModel
from patchkit.results.curves import FRACTIONS
from patchkit.results.manifest import CHECKPOINT
from patchkit.results.scoreboard import Case, Scoreboard
from patchkit.results.scoreboard_measures import all_means
from patchkit.runtime import Progress
from patchkit.studies._finished_parts import OTHER_MODELS, Checkpoint
from patchkit.studies._truth_case_runs import measure_case
from patchkit.studies._truth_cases import KnownCase, forced_cases, handmade_cases, natural_cases
from patchkit.studies._truth_methods import METHODS, MethodSettings
from patchkit.studies._truth_words import Words, recoveries
from patchkit.zoo.programs import failures

QUESTION = "Which method finds the nodes and edges that are truly there, and at what cost?"
_VERSIONS = ("patchkit", "nnsight", "torch", "transformers")


@dataclass(frozen=True)
class TruthOptions:
    """How much is measured.

    Attributes:
        pairs: that methods score on; `test_pairs`: held-out ones, that circuits run on.
        seed: of the pairs; the held-out pairs have the next.
        draws: bootstraps of the pairs; those of cases are the scoreboard's own.
        settings: parameters of the methods.
    """

    pairs: int = 16
    test_pairs: int = 16
    seed: int = 0
    draws: int = 100
    settings: MethodSettings = field(default_factory=MethodSettings)

    def __post_init__(self) -> None:
        for name, least in (("pairs", 2), ("test_pairs", 2), ("draws", 2)):
            if getattr(self, name) < least:
                raise InputError(
                    f"ground-truth study: {name} must be at least {least}, found {getattr(self, name)}"
                )


@cache
def all_cases() -> tuple[KnownCase, ...]:
    """Every program as a GPT-2 and as a Llama, of one shape or the other by turns; then the embedded models."""
    programs = handmade_cases(("llama", "gqa", "gpt2"))
    turns = {
        title: ("llama", "gqa")[place % 2]
        for place, title in enumerate(dict.fromkeys(c.title for c in programs))
    }
    kept = [case for case in programs if case.name.rpartition("-")[2] in ("gpt2", turns[case.title])]
    return (*kept, *forced_cases(), *natural_cases())


def case_names() -> list[str]:
    """The models that the study is made for, a case each."""
    return [case.name for case in all_cases()]


def run_ground_truth(
    models: Sequence[PatchModel],
    out: Path,
    options: TruthOptions | None = None,
    *,
    command: str = "patchkit study ground-truth",
    progress: Progress | None = None,
) -> Scoreboard:
    """Measures every case and writes `scoreboard.json` into `out`.

    A study that was interrupted goes on after the cases that were finished in `out/journal`.

    Args:
        models: of the cases that are measured (`case_names`), opened by their names.

    Raises:
        InputError: a model that is no case, or a checkpoint of a study with other options.
    """
    options, started = options or TruthOptions(), time.monotonic()
    cases = [case_of(model) for model in models]
    say = progress or (lambda stage, done, total: None)
    found: list[Case] = []
    for number, (case, model) in enumerate(zip(cases, models, strict=True)):
        say("cases", number, len(cases))
        found.append(_measured(case, model, options, out / CHECKPOINT))
    say("cases", len(cases), len(cases))
    board = summarised(found, options, command, time.monotonic() - started)
    board.save(out)
    return board


def summarised(cases: Sequence[Case], options: TruthOptions, command: str, seconds: float) -> Scoreboard:
    """Means, recoveries and words of some measured cases."""
    settings = options.settings
    board = Scoreboard(
        question=QUESTION,
        date=datetime.now(timezone.utc).date().isoformat(),
        versions={"python": platform.python_version(), **{name: version(name) for name in _VERSIONS}},
        convention=EdgeOptions().convention,
        parameters={
            "pairs that are scored": str(options.pairs),
            "held-out pairs that circuits run on": str(options.test_pairs),
            "seed of the pairs": str(options.seed),
            "seeds of methods that draw": ", ".join(map(str, settings.seeds)),
            "bootstraps": str(options.draws),
            "budget of Subsampling, Blocks and Hierarchical": f"{settings.budget:.0%} of the nodes",
            "steps of EAP-IG": str(settings.steps),
            "ACDC's tau": f"{settings.tau:g} of |base - source|",
        },
        fractions=list(FRACTIONS),
        methods=METHODS,
        kinds=failures.KINDS,
        cases=list(cases),
        means=all_means(cases, METHODS),
        recovery=recoveries(cases),
        findings=[],
        best={},
        command=command,
        seconds=round(seconds, 1),
    )
    words = Words(board)
    return board.model_copy(update={"findings": words.findings(), "best": words.best()})


def case_of(model: PatchModel) -> KnownCase:
    """What is known of an opened model; InputError if nothing is."""
    known = {case.name: case for case in all_cases()}
    if model.name not in known:
        raise InputError(
            f"ground-truth study: what is true of {model.name} is not known; it is known of: {', '.join(known)}"
        )
    return known[model.name]


def _measured(case: KnownCase, model: PatchModel, options: TruthOptions, journal: Path) -> Case:
    """The case, from its file if it was finished before."""
    made = (options.pairs, options.test_pairs, options.seed, options.draws, options.settings)

    def measure() -> Case:
        pairs = case.pairs(model, options.pairs, options.seed)
        test = case.pairs(model, options.test_pairs, options.seed + 1)
        return measure_case(case, model, pairs, test, options.settings, options.draws)

    kept = Checkpoint(journal, f"{model.content_key()} {made}", OTHER_MODELS)
    return kept.part(f"case-{case.name}", Case, measure)
