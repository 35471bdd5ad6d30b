from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_job.data.batches import IGNORED
from sft_job.preview.rows import PreviewRow
from sft_job.preview.text import TokenTexts, one_line, visible


def row(ids: list[int], trained: list[bool] | None = None) -> PreviewRow:
    labels = [token if on else IGNORED for token, on in zip(ids, trained or [False] * len(ids), strict=True)]
    return PreviewRow(Path("a.parquet"), 0, 0, np.array(ids, dtype=np.int64), np.arange(len(ids)), np.array(labels))


def shown(texts: TokenTexts, ids: list[int], trained: list[bool] | None = None) -> str:
    return "".join(piece.text for piece in texts.pieces(row(ids, trained)))


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer[1](text, add_special_tokens=False)["input_ids"]


@settings(max_examples=150)
@given(
    text=st.text(st.one_of(st.sampled_from(" \nab·é漢😀🇩א"), st.characters(codec="utf-8", categories=["L", "P", "N"])))
)
def test_pieces_are_the_text(tokenizer, texts, text: str) -> None:
    ids = encode(tokenizer, text)
    pieces = texts.pieces(row(ids))
    assert [piece.start for piece in pieces] == [0, *(piece.end for piece in pieces)][: len(pieces)]
    assert sum(piece.end - piece.start for piece in pieces) == len(ids)
    joined = "".join(piece.text for piece in pieces)
    assert joined.replace("⏎\n", "\n").replace("·", " ") == text.replace("·", " ")


def test_whitespace_is_visible_where_it_is_overlooked(tokenizer, texts) -> None:
    assert shown(texts, encode(tokenizer, "a b")) == "a b"
    assert shown(texts, encode(tokenizer, "a  b \n c")) == "a··b·⏎\n·c"
    assert shown(texts, encode(tokenizer, "a ")) == "a·"
    assert shown(texts, encode(tokenizer, "\tx\r\n")) == "⇥   x␍⏎\n"


def test_a_space_at_the_edge_of_what_is_trained(tokenizer, texts) -> None:
    ids = [*encode(tokenizer, "q:"), *encode(tokenizer, " yes"), 2]
    assert shown(texts, ids) == "q: yes<|im_end|>"
    inside = [False, False, *[True] * (len(ids) - 2)]
    assert shown(texts, ids, inside) == "q:·yes<|im_end|>"


def test_nothing_is_hidden() -> None:
    assert visible("a\u202eb\u200bc\ufeff\x1b[31m\x00\u2028\u00a0") == "a⟨U+202E⟩b⟨U+200B⟩c⟨U+FEFF⟩␛[31m␀⟨U+2028⟩⍽"
    assert visible("👨\u200d👩 é مرحبا") == "👨\u200d👩 é مرحبا"
    assert one_line("a\nb\udcff") == "a⏎b⟨U+DCFF⟩"


def test_special_tokens_and_their_look_alikes(tokenizer, texts) -> None:
    pieces = texts.pieces(row([1, *encode(tokenizer, "<|im_"), *encode(tokenizer, "end|>"), 2]))
    assert [piece.special for piece in pieces] == [True, *[False] * (len(pieces) - 2), True]
    assert "".join(piece.text for piece in pieces) == "<|im_start|><|im_end|><|im_end|>"


def test_a_character_cut_in_two(tokenizer, texts) -> None:
    ids = encode(tokenizer, "😀")
    assert len(ids) > 1
    whole = texts.pieces(row(ids))
    assert [piece.text for piece in whole] == ["😀"]
    half = texts.pieces(row(ids, [False] * (len(ids) - 1) + [True]))
    assert [piece.trained for piece in half] == [False] * (len(ids) - 1) + [True]
    assert sum(piece.end - piece.start for piece in texts.pieces(row(ids[1:]))) == len(ids) - 1
