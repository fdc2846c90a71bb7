"""A plan on the screen: a line for each stage, and what the whole run takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from patchkit.cli.console import plain_table, results

if TYPE_CHECKING:
    from patchkit.cli.plan_stages import Planned
    from patchkit.model import PatchModel
    from patchkit.runtime.plan import Plan
    from patchkit.runtime.plan_time import Pace
    from patchkit.runtime.plan_wire import Wire
    from patchkit.runtime.plan_words import Machine


def show_plan(
    title: str,
    model: PatchModel,
    found: Planned,
    machine: Machine,
    *,
    budget: int,
    devices: int = 1,
    loaded: PatchModel | None = None,
    hosted: bool = False,
) -> Plan:
    """Prices a plan and prints it.

    Args:
        model: without weights, if need be.
        budget: tokens of a batch.
        devices: that each process spreads its model over.
        loaded: the same model with weights, on which two batches of each stage are run for the time.
        hosted: say what goes over the wire, stage by stage, and nothing of time, which is the host's.
    """
    from patchkit.runtime.plan import make_plan
    from patchkit.runtime.plan_memory import spread_weights
    from patchkit.runtime.plan_time import measure, stage_seconds
    from patchkit.runtime.plan_wire import stage_wire
    from patchkit.runtime.plan_words import model_words, plan_lines, rate_lines, time_words

    # Without weights a model is nowhere; patched rows run in larger forwards on a GPU.
    dims = model.dims if loaded is None else replace(model.dims, on_cpu=loaded.dims.on_cpu)
    made = make_plan(dims, found.stages, found.lengths, max_batch_tokens=budget, results=found.results)
    spread = spread_weights(model, devices)
    lines = [
        ("model", model_words(model)),
        *found.facts,
        ("prompts", _prompts(made, found.made_up)),
        ("batches", f"of up to {budget:,} tokens; where memory is short, of half as many, and so on"),
        *plan_lines(dims, made, found.stages, spread, machine),
    ]
    if hosted:
        wires = [
            stage_wire(model, stage, each, budget)
            for stage, each in zip(found.stages, made.stages, strict=True)
        ]
        _stages(title, made, _wire_columns(wires))
        _facts([*lines[:-1], *_wire_lines(wires)])
        return made
    seconds = None
    if loaded is None:
        lines += rate_lines(made, spread, machine, dims.itemsize)
    else:
        paces = [measure(loaded, stage, budget) for stage in found.stages]
        parts = zip(found.stages, made.stages, paces, strict=True)
        seconds = [stage_seconds(stage, each, *pace) for stage, each, pace in parts]
        lines.append(("time", _measured(time_words(sum(seconds) / machine.processes), paces, dims.on_cpu)))
    _stages(title, made, {} if seconds is None else {"time": list(map(time_words, seconds))})
    _facts(lines)
    return made


def _facts(lines: Sequence[tuple[str, str]]) -> None:
    facts = plain_table("", "")
    for label, value in lines:
        facts.add_row(label, value)
    results().print(facts, markup=False, highlight=False)


def _wire_columns(wires: Sequence[Wire]) -> dict[str, list[str]]:
    from patchkit.runtime.memory import bytes_text

    return {
        "jobs": [f"{wire.jobs:,.0f}" for wire in wires],
        "go out": [bytes_text(wire.sent) for wire in wires],
        "come back": [bytes_text(wire.back) for wire in wires],
    }


def _wire_lines(wires: Sequence[Wire]) -> list[tuple[str, str]]:
    from patchkit.runtime.memory import bytes_text
    from patchkit.runtime.plan_wire import PROBES, opening

    whole = sum(wires, opening())
    said = (
        f"{whole.jobs:,.0f} jobs, {PROBES} of which ask the host what it has; {bytes_text(whole.sent)} go out (code and "
        f"prompts), {bytes_text(whole.back)} come back"
    )
    return [
        ("over the wire", said),
        (
            "time",
            "the host's, and a round trip for each job: patchkit doctor --host URL --model NAME measures it",
        ),
    ]


def _stages(title: str, made: Plan, more: dict[str, list[str]]) -> None:
    from patchkit.runtime.memory import bytes_text
    from patchkit.runtime.plan_words import flop_words

    table = plain_table(title)
    for heading in ("items", "batches", "forwards a prompt", "operations", "kept", "largest pass"):
        table.add_column(heading, justify="right")
    for heading in more:
        table.add_column(heading, justify="right")
    for number, each in enumerate(made.stages):
        cells = [
            f"{each.items:,.0f}",
            f"{each.batches:,.0f}",
            f"{each.forwards / made.tokens:,.1f}",
            flop_words(each.forwards * made.token_flops),
            bytes_text(each.taken.kept),
            bytes_text(each.taken.passes),
        ]
        cells += [column[number] for column in more.values()]
        table.add_row(each.label, *cells)
    results().print(table, markup=False, highlight=False)


def _prompts(made: Plan, made_up: bool) -> str:
    said = f"{made.prompts:,}, {made.tokens:,} tokens"
    return f"{said}; made up: no data was given (--n, --tokens)" if made_up else said


def _measured(time: str, paces: Sequence[tuple[Pace, Pace | None]], on_cpu: bool) -> str:
    ran = sorted({count for pace, _ in paces for count, _ in pace.measured})
    batches = f"batches of {ran[0]:,} to {ran[-1]:,} items" if len(ran) > 1 else f"a batch of {ran[0]:,}"
    return f"{time}, measured on {'this CPU' if on_cpu else 'this GPU'} ({batches})"
