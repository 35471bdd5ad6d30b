"""Token ids as text for people: what each token stands for, with everything visible that is easy to overlook."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sft_job.data.batches import IGNORED
from sft_job.preview.rows import PreviewRow

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
# A character of UTF-8 has at most 4 bytes, and a token may be as little as one of them.
_MOST_TOKENS_A_CHARACTER = 4
NEWLINE = "⏎"
_SPACE = "·"
_NAMED = {"\n": f"{NEWLINE}\n", "\t": "⇥   ", "\x7f": "␡", "\N{NO-BREAK SPACE}": "⍽"}
# They join characters into one (emoji, Indic scripts): shown as what they join.
_JOINERS = "\u200c\u200d"
_SPACES = re.compile(r" +")


@dataclass(frozen=True, slots=True)
class Piece:
    """A token, or a few that only together make a character.

    Attributes:
        start: its first token, counted in the row.
        end: behind its last token.
        text: what is shown; a line break stands as a sign and a real line break.
        trained: whether the loss counts it.
        special: whether it is one of the tokenizer's special or added tokens.
    """

    start: int
    end: int
    text: str
    trained: bool
    special: bool


class TokenTexts:
    """The tokenizer's decoder, token by token."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
        self._known: dict[tuple[int | None, int], str] = {}

    def text(self, ids: Sequence[int]) -> str:
        """A whole row as one text, special tokens included."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def pieces(self, row: PreviewRow) -> list[Piece]:
        """The row, piece by piece, in order and without gaps."""
        ids, trained = row.input_ids.tolist(), (row.labels != IGNORED).tolist()
        spans: list[tuple[int, int, str]] = []
        start = 0
        while start < len(ids):
            end, text = self._next(ids, trained, start)
            spans.append((start, end, text))
            start = end
        specials = [ids[start] in self._special for start, _, _ in spans]
        texts = _with_spaces([text for *_, text in spans], [trained[start] for start, *_ in spans], specials)
        return [
            Piece(start, end, text, trained[start], special)
            for (start, end, _), text, special in zip(spans, texts, specials, strict=True)
        ]

    def _next(self, ids: list[int], trained: list[bool], start: int) -> tuple[int, str]:
        """End and text of the piece that begins at ``start``."""
        before = ids[start - 1] if start else None
        known = self._known.get((before, ids[start]))
        if known is not None:
            return start + 1, known
        first = text = self._decoded(before, ids[start : start + 1])
        for end in range(start + 1, min(start + _MOST_TOKENS_A_CHARACTER, len(ids)) + 1):
            if end > start + 1:
                if trained[end - 1] != trained[start] or ids[end - 1] in self._special:
                    break
                text = self._decoded(before, ids[start:end])
            if _UNFINISHED not in text:
                if end == start + 1:
                    self._known[before, ids[start]] = text
                return end, text
        return start + 1, first

    def _decoded(self, before: int | None, ids: list[int]) -> str:
        """What tokens add to the one before them: some decoders drop the space that a text begins with."""
        if before is None:
            return self.text(ids)
        alone, together = self.text([before]), self.text([before, *ids])
        if _UNFINISHED in alone or not together.startswith(alone):
            return self.text(ids)
        return together[len(alone) :]


def visible(text: str) -> str:
    """The text with control and formatting characters as signs; a line break stays one, behind its sign."""
    return "".join(_shown(character) for character in text) if not text.isascii() or not text.isprintable() else text


def one_line(text: str) -> str:
    """Like ``visible``, without line breaks: for names of files."""
    return visible(text).replace("\n", "")


def _shown(character: str) -> str:
    if character in _NAMED:
        return _NAMED[character]
    if character < " ":
        return chr(0x2400 + ord(character))  # Unicode's pictures of control characters, in the same order
    if character != " " and character not in _JOINERS and _is_invisible(character):
        return f"⟨U+{ord(character):04X}⟩"
    return character


def _is_invisible(character: str) -> bool:
    return unicodedata.category(character) in {"Cc", "Cf", "Co", "Cs", "Zl", "Zp", "Zs"}


def _with_spaces(texts: list[str], trained: list[bool], specials: list[bool]) -> list[str]:
    """Spaces become dots where they are easily overlooked: several in a row, at line ends and where a part ends."""
    shown: list[str] = []
    for place, text in enumerate(texts):
        previous = _neighbour(texts, trained, specials, place, -1)
        following = _neighbour(texts, trained, specials, place, +1)
        padded = f"{previous}{text}{following}"
        dotted = _SPACES.sub(lambda found, padded=padded: _dots(found, padded), padded)
        shown.append(visible(dotted[len(previous) : len(dotted) - len(following)]))
    return shown


def _neighbour(texts: list[str], trained: list[bool], specials: list[bool], place: int, step: int) -> str:
    """The character next to a piece; a line break where another part of the row begins."""
    other = place + step
    if not 0 <= other < len(texts) or trained[other] != trained[place] or specials[other] or specials[place]:
        return "\n"
    return (texts[other][-1:] if step < 0 else texts[other][:1]) or "x"


def _dots(found: re.Match[str], padded: str) -> str:
    first, last = found.span()
    lonely = last - first == 1 and first > 0 and last < len(padded)
    inside = lonely and not padded[first - 1].isspace() and not padded[last].isspace()
    return " " if inside else _SPACE * (last - first)
