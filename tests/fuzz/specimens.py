"""Sound files of every kind that patchkit reads, small, each with the function that reads it.

`read` gives something that compares equal when the content is the same.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from patchkit.data import read_desiderata, read_pairs
from patchkit.methods._mask_checkpoint import Checkpoint
from patchkit.methods._mask_path import PathPoint, PathResult
from patchkit.model import Dims, EdgeGraph, NodeGrid, open_model
from patchkit.results._circuit_files import CircuitHeader, GraphSizes
from patchkit.results.circuit import Circuit
from patchkit.results.circuit_source import read_circuit
from patchkit.results.edge_scores import EdgeScores
from patchkit.results.formats import save_tensors, write_model
from patchkit.results.graph_files import read_graph, write_graph
from patchkit.results.manifest import read_manifest
from patchkit.results.mask import MaskResult
from patchkit.results.mib import read_folder
from patchkit.results.scores import Scores
from patchkit.results.scrubbing import Scrubbing
from patchkit.results.study import VariableBindingStudy
from patchkit.runtime import Journal
from tests.report import (
    scoreboard_example,
    test_circuits_page,
    test_edges_page,
    test_evaluation_page,
    test_ioi_page,
    test_paths_page,
    test_recall_page,
    test_scores_page,
    test_scrubbing_page,
)
from tests.report.conftest import make_manifest, make_result, make_study
from tests.results.graph_cases import GRAPHS, filled
from tests.toy_tokenizers import words

TOY = words("Mary John Paul Anna went gave to the".split())
VOCABULARY = len(TOY)
IDS = {
    "id": "first",
    "clean_ids": [1, 3, 7, 8],
    "corrupt_ids": [1, 4, 7, 8],
    "answer_id": 4,
    "wrong_id": 3,
    "spans": {"name": [1, 2]},
    "note": {"template": "ABBA", "n": 2},
}
TEXT = {"clean": "Mary gave to", "corrupt": "Paul gave to", "answer": "John", "wrong": "Mary", "id": "t"}
TRIPLE_IDS = {
    "desideratum": "value",
    "original_ids": [1, 3, 7],
    "alternate_ids": [1, 4, 7],
    "target_id": 4,
    "original_answer_id": 3,
    "alternate_answer_id": 4,
    "split": "train",
    "spans": {"name": [1, 2]},
    "alternate_spans": {"name": [1, 2]},
}
TRIPLE_TEXT = {
    "desideratum": "value",
    "original": "Mary gave to",
    "alternate": "Paul gave to",
    "target": "Paul",
    "original_answer": "Mary",
    "alternate_answer": "Paul",
    "split": "test",
}
CSV = 'clean,corrupted,correct_idx,incorrect_idx\n"Mary gave to",Paul gave to,4,3\nMary went to,Anna went to,3,5\n'
GRAPH = GRAPHS["sequential"]
GROUPED = EdgeGraph(3, 4, 2, False, 32)
RUN = "the options of this run"


@dataclass(frozen=True)
class Specimen:
    """Files in a directory.

    Attributes:
        make: writes them.
        files: those that are damaged, one at a time.
        read: what a reader finds, from the directory.
        optional: files without which the result is there all the same, or counts as not there.
    """

    name: str
    make: Callable[[Path], None]
    files: tuple[str, ...]
    read: Callable[[Path], Any]
    optional: tuple[str, ...] = ()

    def path(self, directory: Path, file: str) -> Path:
        """A file by its name or pattern."""
        return next(directory.glob(file))


def plain(value: Any) -> Any:
    """A result as nested plain values: tensors as shape, type and bytes, so that NaN equals NaN."""
    if isinstance(value, Tensor):
        return (tuple(value.shape), str(value.dtype), value.detach().contiguous().numpy().tobytes())
    if hasattr(value, "model_dump"):
        return plain(dict(value))
    if hasattr(value, "__dataclass_fields__"):
        return {name: plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def rows(*values: dict[str, Any]) -> Callable[[Path], None]:
    text = "".join(json.dumps(value) + "\n" for value in values)
    return lambda directory: (directory / "data.jsonl").write_text(text, encoding="utf-8") and None


def saved(value: Any, file: str) -> Callable[[Path], None]:
    return lambda directory: write_model(directory / file, value)


def model_specimen(name: str, value: Any, file: str) -> Specimen:
    """A result that is one JSON file."""
    kind = type(value)
    return Specimen(name, saved(value, file), (file,), lambda directory: plain(kind.load(directory)))


def _pairs(directory: Path, file: str = "data.jsonl") -> Any:
    return plain(read_pairs(directory / file, TOY, VOCABULARY))


def _triples(directory: Path) -> Any:
    found = plain(read_desiderata(directory / "data.jsonl", TOY, VOCABULARY))
    return [{key: value for key, value in triple.items() if key != "where"} for triple in found]


def circuit(graph: EdgeGraph = GROUPED) -> Circuit:
    return Circuit(graph, filled_mask(graph), 40)


def filled_mask(graph: EdgeGraph) -> Tensor:
    mask = torch.zeros_like(graph.real)
    mask[0] = graph.real[0]
    mask[1, -1] = True
    return mask


def _big_circuit(directory: Path) -> None:
    """As circuits are kept whose edges are too many to be named."""
    kept = circuit()
    sizes = GraphSizes.of(GROUPED)
    save_tensors(directory / "circuit.safetensors", {"in_circuit": kept.edges})
    write_model(
        directory / "circuit.json",
        CircuitHeader(graph=sizes, requested=40, n_edges=kept.n_edges, edges=None),
    )


def _scores(directory: Path) -> None:
    grid = NodeGrid(test_scores_page.DIMS, ("q", "z", "mlp_out"), ("0", "1"), True)
    scores = test_scores_page.build(grid)
    replace(
        scores,
        magnitudes=scores.magnitudes + 1,
        verification=test_scores_page.checked(scores),
        bound=test_scores_page.bounded(),
    ).save(directory)


def _edges(directory: Path) -> None:
    wide = EdgeGraph(3, 4, 4, False, 32)
    numbers = torch.rand(wide.n_senders, wide.n_receivers).masked_fill(~wide.real, torch.nan)
    test_edges_page.build(GROUPED, by_query=(numbers, numbers.abs()), circuit=circuit()).save(directory)


def _mask(directory: Path) -> None:
    make_result().save(directory)
    make_study().save(directory)


def _mask_report(directory: Path) -> Any:
    return plain([MaskResult.load(directory), VariableBindingStudy.load(directory)])


def _checkpoint(directory: Path) -> None:
    points = [PathPoint(0.1 * i, torch.rand(5), {"value": 0.5}, 7) for i in range(1, 3)]
    Checkpoint(directory, RUN).save(
        "seed 0", PathResult(points=points, history=[{"step": 1.0}], stopped="ok")
    )


KEYS = ("one", "two", "three")


def _journal(directory: Path) -> None:
    kept = Journal(directory)
    kept.add(KEYS, {"effect": torch.arange(12.0).reshape(3, 4), "total": torch.ones(2)}, frozenset({"total"}))
    kept.flush()


def _found(directory: Path) -> Any:
    found = Journal(directory).find(KEYS)
    return plain([dict(found.items), list(found.sums)])


def _mib(directory: Path) -> None:
    folder = directory / "ioi_gpt2"
    folder.mkdir()
    write_graph(folder / "importances.json", filled(GRAPH))


def _graph(name: str) -> Callable[[Path], None]:
    return lambda directory: write_graph(directory / name, filled(GRAPH, nodes=True, origin=True))


def _dims() -> Dims:
    return Dims(
        n_layers=3, n_heads=4, n_kv_heads=2, d_head=8, d_model=32, d_mlp=64, vocab_size=50, parallel=False
    )


def _names(directory: Path) -> None:
    (directory / "circuit.txt").write_text("# a circuit\ninput->a0.h1<q>\na0.h1->logits\n", encoding="utf-8")


def _name_list(directory: Path) -> None:
    (directory / "names.json").write_text('["input->a0.h1<q>", "a0.h1->logits"]', encoding="utf-8")


CONFIG = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=16,
    intermediate_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)


@functools.cache
def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).eval()


def model_directory(directory: Path, **options: Any) -> None:
    tiny().save_pretrained(directory, **options)
    TOY.save_pretrained(directory)


def _open(directory: Path) -> Any:
    opened = open_model(directory)
    weights = {name: plain(value) for name, value in opened.hf.state_dict().items()}
    tokens = opened.tokenizer("Mary gave to")["input_ids"] if opened.tokenizer is not None else None
    return [asdict(opened.dims), weights, tokens]


PAIRS_IDS = Specimen(
    "pairs in ids", rows({**IDS, "id": "the first of two"}, {**IDS, "id": "second"}), ("data.jsonl",), _pairs
)
PAIRS_TEXT = Specimen(
    "pairs in text", rows({**TEXT, "id": "the first of two"}, TEXT), ("data.jsonl",), _pairs
)
PAIRS_CSV = Specimen(
    "pairs as CSV",
    lambda directory: (directory / "data.csv").write_text(CSV, encoding="utf-8") and None,
    ("data.csv",),
    lambda directory: _pairs(directory, "data.csv"),
)
TRIPLES_IDS = Specimen(
    "desiderata in ids",
    rows({**TRIPLE_IDS, "template": "of the first line"}, TRIPLE_IDS),
    ("data.jsonl",),
    _triples,
)
TRIPLES_TEXT = Specimen(
    "desiderata in text",
    rows({**TRIPLE_TEXT, "template": "of the first"}, TRIPLE_TEXT),
    ("data.jsonl",),
    _triples,
)
GRAPH_JSON = Specimen(
    "graph.json", _graph("graph.json"), ("graph.json",), lambda d: plain(read_graph(d / "graph.json"))
)
GRAPH_PT = Specimen(
    "graph.pt", _graph("graph.pt"), ("graph.pt",), lambda d: plain(read_graph(d / "graph.pt"))
)
CIRCUIT = Specimen(
    "circuit.json", lambda d: circuit().save(d), ("circuit.json",), lambda d: plain(read_circuit(d, _dims()))
)
CIRCUIT_MASK = Specimen(
    "circuit.safetensors",
    _big_circuit,
    ("circuit.safetensors",),
    lambda d: plain(read_circuit(d, _dims())),
)
CIRCUIT_NAMES = Specimen(
    "names of edges", _names, ("circuit.txt",), lambda d: plain(read_circuit(d / "circuit.txt", _dims()))
)
CIRCUIT_LIST = Specimen(
    "list of edges", _name_list, ("names.json",), lambda d: plain(read_circuit(d / "names.json", _dims()))
)
EDGES = Specimen(
    "edges",
    _edges,
    ("edges.json", "edges.safetensors", "pairs.parquet"),
    lambda d: plain(EdgeScores.load(d)),
)
SCORES = Specimen(
    "scores",
    _scores,
    (
        "scores.json",
        "pairs.parquet",
        "verification.json",
        "bound.json",
        "scores.safetensors",
        "scores_abs.safetensors",
    ),
    lambda d: plain(Scores.load(d)),
    optional=("verification.json", "bound.json"),
)
MASK = Specimen(
    "mask",
    _mask,
    ("mask.json", "mask.safetensors", "study.json"),
    _mask_report,
    optional=("study.json",),
)
EVALUATION = model_specimen("evaluation", test_evaluation_page.build(), "evaluation.json")
PATHS = model_specimen("paths", test_paths_page.build(), "paths.json")
SCRUBBING = model_specimen(
    "scrubbing", Scrubbing(results=[test_scrubbing_page.result("value", 0.9)]), "scrubbing.json"
)
RECALL = model_specimen("recall", test_recall_page.study(), "recall.json")
CIRCUITS = model_specimen("circuits", test_circuits_page.study(), "circuits.json")
SCOREBOARD = model_specimen("scoreboard", scoreboard_example.smallest(), "scoreboard.json")
IOI = model_specimen("ioi", test_ioi_page.study(), "ioi.json")
MANIFEST = Specimen(
    "manifest",
    saved(make_manifest(), "manifest.json"),
    ("manifest.json",),
    lambda directory: plain(read_manifest(directory)),
)
CHECKPOINT = Specimen(
    "checkpoint of a mask",
    _checkpoint,
    ("seed 0.json", "seed 0.safetensors"),
    lambda directory: plain(Checkpoint(directory, RUN).load("seed 0")),
    optional=("seed 0.json",),
)
JOURNAL = Specimen("journal", _journal, ("*.parquet",), _found, optional=("*.parquet",))
MIB = Specimen(
    "MIB folder", _mib, ("ioi_gpt2/importances.json",), lambda d: plain(read_folder(d / "ioi_gpt2"))
)
MODEL = Specimen(
    "model directory",
    model_directory,
    ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"),
    _open,
)
SHARDED = Specimen(
    "sharded model directory",
    lambda directory: model_directory(directory, max_shard_size="2KB"),
    ("model.safetensors.index.json",),
    _open,
)

JSON_RESULTS = (EVALUATION, PATHS, SCRUBBING, RECALL, CIRCUITS, SCOREBOARD, IOI)
SPECIMENS = (
    PAIRS_IDS, PAIRS_TEXT, PAIRS_CSV, TRIPLES_IDS, TRIPLES_TEXT, GRAPH_JSON, GRAPH_PT, CIRCUIT, CIRCUIT_MASK,
    CIRCUIT_NAMES, CIRCUIT_LIST, EDGES, SCORES, MASK, *JSON_RESULTS, MANIFEST, CHECKPOINT, JOURNAL, MIB,
)  # fmt: skip
