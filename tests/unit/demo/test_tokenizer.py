from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from sft_job.demo.graphs import GraphProblem, draw_problems
from sft_job.demo.tokenizer import END_OF_TURN, START_OF_TURN, train_tokenizer


@pytest.fixture(scope="module")
def problems() -> list[GraphProblem]:
    return draw_problems(1000, 0, seed=1)[0]


@pytest.fixture(scope="module")
def tokenizer(problems: list[GraphProblem], tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(problems, folder)
    return AutoTokenizer.from_pretrained(folder)


def test_round_trip(tokenizer: Any, problems: list[GraphProblem]) -> None:
    for text in (problems[0].prompt, problems[4].response, "  spaces \n\n", "Ünïcödé 図 🙂", "ABBA AB-BA"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens(tokenizer: Any) -> None:
    assert tokenizer.eos_token == END_OF_TURN
    assert tokenizer.pad_token not in (None, END_OF_TURN)
    ids = tokenizer(f"{START_OF_TURN}user{END_OF_TURN}")["input_ids"]
    assert ids[0] == tokenizer.convert_tokens_to_ids(START_OF_TURN)
    assert ids[-1] == tokenizer.eos_token_id
    assert len(ids) == 3


def test_chat_template(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]
    assert tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.apply_chat_template(messages, tokenize=False) == (
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    )


def test_an_edge_is_one_token(tokenizer: Any, problems: list[GraphProblem]) -> None:
    """The sizes of the demo (steps, seconds) hold for rows this short."""
    listed = problems[0].prompt.splitlines()[0].removeprefix("Edges:")
    assert len(tokenizer(listed)["input_ids"]) == len(listed.split())


def test_same_texts_same_tokenizer(tmp_path: Path, problems: list[GraphProblem]) -> None:
    train_tokenizer(problems, tmp_path / "a")
    train_tokenizer(problems, tmp_path / "b")
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()
