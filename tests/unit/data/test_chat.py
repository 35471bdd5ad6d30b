from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_job.data.chat import ChatTemplate, TemplateFailure
from sft_job.data.tokenizer import load_tokenizer
from tests.unit.data.conftest import CHATML

Save = Callable[..., Path]
TURN = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
TOOL = {"type": "function", "function": {"name": "find"}}
SHOWS = (
    "{{ tools | length if tools else 0 }}{{ more }}{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
)


def template(folder: Path, text: str | None = None, **kwargs: Any) -> ChatTemplate:
    return ChatTemplate(load_tokenizer(folder), text, kwargs)


def test_each_conversation_has_its_own_tools(save_tokenizer: Save) -> None:
    subject = template(save_tokenizer(SHOWS, bos_token="<bos>"), more="x")
    tools = [None, [TOOL], [TOOL], [TOOL, TOOL], None]
    assert subject.render([TURN] * 5, tools=tools) == [f"{n}x<bos>ab" for n in (0, 1, 1, 2, 0)]
    assert subject.render([TURN], kwargs={"more": "y"}) == ["0y<bos>ab"]
    assert subject.render([]) == []


def test_a_template_for_tools(save_tokenizer: Save) -> None:
    named = {"default": "plain", "tool_use": "tools{% generation %}!{% endgeneration %}"}
    subject = template(save_tokenizer(named, bos_token="<bos>"))
    assert (subject.text, subject.tool_text) == ("plain", named["tool_use"])
    assert subject.render([TURN, TURN], tools=[None, [TOOL]]) == ["plain", "tools!"]
    assert subject.has_generation
    assert subject.render_with_generation([TURN, TURN], tools=[None, [TOOL]]) == [("plain", []), ("tools!", [(5, 6)])]


def test_another_template(save_tokenizer: Save) -> None:
    subject = template(save_tokenizer(CHATML, eos_token="<|im_end|>"), SHOWS, more="")
    assert subject.render([TURN]) == ["0ab"]
    assert not template(save_tokenizer(None, name="none", eos_token="<|im_end|>")).exists


def test_generation_ranges_are_characters(save_tokenizer: Save) -> None:
    text = (
        "{{ bos_token }}{% for m in messages %}é{% if m.role == 'assistant' %}"
        "{%- generation -%}{{ m.content }}{%- endgeneration -%}{% endif %}{% endfor %}"
    )
    subject = template(save_tokenizer(text, bos_token="<bos>"))
    assert subject.render_with_generation([[*TURN, {"role": "assistant", "content": "ünï"}]]) == [
        ("<bos>ééb" + "éünï", [(7, 8), (9, 12)])
    ]


def test_failures_have_the_templates_words(save_tokenizer: Save) -> None:
    subject = template(save_tokenizer("{{ raise_exception('roles must\nalternate') }}", bos_token="<bos>"))
    for render in (subject.render, subject.render_with_generation):
        with pytest.raises(TemplateFailure, match=r"^TemplateError: roles must alternate$"):
            render([TURN])
    several = template(save_tokenizer({"rag": "x"}, name="several", bos_token="<bos>"))
    assert (several.exists, several.text) == (True, "")
    with pytest.raises(TemplateFailure, match="multiple chat templates with no default"):
        several.render([TURN])
