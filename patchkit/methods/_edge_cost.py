"""What edge attribution takes, before it is run: passes through the model, products, and memory beside the passes."""

from __future__ import annotations

from collections.abc import Sequence

from patchkit.methods._edge_memory import EdgeMemory
from patchkit.model import Dims, EdgeGraph
from patchkit.results.edge_scores import EdgeMethod
from patchkit.runtime import MAX_BATCH_TOKENS, Cost
from patchkit.runtime.batch_memory import Shape


def attribution_cost(
    dims: Dims,
    lengths: Sequence[int],
    method: EdgeMethod,
    by_query: bool,
    at_once: int = MAX_BATCH_TOKENS,
) -> Cost:
    """Of one batch of prompts of these lengths; a backward of activations counts as a forward.

    Args:
        at_once: tokens of the rows of a sender's path that are run together.
    """
    graph = EdgeGraph.of(dims, by_query_head=by_query)
    forwards = sum(attribution_forwards(dims, length, length, method, graph) for length in lengths)
    kept, passes = EdgeMemory(graph, dims, Shape.of(lengths), method).kept_and_pass(at_once)
    return Cost(forwards, kept, passes)


def attribution_forwards(dims: Dims, tokens: int, keys: int, method: EdgeMethod, graph: EdgeGraph) -> float:
    """Token-forwards of a pair whose prompts run so many tokens, which attend to so many."""
    layer = 2 * dims.d_model * (dims.n_heads + dims.n_kv_heads) * dims.d_head + 3 * dims.d_model * max(
        dims.d_mlp, dims.d_model
    )
    forward = layer * dims.n_layers
    passes = _passes(graph, method)
    # Of one token: senders and receivers times the width, and both through their projections.
    products = graph.n_edges * dims.d_model
    carried = dims.n_layers * (2 * dims.n_heads + 2 * graph.n_kv_heads) * dims.d_head * dims.d_model
    repeats = _product_repeats(graph, method)
    forwards = tokens * (passes + repeats * (products + carried) / forward)
    if method.qk_fix:
        # One layer's queries and keys for every sender, and its probabilities.
        scores = 2 * dims.n_heads * dims.d_head * tokens * keys
        senders = graph.n_senders * graph.n_layers / 2
        rows = 2 * dims.d_model * dims.n_heads * dims.d_head
        forwards += senders * (tokens * rows + scores * (repeats + 1)) / forward
    return forwards


def _passes(graph: EdgeGraph, method: EdgeMethod) -> float:
    """Forwards and backwards over one prompt of a pair."""
    steps, layers = method.steps or 1, graph.n_layers
    match method.name:
        case "ifr":
            return 3.0
        case "clean-corrupted":
            return 4.0
        case "eap-ig-inputs":
            return (1.0 if method.rule == "repo" else 2.0) + 2.0 * steps
        case "eap-ig-activations" if method.rule == "repo":
            return 2.0 + 2.0 * steps * (2 * layers + 1)
        case "eap-ig-activations":
            # Each sender's runs begin at its layer.
            begun = 1 + sum((graph.n_heads + 1) * (layers - layer) / layers for layer in range(layers))
            return 3.0 + 2.0 * steps * begun
    drops = (layers - 1) / 2 if method.grad_drop else 0.0
    return 3.0 + drops + (1.0 if method.grad_drop or method.qk_fix else 0.0)


def _product_repeats(graph: EdgeGraph, method: EdgeMethod) -> float:
    """How often every edge's product is made."""
    if method.name == "ifr":
        # Senders against one stream a layer, and not against each of its receivers.
        return 2 / graph.receivers_a_layer
    if method.name == "eap-ig-activations":
        return 2.0 * graph.n_layers + 1 if method.rule == "repo" else (method.steps or 1) / graph.n_heads
    return (graph.n_layers + 1) / 2 if method.grad_drop else 1.0
