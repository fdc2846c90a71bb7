"""How well a forced circuit holds: interchange accuracy, and what the nodes outside the circuit change.

Both are measured by exact patching, whole nodes at all positions (see `patchkit.zoo.siit`; Gupta et al. 2024,
arXiv 2407.14494). A circuit holds where the network follows its program under every interchange, and where nothing
outside the circuit matters: the first says that the nodes carry their variables, the second that no other node does.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchkit.data import Batch
from patchkit.errors import InputError
from patchkit.model import NodeGrid, PatchModel
from patchkit.model.sites import parse_node
from patchkit.tracing import Patch, capture, run_patched
from patchkit.zoo.siit import SiitCase, Words

#: How often a prompt that changes the answer is looked for before there is said to be none.
_TRIES = 1000


@dataclass(frozen=True)
class InterchangeAccuracy:
    """Shares of answers, of the whole vocabulary, that are those of the program.

    Attributes:
        plain: nothing is replaced.
        variables: each variable's node alone is taken from another prompt; only interchanges after which the answer
            is another one are counted, so that a network which ignores the node scores 0 and not the chance of no change.
        subsets: random sets of variables, each from a prompt of its own; the answer may stay.
    """

    plain: float
    variables: Mapping[str, float]
    subsets: float

    @property
    def worst(self) -> float:
        """The smallest of the interchanges' shares."""
        return min(self.subsets, *self.variables.values())


@dataclass(frozen=True)
class NonCircuitChange:
    """Shares of the model's own answers that change when nodes outside the circuit are replaced.

    Attributes:
        resample: all of them at once, by another prompt's.
        mean: all of them at once, by their mean over prompts, position by position.
        zero: all of them at once, by zeros.
        single: each of them alone, by another prompt's.
    """

    resample: float
    mean: float
    zero: float
    single: Mapping[str, float]

    @property
    def worst(self) -> float:
        """The largest of them all."""
        return max(self.resample, self.mean, self.zero, *self.single.values())


def interchange_accuracy(
    model: PatchModel, case: SiitCase, n: int = 200, seed: int = 0
) -> InterchangeAccuracy:
    """The share of answers that are right, plainly and when variables are taken from other prompts.

    Args:
        n: prompts, and interchanges of each variable and of the subsets.

    Raises:
        InputError: a node that the model does not have, a tokenizer of another model, or a variable that never changes
            the answer.
    """
    rng = random.Random(f"interchange {case.name} {seed}")
    runs = _Runs(model, case, case.prompts(n, seed))
    plain = _share(runs.plain, runs.ids_of([case.answer(prompt) for prompt in runs.prompts]))
    alone = {
        name: runs.followed([{name: _telling(rng, case, runs.prompts, row, name)} for row in range(n)])
        for name in case.variables
    }
    drawn = [
        {name: rng.randrange(n) for name in case.variables if rng.random() < 0.5} or {name: rng.randrange(n)}
        for name in rng.choices(list(case.variables), k=n)
    ]
    return InterchangeAccuracy(plain, alone, runs.followed(drawn))


def non_circuit_change(model: PatchModel, case: SiitCase, n: int = 200, seed: int = 0) -> NonCircuitChange:
    """The share of answers that change when nodes which carry no variable are replaced, together and one by one.

    Args:
        n: prompts; each one's replacements come from the next one.

    Raises:
        InputError: a node that the model does not have, or a tokenizer of another model.
    """
    runs = _Runs(model, case, case.prompts(n, seed))
    outside = [name for name in NodeGrid(model.dims, ("z", "mlp_out")).names() if name not in case.nodes]
    other = torch.arange(n).roll(-1)

    def change(names: Sequence[str], how: str) -> float:
        every = torch.arange(n)
        patches = [runs.patch(name, every, runs.values_for(name, other, how)) for name in names]
        return 1 - _share(runs.answers(patches), runs.plain)

    return NonCircuitChange(
        resample=change(outside, "resample"),
        mean=change(outside, "mean"),
        zero=change(outside, "zero"),
        single={name: change([name], "resample") for name in outside},
    )


class _Runs:
    """Prompts of a case, run once with every node kept, and again with nodes replaced.

    Attributes:
        plain: the model's own answers, token ids.
    """

    def __init__(self, model: PatchModel, case: SiitCase, prompts: Sequence[Words]):
        if model.tokenizer is None:
            raise InputError(
                f"{case.name}: the model has no tokenizer, and prompts are text; load it with its own"
            )
        self.model, self.case, self.prompts, self.tokenizer = model, case, prompts, model.tokenizer
        for node in case.nodes:
            parse_node(node, model.dims)
        ids = case.encode(self.tokenizer, prompts)
        self.batch = Batch.from_ids(ids, model.pad_id).to(model.embed_device)
        every = NodeGrid(model.dims, ("z", "mlp_out"))
        run = capture(model, self.batch, every.sites(torch.arange(len(every))))
        self.kept, self.plain = run.values, run.logits.argmax(-1)

    def ids_of(self, answers: Sequence[str]) -> Int[Tensor, " n"]:
        return torch.tensor(self.case.answer_ids(self.tokenizer, answers), device=self.plain.device)

    def values_for(
        self, name: str, others: Int[Tensor, " n"], how: str = "resample"
    ) -> Float[Tensor, "n width d"]:
        """What is put in at a node of n rows: the other rows' values, or what stands for all rows."""
        site, index = parse_node(name, self.model.dims)
        values = self.kept[site] if site.kind == "mlp_out" else self.kept[site][:, :, index]
        if how == "resample":
            return values[others]
        average = values.mean(0) if how == "mean" else torch.zeros_like(values[0])
        return average.expand(len(others), *average.shape)

    def patch(self, name: str, rows: Int[Tensor, " n"], values: Float[Tensor, "n width d"]) -> Patch:
        site, index = parse_node(name, self.model.dims)
        whole = site.kind == "mlp_out"
        return Patch(site, values, rows, index=None if whole else torch.full_like(rows, index))

    def answers(self, patches: Sequence[Patch]) -> Int[Tensor, " rows"]:
        return run_patched(self.model, self.batch, patches).logits.argmax(-1)

    def followed(self, taken: Sequence[Mapping[str, int]]) -> float:
        """The share of rows whose answer is the program's, with each row's variables taken from the rows named."""
        patches = []
        for name, node in self.case.variables.items():
            rows = torch.tensor([row for row, mine in enumerate(taken) if name in mine], dtype=torch.long)
            others = torch.tensor([mine[name] for mine in taken if name in mine], dtype=torch.long)
            if len(rows):
                patches.append(self.patch(node, rows, self.values_for(node, others)))
        wanted = [
            self.case.answer(prompt, {name: self.prompts[other] for name, other in mine.items()})
            for prompt, mine in zip(self.prompts, taken, strict=True)
        ]
        return _share(self.answers(patches), self.ids_of(wanted))


def _telling(rng: random.Random, case: SiitCase, prompts: Sequence[Words], row: int, name: str) -> int:
    """A prompt from which the variable's value makes another answer of this row's prompt."""
    before = case.answer(prompts[row])
    for _ in range(_TRIES):
        other = rng.randrange(len(prompts))
        if case.answer(prompts[row], {name: prompts[other]}) != before:
            return other
    raise InputError(
        f"{case.name}: no other prompt of {len(prompts)} changes the answer of '{' '.join(prompts[row])}' through "
        f"'{name}'; draw more prompts"
    )


def _share(found: Int[Tensor, " n"], wanted: Int[Tensor, " n"]) -> float:
    return float((found == wanted).float().mean())
