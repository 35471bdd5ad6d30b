"""How good a model folder is at the held-out problems, by plain Transformers: nothing of the job's model code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft_job.data.render import PromptResponseRenderer
from sft_job.demo.graphs import GraphProblem, final_answer

MAX_NEW_TOKENS = 64
BATCH_ROWS = 256
IGNORED = -100


@dataclass(frozen=True)
class Score:
    """What a model makes of the held-out problems.

    Attributes:
        loss: mean cross-entropy of a supervised token, as the job's ``val/loss``.
        responses: what greedy decoding gave, one for each problem.
        correct: whether the response's final answer is the problem's, to the letter.
    """

    loss: float
    responses: list[str]
    correct: list[bool]

    @property
    def accuracy(self) -> float:
        """Share of exact matches."""
        return sum(self.correct) / len(self.correct)

    def accuracy_of(self, kind: str, problems: Sequence[GraphProblem]) -> float:
        """Share of exact matches among the problems of one kind."""
        chosen = [right for right, problem in zip(self.correct, problems, strict=True) if problem.kind == kind]
        return sum(chosen) / len(chosen)


@torch.inference_mode()
def score(folder: Path, problems: Sequence[GraphProblem]) -> Score:
    """Score a Hugging Face folder on the CPU."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    renderer = PromptResponseRenderer(tokenizer)
    loss_sum, targets, responses = 0.0, 0, []
    for start in range(0, len(problems), BATCH_ROWS):
        batch = problems[start : start + BATCH_ROWS]
        part, count = _loss(model, renderer, batch, tokenizer.pad_token_id)
        loss_sum, targets = loss_sum + part, targets + count
        responses += _generate(model, tokenizer, renderer, batch)
    correct = [final_answer(text) == problem.answer for text, problem in zip(responses, problems, strict=True)]
    return Score(loss_sum / targets, responses, correct)


def _loss(
    model: Any, renderer: PromptResponseRenderer, batch: Sequence[GraphProblem], padding: int
) -> tuple[float, int]:
    """Sum of the cross-entropies of the supervised tokens, and their number."""
    rows = renderer.render([problem.prompt for problem in batch], [problem.response for problem in batch])
    longest = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), longest), padding)  # [B, S], padded on the right: causal attention never sees it
    labels = torch.full_like(ids, IGNORED)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = torch.tensor(row.ids)
        for first, last in row.spans:
            labels[index, first:last] = ids[index, first:last]
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]  # [B, S-1, V]
    targets = labels[:, 1:]
    total = cross_entropy(logits.flatten(0, 1).double(), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return total.item(), int((targets != IGNORED).sum())


def _generate(model: Any, tokenizer: Any, renderer: PromptResponseRenderer, batch: Sequence[GraphProblem]) -> list[str]:
    """Greedy responses, all prompts at once."""
    prompts = renderer.encode_prompts([problem.prompt for problem in batch])
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), tokenizer.pad_token_id)  # [B, S], padded on the left
    mask = torch.zeros_like(ids)
    for index, prompt in enumerate(prompts):
        ids[index, longest - len(prompt) :] = torch.tensor(prompt)
        mask[index, longest - len(prompt) :] = 1
    generated = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=MAX_NEW_TOKENS,
        eos_token_id=renderer.end_of_turn_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.batch_decode(generated[:, longest:], skip_special_tokens=True)
