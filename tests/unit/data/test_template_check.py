from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from sft_job.config.schema import JobConfig
from sft_job.contract import ExitCode, RunFolder
from sft_job.data.cache import CacheSpec
from sft_job.data.encode import Encoder
from sft_job.data.prepare import prepare
from sft_job.data.template_check import (
    TemplateReport,
    check_template,
    message_subject,
    prompt_subject,
    saved_stops,
    self_test,
)
from sft_job.errors import ProblemsError
from tests.unit.data.conftest import CHATML, GEMMA, LLAMA3, NO_END, rows_file

GOLDEN = Path(__file__).parents[2] / "golden" / "templates"
# Of each golden template: its special tokens, those that are added but not special, BOS, EOS.
TOKENS: dict[str, tuple[str, str, str, str]] = {
    "chatml": ("<|im_start|> <|im_end|> <|endoftext|>", "<tool_call> </tool_call>", "", "<|endoftext|>"),
    "chatml_generation": ("<|im_start|> <|im_end|>", "<think> </think>", "", "<|im_end|>"),
    "chatml_no_prompt": ("<|im_start|> <|im_end|>", "", "", "<|im_end|>"),
    "command": (
        "<BOS> <|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|CHATBOT_TOKEN|> <|USER_TOKEN|> <|SYSTEM_TOKEN|> "
        "<|START_RESPONSE|> <|END_RESPONSE|> <|START_THINKING|> <|END_THINKING|>",
        "",
        "<BOS>",
        "<|END_OF_TURN_TOKEN|>",
    ),
    "deepseek_r1": (
        "<｜begin▁of▁sentence｜> <｜end▁of▁sentence｜>",
        "<｜User｜> <｜Assistant｜> <think> </think> <｜tool▁calls▁begin｜>",
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
    ),
    "gemma": ("<bos> <eos> <start_of_turn> <end_of_turn>", "", "<bos>", "<eos>"),
    "harmony": (
        "<|startoftext|> <|start|> <|end|> <|message|> <|channel|> <|return|> <|call|>",
        "",
        "<|startoftext|>",
        "<|return|>",
    ),
    "llama3": (
        "<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>",
        "",
        "<|begin_of_text|>",
        "<|eot_id|>",
    ),
    "mistral": ("<s> </s> [INST] [/INST] [TOOL_CALLS] [AVAILABLE_TOOLS]", "", "<s>", "</s>"),
    "olmo": ("<|endoftext|>", "", "<|endoftext|>", "<|endoftext|>"),
    "phi": ("<s> <|endoftext|> <|end|> <|user|> <|assistant|> <|system|>", "", "<s>", "<|endoftext|>"),
    "qwen3": ("<|im_start|> <|im_end|> <|endoftext|>", "<think> </think> <tool_call> </tool_call>", "", "<|im_end|>"),
}
KINDS = ("bytes", "unigram")


@cache
def trained(kind: str, special: str, added: str) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    options: dict[str, Any] = {"special_tokens": ["<unk>", *special.split()], "show_progress": False}
    if kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
        alphabet = ["\n", *map(chr, range(33, 127))]
        trainer: Any = trainers.UnigramTrainer(vocab_size=150, unk_token="<unk>", initial_alphabet=alphabet, **options)
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, **options)
    tokenizer.train_from_iterator(["the user asks an assistant of graphs"] * 20, trainer)
    tokenizer.add_tokens(added.split())
    return tokenizer.to_str()


def tokenizer(template: str | None, tokens: tuple[str, str, str, str], kind: str = "bytes", frame: str = "") -> Any:
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    special, added, bos, eos = tokens
    backend = Tokenizer.from_str(trained(kind, special, added))
    if frame:
        ids = [(token, backend.token_to_id(token)) for token in frame.split() if token.startswith("<")]
        backend.post_processor = processors.TemplateProcessing(single=frame, special_tokens=ids)
    names = {"bos_token": bos} if bos else {}
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, **names)
    fast.chat_template = template
    return fast


def check(
    template: str | None,
    tokens: tuple[str, str, str, str],
    folder: Path,
    *,
    kind: str = "bytes",
    frame: str = "",
    messages: bool = False,
    **options: Any,
) -> TemplateReport:
    make = message_subject if messages else prompt_subject
    try:
        return self_test(make(tokenizer(template, tokens, kind, frame), folder, **options))
    except ProblemsError as error:
        return TemplateReport(problems=list(error.problems))


def with_stops(folder: Path, *stops: int) -> Path:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(stops)}))
    return folder


def rules(report: TemplateReport) -> list[str]:
    assert all(problem.code is ExitCode.CONFIG and problem.fix for problem in report.problems)
    return [problem.rule for problem in report.problems]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.jinja")), ids=lambda path: path.stem)
def test_good_templates_have_no_problem(path: Path, kind: str, tmp_path: Path) -> None:
    """As they are, and where the tokenizer puts a BOS before a text by itself."""
    tokens = TOKENS[path.stem]
    frames = [f"{tokens[2]} $A"] if tokens[2] and path.stem not in ("phi", "harmony") else []
    for frame in ("", *frames):
        for messages in (False, True):
            report = check(path.read_text(), tokens, tmp_path, kind=kind, frame=frame, messages=messages)
            if path.stem == "chatml_no_prompt" and not messages:
                (rule,) = rules(report)
                assert "writes no generation prompt" in rule
            else:
                assert rules(report) == []
            assert "control tokens in rows stay text" in report.found
            assert any("trained once" in text for text in report.found)


def test_what_is_found(tmp_path: Path) -> None:
    tokens = TOKENS["gemma"]
    report = check(GEMMA, tokens, with_stops(tmp_path, 2, 4), frame="<bos> $A")
    assert (report.problems, report.warnings) == ([], [])
    assert report.text() == (
        "an answer begins where the generation prompt ends; a turn ends with '<end_of_turn>' (id 4), trained once; "
        "generation stops at it; one BOS '<bos>' (id 1); control tokens in rows stay text"
    )


IM = ("<|im_start|> <|im_end|> <|endoftext|> <bos>", "<think> </think>", "", "<|im_end|>")
BOS = (*IM[:2], "<bos>", "<|im_end|>")
BODY = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
BROKEN: dict[str, tuple[str, tuple[str, str, str, str], str, str]] = {
    "no generation prompt": (BODY, IM, "", "writes no generation prompt: with add_generation_prompt nothing follows"),
    "another header": (
        BODY + PROMPT.replace("assistant", "bot"),
        IM,
        "",
        "behind '<|im_start|>user\\nuserprobe<|im_end|>\\n<|im_start|>' the generation prompt has 'bot\\n', the turn "
        "'assistant\\n'\n    line 3: {% endfor %}{% if add_generation_prompt %}",
    ),
    "a line break too many": (BODY + PROMPT.replace("t\n", "t\n\n"), IM, "", "is not how an assistant's turn begins"),
    "a header that thinks no more": (
        BODY + PROMPT.replace("\n", "<think>now\n"),
        IM,
        "",
        "the generation prompt has '<think>now\\n', the turn '\\n'",
    ),
    "another key": (BODY.replace("content", "value") + PROMPT, IM, "", "does not show the user's message"),
    "no answer": (
        BODY.replace("{{ m.content", "{{ m.content if m.role == 'user'") + PROMPT,
        IM,
        "",
        "does not show the assistant's message: one that says 'answerprobe' is rendered as",
    ),
    "nothing ends an answer": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\n{% endfor %}<|im_start|>assistant\n",
        IM,
        "",
        "behind an assistant's answer comes '<|im_start|>' (id 1), which begins a turn: nothing ends the answer",
    ),
    "two ends": (
        BODY.replace("<|im_end|>", "<|im_end|>{{ eos_token }}") + PROMPT,
        IM,
        "",
        "writes '<|im_end|>' (id 2) 2 times behind an assistant's answer: '<|im_end|><|im_end|>\\n'\n    line 2: ",
    ),
    "two BOS": ("{{ bos_token }}<bos>" + BODY + PROMPT, BOS, "", "begins with the BOS token '<bos>' (id 4) 2 times"),
    "two ways to write BOS": (
        "<bos>" + BODY.replace("<|im_start|>", "{{ bos_token if loop.first }}<|im_start|>") + PROMPT,
        BOS,
        "",
        "begins with the BOS token '<bos>' (id 4) 2 times\n    line 1: <bos>{% for m in messages %}{{ bos_token if",
    ),
    "a blank before BOS": (
        "\n{{ bos_token }}" + BODY + PROMPT,
        BOS,
        "",
        "writes '\\n' before the BOS token '<bos>' (id 4)\n    line 2: {{ bos_token }}",
    ),
    "no BOS": (BODY + PROMPT, BOS, "<bos> $A", "no row begins with the BOS token '<bos>' (id 4), which this tokenizer"),
    "other letters": (
        BODY.replace("m.content", "m.content | upper") + PROMPT,
        IM,
        "",
        "changes the letters of a message, so that control tokens in it cannot be kept apart",
    ),
    "other letters behind a word": (
        BODY.replace("m.content", "m.content[:20] + m.content[20:] | upper") + PROMPT,
        IM,
        "",
        "changes the letters of a message, so that control tokens in it cannot be kept apart",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_templates(name: str, tmp_path: Path) -> None:
    template, tokens, frame, message = BROKEN[name]
    report = check(template, tokens, with_stops(tmp_path, 2), frame=frame)
    (rule,) = rules(report)
    assert message in rule
    assert report.problems[0].subject == "data.chat_template (the tokenizer's own)"
    assert report.text().startswith("1 of its checks failed")


def test_several_faults_come_together(tmp_path: Path) -> None:
    report = check("<bos><bos>" + BODY, BOS, tmp_path)
    assert len(rules(report)) == 2


WARNED = {
    "thoughts in the prompt": (
        BODY + PROMPT.replace("\n", "\n<think>\n"),
        "ends with '<think>\\n', which the chat template leaves out before a finished answer; responses are trained "
        "behind it, so they must begin inside the thoughts",
    ),
    "empty thoughts in the turn": (
        BODY.replace("{{ m.content", "{{ '<think>\n\n</think>\n\n' if m.role == 'assistant' }}{{ m.content") + PROMPT,
        "writes '<think>\\n\\n</think>\\n\\n' between the generation prompt and an answer; rows are prompt + response",
    ),
    "a longer head": (
        BODY.replace("{{ m.content", "{{ 'say: ' if m.role == 'assistant' }}{{ m.content") + PROMPT,
        "writes 'say: ' between the generation prompt and an answer: at inference the model must write it itself",
    ),
    "only the last answer ends": (
        BODY.replace("<|im_end|>", "{{ eos_token if m.role == 'user' or loop.last }}") + PROMPT,
        "only the last answer is ended by '<|im_end|>' (id 2)",
    ),
    "text before the end": (BODY.replace("<|im_end|>", " ###<|im_end|>") + PROMPT, "writes ' ###' between an answer"),
    "no control token": (NO_END, "ends an assistant's turn with no control token, only with '\\n'; trained is"),
    "no answers": (
        "{% for m in messages %}{{ raise_exception('no') if m.role == 'assistant' }}{{ m.content }}{% endfor %}",
        "fails on a user's message and its answer",
    ),
}


@pytest.mark.parametrize("name", WARNED)
def test_what_is_warned_of(name: str, tmp_path: Path) -> None:
    template, message = WARNED[name]
    report = check(template, IM, with_stops(tmp_path, 2))
    assert rules(report) == []
    assert [message in warning for warning in report.warnings] == [True]


def test_conversations_need_what_prompts_and_responses_do_not(tmp_path: Path) -> None:
    """Turns that the template renders must end; a header that it renders need not be in a generation prompt."""
    for name in ("only the last answer ends", "no answers"):
        report = check(WARNED[name][0], IM, with_stops(tmp_path, 2), messages=True)
        assert len(rules(report)) == 1
    report = check(BODY, IM, with_stops(tmp_path, 2), messages=True)
    assert rules(report) == []
    assert "writes no generation prompt" in report.warnings[0]


@pytest.mark.parametrize(("file", "part"), [("generation_config.json", None), ("config.json", "text_config")])
def test_the_base_models_stop_tokens(file: str, part: str | None, tmp_path: Path) -> None:
    def stops(value: Any) -> TemplateReport:
        settings = {"eos_token_id": value}
        (tmp_path / file).write_text(json.dumps({part: settings} if part else settings))
        return check(CHATML, IM, tmp_path)

    assert "generation stops at it" in stops([3, 2]).found
    assert stops(2).warnings == []
    (warning,) = stops(3).warnings
    assert warning.startswith(
        f"a turn is trained to end with '<|im_end|>' (id 2), but the base model's {file} stops at '<|endoftext|>' "
    )
    assert warning.endswith('set there "eos_token_id": [2, 3]')
    assert saved_stops(tmp_path) == (file, [3])


def test_a_base_model_without_a_template(tmp_path: Path) -> None:
    report = check(None, BOS, with_stops(tmp_path, 2), frame="<bos> $A <|im_end|>")
    assert (report.problems, report.warnings) == ([], [])
    assert report.found[0] == "no chat template: a row is prompt + response + end"
    assert "one BOS '<bos>' (id 4)" in report.found
    none = check(None, BOS, with_stops(tmp_path, 2))
    assert "no BOS: neither template nor tokenizer writes '<bos>' (id 4)" in none.found
    twice = check(None, BOS, with_stops(tmp_path, 2), frame="<bos> <bos> $A")
    (problem,) = twice.problems
    assert (problem.code, "2 times before a text" in problem.rule) == (ExitCode.MODEL, True)


def test_control_tokens_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = check(CHATML, IM, with_stops(tmp_path, 2), allow_control_tokens=True)
    assert "control tokens in rows keep their meaning" in allowed.found
    # An encoder that hides them, but gives them their ids all the same.
    monkeypatch.setattr(Encoder, "protect", lambda _, text: f"{text} ")
    (rule,) = rules(check(CHATML, IM, with_stops(tmp_path, 2)))
    assert rule.startswith("control tokens in a user's text become control tokens: ")
    assert "'<|im_end|>' (id 2)" in rule


@pytest.mark.parametrize(
    ("template", "tokens"),
    [(CHATML, IM), (LLAMA3, TOKENS["llama3"]), (GEMMA, TOKENS["gemma"])],
)
def test_a_template_of_the_settings(
    template: str, tokens: tuple[str, str, str, str], spec: Callable[..., CacheSpec], tmp_path: Path
) -> None:
    tokenizer(None, tokens).save_pretrained(tmp_path / "base")
    subject = spec(tokenizer=tmp_path / "base", chat_template=template)
    assert check_template(subject).problems == []
    bad = replace(subject, chat_template=template.replace("add_generation_prompt", "never"))
    (problem,) = check_template(bad).problems
    assert problem.subject == "data.chat_template"
    failing = check_template(replace(subject, chat_template="{{ raise_exception('no') }}"))
    assert "TemplateError: no" in rules(failing)[0]


def test_a_run_begins_with_the_self_test(model_folder: Path, tmp_path: Path) -> None:
    config = JobConfig()
    config.model.partial_pretrain = str(model_folder)
    config.data.train_files = str(rows_file(tmp_path / "a.parquet", 4))
    warnings: list[str] = []
    prepare(config, RunFolder(tmp_path / "run"), warn=warnings.append)
    assert any("has no eos_token_id" in warning for warning in warnings)
    config.data.chat_template = BODY
    with pytest.raises(ProblemsError, match="writes no generation prompt") as raised:
        prepare(config, RunFolder(tmp_path / "other"))
    assert raised.value.code is ExitCode.CONFIG
    assert not (tmp_path / "other").exists()
