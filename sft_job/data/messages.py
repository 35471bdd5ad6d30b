"""Conversations become token ids with the spans that are trained: rendered once and whole by the chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

from sft_job.contract import ExitCode
from sft_job.data.chat import ChatTemplate, TemplateFailure
from sft_job.data.control_tokens import MARK
from sft_job.data.conversation import Conversation
from sft_job.data.encode import Encoder
from sft_job.data.faults import Fault
from sft_job.data.fields import Masked, align, free_prefix, masked
from sft_job.data.prompts import Chat
from sft_job.data.render import Rendered, check_variables
from sft_job.data.spans import Located, Span, SpanFinder, Unproved, hides_thoughts
from sft_job.data.stretches import TokenSpans
from sft_job.data.turns import Turns
from sft_job.errors import Problem, ProblemsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Templates read an assistant's thoughts under one of these names.
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")
_OPTION = "data.chat_template"


@dataclass(frozen=True, slots=True)
class Rejected:
    """A conversation that is not trained on.

    Attributes:
        fault: its kind.
        reason: why.
    """

    fault: Fault
    reason: str


@dataclass(slots=True)
class _Row:
    """A conversation on its way.

    Attributes:
        chat: as the template is given it.
        text: what the template made of it.
        blocks: the template's generation blocks.
        refusal: why the template made nothing of it.
    """

    chat: Chat
    text: str = ""
    blocks: list[Span] | None = None
    refusal: str = ""


class MessageRenderer:
    """Renders conversations.

    Attributes:
        template: the chat template in force.
        encoder: makes ids of text.
        turns: how the template frames the assistant's turns.
        stop_ids: tokens that end turns, the one that ends a plain answer first.
        notes: what was found out about template and tokenizer, for the log and the data report.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        allow_control_tokens: bool = False,
    ) -> None:
        """Probe the template.

        Args:
            tokenizer: it is this renderer's from now on: its padding and truncation are turned off.
            chat_template: Jinja text to use instead of the tokenizer's own; None = the tokenizer's.
            template_kwargs: extra variables for the template; a row's ``enable_thinking`` comes before them.
            allow_control_tokens: control tokens in a row's text act as control tokens.

        Raises:
            ProblemsError: exit 2, where there is no template, or it ends an assistant's turn with no control token.
        """
        check_variables(template_kwargs or {})
        self._tokenizer: Any = tokenizer
        self.template = ChatTemplate(tokenizer, chat_template, template_kwargs)
        if not self.template.exists:
            rule = "conversations need a chat template, and the tokenizer has none"
            fix = "set data.chat_template to a template or a file that holds one"
            raise ProblemsError([Problem(ExitCode.CONFIG, _OPTION, rule, fix)])
        self.encoder = Encoder(tokenizer, allow_control_tokens=allow_control_tokens, chat_template=chat_template)
        self.turns = Turns(self.template, self.encoder.control_ids)
        if not self.turns.stops:
            raise ProblemsError([self._no_stop()])
        self.stop_ids = [self.encoder.control_ids[stop] for stop in self.turns.stops]
        self.notes = [f"the assistant's turns end with {' or '.join(map(repr, self.turns.stops))}"]
        if joined := self.turns.joined_ends:
            self.notes.append(
                f"the chat template writes {' and '.join(map(repr, joined))} behind every answer: trained"
            )
        if self.turns.arguments_as_text:
            self.notes.append("the chat template is given the arguments of tool calls as JSON text")
        self._finder = SpanFinder(self.template, self.turns)
        decode = partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        self._tokens = TokenSpans(self.encoder, decode)  # type: ignore[arg-type]

    @property
    def end_of_turn_id(self) -> int:
        """The token that ends a plain answer."""
        return self.stop_ids[0]

    def _no_stop(self) -> Problem:
        probe = [{"role": "user", "content": "probe"}, {"role": "assistant", "content": "probe"}]
        try:
            self.template.render([probe])
        except TemplateFailure as failure:
            rule = f"fails on a conversation of a question and an answer: {failure}"
            return Problem(ExitCode.CONFIG, _OPTION, rule, "mend the template")
        rule = "ends an assistant's turn with no control token, so that a model could not learn to stop"
        fix = "a template that writes a special token, such as the eos token, behind each of the assistant's turns"
        return Problem(ExitCode.CONFIG, _OPTION, rule, fix)

    def render(self, conversations: Sequence[Conversation]) -> list[Rendered | Rejected]:
        """One result for each conversation, in order."""
        rows = [_Row(self._chat(conversation)) for conversation in conversations]
        for _, batch in groupby(rows, key=lambda row: row.chat.variables):
            self._render(list(batch))
        located = self._locate(rows)
        found: list[Rendered | Rejected] = []
        provable: list[tuple[int, _Row, list[Span]]] = []
        for number, (row, fields) in enumerate(zip(rows, located, strict=True)):
            found.append(Rejected(Fault.NOT_RENDERED, row.refusal))
            if row.refusal:
                continue
            try:
                provable.append((number, row, self._finder.find(row.chat, row.text, fields, row.blocks)))
            except Unproved as error:
                found[number] = Rejected(Fault.NOT_PROVED, str(error))
        encoded = self._tokens.encode([row.text for _, row, _ in provable], [spans for *_, spans in provable])
        for (number, row, _), tokens in zip(provable, encoded, strict=True):
            if tokens is None:
                reason = "a turn does not begin or end between two tokens, and its tokens by themselves give other text"
                found[number] = Rejected(Fault.NOT_PROVED, reason)
            else:
                quoted = self._quoted(conversations[number], row.text)
                found[number] = self._row(*tokens, quoted, hides_thoughts(row.chat, located[number]))
        return found

    def _chat(self, conversation: Conversation) -> Chat:
        messages = [self._message(message) for message in conversation.messages]
        tools = self.encoder.protect_all(conversation.tools) if conversation.tools else None
        thinking = conversation.enable_thinking
        variables = {} if thinking is None else {"enable_thinking": thinking}
        trained = tuple(number for number, flag in enumerate(conversation.train) if flag)
        return Chat(messages, tools, variables, _THOUGHTS, trained)

    def _message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = self.encoder.protect_all(message)
        found = dict(found)
        if "reasoning_content" in found:
            found.update(dict.fromkeys(_THOUGHTS, found["reasoning_content"]))
        if self.turns.arguments_as_text and "tool_calls" in found:
            found["tool_calls"] = [_with_text(call) for call in found["tool_calls"]]
        return found

    def _render(self, rows: list[_Row]) -> None:
        """Fill in what the template makes of rows with the same variables, together or else one by one."""
        chats, tools = [row.chat.messages for row in rows], [row.chat.tools for row in rows]
        variables = rows[0].chat.variables
        try:
            if self.template.has_generation:
                made = self.template.render_with_generation(chats, tools=tools, kwargs=variables)
                for row, (text, blocks) in zip(rows, made, strict=True):
                    row.text, row.blocks = text, blocks or None
            else:
                for row, text in zip(rows, self.template.render(chats, tools=tools, kwargs=variables), strict=True):
                    row.text = text
        except TemplateFailure as failure:
            if len(rows) == 1:
                rows[0].refusal = str(failure)
                return
            for row in rows:
                self._render([row])

    def _locate(self, rows: Sequence[_Row]) -> list[Located | None]:
        """Where the fields of each row stand; with as many marks as can be."""
        found: list[Located | None] = [None] * len(rows)
        for full in (True, False):
            left = [n for n, row in enumerate(rows) if row.chat.trained and not row.refusal and found[n] is None]
            chats = [(rows[n].chat, free_prefix(rows[n].text)) for n in left]
            masks = [masked(chat.messages, chat.thoughts, full, prefix) for chat, prefix in chats]
            for n, mask, text in zip(left, masks, self._masked_texts([rows[n].chat for n in left], masks), strict=True):
                places = align(rows[n].text, text, mask.fields, mask.prefix) if text is not None else None
                found[n] = Located(mask, places) if places is not None else None
        return found

    def _masked_texts(self, chats: Sequence[Chat], masks: Sequence[Masked]) -> list[str | None]:
        found: list[str | None] = []
        for variables, batch in groupby(zip(chats, masks, strict=True), key=lambda pair: pair[0].variables):
            pairs = list(batch)
            try:
                found += self.template.render(
                    [mask.messages for _, mask in pairs], tools=[chat.tools for chat, _ in pairs], kwargs=variables
                )
            except TemplateFailure:
                if len(pairs) == 1:
                    found.append(None)
                else:
                    for chat, mask in pairs:
                        found += self._masked_texts([chat], [mask])
        return found

    def _row(self, ids: list[int], spans: tuple[Span, ...], quoted: tuple[str, ...], hides: bool) -> Rendered:
        """A row; of a doubled token at its beginning, one is kept."""
        bos = self._tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos] and (not spans or spans[0][0] > 0):
            return Rendered(ids[1:], tuple((start - 1, end - 1) for start, end in spans), quoted, hides)
        return Rendered(ids, spans, quoted, hides)

    def _quoted(self, conversation: Conversation, text: str) -> tuple[str, ...]:
        """Control tokens that stand in the conversation's texts, and are plain text in the row."""
        if MARK not in text:
            return ()
        texts = json.dumps([conversation.messages, conversation.tools], ensure_ascii=False)
        return tuple(self.encoder.control_tokens_in(texts))


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}
