from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_job.contract import ExitCode
from sft_job.data.render import (
    PromptResponseRenderer,
    Rendered,
    TemplateFailure,
    fingerprint,
    load_tokenizer,
    truncate,
)
from sft_job.data.tokenizer import template_text
from sft_job.errors import ProblemsError
from tests.unit.data.conftest import CHATML, GEMMA, LLAMA3, NO_END, SPECIAL

Save = Callable[..., Path]


def renderer(folder: Path, **options: Any) -> PromptResponseRenderer:
    return PromptResponseRenderer(load_tokenizer(folder), **options)


def decoded(folder: Path, ids: list[int]) -> str:
    return load_tokenizer(folder).decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


TEMPLATES = {
    "chatml": (
        CHATML,
        {"eos_token": "<|im_end|>"},
        "<|im_start|>user\nhi  <|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    # A base model's eos is another token than the one its template ends a turn with.
    "chatml, other eos": (
        CHATML,
        {"eos_token": "<|endoftext|>"},
        "<|im_start|>user\nhi  <|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "llama3": (
        LLAMA3,
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|endoftext|>"},
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    "gemma": (
        GEMMA,
        {"bos_token": "<bos>", "eos_token": "<|endoftext|>"},
        "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n",
        "<end_of_turn>",
    ),
    "no end": (NO_END, {"eos_token": "<|endoftext|>"}, "user: hi  \nassistant: ", "<|endoftext|>"),
    "none": (None, {"eos_token": "<|endoftext|>"}, "hi  ", "<|endoftext|>"),
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("response", [" spaced\n", "<think>\na\n\n</think>yes", "", "grüße 🌳\x00"])
def test_rows_are_prompt_response_and_end_of_turn(name: str, response: str, save_tokenizer: Save) -> None:
    template, tokens, prompt_text, end = TEMPLATES[name]
    folder = save_tokenizer(template, **tokens)
    (row,) = renderer(folder).render(["hi  "], [response])
    (span,) = row.spans
    assert decoded(folder, row.ids[: row.prompt_length]) == prompt_text
    assert decoded(folder, row.ids[slice(*span)]) == response + end
    assert span == (row.prompt_length, len(row.ids))
    assert row.ids[-1] == SPECIAL.index(end)


def test_golden_ids(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["?", "<|im_start|>", "<|im_end|>", "user", "assistant", "shortest", "path", "tree"]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>")
    fast.chat_template = CHATML
    fast.save_pretrained(tmp_path)
    subject = renderer(tmp_path)
    assert subject.render(["shortest path"], ["tree path"]) == [Rendered([1, 3, 5, 6, 2, 1, 4, 7, 6, 2], ((7, 10),))]
    assert subject.render(["path"], [""]) == [Rendered([1, 3, 6, 2, 1, 4, 2], ((6, 7),))]
    assert subject.encode_prompts(["path"]) == [[1, 3, 6, 2, 1, 4]]


def test_one_bos_where_the_tokenizer_adds_its_own(save_tokenizer: Save) -> None:
    tokens = {"bos_token": "<bos>", "eos_token": "<|endoftext|>"}
    framed = save_tokenizer(GEMMA, name="template", frame="<bos> $A", **tokens)
    assert renderer(framed).render(["a"], ["b"])[0].ids.count(SPECIAL.index("<bos>")) == 1
    plain = save_tokenizer(None, name="plain", frame="<bos> $A <|endoftext|>", **tokens)
    (row,) = renderer(plain).render(["a <|endoftext|>"], ["b"])
    # The eos behind the prompt goes, but not one that the prompt itself ends with.
    assert decoded(plain, row.ids) == "<bos>a <|endoftext|>b<|endoftext|>"
    bare = save_tokenizer(None, name="bare", **tokens)
    assert decoded(bare, renderer(bare).render(["a<|endoftext|>"], ["b"])[0].ids) == "a<|endoftext|>b<|endoftext|>"


def test_a_batch_equals_its_rows_one_by_one(save_tokenizer: Save) -> None:
    subject = renderer(save_tokenizer(CHATML, eos_token="<|im_end|>"))
    prompts, responses = ["a", "graph node " * 30, ""], ["", "tree", "walk " * 50]
    together = subject.render(prompts, responses)
    assert together == [subject.render([p], [r])[0] for p, r in zip(prompts, responses, strict=True)]
    assert subject.render([], []) == []


def test_saved_padding_and_truncation_do_not_apply(save_tokenizer: Save) -> None:
    folder = save_tokenizer(CHATML, eos_token="<|im_end|>")
    settings = json.loads((folder / "tokenizer.json").read_text())
    settings["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    (row,) = renderer(folder).render(["a b c d e"], ["f g h i j"])
    assert decoded(folder, row.ids).endswith("assistant\nf g h i j<|im_end|>")


def test_a_slow_tokenizer_gives_the_same(save_tokenizer: Save) -> None:
    folder = save_tokenizer(CHATML, eos_token="<|im_end|>")
    fast, slow = load_tokenizer(folder), load_tokenizer(folder)

    class Slow(type(slow)):  # type: ignore[misc]
        is_fast = False

    slow.__class__ = Slow
    expected = PromptResponseRenderer(fast).render(["a", "b c"], ["d", "e f"])
    assert PromptResponseRenderer(slow).render(["a", "b c"], ["d", "e f"]) == expected


def test_template_variables_and_another_template(save_tokenizer: Save) -> None:
    folder = save_tokenizer(CHATML, eos_token="<|im_end|>")
    (row,) = renderer(folder, template_kwargs={"no_think": True}).render(["a"], ["b"])
    assert decoded(folder, row.ids).endswith("assistant\n<think>\n\n</think>\n\nb<|im_end|>")
    assert decoded(folder, row.ids[row.prompt_length :]) == "b<|im_end|>"
    (other,) = renderer(folder, chat_template=NO_END).render(["a"], ["b"])
    assert decoded(folder, other.ids) == "user: a\nassistant: b<|im_end|>"


def test_notes_say_what_ends_a_response(save_tokenizer: Save) -> None:
    chatml = save_tokenizer(CHATML, name="a", eos_token="<|endoftext|>")
    assert renderer(chatml).notes == ["a response ends with '<|im_end|>' (id 2), as the chat template shows"]
    (note,) = renderer(save_tokenizer(NO_END, name="b", eos_token="<|endoftext|>")).notes
    assert "eos token '<|endoftext|>' (id 0): the chat template shows no special token there" in note
    (note,) = renderer(save_tokenizer(None, name="c", eos_token="<|endoftext|>")).notes
    assert "there is no chat template; a row is prompt + response + eos" in note


def test_the_assistants_end_counts_not_the_users(save_tokenizer: Save) -> None:
    template = (
        "{% for m in messages %}{{ m.content }}{{ '<|im_end|>' if m.role == 'user' else '<|eot_id|>' }}{% endfor %}"
    )
    subject = renderer(save_tokenizer(template, eos_token="<|endoftext|>"))
    assert subject.end_of_turn_id == SPECIAL.index("<|eot_id|>")


def test_templates_that_fail_on_assistants_end_with_eos(save_tokenizer: Save) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ raise_exception('no') }}{% endif %}x{% endfor %}"
    )
    subject = renderer(save_tokenizer(template, eos_token="<|endoftext|>"))
    assert subject.end_of_turn_id == 0
    assert "fails on an assistant's turn: TemplateError: no" in subject.notes[0]


@pytest.mark.parametrize(
    ("template", "tokens", "options", "message"),
    [
        (NO_END, {}, {}, "no token can end a response"),
        (None, {}, {}, "no token can end a response"),
        ("{{ raise_exception('System first') }}", {"eos_token": "<|im_end|>"}, {}, "TemplateError: System first"),
        ("{% if %}", {"eos_token": "<|im_end|>"}, {}, "TemplateSyntaxError"),
        (CHATML, {"eos_token": "<|im_end|>"}, {"template_kwargs": {"tokenize": True}}, "is set by the job itself"),
        (CHATML, {"eos_token": "<|im_end|>"}, {"template_kwargs": {"messages": "x"}}, "is set by the job itself"),
        (CHATML, {"eos_token": "<|im_end|>"}, {"template_kwargs": {"tools": []}}, "is set by the job itself"),
        (CHATML, {"eos_token": "<|im_end|>"}, {"template_kwargs": {"documents": []}}, "is set by the job itself"),
    ],
)
def test_templates_that_cannot_be_used(
    template: str | None, tokens: dict[str, str], options: dict[str, Any], message: str, save_tokenizer: Save
) -> None:
    with pytest.raises(ProblemsError, match=message) as raised:
        renderer(save_tokenizer(template, **tokens), **options)
    assert raised.value.code is ExitCode.CONFIG


def test_a_row_that_the_template_refuses(save_tokenizer: Save) -> None:
    template = CHATML.replace("{{ m.content }}", "{% if m.content == 'bad' %}{{ raise_exception('bad') }}{% endif %}")
    subject = renderer(save_tokenizer(template, eos_token="<|im_end|>"))
    with pytest.raises(TemplateFailure, match="TemplateError: bad"):
        subject.render(["good", "bad"], ["", ""])


def broken_folders(tmp_path: Path) -> dict[str, tuple[Path | None, str]]:
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text('{"model_type": "qwen2"}')
    (tmp_path / "file").touch()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    return {
        "null": (None, "must name the model's folder"),
        "gone": (tmp_path / "no" / "where", f"the nearest existing folder is {tmp_path}"),
        "file": (tmp_path / "file", "is not a folder"),
        "bare": (tmp_path / "bare", "holds no tokenizer"),
        "broken": (tmp_path / "broken", "the tokenizer cannot be loaded"),
    }


@pytest.mark.parametrize("name", ["null", "gone", "file", "bare", "broken"])
def test_folders_without_a_tokenizer(name: str, tmp_path: Path) -> None:
    folder, message = broken_folders(tmp_path)[name]
    with pytest.raises(ProblemsError) as raised:
        load_tokenizer(folder)
    assert raised.value.code is ExitCode.MODEL
    assert message in str(raised.value)
    assert "model.partial_pretrain" in str(raised.value)


def test_template_text(tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text(CHATML)
    assert template_text(None) is None
    assert template_text(CHATML) == CHATML
    assert template_text(str(tmp_path / "chat.jinja")) == CHATML
    with pytest.raises(ProblemsError, match="neither a Jinja template nor a file") as raised:
        template_text("chat.jinja")
    assert raised.value.code is ExitCode.CONFIG


@pytest.mark.parametrize("name", ["/dev/zero", "pipe", "large", "."])
def test_a_template_without_an_end(tmp_path: Path, name: str) -> None:
    """Nothing is read that is no file, or larger than any template: a device has no end, and nobody may fill a pipe."""
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ProblemsError, match="neither a Jinja template nor a file that can be read") as raised:
        template_text(str(tmp_path / name))
    assert raised.value.code is ExitCode.CONFIG


def test_fingerprint_follows_everything_a_rendering_depends_on(save_tokenizer: Save) -> None:
    folder = save_tokenizer(CHATML, eos_token="<|im_end|>")
    base = fingerprint(folder, None, {})
    assert base == fingerprint(folder, None, {})
    others = {fingerprint(folder, CHATML, {}), fingerprint(folder, None, {"a": 1}), fingerprint(folder, None, {}, True)}
    (folder / "model.safetensors").write_bytes(b"weights are no part of it")
    (folder / "config.json").write_text('{"hidden_size": 8}')
    unrelated = fingerprint(folder, None, {})
    (folder / "config.json").write_text('{"hidden_size": 16}')
    assert fingerprint(folder, None, {}) == unrelated
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace("hidden", "model_type") if name == "config.json" else text + " ")
        others.add(fingerprint(folder, None, {}))
        (folder / name).write_text(text)
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    others.add(fingerprint(folder, None, {}))
    assert len(others) >= 7
    assert base not in others - {unrelated}


@given(st.integers(0, 12), st.integers(0, 12), st.integers(1, 30), st.sampled_from(["left", "right"]))
def test_truncation_keeps_tokens_and_marks_together(prompt: int, response: int, limit: int, side: str) -> None:
    row = Rendered(list(range(prompt + response)), ((prompt, prompt + response),) if response else ())
    trained = [prompt <= token for token in row.ids]
    cut = truncate(row, limit, side)
    kept = slice(max(0, len(row.ids) - limit), None) if side == "left" else slice(limit)
    assert cut.ids == row.ids[kept]
    marks = [any(start <= place < end for start, end in cut.spans) for place in range(len(cut.ids))]
    assert marks == trained[kept]
    assert cut.num_targets == sum(marks[1:])
    assert cut.prompt_length == (marks.index(True) if any(marks) else len(cut.ids))
