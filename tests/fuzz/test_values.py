"""Tensor and parquet files that are sound as such, and hold what does not belong there."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from tests.fuzz.specimens import CHECKPOINT, CIRCUIT_MASK, EDGES, GRAPH_PT, MASK, SCORES, Specimen
from tests.fuzz.trial import Bench

#: Beside `make test`, in a lane of its own.
pytestmark = pytest.mark.slow

NAN, INF = float("nan"), float("inf")
Damages = dict[str, Callable[[Path], object]]


def all_refused(specimen: Specimen, file: str, damages: Damages, directory: Path, **options: bool) -> None:
    bench = Bench(specimen, directory)
    found = {name: bench.complaint(file, damage, **options) for name, damage in damages.items()}
    assert {name: complaint for name, complaint in found.items() if complaint is not None} == {}


# Parquet.


def table(change: Callable[[pa.Table], pa.Table], **options: Any) -> Callable[[Path], None]:
    return lambda path: pq.write_table(change(pq.read_table(path)), path, **options)


def column(
    name: str, make: Callable[[list[Any]], Any], kind: pa.DataType | None = None
) -> Callable[[Path], None]:
    """Another column in the place of one; `make` is given its values."""

    def change(found: pa.Table) -> pa.Table:
        values = make(found[name].to_pylist())
        array = values if isinstance(values, pa.Array) else pa.array(values, kind)
        return found.set_column(found.column_names.index(name), name, array)

    return table(change)


def _no_text(values: list[Any]) -> pa.Array:
    """Texts of a byte that is not UTF-8."""
    offsets = np.arange(len(values) + 1, dtype=np.int32).tobytes()
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(b"\xff" * len(values))]
    return pa.Array.from_buffers(pa.string(), len(values), buffers)


LISTS = pa.list_(pa.float32())


def parquet(scores: str) -> Damages:
    return {
        "parquet of another program": lambda path: pq.write_table(pa.table({"a": [1]}), path),
        "parquet without rows": table(lambda found: found.slice(0, 0)),
        "a row too few": table(lambda found: found.slice(1)),
        "a row too many": table(lambda found: pa.concat_tables([found, found.slice(0, 1)])),
        "a column that is missing": table(lambda found: found.drop_columns([scores])),
        "a parquet column twice": table(lambda found: found.append_column(scores, found[scores])),
        "an id column twice": table(lambda found: found.append_column("id", found["id"])),
        "ids of whole numbers": column("id", lambda values: list(range(len(values)))),
        "ids that are null": column("id", lambda values: [None] * len(values), pa.string()),
        "ids that are not their own": column("id", lambda values: ["a"] * len(values)),
        "ids that are not UTF-8": column("id", _no_text),
        "a metric in words": column("base_metric", lambda values: ["high"] * len(values)),
        "a metric of whole numbers": column("base_metric", lambda values: [1] * len(values)),
        "a metric that is null": column("base_metric", lambda values: [None, *values[1:]], pa.float32()),
        "scores in words": column(scores, lambda values: [["x"]] * len(values)),
        "scores that are no list": column(scores, lambda values: [1.0] * len(values), pa.float32()),
        "scores in objects": column(scores, lambda values: [{"a": 1}] * len(values)),
        "a list of scores that is null": column(scores, lambda values: [None, *values[1:]], LISTS),
        "a score that is null": column(scores, lambda values: [[None, *row[1:]] for row in values], LISTS),
        "scores too few": column(scores, lambda values: [row[:-1] for row in values], LISTS),
        "lists of scores of unequal length": column(
            scores, lambda values: [values[0][:-1], *values[1:-1], [*values[-1], 0.0]], LISTS
        ),
    }


@pytest.mark.parametrize(("specimen", "scores"), [(SCORES, "effect.z"), (EDGES, "effect.edges")])
def test_parquet_that_is_not_of_these_scores(specimen: Specimen, scores: str, tmp_path: Path) -> None:
    all_refused(specimen, "pairs.parquet", parquet(scores), tmp_path)


def test_parquet_that_another_program_wrote_alike(tmp_path: Path) -> None:
    same: Damages = {
        "row groups of one": table(lambda found: found, row_group_size=1),
        "another compression": table(lambda found: found, compression="brotli"),
        "a column more": table(lambda found: found.append_column("colour", found["id"])),
    }
    all_refused(SCORES, "pairs.parquet", same, tmp_path, harmless=True)


def test_a_number_that_was_damaged_on_disk_is_found(tmp_path: Path) -> None:
    """Parquet's checksums cover every byte of the numbers: all of a column's are tried."""
    bench = Bench(EDGES, tmp_path)
    content = bench.bytes_of("pairs.parquet")
    place = pq.ParquetFile(io.BytesIO(content)).metadata.row_group(0).column(3)
    start = place.data_page_offset
    for offset in range(start, start + place.total_compressed_size, 29):
        flipped = content[:offset] + bytes([content[offset] ^ 8]) + content[offset + 1 :]
        complaint = bench.complaint("pairs.parquet", lambda path, new=flipped: path.write_bytes(new))
        assert complaint in (None, "was read as if nothing were wrong"), (offset, complaint)


# Safetensors.


def tensors(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], None]:
    def do(path: Path) -> None:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        changed = change(safetensors.torch.load(path.read_bytes()))
        kept = {name: value.clone().contiguous() for name, value in changed.items()}
        safetensors.torch.save_file(kept, path, metadata=metadata)

    return do


def each(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return tensors(lambda found: {name: change(value) for name, value in found.items()})


def one(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return tensors(lambda found: found | {name: change(found[name])})


def header(change: Callable[[dict[str, str]], dict[str, str] | None]) -> Callable[[Path], None]:
    def do(path: Path) -> None:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        kept = safetensors.torch.load(path.read_bytes())
        safetensors.torch.save_file(kept, path, metadata=change(metadata))

    return do


OF_EDGES: Damages = {
    "scores in double precision": one("scores", lambda scores: scores.double()),
    "scores of whole numbers": one("scores", lambda scores: scores.nan_to_num().int()),
    "an infinite score": one("scores", lambda scores: torch.where(scores.isnan(), scores, INF)),
    "scores the other way round": one("scores", lambda scores: scores.T),
    "scores with an axis more": one("scores", lambda scores: scores[None]),
    "a number where there is no edge": one("scores", lambda scores: scores.nan_to_num()),
    "means of |effect| below zero": one("scores_abs", lambda scores: -scores),
    "no scores": tensors(lambda found: {name: value for name, value in found.items() if name != "scores"}),
    "a circuit of edges that do not exist": one("in_circuit", torch.ones_like),
    "a circuit of numbers": one("in_circuit", lambda mask: mask.float()),
    "no header metadata": header(lambda metadata: None),
    "names that are not JSON": header(lambda metadata: metadata | {"senders": "["}),
    "names nested too deeply": header(lambda metadata: metadata | {"senders": "[" * 100_000}),
    "names in another order": header(
        lambda metadata: metadata | {"senders": json.dumps(json.loads(metadata["senders"])[::-1])}
    ),
    "senders and receivers exchanged": header(
        lambda metadata: {"senders": metadata["receivers"], "receivers": metadata["senders"]}
    ),
    "a name too few": header(
        lambda metadata: metadata | {"receivers": json.dumps(json.loads(metadata["receivers"])[:-1])}
    ),
}
OF_MASKS: Damages = {
    "learned values that are NaN": each(lambda values: values * NAN),
    "learned values that are infinite": each(lambda values: values + INF),
    "learned values of whole numbers": each(lambda values: values.int()),
    "learned values with an axis more": each(lambda values: values[None]),
    "learned values of fewer layers": each(lambda values: values[1:]),
    "learned values of another kind": tensors(
        lambda found: {f"{name}s": value for name, value in found.items()}
    ),
}


def test_tensors_that_are_not_of_these_edges(tmp_path: Path) -> None:
    all_refused(EDGES, "edges.safetensors", OF_EDGES, tmp_path)


def test_tensors_that_are_not_of_this_mask(tmp_path: Path) -> None:
    all_refused(MASK, "mask.safetensors", OF_MASKS, tmp_path)


def test_tensors_that_are_not_of_this_circuit(tmp_path: Path) -> None:
    damages: Damages = {
        "a mask of numbers": each(lambda mask: mask.int()),
        "a mask of edges that do not exist": each(torch.ones_like),
        "a mask the other way round": each(lambda mask: mask.T),
        "a mask with an edge less": each(lambda mask: mask & (mask.cumsum(1) > 1)),
    }
    all_refused(CIRCUIT_MASK, "circuit.safetensors", damages, tmp_path)


def test_tensors_that_are_not_of_this_checkpoint(tmp_path: Path) -> None:
    damages: Damages = {
        "a checkpoint of NaN": each(lambda values: values * NAN),
        "a checkpoint of one number": each(torch.sum),
        "a checkpoint of a mask too few": each(lambda values: values[:1]),
        "a checkpoint of a mask too many": each(lambda values: torch.cat([values, values])),
        "a checkpoint under another name": tensors(lambda found: {"mask": found["values"]}),
    }
    all_refused(CHECKPOINT, "seed 0.safetensors", damages, tmp_path)


# Graphs saved by torch.


def content(change: Callable[[dict[str, Any]], Any], **options: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(change(torch.load(path, weights_only=True)), path, **options)


def field(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    return content(lambda found: found | {name: change(found[name])})


def size(name: str, value: Any) -> Callable[[Path], None]:
    return field("cfg", lambda cfg: cfg | {name: value})


class Program:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def _in_itself(found: dict[str, Any]) -> dict[str, Any]:
    found["patchkit"]["self"] = found["patchkit"]
    return found


def _short_storages(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        kept = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in kept:
            archive.writestr(name, data[:-8] if "/data/" in name else data)


def _foreign_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/b", "c")


OF_GRAPHS: Damages = {
    "a list around the graph": content(lambda found: [found]),
    "a tensor for a graph": content(lambda found: found["edges_scores"]),
    "None for a graph": content(lambda found: None),
    "an empty dict for a graph": content(lambda found: {}),
    "numbers for the names of fields": content(lambda found: {1: found}),
    "a module's weights for a graph": content(lambda found: torch.nn.Linear(2, 2).state_dict()),
    "a whole module for a graph": content(lambda found: torch.nn.Linear(2, 2)),
    "a zip archive of something else": _foreign_zip,
    "storages that are too short": _short_storages,
    "sizes that are missing": field("cfg", lambda cfg: None),
    "sizes in a list": field("cfg", lambda cfg: list(cfg.values())),
    "sizes in tensors": field("cfg", lambda cfg: {name: torch.tensor(value) for name, value in cfg.items()}),
    "a billion layers": size("n_layers", 10**9),
    "more layers than there are numbers": size("n_layers", 10**30),
    "layers below zero": size("n_layers", -3),
    "a boolean for a size": size("n_layers", True),
    "a width of a trillion": size("d_model", 10**12),
    "nodes that are missing": field("src_nodes", lambda names: names[:-1]),
    "nodes in another order": field("src_nodes", lambda names: names[::-1]),
    "nodes by number": field("src_nodes", lambda names: list(range(len(names)))),
    "nodes in a tensor": field("src_nodes", lambda names: torch.arange(len(names))),
    "tensors for the names of nodes": field("src_nodes", lambda names: [torch.ones(2)] * len(names)),
    "graph scores of whole numbers": field("edges_scores", lambda scores: scores.nan_to_num().int()),
    "complex graph scores": field("edges_scores", lambda scores: scores.to(torch.complex64)),
    "sparse graph scores": field("edges_scores", lambda scores: scores.nan_to_num().to_sparse()),
    "graph scores without memory": field("edges_scores", lambda scores: scores.to("meta")),
    "nested graph scores": field(
        "edges_scores", lambda scores: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    ),
    "graph scores in lists": field("edges_scores", lambda scores: scores.tolist()),
    "graph scores the other way round": field("edges_scores", lambda scores: scores.T),
    "a trillion graph scores of one number": field(
        "edges_scores", lambda scores: torch.zeros(1, 1).expand(10**6, 10**6)
    ),
    "infinite graph scores": field("edges_scores", lambda scores: scores.nan_to_num() + INF),
    "membership in numbers": field("edges_in_graph", lambda mask: mask.float()),
    "membership of edges that do not exist": field("edges_in_graph", lambda mask: mask.T.T | True),
    "membership of too many nodes": field("nodes_in_graph", lambda mask: torch.ones(99, dtype=torch.bool)),
    "columns the other way round": field("neurons_in_graph", lambda mask: mask.T),
    "a list for what the numbers are": field("patchkit", lambda origin: [1]),
    "a tensor for what the numbers are": field("patchkit", lambda origin: {"scores": torch.ones(2)}),
    "bytes for the method": field("patchkit", lambda origin: origin | {"method": b"eap"}),
    "tuples for names of fields": field("patchkit", lambda origin: {(1, 2): 3}),
    "a dict inside itself": content(_in_itself),
}


@pytest.mark.filterwarnings("ignore")
def test_graphs_that_are_none(tmp_path: Path) -> None:
    all_refused(GRAPH_PT, "graph.pt", OF_GRAPHS, tmp_path)


def test_graphs_that_torch_writes_otherwise(tmp_path: Path) -> None:
    same: Damages = {
        "torch's older layout": content(lambda found: found, _use_new_zipfile_serialization=False),
        "an ordered dict": content(OrderedDict),
        "tuples of names": field("src_nodes", tuple),
        "parameters": field("edges_scores", torch.nn.Parameter),
    }
    all_refused(GRAPH_PT, "graph.pt", same, tmp_path, harmless=True)


def test_programs_in_graphs_are_refused_and_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "it ran"
    damages: Damages = {
        "a program in a pickle": content(lambda found: found | {"more": Program(mark)}),
        "a program in torch's older layout": content(
            lambda found: [Program(mark)], _use_new_zipfile_serialization=False
        ),
        "a program for a graph": content(lambda found: Program(mark)),
    }
    all_refused(GRAPH_PT, "graph.pt", damages, tmp_path)
    assert not mark.exists()


NAMES = (*parquet("scores"), *OF_EDGES, *OF_MASKS, *OF_GRAPHS)
