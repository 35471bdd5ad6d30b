"""Which characters of a template's rendering are trained, proved turn by turn.

Trained is what the template shows of an assistant's thoughts, content and tool calls, with all that it writes between
them, from where a generation prompt would end to the token that ends the turn, that token included. Role headers,
what a generation prompt ends with, and empty blocks of thoughts that the template makes are not.

Three ways to prove where a turn stands, the first that succeeds counts:

1. The template marks it with ``{% generation %}``. What is marked is cut to the definition above.
2. The rendering with the turn's texts replaced by marks gives the whole one when they are put back (``fields.py``).
   One more rendering does so for all turns of a row.
3. The rendering up to the turn with a generation prompt, and the one including it, are both beginnings of the whole.

Where none does, there is a reason instead of a span.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from sft_job.data.chat import ChatTemplate
from sft_job.data.fields import Masked, Place, has_tags, tags_before
from sft_job.data.prompts import Chat, Prompts
from sft_job.data.turns import Turns, after_empty_thoughts, has_empty_thoughts

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Located:
    """Where the fields of a conversation stand in its rendering.

    Attributes:
        masked: the conversation with marks.
        places: of the marks' fields.
    """

    masked: Masked
    places: list[Place]


class Unproved(Exception):
    """A turn that none of the three ways proves; the text says which."""


class SpanFinder:
    """Finds the trained characters of renderings."""

    def __init__(self, template: ChatTemplate, turns: Turns) -> None:
        """Begin with nothing but the template's frame of turns."""
        self._turns = turns
        self._prompts = Prompts(template, turns)

    def find(
        self, chat: Chat, rendering: str, fields: Located | None, blocks: Sequence[Span] | None = None
    ) -> list[Span]:
        """The trained characters, in order: ``(start, end)``, end exclusive.

        Args:
            chat: the conversation.
            rendering: what the template makes of it.
            fields: where its fields stand; None where that is not proved.
            blocks: the template's ``{% generation %}`` blocks; None where it has none.

        Raises:
            Unproved: a turn's place is not certain, or a part of it is not shown.
        """
        if fields and (lost := _lost(chat, fields)):
            raise Unproved(lost)
        located = {number: self._located(chat, number, rendering, fields) for number in chat.trained} if fields else {}
        if blocks is not None:
            marks = self._marked(chat, rendering, fields, located, blocks)
            if marks is not None:
                return marks
        spans = []
        for number in chat.trained:
            span = located.get(number) or self._between_prefixes(chat, number, rendering)
            if span is None:
                raise Unproved(f"messages[{number}]: {_reason(number, fields, blocks is not None)}")
            spans.append(span)
        if any(later[0] < earlier[1] for earlier, later in pairwise(spans)):
            raise Unproved("turns overlap in the template's rendering")
        return spans

    # Replaced texts

    def _located(self, chat: Chat, number: int, rendering: str, fields: Located) -> Span | None:
        places = fields.places
        own = [place for place in places if place.field.message == number]
        if not own:
            return None
        # A function's name may stand once more in the tool's answer, a text only once.
        firsts = list({place.number: place for place in reversed(own)}.values())
        if any(place.field.kind != "call" for place in own if place not in firsts):
            return None
        first, last = min(firsts, key=lambda place: place.start), max(firsts, key=lambda place: place.start)
        if any(place.field.message != number for place in places if first.start <= place.start <= last.start):
            return None
        of_call = last.field.kind == "call"
        # A content of nothing but blanks may stand unmarked behind the thoughts.
        if last.field.kind == "thoughts" or (of_call and self._names_a_stop(chat.messages[number])):
            return None
        if not fields.masked.full and not of_call and not chat.messages[number]["content"].strip():
            return None
        prompt = self._prompts.length(chat, number, first, fields.masked)
        end = self._turns.end(last.after, of_call)
        if prompt is None or end is None:
            return None
        length: int | None = prompt[0]
        if first.field.kind != "thoughts":
            length = after_empty_thoughts(first.before, prompt[0], tags_before(chat.messages[number]["content"]))
        if length is None:
            return None
        start = first.start - len(first.before) + length
        if prompt[1] and length == prompt[0] and rendering.startswith(prompt[1], start):
            start += len(prompt[1])
        return start, last.end + end

    def _names_a_stop(self, message: Mapping[str, Any]) -> bool:
        """A call's arguments hold a token that ends turns, where control tokens are allowed in texts."""
        return any(stop in str(message["tool_calls"]) for stop in self._turns.stops)

    # Generation blocks

    def _marked(
        self,
        chat: Chat,
        rendering: str,
        fields: Located | None,
        located: Mapping[int, Span | None],
        blocks: Sequence[Span],
    ) -> list[Span] | None:
        """The blocks, cut to the turns that they belong to; None where one of them belongs to none."""
        turns = {number: span for number, span in located.items() if span}
        if fields is None or len(turns) < len(chat.trained):
            return self._marked_alone(chat, rendering, blocks)
        places = fields.places
        assistants = {number for number, message in enumerate(chat.messages) if message["role"] == "assistant"}
        spans: list[Span] = []
        for start, end in blocks:
            within = {
                place.field.message
                for place in places
                if (start < place.end and place.start < end) or (start <= place.start and place.end <= end)
            }
            if len(within) > 1 or not within <= assistants:
                return None
            if not within:
                continue
            number = within.pop()
            if number not in turns:  # a turn that is not trained
                continue
            first, last = turns[number]
            fields_end = max(
                place.end for place in places if place.field.message == number and first <= place.start < last
            )
            spans.append((max(start, first), last if end >= fields_end else min(end, last)))
        held = {end for _, end in spans}
        for first, last in turns.values():
            if last not in held:  # the block does not hold the turn to its end, or there is none
                spans = [span for span in spans if span[1] <= first or span[0] >= last]
                spans.append((first, last))
        return sorted(spans)

    def _marked_alone(self, chat: Chat, rendering: str, blocks: Sequence[Span]) -> list[Span] | None:
        """The blocks by themselves, one for each of the assistant's turns."""
        numbers = [number for number, message in enumerate(chat.messages) if message["role"] == "assistant"]
        if len(numbers) != len(blocks):
            return None
        header = self._turns.generation_prompt
        spans: list[Span] = []
        for number, (start, end) in zip(numbers, blocks, strict=True):
            message = chat.messages[number]
            body = rendering[start:end]
            if header and body.startswith(header):
                start += len(header)
            elif not rendering.endswith(header, 0, start):
                return None
            if message["content"].strip() not in body:
                return None
            begin = self._without_empty_thoughts(chat, message, rendering, start)
            if begin is None:
                return None
            start = begin
            inside = self._turns.end_of_body(rendering[start:end])
            behind = self._turns.end(rendering[end : end + 200], of_call=False)
            if inside is None and behind is None:
                return None
            if number in chat.trained:
                spans.append((start, start + inside if inside is not None else end + (behind or 0)))
        return spans

    # Prefixes

    def _between_prefixes(self, chat: Chat, number: int, rendering: str) -> Span | None:
        message = chat.messages[number]
        if self._turns.control.search(message["content"]) if self._turns.control.pattern else False:
            return None
        prompt = self._prompts.render(chat, chat.messages[:number], generation_prompt=True)
        turn = self._prompts.render(chat, chat.messages[: number + 1])
        if prompt is None or turn is None or not rendering.startswith(turn) or not turn.startswith(prompt):
            return None
        start = self._without_empty_thoughts(chat, message, turn, len(prompt))
        if start is None:
            return None
        if prompt == self._prompts.render(chat, chat.messages[:number]) and not self._goes_on_with(
            message, turn[start:]
        ):
            return None
        end = self._turns.end_of_body(turn[start:])
        if end is None or not self._shows(message, turn[start : start + end]):
            return None
        return start, start + end

    def _shows(self, message: Mapping[str, Any], body: str) -> bool:
        """The stretch has the names of the message's calls, and a text where the message has one."""
        names = [call["function"]["name"] for call in message.get("tool_calls", ())]
        text = self._turns.control.sub("", body).strip()
        return all(name in body for name in names) and (bool(text) or not message["content"].strip())

    def _without_empty_thoughts(self, chat: Chat, message: Mapping[str, Any], text: str, start: int) -> int | None:
        """As ``after_empty_thoughts``, where it is not known what of the text the template wrote."""
        if any(name in message for name in chat.thoughts):
            return start
        place = after_empty_thoughts(text, start)
        own = has_tags(message["content"]) or has_empty_thoughts(message["content"])
        return None if place != start and own else place

    def _goes_on_with(self, message: Mapping[str, Any], body: str) -> bool:
        """The stretch begins with the message's content, not with a header that the template did not write before."""
        content = message["content"].strip()
        return body.lstrip().startswith(content or self._turns.stops) and not (
            message.get("tool_calls") and not content
        )


def hides_thoughts(chat: Chat, fields: Located | None) -> bool:
    """The template leaves out thoughts of a trained turn."""
    if fields is None or len(fields.places) >= len(fields.masked.fields):
        return False
    shown = {place.number for place in fields.places}
    return any(
        number not in shown and field.message in chat.trained and (field.kind == "thoughts" or field.is_thought)
        for number, field in enumerate(fields.masked.fields)
    )


def _lost(chat: Chat, fields: Located) -> str:
    """Which content or calls of a trained turn the template does not show; its thoughts it may leave out."""
    shown = {place.number for place in fields.places}
    for number, field in enumerate(fields.masked.fields):
        if number in shown or field.message not in chat.trained or not field.text.strip():
            continue
        if field.kind == "call" or (field.kind == "content" and not field.is_thought):
            what = "all its tool calls" if field.kind == "call" else "its content"
            return f"messages[{field.message}]: the template does not show {what}"
    return ""


def _reason(number: int, fields: Located | None, has_blocks: bool) -> str:
    if has_blocks:
        return "the template's generation block does not hold the whole turn, and nothing else proves where it stands"
    if fields and not any(place.field.message == number for place in fields.places):
        return "the template shows nothing of this turn, or of tool calls without content"
    return "neither generation blocks nor replaced texts nor prefixes prove where the template shows this turn"
