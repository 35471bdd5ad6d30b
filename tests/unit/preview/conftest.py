"""One token cache of rows that are hard to show, and what makes a stream of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sft_job.config.schema import JobConfig
from sft_job.data.cache import CacheSpec, TokenCache, open_or_build
from sft_job.data.columns import Column
from sft_job.preview.rows import TrainingStream
from sft_job.preview.text import TokenTexts
from tests.tiny import save_tokenizer, write_rows

ODD = [
    ("Hi <script>alert(1)</script>\u202e & \u200b", "</script><img src=x onerror=alert(1)> {{ 7 * 7 }}\n\n  in  "),
    ("what? 😀👨‍👩‍👧 é 漢字 \x00\x07\x1b[31m", "🎉 ok\r\nline\t tab "),
    ("قل مرحبا ثم שלום", "مرحبا بالعالم! 123"),
    ("same", "row"),
    ("same", "row"),
    ("long " * 300, "word " * 400),
]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("tokenizer")
    return folder, save_tokenizer(folder)


@pytest.fixture(scope="session")
def spec(tokenizer: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> CacheSpec:
    folder = tmp_path_factory.mktemp("rows")
    odd = pa.table({"prompt": [row[0] for row in ODD], "response": [row[1] for row in ODD]})
    pq.write_table(odd, folder / "odd.parquet")
    files = (write_rows(folder / "a" / "plain.parquet", 17), folder / "odd.parquet")
    text = [(Column(f"data.{name}_key", name),) for name in ("prompt", "response")]
    return CacheSpec("train", files, *text, tokenizer=tokenizer[0], max_length=4000, truncation="error")


@pytest.fixture(scope="session")
def cache(spec: CacheSpec, tmp_path_factory: pytest.TempPathFactory) -> TokenCache:
    return open_or_build(spec, tmp_path_factory.mktemp("cache"), 1)


@pytest.fixture(scope="session")
def texts(tokenizer: tuple[Path, Any]) -> TokenTexts:
    return TokenTexts(tokenizer[1])


MakeStream = Callable[..., TrainingStream]


def job_config(batch: int = 8, micro: int = 3, ulysses: int = 1, tokens: int | None = None) -> JobConfig:
    config = JobConfig()
    config.data.train_batch_size = batch
    config.data.micro_batch_size_per_gpu = micro
    config.data.use_dynamic_bsz = tokens is not None
    config.data.max_token_len_per_gpu = tokens or 1
    config.ulysses_sequence_parallel_size = ulysses
    config.trainer.total_epochs = 2
    return config


@pytest.fixture
def stream(cache: TokenCache) -> MakeStream:
    return lambda world=1, **settings: TrainingStream(job_config(**settings), cache, world)
