"""Metrics of the last token's logits: one number per row, higher = more of the behaviour, never silently
negated.

All are computed in float32 at least, whatever the model's dtype.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchkit.errors import InputError, PatchkitError


def logit_diff(
    logits: Float[Tensor, "rows vocab"], answer: Int[Tensor, " rows"], wrong: Int[Tensor, " rows"]
) -> Float[Tensor, " rows"]:
    """logit[answer] - logit[wrong]."""
    logits = _full(logits)
    return _pick(logits, answer) - _pick(logits, wrong)


def prob_diff(
    logits: Float[Tensor, "rows vocab"], answer: Int[Tensor, " rows"], wrong: Int[Tensor, " rows"]
) -> Float[Tensor, " rows"]:
    """p[answer] - p[wrong], between -1 and 1."""
    probabilities = _full(logits).softmax(dim=-1)
    return _pick(probabilities, answer) - _pick(probabilities, wrong)


def target_logprob(
    logits: Float[Tensor, "rows vocab"], answer: Int[Tensor, " rows"]
) -> Float[Tensor, " rows"]:
    """log p[answer], at most 0."""
    return _pick(_full(logits).log_softmax(dim=-1), answer)


def kl(logits: Float[Tensor, "rows vocab"], reference: Float[Tensor, "rows vocab"]) -> Float[Tensor, " rows"]:
    """KL(reference || model) in nats, at least 0: how far the answer has moved from the reference run's.

    Higher means further away; it is not negated. Its gradient is zero where the two runs agree, so a gradient
    estimate taken at the reference run itself is zero for every node.
    """
    target = _full(reference).log_softmax(dim=-1)
    return (target.exp() * (target - _full(logits).log_softmax(dim=-1))).sum(dim=-1)


def accuracy(logits: Float[Tensor, "rows vocab"], target: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """1 where the largest logit is the target's, else 0; a tie counts for the smaller id."""
    return (logits.argmax(dim=-1) == target).float()


def _full(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _pick(values: Tensor, ids: Tensor) -> Tensor:
    return values.gather(-1, ids.to(values.device).unsqueeze(-1)).squeeze(-1)


@dataclass(frozen=True)
class Metric:
    """A metric by its command-line name; `needs` are the arguments it takes besides the logits.

    The choices are `answer` and `wrong` (token ids [rows]) and `reference` (the logits [rows, vocab] of the
    run that KL is measured from: the base run).
    """

    name: str
    function: Callable[..., Tensor]
    needs: tuple[str, ...]

    def __call__(
        self,
        logits: Float[Tensor, "rows vocab"],
        *,
        answer: Int[Tensor, " rows"],
        wrong: Int[Tensor, " rows"],
        reference: Float[Tensor, "rows vocab"] | None = None,
    ) -> Float[Tensor, " rows"]:
        """One number per row; InputError for a shape that is not [rows], a number that is not finite, and for what
        the user's own function raises.
        """
        given = {"answer": answer, "wrong": wrong, "reference": reference}
        if reference is None and "reference" in self.needs:
            raise InputError(f"metric {self.name!r} needs the logits of a reference run, found none")
        try:
            values = self.function(logits, **{name: given[name] for name in self.needs})
        except (PatchkitError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if self.name in METRICS:
                raise
            raise InputError(f"metric {self.name!r} failed with {type(error).__name__}: {error}") from error
        return check_metric(values, logits.shape[0], self.name)


METRICS: dict[str, Metric] = {
    "logit-diff": Metric("logit-diff", logit_diff, ("answer", "wrong")),
    "prob-diff": Metric("prob-diff", prob_diff, ("answer", "wrong")),
    "kl": Metric("kl", kl, ("reference",)),
    "target-logprob": Metric("target-logprob", target_logprob, ("answer",)),
}


def check_metric(values: Tensor, rows: int, name: str = "metric") -> Float[Tensor, " rows"]:
    """The same values if they are one finite float per row; else an error that says what was found.

    A reduced or batched metric would silently weigh rows by batch. Raises InputError, for a value that is not finite
    with the row.
    """
    if not isinstance(values, Tensor) or values.shape != (rows,) or not values.is_floating_point():
        found = (
            f"{values.dtype} {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        )
        raise InputError(
            f"metric {name!r} must return one float per row, a tensor of shape [{rows}]; found {found}; "
            "do not average over rows"
        )
    if not values.is_meta and not bool(values.isfinite().all()):
        row = int((~values.isfinite()).nonzero()[0])
        raise InputError(
            f"metric {name!r} is {float(values[row].detach())} in row {row}; expected a finite number: check the "
            "metric, the model's dtype and the prompts"
        )
    return values


def resolve_metric(name: str) -> Metric:
    """The metric of a command-line name: `logit-diff`, `prob-diff`, `kl`, `target-logprob` or
    `module:function`.

    A function of the user's takes the last token's logits [rows, vocab] first and then any of `answer`,
    `wrong`, `reference` by name, and returns one float per row. Its module is looked for in the current
    directory too.
    """
    if name in METRICS:
        return METRICS[name]
    module_name, colon, function_name = name.partition(":")
    if not colon or not module_name or not function_name:
        raise InputError(f"unknown metric {name!r}; expected {', '.join(METRICS)} or module:function")
    found = getattr(_import(module_name, name), function_name, None)
    if not callable(found):
        raise InputError(f"metric {name!r}: module {module_name!r} has no function {function_name!r}")
    function = cast(Callable[..., Tensor], found)
    return Metric(name, function, _arguments(name, function))


def _import(module_name: str, name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        return importlib.import_module(module_name)
    except Exception as error:
        # Importing runs the module, so that it may raise anything.
        raise InputError(f"metric {name!r}: module {module_name!r} cannot be imported ({error})") from error


def _arguments(name: str, function: Callable[..., Tensor]) -> tuple[str, ...]:
    parameters = list(inspect.signature(function).parameters.values())
    others = [parameter for parameter in parameters[1:] if parameter.default is inspect.Parameter.empty]
    odd = [parameter.name for parameter in others if parameter.name not in ("answer", "wrong", "reference")]
    if not parameters or odd:
        found = f"({', '.join(parameter.name for parameter in parameters)})"
        raise InputError(
            f"metric {name!r} must take (logits) and then any of answer, wrong, reference; found {found}"
        )
    return tuple(
        parameter.name for parameter in parameters[1:] if parameter.name in ("answer", "wrong", "reference")
    )
