"""``sft-job preview`` as people and programs call it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sft_job.data.batches import IGNORED, BatchLoader
from sft_job.data.cache import open_cache
from sft_job.data.order import RowOrder
from sft_job.data.packing import PackSettings


def test_json_lines_are_the_training_batch(job, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    size = ("data.train_batch_size=6", "data.micro_batch_size_per_gpu=2", "ulysses_sequence_parallel_size=2")
    result = job(*size, "--step", "2", "--rows", "6", "--json", str(out), verb="preview", NPROC_PER_NODE="4")
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in out.read_text().splitlines()]
    (folder,) = (job.run / "cache").glob("train-*")
    cache = open_cache(folder)
    order, packing = RowOrder(1, cache.num_rows, 6), PackSettings(rows=2)
    shown = 0
    for dp_rank in range(2):
        place = {"dp_rank": dp_rank, "dp_size": 2, "ulysses_size": 2, "pad_id": 0}
        halves = [BatchLoader(cache, order, packing, ulysses_rank=rank, **place).batch(1) for rank in range(2)]
        for number, pair in enumerate(zip(*(half.micro_batches for half in halves), strict=True), start=1):
            ids, targets = (torch.cat([getattr(half, name)[0] for half in pair]) for name in ("input_ids", "targets"))
            ranks = [2 * dp_rank, 2 * dp_rank + 1]
            here = [r for r in records if r["pack"]["ranks"] == ranks and r["pack"]["micro_batch"] == number]
            tokens = [token for r in here for token in r["input_ids"]]
            shifted = [label for r in here for label in (*r["labels"][1:], IGNORED)]
            assert tokens == ids[: pair[0].num_tokens].tolist()
            assert shifted == targets[: pair[0].num_tokens].tolist()
            shown += len(here)
    assert shown == len(records) == 6
    assert {record["pack"]["step"] for record in records} == {2}


def test_terminal_page_and_report(job, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    plain = job(verb="preview")
    assert plain.returncode == 0, plain.stderr
    assert "⟦" in plain.stdout
    assert "\x1b" not in plain.stdout
    assert "step 1 of " in plain.stdout
    coloured = job(verb="preview", FORCE_COLOR="1", TERM="xterm-256color")
    assert "\x1b[1;4;" in coloured.stdout
    quiet = job(verb="preview", FORCE_COLOR="1", NO_COLOR="1", TERM="xterm-256color")
    assert "⟦" in quiet.stdout
    written = job("--html", str(page), "--report", verb="preview")
    assert written.returncode == 0, written.stderr
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    for part in ("train: data report", "val: data report", "longest row", "train.parquet"):
        assert part in written.stdout


def test_one_row(job, inputs: Path) -> None:
    result = job("--row", "train.parquet:5", "--json", "-", verb="preview")
    assert result.returncode == 0, result.stderr
    (record,) = [json.loads(line) for line in result.stdout.splitlines()]
    prompt = pq.read_table(inputs / "train.parquet")["prompt"][5].as_py()
    assert prompt in record["text"]
    assert record["row"] == f"{inputs}/train.parquet:5"


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (("--row", "train.parquet:13"), 65, "has 13 rows, numbered from 0 to 12"),
        (("--row", "99"), 65, "the token cache has 13 rows, numbered from 0 to 12"),
        (("--row", "nowhere.parquet:0"), 65, "no such file among: "),
        (("--row", "train.parquet"), 2, "must be FILE:ROW"),
        (("--step", "9999"), 2, "the run has the steps 1 to "),
        (("--rows", "0"), 2, "must be at least 1"),
        (("--html", "/nowhere/a.html"), 73, "a folder that does not exist"),
        (("data.prompt_key=question",), 65, "question"),
        (("optim.lrr=1", "model.partial_pretrain=/nowhere"), 2, "/nowhere"),
        (("model.partial_pretrain=/nowhere",), 66, "/nowhere"),
    ],
)
def test_errors(job, options: tuple[str, ...], code: int, told: str) -> None:
    result = job(*options, verb="preview")
    assert result.returncode == code, result.stderr
    assert told in result.stderr
    assert "Traceback" not in result.stderr


def test_a_row_that_is_not_trained(job, tmp_path: Path) -> None:
    """It is the reason that nothing can be trained, and that is what is shown."""
    pq.write_table(pa.table({"prompt": ["a", None], "response": ["b", "c"]}), tmp_path / "bad.parquet")
    bad = f"data.train_files={tmp_path}/bad.parquet"
    result = job(bad, "--row", "bad.parquet:1", "--json", "-", verb="preview")
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout)
    assert record["reject_reason"].startswith("no text: ")
    assert record["input_ids"] == []
    assert "not trained" in job(bad, "--row", "bad.parquet:1", verb="preview").stdout
    assert job(bad, "--row", "bad.parquet:0", verb="preview").returncode == 65
    assert job(bad, verb="preview").returncode == 65


def test_a_model_without_weights_will_do(job, inputs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer-only"
    folder.mkdir()
    for path in (inputs / "qwen3").iterdir():
        if path.suffix != ".safetensors":
            os.link(path, folder / path.name)
    result = job(f"model.partial_pretrain={folder}", verb="preview")
    assert result.returncode == 0, result.stderr
    assert "train would end with 66" in result.stderr


def test_a_reader_that_leaves(job) -> None:
    import subprocess

    reader = subprocess.Popen(["true"], stdin=subprocess.PIPE)
    reader.wait()
    assert reader.stdin is not None
    result = subprocess.run(
        job.command("--json", "-", "--rows", "13", verb="preview"),
        env=job.variables(),
        stdout=reader.stdin,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "bug" not in result.stderr
