"""Fields of messages, found in a template's rendering by rendering marks in their place.

A conversation is rendered a second time with a mark in the place of each text that an assistant wrote, and of the
message before. Between the marks stands what the template alone has written. Putting the texts back must give the
first rendering, character by character: then it is known where each of them stands.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal

Kind = Literal["thoughts", "content", "call", "before"]

_MARK = "zq9field"
# Templates take thoughts apart that stand in the content, so their tags must stay.
_THOUGHT_TAGS = re.compile(r"(</?think(?:ing)?>)")
_CHANGES: tuple[Callable[[str], str], ...] = (
    lambda text: text,
    str.strip,
    lambda text: text.strip("\n"),
    str.lstrip,
    lambda text: text.lstrip("\n"),
    str.rstrip,
    lambda text: text.rstrip("\n"),
)


def mark(number: int, prefix: str = _MARK) -> str:
    """The text that stands for a field."""
    return f"{prefix}{number}z"


def free_prefix(text: str) -> str:
    """What marks may begin with so that none stands in a text; the same for the same text."""
    if _MARK not in text:
        return _MARK
    return next(prefix for number in count(10) if (prefix := f"zq{number}field") not in text)


@dataclass(frozen=True, slots=True)
class Field:
    """A text in a message.

    Attributes:
        message: number of the message.
        kind: thoughts, content or call (a function's name) of an assistant; before = content of the message before.
        text: the text.
        is_thought: a part of a content that thoughts' tags close, which templates may leave out.
    """

    message: int
    kind: Kind
    text: str
    is_thought: bool = False


@dataclass(frozen=True, slots=True)
class Place:
    """Where a field stands in a rendering.

    Attributes:
        number: of the field.
        field: the field.
        start: its first character.
        end: exclusive.
        before: what the template wrote between the place before, or the start, and this one.
        previous: number of the field at the place before; None = this is the first.
        after: what the template wrote up to the next place, or the end.
    """

    number: int
    field: Field
    start: int
    end: int
    before: str
    previous: int | None
    after: str


@dataclass
class Masked:
    """A conversation with marks in it.

    Attributes:
        full: the messages before the assistant's have marks, too, and so have contents of nothing but blanks.
        messages: the messages, with marks.
        fields: what the marks stand for, by number.
        prefix: what the marks begin with.
    """

    full: bool
    messages: list[dict[str, Any]] = field(default_factory=list)
    fields: list[Field] = field(default_factory=list)
    prefix: str = _MARK

    def _mark(self, message: int, kind: Kind, text: str, even_blank: bool = False, is_thought: bool = False) -> str:
        if not text.strip() and not even_blank:
            return text
        self.fields.append(Field(message, kind, text, is_thought))
        return mark(len(self.fields) - 1, self.prefix)

    def add(self, message: Mapping[str, Any], thoughts: Sequence[str], is_before: bool) -> None:
        """Append a message.

        Args:
            message: with ``role`` and a text as ``content``.
            thoughts: names under which an assistant's thoughts stand.
            is_before: an assistant's message follows.
        """
        place = len(self.messages)
        masked = dict(message)
        self.messages.append(masked)
        if message["role"] != "assistant":
            if is_before and self.full:
                masked["content"] = self._mark(place, "before", message["content"], even_blank=True)
            return
        texts = {name: message[name] for name in thoughts if name in message}
        if texts:
            masked.update(dict.fromkeys(texts, self._mark(place, "thoughts", next(iter(texts.values())))))
        parts = _parts(message["content"])
        closed = max((number for number, part in enumerate(parts) if number % 2 and part.startswith("</")), default=0)
        even_blank = self.full and len(parts) == 1 and not message.get("tool_calls")
        masked["content"] = "".join(
            part if number % 2 else self._mark(place, "content", part, even_blank, number < closed)
            for number, part in enumerate(parts)
        )
        if calls := message.get("tool_calls"):
            masked["tool_calls"] = [
                {**call, "function": {**call["function"], "name": self._mark(place, "call", call["function"]["name"])}}
                for call in calls
            ]


def _parts(content: str) -> list[str]:
    """Texts and, at odd places, the tags of thoughts between them; the whole where there is nothing but tags."""
    parts = _THOUGHT_TAGS.split(content)
    return parts if any(part.strip() for part in parts[::2]) else [content]


def tags_before(content: str) -> str:
    """What stands before the first text of a content that begins with tags of thoughts; else nothing."""
    parts = _parts(content)
    first = next((number for number, part in enumerate(parts) if number % 2 == 0 and part.strip()), 0)
    return "".join(parts[:first])


def has_tags(content: str) -> bool:
    """Tags of thoughts stand in a content."""
    return _THOUGHT_TAGS.search(content) is not None


def masked(messages: Sequence[Mapping[str, Any]], thoughts: Sequence[str], full: bool, prefix: str = _MARK) -> Masked:
    """The conversation with marks.

    Args:
        messages: the messages as the template is given them.
        thoughts: names under which an assistant's thoughts stand.
        full: mark the messages before the assistant's, too, and contents of nothing but blanks. That says more, and
            fails where a template looks at these texts.
        prefix: what the marks begin with.
    """
    found = Masked(full, prefix=prefix)
    followed = [later["role"] == "assistant" for later in messages[1:]] + [False]
    for message, is_before in zip(messages, followed, strict=True):
        found.add(message, thoughts, is_before)
    return found


def marked(text: str, prefix: str = _MARK) -> tuple[list[str], list[int]]:
    """What stands between the marks of a rendering (one more than marks), and the marks' numbers."""
    parts = re.split(prefix + r"(\d+)z", text)
    return parts[::2], [int(number) for number in parts[1::2]]


def align(rendering: str, with_marks: str, fields: Sequence[Field], prefix: str = _MARK) -> list[Place] | None:
    """Where the fields stand in a rendering, in order; None where putting them back does not give it.

    Args:
        rendering: of the conversation.
        with_marks: the rendering of the masked one.
        fields: what the marks stand for.
        prefix: what the marks begin with.
    """
    if prefix in rendering:
        return None
    literals, numbers = marked(with_marks, prefix)
    places: list[Place] = []
    if not rendering.startswith(literals[0]):
        return None
    end = len(literals[0])
    for index, number in enumerate(numbers):
        after = literals[index + 1]
        start = end
        for text in _shown(fields[number].text):
            end = start + len(text)
            if rendering.startswith(text, start) and rendering.startswith(after, end):
                break
        else:
            return None
        previous = numbers[index - 1] if index else None
        places.append(Place(number, fields[number], start, end, literals[index], previous, after))
        end += len(after)
    return places if end == len(rendering) else None


def _shown(text: str) -> Iterator[str]:
    """What templates make of a text: themselves or without blanks at the ends, plain or inside a JSON string."""
    for change in _CHANGES:
        yield change(text)
    for ascii_only in (False, True):
        yield json.dumps(text, ensure_ascii=ascii_only)[1:-1]
        yield json.dumps(text.strip(), ensure_ascii=ascii_only)[1:-1]
