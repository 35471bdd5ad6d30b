"""The chat template in force: its text, and what it makes of conversations."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeVar

from sft_job.contract import ExitCode
from sft_job.errors import Problem, ProblemsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
from sft_job.errors import shorten

__all__ = ["ChatTemplate", "TemplateFailure"]

Chat = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]] | None
Ranges = list[tuple[int, int]]

T = TypeVar("T")
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")

_NOW = "strftime_now"
_NOW_CALL = re.compile(r"\bstrftime_now\(\s*(?P<quote>['\"])(?P<format>[^'\"\\]*)(?P=quote)\s*\)")
_NOW_ASKED = re.compile(r"\bstrftime_now\s+is\s+(?:not\s+)?defined\b")
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
_KWARGS = "data.apply_chat_template_kwargs"


class TemplateFailure(Exception):
    """The chat template failed; the text says with what."""


class ChatTemplate:
    """A tokenizer's chat template, or the one that takes its place, with the variables that it is given.

    Attributes:
        exists: there is a template at all.
        text: its Jinja source, of several named ones the one for conversations without tools; empty where there is
            none.
        tool_text: its Jinja source for conversations with tools: the named template ``tool_use`` where there is one.
        has_generation: it marks what is generated with ``{% generation %}``.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str | None = None, kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """Find the template; it is not run.

        Args:
            tokenizer: gives the template, where no other is given, and the special tokens that templates name.
            template: Jinja text to use instead of the tokenizer's own; None = the tokenizer's, if it has one.
            kwargs: extra variables for the template; ``strftime_now`` is the day, YYYY-MM-DD, that a template which
                asks for today's date is given.

        Raises:
            ProblemsError: exit 2, where the template would write today's date, which no rendering may depend on.
        """
        self._tokenizer: Any = tokenizer
        self._template = template
        self._kwargs = dict(kwargs or {})
        day = self._kwargs.pop(_NOW, None)
        self._day = _day(day) if day is not None else None
        self.exists = bool(template or self._tokenizer.chat_template)
        self.text = self._source(None) if self.exists else ""
        self.tool_text = self._source([]) if self.exists else ""
        for text in (self.text, self.tool_text):
            self._check_date(text)
        self.has_generation = any(_GENERATION.search(text) for text in (self.text, self.tool_text))

    def _source(self, tools: Tools) -> str:
        try:
            return self._dated(self._tokenizer.get_chat_template(self._template, tools))
        except ValueError:  # several templates and none is the default: rendering says so
            return ""

    def _dated(self, text: str) -> str:
        """The template with the fixed day in the place of calls for today's; lines stay where they are."""
        if self._day is None:
            return text
        day = self._day
        return _NOW_CALL.sub(lambda call: "'" + day.strftime(call["format"]) + "'", text)

    def _check_date(self, text: str) -> None:
        """Rows and the cache's fingerprint must not depend on the day on which they are made."""
        if _NOW not in _NOW_ASKED.sub("", _COMMENT.sub("", text)) or (
            "date_string" in text and "date_string" in self._kwargs
        ):
            return
        rule = f"writes the day on which it runs ({_NOW}), so that the same rows would have other tokens tomorrow"
        fix = f"set {_KWARGS}.{_NOW} to a day: YYYY-MM-DD"
        if self._day is not None:
            rule = f"calls {_NOW} with something else than a plain text: the day cannot be fixed"
            fix = "copy the template into data.chat_template with a day of its own"
        elif "date_string" in text:
            fix = f"set {_KWARGS}.date_string to the text it shall write, or {_KWARGS}.{_NOW} to a day: YYYY-MM-DD"
        raise ProblemsError([Problem(ExitCode.CONFIG, "data.chat_template", rule, fix)])

    def render(
        self,
        conversations: Sequence[Chat],
        *,
        tools: Sequence[Tools] | None = None,
        generation_prompt: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """What the template makes of each conversation.

        Args:
            conversations: messages as mappings with ``role`` and ``content``.
            tools: descriptions of tools, for each conversation its own or None.
            generation_prompt: end with what an answer is generated from.
            kwargs: more variables, which come before those of the constructor.

        Raises:
            TemplateFailure: on one of the conversations; render one by one to find which.
        """

        def run(batch: list[Chat], of_batch: Tools) -> list[str]:
            return self._tokenizer.apply_chat_template(
                batch,
                tools=of_batch,
                chat_template=self._source(of_batch) if self._day else self._template,
                add_generation_prompt=generation_prompt,
                tokenize=False,
                **{**self._kwargs, **(kwargs or {})},
            )

        return list(_by_tools(run, conversations, tools))

    def render_with_generation(
        self,
        conversations: Sequence[Chat],
        *,
        tools: Sequence[Tools] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> list[tuple[str, Ranges]]:
        """As ``render``, with the ranges of characters that stand in ``{% generation %}`` blocks, end exclusive.

        Raises:
            TemplateFailure: on one of the conversations.
        """
        # Imports torch.
        from transformers.utils.chat_template_utils import render_jinja_template  # noqa: PLC0415

        def run(batch: list[Chat], of_batch: Tools) -> list[tuple[str, Ranges]]:
            found: Any = render_jinja_template(
                conversations=batch,  # type: ignore[arg-type]
                tools=of_batch,  # type: ignore[arg-type]
                chat_template=self._dated(self._tokenizer.get_chat_template(self._template, of_batch)),
                return_assistant_tokens_mask=True,
                add_generation_prompt=False,
                **{**self._tokenizer.special_tokens_map, **self._kwargs, **(kwargs or {})},
            )
            return list(zip(*found, strict=True))

        return list(_by_tools(run, conversations, tools))


def _day(value: Any) -> date:
    try:
        return date.fromisoformat(str(value))
    except ValueError:
        problem = Problem(ExitCode.CONFIG, f"{_KWARGS}.{_NOW}", "must be a day: YYYY-MM-DD", value=value)
        raise ProblemsError([problem]) from None


def _by_tools(
    run: Callable[[list[Chat], Tools], list[T]], conversations: Sequence[Chat], tools: Sequence[Tools] | None
) -> Iterator[T]:
    """Run consecutive conversations with equal tools together."""
    pairs = zip(conversations, tools if tools is not None else [None] * len(conversations), strict=True)
    for of_batch, batch in groupby(pairs, key=lambda pair: pair[1]):
        try:
            yield from run([conversation for conversation, _ in batch], of_batch)
        except Exception as error:  # a template is a program of its own: it may fail with anything
            text = shorten(" ".join(str(error).split()), 300)
            raise TemplateFailure(f"{type(error).__name__}: {text}") from error
