"""The mask of the paper at the paper's settings, on any model: LLaMA-13B's 9 heads and 1 MLP are the figure to meet.

Settings (arXiv 2307.03637 and its authors' code): heads and MLPs at the last token, 45 triples a desideratum, Adam with
learning rate 0.01, 100 iterations of one value step and one invariance step, every lambda afresh from all ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from patchkit import tasks
from patchkit.errors import InputError
from patchkit.methods import Layout, MaskOptions, Objective, Schedule
from patchkit.methods.mask_plans import mask_stages, synthetic_triples
from patchkit.model import PatchModel
from patchkit.results.mask import MaskResult
from patchkit.runtime.plan import Plan, Stage, make_plan
from patchkit.runtime.plan_memory import Spread, spread_weights
from patchkit.runtime.plan_words import Machine, model_words, plan_lines, rate_lines
from patchkit.tasks import DesiderataSet
from patchkit.tasks.language import VOCABULARY

PUBLISHED_HEADS, PUBLISHED_MLPS, PUBLISHED_COMPONENTS = 9, 1, 1640
#: ValueSwitch and TaskSwitch in the authors' code.
PUBLISHED_DESIDERATA = ("value_dependence", "operation_invariance")
#: The two sweeps of the authors' code, 0.005 to 0.06 and 0.06 to 0.12, in seven values.
LAMBDAS = (0.005, 0.02, 0.04, 0.06, 0.08, 0.10, 0.12)
ITERATIONS = 100
#: The published number of samples; the balanced first digits make 45 of it.
SAMPLES = 50
# `x = 41 / y = 27 / x + y = ` in a tokenizer with one token a digit, and the first token of the sequence.
_PROMPT_TOKENS = 20
# Bytes of a mask's results, the report with its pictures most of all.
_RESULTS = 2e6


def published_options(*, seeds: Sequence[int] = (0,), iterations: int = ITERATIONS) -> MaskOptions:
    """The options of a mask at the published settings."""
    return MaskOptions(
        components=("head", "mlp"),
        objective=Objective("published", "l0.5"),
        schedule=Schedule(lambdas=LAMBDAS, steps=iterations, lr=0.01, patience=0, warm=False),
        seeds=tuple(seeds),
        own_masks=False,
    )


def published_triples(
    model: PatchModel, seed: int, n: int = SAMPLES, trailing_space: bool = True
) -> tuple[DesiderataSet, str]:
    """ValueSwitch and TaskSwitch for the model's tokenizer: (triples, which task they are of).

    The published arithmetic prompt, or the same two desiderata in the embedded models' language where the tokenizer
    speaks only that. `trailing_space` False leaves the prompt's last space to the answer.

    Raises:
        InputError: the model has no tokenizer, or one that cannot score by first digit.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise InputError(
            f"{model.name} has no tokenizer, and the published prompts are text; give a model that has one"
        )
    embedded = set(VOCABULARY) <= set(tokenizer.get_vocab())
    task = "variable-binding" if embedded else "arithmetic"
    options = {} if embedded else {"trailing_space": trailing_space}
    made = tasks.desiderata(task, tokenizer, n, n, seed, names=PUBLISHED_DESIDERATA, **options)
    return made, task


@dataclass(frozen=True, eq=False)
class PublishedPlan:
    """What the reproduction takes, before any weight is there.

    Attributes:
        triples: to train on and to test with, of both desiderata.
        steps: of Adam, one desideratum after the other.
        spread: of the weights over devices.
    """

    model: PatchModel
    components: int
    triples: int
    steps: int
    stages: tuple[Stage, ...]
    plan: Plan
    spread: Spread
    machine: Machine

    def lines(self) -> list[tuple[str, str]]:
        """Label and value, for a screen."""
        dims = self.model.dims
        heads = dims.n_layers * dims.n_heads
        return [
            ("model", model_words(self.model)),
            ("components", f"{self.components:,} ({heads:,} heads, {dims.n_layers} MLPs)"),
            ("triples", f"{self.triples:,} (train and test of both desiderata)"),
            ("optimisation steps", f"{self.steps:,}, each one token a triple forward and backward"),
            *plan_lines(dims, self.plan, self.stages, self.spread, self.machine),
            *rate_lines(self.plan, self.spread, self.machine, dims.itemsize),
        ]


def plan_published(
    model: PatchModel, options: MaskOptions, machine: Machine | None = None, devices: int = 1
) -> PublishedPlan:
    """The plan for a model of which only the config is needed (`lazy=True`).

    Triples are made up: as many and as long as the published ones.

    Args:
        machine: what the run has; default: one process.
        devices: that each process spreads its model over.
    """
    each = SAMPLES // 9 * 9
    triples = synthetic_triples(PUBLISHED_DESIDERATA, each, _PROMPT_TOKENS, model.dims.vocab_size)
    stages = tuple(mask_stages(model, triples, options))
    return PublishedPlan(
        model=model,
        components=Layout.build(options.components, model.dims).size,
        triples=len(triples),
        steps=options.schedule.total_steps * len(options.seeds) * len(PUBLISHED_DESIDERATA),
        stages=stages,
        plan=make_plan(
            model.dims,
            stages,
            [_PROMPT_TOKENS] * len(triples),
            max_batch_tokens=options.max_batch_tokens,
            results=_RESULTS,
        ),
        spread=spread_weights(model, devices),
        machine=machine or Machine(),
    )


def compare_with_published(model: PatchModel, result: MaskResult, task: str) -> dict[str, str]:
    """Ours beside the published outcome, in words; it says plainly when model or task is another."""
    heads = sum(name.startswith("a") for name in result.chosen)
    mlps = sum(name.startswith("m") for name in result.chosen)
    same = _is_llama_13b(model) and task == "arithmetic"
    verdict = (
        "the published model and task: these figures can be held against each other"
        if same
        else f"NOT the published model or task: this is {model!r} on {task}; LLaMA-13B on arithmetic gave the figures "
        "above, and nothing here reproduces or contradicts them"
    )
    return {
        "published": f"LLaMA-13B: {PUBLISHED_HEADS} heads, {PUBLISHED_MLPS} MLP of {PUBLISHED_COMPONENTS:,} components",
        "ours": f"{result.model}: {heads} heads, {mlps} MLPs of {result.n_components:,} components",
        "held-out accuracy": ", ".join(f"{d.name} {d.test.chosen:.2f}" for d in result.desiderata),
        "comparison": verdict,
    }


def _is_llama_13b(model: PatchModel) -> bool:
    dims = model.dims
    shape = (dims.n_layers, dims.n_heads, dims.d_model, dims.vocab_size)
    return model.arch.family == "llama" and shape == (40, 40, 5120, 32000)
