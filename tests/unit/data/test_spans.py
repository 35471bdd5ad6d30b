from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sft_job.data.conversation import Conversation
from sft_job.data.counts import FileCounts, hidden_thoughts_note
from sft_job.data.messages import Rejected
from sft_job.data.render import Rendered
from sft_job.data.template_check import TemplateReport, message_subject, self_test
from tests.unit.data.families import FAMILIES, family_tokenizer
from tests.unit.data.test_messages import (
    TOOLS,
    assistant,
    call,
    conversations,
    read,
    renderer,
    tool,
    trained,
    user,
    with_template,
)

# A generation prompt that begins thoughts where the system's message asks for them.
SWITCHED = (
    "{% set on = messages and '/think' in messages[0].content %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{{ '<think>\n' if on }}{% endif %}"
)


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def trained_by(template: str, *chats: Conversation, family: str = "qwen3") -> list[list[str] | str]:
    """What is trained of each conversation, or why it is rejected; by one new renderer."""
    subject = with_template(family, template)
    return [row.reason if isinstance(row, Rejected) else trained(subject, row) for row in subject.render(chats)]


def test_a_prompt_that_depends_on_the_systems_message() -> None:
    on, off = (read([system(text), user("q"), assistant("a", reasoning_content="t")]) for text in ("x /think", "x"))
    expected = [["t\n</think>\n\na<|im_end|>"], ["<think>\nt\n</think>\n\na<|im_end|>"]]
    assert trained_by(SWITCHED, on, off) == expected
    assert trained_by(SWITCHED, off, on) == expected[::-1]


def test_a_prompt_that_depends_on_tools() -> None:
    template = SWITCHED.replace("{% set on = messages and '/think' in messages[0].content %}", "{% set on = tools %}")
    others = [{"type": "function", "function": {"name": "other", "parameters": {}}}]
    template = template.replace("{% set on = tools %}", "{% set on = tools and tools[0].function.name == 'find' %}")
    chats = [read([user("q"), assistant("a", reasoning_content="t")], tools) for tools in (TOOLS, others)]
    assert trained_by(template, *chats) == trained_by(template, *chats[::-1])[::-1]
    assert trained_by(template, *chats)[0] == ["t\n</think>\n\na<|im_end|>"]


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(drawn=st.lists(conversations(), min_size=2, max_size=4))
def test_rows_do_not_depend_on_the_rows_before_them(family: str, drawn: Sequence[tuple[Any, Any, Any]]) -> None:
    chats = [read(*each) for each in drawn]
    subject = renderer(family)
    there = subject.render(chats)
    subject._finder._prompts._lengths.clear()
    back = [subject.render([chat])[0] for chat in reversed(chats)]
    singly = []
    for chat in chats:
        subject._finder._prompts._lengths.clear()
        singly += subject.render([chat])
    assert there == back[::-1] == singly


RATED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>{{ '\nRate this: <|endoftext|>' if m.role == 'assistant' }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_turn_ends_before_text_of_the_template() -> None:
    plain = read([user("q"), assistant("one"), user("q"), assistant("two")])
    with_calls = read([user("q"), assistant("", call({})), tool("r"), assistant("two")], TOOLS)
    assert with_template("qwen3", RATED).turns.stops == ("<|im_end|>",)
    assert trained_by(RATED, plain, with_calls) == [
        ["one<|im_end|>", "two<|im_end|>"],
        ['<tool_call>{"name": "find", "arguments": {}}</tool_call><|im_end|>', "two<|im_end|>"],
    ]
    (warning,) = (each for each in shape_of(RATED).warnings if "Rate this" in each)
    assert "behind '<|im_end|>'" in warning
    assert "'<|endoftext|>'" in warning


def test_two_ends_side_by_side_are_both_trained_and_named() -> None:
    (note,) = (each for each in renderer("command").notes if "every answer" in each)
    assert "'<|END_RESPONSE|>' and '<|END_OF_TURN_TOKEN|>'" in note
    both = "'<|endoftext|>' if loop.last and m.role == 'assistant'"
    last_only = RATED.replace("'\nRate this: <|endoftext|>' if m.role == 'assistant'", both)
    chat = read([user("q"), assistant("one"), user("q"), assistant("two")])
    assert trained_by(last_only, chat) == [["one<|im_end|>", "two<|im_end|>"]]


def shape_of(template: str) -> TemplateReport:
    subject = message_subject(family_tokenizer("qwen3"), Path(), chat_template=template)
    return self_test(subject)


CALLS = "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
BLOCKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' CONDITION %}{% generation %}"
    "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    + CALLS
    + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHOWN_CALL = '<tool_call>{"name": "find", "arguments": {}}</tool_call>'


@pytest.mark.parametrize("condition", ["", "and loop.last"])
@pytest.mark.parametrize("content", ["I look.", ""])
def test_generation_blocks_that_hold_less_than_the_turn(condition: str, content: str) -> None:
    chat = read([user("q"), assistant(content, call({})), tool("r"), assistant("two")], TOOLS)
    expected = [[f"{content}{SHOWN_CALL}<|im_end|>", "two<|im_end|>"]]
    assert trained_by(BLOCKS.replace("CONDITION", condition), chat) == expected


def test_a_generation_block_that_holds_less_and_nothing_else_proves_the_turn() -> None:
    template = BLOCKS.replace("CONDITION", "and loop.last").replace("m.content", "m.content | upper")
    chat = read([user("q"), assistant("one"), user("q"), assistant("two")])
    (reason,) = trained_by(template.replace("<|im_start|>{{", "{{ messages | length }}<|im_start|>{{"), chat)
    assert reason.startswith("messages[1]: the template's generation block does not hold the whole turn")


@pytest.mark.parametrize(
    ("template", "message", "what"),
    [
        (SWITCHED, assistant("I look.", call({})), "all its tool calls"),
        (SWITCHED, assistant("", call({})), "all its tool calls"),
        (BLOCKS.replace("CONDITION", "and not m.tool_calls"), assistant("x", call({})), ""),
        (
            BLOCKS.replace("CONDITION", "and not m.tool_calls").replace(
                "{% else %}{{ m.content }}", "{% elif not m.tool_calls %}{{ m.content }}"
            ),
            assistant("I look.", call({})),
            "its content",
        ),
        (SWITCHED.replace("m.content", "m.content.split('</think>')[-1]"), assistant("<think>a</think>b"), ""),
    ],
)
def test_what_the_template_does_not_show_of_a_trained_turn(template: str, message: dict[str, Any], what: str) -> None:
    (found,) = trained_by(template, read([user("q"), message], TOOLS))
    assert found == f"messages[1]: the template does not show {what}" if what else isinstance(found, list)
    untrained = read([user("q"), {**message, "loss": 0}, user("r"), assistant("b")], TOOLS)
    assert trained_by(template, untrained) == [["b<|im_end|>"]]


def test_empty_thoughts_of_the_assistant_itself_stay() -> None:
    # The template rewrites contents, so that only prefixes prove the turn.
    template = SWITCHED.replace("m.content }}", "m.content | replace('city', 'town') }}")
    chat = read([user("q"), assistant("<reasoning></reasoning>\nthe city")])
    (found,) = trained_by(template, chat)
    assert found == ["<reasoning></reasoning>\nthe town<|im_end|>"] or isinstance(found, str)


def test_a_text_that_looks_like_a_mark() -> None:
    chat = read([system("zq9field0z zq10field1z"), user("zq9field7z"), assistant("a zq9field1z")])
    assert trained_by(SWITCHED, chat) == [["a zq9field1z<|im_end|>"]]
    (row,) = renderer("harmony").render([read([user("zq9field0z"), assistant("b"), user("c"), assistant("d")])])
    assert not isinstance(row, Rejected)


def test_thoughts_that_are_not_shown_are_noted() -> None:
    chat = [user("q"), assistant("a", reasoning_content="t")]
    rows = renderer("chatml").render([read(chat), read([user("q"), assistant("a")])])
    rows += renderer("qwen3").render([read(chat)])
    assert [isinstance(row, Rendered) and row.hides_thoughts for row in rows] == [True, False, False]
    assert hidden_thoughts_note(FileCounts()) is None
    assert "in 2 rows" in str(hidden_thoughts_note(FileCounts(rows_with_hidden_thoughts=2)))
