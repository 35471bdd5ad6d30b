"""Rows of conversations, from parquet batches to tokens. Runs in the tokenising processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import pyarrow as pa

from sft_job.data.columns import Column, Unreadable
from sft_job.data.conversation import Conversation, read_conversations
from sft_job.data.faults import RowFault
from sft_job.data.fit import Turns, count_turns, without_oldest_turns
from sft_job.data.messages import MessageRenderer, Rejected
from sft_job.data.render import Rendered

# Characters rendered and tokenised at once.
_AT_ONCE = 1 << 20


class MessageRow(NamedTuple):
    """What became of a conversation.

    Attributes:
        number: of the row in its batch.
        row: its tokens, or why there are none.
        turns: the row without its oldest turns.
    """

    number: int
    row: Rendered | Rejected
    turns: Turns | None = None


def message_rows(
    renderer: MessageRenderer, batch: pa.RecordBatch, columns: Sequence[Column], train_on: str, most: int | None
) -> Iterator[MessageRow | tuple[int, Unreadable | int]]:
    """What becomes of each row, in order; for rows that are no conversations, why, or how many characters they have.

    Args:
        renderer: of conversations.
        batch: rows with the columns of messages, tools and thinking.
        columns: these columns.
        train_on: ``all`` or ``last``.
        most: rows with more characters are not rendered.
    """
    chunk: list[tuple[int, Conversation]] = []
    size = 0
    for number, found in enumerate(read_conversations(batch, columns, train_on)):
        if isinstance(found, Unreadable):
            yield number, found
            continue
        length = sum(len(message["content"]) for message in found.messages)
        if most is not None and length > most:
            yield number, length
            continue
        chunk.append((number, found))
        size += length
        if size >= _AT_ONCE:
            yield from _rendered(renderer, chunk)
            chunk, size = [], 0
    yield from _rendered(renderer, chunk)


def _rendered(renderer: MessageRenderer, chunk: Sequence[tuple[int, Conversation]]) -> Iterator[MessageRow]:
    rows = renderer.render([conversation for _, conversation in chunk])
    for (number, conversation), row in zip(chunk, rows, strict=True):
        turns = Turns(count_turns(conversation.messages), partial(_without_oldest, renderer, conversation))
        yield MessageRow(number, row, turns)


def _without_oldest(renderer: MessageRenderer, conversation: Conversation, count: int) -> Rendered:
    """The row without its oldest turns.

    Raises:
        RowFault: it cannot be rendered without them.
    """
    kept = without_oldest_turns(conversation.messages, count)
    flags = {id(message): flag for message, flag in zip(conversation.messages, conversation.train, strict=True)}
    shorter = replace(
        conversation,
        messages=[dict(message) for message in kept],
        train=tuple(flags[id(message)] for message in kept),
    )
    (row,) = renderer.render([shorter])
    if isinstance(row, Rejected):
        raise RowFault(row.fault, row.reason)
    return row
