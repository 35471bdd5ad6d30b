"""Trained stretches of text become trained stretches of tokens."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Sequence
from itertools import pairwise

from sft_job.data.encode import Encoder, Offsets

Span = tuple[int, int]


class TokenSpans:
    """Encodes renderings so that trained stretches begin and end between tokens.

    A rendering is encoded whole. Where a stretch begins inside a token (a header's line break and the answer's first
    one are one token, say), or next to a blank that no token claims, the text before and the text behind are encoded
    by themselves: so a model meets them, which is given the one and writes the other.
    """

    def __init__(self, encoder: Encoder, decode: Callable[[list[int]], str]) -> None:
        """Take the tokenizer's two directions.

        Args:
            encoder: makes ids of text.
            decode: makes text of ids, special tokens included.
        """
        self._encoder = encoder
        self._decode = decode
        self._controls: Collection[int] = frozenset(encoder.control_ids.values())

    def encode(
        self, texts: Sequence[str], spans: Sequence[Sequence[Span]]
    ) -> list[tuple[list[int], tuple[Span, ...]] | None]:
        """Ids and trained stretches of tokens for each text; None where the text has no tokens that end there.

        Args:
            texts: renderings.
            spans: for each of them its trained characters, in order, ends exclusive.
        """
        found: list[tuple[list[int], tuple[Span, ...]] | None] = []
        for text, of_text, (ids, offsets) in zip(texts, spans, self._encoder.encode_with_offsets(texts), strict=True):
            wanted = [place for span in of_text for place in span]
            places = [self._place(place, number % 2 == 1, text, ids, offsets) for number, place in enumerate(wanted)]
            if None in places:
                cuts = [place for place, token in zip(wanted, places, strict=True) if token is None]
                found.append(self._cut(text, wanted, cuts, ids))
            else:
                found.append((ids, _pairs(places)))
        return found

    def _place(self, place: int, is_end: bool, text: str, ids: list[int], offsets: Offsets | None) -> int | None:
        """The number of the first token behind a place in the text; None where that is not certain."""
        if place in (0, len(text)):
            return len(ids) if place else 0
        if offsets is None:
            return None
        index = bisect_right(offsets, place, key=lambda offset: offset[1])
        before = index > 0 and offsets[index - 1][1] == place
        if before and (ids[index - 1] in self._controls or index == len(ids) or offsets[index][0] == place):
            return index
        # A token that ends a turn may take the blanks behind it along.
        if is_end and index < len(ids) and offsets[index][0] < place and ids[index] in self._controls:
            return index + 1 if text[place : offsets[index][1]].isspace() else None
        return None

    def _cut(
        self, text: str, wanted: list[int], cuts: list[int], whole: list[int]
    ) -> tuple[list[int], tuple[Span, ...]] | None:
        """The text encoded in pieces, cut at ``cuts``; if that does not say more, at all wanted places."""
        for places in (cuts, wanted):
            edges = sorted({0, *places, len(text)})
            pieces = [text[start:end] for start, end in pairwise(edges)]
            ids: list[int] = []
            offsets: Offsets | None = []
            starts = {0: 0}
            for (start, end), (part, of_part) in zip(
                pairwise(edges), self._encoder.encode_with_offsets(pieces), strict=True
            ):
                ids += part
                starts[end] = len(ids)
                offsets = None if offsets is None or of_part is None else offsets
                if offsets is not None:
                    offsets += [(start + first, start + last) for first, last in of_part or ()]
            found = [
                starts[place] if place in starts else self._place(place, number % 2 == 1, text, ids, offsets)
                for number, place in enumerate(wanted)
            ]
            # The pieces must stand for the same text as the whole: some tokenizers put a blank before each.
            if None not in found and self._decode(ids) == self._decode(whole):
                return ids, _pairs(found)
        return None


def _pairs(places: Sequence[int | None]) -> tuple[Span, ...]:
    """Stretches of tokens, without empty ones, neighbours joined."""
    joined: list[Span] = []
    for start, end in zip(places[::2], places[1::2], strict=True):
        assert start is not None
        assert end is not None
        if end <= start:
            continue
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return tuple(joined)
