"""`plan`: what a command will take, before it is run, on a model of which only the config need be there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchkit.cli.console import give, hush_loading, plain_table, results
from patchkit.cli.edges import check_own_options
from patchkit.cli.evaluate import evaluate_options
from patchkit.cli.given import given_pairs
from patchkit.cli.options import batch_tokens, one_of
from patchkit.errors import InputError

if TYPE_CHECKING:
    from patchkit.data import Pair
    from patchkit.methods.edge_plans import CostOfLengths
    from patchkit.model import PatchModel
    from patchkit.runtime.plan import Plan

PLANNED = ("edges", "evaluate", "paths")


def plan(
    ctx: typer.Context,
    command: Annotated[str, typer.Argument(help=f"{', '.join(PLANNED)}, with its own options.")],
    tokens: Annotated[
        int,
        typer.Option(
            "--tokens", min=2, help="Length of a prompt, where no pairs are given (--n says how many)."
        ),
    ] = 32,
) -> None:
    """Forwards, memory and disk of a command, without running it: patchkit plan edges --model DIR --method eap."""
    one_of(PLANNED, command, "plan")
    group: Any = ctx.find_root().command
    inner = _parsed(ctx, group.get_command(ctx, command), list(ctx.args))
    from patchkit.runtime import MAX_BATCH_TOKENS
    from patchkit.runtime.plan import make_plan
    from patchkit.zoo.load import load

    hush_loading()
    model = load(inner["model"], lazy=True, dtype=inner["dtype"])
    pairs, made_up = _pairs(model, inner, tokens)
    cost, disk, backward = _cost(model, command, inner, pairs)
    embedded = model.dims.vocab_size * model.dims.d_model
    total = sum(parameter.numel() for parameter in model.hf.parameters())
    found = make_plan(
        model.dims,
        [len(pair.clean_ids) for pair in pairs],
        cost,
        parameters=total - embedded,
        itemsize=model.dtype.itemsize,
        max_batch_tokens=batch_tokens(inner["max_batch_tokens"]) or MAX_BATCH_TOKENS,
        disk=disk,
        backward=backward,
    )
    _show(model, command, found, made_up)


def _parsed(ctx: typer.Context, command: Any, words: list[str]) -> dict[str, Any]:
    """The options of the planned command; `--out` may be left out, since nothing is written."""
    if "--out" not in words:
        words += ["--out", "unused"]
    with command.make_context(command.name, words, parent=ctx.find_root()) as inner:
        return dict(inner.params)


def _pairs(model: PatchModel, given: dict[str, Any], tokens: int) -> tuple[Sequence[Pair], bool]:
    from patchkit.methods.edge_plans import synthetic_pairs

    if given["pairs"] is None and given["task"] is None:
        return synthetic_pairs(given["n"], tokens), True
    if given["pairs"] is not None and given["task"] is not None:
        raise InputError(
            "give either --pairs FILE or --task NAME, one of the two, or neither for a plan by length"
        )
    return given_pairs(model, given), False


def _cost(
    model: PatchModel, command: str, given: dict[str, Any], pairs: Sequence[Pair]
) -> tuple[CostOfLengths, int, bool]:
    """(cost of a batch of prompts by their lengths, bytes of the results, whether gradients are taken)."""
    from patchkit.methods import edge_plans
    from patchkit.methods.edge_attribution import edge_method
    from patchkit.model import EdgeGraph
    from patchkit.results.edge_scores import EdgeMethod

    graph = EdgeGraph.of(model.dims)
    cells = graph.n_senders * graph.n_receivers
    if command == "edges":
        check_own_options(given)
        name = given["method"]
        by_gradient = name not in ("exact", "acdc")
        method = (
            edge_method(name, given["steps"], given["ig_rule"], given["qk_fix"], given["graddrop"])
            if by_gradient
            else EdgeMethod(name=name)
        )
        # Means and their sizes, graph.pt, and some 60 characters an edge in graph.json.
        disk = 2 * 4 * cells + 5 * cells + 60 * graph.n_edges
        disk += 4 * cells * len(pairs) * bool(given["keep_pairs"])
        return edge_plans.edges_cost(model.dims, method), disk, by_gradient and name != "ifr"
    if command == "paths":
        plain = edge_plans.paths_cost(model.dims, given["stages"] if given["iterative"] else 1)
        return plain, 100 * graph.n_senders * len(pairs), False
    asked = evaluate_options(given)
    sizes = list(asked.sizes)
    if asked.curve:
        from patchkit.results.curves import FRACTIONS

        sizes += 2 * [round(fraction * graph.n_edges) for fraction in FRACTIONS]
    if not sizes:
        raise InputError("plan evaluate needs --top-n or --curve: what is evaluated is not read for a plan")
    return edge_plans.circuits_cost(model.dims, sizes), 40 * len(sizes) * len(pairs), False


def _show(model: PatchModel, command: str, found: Plan, made_up: bool) -> None:
    from patchkit.model import EdgeGraph
    from patchkit.runtime.memory import bytes_text

    graph = EdgeGraph.of(model.dims)
    lengths = f"{found.prompts:,} pairs, {found.tokens:,} tokens" + (" (made up)" if made_up else "")
    rows = [
        ("model", f"{model.name}: {model.dims.n_layers} layers x {model.dims.n_heads} heads, {model.dtype}"),
        ("graph", f"{graph.n_senders:,} senders, {graph.n_edges:,} edges"),
        ("by query head", f"{EdgeGraph.of(model.dims, by_query_head=True).n_edges:,} edges"),
        ("prompts", lengths),
        ("batches", f"{found.batches:,} of at most {found.batch_tokens:,} tokens"),
        ("forwards", f"{found.forward_equivalents:,.1f} a prompt (a backward counts one more)"),
        ("operations", f"{found.flops:.2e} FLOP"),
        ("weights", bytes_text(found.weights)),
        ("forward and backward", bytes_text(found.passes)),
        ("beyond these", bytes_text(found.beyond)),
        ("memory at the most", bytes_text(found.peak)),
        ("disk", bytes_text(found.disk)),
        ("requests (hosted)", f"{found.batches:,}, one a batch"),
    ]
    table = plain_table(f"patchkit {command}", "")
    for name, value in rows:
        table.add_row(name, value)
    results().print(table)
    if found.peak > found.weights + (1 << 33):
        give(
            f"A smaller --max-batch-tokens takes less memory: a batch has up to {found.batch_tokens:,} tokens here."
        )
