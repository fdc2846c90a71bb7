"""What a number of an effect means; two numbers with different conventions refuse to be compared."""

from __future__ import annotations

from typing import Literal, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field

from patchkit.errors import InputError


class Convention(BaseModel):
    """How an effect was measured: metric(base run with the source's activation put in) - metric(base run)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: str = Field(description="a scalar per pair, higher = more of the behaviour; never negated")
    direction: Literal["noise", "denoise"] = Field(
        description="noise: the clean prompt is the base and the corrupt one the source; denoise: the other way round"
    )
    ablation: str = Field(description="what is put in: resample (the source's activation), mean, zero, noise")
    positions: str = Field(description="as the user said it: last, all, each, names of spans, indices")
    patching: str = Field(default="node", description="node or edge")


@runtime_checkable
class Conventional(Protocol):
    """Results that carry their convention."""

    @property
    def convention(self) -> Convention: ...


def check_same_convention(a: Convention | Conventional, b: Convention | Conventional) -> None:
    """Checks that two conventions, or those of two results, are one.

    Raises:
        InputError: naming every field that differs, with both values.
    """
    first, second = (item if isinstance(item, Convention) else item.convention for item in (a, b))
    differing = [name for name in Convention.model_fields if getattr(first, name) != getattr(second, name)]
    if differing:
        shown = "; ".join(
            f"{name} '{getattr(first, name)}' and '{getattr(second, name)}'" for name in differing
        )
        raise InputError(
            f"these numbers mean different things and cannot be compared: {shown}; run both with the same options"
        )


def importance_sign(method: str, direction: str, metric: str) -> int:
    """What turns effects of edges into importances (higher = helps): -1 where a helping edge lowers the metric.

    Corrupting a helping edge lowers it, restoring one raises it. KL is a distance from the base run, which whatever
    matters raises in both directions; information-flow routes (`ifr`) have no sign and are importances as they are.
    """
    return 1 if method == "ifr" or metric == "kl" or direction == "denoise" else -1
