"""The page: one file, no scripts, nothing from outside unescaped, every cap told."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from PIL import Image

from distill.evaluation.results import Evaluation
from distill.report import html

HOSTILE = "<script>alert('x')</script>\"&"
VOID = {"meta", "img", "line", "circle", "rect", "polygon"}


class Page(HTMLParser):
    """Tags, attributes and texts of a page; every tag must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def pictures(self) -> list[np.ndarray]:
        prefix = "data:image/png;base64,"
        sources = [value or "" for tag, name, value in self.attributes if (tag, name) == ("img", "src")]
        assert all(source.startswith(prefix) for source in sources)
        return [
            np.asarray(Image.open(io.BytesIO(base64.b64decode(source[len(prefix) :])))) for source in sources
        ]


def render(evaluation: Evaluation, **changes: Any) -> str:
    arguments: dict[str, Any] = {
        "images": np.random.default_rng(0).integers(0, 256, (6, 8, 8, 1), dtype=np.uint8),
        "labels": np.array([0, 0, 1, 1, 2, 2]),
        "classes": ["zero", "one", "two"],
        "soft": None,
        "title": "digits: soft_label",
    }
    return html.render(evaluation, **{**arguments, **changes})


def test_page_holds_everything(evaluation: Evaluation) -> None:
    page = Page(render(evaluation))
    for expected in (
        "digits: soft_label",
        "reach 83.0%\xa0±\xa02.5 where",
        "set (soft) - random (hard)",
        "excludes 0",
        "6 images of 8 x 8 pixels, grey.",
        "9.00 kB",
        "1.50 kB an image",
        "1,234.5 s",
        "ipc: 10",
        "versions.torch",
        "1437 of 1797 images train",
    ):
        assert expected in page.text
    assert len(page.pictures()) == 3
    assert page.pictures()[0].shape == (64, 130, 2)  # 8 x 8 pixels, eightfold, two a row


@pytest.mark.parametrize(
    ("on", "told"),
    [("data", ""), ("target", " on the target"), ("transfer", " by linear probes on the target")],
)
def test_what_was_measured_is_told_everywhere(evaluation: Evaluation, on: str, told: str) -> None:
    recipe = {**evaluation.recipe, "evaluate": {"on": on}}
    text = render(replace(evaluation, recipe=recipe))
    assert re.findall("<h2>(.*?)</h2>", text)[:2] == [
        f"Test accuracy{told}",
        f"Differences in percentage points{told}",
    ]
    assert f">Test accuracy{told}</text>" in text
    assert f"\xa02.5{told} where" in re.findall("<h1>(.*?)</h1>", text)[0]


def test_the_caption_says_why_a_bar_is_missing(evaluation: Evaluation) -> None:
    wide = replace(evaluation.results[0], accuracies=(0.361, 0.593))
    page = Page(render(replace(evaluation, results=(wide, *evaluation.results[1:]))))
    assert "last epoch. Too few seeds for some intervals" in page.text
    assert "Too few seeds" not in Page(render(evaluation)).text


def test_page_loads_and_runs_nothing(evaluation: Evaluation) -> None:
    text = render(evaluation, soft=np.full((6, 3), 1 / 3))
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on") or name == "href"]
    assert not re.search(r"https?:|url\(|@import|javascript:", text)
    assert "default-src 'none'" in text


def test_everything_from_outside_is_escaped(evaluation: Evaluation) -> None:
    hostile = replace(
        evaluation,
        results=tuple(replace(r, student=HOSTILE) for r in evaluation.results),
        paired=tuple(replace(p, student=HOSTILE) for p in evaluation.paired),
        cost={HOSTILE: evaluation.cost["data"]},
        recipe={HOSTILE: HOSTILE},
        environment={HOSTILE: {HOSTILE: HOSTILE}},
        notes=(HOSTILE,),
    )
    text = render(hostile, classes=[HOSTILE] * 3, soft=np.full((6, 3), 1 / 3), title=HOSTILE)
    assert "<script" not in text
    page = Page(text)
    assert "script" not in page.tags
    assert page.text.count(HOSTILE) >= 10, "shown as it is, in every place"
    alts = [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")]
    assert alts[0] == f"2 images of {HOSTILE}"


def test_soft_labels_show_the_most_probable_classes(evaluation: Evaluation) -> None:
    soft = np.tile(np.array([0.05, 0.3, 0.65]), (6, 1))
    text = render(evaluation, soft=soft)
    shares = re.findall(r'<span class="name">(\w+)</span><span class="share">([\d.]+%)</span>', text)
    assert shares[:3] == [("two", "65.0%"), ("one", "30.0%"), ("zero", "5.0%")]
    assert len(shares) == 9  # the first image of each of 3 classes
    assert "Soft labels" not in Page(render(evaluation)).text


def test_caps_are_told(evaluation: Evaluation) -> None:
    labels = np.repeat(np.arange(60), 10)
    images = np.zeros((600, 2, 2, 3), np.uint8)
    page = Page(render(evaluation, images=images, labels=labels, classes=[f"c{k}" for k in range(60)]))
    assert "the first 50 of 60 classes are shown" in page.text
    assert "the first 8 of up to 10 images a class are shown" in page.text
    assert len(page.pictures()) == 50
    assert page.pictures()[0].shape[1] == 8 * 64 + 7 * 2


def test_classes_without_images_are_counted(evaluation: Evaluation) -> None:
    page = Page(render(evaluation, classes=["zero", "one", "two", "three", "four"]))
    assert "6 images of 8 x 8 pixels, grey; 2 of 5 classes have none." in page.text


def test_small_set_is_shown_whole_and_says_no_cap(evaluation: Evaluation) -> None:
    assert "shown" not in Page(render(evaluation)).text


def test_large_images_become_thumbnails(evaluation: Evaluation) -> None:
    page = Page(render(evaluation, images=np.zeros((6, 200, 100, 3), np.uint8)))
    assert page.pictures()[0].shape == (64, 2 * 32 + 2, 4)


def test_empty_parts_are_left_out(evaluation: Evaluation) -> None:
    bare = replace(evaluation, results=(), paired=(), cost={}, notes=())
    headings = re.findall(r"<h2>(.*?)</h2>", render(bare))
    assert headings == ["Images", "Size"]


@pytest.mark.parametrize("classes", [1, 2])
def test_few_classes(evaluation: Evaluation, classes: int) -> None:
    names, labels = ["a", "b"][:classes], np.arange(6) % classes
    page = Page(render(evaluation, labels=labels, classes=names, soft=np.full((6, classes), 1 / classes)))
    assert f"The {classes} most probable" in page.text


def test_same_input_same_page(evaluation: Evaluation) -> None:
    assert render(evaluation) == render(evaluation)
