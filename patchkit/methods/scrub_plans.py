"""What causal scrubbing will run, as a stage of a plan: the same draws, without weights."""

from __future__ import annotations

from collections.abc import Sequence

from patchkit.data import Pair, resolve_metric
from patchkit.methods._scrub_draws import draw
from patchkit.methods._scrub_hypothesis import Hypothesis
from patchkit.methods._scrub_reading import read_hypothesis
from patchkit.methods.causal_scrubbing import ScrubOptions, scrub_work
from patchkit.model import EdgeGraph, PatchModel
from patchkit.runtime.plan import Stage


def scrub_stage(
    model: PatchModel, pairs: Sequence[Pair], hypothesis: Hypothesis, options: ScrubOptions
) -> Stage:
    """Of `scrub`.

    Raises:
        InputError: as `scrub`.
    """
    resolve_metric(options.metric)
    draws = draw(hypothesis, pairs, None, samples=options.samples, seed=options.seed)
    reading = read_hypothesis(hypothesis, EdgeGraph.of(model.dims), draws.inputs)
    program, items = scrub_work(reading, draws, options.metric)
    return Stage(f"scrubbing: {hypothesis.name}", program, items, back=20)
