from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sft_job.data.conversation import Conversation, conversation
from sft_job.data.messages import MessageRenderer, Rejected
from sft_job.data.render import Rendered
from tests.unit.data.families import FAMILIES, FOLDER, family_tokenizer

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "find",
            "description": "Finds <|im_end|> places",
            "parameters": {"type": "object", "properties": {"q": {"type": "string"}}},
        },
    }
]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None, *calls: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **({"tool_calls": list(calls)} if calls else {}), **more}


def tool(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text, "name": "find"}


def call(arguments: Any, name: str = "find") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


CASES: dict[str, tuple[list[dict[str, Any]], Any]] = {
    "plain": ([user("Hi"), assistant("Hello."), user("More?"), assistant("  Yes\n")], None),
    "system": ([{"role": "system", "content": "Be brief."}, user("Hi"), assistant("Hello.")], None),
    "tools": ([user("Where?"), assistant("", call({"q": "Grüße"})), tool("in Rome"), assistant("Rome.")], TOOLS),
    "json string arguments": (
        [user("Where?"), assistant(None, call('{"q": "a \\"b\\"", "n": [1, null]}')), tool("Rome"), assistant("x")],
        json.dumps(TOOLS),
    ),
    "consecutive tool messages": (
        [
            user("Where?"),
            assistant("I look.", call({"q": "a"}), call({"q": "b"})),
            tool("1"),
            tool("2"),
            assistant("Both."),
        ],
        TOOLS,
    ),
    "reasoning": (
        [
            user("1+1"),
            assistant("2", reasoning_content="one\nand one"),
            user("2+2"),
            assistant("4", reasoning_content="two and two"),
        ],
        None,
    ),
    "reasoning in the content": (
        [user("1+1"), assistant("<think>\none\n</think>\n\n2"), user("2+2"), assistant("<think>\ntwo\n</think>\n\n4")],
        None,
    ),
    "reasoning and tools": (
        [
            user("q"),
            assistant("", call({}), reasoning_content="look"),
            tool("r"),
            assistant("done", reasoning_content="ok"),
        ],
        TOOLS,
    ),
    "empty content": ([user("Hi"), assistant(""), user(""), assistant("x")], None),
    "unicode": ([user("Zdravím 🌳"), assistant("日本語 ✓\u200d🌳e\u0301")], None),
    "control tokens": (
        [
            user("<|im_end|>\n<|im_start|>assistant\nhm </s> <end_of_turn> <｜User｜>"),
            assistant(
                "Say <|im_end|>, <|eot_id|></s><|end|> or <end_of_turn>\n<|im_start|>user\n<|END_OF_TURN_TOKEN|>"
            ),
        ],
        None,
    ),
    "line breaks": ([user("Hi\n"), assistant("\n\nHello"), user("\nx"), assistant(" blank ")], None),
    "assistant first": ([assistant("Welcome."), user("Hi"), assistant("Hello.")], None),
}


@cache
def renderer(family: str, **options: Any) -> MessageRenderer:
    allow = options.pop("allow", False)
    return MessageRenderer(family_tokenizer(family, **options), allow_control_tokens=allow)


def trained(subject: MessageRenderer, row: Rendered) -> list[str]:
    return [subject._tokenizer.decode(row.ids[start:end]) for start, end in row.spans]


def read(messages: Any, tools: Any = None, thinking: Any = None, train_on: str = "all") -> Conversation:
    found = conversation(messages, tools, thinking, train_on=train_on)
    assert isinstance(found, Conversation), found
    return found


def expected(family: str, chat: Conversation) -> list[str]:
    return [FAMILIES[family].turn(chat.messages, number) for number, flag in enumerate(chat.train) if flag]


@pytest.mark.parametrize("family", FAMILIES)
def test_golden_conversations(family: str) -> None:
    golden = json.loads((FOLDER / "expected.json").read_text(encoding="utf-8"))[family]
    subject = renderer(family)
    chats = [read(*case) for case in CASES.values()]
    found: dict[str, Any] = {}
    for name, chat, row in zip(CASES, chats, subject.render(chats), strict=True):
        if isinstance(row, Rejected):
            found[name] = {"rejected": row.reason}
            continue
        found[name] = {"text": subject._tokenizer.decode(row.ids), "trained": trained(subject, row)}
        assert found[name]["trained"] == expected(family, chat), name
    assert found == golden


# What makes templates and tokenizers stumble: blanks at the ends, tags, control tokens, characters of several bytes.
PIECES = st.sampled_from(
    [
        *("a", "the city", "{", '"', "\n", " ", "\n\n", "  ", "é", "🌳", "日本", "\t", "assistant", "user\n", "."),
        *(
            "<think>",
            "</think>",
            "<think>\nso\n</think>\n\n",
            "<tool_response>",
            "<|im_end|>",
            "<|im_start|>assistant\n",
        ),
        *(
            "</s>",
            "[/INST]",
            "<end_of_turn>",
            "<|end|>",
            "<|assistant|>",
            "<|eot_id|>",
            "<｜Assistant｜>",
            "<|return|>",
        ),
        *("<|END_RESPONSE|>", "<|endoftext|>", "<", "|>", "q0plaintext0q", "zq9field0z", "final", "{{ x }}"),
    ]
)
TEXTS = st.one_of(st.lists(PIECES, max_size=6).map("".join), st.text(max_size=8, alphabet=st.characters(codec="utf-8")))
FILLED = TEXTS.filter(lambda text: bool(text.strip()))
CALLS = st.builds(
    call,
    st.dictionaries(
        st.sampled_from("qrs"), st.one_of(TEXTS, st.integers(0, 9), st.none(), st.lists(TEXTS)), max_size=2
    ),
    st.sampled_from(["find", "assistant", "a"]),
)


@st.composite
def conversations(draw: st.DrawFn) -> tuple[list[dict[str, Any]], Any, Any]:
    messages: list[dict[str, Any]] = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(TEXTS)})
    with_tools = draw(st.booleans())
    for _ in range(draw(st.integers(1, 3))):
        messages.append(user(draw(TEXTS)))
        while draw(st.booleans()) and with_tools:
            calls = draw(st.lists(CALLS, min_size=1, max_size=2))
            messages.append(assistant(draw(st.one_of(st.just(""), TEXTS)), *calls, **draw_thoughts(draw)))
            messages += [tool(draw(TEXTS)) for _ in calls]
        messages.append(assistant(draw(TEXTS), **draw_thoughts(draw)))
    return messages, TOOLS if with_tools else None, draw(st.sampled_from([None, None, True, False]))


def draw_thoughts(draw: st.DrawFn) -> dict[str, str]:
    return {"reasoning_content": draw(FILLED)} if draw(st.integers(0, 2)) == 0 else {}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("blanks", [False, True], ids=["exact", "blanks"])
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(drawn=conversations())
def test_what_is_trained_is_the_assistants_or_the_row_is_rejected(
    family: str, blanks: bool, drawn: tuple[list[dict[str, Any]], Any, Any]
) -> None:
    # Offsets without blanks, as Llama's tokenizer has them; Phi's control tokens take the blanks behind them along.
    subject = renderer(family, trim_offsets=blanks, rstrip=blanks and family == "phi")
    chat = read(*drawn)
    (row,) = subject.render([chat])
    if not isinstance(row, Rejected):
        assert trained(subject, row) == expected(family, chat)
