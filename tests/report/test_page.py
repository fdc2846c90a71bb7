"""The page: parsed as a browser would, checked for what it loads, says and refuses."""

from __future__ import annotations

import html
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from patchkit.errors import InputError
from patchkit.report import mask_page, write_mask_report, write_report
from patchkit.report._html import duration, percent
from patchkit.results.formats import write_model
from patchkit.results.mask import MaskResult
from patchkit.results.study import AttentionExample, PromptExample, VariableBindingStudy

EVIL = "<script>alert('x')</script> & \"q\" $x$ --> </style> \x00"
VOID = {"meta", "br", "wbr", "link", "img", "input", "hr"}
FROM_MASK = [
    "components",
    "desiderata",
    "path",
    "carries",
    "own",
    "seeds",
    "training",
    "notes",
    "conventions",
]
FROM_STUDY = ["question", "forms", "attention", "comparison", "again"]


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    parents: list[str]
    text: str = ""


@dataclass
class Page(HTMLParser):
    """Every element with its text and where it stands; fails on tags that do not close in order."""

    source: str
    elements: list[Element] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[Element] = []
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        where = [f"{element.tag}.{element.attributes.get('class', '')}" for element in self.open]
        self.elements.append(Element(tag, {name: value or "" for name, value in attrs}, where))
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop().tag == tag, tag

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.text += data

    def all(self, tag: str) -> list[Element]:
        return [element for element in self.elements if element.tag == tag]

    @property
    def text(self) -> str:
        return self.all("body")[0].text

    def rows(self, anchor: str) -> list[list[str]]:
        """Cell texts of the first table of a section, read from the source by a second, cruder way."""
        section = self.source.split(f'<section id="{anchor}"')[1].split("</section>")[0]
        table = section.split("<table")[1].split("</table>")[0]
        rows = re.findall(r"<tr.*?</tr>", table, re.DOTALL)
        cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]
        clean = [[re.sub(r"<br>", " ", cell) for cell in row] for row in cells]
        return [[html.unescape(re.sub(r"<[^>]*>", "", cell)).strip() for cell in row] for row in clean]


def replaced(value: Any, keep: set[str], key: str = "") -> Any:
    """The same structure with every string, and every key of a free mapping, made hostile."""
    if isinstance(value, str):
        return value if key in keep else EVIL
    if isinstance(value, dict):
        free = key in {
            "model_card",
            "attention_summary",
            "comparison",
            "excluded",
            "scores",
            "options",
            "versions",
        }
        return {(EVIL if free else name): replaced(item, keep, name) for name, item in value.items()}
    if isinstance(value, list):
        return [replaced(item, keep, key) for item in value]
    return value


@pytest.fixture(scope="module")
def full(make: Any) -> Page:
    """The page of a run that has everything, drawn once."""
    return Page(mask_page(make.result(), make.study(), make.manifest()))


def test_full_page_is_wellformed_and_loads_nothing(full: Page) -> None:
    page = full
    ids = [element.attributes["id"] for element in page.elements if "id" in element.attributes]
    assert len(ids) == len(set(ids))
    for element in page.elements:
        assert not any(name.startswith("on") for name in element.attributes)
        for name in ("src", "href", "xlink:href"):
            target = element.attributes.get(name)
            assert target is None or (target.startswith("#") and target[1:] in ids), (element.tag, target)
    assert {target for target in re.findall(r"url\(#([^)]*)\)", page.source)} <= set(ids)
    assert not re.search(r"https?:|url\((?!#)|@import|//[a-z]", page.source)
    assert not {"script", "link", "iframe", "object", "base", "form"} & {
        element.tag for element in page.elements
    }
    assert "default-src 'none'" in page.source


def test_every_section_is_there_and_linked(full: Page) -> None:
    page = full
    sections = [element.attributes["id"] for element in page.all("section")]
    assert sorted(sections) == sorted(FROM_MASK + FROM_STUDY)
    linked = [element.attributes["href"] for element in page.all("a")]
    assert linked == [f"#{anchor}" for anchor in sections]


def test_without_study_the_same_page_less_its_sections(make: Any) -> None:
    page = Page(mask_page(make.result()))
    assert sorted(element.attributes["id"] for element in page.all("section")) == sorted(FROM_MASK)


def test_tables_and_pictures_are_accessible(full: Page) -> None:
    page = full
    assert page.all("html")[0].attributes["lang"] == "en"
    tables = page.all("table")
    assert len(tables) == len(page.all("caption")) == 10
    assert all(caption.text.strip() for caption in page.all("caption"))
    assert all("scroll" in table.parents[-1] for table in tables)
    assert all("scope" in cell.attributes for cell in page.all("th"))
    pictures = page.all("svg")
    assert len(pictures) == 7
    for picture in pictures:
        assert picture.attributes["role"] == "img" and len(picture.attributes["aria-label"]) > 20
    scrolling = [element for element in page.elements if "scroll" in element.attributes.get("class", "")]
    assert all(element.attributes["tabindex"] == "0" for element in scrolling)


@pytest.mark.parametrize("place", ["study", "result"])
def test_hostile_text_is_shown_not_run(make: Any, place: str) -> None:
    keep = {"chosen", "pruned", "component", "kind"} if place == "result" else set()
    result, study = make.result(), make.study()
    if place == "study":
        study = VariableBindingStudy.model_validate(replaced(study.model_dump(), keep))
    else:
        data = replaced(result.model_dump(), keep)
        result = MaskResult.model_validate({**data, "values": result.values})
    page = Page(mask_page(result, study, make.manifest(error=EVIL, status="failed", options={EVIL: EVIL})))
    assert not page.all("script") and len(page.all("style")) == 1
    assert "<script" not in page.source and "\x00" not in page.source
    assert "<script>alert('x')</script> & \"q\"" in page.text
    assert sorted(element.attributes["id"] for element in page.all("section")) == sorted(
        FROM_MASK + FROM_STUDY
    )


def test_headline_has_size_and_baselines(full: Page) -> None:
    page = full
    headline = next(p.text for p in page.all("p") if p.attributes.get("class") == "headline").replace(
        "\u00a0", " "
    )
    for said in ("5 of 36 components (13.9 %)", "at the last token", "97.7 %", "others 0.4 %", "0.9 %"):
        assert said in headline
    assert "no finding" not in page.text


@pytest.mark.parametrize(
    ("joint", "random_joint", "said"),
    [
        ({"complement": 0.98}, [0.0], "patching all the other components reaches 98.0"),
        ({"all": 0.977}, [0.0], "patching every component reaches 97.7"),
        ({}, [0.0, 0.99], "the best random set of the same size reaches 99.0"),
    ],
)
def test_a_baseline_as_good_as_the_chosen_set_is_said(
    make: Any, joint: dict[str, float], random_joint: list[float], said: str
) -> None:
    result = make.result()
    result = result.model_copy(update={"joint": {**result.joint, **joint}, "random_joint": random_joint})
    text = Page(mask_page(result)).text.replace("\u00a0", " ")
    assert "This is no finding" in text and said in text


def test_desiderata_table_has_every_number(make: Any, full: Page) -> None:
    result = make.result()
    rows = full.rows("desiderata")
    assert [row[0] for row in rows[2:]] == [
        *(f"{scores.name} {scores.kind}" for scores in result.desiderata),
        "joint minimum over trained",
    ]
    # Columns by hand: trained, train / test, on train, chosen, soft, nothing, everything, all others, random.
    assert rows[2][1:] == ["yes", "48 / 256", "99.9", "97.7", "96.6", "0.4", "99.5", "99.2", "2.4 0.4 to 4.4"]
    assert rows[5][1:] == ["no", "0 / 256", "–", "95.3", "94.2", "0.0", "99.5", "11.0", "2.0 0.0 to 4.0"]
    assert rows[7][1:] == ["", "", "", "97.7", "96.6", "0.4", "0.4", "0.4", "0.9 0.4 to 1.4"]


def test_carried_table_keeps_signs_and_columns_apart(full: Page) -> None:
    rows = full.rows("carries")
    assert rows[0] == ["", "alone", "missed"]
    assert rows[4] == ["a1.h2", "0.03", "4.0", "0.0", "10.0", "+31.0", "−12.0", "+40.0"]


def test_examples_mark_position_and_differences(full: Page) -> None:
    cards = full.source.split('<article class="card">')[1:]
    assert [card.count("patched here") for card in cards] == [1, 1]
    original, alternate = cards[0].split('<div class="prompt">')[1:3]
    assert original.count("<mark>") == alternate.count("<mark>") == 1
    assert "<mark>3</mark>" in original and "<mark>8</mark>" in alternate
    assert "✓ target" in cards[0] and "✗ not the target" in cards[1]


def test_trained_forms_are_marked(full: Page) -> None:
    rows = full.rows("forms")
    assert [(row[0], row[1], row[-1]) for row in rows[1:]] == [
        ("symbol", "yes", "97.7"),
        ("question", "no", "98.4"),
        ("order", "no", "97.0"),
        ("tell", "no", "98.0"),
    ]


def test_nothing_chosen_and_nothing_recorded(make: Any) -> None:
    joint = dict.fromkeys(("chosen", "soft", "empty", "all", "complement", "random"), 0.004)
    result = make.result(
        chosen=[], joint=joint, random_joint=[], pruned=[], own_masks=[], carried=[], history=[], lambda_path=[],
        seeds=[], jaccard=[], excluded={},
    )  # fmt: skip
    study = make.study(attention=[], attention_summary={}, examples=[], comparison={}, notes=[], forms=[])
    page = Page(mask_page(result, study))
    assert "None of 36 components was chosen" in page.text
    assert "no attention head was chosen" in page.text
    assert "nan" not in page.text
    left = {"question", "components", "desiderata", "attention", "conventions", "again"}
    assert {element.attributes["id"] for element in page.all("section")} == left


def test_published_size_of_model(make: Any) -> None:
    chosen = ["a15.h3", "a15.h4", "a20.h39", "a30.h0", "m19"]
    page = Page(mask_page(make.result(40, 40, chosen=chosen, pruned=["a16.h20"])))
    assert "5 of 1,640 components (0.3\u00a0%)" in page.text
    heat = page.all("svg")[0]
    assert all(name in heat.text for name in chosen)


def test_manifest_state_and_versions(make: Any) -> None:
    failed = Page(
        mask_page(make.result(), None, make.manifest(status="failed", error="loss is NaN"), place="out dir")
    )
    assert "The run failed: loss is NaN." in failed.text
    assert "torch 2.13.0" in failed.text and "patchkit rerun out dir" in failed.text
    assert "The run" not in Page(mask_page(make.result(), None, make.manifest(status="running"))).text


@pytest.mark.slow
def test_written_files_and_determinism(make: Any, tmp_path: Path) -> None:
    make.result().save(tmp_path)
    make.study().save(tmp_path)
    write_model(tmp_path / "manifest.json", make.manifest())
    report = write_report(tmp_path)
    assert report == tmp_path / "report.html"
    names = ["report.html", "mask.png", "path.png", "attention.png"]
    first = {name: (tmp_path / name).read_bytes() for name in names}
    assert all(first[name].startswith(b"\x89PNG") for name in names[1:])
    write_report(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in names} == first
    (tmp_path / "study.json").unlink()
    write_mask_report(tmp_path)
    assert not (tmp_path / "attention.png").exists()


def test_directories_that_hold_no_result(tmp_path: Path) -> None:
    (tmp_path / "scores.txt").write_text("1")
    for where, said in (
        (tmp_path, "scores.txt"),
        (tmp_path / "scores.txt", "a file"),
        (tmp_path / "no", "nothing"),
    ):
        with pytest.raises(InputError, match=said):
            write_report(where)
    with pytest.raises(InputError, match=r"mask\.json"):
        write_report(tmp_path)


def test_malformed_files_leave_an_old_report_alone(make: Any, tmp_path: Path) -> None:
    make.result().save(tmp_path)
    write_report(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.[hp]*")}
    (tmp_path / "study.json").write_text('{"question": 3}')
    with pytest.raises(InputError, match=r"study\.json"):
        write_report(tmp_path)
    (tmp_path / "study.json").unlink()
    (tmp_path / "mask.safetensors").unlink()
    with pytest.raises(InputError, match=r"mask\.safetensors"):
        write_report(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.[hp]*")} == before


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"chosen": ["a9.h0"]}, "a9.h0"),
        ({"chosen": ["a1.h8"]}, "a1.h8"),
        ({"pruned": ["somewhere"]}, "somewhere"),
        ({"jaccard": [[1.0]]}, "jaccard"),
        ({"joint": {"chosen": 1.0}}, "complement"),
        ({"values": {"head": torch.ones(2, 3, 4)}}, r"\[2, 3, 4\]"),
    ],
)
def test_parts_of_different_runs_are_refused(make: Any, changed: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        mask_page(make.result().model_copy(update=changed))


def test_examples_that_do_not_fit_their_tokens_are_refused(make: Any) -> None:
    example: PromptExample = make.study().examples[0].model_copy(update={"position": 19})
    with pytest.raises(InputError, match=r"examples\[0\]\.position.*19 tokens, found 19"):
        mask_page(make.result(), make.study(examples=[example]))
    short = AttentionExample(head="a1.h0", tokens=["a", "b"], query=1, weights=[1.0])
    with pytest.raises(InputError, match=r"attention\[0\]\.weights: expected 2"):
        mask_page(make.result(), make.study(attention=[short]))
    empty = AttentionExample(head="a1.h0", tokens=[], query=0, weights=[])
    with pytest.raises(InputError, match=r"attention\[0\]\.query"):
        mask_page(make.result(), make.study(attention=[empty]))


@pytest.mark.parametrize(
    ("value", "sign", "shown"),
    [
        (0.9766, False, "97.7"),
        (1.0, False, "100.0"),
        (0.0, True, "0.0"),
        (-0.0001, True, "0.0"),
        (-0.0001, False, "0.0"),
        (-0.12, True, "−12.0"),
        (0.31, True, "+31.0"),
        (None, False, "–"),
        (float("nan"), False, "–"),
    ],
)
def test_percent(value: float | None, sign: bool, shown: str) -> None:
    assert percent(value, sign) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(4.25, "4.2 s"), (59.99, "1 min 0 s"), (161.4, "2 min 41 s"), (7265.0, "2 h 1 min")],
)
def test_duration(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown
