from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sft_job.config.schema import JobConfig
from sft_job.data.columns import Unreadable, message_columns
from sft_job.data.conversation import Conversation, conversation, read_conversations

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


def columns() -> Any:
    data = JobConfig().data
    data.multiturn.enable = True
    return message_columns(data)


def read(messages: Any, tools: Any = None, thinking: Any = None, train_on: str = "all") -> Conversation:
    found = conversation(messages, tools, thinking, train_on=train_on)
    assert isinstance(found, Conversation), found
    return found


def refusal(messages: Any, tools: Any = None, thinking: Any = None) -> str:
    found = conversation(messages, tools, thinking)
    assert isinstance(found, Unreadable), found
    return found.reason


def test_structs_of_parquet_lose_their_nulls(tmp_path: Path) -> None:
    call = {"id": None, "type": "function", "function": {"name": "find", "arguments": {"q": "x", "other": None}}}
    rows = [
        [{**USER, "tool_calls": None}, {"role": "assistant", "content": None, "tool_calls": [call]}],
        [{**USER, "tool_calls": None}, {**ANSWER, "tool_calls": []}],
    ]
    tool = {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "required": None}}}
    table = pa.table({"messages": rows, "tools": [[tool], None], "enable_thinking": [True, None]})
    pq.write_table(table, tmp_path / "a.parquet")
    (batch,) = pq.read_table(tmp_path / "a.parquet").to_batches()
    first, second = read_conversations(batch, columns(), "all")
    assert first == Conversation(
        messages=[
            USER,
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": {"name": "find", "arguments": {"q": "x"}}}],
            },
        ],
        tools=[{"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}],
        enable_thinking=True,
        train=(False, True),
    )
    assert second == Conversation([USER, ANSWER], None, None, (False, True))


def test_json_says_the_same_as_structs() -> None:
    call = {"name": "find", "arguments": '{"q": "x", "n": null}'}
    text = json.dumps([USER, {"role": "assistant", "tool_calls": [call]}])
    tools = json.dumps([{"name": "find", "parameters": '{"type": "object"}'}])
    found = read(text, tools)
    assert found.messages[1]["tool_calls"] == [
        {"type": "function", "function": {"name": "find", "arguments": {"q": "x", "n": None}}}
    ]
    assert found.tools == [{"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}]
    # Each message and each tool as JSON of its own.
    assert read([json.dumps(USER), json.dumps(ANSWER)], [tools[1:-1]]).tools == found.tools


def test_files_without_tools_and_thinking() -> None:
    batch = pa.record_batch({"messages": [[USER, ANSWER]]})
    assert read_conversations(batch, columns(), "all") == [read([USER, ANSWER])]


def test_text_parts_are_joined_and_thoughts_have_one_name() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    for key in ("reasoning_content", "reasoning", "thinking"):
        found = read([USER, {"role": "assistant", "content": parts, key: "t"}])
        assert found.messages[1] == {"role": "assistant", "content": "ab", "reasoning_content": "t"}
    assert read([USER, {"role": "assistant", "content": None, "thinking": "t"}]).messages[1]["content"] == ""
    assert "reasoning_content" not in read([USER, {**ANSWER, "thinking": " \n"}]).messages[1]


@pytest.mark.parametrize(("flag", "trained"), [(0, False), (1, True), (0.0, False), (True, True), (None, True)])
@pytest.mark.parametrize("key", ["loss", "train", "weight", "loss_mask"])
def test_flags_choose_turns(key: str, flag: Any, trained: bool) -> None:
    found = read([USER, {**ANSWER, key: flag}, {**USER, key: 0}, ANSWER])
    assert found.train == (False, trained, False, True)
    assert all(key not in message for message in found.messages)


def test_a_flag_that_contradicts_train_on_last() -> None:
    found = conversation([ANSWER | {"weight": 1}, USER, ANSWER], train_on="last")
    assert isinstance(found, Unreadable)
    assert found.reason == (
        "messages[0] is flagged to be trained, but data.multiturn.train_on=last trains only messages[2]"
    )
    assert read([ANSWER, USER, ANSWER | {"weight": 1}], train_on="last").train == (False, False, True)


def test_the_last_turn_alone() -> None:
    assert read([ANSWER, USER, ANSWER, USER], train_on="last").train == (False, False, True, False)
    assert read([ANSWER, USER, ANSWER, USER]).train == (True, False, True, False)
    assert read([USER, ANSWER, USER, {**ANSWER, "loss": 0}], train_on="last").train == (False,) * 4
    assert read([USER]).train == (False,)


BAD: dict[str, tuple[Any, str]] = {
    "null": (None, "messages is null"),
    "empty": ([], "messages is empty"),
    "no list": ('{"role": "user"}', "messages is dict, expected a list"),
    "no json": ("[{", "messages is not valid JSON: "),
    "a number": ([3], "messages[0] is int, expected a mapping"),
    "role": ([{"role": "human", "content": "q"}], "messages[0].role is 'human', expected one of system, developer"),
    "no role": ([{"content": "q"}], "messages[0].role is None"),
    "null content": ([USER, {"role": "assistant", "content": None}], "messages[1].content is null"),
    "image": (
        [{"role": "user", "content": [{"type": "image", "url": "x"}]}],
        "messages[0].content[0] is a part of type 'image', expected a text part",
    ),
    "number content": ([{"role": "user", "content": 3}], "messages[0].content is int, expected text"),
    "weight": ([USER, {**ANSWER, "weight": 0.5}], "messages[1].weight is 0.5, expected 0, 1, true or false"),
    "flags": ([USER, {**ANSWER, "weight": 1, "loss": False}], "messages[1] has loss and weight, which contradict"),
    "user flag": ([{**USER, "train": 1}, ANSWER], "messages[0] is flagged to be trained, but its role is user"),
    "thoughts": ([USER, {**ANSWER, "thinking": "a", "reasoning": "b"}], "reasoning and thinking, which differ"),
    "arguments": (
        [USER, {**ANSWER, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
        "messages[1].tool_calls[0].function.arguments is not valid JSON",
    ),
    "argument list": (
        [USER, {**ANSWER, "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}],
        "messages[1].tool_calls[0].function.arguments is list, expected a mapping",
    ),
    "no name": ([USER, {**ANSWER, "tool_calls": [{"function": {"arguments": {}}}]}], "has no function name"),
    "surrogate": ('[{"role": "user", "content": "\\ud800"}]', "holds half of a surrogate pair"),
}


@pytest.mark.parametrize("name", BAD)
def test_rows_that_are_no_conversations(name: str) -> None:
    messages, reason = BAD[name]
    assert reason in refusal(messages)


def test_tools_and_thinking_that_cannot_be_read() -> None:
    assert refusal([USER, ANSWER], "3") == "tools is int, expected a list"
    assert refusal([USER, ANSWER], [{"type": "retrieval"}]) == "tools[0] describes no function: it has type"
    assert refusal([USER, ANSWER], None, 2) == "enable_thinking is 2, expected true or false"
    assert refusal([USER, ANSWER], None, Unreadable("no UTF-8")) == "no UTF-8"
    assert read([USER, ANSWER], "[]", 1) == Conversation([USER, ANSWER], None, True, (False, True))


def nested(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels - 1):
        value = {"a": value}
    return value


def call_with(arguments: Any) -> list[dict[str, Any]]:
    return [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]


@pytest.mark.parametrize("levels", [101, 600, 100_000])
def test_what_is_nested_too_deeply_is_refused(levels: int) -> None:
    path = "messages[1].tool_calls[0].function.arguments"
    text = '{"a":' * (levels - 1) + "{}" + "}" * (levels - 1)
    assert refusal(call_with(text)) == f"{path} is nested deeper than 100 levels"
    assert refusal(call_with(nested(levels))) == "messages is nested deeper than 100 levels"
    tool = {"name": "f", "parameters": text}
    assert refusal([USER, ANSWER], [tool]) == "tools[0].function.parameters is nested deeper than 100 levels"
    assert refusal([USER, ANSWER], "[" * levels + "]" * levels) == "tools is nested deeper than 100 levels"
    assert refusal("[" * levels + "]" * levels) == "messages is nested deeper than 100 levels"


def test_what_is_nested_just_deeply_enough_is_read() -> None:
    found = read(call_with(json.dumps(nested(100))))
    assert found.messages[1]["tool_calls"][0]["function"]["arguments"] == nested(100)


@pytest.mark.parametrize(
    ("text", "example"),
    [
        ('{"q": 1.5, "n": [-3, 0, 12345678901234567890, true], "t": "1.10"}', ""),
        ('{"q": 1.10, "z": 1e5}', "1.10 becomes 1.1"),
        ('{"z": 1e5}', "1e5 becomes 100000.0"),
        ('{"z": -0}', "-0 becomes 0"),
        ('{"z": 0.1000000000000000055}', "0.1000000000000000055 becomes 0.1"),
        ('{"a": {"b": 1, "b": 2}}', "of several 'b' in one mapping the last is kept"),
    ],
)
def test_json_that_is_written_again_in_other_words(text: str, example: str) -> None:
    assert read(call_with(text)).rewritten == example
    assert read(json.dumps(call_with(text))).rewritten == example
    assert read([USER, ANSWER], [{"name": "f", "parameters": text}]).rewritten == example
