from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft_job.demo.graphs import GraphProblem, draw_problems
from sft_job.demo.model import write_base_model
from sft_job.demo.score import score
from sft_job.demo.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def problems() -> list[GraphProblem]:
    return draw_problems(300, 0, seed=1)[0][:7]


@pytest.fixture(scope="module")
def folder(problems: list[GraphProblem], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("model")
    write_base_model(train_tokenizer(draw_problems(300, 0, seed=1)[0], folder), folder, seed=1)
    return folder


def row_ids(tokenizer: Any, problem: GraphProblem) -> tuple[list[int], list[int]]:
    """A row's prompt and response ids, from the rendered text."""
    head = f"<|im_start|>user\n{problem.prompt}<|im_end|>\n<|im_start|>assistant\n"
    return tokenizer(head)["input_ids"], tokenizer(problem.response + "<|im_end|>")["input_ids"]


def test_loss_is_that_of_single_rows(folder: Path, problems: list[GraphProblem], monkeypatch) -> None:
    monkeypatch.setattr("sft_job.demo.score.BATCH_ROWS", 3)  # two whole batches and a rest
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    total, count = 0.0, 0
    for problem in problems:
        prompt, response = row_ids(tokenizer, problem)
        ids = torch.tensor([prompt + response])
        labels = torch.tensor([[-100] * len(prompt) + response])
        total += model(input_ids=ids, labels=labels).loss.item() * len(response)
        count += len(response)
    assert score(folder, problems).loss == pytest.approx(total / count, rel=1e-5)


def test_padded_generation_is_that_of_single_prompts(folder: Path, problems: list[GraphProblem]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    result = score(folder, problems)
    assert len({len(problem.prompt) for problem in problems}) > 1
    for problem, response in zip(problems, result.responses, strict=True):
        ids = row_ids(tokenizer, problem)[0]
        for _ in range(8):
            following = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            ids = [*ids, following]
        expected = tokenizer.decode(ids[-8:], skip_special_tokens=True)
        assert response.startswith(expected)


def test_exact_match(folder: Path, problems: list[GraphProblem], monkeypatch: pytest.MonkeyPatch) -> None:
    responses = [problem.response for problem in problems]
    responses[0] = responses[0] + " or so"
    responses[1] = "no answer"
    monkeypatch.setattr("sft_job.demo.score._generate", lambda *_: responses)
    result = score(folder, problems)
    assert result.correct == [False, False, *[True] * (len(problems) - 2)]
    assert result.accuracy == pytest.approx(5 / 7)
    kind = problems[0].kind
    of_kind = [i for i, problem in enumerate(problems) if problem.kind == kind]
    assert result.accuracy_of(kind, problems) == pytest.approx((len(of_kind) - 1) / len(of_kind))


def test_base_model_is_seeded(folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    before = torch.random.get_rng_state()
    write_base_model(tokenizer, tmp_path / "again", seed=1)
    write_base_model(tokenizer, tmp_path / "other", seed=2)
    assert torch.equal(torch.random.get_rng_state(), before)
    weights = [(path / "model.safetensors").read_bytes() for path in (folder, tmp_path / "again", tmp_path / "other")]
    assert weights[0] == weights[1] != weights[2]
