"""Named data sets through the real command: a line for each in check, and the whole way from prepare to metrics."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sft_job.errors import JobError, raise_problems
from sft_job.opening import examined
from tests.integration.conftest import SEED_YAML


@pytest.mark.slow
def test_sets_from_check_to_metrics(job, tmp_path) -> None:
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"task": ["one two", "three", "four"], "response": ["a b", "c", "d e f"]}), other)
    code = f"code: {{files: {other}, prompt_key: task, weight: 1}}"
    overrides = (
        f"data.train_files={{math: {{files: {job.inputs}/train.parquet, weight: 3}}, {code}}}",
        f"data.val_files={{math: {job.inputs}/val.parquet, code: {{files: {other}, prompt_key: task}}}}",
        "data.train_batch_size=4",
        "trainer.total_epochs=1",
    )
    checked = job(*overrides, verb="check")
    assert checked.returncode == 0, checked.stderr
    lines = [line.split() for line in checked.stdout.splitlines()]
    starts = [" ".join(line[:5]) for line in lines if line[:1] in (["train"], ["val"])]
    assert starts == [
        "train code, weight 1 1",
        "train math, weight 3 1",
        "val code 1 files; of",
        "val math 1 files; of",
    ]
    result = job(*overrides)
    assert result.returncode == 0, result.stderr
    assert "data set math: 13 rows" in result.stdout
    assert "12 of an epoch's 16 rows (75.0%)" in result.stdout
    steps = [json.loads(line) for line in (job.run / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert steps[3]["data/math/epoch"] == 12 / 13
    assert steps[3]["data/code/epoch"] == 4 / 3
    assert {"val/loss", "val/math/loss", "val/code/loss"} <= steps[-1].keys()
    report = json.loads((job.run / "logs" / "data_report.json").read_text())
    assert [each["name"] for each in report["train"]] == ["code", "math"]


def test_settings_and_files_of_sets_at_once(inputs) -> None:
    """What ``train`` and ``check`` look at before anything starts."""
    environ = {"CHECKPOINT_DIR": "/no", "NPROC_PER_NODE": "1"}
    sets = f"data.train_files={{math: {{files: {inputs}/train.parquet, wieght: 3}}, gone: /no/where.parquet}}"
    more = ("ulysses_sequence_parallel_size=1", f"model.partial_pretrain={inputs}/qwen3", "data.prompt_key=nope")
    val = "data.val_files={v: /no/val.parquet}"

    def refused(*overrides: str) -> JobError:
        with pytest.raises(JobError) as raised:
            raise_problems(examined(str(SEED_YAML), [*more, *overrides], environ).problems)
        return raised.value

    settings = refused(sets, val)
    assert settings.code == 2
    assert "did you mean data.train_files.math.weight?" in str(settings)
    assert "command line: data.val_files.v = '/no/val.parquet'" in str(settings)
    files = refused(sets.replace("wieght", "weight"), val)
    assert files.code == 65
    assert "command line: data.train_files.gone = '/no/where.parquet'" in str(files)
    assert "command line: data.prompt_key" in str(files)
