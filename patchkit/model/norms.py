"""A norm as arithmetic: its scale, its value, and how it carries a gradient back to the residual stream.

Every norm of the table is RMSNorm or LayerNorm. With m the mean (LayerNorm; RMSNorm has none), s = sqrt(mean((x - m)^2) +
eps), u = (x - m) / s, and weight w:

    y = w u + bias
    J^T g = (w g - mean(w g) - u mean(w g u)) / s            without the first mean for RMSNorm

So gradients of a whole layer's heads go back through it without a graph, and those of several runs can be added up
before they do. Loading a model checks this arithmetic against the model's own modules.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from patchkit.errors import InputError


@dataclass(frozen=True, eq=False)
class Norm:
    """One norm's weights; arithmetic is in float32 at least.

    Attributes:
        centred: whether the mean is taken off first (LayerNorm).
        weight: what the normed stream is multiplied with, the family's offset included; `[d_model]`.
        bias: or None.
        eps: under the root.
    """

    centred: bool
    weight: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"] | None
    eps: float

    def scale(self, x: Float[Tensor, "*at d_model"]) -> Float[Tensor, "*at 1"]:
        """s, which the stream is divided by."""
        x = _precise(x)
        centred = x - x.mean(-1, keepdim=True) if self.centred else x
        return (centred.square().mean(-1, keepdim=True) + self.eps).sqrt()

    def unit(self, x: Float[Tensor, "*at d_model"]) -> Float[Tensor, "*at d_model"]:
        """u, the stream before weight and bias."""
        x = _precise(x)
        return (x - x.mean(-1, keepdim=True) if self.centred else x) / self.scale(x)

    def __call__(self, x: Float[Tensor, "*at d_model"]) -> Float[Tensor, "*at d_model"]:
        """y."""
        y = self.unit(x) * self.weight.to(x.device)
        return y if self.bias is None else y + self.bias.to(x.device)

    def back(
        self, x: Float[Tensor, "*at d_model"], gradient: Float[Tensor, "*at d_model"]
    ) -> Float[Tensor, "*at d_model"]:
        """J^T g: the gradient at x of something whose gradient at y is `gradient`."""
        unit = self.unit(x)
        weighted = _precise(gradient) * self.weight.to(x.device)
        back = weighted - unit * (weighted * unit).mean(-1, keepdim=True)
        if self.centred:
            back = back - weighted.mean(-1, keepdim=True)
        return back / self.scale(x)


def norm_of(module: nn.Module, offset: float, weight: Tensor, bias: Tensor | None) -> Norm:
    """The arithmetic of a norm module.

    Args:
        offset: what the family adds to the weight.
        weight, bias: the module's, from wherever it is offloaded to.

    Raises:
        InputError: the module is neither a LayerNorm nor an RMSNorm.
    """
    name = type(module).__name__
    centred = isinstance(module, nn.LayerNorm)
    if not centred and "RMSNorm" not in name:
        raise InputError(
            f"the norm {name} is neither a LayerNorm nor an RMSNorm, so edges cannot be carried through it; its family "
            "needs arithmetic of its own in patchkit.model.norms"
        )
    eps = next((getattr(module, key) for key in ("eps", "variance_epsilon") if hasattr(module, key)), None)
    if eps is None:
        raise InputError(f"the norm {name} has no eps or variance_epsilon; expected one of them")
    return Norm(centred, _precise(weight) + offset, None if bias is None else _precise(bias), float(eps))


def _precise(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))
