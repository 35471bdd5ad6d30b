from __future__ import annotations

from typing import Any

import pytest

from sft_job.data.stretches import TokenSpans


class Pieces:
    """An encoder whose tokens are given; 9 is a control token."""

    def __init__(self, tokens: dict[str, list[tuple[int, int, int]]]) -> None:
        self.control_ids = {"E": 9}
        self._tokens = tokens

    def encode_with_offsets(self, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]] | None]]:
        found = [self._tokens[text] for text in texts]
        return [([token for token, *_ in each], [(start, end) for _, start, end in each]) for each in found]


def encoded(tokens: dict[str, list[tuple[int, int, int]]], text: str, *spans: tuple[int, int]) -> Any:
    names = {1: "a", 2: "\n", 3: "b", 4: "\n\n", 5: " b", 9: "E", 7: "  "}
    subject = TokenSpans(Pieces(tokens), lambda ids: "".join(names[token] for token in ids))  # type: ignore[arg-type]
    return subject.encode([text], [spans])[0]


def test_stretches_between_tokens() -> None:
    whole = {"a\nbE\n": [(1, 0, 1), (2, 1, 2), (3, 2, 3), (9, 3, 4), (2, 4, 5)]}
    assert encoded(whole, "a\nbE\n", (2, 4)) == ([1, 2, 3, 9, 2], ((2, 4),))
    assert encoded(whole, "a\nbE\n", (2, 3), (3, 4)) == ([1, 2, 3, 9, 2], ((2, 4),))
    assert encoded(whole, "a\nbE\n") == ([1, 2, 3, 9, 2], ())


def test_a_token_across_the_beginning_is_cut() -> None:
    tokens = {
        "a\n\nbE": [(1, 0, 1), (4, 1, 3), (3, 3, 4), (9, 4, 5)],
        "a\n": [(1, 0, 1), (2, 1, 2)],
        "\nbE": [(2, 0, 1), (3, 1, 2), (9, 2, 3)],
    }
    assert encoded(tokens, "a\n\nbE", (2, 5)) == ([1, 2, 2, 3, 9], ((2, 5),))


def test_a_blank_that_no_token_claims_is_cut() -> None:
    tokens = {"a bE": [(1, 0, 1), (5, 2, 3), (9, 3, 4)], "a": [(1, 0, 1)], " bE": [(7, 0, 1), (3, 1, 2), (9, 2, 3)]}
    assert encoded(tokens, "a bE", (1, 4)) is None  # its tokens by themselves give another text
    tokens[" bE"] = [(5, 0, 2), (9, 2, 3)]
    assert encoded(tokens, "a bE", (1, 4)) == ([1, 5, 9], ((1, 3),))


def test_a_control_token_may_take_blanks_along() -> None:
    tokens = {"bE\nb": [(3, 0, 1), (9, 1, 3), (3, 3, 4)]}
    assert encoded(tokens, "bE\nb", (0, 2)) == ([3, 9, 3], ((0, 2),))


@pytest.mark.parametrize("other", [(3, 1, 3), (1, 1, 3)])
def test_other_tokens_may_not(other: tuple[int, int, int]) -> None:
    tokens = {"bE\nb": [(3, 0, 1), other, (3, 3, 4)], "bE": [(3, 0, 1), (9, 1, 2)], "\nb": [(2, 0, 1), (3, 1, 2)]}
    assert encoded(tokens, "bE\nb", (0, 2)) is None
