"""A mask result and a study as the variable-binding run gives them, made up but consistent, and odd variants of both."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from patchkit.results.manifest import Manifest, ModelRef, PairCounts
from patchkit.results.mask import (
    Carried,
    DesideratumScores,
    LambdaPoint,
    MaskResult,
    OwnMask,
    SeedRun,
    SetScores,
)
from patchkit.results.study import AttentionExample, FormScores, PromptExample, VariableBindingStudy

CHOSEN = ["a1.h0", "a1.h1", "a1.h2", "a1.h5", "a1.h7"]
TRAINED = ["value_dependence", "operation_invariance", "constant_invariance"]
PROMPT: list[str] = list("<s> a = 3 , note b , b = 7 , skip 5 , ; + 4 a".split())


def desideratum(name: str, kind: str, trained: bool, chosen: float, empty: float, complement: float):
    described = {
        "value_dependence": "the alternate gives the queried variable another value; the answer must follow it",
        "operation_invariance": "the alternate asks for another operation; the answer must not change",
    }
    test = SetScores(
        chosen=chosen,
        soft=chosen - 0.011,
        empty=empty,
        all=0.995 if kind == "dependence" else 0.004,
        complement=complement,
        random=[empty + 0.01 * (step % 5) * (1 if empty < 0.5 else -1) for step in range(20)],
    )
    return DesideratumScores(
        name=name,
        kind=kind,
        description=described.get(name, ""),
        trained=trained,
        n_train=48 if trained else 0,
        n_test=256,
        train_accuracy=0.999 if trained else None,
        test=test,
    )


def make_result(
    layers: int = 4, heads: int = 8, chosen: list[str] | None = None, **changed: object
) -> MaskResult:
    """A result on `layers` x `heads` heads and one MLP a layer; `changed` replaces fields."""
    chosen = CHOSEN if chosen is None else chosen
    generator = torch.Generator().manual_seed(0)
    head = 1 - 0.12 * torch.rand(layers, heads, generator=generator) ** 4
    mlp = 1 - 0.3 * torch.rand(layers, 1, generator=generator) ** 3
    for name in chosen:
        layer = int(name[1:].split(".")[0])
        if ".h" in name:
            head[layer, int(name.split(".h")[1])] = 0.02 + 0.03 * layer / layers
        else:
            mlp[layer] = 0.04
    total = layers * (heads + 1)
    asked = [*TRAINED, "third_value", "positional"]
    path = [
        LambdaPoint(
            lam=lam,
            size=size,
            soft_size=size + 1.7,
            test={name: max(0.0, score - 0.02 * place) for place, name in enumerate(asked)},
            joint=max(0.0, score - 0.04),
            steps=160,
        )
        for lam, size, score in (
            (0.003, 19 * total // 36, 0.71),
            (0.01, 11 * total // 36, 0.99),
            (0.03, len(chosen), 0.984),
            (0.1, 2, 0.42),
            (0.3, 0, 0.01),
        )
    ]
    seeds = [
        SeedRun(
            seed=seed,
            lam=0.03,
            chosen=names,
            test={name: 0.98 + 0.005 * seed for name in TRAINED},
            joint=0.98 + 0.005 * seed,
            complement_joint=0.004,
            random_joint=[0.0, 0.01, 0.03],
            steps=160,
        )
        for seed, names in ((0, chosen), (1, chosen), (2, [*chosen[:-1], "m1"]))
    ]
    base = MaskResult(
        model="varbind-llama",
        components=["head", "mlp"],
        n_components=total,
        position="last",
        loss="cross-entropy to the target",
        sparsity="lambda * sum((1.001 - w)^0.5)",
        chosen=chosen,
        pruned=["m2"],
        desiderata=[
            desideratum("value_dependence", "dependence", True, 0.977, 0.004, 0.992),
            desideratum("operation_invariance", "invariance", True, 0.996, 0.984, 0.004),
            desideratum("constant_invariance", "invariance", True, 0.988, 0.98, 0.012),
            desideratum("third_value", "dependence", False, 0.953, 0.0, 0.11),
            desideratum("positional", "dependence", False, 0.043, 0.08, 0.06),
        ],
        joint={
            "chosen": 0.977, "soft": 0.966, "empty": 0.004, "all": 0.004, "complement": 0.004, "random": 0.0086,
        },
        random_joint=[0.004 + 0.002 * (step % 6) for step in range(20)],
        lambda_path=path,
        seeds=seeds,
        jaccard=[[1.0, 1.0, 0.667], [1.0, 1.0, 0.667], [0.667, 0.667, 1.0]],
        own_masks=[
            OwnMask(trained_on=TRAINED[0], chosen=["m3"], test=dict(zip(TRAINED, (0.992, 0.012, 0.008), strict=True))),
            OwnMask(trained_on=TRAINED[1], chosen=[], test=dict(zip(TRAINED, (0.004, 0.988, 0.984), strict=True))),
        ],
        carried=[
            Carried(
                component=name,
                alone={"value_dependence": 0.02 * place, "operation_invariance": 0.0, "third_value": 0.05 * place},
                missed={
                    "value_dependence": 0.31 * place / 2,
                    "operation_invariance": -0.12 if place == 2 else 0.002,
                    "third_value": 0.2 * place,
                },
            )
            for place, name in enumerate(chosen)
        ],
        history=[
            {"lambda": lam, "step": float(step), "loss": 4 * 0.97**step + 0.1, "soft": 30 * 0.98**step + 5}
            | ({"held-out joint": min(0.977, step / 90)} if step % 20 == 0 else {})
            for lam in (0.003, 0.01, 0.03, 0.1, 0.3)
            for step in range(10, 170, 10)
        ],
        excluded={"target equals the unpatched answer": 31, "both answers are the same": 12},
        stopped="held-out joint score did not improve for 40 steps",
        values={"head": head, "mlp": mlp},
    )  # fmt: skip
    return base.model_copy(update=changed)


def make_study(**changed: object) -> VariableBindingStudy:
    """A study that goes with `make_result`; `changed` replaces fields."""
    other = [*PROMPT]
    other[3] = "8"
    minus = [*PROMPT]
    minus[-3] = "-"
    weights = [0.01] * len(PROMPT)
    weights[3] = 1 - 0.01 * (len(PROMPT) - 1)
    spread = [1 / len(PROMPT)] * len(PROMPT)
    base = VariableBindingStudy(
        question=(
            "The model reads bindings such as `a = 3` and a query such as `+ 4 a`, and answers 7. Which of its "
            "components bring the value of the queried variable to the last token, before the operation is applied?\n\n"
            "A component is chosen when replacing its activation by the one from another prompt moves the value, "
            "and nothing but the value."
        ),
        model="varbind-llama",
        model_card={"architecture": "LlamaForCausalLM, 4 layers x 8 heads", "held-out accuracy": "99.6 % (lowest cell)"},
        examples=[
            PromptExample(
                desideratum="value_dependence", original=PROMPT, alternate=other, position=len(PROMPT) - 1,
                original_answer="7", alternate_answer="2", target="2", answer_with_patch="2",
            ),
            PromptExample(
                desideratum="operation_invariance", original=PROMPT, alternate=minus, position=-1,
                original_answer="7", alternate_answer="9", target="7", answer_with_patch="9",
            ),
        ],
        attention=[
            AttentionExample(head=head, tokens=PROMPT, query=len(PROMPT) - 1, weights=shown)
            for head, shown in (("a1.h0", weights), ("a1.h1", spread), ("a1.h2", weights))
        ],
        attention_summary={
            head: {"queried value": 0.6 + 0.1 * place, "its name": 0.1, "other values": 0.05, "rest": 0.25 - 0.1 * place}
            for place, head in enumerate(("a1.h0", "a1.h1", "a1.h2"))
        },
        forms=[
            FormScores(form=form, trained=trained, scores=dict(zip(TRAINED, scores, strict=True)))
            for form, trained, scores in (
                ("symbol", True, (0.977, 0.996, 0.988)),
                ("question", False, (0.984, 1.0, 0.99)),
                ("order", False, (0.973, 0.98, 0.97)),
                ("tell", False, (0.98, 0.99, 0.985)),
            )
        ],
        command="patchkit demo --out demo-report --seed 0",
        seconds=161.4,
        comparison={"9 heads, 1 MLP in LLaMA-13B": "another model: 5 heads, no MLP"},
        notes=["One model, trained from one seed: other seeds put the value elsewhere."],
    )  # fmt: skip
    return base.model_copy(update=changed)


def make_manifest(**changed: object) -> Manifest:
    """The manifest of such a run."""
    base = Manifest(
        command="mask",
        options={"model": "varbind-llama", "components": ["head", "mlp"], "seed": 0},
        directory="/home/someone",
        started="2025-01-01T00:00:00+00:00",
        status="done",
        versions={"patchkit": "0.1.0", "nnsight": "0.8.1", "torch": "2.13.0", "transformers": "5.23.0"},
        model=ModelRef(id="varbind-llama", fingerprint="9f2c01ab"),
        seed=0,
        cost=12840.0,
        seconds=148.2,
        pairs=PairCounts(total=1323, used=1280),
    )
    return base.model_copy(update=changed)


@pytest.fixture(scope="session")
def make() -> SimpleNamespace:
    """The makers of results, for tests to vary."""
    makers: dict[str, Callable[..., object]] = {
        "result": make_result,
        "study": make_study,
        "manifest": make_manifest,
    }
    return SimpleNamespace(**makers)
