"""patchkit: which parts of a language model cause this behaviour?

Interventions on Hugging Face models, written once as nnsight traces. The public names are loaded when they are first
used, so that `patchkit --help` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patchkit.data import Batch as Batch
    from patchkit.data import Pair as Pair
    from patchkit.data import Places as Places
    from patchkit.data import Triple as Triple
    from patchkit.data import read_desiderata as read_desiderata
    from patchkit.data import read_pairs as read_pairs
    from patchkit.data import read_places as read_places
    from patchkit.data import write_desiderata as write_desiderata
    from patchkit.data import write_pairs as write_pairs
    from patchkit.errors import InputError as InputError
    from patchkit.errors import PatchkitError as PatchkitError
    from patchkit.errors import RunError as RunError
    from patchkit.methods import EdgeOptions as EdgeOptions
    from patchkit.methods import EvaluateOptions as EvaluateOptions
    from patchkit.methods import Hypothesis as Hypothesis
    from patchkit.methods import Interpretation as Interpretation
    from patchkit.methods import MaskOptions as MaskOptions
    from patchkit.methods import NodeOptions as NodeOptions
    from patchkit.methods import Objective as Objective
    from patchkit.methods import Schedule as Schedule
    from patchkit.methods import ScrubOptions as ScrubOptions
    from patchkit.methods import StagePlan as StagePlan
    from patchkit.methods import acdc as acdc
    from patchkit.methods import answers_with as answers_with
    from patchkit.methods import attribute as attribute
    from patchkit.methods import attribute_edges as attribute_edges
    from patchkit.methods import bound as bound
    from patchkit.methods import evaluate as evaluate
    from patchkit.methods import learn_mask as learn_mask
    from patchkit.methods import patch_across as patch_across
    from patchkit.methods import patch_edges as patch_edges
    from patchkit.methods import patch_nodes as patch_nodes
    from patchkit.methods import patch_paths as patch_paths
    from patchkit.methods import patch_sets as patch_sets
    from patchkit.methods import patch_sets_across as patch_sets_across
    from patchkit.methods import run_circuits as run_circuits
    from patchkit.methods import scores_of_sets as scores_of_sets
    from patchkit.methods import scrub as scrub
    from patchkit.methods import trace_paths_back as trace_paths_back
    from patchkit.methods import verify as verify
    from patchkit.model import Architecture as Architecture
    from patchkit.model import EdgeGraph as EdgeGraph
    from patchkit.model import NodeGrid as NodeGrid
    from patchkit.model import PatchModel as PatchModel
    from patchkit.model import Site as Site
    from patchkit.model import register_architecture as register_architecture
    from patchkit.report import write_report as write_report
    from patchkit.results.circuit import Circuit as Circuit
    from patchkit.results.comparison import Comparison as Comparison
    from patchkit.results.edge_scores import EdgeScores as EdgeScores
    from patchkit.results.evaluation import Evaluation as Evaluation
    from patchkit.results.generalisation import Generalisation as Generalisation
    from patchkit.results.mask import MaskResult as MaskResult
    from patchkit.results.paths import PathResult as PathResult
    from patchkit.results.recommendation import Recommendation as Recommendation
    from patchkit.results.scoreboard import Scoreboard as Scoreboard
    from patchkit.results.scores import Convention as Convention
    from patchkit.results.scores import Scores as Scores
    from patchkit.results.scores import check_same_convention as check_same_convention
    from patchkit.results.scrubbing import ScrubResult as ScrubResult
    from patchkit.runtime import Execution as Execution
    from patchkit.runtime import joined_processes as joined_processes
    from patchkit.runtime import load_hosted as load_hosted
    from patchkit.runtime import serve as serve
    from patchkit.runtime import started_processes as started_processes
    from patchkit.runtime import use_execution as use_execution
    from patchkit.runtime import without_failures as without_failures
    from patchkit.studies import CompareOptions as CompareOptions
    from patchkit.studies import GeneraliseOptions as GeneraliseOptions
    from patchkit.studies import StudyOptions as StudyOptions
    from patchkit.studies import compare_models as compare_models
    from patchkit.studies import generalise as generalise
    from patchkit.studies import run_study as run_study
    from patchkit.studies.recommend import RecommendOptions as RecommendOptions
    from patchkit.studies.recommend import recommend as recommend
    from patchkit.tracing import Blend as Blend
    from patchkit.tracing import Patch as Patch
    from patchkit.tracing import attention_from as attention_from
    from patchkit.tracing import blended_logits as blended_logits
    from patchkit.tracing import capture as capture
    from patchkit.tracing import capture_gradients as capture_gradients
    from patchkit.tracing import compute_prefix as compute_prefix
    from patchkit.tracing import run_patched as run_patched
    from patchkit.zoo.load import load as load

_HOME = {
    "patchkit.data": (
        "Batch", "Pair", "Places", "Triple", "read_desiderata", "read_pairs", "read_places", "write_desiderata",
        "write_pairs",
    ),
    "patchkit.errors": ("InputError", "PatchkitError", "RunError"),
    "patchkit.methods": (
        "EdgeOptions", "EvaluateOptions", "Hypothesis", "Interpretation", "MaskOptions", "NodeOptions", "Objective",
        "Schedule", "ScrubOptions", "StagePlan", "acdc", "answers_with", "attribute", "attribute_edges", "bound",
        "evaluate", "learn_mask", "patch_across", "patch_edges", "patch_nodes", "patch_paths", "patch_sets",
        "patch_sets_across", "run_circuits", "scores_of_sets", "scrub", "trace_paths_back", "verify",
    ),
    "patchkit.model": ("Architecture", "EdgeGraph", "NodeGrid", "PatchModel", "Site", "register_architecture"),
    "patchkit.report": ("write_report",),
    "patchkit.results.circuit": ("Circuit",),
    "patchkit.results.comparison": ("Comparison",),
    "patchkit.results.edge_scores": ("EdgeScores",),
    "patchkit.results.evaluation": ("Evaluation",),
    "patchkit.results.generalisation": ("Generalisation",),
    "patchkit.results.mask": ("MaskResult",),
    "patchkit.results.paths": ("PathResult",),
    "patchkit.results.recommendation": ("Recommendation",),
    "patchkit.results.scoreboard": ("Scoreboard",),
    "patchkit.results.scores": ("Convention", "Scores", "check_same_convention"),
    "patchkit.results.scrubbing": ("ScrubResult",),
    "patchkit.runtime": (
        "Execution", "joined_processes", "load_hosted", "serve", "started_processes", "use_execution", "without_failures",
    ),
    "patchkit.studies": (
        "CompareOptions", "GeneraliseOptions", "StudyOptions", "compare_models", "generalise", "run_study",
    ),
    "patchkit.studies.recommend": ("RecommendOptions", "recommend"),
    "patchkit.tracing": (
        "Blend", "Patch", "attention_from", "blended_logits", "capture", "capture_gradients", "compute_prefix",
        "run_patched",
    ),
    "patchkit.zoo.load": ("load",),
}  # fmt: skip
_WHERE = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted(_WHERE)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'patchkit' has no attribute '{name}'")
    value = getattr(import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
