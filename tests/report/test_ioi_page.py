"""The page of the IOI study: what it says and shows, and what it makes of odd studies."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import pytest

from patchkit.errors import InputError
from patchkit.report import write_report
from patchkit.report._canvas import to_svg
from patchkit.report._ioi_page import PICTURES, ioi_page, write_ioi_report
from patchkit.report._ioi_plots import (
    MOST_HEADS,
    Link,
    attention_maps,
    links,
    number_maps,
    spoken,
    stages_figure,
)
from patchkit.results.convention import Convention
from patchkit.results.evaluation import (
    CircuitRun,
    Completeness,
    Evaluation,
    Minimality,
    MinimalNode,
    RandomTest,
    Removal,
    Repair,
    SelfRepair,
)
from patchkit.results.formats import write_model
from patchkit.results.ioi import (
    QUERIES,
    TARGETS,
    Accuracy,
    HeadBehaviour,
    HeadRow,
    IoiStudy,
    Look,
    ProtocolScore,
    Rule,
    StageShare,
)
from patchkit.results.paths import PathEffect, PathResult, Stage
from patchkit.results.study import AttentionExample

EVIL = '</style><script>alert("x")</script>\u2028"&<b>'
CONVENTION = Convention(
    metric="logit-diff", direction="noise", ablation="resample", positions="all", patching="node"
)
STAGES = ("on the logits", "on the queries of group 1", "on the values of group 1")
SHARES = {"a1.h0": (-0.4, None, None), "a1.h1": (0.1, None, None), "a0.h1": (-0.01, -0.2, -0.05)}
CHOSEN = {("a1.h0", STAGES[0]), ("a1.h1", STAGES[0]), ("a0.h1", STAGES[1]), ("a0.h1", STAGES[2])}


def behaviour(**changed: float) -> HeadBehaviour:
    even = {target: 1 / len(TARGETS) for target in TARGETS}
    numbers = dict.fromkeys(
        ("copying", "negative_copying", "writes_io", "writes_s", "previous", "duplicate", "induction"), 0.125
    )
    return HeadBehaviour(attention={query: dict(even) for query in QUERIES}, **{**numbers, **changed})


def row(head: str, classes: list[str], **changed: Any) -> HeadRow:
    stages = [
        StageShare(corruption="abc", stage=stage, share=share, chosen=(head, stage) in CHOSEN)
        for stage, share in zip(STAGES, SHARES.get(head, ()), strict=False)
        if share is not None
    ]
    fields: dict[str, Any] = {
        "head": head,
        "classes": classes,
        "evidence": f"what {head} does",
        "in_circuit": head in SHARES,
        "stages": stages,
        "behaviour": behaviour(),
        "looks": Look(query="last", target="s2", mass=0.5, clear=True),
        "takes_over": None,
    }
    return HeadRow(**(fields | changed))


def evaluation(**changed: Any) -> Evaluation:
    run = CircuitRun(
        requested=None, n_edges=12, n_nodes=6, circuit_metric=4.5, faithfulness=0.875, gap=0.5, per_pair=[4.0, 5.0],
        absolute=False, ablation="resample", patching="node", selection="given", interval=(4.0, 5.0),
        faithfulness_interval=(0.75, 1.0),
    )  # fmt: skip
    fields: dict[str, Any] = {
        "convention": CONVENTION,
        "model": "m",
        "source": "traced",
        "method": "given",
        "graph_edges": 40,
        "pair_ids": ["0", "1"],
        "clean_metric": 5.0,
        "corrupt_metric": 1.0,
        "circuits": [run],
        "tested": 0,
        "completeness": Completeness(
            removals=[Removal(nodes=["a0.h1"], how="random", circuit_metric=2.0, model_metric=2.5)],
            worst=0.5,
            worst_share=0.125,
        ),
        "minimality": Minimality(
            limit=0.01, nodes=[MinimalNode(node="a1.h0", change=-2.0, share=-0.5, removed=["m0"])]
        ),
        "random": RandomTest(count=3, faithfulness=[0.1, 0.2, None], n_edges=[9, 9, 0], matched="nodes", p_value=0.25),
        "repair": SelfRepair(
            group=["a1.h0"], clean=5.0, knocked_out=2.0, expected=1.0, repaired=0.25,
            nodes=[Repair(node="a1.h1", before=0.5, after=-0.5, change=-1.0)],
        ),
        "cost": 10.0,
    }  # fmt: skip
    return Evaluation(**(fields | changed))


def study(**changed: Any) -> IoiStudy:
    effects = {
        stage: [
            PathEffect(sender=head, effect=4 * shares[i], effect_abs=1, share=shares[i], per_pair=[1.0])
            for head, shares in SHARES.items()
            if shares[i] is not None
        ]
        for i, stage in enumerate(STAGES)
    }
    path = PathResult(
        convention=CONVENTION, model="m", mlps="recomputed", positions="all", pair_ids=["0"], base_metric=5,
        source_metric=1, iterative=True, cost=3,
        stages=[
            Stage(name=stage, receivers=["logits"], effects=effects[stage],
                  chosen=[head for head, of in CHOSEN if of == stage])
            for stage in STAGES
        ],
    )  # fmt: skip
    protocol = ProtocolScore(
        circuit="all edges", corruption="abc", ablation="mean-positional", patching="node", template="3 ABBA", pairs=7,
        n_edges=12, clean_metric=5, circuit_metric=4, corrupt_metric=1, faithfulness=0.75, interval=(0.5, 1.0),
    )  # fmt: skip
    fields: dict[str, Any] = {
        "question": "Who is `it`?",
        "model": "m",
        "model_card": {"held-out accuracy": "99 %"},
        "examples": [
            {"clean": "Ann and Bob , Bob to", "answer": "Ann", "wrong": "Bob", "abc": "Cy and Di , Ed to"}
        ],
        "convention": CONVENTION,
        "pairs": 2,
        "seeds": {"pairs": 7},
        "parameters": {"attends from": "0.25"},
        "accuracy": Accuracy(prefers_io=1.0, says_io=0.5),
        "even": behaviour().attention,
        "paths": {"abc": path},
        "groups": [["a1.h0", "a1.h1"], ["a0.h1"]],
        "heads": [
            row("a0.h0", ["induction"]),
            row("a0.h1", [], takes_over=0.125),
            row("a1.h0", ["name mover", "negative name mover"], behaviour=behaviour(copying=1.0)),
            row("a1.h1", [], looks=Look(query="clause", target="names", mass=0.5, clear=False)),
        ],
        "rules": [
            Rule(name="name mover", criterion="attention END → IO at least 0.25", heads=["a1.h0"]),
            Rule(name="backup", criterion="rise", heads=[], nearest="nearest a0.h1: rise 0.01"),
        ],
        "attention": [
            AttentionExample(head="a1.h0", tokens=["<s>", "Ann", "to"], query=2, weights=[0.25, 0.5, 0.25])
        ],
        "circuit_nodes": ["a0.h1", "a1.h0", "a1.h1", "m0", "m1"],
        "traced_edges": ["a1.h0->logits"],
        "evaluation": evaluation(),
        "protocols": [protocol],
        "knocked_out": "the name movers that act on the logits",
        "comparison": {"87 % of theirs": "75 % of ours"},
        "findings": ["A finding with `code`."],
        "notes": ["A note."],
        "command": "patchkit study ioi --out DIR",
        "seconds": 75.0,
    }
    return IoiStudy(**(fields | changed))


def text(page: str) -> str:
    body = re.sub(r"<svg.*?</svg>|<style.*?</style>", "", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


_CELL = r"<t[hd][^>]*>(.*?)</t[hd]>"


def table(page: str, anchor: str, which: int = 0) -> list[list[str]]:
    inside = page.split(f'<section id="{anchor}"')[1].split("</section>")[0].split("<table")[1 + which]
    return [
        [" ".join(html.unescape(re.sub(r"<[^>]*>", " ", cell)).split()) for cell in re.findall(_CELL, row)]
        for row in re.findall(r"<tr.*?</tr>", inside.split("</table>")[0])
    ]


def test_sections_and_pictures() -> None:
    page = ioi_page(study())
    assert re.findall(r'<section id="([^"]+)"', page) == [
        "question", "findings", "stages", "classes", "heads", "maps", "attention", "belief", "completeness", "minimality",
        "random", "protocols", "repair", "comparison", "notes", "conventions", "again",
    ]  # fmt: skip
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    said = text(page)
    for words in (
        "How does m find the indirect object?",
        "3 of 4 heads and every MLP keep 87.5 % of the behaviour. Classes with heads in it: name mover.",
        "A finding with code .",
        "Ann and Bob , Bob to",
        "87 % of theirs",
        "seed of pairs 7",
        "1 min 15 s",
        "held-out accuracy 99 %",
    ):
        assert words in said, words


def test_tables_hold_the_numbers() -> None:
    page = ioi_page(study())
    rows = table(page, "heads")
    # a0.h0 is outside the circuit, but a class is of it.
    assert [one[0] for one in rows[1:]] == ["a0.h0", "a0.h1", "a1.h0", "a1.h1"]
    assert rows[1][1:3] == ["induction : what a0.h0 does", "–"]
    assert rows[2][1:] == ["what a0.h1 does", "−20.0", "on the queries of group 1, abc", "+12.5"]
    assert rows[3][1:4] == [
        "name mover, negative name mover : what a1.h0 does",
        "−40.0",
        "on the logits, abc",
    ]
    assert page.count('<tr class="mine">') == 1
    assert table(page, "classes")[1:] == [
        ["name mover", "attention END → IO at least 0.25", "a1.h0", ""],
        ["backup", "rise", "none", "nearest a0.h1: rise 0.01"],
    ]
    numbers = table(page, "heads", 1)
    assert numbers[1][0] == "head" and len(numbers) == 7 and numbers[-1][:2] == ["even attention", "11.1"]
    assert numbers[4][0] == "a1.h0" and numbers[4][10] == "100.0"
    (protocol,) = table(page, "protocols")[1:]
    assert protocol == [
        "all edges 12 edges, node patching", "abc", "mean-positional, of the template", "3 ABBA", "7", "5.00", "4.00",
        "1.00", "75.0", "50.0 to 100.0",
    ]  # fmt: skip
    stages = table(page, "stages")
    assert [one[0] for one in stages[1:]] == list(STAGES)
    assert stages[2][2] == "a0.h1 −20.0 %"


def test_the_staged_picture_shows_who_acts_on_whom() -> None:
    made = study()
    assert set(links(made)) == {
        Link("a1.h0", "", 0, -0.4),
        Link("a1.h1", "", 0, 0.1),
        Link("a0.h1", "q", 1, -0.2),
        Link("a0.h1", "v", 1, -0.05),
    }
    svg = to_svg(stages_figure(made), "alt", "a")
    for words in ("group 1", "group 2", "acts on the logits", "acts on group 1", "queries", "values", "name mover",
                  "(clause → names)", "END → S2", "−40\u00a0%", "+10\u00a0%", "works against"):  # fmt: skip
        assert words in svg, words
    assert "keys" not in svg
    assert [spoken(one) for one in made.heads] == ["induction", "END → S2", "name mover", "(clause → names)"]


def test_a_column_of_many_heads_says_how_many_are_left_out() -> None:
    heads = [f"a0.h{head}" for head in range(MOST_HEADS + 4)]
    rows = [
        row(
            head,
            [],
            in_circuit=True,
            stages=[StageShare(corruption="abc", stage=STAGES[0], share=-0.5, chosen=True)],
        )
        for head in heads
    ]
    made = study(heads=rows, groups=[heads])
    svg = to_svg(stages_figure(made), "alt", "a")
    assert "and 4 more" in svg and "a0.h17" in svg and "a0.h18" not in svg
    assert f"At most {MOST_HEADS} heads a column." in ioi_page(made)


def test_maps_have_every_head_in_its_place() -> None:
    made = study()
    for panel in (*attention_maps(made), *number_maps(made)):
        assert tuple(panel.cells.shape) == (2, 2) and panel.outlined == {(0, 1), (1, 0), (1, 1)}
    copying = next(panel for panel in number_maps(made) if panel.title == "copies names")
    assert copying.cells.tolist() == [[0.125, 0.125], [1.0, 0.125]]


def test_what_speaks_against_a_finding_is_on_top() -> None:
    weak = study(accuracy=Accuracy(prefers_io=0.5, says_io=0.1))
    assert "The model prefers IO to S in only 50.0 % of the prompts: it hardly does the task" in text(
        ioi_page(weak)
    )
    assert "Random circuits of equal size do as well (p = 0.25)." in text(ioi_page(study()))
    nobody = study(
        heads=[row(head, [], in_circuit=False, stages=[]) for head in ("a0.h0", "a1.h0")],
        groups=[], attention=[], rules=[Rule(name="backup", criterion="rise", heads=[])], protocols=[], examples=[],
        evaluation=evaluation(random=None, completeness=None, minimality=None, repair=None, tested=None),
        comparison={}, findings=[], notes=[], knocked_out="",
    )  # fmt: skip
    page = ioi_page(nobody)
    said = text(page)
    assert "Path patching kept no head, so the circuit is the MLPs alone." in said
    assert "None of the 1 published classes of heads has a member in it." in said
    assert "No head is in the circuit, and none has a class." in said
    assert not {"stages", "attention", "protocols", "repair", "comparison"} & set(
        re.findall(r'<section id="([^"]+)"', page)
    )


def test_text_is_only_text() -> None:
    page = ioi_page(
        study(
            question=EVIL, model=EVIL, model_card={EVIL: EVIL}, examples=[{EVIL: EVIL}], parameters={EVIL: EVIL},
            seeds={EVIL: 1}, heads=[row("a0.h0", [EVIL], evidence=EVIL, in_circuit=True)], groups=[],
            rules=[Rule(name=EVIL, criterion=EVIL, heads=["a0.h0"], nearest=EVIL)], comparison={EVIL: EVIL},
            findings=[EVIL], notes=[EVIL], command=EVIL, knocked_out=EVIL,
            attention=[AttentionExample(head=EVIL, tokens=[EVIL], query=0, weights=[1.0])],
        ),
        place=EVIL,
    )  # fmt: skip
    assert "<script" not in page and page.count("</style>") == 1 and "\u2028" not in page


def test_a_directory_of_a_study_gets_its_page(tmp_path: Path, make: Any) -> None:
    run = tmp_path / "run"
    study().save(run)
    write_model(run / "manifest.json", make.manifest(command="study"))
    assert write_report(run) == run / "report.html"
    assert {path.name for path in run.iterdir()} == {"ioi.json", "manifest.json", "report.html", *PICTURES}
    assert "patchkit rerun run" in (run / "report.html").read_text(encoding="utf-8")
    # A picture that there is nothing for any more goes.
    study(evaluation=evaluation(repair=None)).save(run)
    write_ioi_report(run)
    assert not (run / "repair.png").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"heads": []}, "field heads is empty"),
        (
            {"attention": [AttentionExample(head="a0.h0", tokens=["a", "b"], query=0, weights=[1.0])]},
            r"field attention\[0\]: expected 2 weights, one per token, .* found 1 and query 0",
        ),
        (
            {"attention": [AttentionExample(head="a0.h0", tokens=["a"], query=3, weights=[1.0])]},
            r"field attention\[0\]: .* found 1 and query 3",
        ),
    ],
)
def test_a_study_that_does_not_fit_together_is_refused(
    changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    study(**changed).save(tmp_path)
    with pytest.raises(InputError, match=f"ioi.json: {message}"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()
