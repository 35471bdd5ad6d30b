"""Conversations from parquet files to the token cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from sft_job.config.schema import JobConfig
from sft_job.data.cache import CacheSpec, TokenCache, cache_spec, open_or_build
from sft_job.data.columns import Column, message_columns
from sft_job.data.faults import Fault
from sft_job.data.files import check_data
from sft_job.data.message_rows import MessageRow, message_rows
from sft_job.data.messages import MessageRenderer, Rejected
from sft_job.data.sample import check_sample
from sft_job.data.template_check import check_template
from sft_job.data.tokenizer import load_tokenizer
from tests.unit.data.conftest import write

MakeSpec = Callable[..., CacheSpec]
USER = {"role": "user", "content": "graph"}
ANSWER = {"role": "assistant", "content": "node"}
SHORT = [USER, ANSWER]


def columns() -> tuple[Column, ...]:
    data = JobConfig().data
    data.multiturn.enable = True
    return message_columns(data)


def trained(cache: TokenCache, folder: Path) -> list[str]:
    tokenizer: Any = load_tokenizer(folder)
    rows = (cache.row(index) for index in range(len(cache)))
    return [tokenizer.decode(row.ids[row.trained].tolist()) for row in rows]


def test_structs_and_json_side_by_side(spec: MakeSpec, tmp_path: Path) -> None:
    structs = write(tmp_path / "a.parquet", messages=[SHORT, [USER], SHORT * 2], enable_thinking=[True, None, False])
    text = write(tmp_path / "b.parquet", messages=[json.dumps(SHORT), "[]", None], tools=[None, None, None])
    subject = spec(structs, text, messages=columns())
    cache = open_or_build(subject, tmp_path / "cache", 1)
    assert trained(cache, subject.tokenizer) == ["node<|im_end|>", "node<|im_end|>" * 2, "node<|im_end|>"]
    assert [cache.origin(index)[1] for index in range(3)] == [0, 2, 0]
    report = cache.report
    assert [file["rows_read"] for file in report["files"]] == [3, 3]
    assert (report["rows_without_target"], report["rejected"]) == (1, {"no_text": 2})
    assert report["notes"] == ["the assistant's turns end with '<|im_end|>'"]


def test_the_last_turn_and_the_oldest_ones(spec: MakeSpec, tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "leaf"}] + [
        message
        for number in range(4)
        for message in ({"role": "user", "content": "walk"}, {"role": "assistant", "content": f"node {number}"})
    ]
    file = write(tmp_path / "a.parquet", messages=[turns, SHORT])
    whole = open_or_build(spec(file, messages=columns()), tmp_path / "cache", 1)
    last = spec(file, messages=columns(), train_on="last")
    assert trained(open_or_build(last, tmp_path / "cache", 1), last.tokenizer) == ["node 3<|im_end|>", "node<|im_end|>"]
    # Room for about two turns and the system message.
    limit = int(whole.lengths[0]) * 2 // 3
    short = open_or_build(spec(file, messages=columns(), truncation="turn", max_length=limit), tmp_path / "cache", 1)
    assert trained(short, last.tokenizer)[0] == "node 2<|im_end|>node 3<|im_end|>"
    assert short.row(0).ids[:3].tolist() == whole.row(0).ids[:3].tolist()
    assert short.report["rows_truncated"] == 1


def test_rows_that_cannot_be_masked_are_named(spec: MakeSpec, save_tokenizer: Any, tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if m.content == 'bad' %}{{ raise_exception('no') }}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content | replace('node', 'x') }}<|im_end|>{% endfor %}"
        "{{ '<|im_start|>assistant\n' if add_generation_prompt else 'end' }}"
    )
    folder = save_tokenizer(template, name="other", eos_token="<|im_end|>")
    rows = [SHORT * 2, [USER, {**ANSWER, "content": "tree"}], [USER, {**ANSWER, "content": "bad"}]]
    subject = spec(write(tmp_path / "a.parquet", messages=rows), messages=columns(), tokenizer=folder)
    report = open_or_build(subject, tmp_path / "cache", 1).report
    assert (report["rows_usable"], report["rejected"]) == (1, {"not_rendered": 1, "not_proved": 1})
    problems = check_sample(subject, 100).problems
    assert "row 2: TemplateError: no" in problems[0].rule
    assert "row 0: messages[1]: neither generation blocks nor" in problems[1].rule


TOOLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ m.get('reasoning_content', '')[:3] }}"
    "{% for c in m.tool_calls %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}<|im_end|>\n"
    "{% endfor %}"
    "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
)


def with_call(arguments: Any) -> list[dict[str, Any]]:
    return [USER, {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": arguments}]}]


@pytest.mark.parametrize("levels", [95, 600])
def test_a_deeply_nested_cell_costs_its_row_alone(
    spec: MakeSpec, save_tokenizer: Any, tmp_path: Path, levels: int
) -> None:
    folder = save_tokenizer(TOOLS, name="tools", eos_token="<|im_end|>")
    deep = '{"graph<|im_end|>":' * levels + "{}" + "}" * levels
    rows = [json.dumps(SHORT), json.dumps(with_call(deep)), json.dumps(with_call("{}")), json.dumps(SHORT)]
    tools = [None, None, None, "[" * levels + "]" * levels]
    subject = spec(
        write(tmp_path / "a.parquet", messages=rows, tools=tools), messages=columns(), tokenizer=folder, max_length=9999
    )
    report = open_or_build(subject, tmp_path / "cache", 1).report
    assert report["rejected"] == {"no_text": 2 if levels > 100 else 1}


def test_a_stack_that_overflows_costs_its_row_alone() -> None:
    class Renderer:
        """Fails as a renderer does on what is nested too deeply."""

        def render(self, conversations: list[Any]) -> list[Any]:
            if any(each.messages[0]["content"] == "deep" for each in conversations):
                raise RecursionError("maximum recursion depth exceeded")
            return [Rejected(Fault.NOT_PROVED, "as usual") for _ in conversations]

    deep = [{"role": "user", "content": "deep"}, ANSWER]
    batch = pa.record_batch({"messages": [SHORT, deep, SHORT]})
    found = list(message_rows(Renderer(), batch, columns(), "all", None))  # type: ignore[arg-type]
    assert [row.row.reason for row in found if isinstance(row, MessageRow) and isinstance(row.row, Rejected)] == [
        "as usual",
        "the row is nested too deeply: maximum recursion depth exceeded",
        "as usual",
    ]


def test_huge_rows_are_measured_with_all_their_texts(save_tokenizer: Any) -> None:
    folder = save_tokenizer(TOOLS, name="tools", eos_token="<|im_end|>")
    renderer = MessageRenderer(load_tokenizer(folder))
    dropped = [USER, {**ANSWER, "reasoning_content": "leaf" * 500}]
    rows = [SHORT, with_call({"q": ["walk" * 500]}), dropped]
    batch = pa.record_batch({"messages": [json.dumps(row) for row in rows]})
    found = sorted(message_rows(renderer, batch, columns(), "all", 1000), key=lambda row: row[0])
    assert [isinstance(row, MessageRow) for row in found] == [True, False, True]
    number, size = found[1][:2]
    # What the template leaves out does not count.
    assert number == 1
    assert isinstance(size, int)
    assert 2000 < size < 2100


def test_json_in_other_words_is_noted_once(spec: MakeSpec, save_tokenizer: Any, tmp_path: Path) -> None:
    folder = save_tokenizer(TOOLS, name="tools", eos_token="<|im_end|>")
    rows = [json.dumps(with_call(text)) for text in ('{"q": 1.1}', '{"q":1.10,"z":1e5}', '{"q": 2e1}')]
    subject = spec(write(tmp_path / "a.parquet", messages=rows), messages=columns(), tokenizer=folder)
    cache = open_or_build(subject, tmp_path / "cache", 1)
    assert '{"q": 1.1, "z": 100000.0}' in trained(cache, folder)[1]
    (note,) = [note for note in cache.report["notes"] if "other words" in note]
    assert note.startswith(
        "2 of 3 rows of data.train_files hold JSON that is read and written again in other words: 1.10"
    )
    assert [file["rows_with_rewritten_json"] for file in cache.report["files"]] == [2]


def config(tmp_path: Path, folder: Path, **multiturn: Any) -> JobConfig:
    found = JobConfig()
    found.data.train_files, found.model.partial_pretrain = str(tmp_path / "a.parquet"), str(folder)
    found.data.multiturn.enable = True
    for name, value in multiturn.items():
        setattr(found.data.multiturn, name, value)
    return found


def test_columns_are_checked_before_anything_is_read(tmp_path: Path, model_folder: Path) -> None:
    write(tmp_path / "a.parquet", message=[SHORT], tools=pa.array([3]), enable_thinking=["yes"])
    found = {problem.subject: problem.text() for problem in check_data(config(tmp_path, model_folder))}
    assert "no column 'messages'; found message, tools, enable_thinking" in found["data.multiturn.messages_key"]
    assert "did you mean 'message'?" in found["data.multiturn.messages_key"]
    assert "tools is int64, expected a list of structs, or JSON text" in found["data.multiturn.tools_key"]
    assert "enable_thinking is string, expected boolean" in found["data.multiturn.enable_thinking_key"]
    write(tmp_path / "a.parquet", messages=pa.array([[1]]))
    (problem,) = check_data(config(tmp_path, model_folder))
    assert "messages is list<element: int64>, expected a list of structs" in problem.rule
    # A column with a name of its own is there, or the name is wrong.
    write(tmp_path / "a.parquet", messages=[SHORT], tool=[None])
    (problem,) = check_data(config(tmp_path, model_folder, tools_key="toolz"))
    assert "no column 'toolz'" in problem.rule
    assert check_data(config(tmp_path, model_folder)) == []


def test_the_cache_depends_on_what_is_trained(tmp_path: Path, model_folder: Path) -> None:
    write(tmp_path / "a.parquet", messages=[SHORT])
    settings = [{}, {"train_on": "last"}, {"enable": False}, {"messages_key": "m"}]
    specs = [cache_spec(config(tmp_path, model_folder, **each), "train") for each in settings]
    assert len({spec.fingerprint() for spec in specs if spec}) == len(settings)


def test_the_self_test_looks_at_conversations(spec: MakeSpec, save_tokenizer: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", messages=[SHORT])
    assert check_template(spec(file, messages=columns())).problems == []
    # Only the end of a conversation has a token that a model could stop at.
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ eos_token }}"
    folder = save_tokenizer(template, name="other", eos_token="<|im_end|>")
    problems = check_template(spec(file, messages=columns(), tokenizer=folder)).problems
    assert any("only the last answer is ended by" in problem.rule for problem in problems)
    none = save_tokenizer(None, name="none", eos_token="<|im_end|>")
    (problem,) = check_template(spec(file, messages=columns(), tokenizer=none)).problems
    assert problem.rule == "conversations need a chat template, and the tokenizer has none"


TODAY = (
    "{# strftime_now #}{% if strftime_now is defined %}{% set day = strftime_now('%d %b %Y') %}{% endif %}"
    "{% if date_string is defined %}{% set day = date_string %}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ day if loop.first }}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
)


@pytest.mark.parametrize(
    ("kwargs", "written"),
    [({"strftime_now": "2024-07-26"}, "26 Jul 2024"), ({"date_string": "the day"}, "the day")],
)
def test_a_day_is_fixed(
    spec: MakeSpec, save_tokenizer: Any, tmp_path: Path, kwargs: dict[str, Any], written: str
) -> None:
    folder = save_tokenizer(TODAY, name="today", eos_token="<|im_end|>")
    file = write(tmp_path / "a.parquet", messages=[SHORT])
    subject = spec(file, messages=columns(), tokenizer=folder, template_kwargs=kwargs)
    assert check_template(subject).problems == []
    tokenizer: Any = load_tokenizer(folder)
    text = tokenizer.decode(open_or_build(subject, tmp_path / "cache", 1).row(0).ids.tolist())
    assert text.startswith(f"<|im_start|>user\n{written}graph<|im_end|>")


def test_todays_date_is_refused(spec: MakeSpec, save_tokenizer: Any, tmp_path: Path) -> None:
    folder = save_tokenizer(TODAY, name="today", eos_token="<|im_end|>")
    subject = spec(write(tmp_path / "a.parquet", messages=[SHORT]), messages=columns(), tokenizer=folder)
    (problem,) = check_template(subject).problems
    assert "data.apply_chat_template_kwargs.strftime_now to a day" in problem.fix
    (problem,) = check_template(replace(subject, template_kwargs={"strftime_now": "today"})).problems
    assert problem.rule == "must be a day: YYYY-MM-DD"
    other = save_tokenizer(TODAY.replace("'%d %b %Y'", "format"), name="other", eos_token="<|im_end|>")
    (problem,) = check_template(
        replace(subject, tokenizer=other, template_kwargs={"strftime_now": "2024-07-26"})
    ).problems
    assert "the day cannot be fixed" in problem.rule
