"""Conversations as parquet files hold them: lists of structs or JSON strings become messages for a chat template.

A row has a column of messages and, where there are such columns, one of tools and one that switches thinking. Structs
of parquet hold every key of every row, null where a row has none: keys that are null are left out. Free of torch and
transformers.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from sft_job.data.columns import Column, Unreadable, python_values

# Counted up with every change that gives other ids or other spans for the same conversation.
VERSION = 2
ROLES = ("system", "developer", "user", "assistant", "tool")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
FLAGS = ("loss", "train", "weight", "loss_mask")
# Strings in JSON may name halves of a pair, which no tokenizer takes.
_ESCAPED_SURROGATE = ("\\ud", "\\uD")
# Templates, encoders and Python itself work on nested values by recursion, several calls for each level.
MOST_LEVELS = 100
_TOO_DEEP = f"is nested deeper than {MOST_LEVELS} levels"

Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """One row.

    Attributes:
        messages: each with ``role`` and a text as ``content``; an assistant's thoughts as ``reasoning_content``, its
            ``tool_calls`` each as ``{"type": "function", "function": {"name": ..., "arguments": {...}}}``.
        tools: descriptions, each as ``{"type": "function", "function": {...}}``; None = no tools.
        enable_thinking: None = the row does not say.
        train: for each message, whether it is trained; only an assistant's can be.
        rewritten: an example of what JSON in the row says in other words than a template will write; empty = none.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    enable_thinking: bool | None
    train: tuple[bool, ...]
    rewritten: str = ""


class _Rewritten:
    """Notices what JSON says that is lost when it is read and written again, as templates do with arguments.

    Attributes:
        example: the first such thing; empty = nothing is lost.
    """

    def __init__(self) -> None:
        self.example = ""

    def loads(self, text: str) -> Any:
        """As ``json.loads``."""
        return json.loads(text, parse_float=self._float, parse_int=self._int, object_pairs_hook=self._pairs)

    def _float(self, text: str) -> float:
        value = float(text)
        self._compare(text, repr(value))  # as json.dumps writes it
        return value

    def _int(self, text: str) -> int:
        value = int(text)
        self._compare(text, str(value))
        return value

    def _compare(self, text: str, written: str) -> None:
        if text != written and not self.example:
            self.example = f"{text[:40]} becomes {written[:40]}"

    def _pairs(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs) and not self.example:
            twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            self.example = f"of several {twice[:40]!r} in one mapping the last is kept"
        return found


class _RowError(Exception):
    """Why a row is no conversation."""


def read_conversations(
    batch: pa.RecordBatch, columns: Sequence[Column], train_on: str
) -> list[Conversation | Unreadable]:
    """One conversation a row.

    Args:
        batch: holds the column of messages; those of tools and thinking may be missing.
        columns: of messages, tools and thinking, as ``columns.message_columns`` gives them.
        train_on: ``all`` or ``last``: which of the assistant's turns are trained.
    """
    cells = [
        python_values(batch.column(column.name)) if column.name in batch.schema.names else [None] * batch.num_rows
        for column in columns
    ]
    return [conversation(*row, train_on=train_on) for row in zip(*cells, strict=True)]


def conversation(
    messages: Any, tools: Any = None, enable_thinking: Any = None, *, train_on: str = "all"
) -> Conversation | Unreadable:
    """The conversation in the cells of a row, or an ``Unreadable`` that says why there is none.

    Args:
        messages: a list of mappings, or JSON of one.
        tools: the same, or None.
        enable_thinking: a truth value or None.
        train_on: ``all`` or ``last``.
    """
    unreadable = next((cell for cell in (messages, tools, enable_thinking) if isinstance(cell, Unreadable)), None)
    if unreadable:
        return unreadable
    seen = _Rewritten()
    try:
        _check_depth(messages, "messages")
        _check_depth(tools, "tools")
        entries = _entries(without_nulls(messages), "messages", seen)
        if not entries:
            raise _RowError("messages is empty" if messages is not None else "messages is null")
        read = [_message(entry, f"messages[{number}]", seen) for number, entry in enumerate(entries)]
        flags = [flag for _, flag in read]
        found = [message for message, _ in read]
        return Conversation(
            found,
            _tools(without_nulls(tools), seen),
            _thinking(enable_thinking),
            _trained(found, flags, train_on),
            seen.example,
        )
    except _RowError as error:
        return Unreadable(str(error))
    except RecursionError:
        return Unreadable(f"the row {_TOO_DEEP}")


def _trained(messages: Sequence[Message], flags: Sequence[bool | None], train_on: str) -> tuple[bool, ...]:
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    chosen = set(turns[-1:] if train_on == "last" else turns)
    for number, flag in enumerate(flags):
        if flag and messages[number]["role"] != "assistant":
            role = messages[number]["role"]
            raise _RowError(f"messages[{number}] is flagged to be trained, but its role is {role}, not assistant")
        if flag and number not in chosen:
            raise _RowError(
                f"messages[{number}] is flagged to be trained, but data.multiturn.train_on=last trains only "
                f"messages[{turns[-1]}]"
            )
    return tuple(number in chosen and flag is not False for number, flag in enumerate(flags))


def _message(entry: Any, path: str, seen: _Rewritten) -> tuple[Message, bool | None]:
    """The message, and what its flags say."""
    message = _mapping(entry, path, seen)
    flag = _flag(message, path)
    role = message.get("role")
    if role not in ROLES:
        raise _RowError(f"{path}.role is {_shown(role)}, expected one of {', '.join(ROLES)}")
    reasoning = _reasoning(message, path) if role == "assistant" else None
    calls = _entries(message.pop("tool_calls", None), f"{path}.tool_calls", seen) if role == "assistant" else []
    found: Message = {**message, "role": role}
    if calls:
        found["tool_calls"] = [_call(call, f"{path}.tool_calls[{n}]", seen) for n, call in enumerate(calls)]
    if reasoning and reasoning.strip():
        found["reasoning_content"] = reasoning
    content = message.get("content")
    if content is None:
        if "tool_calls" not in found and not reasoning:
            raise _RowError(f"{path}.content is null")
        found["content"] = ""
    else:
        found["content"] = _text(content, f"{path}.content")
    return found, flag


def _text(content: Any, path: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _RowError(f"{path} is {type(content).__name__}, expected text or a list of text parts")
    texts: list[str] = []
    for number, part in enumerate(content):
        if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
            continue
        kind = repr(part.get("type")) if isinstance(part, dict) else type(part).__name__
        raise _RowError(f"{path}[{number}] is a part of type {kind}, expected a text part")
    return "".join(texts)


def _reasoning(message: Message, path: str) -> str | None:
    values = {key: message.pop(key) for key in REASONING_KEYS if key in message}
    if len(set(map(str, values.values()))) > 1:
        raise _RowError(f"{path} has {' and '.join(values)}, which differ")
    for key, value in values.items():
        return _text(value, f"{path}.{key}")
    return None


def _flag(message: Message, path: str) -> bool | None:
    """What the message's flags say about training on it; they are taken out of it."""
    found: dict[str, bool] = {}
    for key in FLAGS:
        if key not in message:
            continue
        value = message.pop(key)
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise _RowError(f"{path}.{key} is {_shown(value)}, expected 0, 1, true or false")
        found[key] = bool(value)
    if len(set(found.values())) > 1:
        raise _RowError(f"{path} has {' and '.join(found)}, which contradict each other")
    return next(iter(found.values()), None)


def _call(entry: Any, path: str, seen: _Rewritten) -> dict[str, Any]:
    call = _mapping(entry, path, seen)
    function = _mapping(call["function"], f"{path}.function", seen) if "function" in call else call
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise _RowError(f"{path} has no function name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _json(arguments, f"{path}.function.arguments", seen) if arguments.strip() else {}
    if not isinstance(arguments, dict):
        kind = type(arguments).__name__
        raise _RowError(f"{path}.function.arguments is {kind}, expected a mapping or JSON of one")
    rest = {key: value for key, value in call.items() if key not in ("name", "arguments")}
    return {"type": "function", **rest, "function": {**function, "name": name, "arguments": arguments}}


def _tools(cell: Any, seen: _Rewritten) -> list[dict[str, Any]] | None:
    found: list[dict[str, Any]] = []
    for number, entry in enumerate(_entries(cell, "tools", seen)):
        tool = _mapping(entry, f"tools[{number}]", seen)
        function = tool.get("function", tool if "name" in tool else None)
        if function is None:
            raise _RowError(f"tools[{number}] describes no function: it has {', '.join(tool) or 'no keys'}")
        function = _mapping(function, f"tools[{number}].function", seen)
        if isinstance(function.get("parameters"), str):
            function["parameters"] = _json(function["parameters"], f"tools[{number}].function.parameters", seen)
        rest = tool if "function" in tool else {}
        found.append({"type": "function", **rest, "function": function})
    return found or None


def _thinking(value: Any) -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and value in (0, 1):
        return bool(value)
    raise _RowError(f"enable_thinking is {_shown(value)}, expected true or false")


def _entries(cell: Any, path: str, seen: _Rewritten) -> list[Any]:
    value = _json(cell, path, seen) if isinstance(cell, str) else cell
    if value is None:
        return []
    if not isinstance(value, list):
        raise _RowError(f"{path} is {type(value).__name__}, expected a list")
    return value


def _mapping(value: Any, path: str, seen: _Rewritten) -> dict[str, Any]:
    """A copy of the mapping without keys that are null."""
    if isinstance(value, str):
        value = _json(value, path, seen)
    if not isinstance(value, Mapping):
        raise _RowError(f"{path} is {type(value).__name__}, expected a mapping")
    return {key: item for key, item in value.items() if item is not None}


def without_nulls(value: Any) -> Any:
    """The value without keys that are null, at any depth."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def _json(text: str, path: str, seen: _Rewritten) -> Any:
    try:
        value = seen.loads(text)
    except RecursionError as error:
        raise _RowError(f"{path} {_TOO_DEEP}") from error
    except ValueError as error:
        raise _RowError(f"{path} is not valid JSON: {error}") from error
    if text.count("[") + text.count("{") > MOST_LEVELS:
        _check_depth(value, path)
    if any(mark in text for mark in _ESCAPED_SURROGATE):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise _RowError(f"{path} holds half of a surrogate pair, which is no character") from error
    return value


def _check_depth(value: Any, path: str) -> None:
    """Refuse a value with too many levels of lists and mappings; needs no recursion itself."""
    level, depth = [value], 0
    while level := [each for each in level if isinstance(each, list | dict)]:
        depth += 1
        if depth > MOST_LEVELS:
            raise _RowError(f"{path} {_TOO_DEEP}")
        level = [item for each in level for item in (each.values() if isinstance(each, dict) else each)]


def _shown(value: Any) -> str:
    return repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}..."
