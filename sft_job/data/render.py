"""Rows of text become token ids with the spans that are trained.

A prompt/response row is: the template's rendering of the prompt with the generation prompt, the response's own tokens,
and the token that ends a turn. The response never passes through the template, because templates rewrite what they
are given (they trim it, or drop thoughts). Trained are the response's tokens and the end of the turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_job.contract import ExitCode
from sft_job.data.chat import ChatTemplate, TemplateFailure
from sft_job.data.encode import Encoder
from sft_job.data.tokenizer import load_tokenizer, renderer_fingerprint
from sft_job.errors import Problem, ProblemsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PromptResponseRenderer", "Rendered", "TemplateFailure", "fingerprint", "load_tokenizer", "truncate"]

# Counted up with every change that gives other ids or other spans for the same row.
_VERSION = 2
_TEMPLATE_OPTION = "data.chat_template"
_KWARGS_OPTION = "data.apply_chat_template_kwargs"
_PROBE = "probe"
_SENTINEL = "sentinelcontent"
_RESERVED = frozenset(
    {
        "conversation",
        "messages",
        "tools",
        "documents",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    }
)


@dataclass(frozen=True, slots=True)
class Rendered:
    """One row as tokens.

    Attributes:
        ids: token ids.
        spans: trained stretches, ``(start, end)`` with end exclusive, in order and apart from one another.
        control_tokens: control tokens that stand in the row's text and were encoded as plain text.
        hides_thoughts: the template does not show all thoughts of the trained turns.
    """

    ids: list[int]
    spans: tuple[tuple[int, int], ...]
    control_tokens: tuple[str, ...] = ()
    hides_thoughts: bool = False

    @property
    def prompt_length(self) -> int:
        """Tokens before the first trained one; all of them where none is trained."""
        return self.spans[0][0] if self.spans else len(self.ids)

    @property
    def num_targets(self) -> int:
        """Trained tokens that have a predecessor: only these can be predicted."""
        return sum(end - max(start, 1) for start, end in self.spans if end > 1)


def truncate(row: Rendered, max_length: int, side: str) -> Rendered:
    """The row cut to ``max_length`` tokens at its start (``left``) or its end (``right``)."""
    surplus = len(row.ids) - max_length
    if surplus <= 0:
        return row
    first = surplus if side == "left" else 0
    last = first + max_length
    clipped = ((max(start, first) - first, min(end, last) - first) for start, end in row.spans)
    spans = tuple((start, end) for start, end in clipped if end > start)
    return Rendered(row.ids[first:last], spans, row.control_tokens, row.hides_thoughts)


def fingerprint(
    folder: Path, template: str | None, template_kwargs: Mapping[str, Any], trust_remote_code: bool = False
) -> str:
    """Identifies a renderer without loading it: equal fingerprints give equal ids and spans for equal rows."""
    return renderer_fingerprint(folder, template, template_kwargs, trust_remote_code, _VERSION)


def check_variables(template_kwargs: Mapping[str, Any]) -> None:
    """Refuse variables for the template that the job sets itself.

    Raises:
        ProblemsError: exit 2.
    """
    problems = [
        Problem(ExitCode.CONFIG, f"{_KWARGS_OPTION}.{name}", "is set by the job itself", "remove it", value)
        for name, value in template_kwargs.items()
        if name in _RESERVED
    ]
    if problems:
        raise ProblemsError(problems)


class PromptResponseRenderer:
    """Renders prompt/response rows.

    Attributes:
        template: the chat template in force.
        encoder: makes ids of text.
        end_of_turn_id: the token that ends a response, trained with it.
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
            chat_template: Jinja text to use instead of the tokenizer's own; None = the tokenizer's, if it has one.
            template_kwargs: extra variables for the template.
            allow_control_tokens: control tokens in a row's text act as control tokens.

        Raises:
            ProblemsError: exit 2, where the template fails on a plain prompt or no token can end a turn.
        """
        self._tokenizer: Any = tokenizer
        self._template_kwargs = dict(template_kwargs or {})
        self._chat_template = chat_template
        self.template = ChatTemplate(tokenizer, chat_template, self._template_kwargs)
        self.has_template = self.template.exists
        self.encoder = Encoder(tokenizer, allow_control_tokens=allow_control_tokens, chat_template=chat_template)
        self.notes: list[str] = []
        check_variables(self._template_kwargs)
        if self.has_template:
            self._check_template()
        self._strips_eos = not self.has_template and self._appends_eos()
        self.end_of_turn_id = self._find_end_of_turn()

    def render(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Rendered]:
        """Rows of equal index belong together.

        Raises:
            TemplateFailure: on one of the prompts; render one by one to find which.
        """
        shown = [self.encoder.protect(prompt) for prompt in prompts]
        told = [self.encoder.protect(response) for response in responses]
        encoded = zip(self._encode_protected(shown), self.encoder.encode(told), strict=True)
        rows: list[Rendered] = []
        for row, (prompt, answer) in enumerate(encoded):
            ids = [*prompt, *answer, self.end_of_turn_id]
            quoted: tuple[str, ...] = ()
            if shown[row] is not prompts[row] or told[row] is not responses[row]:
                quoted = tuple(self.encoder.control_tokens_in(f"{prompts[row]}\0{responses[row]}"))
            rows.append(Rendered(ids, ((len(prompt), len(ids)),), quoted))
        return rows

    def encode_prompts(self, prompts: Sequence[str]) -> list[list[int]]:
        """Ids up to where the response starts: what a model is given to generate from.

        Raises:
            TemplateFailure: on one of the prompts.
        """
        return self._encode_protected([self.encoder.protect(prompt) for prompt in prompts])

    def _encode_protected(self, prompts: Sequence[str]) -> list[list[int]]:
        if self.has_template:
            conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
            return self.encoder.encode(self.template.render(conversations, generation_prompt=True))
        encoded = self.encoder.encode(prompts, special_tokens=True)
        # The tokenizer takes the prompt for a whole document; its end comes after the response instead.
        return [ids[:-1] for ids in encoded] if self._strips_eos else encoded

    def _appends_eos(self) -> bool:
        with_special, without = (self.encoder.encode([_PROBE], special)[0] for special in (True, False))
        eos = self._tokenizer.eos_token_id
        return eos is not None and with_special[-1:] == [eos] and without[-1:] != [eos]

    def _check_template(self) -> None:
        try:
            self.template.render([[{"role": "user", "content": _PROBE}]], generation_prompt=True)
        except TemplateFailure as failure:
            whose = _TEMPLATE_OPTION if self._chat_template else f"{_TEMPLATE_OPTION} (the tokenizer's own)"
            rule = f"fails on a conversation of one user message: {failure}"
            fix = f"mend the template, or set what it needs in {_KWARGS_OPTION}"
            raise ProblemsError([Problem(ExitCode.CONFIG, whose, rule, fix)]) from failure

    def _find_end_of_turn(self) -> int:
        shown = self._shown_end_of_turn() if self.has_template else None
        if shown is not None:
            token = self._tokenizer.convert_ids_to_tokens(shown)
            self.notes.append(f"a response ends with {token!r} (id {shown}), as the chat template shows")
            return shown
        eos = self._tokenizer.eos_token_id
        if eos is None:
            rule = "no token can end a response: the chat template shows none, and the tokenizer has no eos token"
            fix = "a template that ends assistant turns with a special token, or eos_token in tokenizer_config.json"
            raise ProblemsError([Problem(ExitCode.CONFIG, _TEMPLATE_OPTION, rule, fix, self._chat_template)])
        why = "the chat template shows no special token there" if self.has_template else "there is no chat template"
        row = "" if self.has_template else "; a row is prompt + response + eos"
        token = self._tokenizer.convert_ids_to_tokens(eos)
        self.notes.append(f"a response ends with the eos token {token!r} (id {eos}): {why}{row}")
        return eos

    def _shown_end_of_turn(self) -> int | None:
        """The first special or added token behind an assistant's content in a rendering made for this."""
        conversation = [{"role": "user", "content": _PROBE}, {"role": "assistant", "content": _SENTINEL}]
        try:
            text = self.template.render([conversation])[0]
        except TemplateFailure as failure:
            self.notes.append(f"the chat template fails on an assistant's turn: {failure}")
            return None
        _, found, rest = text.rpartition(_SENTINEL)
        added = {*self._tokenizer.added_tokens_decoder, *self._tokenizer.all_special_ids}
        ids = self.encoder.encode([rest])[0] if found else []
        return next((token for token in ids if token in added), None)
