"""What a desiderata mask returns: the learned values, the components chosen, and every baseline beside them.

`MaskResult` is saved as `mask.safetensors` (one tensor per component kind, the learned values: 1 keeps the original
run's activation, 0 puts in the alternate's) and `mask.json` (everything else; the model below is its schema).
"""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from patchkit.errors import InputError
from patchkit.results.formats import load_tensors, read_model, save_tensors, write_model


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True, extra="forbid")


class SetScores(_Frozen):
    """Held-out accuracy of one desideratum when given sets of components are patched."""

    chosen: float = Field(description="the discretised mask")
    soft: float = Field(
        description="the learned mask before rounding; chosen - soft is the discretisation gap"
    )
    empty: float = Field(description="nothing patched: the floor any claim must clear")
    all: float = Field(description="every component patched")
    complement: float = Field(description="every component except the chosen ones")
    random: list[float] = Field(description="random sets of the chosen size, one value per set")

    @property
    def random_mean(self) -> float:
        return sum(self.random) / len(self.random) if self.random else float("nan")


class DesideratumScores(_Frozen):
    """One desideratum: what it asks, how many triples it had, and what each set of components reaches."""

    name: str
    kind: str = Field(
        description="'dependence' (the answer must become the target) or 'invariance' (it must stay)"
    )
    description: str = ""
    trained: bool = Field(description="whether the mask was trained on it")
    n_train: int
    n_test: int
    train_accuracy: float | None = None
    test: SetScores


class LambdaPoint(_Frozen):
    """One point of the sparsity path: the mask learned at this lambda, warm-started from the point before."""

    lam: float
    size: int
    soft_size: float = Field(description="sum of (1 - w)")
    test: dict[str, float] = Field(description="held-out accuracy per desideratum of the rounded mask")
    joint: float = Field(description="minimum over the trained desiderata")
    steps: int


class SeedRun(_Frozen):
    """The mask of one training seed."""

    seed: int
    lam: float
    chosen: list[str]
    test: dict[str, float]
    joint: float
    complement_joint: float
    random_joint: list[float]
    steps: int


class OwnMask(_Frozen):
    """A mask trained on one desideratum alone, scored on all of them."""

    trained_on: str
    chosen: list[str]
    test: dict[str, float]


class Carried(_Frozen):
    """What one component carries, per desideratum: alone = fraction of held-out triples whose answer changes when
    only it is patched; missed = how much accuracy the chosen set loses when it is left out (negative: gains)."""

    component: str
    alone: dict[str, float]
    missed: dict[str, float]


class MaskResult(_Frozen):
    """The result of learning a desiderata mask, complete with its baselines. See the field descriptions."""

    schema_version: int = 1
    model: str
    components: list[str] = Field(description="component kinds, e.g. head, mlp")
    n_components: int
    position: str
    loss: str
    sparsity: str
    chosen: list[str] = Field(description="names of the components that are patched, e.g. a1.h0, m3")
    pruned: list[str] = Field(default_factory=list, description="dropped by the pruning pass: not needed")
    desiderata: list[DesideratumScores]
    joint: dict[str, float] = Field(
        description="minimum over trained desiderata for chosen, soft, empty, all, complement, random (mean of the sets)"
    )
    random_joint: list[float] = Field(description="the same minimum, one value per random set")
    lambda_path: list[LambdaPoint]
    seeds: list[SeedRun]
    jaccard: list[list[float]] = Field(description="between the chosen sets of the seeds")
    own_masks: list[OwnMask]
    carried: list[Carried]
    history: list[dict[str, float]] = Field(
        default_factory=list, description="step, loss, penalty, held-out joint score"
    )
    excluded: dict[str, int] = Field(default_factory=dict, description="triples left out, by reason")
    stopped: str = Field(default="", description="why training ended")
    diverged: bool = Field(
        default=False, description="training ended at a loss that is not finite; `stopped` says where"
    )
    forward_equivalents: float = Field(
        default=0.0,
        description="paid; 1 is a forward over every original prompt once, a backward counts 1 more",
    )
    values: dict[str, Tensor] = Field(exclude=True, description="kind -> learned values, 1 keeps, 0 patches")

    @property
    def fraction(self) -> float:
        """Chosen components as a fraction of all."""
        return len(self.chosen) / self.n_components

    def save(self, directory: Path | str) -> None:
        """Writes mask.safetensors and mask.json into `directory`, each by rename."""
        directory = Path(directory)
        save_tensors(directory / "mask.safetensors", self.values)
        write_model(directory / "mask.json", self)

    @classmethod
    def load(cls, directory: Path | str) -> MaskResult:
        """Reads what `save` wrote; InputError names a file that is missing, malformed or not of the same mask."""
        directory = Path(directory)
        path = directory / "mask.safetensors"
        values = load_tensors(path)
        result = read_model(directory / "mask.json", cls, extra={"values": values})
        found = {kind: list(tensor.shape) for kind, tensor in values.items()}
        if (
            set(found) != set(result.components)
            or sum(map(torch.numel, values.values())) != result.n_components
        ):
            raise InputError(
                f"{path}: expected learned values of the {result.n_components} components of kinds "
                f"{', '.join(result.components)}, as mask.json says, found {found or 'none'}. Write both again."
            )
        for kind, tensor in values.items():
            finite = bool(tensor.isfinite().all())
            if tensor.dtype != torch.float32 or tensor.ndim not in (1, 2) or not finite:
                raise InputError(
                    f"{path}: tensor '{kind}': expected finite float32 numbers, layer by index, found "
                    f"{'' if finite else 'infinite ones or NaN in '}{tensor.dtype} of shape {found[kind]}. "
                    "Write the mask again."
                )
        return result
