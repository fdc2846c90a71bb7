"""A plan in words: what a screen, a script or a benchmark shows of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from patchkit.model import Dims, PatchModel
from patchkit.runtime.batching import MAX_BATCH_TOKENS
from patchkit.runtime.memory import bytes_text
from patchkit.runtime.plan import Plan, Stage, price
from patchkit.runtime.plan_memory import USABLE, Spread
from patchkit.runtime.plan_time import UTILISATION, Rate, peak_rate

#: Memory of common devices, in GB.
CARDS = (24, 40, 80, 141)
#: Devices that a time is given for where there is none here.
_SHOWN = ("H100", "A100")


@dataclass(frozen=True)
class Machine:
    """What a run has.

    Attributes:
        processes: that share the work, each with the model.
        memory: bytes of a device; None where it is not known.
        device: its name; empty where it is not known.
        rate: floating-point operations a second that were given.
    """

    processes: int = 1
    memory: float | None = None
    device: str = ""
    rate: float | None = None


def model_words(model: PatchModel) -> str:
    """The model in a line."""
    dims = model.dims
    shared = f" ({dims.n_kv_heads} KV)" if dims.group > 1 else ""
    parameters = sum(parameter.numel() for parameter in model.hf.parameters())
    return (
        f"{model.name}: {dims.n_layers} layers x {dims.n_heads} heads{shared}, d_model {dims.d_model}, "
        f"{count_words(parameters)} parameters, {str(model.dtype).removeprefix('torch.')}"
    )


def plan_lines(
    dims: Dims, plan: Plan, stages: Sequence[Stage], spread: Spread, machine: Machine
) -> list[tuple[str, str]]:
    """Label and value, without the time."""
    largest = plan.largest
    peak = spread.peak(largest.taken)
    lines = [
        ("forwards", f"{plan.forward_equivalents:,.1f} a prompt (a backward counts one more)"),
        ("operations", f"{flop_words(plan.flops)} ({flop_words(plan.token_flops)} a token)"),
        ("weights", _weights(spread)),
        ("kept by the method", bytes_text(largest.taken.kept)),
        ("largest pass", bytes_text(largest.taken.passes)),
        ("memory of a device", f"{bytes_text(peak)} at the most, in {largest.label}"),
    ]
    if peak > 4e9 or machine.memory is not None:
        lines.append(("fits", _fits(dims, stages, spread, machine)))
    lines += [
        (
            "disk",
            f"{bytes_text(plan.results)} of results, and {bytes_text(plan.summed('journal'))} of journal till then",
        ),
        ("if hosted", _wire(plan)),
    ]
    return lines


def rate_lines(plan: Plan, spread: Spread, machine: Machine, itemsize: int) -> list[tuple[str, str]]:
    """Time from rates, where nothing was measured."""
    weights = sum(spread.weights)
    shared = f" on {machine.processes} processes" if machine.processes > 1 else ""

    def line(rate: Rate, said: str) -> tuple[str, str]:
        return "time", f"{time_words(rate.seconds(plan, weights) / machine.processes)}{shared} ({said})"

    if machine.rate is not None:
        return [line(Rate(machine.rate), f"{flop_words(machine.rate)}/s, as given")]
    known = peak_rate(machine.device, itemsize)
    lines = []
    for name in [machine.device] if known is not None else _SHOWN:
        peak = peak_rate(name, itemsize)
        assert peak is not None
        reached = Rate(UTILISATION * peak.flops, peak.bytes)
        said = (
            f"{name}: {UTILISATION:.0%} of {flop_words(peak.flops)}/s, weights at {peak.bytes / 1e12:g} TB/s"
        )
        lines.append(line(reached, f"{said}; rates, not a measurement"))
    return lines


def _weights(spread: Spread) -> str:
    if spread.devices == 1:
        return bytes_text(spread.weights[0])
    each = ", ".join(bytes_text(weight) for weight in spread.weights)
    return f"{bytes_text(sum(spread.weights))}, over {spread.devices} devices: {each}"


def _fits(dims: Dims, stages: Sequence[Stage], spread: Spread, machine: Machine) -> str:
    """For devices of some sizes, the largest --max-batch-tokens that leaves room."""
    cards = CARDS if machine.memory is None else (machine.memory / 1e9,)
    found: list[str] = []
    peak = peaks(dims, stages, spread)
    for card in cards:
        budget = fitting_tokens(peak, stages, USABLE * card * 1e9)
        said = "no" if budget is None else f"{budget:,} tokens a batch"
        found.append(f"{card:,.0f} GB: {said}")
        if budget == MAX_BATCH_TOKENS and card != cards[-1]:
            found[-1] = f"{card:,.0f} GB and more: {said}"
            break
    return "; ".join(found)


def peaks(dims: Dims, stages: Sequence[Stage], spread: Spread) -> Callable[[int], int]:
    """Bytes of the fullest device by budget, worked out once each."""

    @cache
    def peak(budget: int) -> int:
        return max(spread.peak(price(dims, stage, budget).taken) for stage in stages)

    return peak


def fitting_tokens(peak: Callable[[int], int], stages: Sequence[Stage], room: int | float) -> int | None:
    """The largest budget, the default or a half of it and so on, of which every stage fits into a device of so many
    bytes; None where not even single items do."""
    budget, longest = MAX_BATCH_TOKENS, max(_longest(stage) for stage in stages)
    while True:
        if peak(budget) <= room:
            return budget
        if budget <= min(longest, 64):
            return None
        budget //= 2


def _longest(stage: Stage) -> int:
    return max(stage.tokens)


def _wire(plan: Plan) -> str:
    sent, back = bytes_text(plan.summed("sent")), bytes_text(plan.summed("back"))
    return f"{_counted(plan.summed('requests'), 'job')}; some {sent} go out (code, token ids), up to {back} come back"


def _counted(count: int | float, word: str) -> str:
    return f"{count:,.0f} {word}{'' if round(count) == 1 else 's'}"


def count_words(count: int | float) -> str:
    """1.2k, 3.4M, 13.0B."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.1f}{letter}"
    return f"{count:.0f}"


def flop_words(count: int | float) -> str:
    """Floating-point operations for a person: 2.5 TFLOP."""
    for size, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if count >= size:
            return f"{count / size:,.1f} {letter}FLOP"
    return f"{count:,.0f} FLOP"


def time_words(seconds: int | float) -> str:
    """A duration for a person: 0.4 s, 35 s, 12 min, 3.5 h, 2.1 days."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            value = seconds / size
            return f"{value:.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}"
    return f"{seconds:.0f} s"
