"""Rows of conversations, from parquet batches to tokens. Runs in the tokenising processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa

from sft_job.data.chat import TemplateFailure
from sft_job.data.columns import Column, Unreadable
from sft_job.data.conversation import Conversation, read_conversations
from sft_job.data.faults import Fault, RowFault
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
        rewritten: as ``Conversation.rewritten``.
    """

    number: int
    row: Rendered | Rejected
    turns: Turns | None = None
    rewritten: str = ""


def message_rows(
    renderer: MessageRenderer, batch: pa.RecordBatch, columns: Sequence[Column], train_on: str, most: int | None
) -> Iterator[MessageRow | tuple[int, Unreadable | int]]:
    """What becomes of each row, in order; for rows that are no conversations, why, or how many characters they have.

    Args:
        renderer: of conversations.
        batch: rows with the columns of messages, tools and thinking.
        columns: these columns.
        train_on: ``all`` or ``last``.
        most: rows that are rendered with more characters are not tokenised.
    """
    chunk: list[tuple[int, Conversation]] = []
    size = 0
    for number, found in enumerate(read_conversations(batch, columns, train_on)):
        if isinstance(found, Unreadable):
            yield number, found
            continue
        length = characters([found.messages, found.tools])
        if most is not None and length > most and (rendered := _rendered_characters(renderer, found)) > most:
            yield number, rendered
            continue
        chunk.append((number, found))
        size += length
        if size >= _AT_ONCE:
            yield from _rendered(renderer, chunk)
            chunk, size = [], 0
    yield from _rendered(renderer, chunk)


def _rendered(renderer: MessageRenderer, chunk: Sequence[tuple[int, Conversation]]) -> Iterator[MessageRow]:
    try:
        rows = renderer.render([conversation for _, conversation in chunk])
    except RecursionError as error:
        if len(chunk) > 1:
            for one in chunk:
                yield from _rendered(renderer, [one])
        else:
            for number, _ in chunk:
                yield MessageRow(number, Rejected(Fault.NOT_RENDERED, f"the row is nested too deeply: {error}"))
        return
    for (number, conversation), row in zip(chunk, rows, strict=True):
        turns = Turns(count_turns(conversation.messages), partial(_without_oldest, renderer, conversation))
        yield MessageRow(number, row, turns, conversation.rewritten)


def characters(value: Any) -> int:
    """Characters of all texts in nested lists and mappings, keys aside."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(characters(item) for item in value.values())
    return sum(characters(item) for item in value) if isinstance(value, list | tuple) else 0


def _rendered_characters(renderer: MessageRenderer, row: Conversation) -> int:
    """Characters of what the template makes of a huge row: it may leave out most of it, old thoughts for example."""
    variables = {} if row.enable_thinking is None else {"enable_thinking": row.enable_thinking}
    try:
        (text,) = renderer.template.render([row.messages], tools=[row.tools], kwargs=variables)
    except TemplateFailure:  # told of with the reason when it is rendered as a row
        return 0
    return len(text)


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
    try:
        (row,) = renderer.render([shorter])
    except RecursionError as error:
        raise RowFault(Fault.NOT_RENDERED, f"the row is nested too deeply: {error}") from error
    if isinstance(row, Rejected):
        raise RowFault(row.fault, row.reason)
    return row
