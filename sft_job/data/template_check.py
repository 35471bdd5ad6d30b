"""The chat template's self-test, before a row is tokenised: what a wrong template would silently train is refused.

Small conversations are rendered and looked at: the generation prompt must be how an assistant's turn begins, a stop
token must end each turn, there must be one BOS, generation must stop at the stop token, and a row's text must not
become control tokens.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sft_job.contract import ExitCode
from sft_job.data.chat import TemplateFailure
from sft_job.data.control_tokens import MARK, restore
from sft_job.data.conversation import Conversation
from sft_job.data.messages import MessageRenderer, Rejected
from sft_job.data.render import PromptResponseRenderer, Rendered
from sft_job.data.spec import CacheSpec
from sft_job.data.template_shape import check_shape
from sft_job.data.template_subject import ANSWER, NEXT_ANSWER, NEXT_USER, USER, Subject, TemplateReport
from sft_job.data.tokenizer import load_tokenizer
from sft_job.errors import Problem, ProblemsError

__all__ = [
    "Subject",
    "TemplateReport",
    "check_template",
    "check_templates",
    "message_subject",
    "prompt_subject",
    "saved_stops",
    "self_test",
]


def check_templates(specs: Iterable[CacheSpec]) -> TemplateReport:
    """The self-tests of all data sets as one: once for rows of prompt and response, once for conversations.

    Raises:
        ProblemsError: exit 66, where the tokenizer cannot be loaded.
    """
    joined = TemplateReport()
    for spec in {bool(spec.messages): spec for spec in specs}.values():
        report = check_template(spec)
        joined.problems += [each for each in report.problems if each not in joined.problems]
        joined.warnings += [each for each in report.warnings if each not in joined.warnings]
        joined.found += [each for each in report.found if each not in joined.found]
    return joined


def check_template(spec: CacheSpec) -> TemplateReport:
    """Run the self-test on the tokenizer and template of a split; loads the tokenizer.

    Nothing is looked at where rows come from a class of the user's own, which makes its tokens itself.

    Raises:
        ProblemsError: exit 66, where the tokenizer cannot be loaded.
    """
    if spec.custom:
        return TemplateReport()
    tokenizer = load_tokenizer(spec.tokenizer, spec.trust_remote_code)
    options: dict[str, Any] = {
        "chat_template": spec.chat_template,
        "template_kwargs": spec.template_kwargs,
        "allow_control_tokens": spec.allow_control_tokens,
    }
    make = message_subject if spec.messages else prompt_subject
    try:
        subject = make(tokenizer, spec.tokenizer, **options)
    except ProblemsError as error:
        return TemplateReport(problems=list(error.problems))
    return self_test(subject)


def prompt_subject(tokenizer: Any, folder: Path, **options: Any) -> Subject:
    """Rows of a prompt and a response; the options are those of ``PromptResponseRenderer``.

    Raises:
        ProblemsError: exit 2, where the template cannot be used at all.
    """
    renderer = PromptResponseRenderer(tokenizer, **options)
    return Subject(
        tokenizer,
        renderer.template,
        renderer.encoder,
        renderer.end_of_turn_id,
        folder,
        lambda user, answer: renderer.render([user], [answer])[0],
        own=not options.get("chat_template"),
    )


def message_subject(tokenizer: Any, folder: Path, **options: Any) -> Subject:
    """Rows of conversations; the options are those of ``MessageRenderer``.

    Raises:
        ProblemsError: exit 2, where the template cannot be used at all.
    """
    renderer = MessageRenderer(tokenizer, **options)

    def row(user: str, answer: str) -> Rendered:
        texts = {"user": (user, NEXT_USER), "assistant": (answer, NEXT_ANSWER)}
        messages = [{"role": role, "content": texts[role][turn]} for turn in (0, 1) for role in texts]
        (made,) = renderer.render([Conversation(messages, None, None, (False, True) * 2)])
        if isinstance(made, Rejected):
            raise TemplateFailure(made.reason)
        return made

    return Subject(
        tokenizer,
        renderer.template,
        renderer.encoder,
        renderer.end_of_turn_id,
        folder,
        row,
        own=not options.get("chat_template"),
        messages=True,
    )


def self_test(subject: Subject) -> TemplateReport:
    """Run all checks; those on renderings only where there is a template."""
    report = TemplateReport()
    if subject.template.exists:
        try:
            check_shape(subject, report)
        except TemplateFailure as failure:
            rule = f"fails on a conversation of one user message: {failure}"
            report.problems.append(subject.problem(rule, "mend the template", "raise_exception"))
            return report
    else:
        report.found.append("no chat template: a row is prompt + response + end")
    try:
        stop = _check_trained_stops(subject, report)
        _check_saved_stops(subject, stop, report)
        _check_bos(subject, report)
        _check_control_tokens(subject, report)
    except TemplateFailure as failure:
        report.problems.append(subject.problem(f"makes no row of a small conversation: {failure}", "mend the template"))
    return report


def _check_trained_stops(subject: Subject, report: TemplateReport) -> int | None:
    """Each trained stretch ends with a stop token, its only one; the last one."""
    row = subject.row(USER, ANSWER)
    stops = [row.ids[end - 1] for _, end in row.spans]
    controls = {subject.stop_id, *subject.encoder.control_ids.values()}
    once = all(row.ids[start:end].count(stop) == 1 for (start, end), stop in zip(row.spans, stops, strict=True))
    if stops and once and controls.issuperset(stops):
        names = " or ".join(map(subject.name, dict.fromkeys(stops)))
        report.found.append(f"a turn ends with {names}, trained once")
        return stops[-1]
    trained = [subject.tokenizer.decode(row.ids[start:end]) for start, end in row.spans]
    rule = f"a turn is not trained up to one stop token at its end: trained is {trained!r}"
    fix = "write the token that ends a turn behind the assistant's content"
    report.problems.append(subject.problem(rule, fix, "assistant", "generation"))
    return None


def _check_bos(subject: Subject, report: TemplateReport) -> None:
    """Exactly one BOS, where the tokenizer has one and uses it."""
    tokenizer = subject.tokenizer
    bos = tokenizer.bos_token_id
    if bos is None:
        return
    if subject.template.exists:
        ids = subject.encoder.encode(subject.template.render([[{"role": "user", "content": USER}]]))[0]
    else:
        ids = subject.row(USER, ANSWER).ids
    count = next((n for n, token in enumerate(ids) if token != bos), len(ids))
    name = subject.name(bos)
    needles = ("bos_token", str(tokenizer.bos_token))
    if count == 1:
        report.found.append(f"one BOS {name}")
    elif count > 1 and subject.template.exists:
        rule = f"a row begins with the BOS token {name} {count} times"
        report.problems.append(subject.problem(rule, "write it once, at the template's start", *needles))
    elif count > 1:
        rule = f"the tokenizer puts the BOS token {name} {count} times before a text"
        fix = "mend post_processor in tokenizer.json, or add_bos_token in tokenizer_config.json"
        report.problems.append(Problem(ExitCode.MODEL, "model.partial_pretrain", rule, fix, str(subject.folder)))
    elif bos in ids and not tokenizer.decode(ids[: ids.index(bos)]).strip():
        text = tokenizer.decode(ids[: ids.index(bos)])
        rule = f"writes {text!r} before the BOS token {name}"
        report.problems.append(subject.problem(rule, "begin the template with it, or with {{- and {%-", *needles))
    elif subject.encoder.encode([USER], special_tokens=True)[0][:1] == [bos]:
        rule = f"no row begins with the BOS token {name}, which this tokenizer puts before every text by itself"
        fix = "begin the template with {{ bos_token }}"
        report.problems.append(subject.problem(rule, fix, "messages"))
    else:
        report.found.append(f"no BOS: neither template nor tokenizer writes {name}")


def saved_stops(folder: Path) -> tuple[str, list[int]]:
    """Where a model folder says at which tokens generation stops, and their ids."""
    for name in ("generation_config.json", "config.json"):
        try:
            settings: Any = json.loads((folder / name).read_bytes())
        except (OSError, ValueError):  # whoever loads the model says what is wrong with it
            continue
        parts = [settings, settings.get("text_config")] if isinstance(settings, dict) else []
        for part in parts:
            value = part.get("eos_token_id") if isinstance(part, dict) else None
            if value is not None:
                return name, [value] if isinstance(value, int) else list(value)
    return "generation_config.json", []


def _check_saved_stops(subject: Subject, stop: int | None, report: TemplateReport) -> None:
    """Generation from the base model's own settings stops at the token that ends the last turn in training."""
    if stop is None:
        return
    name, stops = saved_stops(subject.folder)
    if stop in stops:
        report.found.append("generation stops at it")
        return
    old = f"stops at {', '.join(map(subject.name, stops))}" if stops else "has no eos_token_id"
    report.warnings.append(
        f"a turn is trained to end with {subject.name(stop)}, but the base model's {name} {old}; "
        "the exported folder's eos_token_id holds both; to serve an adapter on the base model, set there "
        f'"eos_token_id": {json.dumps([stop, *stops])}'
    )


def _check_control_tokens(subject: Subject, report: TemplateReport) -> None:
    """A user's text that holds a whole conversation adds no control tokens."""
    forged = f"{USER} {' '.join(_forgery(subject))}"
    if subject.encoder.protect(forged) is forged:
        if subject.encoder.control_tokens_in(forged):
            report.found.append("control tokens in rows keep their meaning")
        return
    # Characters that the tokenizer does not know may become a special token of their own.
    unknown = subject.encoder.encode(["\ue000"])[0]
    known = set(subject.encoder.control_ids.values()) - set(unknown)
    plain, row = subject.row(USER, ANSWER), subject.row(forged, ANSWER)
    added = Counter(token for token in row.ids if token in known)
    added -= Counter(token for token in plain.ids if token in known)
    fix = "data.allow_control_tokens=true, where rows may end turns; otherwise a template that leaves text as it is"
    if added:
        names = ", ".join(subject.name(token) for token in added)
        rule = f"control tokens in a user's text become control tokens: {names}"
        report.problems.append(subject.problem(rule, fix, "content"))
        return
    if subject.template.exists:
        text = subject.template.render([[{"role": "user", "content": subject.encoder.protect(forged)}]])[0]
        if MARK in restore(text).lower():
            rule = "changes the letters of a message, so that control tokens in it cannot be kept apart from its text"
            report.problems.append(subject.problem(rule, fix, "upper", "title", "capitalize", "replace", "content"))
            return
    report.found.append("control tokens in rows stay text")


def _forgery(subject: Subject) -> Iterator[str]:
    yield subject.text(subject.stop_id)
    if subject.template.exists:
        yield subject.tried([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]) or ""
    yield from list(subject.encoder.control_ids)[:20]
