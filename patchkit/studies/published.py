"""The mask of the paper at the paper's settings, on any model: LLaMA-13B's 9 heads and 1 MLP are the figure to meet.

Settings (arXiv 2307.03637 and its authors' code): heads and MLPs at the last token, 45 triples a desideratum, Adam with
learning rate 0.01, 100 iterations of one value step and one invariance step, every lambda afresh from all ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from patchkit import tasks
from patchkit.data import Triple
from patchkit.errors import InputError
from patchkit.methods import Layout, MaskOptions, Objective, Schedule, mask_cost
from patchkit.model import PatchModel
from patchkit.results.mask import MaskResult
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


@dataclass(frozen=True)
class Plan:
    """What the reproduction takes, before any weight is there.

    Attributes:
        token_forwards: tokens through the whole model (a backward counts as one more).
        flops: 2 x parameters x token_forwards.
        weight_bytes: of the weights in their dtype.
        extra_bytes: keys and values, cached alternates and the graph of one step.
    """

    components: int
    heads: int
    mlps: int
    triples: int
    steps: int
    token_forwards: float
    flops: float
    weight_bytes: int
    extra_bytes: int

    def lines(self) -> list[tuple[str, str]]:
        """Label and value, for a screen."""
        return [
            ("components", f"{self.components:,} ({self.heads:,} heads, {self.mlps:,} MLPs)"),
            ("triples", f"{self.triples:,} (train and test of both desiderata)"),
            ("optimisation steps", f"{self.steps:,}, each one token a triple forward and backward"),
            ("tokens through the model", f"{self.token_forwards:,.0f}"),
            ("floating point operations", f"{self.flops:.2e}"),
            ("memory for weights", f"{self.weight_bytes / 1e9:.1f} GB"),
            ("memory beside them, at most", f"{self.extra_bytes / 1e9:.2f} GB"),
            (
                "time at 100 TFLOP/s",
                f"{self.flops / 1e14 / 60:.1f} min; small batches reach less of a GPU's rate",
            ),
        ]


def plan_published(model: PatchModel, options: MaskOptions) -> Plan:
    """The plan for a model of which only the config is needed (`lazy=True`)."""
    layout = Layout.build(options.components, model.dims)
    per_desideratum = SAMPLES // 9 * 9
    ids = (0,) * _PROMPT_TOKENS
    triples = [Triple("published", ids, ids, 0)] * (4 * per_desideratum)
    # Training touches half of the triples; scoring every lambda and baseline touches the other half once each.
    steps = options.schedule.total_steps * len(options.seeds)
    evaluations = len(options.schedule.lambdas) + options.random_sets + 8
    cost = mask_cost(model.dims, layout, triples, steps // 2, evaluations)
    parameters = sum(parameter.numel() for parameter in model.hf.parameters())
    size = next(model.hf.parameters()).element_size()
    return Plan(
        components=layout.size,
        heads=model.dims.n_layers * model.dims.n_heads,
        mlps=model.dims.n_layers,
        triples=len(triples),
        steps=steps * 2,
        token_forwards=cost.forwards,
        flops=2.0 * parameters * cost.forwards,
        weight_bytes=parameters * size,
        extra_bytes=cost.bytes,
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
