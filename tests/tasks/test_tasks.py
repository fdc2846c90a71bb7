"""The registry of tasks: names, what is trained on, and both splits in one set."""

import pytest

from patchkit import tasks
from patchkit.data import group, read_pairs, require_disjoint, write_pairs
from patchkit.errors import InputError
from patchkit.tasks import language

TOKENIZER = language.build_tokenizer()


def test_every_task_has_a_description_and_trains_on_its_own_desiderata():
    named = [name for name in tasks.TASKS if not name.startswith("handmade-")]
    assert named == ["variable-binding", "arithmetic", "entity-tracking", "ioi"]
    for name, task in tasks.TASKS.items():
        assert task.name == name and task.description.endswith(".")
        assert set(task.trained) <= set(task.desiderata)
        assert bool(task.trained) == bool(task.desiderata)
        for key, desideratum in task.desiderata.items():
            assert desideratum.name == key
            assert (desideratum.kind == "invariance") == key.endswith("_invariance")


def test_a_set_holds_both_splits_and_the_counts():
    made = tasks.desiderata(
        "variable-binding", TOKENIZER, 12, 6, seed=1, names=["value_dependence", "third_value"], form="tell"
    )
    triples = made.triples()
    assert {name: len(members) for name, members in group(triples, "train").items()} == {
        "value_dependence": 12,
        "third_value": 12,
    }
    assert {len(members) for members in group(triples, "test").values()} == {6}
    require_disjoint(triples)
    assert {triple.meta["form"] for triple in triples} == {"tell"}
    expected: dict[str, int] = {}
    for name in ("value_dependence", "third_value"):
        for split, n in (("train", 12), ("test", 6)):
            single = tasks.TASKS["variable-binding"].desiderata[name](TOKENIZER, n, 1, split, form="tell")
            for reason, count in tasks.excluded(single).items():
                expected[f"{name}: {reason}"] = expected.get(f"{name}: {reason}", 0) + count
    assert made.excluded == expected and expected


def test_all_desiderata_of_one_split_by_default():
    made = tasks.desiderata("variable-binding", TOKENIZER, 0, 2, seed=0)
    assert set(group(made.triples(), "test")) == set(tasks.TASKS["variable-binding"].desiderata)
    with pytest.raises(InputError, match="has no train triples"):
        group(made.triples(), "train")


def test_kinds_of_triples_are_those_of_their_desiderata():
    for triple in tasks.desiderata("variable-binding", TOKENIZER, 0, 4, seed=0).triples():
        kind = tasks.TASKS["variable-binding"].desiderata[triple.desideratum].kind
        assert triple.kind == ("invariance" if kind == "invariance" else "dependence")


def test_pairs_of_a_task_survive_a_file(tmp_path):
    made = tasks.pairs("variable-binding", TOKENIZER, 5, 2, form="symbol")
    write_pairs(tmp_path / "p.jsonl", made)
    assert read_pairs(tmp_path / "p.jsonl", None, vocab_size=len(TOKENIZER)) == made


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tasks.get("poetry"), "unknown task 'poetry'; expected one of variable-binding, arithmetic"),
        (lambda: tasks.pairs("poetry", None, 1, 0), "unknown task 'poetry'"),
        (
            lambda: tasks.desiderata("ioi", TOKENIZER, 1, 1, 0),
            "has prompt pairs but no desiderata; variable-bind",
        ),
        (
            lambda: tasks.desiderata("variable-binding", TOKENIZER, 1, 1, 0, names=["vd"]),
            "has no desideratum 'vd'; it has value_dependence",
        ),
        (lambda: tasks.desiderata("variable-binding", TOKENIZER, 0, 0, 0), "no triples asked for"),
        (lambda: tasks.desiderata("variable-binding", TOKENIZER, 1, 1, 0, names=[]), "no triples asked for"),
    ],
)
def test_bad_requests(call, message):
    with pytest.raises(InputError, match=message):
        call()
