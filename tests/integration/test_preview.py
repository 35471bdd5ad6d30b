"""``sft-job preview`` as people and programs call it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

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


def test_colours_and_marks(job) -> None:
    coloured = job(verb="preview", FORCE_COLOR="1", TERM="xterm-256color")
    assert coloured.returncode == 0, coloured.stderr
    assert "\x1b[1;4;" in coloured.stdout
    assert "⟦" not in coloured.stdout
    quiet = job(verb="preview", FORCE_COLOR="1", NO_COLOR="1", TERM="xterm-256color", PYTHONIOENCODING="ascii")
    assert quiet.returncode == 0, quiet.stderr
    assert "\\u27e6" in quiet.stdout  # what the terminal cannot say is written out


@pytest.mark.slow
def test_a_reader_that_leaves(job) -> None:
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
