from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from sft_job.data.batches import IGNORED
from sft_job.data.cache import TokenCache
from sft_job.preview import html
from sft_job.preview.html import write_page
from sft_job.preview.report import set_report
from sft_job.preview.rows import PreviewRow
from sft_job.preview.text import Piece, TokenTexts
from tests.unit.preview.conftest import MakeStream

_VOID = {"meta", "input", "link", "br", "img", "rect", "line"}


class Page(HTMLParser):
    """Tags, attributes and scripts of a page; every tag must be closed."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] == ["script"]:
            self.scripts.append(data)
        else:
            self.text += data


@pytest.fixture
def page(stream: MakeStream, cache: TokenCache, texts: TokenTexts, tmp_path: Path):
    def make(count: int = 1000, **settings: int) -> tuple[str, list]:
        subject = stream(**settings)
        chosen = subject.first_rows(1, count)
        path = tmp_path / "page.html"
        write_page(path, chosen, subject.plan(1), subject.total_steps, [set_report("train", cache)], texts)
        return path.read_text(encoding="utf-8"), chosen

    return make


def test_nothing_is_fetched_and_nothing_of_a_row_is_markup(page) -> None:
    text, _ = page(world=2, ulysses=2)
    parsed = Page(text)
    assert parsed.tags.count("script") == 2
    assert not {"img", "link", "iframe", "textarea", "base", "object"} & set(parsed.tags)
    names = dict.fromkeys(name for name, _ in parsed.attributes)
    assert "src" not in names
    assert not [name for name in names if name.startswith("on")]
    assert all((value or "").startswith("#") for name, value in parsed.attributes if name in ("href", "action"))
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttp|innerHTML|document\.write|eval\(", text)
    assert "alert(1)" not in text.replace(max(parsed.scripts, key=len), "")


class Hostile:
    """A tokenizer with markup in a token."""

    def pieces(self, row: PreviewRow) -> list[Piece]:
        return [Piece(0, len(row.input_ids), "</script><img src=x onerror=alert(1)><!--", False, False)]


def test_a_token_and_a_name_that_are_markup(stream: MakeStream, cache: TokenCache, tmp_path: Path) -> None:
    subject = stream()
    pack, _ = subject.first_rows(1, 1)[0]
    name = Path("</style></title><img src=y onerror=alert(2)>\"'.parquet")
    rows = tuple(replace(row, file=name) for row in pack.rows)
    report = replace(set_report("<img src=z>", cache), name="<img src=z>", notes=("<img src=n>",))
    report = replace(report, files=tuple({**file, "path": str(name)} for file in cache.report["files"]))
    texts = cast(TokenTexts, Hostile())
    write_page(tmp_path / "a.html", [(replace(pack, rows=rows), rows)], subject.plan(1), 1, [report], texts)
    parsed = Page((tmp_path / "a.html").read_text(encoding="utf-8"))
    assert "img" not in parsed.tags
    assert parsed.tags.count("script") == 2
    assert "<img src=y onerror=alert(2)>" in parsed.text
    assert "<img src=n>" in parsed.text


def test_the_page_holds_what_is_trained(page) -> None:
    text, chosen = page(world=4, ulysses=2)
    data = json.loads(next(script for script in Page(text).scripts if script.startswith("[")))
    rows = [(pack, row) for pack, _ in chosen for row in pack.rows]
    assert len(data) == len(rows)
    for shown, (pack, row) in zip(data, rows, strict=True):
        labels = np.full(len(row.input_ids), IGNORED)
        for start, count in shown["spans"]:
            labels[start : start + count] = row.input_ids[start : start + count]
        assert shown["ids"] == row.input_ids.tolist()
        assert labels.tolist() == row.labels.tolist()
        assert len(shown["pieces"]) + sum(size - 1 for _, size in shown["long"]) == len(shown["ids"])
        assert (shown["start"], shown["share"], shown["rank"]) == (row.start, pack.share, pack.slot.ranks[0])
        assert shown["position"] == 0


def test_neighbours_beyond_the_budget_are_bars(page, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html, "_MOST_NEIGHBOUR_TOKENS", 50)
    text, chosen = page(count=1, batch=23, micro=23)
    parsed = Page(text)
    data = json.loads(next(script for script in parsed.scripts if script.startswith("[")))
    (pack, asked), *_ = chosen
    assert data[0]["ids"] == asked[0].input_ids.tolist()
    assert data.count(None) > len(pack.rows) // 2
    assert parsed.text.count("a larger --rows shows them") == data.count(None)


def test_whole_step_legend_and_report(page) -> None:
    text, _ = page(world=2, batch=9)
    parsed = Page(text)
    for part in (
        "not trained",
        "special token",
        "Rows by their length in tokens",
        "odd.parquet",
        "rank 1",
        "duplicates",
    ):
        assert part in parsed.text
    assert ("class", "bar") in parsed.attributes
