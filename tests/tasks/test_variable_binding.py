"""The desiderata of variable binding against a separate reader of the rendered prompts.

`read` takes a prompt's text apart with regular expressions and works out every answer anew; nothing of the
package's language is used for that.
"""

import re

import pytest

from patchkit.data import require_disjoint
from patchkit.errors import InputError
from patchkit.tasks import language as lang
from patchkit.tasks import variable_binding as binding
from patchkit.tasks.building import excluded, gather
from tests.toy_tokenizers import characters

TOKENIZER = lang.build_tokenizer()
BY_NAME = {desideratum.name: desideratum for desideratum in binding.DESIDERATA}

QUERIES = [
    (r"(?:=|what is|fetch|tell me) ([a-t])", "recall"),
    (r"(?:\+ (\d)|what is plus (\d)|add (\d) to|tell me (\d) above) ([a-t])", "plus"),
    (r"(?:- (\d)|what is minus (\d)|take (\d) from|tell me (\d) below) ([a-t])", "minus"),
    (r"(?:\? (\d)|what is versus (\d)|hold (\d) against|tell me (\d) beside) ([a-t])", "compare"),
]


def read(text):
    """(bindings as [(name, value)], fillers, operation, constant, queried name) of a prompt."""
    body, question = text.split(" ; ")
    clauses = [clause.strip() for clause in body.split(" ,") if clause.strip()]
    bound = [re.fullmatch(r"([a-t]) (?:=|is|holds|has) (\d)", clause) for clause in clauses]
    bindings = [(match[1], int(match[2])) for match in bound if match]
    fillers = [clause for clause, match in zip(clauses, bound, strict=True) if not match]
    assert all(re.fullmatch(r"note [a-t]|skip \d", filler) for filler in fillers)
    for pattern, operation in QUERIES:
        match = re.fullmatch(pattern, question)
        if match:
            constant = next((int(group) for group in match.groups()[:-1] if group), None)
            return bindings, fillers, operation, constant, match.groups()[-1]
    raise AssertionError(question)


def work_out(operation, constant, value):
    if operation == "recall":
        return str(value)
    if operation == "compare":
        return "less" if value < constant else "more" if value > constant else "same"
    return str((value + constant if operation == "plus" else value - constant) % 10)


def answer(text):
    bindings, _, operation, constant, name = read(text)
    return work_out(operation, constant, dict(bindings)[name])


def target(name, original, alternate):
    """What each desideratum asks for, said again from its meaning."""
    bindings, _, operation, constant, queried = read(original)
    others, _, _, _, asked = read(alternate)
    if name.endswith("_invariance"):
        return answer(original)
    if name in ("value_dependence", "value_not_position", "value_not_name"):
        return answer(alternate)
    if name == "third_value":
        return work_out(operation, constant, dict(others)[asked])
    if name == "name_dependence":
        return work_out(operation, constant, dict(bindings)[asked])
    assert name == "position_dependence"
    place = [other for other, _ in others].index(asked)
    return work_out(operation, constant, bindings[place][1])


@pytest.fixture(scope="module")
def made():
    return {
        (name, split): BY_NAME[name](TOKENIZER, 48, 3, split)
        for name in BY_NAME
        for split in ("train", "test")
    }


@pytest.fixture(scope="module")
def datasets(made):
    return {key: dataset.to_list() for key, dataset in made.items()}


def rows(name, n, **options):
    return BY_NAME[name](TOKENIZER, n, 0, "train", **options).to_list()


EVERY = pytest.mark.parametrize("name", sorted(BY_NAME))
BOTH = pytest.mark.parametrize("split", ["train", "test"])


@EVERY
@BOTH
def test_answers_and_targets_are_what_the_text_says(datasets, name, split):
    dataset = datasets[name, split]
    assert len(dataset) == 48
    token = TOKENIZER.convert_ids_to_tokens
    for row in dataset:
        assert token(row["original_answer_id"]) == answer(row["original"])
        assert token(row["alternate_answer_id"]) == answer(row["alternate"])
        assert token(row["target_id"]) == row["target"] == target(name, row["original"], row["alternate"])
        assert row["split"] == split and row["desideratum"] == name
        for side in ("original", "alternate"):
            assert token(row[f"{side}_ids"]) == ["<s>", *row[side].split()]
            assert row[side].split()[-1] == read(row[side])[4]


@EVERY
@BOTH
def test_every_triple_can_tell_success_from_failure(datasets, name, split):
    for row in datasets[name, split]:
        own, other = answer(row["original"]), answer(row["alternate"])
        if name.endswith("_invariance"):
            assert row["target"] == own != other
        else:
            assert row["target"] != own
        if name in ("third_value", "position_dependence", "name_dependence"):
            assert row["target"] != other


def changed(row):
    """What differs between the two prompts of a triple, in words."""
    first, second = read(row["original"]), read(row["alternate"])
    names = [[name for name, _ in side[0]] for side in (first, second)]
    queried = [side[4] for side in (first, second)]
    values = [dict(side[0])[name] for side, name in zip((first, second), queried, strict=True)]
    rest = [
        sorted(value for name, value in side[0] if name != asked)
        for side, asked in zip((first, second), queried, strict=True)
    ]
    return {
        what
        for what, before, after in (
            ("names", sorted(names[0]), sorted(names[1])),
            ("order", names[0], names[1]),
            ("queried", *queried),
            ("value", *values),
            ("others", *rest),
            ("operation", first[2], second[2]),
            ("constant", first[3], second[3]),
            ("place", names[0].index(queried[0]), names[1].index(queried[1])),
            ("fillers", first[1], second[1]),
            ("length", len(row["original"].split()), len(row["alternate"].split())),
        )
        if before != after
    }


@pytest.mark.parametrize(
    ("name", "always", "sometimes"),
    [
        ("value_dependence", {"value"}, set()),
        ("operation_invariance", {"operation"}, set()),
        ("constant_invariance", {"operation", "constant"}, set()),
        ("name_invariance", {"names", "order", "queried", "operation"}, {"fillers"}),
        ("distractor_invariance", {"fillers", "operation"}, set()),
        ("value_not_position", {"order", "place", "value"}, set()),
        ("value_not_name", {"order", "queried", "value"}, {"fillers"}),
        ("position_dependence", {"order", "place"}, {"value", "others", "queried"}),
        ("name_dependence", {"order", "queried"}, {"value", "others", "place"}),
        ("third_value", {"value", "operation", "constant"}, set()),
    ],
)
def test_the_alternate_changes_what_it_says_and_nothing_else(datasets, name, always, sometimes):
    for split in ("train", "test"):
        for row in datasets[name, split]:
            difference = changed(row)
            assert always <= difference <= always | sometimes, row


def test_every_filler_changes_where_it_stands(datasets):
    for row in datasets["distractor_invariance", "train"]:
        sides = [re.findall(r"(?:note|skip) \w", row[side]) for side in ("original", "alternate")]
        assert sides[0] and all(before != after for before, after in zip(*sides, strict=True))


def test_a_name_is_changed_wherever_it_is_mentioned(datasets):
    mentioned = 0
    for row in datasets["name_invariance", "train"]:
        old, new = (read(row[side])[4] for side in ("original", "alternate"))
        before, after = (read(row[side])[1] for side in ("original", "alternate"))
        assert f"note {old}" not in after
        mentioned += f"note {old}" in before and f"note {new}" in after
        assert new not in dict(read(row["original"])[0])
    assert mentioned > 0


def test_position_and_name_disagree_about_the_original(datasets):
    for split in ("train", "test"):
        for row in datasets["position_dependence", split]:
            assert row["target"] != target("name_dependence", row["original"], row["alternate"])
        for row in datasets["name_dependence", split]:
            assert row["target"] != target("position_dependence", row["original"], row["alternate"])
        for row in datasets["value_not_position", split]:
            assert row["target"] != target("position_dependence", row["original"], row["alternate"])
        for row in datasets["value_not_name", split]:
            assert row["target"] != target("name_dependence", row["original"], row["alternate"])


def test_train_and_test_share_no_list_of_bindings(made, datasets):
    def lists(split):
        return {
            frozenset(read(row[side])[0])
            for (_, part), dataset in datasets.items()
            if part == split
            for row in dataset
            for side in ("original", "alternate")
        }

    assert lists("train").isdisjoint(lists("test")) and len(lists("test")) > 300
    triples = gather([(name, dataset) for (name, _), dataset in made.items()]).triples()
    require_disjoint(triples)


def test_spans_point_at_the_words(datasets):
    for name in ("value_dependence", "value_not_position", "name_invariance"):
        for row in datasets[name, "train"]:
            for side, key in (("original", "spans"), ("alternate", "alternate_spans")):
                words, spans = ["<s>", *row[side].split()], row[key]
                bindings, _, _, _, asked = read(row[side])
                at = {span: words[start:end] for span, (start, end) in spans.items()}
                assert at["name"] == at["query"] == [asked] and spans["query"][1] == len(words)
                assert at["value"] == [str(dict(bindings)[asked])]
                assert words[spans["value"][0] - 2] == asked
                assert at["operation"] == words[words.index(";") + 1 : -1]


@EVERY
def test_the_same_seed_gives_the_same_triples_and_another_others(datasets, name):
    again = BY_NAME[name](TOKENIZER, 16, 3, "test").to_list()
    assert again == datasets[name, "test"][:16]
    other = BY_NAME[name](TOKENIZER, 16, 4, "test").to_list()
    assert {row["original"] for row in other}.isdisjoint(row["original"] for row in again)


def test_forms_and_operations_take_turns(datasets):
    cells = [(row["form"], row["operation"]) for row in datasets["value_dependence", "train"]]
    assert {cells.count(cell) for cell in cells} == {3} and len(set(cells)) == 16
    one = rows("value_dependence", 8, form="order", operations=("plus", "minus"))
    assert {(row["form"], row["operation"]) for row in one} == {("order", "plus"), ("order", "minus")}
    two = rows("operation_invariance", 8, form=("tell", "symbol"), n_variables=2)
    assert {row["form"] for row in two} == {"tell", "symbol"}
    assert {len(read(row["original"])[0]) for row in two} == {2}
    bare = rows("value_dependence", 8, n_distractors=0)
    assert not any(read(row["original"])[1] for row in bare)


def test_what_was_left_out_is_counted():
    # Modulo 10 the constant 5 is added and taken away alike: the one way these two can agree.
    dataset = BY_NAME["operation_invariance"](TOKENIZER, 120, 0, "train", operations=("plus", "minus"))
    assert "5" not in {
        re.sub(r".* ; ", "", row["original"]).split()[1]
        for row in dataset.to_list()
        if row["form"] == "symbol"
    }
    counted = excluded(dataset)
    assert list(counted) == ["the alternate has the original's answer"]
    assert 3 <= counted["the alternate has the original's answer"] <= 36, "about one in nine"
    both = gather([("a", dataset), ("b", dataset)])
    assert both.excluded == {f"{name}: {reason}": count for name in "ab" for reason, count in counted.items()}
    assert len(both.triples()) == 240
    with pytest.raises(InputError, match="does not say what was left out"):
        excluded(both.dataset)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("value_dependence", {"n": 0}, "must be at least 1, found 0"),
        ("value_dependence", {"split": "dev"}, "split must be 'train' or 'test', found 'dev'"),
        ("value_dependence", {"form": "verse"}, "form 'verse' is not one of symbol, question"),
        (
            "value_dependence",
            {"operations": ("times",)},
            "needs at least 1 of the operations|'times' is not one of",
        ),
        ("value_dependence", {"operations": ()}, "operation '' is not one of"),
        ("value_dependence", {"n_variables": 1}, "n_variables is 1; expected 2 to 6"),
        ("value_dependence", {"n_distractors": 9}, "n_distractors is 9; expected 0 to 3"),
        ("distractor_invariance", {"n_distractors": 0}, "n_distractors is 0; expected 1 to 3"),
        (
            "operation_invariance",
            {"operations": ("plus",)},
            "operation_invariance needs at least 2 of the operations",
        ),
        (
            "constant_invariance",
            {"operations": ("plus", "recall")},
            "needs at least 2 of the operations plus, minus",
        ),
        (
            "value_dependence",
            {"tokenizer": characters()},
            "needs their tokenizer, found one without the word 'less'",
        ),
        ("value_dependence", {"tokenizer": None}, "needs their tokenizer, found none"),
    ],
)
def test_bad_requests(name, options, message):
    call = {"tokenizer": TOKENIZER, "n": 4, "seed": 0, "split": "train", **options}
    with pytest.raises(InputError, match=message):
        BY_NAME[name](**call)


def test_pairs_are_aligned_and_scored_by_both_answers():
    pairs = binding.pairs(TOKENIZER, 20, 5)
    assert len({pair.id for pair in pairs}) == 20
    for pair in pairs:
        assert len(pair.clean_ids) == len(pair.corrupt_ids)
        differing = [
            i for i, (a, b) in enumerate(zip(pair.clean_ids, pair.corrupt_ids, strict=True)) if a != b
        ]
        assert differing == [pair.spans["value"][0]]
        assert TOKENIZER.convert_ids_to_tokens(pair.answer_id) == answer(pair.meta["clean"])
        assert TOKENIZER.convert_ids_to_tokens(pair.wrong_id) == answer(pair.meta["corrupt"])
    assert binding.pairs(TOKENIZER, 20, 5) == pairs


def test_every_desideratum_is_described():
    for desideratum in binding.DESIDERATA:
        assert "Target: " in desideratum.description and desideratum.description.endswith(".")
