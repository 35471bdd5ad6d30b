from __future__ import annotations

import json

from sft_job.data.cache import TokenCache
from sft_job.preview.json_lines import json_lines
from sft_job.preview.rows import PreviewRow
from sft_job.preview.text import TokenTexts
from tests.unit.preview.conftest import ODD, MakeStream


def test_lines(stream: MakeStream, texts: TokenTexts, cache: TokenCache) -> None:
    chosen = stream(world=2, ulysses=2).first_rows(1, 1000)
    lines = list(json_lines(((pack, row) for pack, rows in chosen for row in rows), texts))
    assert len(lines) == len(cache)
    for line in lines:
        assert line.isascii()
        assert line.count("\n") == 1
        record = json.loads(line)
        file, _, number = record["row"].rpartition(":")
        (index,) = [i for i in range(len(cache)) if cache.origin(i) == (type(cache.files[0])(file), int(number))]
        kept = cache.row(index)
        assert record["input_ids"] == kept.ids.tolist()
        want = [
            token if on and place else -100
            for place, (token, on) in enumerate(zip(kept.ids.tolist(), kept.trained, strict=True))
        ]
        assert record["labels"] == want
        assert record["position_ids"] == list(range(len(want)))
        assert record["reject_reason"] is None
        if file.endswith("odd.parquet"):
            prompt, response = ODD[int(number)]
            assert record["text"].endswith(f"{prompt}<|im_end|>\n<|im_start|>assistant\n{response}<|im_end|>")


def test_a_rejected_row(texts: TokenTexts, cache: TokenCache) -> None:
    (line,) = json_lines([(None, PreviewRow(cache.files[0], 3, reject_reason="no text"))], texts)
    assert json.loads(line) == {
        "row": f"{cache.files[0]}:3",
        "input_ids": [],
        "labels": [],
        "position_ids": [],
        "text": "",
        "reject_reason": "no text",
        "pack": None,
    }
