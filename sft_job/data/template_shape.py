"""The shape of what a chat template renders: how an assistant's turn begins and how it ends."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sft_job.data.template_subject import ANSWER, USER, Subject, TemplateReport, cut
from sft_job.errors import Problem

_NEXT_USER, _NEXT_ANSWER = "nextuserprobe", "nextanswerprobe"
# What opens and closes thoughts: <think>, </think>, [THINK], <|begin_of_thought|> and the like.
_THOUGHT = r"[<\[][^<>\[\]\s]*(?:think|thought|reason)[^<>\[\]\s]*[>\]]"
_THOUGHTS = re.compile(rf"\s*(?:{_THOUGHT}\s*)+", re.IGNORECASE)
_THOUGHTS_AT_END = re.compile(rf"(?:{_THOUGHT}\s*)+\Z", re.IGNORECASE)


@dataclass(frozen=True)
class _Shown:
    """Renderings of a user's message alone, with the generation prompt, with the answer, with one more turn.

    The last two are None where the template fails on them.
    """

    user: str
    prompt: str
    turn: str | None
    turns: str | None


def check_shape(subject: Subject, report: TemplateReport) -> None:
    """Compare small renderings with one another.

    Raises:
        TemplateFailure: the template fails on a conversation of one user message.
    """
    shown = _shown(subject)
    if _shows_messages(subject, shown, report):
        _check_beginning(subject, shown, report)
        _check_end(subject, shown, report)


def _shown(subject: Subject) -> _Shown:
    user = [{"role": "user", "content": USER}]
    turn = [*user, {"role": "assistant", "content": ANSWER}]
    more = [{"role": "user", "content": _NEXT_USER}, {"role": "assistant", "content": _NEXT_ANSWER}]
    # The generation prompt first: it is what a template must be able to write.
    prompt = subject.template.render([user], generation_prompt=True)[0]
    alone = subject.tried(user)
    return _Shown(prompt if alone is None else alone, prompt, subject.tried(turn), subject.tried([*turn, *more]))


def _shows_messages(subject: Subject, shown: _Shown, report: TemplateReport) -> bool:
    for probe, text, who in ((USER, shown.prompt, "user"), (ANSWER, shown.turn, "assistant")):
        if text is not None and probe not in text and probe in text.lower():
            return False  # letters are changed: the check on control tokens tells where that matters
        if text is not None and probe not in text:
            rule = f"does not show the {who}'s message: one that says {probe!r} is rendered as {cut(text)!r}"
            fix = "write message['content'] of every message into the rendering"
            report.problems.append(subject.problem(rule, fix, "content", "text", "value"))
            return False
    if shown.turn is not None:
        return True
    rule = "fails on a user's message and its answer"
    if subject.messages:
        report.problems.append(subject.problem(rule, "mend the template", "raise_exception"))
    else:
        report.warnings.append(f"the chat template {rule}: how a turn ends cannot be seen in it")
    return False


def _check_beginning(subject: Subject, shown: _Shown, report: TemplateReport) -> None:
    """The generation prompt is how an assistant's turn begins."""
    assert shown.turn is not None
    head, prompt = shown.turn[: shown.turn.index(ANSWER)], shown.prompt
    bare = _THOUGHTS_AT_END.sub("", prompt)
    if head.startswith(prompt):
        rest = head[len(prompt) :]
        if not rest.strip():
            report.found.append("an answer begins where the generation prompt ends")
        elif _THOUGHTS.fullmatch(rest):
            report.warnings.append(_thoughts_in_turn(subject, rest))
        elif prompt == shown.user:
            problem = _no_prompt(subject, rest)
            if subject.messages:  # the template renders the header, so that only inference misses it
                report.warnings.append(f"the chat template {problem.rule}")
            else:
                report.problems.append(problem)
        elif subject.messages:
            report.found.append(f"a turn is trained from {cut(rest)!r} on")
        else:
            report.warnings.append(_longer_head(rest))
    elif bare != prompt and head.startswith(bare) and not _THOUGHTS.sub("", head[len(bare) :]).strip():
        report.warnings.append(_thoughts_in_prompt(subject, prompt[len(bare) :]))
    else:
        report.problems.append(_other_head(subject, prompt, head))


def _no_prompt(subject: Subject, rest: str) -> Problem:
    rule = (
        "writes no generation prompt: with add_generation_prompt nothing follows the user's turn, but an assistant's "
        f"turn begins with {cut(rest)!r}"
    )
    opening = rest.replace("\n", "\\n")
    fix = f"end the template with {{% if add_generation_prompt %}}{{{{ '{opening}' }}}}{{% endif %}}"
    return subject.problem(rule, fix, "add_generation_prompt", "assistant")


def _other_head(subject: Subject, prompt: str, head: str) -> Problem:
    same = next((n for n, (a, b) in enumerate(zip(prompt, head, strict=False)) if a != b), min(len(prompt), len(head)))
    rule = (
        f"the generation prompt is not how an assistant's turn begins: behind {cut(prompt[:same], end=True)!r} the "
        f"generation prompt has {cut(prompt[same:])!r}, the turn {cut(head[same:])!r}"
    )
    return subject.problem(rule, "write the same in both places", "add_generation_prompt", "assistant")


def _thoughts_in_turn(subject: Subject, rest: str) -> str:
    if subject.messages:
        meaning = "it is not trained: at inference with thinking the model begins before it, where it learned nothing"
    else:
        meaning = "rows are prompt + response without it: responses that do not think train the model not to think"
    return f"the chat template writes {rest!r} between the generation prompt and an answer; {meaning}"


def _thoughts_in_prompt(subject: Subject, prefill: str) -> str:
    if subject.messages:
        meaning = "an answer without thoughts is trained without it, but at inference the model begins behind it"
    else:
        meaning = "responses are trained behind it, so they must begin inside the thoughts and close them themselves"
    return (
        f"the generation prompt ends with {prefill!r}, which the chat template leaves out before a finished answer; "
        f"{meaning} (some templates write none with data.apply_chat_template_kwargs.enable_thinking=false)"
    )


def _longer_head(rest: str) -> str:
    return (
        f"the chat template writes {cut(rest)!r} between the generation prompt and an answer: at inference the model "
        "must write it itself, but it is missing in rows of prompt + response, unless responses hold it"
    )


def _check_end(subject: Subject, shown: _Shown, report: TemplateReport) -> None:
    """A token that begins no turn follows every answer, once."""
    assert shown.turn is not None
    # Tokens that begin a turn: the first one of the generation prompt, the last one before a user's text.
    generation = shown.prompt.removeprefix(shown.user) if shown.prompt.startswith(shown.user) else ""
    before_user = shown.user[: shown.user.index(USER)] if USER in shown.user else ""
    openers = {*subject.controls(generation)[:1], *subject.controls(before_user)[-1:]}
    openers.discard(subject.tokenizer.eos_token_id)
    tail = shown.turn[shown.turn.index(ANSWER) + len(ANSWER) :]
    ends = subject.controls(tail)
    eot = "write the token that ends a turn behind the assistant's content"
    if not ends:
        report.warnings.append(
            f"the chat template ends an assistant's turn with no control token, only with {cut(tail)!r}; trained is "
            f"{subject.name(subject.stop_id)}: check that generation stops at it"
        )
        return
    if ends[0] in openers:
        rule = (
            f"behind an assistant's answer comes {subject.name(ends[0])}, which begins a turn: nothing ends the answer"
        )
        report.problems.append(subject.problem(rule, eot, "assistant", "content"))
        return
    if ends.count(ends[0]) > 1:
        rule = f"writes {subject.name(ends[0])} {ends.count(ends[0])} times behind an assistant's answer: {cut(tail)!r}"
        token = subject.text(ends[0])
        report.problems.append(subject.problem(rule, "write it once", token, "eos_token"))
        return
    text, _, behind = tail.partition(subject.text(ends[0]))
    second = next((token for token in ends[1:] if token not in openers), None)
    if second is not None and (between := behind.partition(subject.text(second))[0]).strip():
        report.warnings.append(
            f"the chat template writes {cut(between)!r} and {subject.name(second)} behind {subject.name(ends[0])}, "
            f"which ends an answer: neither is trained"
        )
    if text.strip():
        report.warnings.append(
            f"the chat template writes {cut(text)!r} between an answer and {subject.name(ends[0])}, which ends it"
        )
    if shown.turns is None or _NEXT_USER not in shown.turns or ANSWER not in shown.turns:
        return
    between = shown.turns[shown.turns.index(ANSWER) + len(ANSWER) : shown.turns.index(_NEXT_USER)]
    first = subject.controls(between)[:1]
    if not first or first[0] in openers:
        rule = (
            f"only the last answer is ended by {subject.name(ends[0])}: between an answer and the next user's text it "
            f"writes {cut(between)!r}"
        )
        if subject.messages:
            report.problems.append(subject.problem(rule, eot, subject.text(ends[0]), "eos_token", "loop.last"))
        else:
            report.warnings.append(f"the chat template: {rule}")
