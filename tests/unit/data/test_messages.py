from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sft_job.contract import ExitCode
from sft_job.data.chat import TemplateFailure
from sft_job.data.conversation import Conversation, conversation
from sft_job.data.faults import Fault
from sft_job.data.messages import MessageRenderer, Rejected
from sft_job.data.messages import _Row as Row
from sft_job.data.render import PromptResponseRenderer, Rendered
from sft_job.errors import ProblemsError
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
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
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


def with_template(family: str, template: str | None, **options: Any) -> MessageRenderer:
    tokenizer = family_tokenizer(family)
    tokenizer.chat_template = None
    return MessageRenderer(tokenizer, chat_template=template, **options)


def template_of(family: str) -> str:
    return (FOLDER / f"{family}.jinja").read_text(encoding="utf-8")


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ways_of_proof_agree(family: str) -> None:
    """What the prefixes prove is what the replaced texts prove."""
    subject = renderer(family)
    both = 0
    for messages, tools in CASES.values():
        chat = subject._chat(read(messages, tools))
        try:
            (text,) = subject.template.render([chat.messages], tools=[chat.tools])
        except TemplateFailure:
            continue
        (located,) = subject._locate([Row(chat, text)])
        assert located is not None
        for number in chat.trained:
            one = subject._finder._located(chat, number, text, located)
            other = subject._finder._between_prefixes(chat, number, text)
            both += one is not None and other is not None
            assert one is None or other is None or one == other
    # Where the template has no generation prompt, prefixes do not tell a header from an answer.
    assert both >= (0 if family == "chatml_no_prompt" else 3)


@pytest.mark.parametrize("family", ["chatml_no_prompt", "gemma", "phi", "olmo", "command", "llama3"])
@pytest.mark.parametrize("answer", ["Hello.", "\n\nHello", "  Hello", "", "e\u0301 🌳"])
def test_ids_of_a_turn_are_those_of_inference(family: str, answer: str) -> None:
    """Prompt ids, then the ids of the answer by itself, then the end of the turn."""
    subject, single = renderer(family), PromptResponseRenderer(family_tokenizer(family))
    (row,) = subject.render([read([user("Hi"), assistant(answer)])])
    assert isinstance(row, Rendered)
    shown = answer.strip() if family in ("gemma", "llama3") else answer
    if family in ("chatml_no_prompt", "command"):  # there the prompt lacks what comes before the answer
        assert trained(subject, row)[0].replace("<|START_RESPONSE|>", "").startswith(shown)
        return
    (expected,) = single.render(["Hi"], [shown])
    assert row.ids[: len(expected.ids)] == expected.ids
    assert row.spans == expected.spans


def test_generation_blocks_say_what_is_trained() -> None:
    template = (
        template_of("chatml_generation")
        .replace("{{- message.content }}", "")
        .replace("{%- endgeneration %}", "{%- endgeneration %}{{- message.content }}")
    )
    subject = with_template("chatml_generation", template)
    chat = read([user("a"), assistant("b", reasoning_content="think"), user("c"), assistant("d")])
    (row,) = subject.render([chat])
    assert isinstance(row, Rendered)
    # The contents stand outside of the blocks, and so do the ends of the turns: blocks that hold less do not count.
    assert trained(subject, row) == ["<think>\nthink\n</think>\n\nb<|im_end|>", "d<|im_end|>"]


def test_blocks_of_rewritten_content() -> None:
    """Replacing texts proves nothing where the template rewrites them; the blocks and prefixes still do."""
    rewritten = "message.content | replace('a', 'o')"
    chat = read([user("x"), assistant("a cat")])
    template = template_of("chatml_generation").replace("{{- message.content }}", f"{{{{- {rewritten} }}}}")
    in_blocks = with_template("chatml_generation", template)
    (row,) = in_blocks.render([chat])
    assert isinstance(row, Rendered)
    assert trained(in_blocks, row) == ["o cot<|im_end|>"]
    by_prefixes = with_template("phi", template_of("phi").replace("message.content", f"({rewritten})"))
    (row,) = by_prefixes.render([read([user("x"), assistant("a cat"), user("y"), assistant("b")])])
    assert isinstance(row, Rejected)
    assert row.fault is Fault.NOT_PROVED
    assert row.reason.startswith("messages[1]: neither generation blocks nor")
    by_prefixes = with_template("gemma", template_of("gemma").replace("message.content |", f"{rewritten} |"))
    (row,) = by_prefixes.render([chat])
    assert isinstance(row, Rendered)
    assert trained(by_prefixes, row) == ["o cot<end_of_turn>"]


def test_a_turn_that_quotes_another_message_is_proved_otherwise() -> None:
    quoting = template_of("chatml_no_prompt").replace(
        "message.content +",
        "(message.reasoning_content or '') + (messages[0].content if not loop.first else '') + message.content +",
    )
    chat = read([user("x"), assistant("b", reasoning_content="t")])
    (row,) = with_template("chatml_no_prompt", quoting).render([chat])
    assert isinstance(row, Rejected)


def test_a_blank_content_behind_thoughts_belongs_to_the_turn() -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.tool_calls or [] %}"
        "{{ c.function.name }}{% endfor %}{% if m.thinking %}{{ m.thinking }}<|im_end|>\n<|im_start|>"
        "final\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    subject = with_template("chatml", template)
    (row,) = subject.render([read([user("x"), assistant("", call({}), reasoning_content="t")])])
    assert isinstance(row, Rendered)
    assert trained(subject, row) == ["findt<|im_end|>\n<|im_start|>final\n<|im_end|>"]


def test_thinking_is_switched_row_by_row_and_by_the_config() -> None:
    messages = [user("a"), assistant("b")]
    subject = renderer("qwen3")
    on, off = subject.render([read(messages, None, True), read(messages, None, False)])
    assert isinstance(on, Rendered)
    assert isinstance(off, Rendered)
    assert trained(subject, on) == trained(subject, off) == ["b<|im_end|>"]
    template = "{{ 'on ' if enable_thinking else 'off ' }}" + template_of("chatml_no_prompt")
    subject = with_template("chatml_no_prompt", template, template_kwargs={"enable_thinking": True})
    chats = [read(messages, None, thinking) for thinking in (None, False, True, None)]
    texts = [subject._tokenizer.decode(row.ids) for row in subject.render(chats) if isinstance(row, Rendered)]
    assert [text.split()[0] for text in texts] == ["on", "off", "on", "on"]


def test_turns_that_are_not_trained() -> None:
    subject = renderer("llama3")
    chat = read([user("a"), assistant("b", loss=0), user("c"), assistant("d"), user("e")])
    last = read([user("a"), assistant("b"), user("c"), assistant("d")], train_on="last")
    none = read([user("a")])
    first, second, third = subject.render([chat, last, none])
    assert isinstance(first, Rendered)
    assert isinstance(second, Rendered)
    assert isinstance(third, Rendered)
    assert trained(subject, first) == trained(subject, second) == ["d<|eot_id|>"]
    assert third.num_targets == 0


def test_a_row_that_is_refused_leaves_the_others_alone() -> None:
    subject = renderer("gemma")
    good = read([user("a"), assistant("b")])
    rows = subject.render([good, read([assistant("x")]), good])
    assert rows[0] == rows[2] == subject.render([good])[0]
    assert rows[1] == Rejected(
        Fault.NOT_RENDERED, "TemplateError: Conversation roles must alternate user/assistant/user/assistant/..."
    )


def test_control_tokens_that_are_allowed_act() -> None:
    chat = read([user("a <end_of_turn>"), assistant("b <end_of_turn> c")])
    (plain,) = renderer("gemma").render([chat])
    assert isinstance(plain, Rendered)
    subject = renderer("gemma", allow=True)
    (row,) = subject.render([chat])
    assert isinstance(row, Rendered)
    end = subject.end_of_turn_id
    assert (plain.ids.count(end), row.ids.count(end)) == (2, 4)
    assert trained(subject, row) == ["b <end_of_turn> c<end_of_turn>"]
    assert (plain.control_tokens, row.control_tokens) == (("<end_of_turn>",), ())


def test_of_two_bos_tokens_one_is_kept() -> None:
    twice = with_template("gemma", "{{ bos_token }}" + template_of("gemma"))
    chat = read([user("a"), assistant("b")])
    assert twice.render([chat]) == renderer("gemma").render([chat])


@pytest.mark.parametrize(
    ("template", "rule"),
    [
        (None, "conversations need a chat template, and the tokenizer has none"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "ends an assistant's turn with no control token"),
        (
            "{{ raise_exception('no answers') }}",
            "fails on a conversation of a question and an answer: TemplateError",
        ),
    ],
)
def test_templates_that_cannot_be_used(template: str | None, rule: str) -> None:
    with pytest.raises(ProblemsError) as raised:
        with_template("gemma", template)
    (problem,) = raised.value.problems
    assert problem.code is ExitCode.CONFIG
    assert rule in problem.rule


def test_notes_tell_of_ends_and_arguments() -> None:
    assert renderer("harmony").notes == ["the assistant's turns end with '<|return|>' or '<|end|>' or '<|call|>'"]
    assert "JSON text" in renderer("deepseek_r1").notes[1]
    assert renderer("command").stop_ids == [renderer("command")._tokenizer.eos_token_id]
