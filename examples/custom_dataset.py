"""A data set class of your own: questions with a hint that the model reads but is not trained to write.

The files have the columns ``question``, ``hint`` and ``answer``. The run's YAML says

    data:
      custom_cls:
        path: examples/custom_dataset.py
        name: HintedQuestions

Each process that tokenises (``data.num_workers``) has an instance of its own and asks it for its share of the rows,
once; the tokens are kept in the token cache. Change this file, and the cache is made anew.
"""

from __future__ import annotations

from typing import Any

import pyarrow.parquet as pq


class HintedQuestions:
    """Rows ``question, hint, answer`` of parquet files.

    Args:
        parquet_files: paths, in the order of ``data.train_files`` or ``data.val_files``.
        tokenizer: the model's, from transformers.
        config: the settings below ``data``: ``config.max_length``, ``config.get("prompt_key")`` and so on.
    """

    def __init__(self, parquet_files: list[str], tokenizer: Any, config: Any) -> None:
        columns = ["question", "hint", "answer"]
        self._rows = [row for file in parquet_files for row in pq.read_table(file, columns=columns).to_pylist()]
        self._tokenizer = tokenizer
        self._template_kwargs = dict(config.apply_chat_template_kwargs)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        row = self._rows[index]
        prompt = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": row["question"]}],
            add_generation_prompt=True,
            tokenize=False,
            **self._template_kwargs,
        )
        # (text, trained): the hint begins the model's turn, but only the answer and the turn's end are trained.
        pieces = [
            (prompt, 0),
            (f"Hint: {row['hint']}\n", 0),
            (row["answer"] + self._tokenizer.eos_token, 1),
        ]
        input_ids: list[int] = []
        loss_mask: list[int] = []
        for text, trained in pieces:
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            input_ids += ids
            loss_mask += [trained] * len(ids)
        return {"input_ids": input_ids, "loss_mask": loss_mask}
