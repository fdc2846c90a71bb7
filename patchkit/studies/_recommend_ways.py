"""How each method of the scoreboard is run on a user's model: its command, and its price by the library's own plans."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from patchkit.methods import EdgeOptions, NodeOptions
from patchkit.methods._node_options import ask
from patchkit.methods.edge_plans import acdc_stages, exact_stages, synthetic_pairs
from patchkit.methods.edge_plans import attribution_stages as edge_stages
from patchkit.methods.mask_plans import mask_stages, synthetic_triples
from patchkit.methods.node_plans import attribution_stages, patching_stages
from patchkit.model import PatchModel
from patchkit.runtime import MAX_BATCH_TOKENS
from patchkit.runtime.plan import Stage, make_plan
from patchkit.studies._truth_methods import MethodSettings, edge_attributions, mask_options

#: Nodes that an estimate's command checks exactly, where the budget allows it.
VERIFIED = 10
#: What every method must beat: never recommended.
CONTROLS = frozenset({"random nodes", "random edges"})
# Triples that a mask is priced with: what a triple takes does not depend on how many there are.
_TRIPLES = 32
# What methods were measured with; and what `patchkit edges` takes where nothing is said.
_MEASURED, _STEPS = MethodSettings(), 5
_FLAGS = {"qk_fix": "--qk-fix", "grad_drop": "--graddrop"}
_COMPONENTS = {"z": "head", "mlp_out": "mlp"}


@dataclass(frozen=True, eq=False)
class Setting:
    """What a method would be run on.

    Attributes:
        nodes: kinds and names, as `--nodes` has them; of methods of edges nothing.
        pairs: how many there are; costs are of one.
        tokens: of a prompt.
    """

    model: PatchModel
    name: str
    nodes: tuple[str, ...]
    pairs: int
    tokens: int

    def priced(self, stages: Sequence[Stage], prompts: int = 1) -> float:
        """Forwards a pair of stages that are over so many prompts."""
        lengths = [self.tokens] * prompts
        plan = make_plan(self.model.dims, stages, lengths, max_batch_tokens=MAX_BATCH_TOKENS, results=0.0)
        return plan.forward_equivalents

    def one(self) -> list[Any]:
        """A pair that stands for all."""
        return synthetic_pairs(1, self.tokens, self.model.dims.vocab_size)

    @property
    def node_options(self) -> NodeOptions:
        return NodeOptions(nodes=self.nodes)

    @property
    def n_nodes(self) -> int:
        return len(ask(self.model, self.one(), self.node_options).ids)


@dataclass(frozen=True)
class Way:
    """How a method is run.

    Attributes:
        edges: whether it scores edges.
        command: of a setting; without a check of its own.
        cost: of a setting, in forwards a pair.
        most: whether the cost is the most that it may come to.
        proof: words that check the scores exactly, and their cost; None where a method has none or needs none.
    """

    edges: bool
    command: Callable[[Setting], str]
    cost: Callable[[Setting], float]
    proof: tuple[str, Callable[[Setting], float]] | None = None
    most: bool = False


def _patch(words: str, setting: Setting) -> str:
    kinds = ",".join(setting.nodes)
    return f"{_begun(words, setting)} --pairs pairs.jsonl --nodes {shlex.quote(kinds)} --out DIR"


def _edges(words: str, setting: Setting) -> str:
    return f"{_begun('edges', setting)} --pairs pairs.jsonl --method {words} --out DIR"


def _begun(command: str, setting: Setting) -> str:
    first, _, more = command.partition(" ")
    return " ".join(filter(None, ["patchkit", first, "--model", shlex.quote(setting.name), more]))


def _mask_command(setting: Setting) -> str:
    components = ",".join(_components(setting))
    own = f"--components {components} --mask-seeds 1 --no-own-masks --random-sets 1"
    return f"{_begun('mask', setting)} --desiderata triples.jsonl {own} --out DIR"


def _components(setting: Setting) -> tuple[str, ...]:
    return tuple(_COMPONENTS.get(kind, kind) for kind in setting.nodes)


def _search_command(name: str, setting: Setting) -> str:
    """Searches have no command of their own: they are given the effects of sets."""
    del setting
    return f"patchkit.methods.search.{name}(...) on patchkit.patch_sets (Python)"


def _exact(setting: Setting) -> float:
    return setting.priced(patching_stages(setting.model, setting.one(), setting.node_options))


def _attribution(method: Any, verify: int | None, setting: Setting) -> float:
    stages = attribution_stages(setting.model, setting.one(), setting.node_options, method, verify=verify)
    return setting.priced(stages)


def _searched(setting: Setting) -> float:
    """Searches end at a share of what patching every node takes, as they were measured."""
    return float(max(1, round(_MEASURED.budget * setting.n_nodes)))


def _mask(setting: Setting) -> float:
    triples = synthetic_triples(("first",), _TRIPLES, setting.tokens, setting.model.dims.vocab_size)
    options = replace(mask_options(_MEASURED, 0), components=_components(setting))
    return setting.priced(mask_stages(setting.model, triples, options), len(triples))


def _edge_attribution(asked: Mapping[str, Any], setting: Setting) -> float:
    return setting.priced(edge_stages(setting.model, setting.one(), EdgeOptions(), **asked))


def _exact_edges(setting: Setting) -> float:
    return setting.priced(exact_stages(setting.model, setting.one(), EdgeOptions()))


def _acdc(setting: Setting) -> float:
    """The most: circuits become cheaper as edges are cut."""
    return setting.priced(acdc_stages(setting.model, setting.one(), EdgeOptions()))


def _estimate(method: str) -> Way:
    proof = (f"--verify {VERIFIED}", partial(_attribution, method, VERIFIED))
    command = partial(_patch, f"attribute --method {method}")
    return Way(False, command, partial(_attribution, method, None), proof)


def _edge_gradients() -> dict[str, Way]:
    """The methods that were measured, with the arguments that they were measured with."""
    return {
        name: Way(True, partial(_edges, _words(asked)), partial(_edge_attribution, asked))
        for name, asked in edge_attributions(_MEASURED).items()
    }


def _words(asked: Mapping[str, Any]) -> str:
    """Arguments of `attribute_edges` as options of `patchkit edges`, behind its `--method`."""
    words = [str(asked["method"])]
    words += [f"--steps {asked['steps']}"] if asked.get("steps", _STEPS) != _STEPS else []
    words += [f"--ig-rule {asked['rule']}"] if "rule" in asked else []
    words += [option for name, option in _FLAGS.items() if asked.get(name)]
    return " ".join(words)


#: By the scoreboard's name of a method.
WAYS: dict[str, Way] = {
    "exact": Way(False, partial(_patch, "patch"), _exact),
    **{method: _estimate(method) for method in ("atp", "atp-qk", "atp-graddrop", "atp-star")},
    "subsampling": Way(False, partial(_search_command, "subsampling"), _searched),
    "blocks": Way(False, partial(_search_command, "blocks"), _searched),
    "hierarchical": Way(False, partial(_search_command, "hierarchical"), _searched),
    "mask": Way(False, _mask_command, _mask),
    "exact edges": Way(True, partial(_edges, "exact"), _exact_edges),
    **_edge_gradients(),
    "ifr": Way(True, partial(_edges, "ifr"), partial(_edge_attribution, {"method": "ifr"})),
    "acdc": Way(True, partial(_edges, "acdc"), _acdc, most=True),
}
