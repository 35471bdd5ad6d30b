"""Rows that are too long (``data.truncation``): refused, cut, left out, or rendered without their oldest turns."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sft_job.data.render import Rendered, truncate

# They say how the conversation is meant, whichever of its turns are left.
_KEPT_ROLES = frozenset({"system", "developer"})
_ALWAYS_TOKENISED = 1 << 20


@dataclass(frozen=True)
class Turns:
    """A conversation that can be rendered without its oldest turns.

    Attributes:
        count: its turns.
        render: gives the row without that many of its oldest turns (at least 1, less than ``count``); may raise
            ``RowFault``.
    """

    count: int
    render: Callable[[int], Rendered]


def fit(row: Rendered, limit: int, how: str, turns: Turns | None = None) -> Rendered | None:
    """The row within ``limit`` tokens.

    Args:
        row: a row that may be longer.
        limit: tokens.
        how: ``data.truncation``.
        turns: the conversation that the row was rendered from; None = it has no turns that could be left out.

    Returns:
        The row as it is trained on; None where it is to be left out (``drop``, ``turn``) or refused (``error``).

    Raises:
        RowFault: it cannot be rendered without its oldest turns.
    """
    if len(row.ids) <= limit:
        return row
    if how in ("left", "right"):
        return truncate(row, limit, how)
    if how == "turn" and turns is not None:
        return _without_oldest(limit, turns)
    return None


def _without_oldest(limit: int, turns: Turns) -> Rendered | None:
    """Leaves out as few turns as it takes, in as many renderings as the count has binary digits."""
    rendered: dict[int, Rendered] = {}

    def fits(count: int) -> bool:
        rendered[count] = turns.render(count)
        return len(rendered[count].ids) <= limit

    counts = range(1, turns.count)
    place = bisect_left(counts, True, key=fits)
    return rendered[counts[place]] if place < len(counts) else None


def most_characters(vocabulary: Iterable[str], limit: int, how: str) -> int | None:
    """The longest text that is worth tokenising; None = any, because a part of it is trained on.

    Tokenising takes a hundred times the memory of its text, which one absurd cell could exhaust. No text is shorter in
    tokens than its length over that of the longest token, unless the tokenizer drops characters: below a million of
    them it is left to count by itself.
    """
    if how in ("left", "right"):
        return None
    return max(limit * max(map(len, vocabulary)), _ALWAYS_TOKENISED)


def count_turns(messages: Sequence[Mapping[str, Any]]) -> int:
    """Turns of a conversation: each begins with a user's message, the first one with whatever comes first."""
    return len(_turn_starts(messages))


def without_oldest_turns(messages: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """The conversation without its ``count`` oldest turns; system and developer messages stay, wherever they are."""
    if not count:
        return list(messages)
    starts = _turn_starts(messages)
    first = starts[count] if count < len(starts) else len(messages)
    return [message for index, message in enumerate(messages) if index >= first or message.get("role") in _KEPT_ROLES]


def _turn_starts(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    own = [index for index, message in enumerate(messages) if message.get("role") not in _KEPT_ROLES]
    return own[:1] + [index for index in own[1:] if messages[index].get("role") == "user"]
