"""Scores come back from their directory as they went, and a directory that does not fit together is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from patchkit.errors import InputError
from patchkit.model import Dims, NodeGrid
from patchkit.results import _scores_files
from patchkit.results.compare import compare_runs
from patchkit.results.formats import load_tensors, save_tensors
from patchkit.results.scores import Convention, Scores
from patchkit.results.verification import Bound, BoundStratum, Verification, VerifiedNode

NAN, INF = float("nan"), float("inf")
DIMS = Dims(n_layers=2, n_heads=4, n_kv_heads=2, d_head=3, d_model=12, d_mlp=5, vocab_size=20, parallel=False)
VERIFICATION = Verification(
    k=1,
    sampled=1,
    unverified=20,
    rank_correlation={"top": None, "sample": None, "all": 1.0},
    sign_agreement={"top": 1.0, "sample": None, "all": 0.5},
    nodes=[
        VerifiedNode(
            node="a0.h1@0",
            number=5,
            estimate=2.0,
            signed=-2.0,
            exact=1.5,
            exact_signed=-1.5,
            group="top",
            stratum="z.0",
        ),
        VerifiedNode(
            node="k.1.h0@1",
            number=3,
            estimate=0.1,
            signed=0.1,
            exact=2.5,
            exact_signed=-2.5,
            group="sample",
            stratum="k.1",
        ),
    ],
    cost=4.0,
    missed=["k.1.h0@1"],
)
BOUND = Bound(
    alpha=0.05,
    unverified=20,
    bound=0.4,
    familywise=0.7,
    strata=[BoundStratum(name="z.0", nodes=7, draws=64, p=0.25, bound=0.4, familywise=0.7)],
    largest=[("a0.h2@1", 0.2, 0.7)],
    cost=64.0,
)


def make(seed: int = 0, **changed: Any) -> Scores:
    grid = NodeGrid(DIMS, ("z", "k", "neuron"), ("0", "1", "2"), True, group=2)
    effects = torch.randn(4, len(grid), generator=torch.Generator().manual_seed(seed))
    effects[:, 3] = NAN
    fields: dict[str, Any] = {
        "grid": grid,
        "method": "atp",
        "convention": Convention(metric="kl", direction="denoise", ablation="mean", positions="0,1,2"),
        "pair_ids": ("a", "b", "ü", "d"),
        "effects": effects,
        "magnitudes": effects.abs(),
        "base_metric": torch.tensor([1.0, 2.0, 3.0, 4.0]),
        "source_metric": torch.tensor([0.5, NAN, 1.5, 2.5]),
        "cost": 3.25,
    }
    return Scores(**(fields | changed))


def same(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype == torch.float32 and bool(
        torch.equal(left.nan_to_num(99.0), right.nan_to_num(99.0))
    )


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("checked", [False, True])
@pytest.mark.parametrize("chunk", [1, 1 << 28])
def test_scores_come_back_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dropped: bool, checked: bool, chunk: int
) -> None:
    monkeypatch.setattr(_scores_files, "_CHUNK", chunk)
    scores = make(layer_backwards=6)
    if dropped:
        scores = make(layer_backwards=6, magnitudes=scores.magnitudes * 1.5)
    if checked:
        scores = Scores(**(vars(scores) | {"verification": VERIFICATION, "bound": BOUND}))
    scores.save(tmp_path)
    back = Scores.load(tmp_path)
    for name in ("effects", "magnitudes", "base_metric", "source_metric"):
        assert same(getattr(back, name), getattr(scores, name)), name
    for name in (
        "grid",
        "method",
        "convention",
        "pair_ids",
        "cost",
        "layer_backwards",
        "verification",
        "bound",
    ):
        assert getattr(back, name) == getattr(scores, name), name
    written = {"scores.safetensors", "scores_abs.safetensors", "pairs.parquet", "scores.json"}
    assert {path.name for path in tmp_path.iterdir()} == written | (
        {"verification.json", "bound.json"} if checked else set()
    )
    assert (
        any(name.startswith("magnitude.") for name in pq.read_schema(tmp_path / "pairs.parquet").names)
        == dropped
    )


def test_files_are_what_other_programs_expect(tmp_path: Path) -> None:
    scores = make()
    scores.save(tmp_path)
    tensors = load_tensors(tmp_path / "scores.safetensors")
    assert {name: tuple(value.shape) for name, value in tensors.items()} == {
        "k": (2, 3, 2),
        "z": (2, 3, 4),
        "neuron": (2, 3, 3),
    }
    assert same(tensors["k"], scores.mean("k"))
    assert same(load_tensors(tmp_path / "scores_abs.safetensors")["z"], scores.mean_abs("z"))
    table = pq.read_table(tmp_path / "pairs.parquet")
    assert table.column_names == [
        "id",
        "base_metric",
        "source_metric",
        "effect.k",
        "effect.z",
        "effect.neuron",
    ]
    assert table.schema.field("effect.z").type == pa.list_(pa.float32())
    row = table["effect.z"][2].as_py()
    assert same(torch.tensor(row).reshape(2, 3, 4), scores.grid.split(scores.effects)["z"][2])
    assert table["id"].to_pylist() == ["a", "b", "ü", "d"]


def test_scores_without_checks_do_not_keep_those_of_others(tmp_path: Path) -> None:
    make(verification=VERIFICATION, bound=BOUND).save(tmp_path)
    make().save(tmp_path)
    assert Scores.load(tmp_path).verification is None
    assert Scores.load(tmp_path).bound is None


def test_numbers_of_a_float64_model_are_whole_in_memory_and_float32_in_files(tmp_path: Path) -> None:
    exact = make(effects=make().effects.double() / 3, magnitudes=make().effects.double().abs() / 3)
    assert exact.mean().dtype == torch.float64
    exact.save(tmp_path)
    assert load_tensors(tmp_path / "scores.safetensors")["z"].dtype == torch.float32
    back = Scores.load(tmp_path)
    assert same(back.effects, exact.effects.float())
    assert same(back.magnitudes, exact.effects.abs().float())


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        path = directory / "scores.json"
        data = json.loads(path.read_text(encoding="utf-8"))
        change(data)
        path.write_text(json.dumps(data), encoding="utf-8")

    return apply


def tensors(change: Callable[[dict[str, Tensor]], Any], name: str = "scores") -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        found = load_tensors(directory / f"{name}.safetensors")
        change(found)
        save_tensors(directory / f"{name}.safetensors", found)

    return apply


def table(change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        path = directory / "pairs.parquet"
        pq.write_table(change(pq.read_table(path)), path)

    return apply


def replaced(found: pa.Table, name: str, column: pa.Array) -> pa.Table:
    return found.set_column(found.column_names.index(name), name, column)


MALFORMED: list[tuple[Callable[[Path], Any], str]] = [
    (lambda d: (d / "scores.json").unlink(), r"scores\.json: no such file"),
    (lambda d: (d / "pairs.parquet").unlink(), r"pairs\.parquet: no such file"),
    (lambda d: (d / "scores_abs.safetensors").unlink(), r"scores_abs\.safetensors: no such file"),
    (lambda d: (d / "pairs.parquet").write_bytes(b"x"), r"pairs\.parquet: expected a parquet file"),
    (lambda d: (d / "scores.json").write_text("{"), r"scores\.json, line 1"),
    (lambda d: (d / "verification.json").write_text("{}"), r"verification\.json: not a valid Verification"),
    (edit(lambda data: data.pop("method")), r"scores\.json: not a valid Header: field method"),
    (edit(lambda data: data.update(schema_version=2)), r"expected schema_version 1, found 2"),
    (edit(lambda data: data["grid"].update(kinds=["k", "z", "nose"])), r"scores\.json: .*'nose'"),
    (edit(lambda data: data["grid"].update(placed=False)), r"scores\.json: 3 places need a position axis"),
    (edit(lambda data: data["grid"]["dims"].pop("n_heads")), r"field grid\.dims\.n_heads"),
    (edit(lambda data: data["grid"].update(places=["0", "1"])), r"'k' has shape \[2, 3, 2\], expected \[2, 2, 2\]"),
    (edit(lambda data: data.update(pairs=5)), r"expected 5 pairs as scores\.json says, found 4 rows"),
    (tensors(lambda found: found.pop("z")), r"scores\.safetensors: no tensor 'z'"),
    (tensors(lambda found: found.update(q=torch.zeros(2))), r"tensor 'q' is not in scores\.json"),
    (tensors(lambda found: found.update(z=torch.zeros(2, 4)), "scores_abs"), r"scores_abs.*'z' has shape \[2, 4\]"),
    (table(lambda found: found.slice(0, 3)), r"expected 4 pairs .* found 3 rows"),
    (table(lambda found: found.drop_columns(["effect.z"])), r"no column 'effect\.z'"),
    (table(lambda found: found.drop_columns(["base_metric"])), r"no column 'base_metric'"),
    (
        table(lambda found: replaced(found, "effect.k", pa.array([[1.0]] * 4, pa.list_(pa.float32())))),
        r"column 'effect\.k': expected 12 float32 in every row, found lists of 1",
    ),
    (
        table(lambda found: replaced(found, "effect.k", pa.array(["x"] * 4))),
        r"column 'effect\.k': expected 12 float32 in every row, found string",
    ),
    (
        table(lambda found: replaced(found, "base_metric", pa.array([1.0, None, 2.0, 3.0]))),
        r"column 'base_metric': expected 1 float32 in every row, found double",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "words"), MALFORMED)
def test_malformed_directories_are_refused_in_one_line(
    tmp_path: Path, spoil: Callable[[Path], Any], words: str
) -> None:
    make(verification=VERIFICATION).save(tmp_path)
    spoil(tmp_path)
    with pytest.raises(InputError, match=words) as caught:
        Scores.load(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_rerun_is_compared_pair_by_pair(tmp_path: Path) -> None:
    scores = make()
    scores.save(tmp_path / "a")
    scores.save(tmp_path / "b")
    differences = compare_runs(tmp_path / "a", tmp_path / "b")
    assert {name for name in differences if name.startswith("pairs")} == {
        f"pairs.parquet:{name}"
        for name in ("id", "base_metric", "source_metric", "effect.k", "effect.z", "effect.neuron")
    }
    assert set(differences.values()) == {0.0}

    # Two pairs move against each other: no mean changes.
    effects = scores.effects.clone()
    effects[0, 0] += 0.5
    effects[1, 0] -= 0.5
    make(effects=effects, magnitudes=scores.magnitudes).save(tmp_path / "c")
    assert compare_runs(tmp_path / "a", tmp_path / "c")["pairs.parquet:effect.k"] == pytest.approx(0.5)
    make(pair_ids=("a", "b", "c", "d"), source_metric=torch.ones(4)).save(tmp_path / "d")
    other = compare_runs(tmp_path / "a", tmp_path / "d")
    assert other["pairs.parquet:id"] == other["pairs.parquet:source_metric"] == INF
    assert other["pairs.parquet:base_metric"] == 0.0
