"""How a chat template frames the assistant's turns: what a turn is generated from, and the token that ends it.

Found by rendering small conversations; nothing is known of any template beforehand.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sft_job.data.chat import ChatTemplate, TemplateFailure
from sft_job.data.control_tokens import pattern
from sft_job.data.fields import mark, marked

_TOOL = {
    "type": "function",
    "function": {
        "name": "probe",
        "description": "probe",
        "parameters": {"type": "object", "properties": {"probe": {"type": "string", "description": "probe"}}},
    },
}
# An empty block of thoughts, with the line breaks behind it.
_NO_THOUGHTS = re.compile(r"<([^<>\s/]*(?:think|thought|reason)[^<>\s]*)>\s*</\1>\n{0,2}", re.IGNORECASE)
# What a generation prompt may end with and a finished turn may lack: the start of thoughts, or an empty block.
_PREFILL = re.compile(r"<[^<>\s/]*(?:think|thought|reason)[^<>\s]*>\s*(?:</[^<>\s]*>\s*)?\Z", re.IGNORECASE)


def tool_call(arguments: dict[str, Any] | str) -> dict[str, Any]:
    """A call of the function ``mark(1)``; its id is one that strict templates take."""
    return {"id": "probe0001", "type": "function", "function": {"name": mark(1), "arguments": arguments}}


class Turns:
    """The frame of the assistant's turns.

    Attributes:
        arguments_as_text: the template wants the arguments of tool calls as JSON text, not as a mapping.
        stops: tokens that end a turn.
    """

    def __init__(self, template: ChatTemplate, control_tokens: Iterable[str]) -> None:
        """Probe the template.

        Args:
            template: the template in force.
            control_tokens: tokens that no text of a row can become.
        """
        self._template = template
        control = pattern(control_tokens)
        self.control = control
        self._user = {"role": "user", "content": mark(0)}
        self.arguments_as_text = self._wants_text()
        self._endings = self._answer_endings()
        found = [self._tokens(ending)[-1][1] for ending in self._endings]
        self.stops = tuple(dict.fromkeys([*found, *self._call_stops()]))
        self._stops = pattern(self.stops)
        self.generation_prompt = self._generation_prompt()

    def _tokens(self, text: str) -> list[tuple[int, str]]:
        """Control tokens in a text: where they end, and the tokens."""
        return [(match.end(), match[0]) for match in self.control.finditer(text) if match[0]]

    def _try(self, messages: Sequence[Mapping[str, Any]], generation_prompt: bool = False, tools: bool = False) -> str:
        """A rendering; empty where the template refuses."""
        try:
            given = [[_TOOL]] if tools else None
            return self._template.render([messages], tools=given, generation_prompt=generation_prompt)[0]
        except TemplateFailure:
            return ""

    def _tail(self, messages: Sequence[Mapping[str, Any]], tools: bool = False) -> str:
        """What the template writes behind mark 1, up to the next mark or the end; empty where it refuses."""
        literals, numbers = marked(self._try(messages, tools=tools))
        return literals[numbers.index(1) + 1] if 1 in numbers else ""

    def _answer_endings(self) -> tuple[str, ...]:
        """What follows an answer, up to and with the token that ends the turn; in the middle and at the end."""
        answer = [self._user, {"role": "assistant", "content": mark(1)}]
        last, middle = self._tail(answer), self._tail([*answer, {"role": "user", "content": mark(2)}])
        both = last[: _common(last, middle)] if last and middle else last
        if self._tokens(both):
            return (both[: self._first_end(both)],)
        # Other tokens at the end than in the middle.
        firsts = {tail[: self._tokens(tail)[0][0]] for tail in (last, middle) if self._tokens(tail)}
        return tuple(sorted(firsts, key=len, reverse=True))

    def _first_end(self, tail: str) -> int:
        """Where an answer ends in what is written behind it: with the first control token, and others right behind it.

        What the template writes as text behind a control token is no longer the answer's.
        """
        found = [match for match in self.control.finditer(tail) if match[0]]
        end, seen = found[0].end(), {found[0][0]}
        for match in found[1:]:
            if tail[end : match.start()].strip() or match[0] in seen:
                break
            end = match.end()
            seen.add(match[0])
        return end

    @property
    def joined_ends(self) -> tuple[str, ...]:
        """Control tokens that follow one another behind every answer; empty where there is one."""
        found = [token for _, token in self._tokens(self._endings[0])] if self._endings else []
        return tuple(found) if len(found) > 1 else ()

    def _call_stops(self) -> list[str]:
        """Tokens that end a turn that calls a tool."""
        arguments: dict[str, Any] | str = '{"probe": "a"}' if self.arguments_as_text else {"probe": "a"}
        calls = [self._user, {"role": "assistant", "content": "", "tool_calls": [tool_call(arguments)]}]
        answer = {"role": "tool", "name": "probe", "tool_call_id": "probe0001", "content": mark(2)}
        last, middle = self._tail(calls, tools=True), self._tail([*calls, answer], tools=True)
        both = last[: _common(last, middle)] if last and middle else last
        tokens = [token for _, token in self._tokens(both)]
        ends = [self._tokens(ending)[-1][1] for ending in self._endings]
        return [token for token in tokens if token in ends][:1] or tokens[-1:]

    def _wants_text(self) -> bool:
        """The template cannot add a mapping to its text, or would show it as Python does."""

        def shown(arguments: dict[str, Any] | str) -> str:
            message = {"role": "assistant", "content": "", "tool_calls": [tool_call(arguments)]}
            return self._try([self._user, message], tools=True)

        as_mapping = shown({"probe": "a"})
        return (not as_mapping or "{'probe': 'a'}" in as_mapping) and bool(shown('{"probe": "a"}'))

    def _generation_prompt(self) -> str:
        """What asking for an answer adds behind a user's message."""
        asked, plain = (marked(self._try([self._user], generation_prompt=ask))[0][-1] for ask in (True, False))
        shared = _common(asked, plain)
        for token in self.control.finditer(asked):
            if token.start() < shared < token.end():
                shared = token.start()
        return asked[shared:]

    def prompt_length(self, bridge: str, asked: str, plain: str, answer: str) -> tuple[int, str] | None:
        """How much of what stands before a turn's first field the turn is generated from, header included.

        Args:
            bridge: what the template wrote before the turn's first field.
            asked: what it writes there when it is asked for an answer.
            plain: what it writes there without being asked; empty = unknown.
            answer: what it writes there before a plain answer; empty = unknown.

        Returns:
            Characters of ``bridge``, and what the turn is generated from besides if it goes on with that; None where
            the three cannot be brought together.
        """
        length = self._prompt_length(bridge, asked, plain, answer)
        if length is None:
            return None
        # Some templates ask for an answer without the header that they write before it, behind a tool's answer say.
        header = _without_prefill(self.generation_prompt)
        if header.strip() and bridge.startswith(header, length):
            return length + len(header), ""
        return length, "" if asked == plain else asked[length:]

    def _prompt_length(self, bridge: str, asked: str, plain: str, answer: str) -> int | None:
        if asked == plain:
            # The template has no generation prompt: a header of the turn is missing in what it was asked.
            header = _NO_THOUGHTS.sub("", answer)
            if not header.startswith(asked):
                return None
            header = header if header[len(asked) :].strip() else asked
            return len(header) if bridge.startswith(header) else None
        if bridge.startswith(asked):
            return len(asked)
        # A turn that does not go on as the generation prompt ends: its thoughts are not shown, or not empty.
        header = _without_prefill(asked)
        if header == asked:
            return None
        return next((len(each) for each in (header, header.rstrip()) if each and bridge.startswith(each)), None)

    def prompt_length_at_start(self, bridge: str) -> tuple[int, str] | None:
        """The same for a conversation that an assistant begins, where a template cannot be asked."""
        place = bridge.rfind(self.generation_prompt) if self.generation_prompt.strip() else -1
        return (place + len(self.generation_prompt), "") if place >= 0 else None

    def end(self, tail: str, of_call: bool) -> int | None:
        """Where the turn ends in what the template wrote behind its last field: behind the token that ends it.

        Args:
            tail: up to the next field.
            of_call: the last field belongs to a tool call.
        """
        if not of_call and (ending := next((each for each in self._endings if tail.startswith(each)), None)):
            return len(ending)
        stop = next((match for match in self._stops.finditer(tail) if match[0]), None)
        if stop is None or (not of_call and self._tokens(tail[: stop.start()])):
            return None
        return stop.end()

    def end_of_body(self, body: str) -> int | None:
        """Where the turn ends in a stretch that holds it to its end: only blanks and control tokens may follow."""
        for match in self._stops.finditer(body):
            if match[0] and not self.control.sub("", body[match.end() :]).strip():
                return match.end()
        return None


def after_empty_thoughts(text: str, start: int, own: str = "") -> int | None:
    """The place behind an empty block of thoughts that a template wrote; ``start`` where there is none.

    Args:
        text: what stands before a turn's first field.
        start: where the turn begins in it; the block stands there, or around it.
        own: tags of thoughts that the message itself has before its first text.

    Returns:
        None where the block may be the template's or the message's own.
    """
    own = own.strip()
    for block in _NO_THOUGHTS.finditer(text, max(0, start - 40), start + 80):
        if block.end() > start and (block.start() <= start or text[start : block.start()].isspace()):
            if text[block.end() :].strip() == own or not own:
                return block.end()
            return start if text[block.start() :].strip() == own else None
    return start


def has_empty_thoughts(text: str) -> bool:
    """An empty block of thoughts stands in a text."""
    return _NO_THOUGHTS.search(text) is not None


def _without_prefill(prompt: str) -> str:
    """A generation prompt without the thoughts that it may begin."""
    prefill = _PREFILL.search(prompt)
    return prompt[: prefill.start()] if prefill else prompt


def _common(one: str, other: str) -> int:
    for place, (first, second) in enumerate(zip(one, other, strict=False)):
        if first != second:
            return place
    return min(len(one), len(other))
