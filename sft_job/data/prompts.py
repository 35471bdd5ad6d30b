"""Where a template's prompt for an answer ends: the question behind every proof by replaced texts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sft_job.data.chat import ChatTemplate, TemplateFailure
from sft_job.data.fields import Masked, Place, mark, marked
from sft_job.data.turns import Turns

# Conversations of one kind share their prompts; what differs from row to row would fill the memory.
_REMEMBERED = 4096
# The mark of no field.
_ANSWER = 999_999


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation as the template is given it.

    Attributes:
        messages: the messages.
        tools: descriptions of tools.
        variables: more variables for the template.
        thoughts: names under which an assistant's thoughts stand in its message.
        trained: numbers of the messages that are trained.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    variables: Mapping[str, Any]
    thoughts: tuple[str, ...]
    trained: tuple[int, ...]


class Prompts:
    """Asks a template how it asks for an answer, and remembers what it said.

    Args:
        template: the template.
        turns: its frame of turns.
    """

    def __init__(self, template: ChatTemplate, turns: Turns) -> None:
        self._template = template
        self._turns = turns
        # By all that the template sees.
        self._lengths: dict[bytes, tuple[int, str]] = {}
        self._heeding: dict[bytes, bool] = {}
        self._asked: dict[bytes, str | None] = {}

    def length(self, chat: Chat, number: int, first: Place, found: Masked) -> tuple[int, str] | None:
        """Characters of ``first.before`` that ask for the turn; rendered once for all that they depend on.

        Args:
            chat: the conversation.
            number: of the turn's message.
            first: where the turn's first field stands.
            found: the conversation with marks.

        Returns:
            As ``Turns.prompt_length``.
        """
        earlier = found.messages[:number]
        if first.previous is not None and found.fields[first.previous].kind == "before":
            # The bridge begins behind a message, so what calls and their answers say further up stands in none.
            heeds = self._heeds_system(chat, found)
            earlier = [_neutral(message, heeds) for message in earlier[:-1]] + earlier[-1:]
        key = _digest(first.before, first.previous, earlier, chat.tools, chat.variables)
        length = self._lengths.get(key)
        if length is None:
            length = self._rendered_prompt_length(chat, earlier, first, found.prefix)
            if length is not None:
                if len(self._lengths) >= _REMEMBERED:
                    self._lengths.clear()
                self._lengths[key] = length
        return length

    def _heeds_system(self, chat: Chat, found: Masked) -> bool:
        """Whether what a system's message says changes how the template asks for the first answer."""
        roles = [message["role"] for message in found.messages]
        start = found.messages[: roles.index("assistant")]
        others = [_neutral(message, heeds_system=False) for message in start]
        if start == others:
            return False
        key = _digest(start, chat.tools, chat.variables)
        if key not in self._heeding:
            if len(self._heeding) >= _REMEMBERED:
                self._heeding.clear()
            asked, neutral = self.render(chat, start, True), self._render_once(chat, others)
            ends = [marked(text, found.prefix)[0][-1] if text is not None else None for text in (asked, neutral)]
            self._heeding[key] = ends[0] != ends[1] or ends[0] is None
        return self._heeding[key]

    def _render_once(self, chat: Chat, messages: Sequence[Mapping[str, Any]]) -> str | None:
        """As ``render`` with a generation prompt, remembered."""
        key = _digest(messages, chat.tools, chat.variables)
        if key not in self._asked:
            if len(self._asked) >= _REMEMBERED // 16:
                self._asked.clear()
            self._asked[key] = self.render(chat, messages, generation_prompt=True)
        return self._asked[key]

    def _rendered_prompt_length(
        self, chat: Chat, earlier: Sequence[Mapping[str, Any]], first: Place, prefix: str
    ) -> tuple[int, str] | None:
        asked = self._bridge(chat, earlier, first.previous, prefix, generation_prompt=True)
        if asked is None:
            return None if earlier else self._turns.prompt_length_at_start(first.before)
        header = self._turns.generation_prompt
        if header.strip() and asked.endswith(header) and first.before.startswith(asked):
            return self._turns.prompt_length(first.before, asked, "", "")
        plain = self._bridge(chat, earlier, first.previous, prefix) or ""
        answer = [*earlier, {"role": "assistant", "content": mark(_ANSWER, prefix)}]
        header = self._bridge(chat, answer, first.previous, prefix, behind=False) or ""
        return self._turns.prompt_length(first.before, asked, plain, header)

    def _bridge(
        self,
        chat: Chat,
        messages: Sequence[Mapping[str, Any]],
        previous: int | None,
        prefix: str,
        generation_prompt: bool = False,
        behind: bool = True,
    ) -> str | None:
        """What the template writes behind the field ``previous``; None where it refuses or shows other fields."""
        text = self.render(chat, messages, generation_prompt)
        if text is None:
            return None
        literals, numbers = marked(text, prefix)
        if not behind:
            if not numbers or numbers.pop() != _ANSWER:
                return None
            literals.pop()
        return literals[-1] if (numbers[-1] if numbers else None) == previous else None

    def render(self, chat: Chat, messages: Sequence[Mapping[str, Any]], generation_prompt: bool = False) -> str | None:
        """What the template makes of some messages; None where it refuses them."""
        try:
            return self._template.render(
                [messages], tools=[chat.tools], generation_prompt=generation_prompt, kwargs=chat.variables
            )[0]
        except TemplateFailure:
            return None


def _digest(*seen: Any) -> bytes:
    return hashlib.blake2b(repr(seen).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _neutral(message: Mapping[str, Any], heeds_system: bool) -> Mapping[str, Any]:
    """The message without arguments, answers and ids of tool calls, which differ from row to row.

    Args:
        message: with marks.
        heeds_system: leave a system's message as it is.
    """
    if message["role"] in ("system", "developer") and not heeds_system and message["content"].strip():
        return {**message, "content": "x"}
    if message["role"] == "tool":
        same = {"tool_call_id": "0" * len(str(message["tool_call_id"]))} if "tool_call_id" in message else {}
        return {**message, "content": "x", **same}
    if calls := message.get("tool_calls"):
        return {**message, "tool_calls": [_without_arguments(call) for call in calls]}
    return message


def _without_arguments(call: Mapping[str, Any]) -> Mapping[str, Any]:
    arguments = call["function"]["arguments"]
    same = {"id": "0" * len(str(call["id"]))} if "id" in call else {}
    function = {**call["function"], "arguments": "{}" if isinstance(arguments, str) else {}}
    return {**call, **same, "function": function}
