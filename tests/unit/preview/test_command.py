"""The verb in this process: what it writes where, and how it ends."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

from sft_job.cli import app
from tests.tiny import save_model, write_rows

Preview = Callable[..., Result]


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_model(folder / "model")
    write_rows(folder / "train.parquet", 13)
    write_rows(folder / "val.parquet", 5, seed=1)
    (folder / "config.yaml").write_text(
        f"data: {{train_files: {folder}/train.parquet, val_files: {folder}/val.parquet, max_length: 256, "
        f"train_batch_size: 8}}\nmodel: {{partial_pretrain: {folder}/model}}\n"
        f"trainer: {{default_local_dir: {folder}/run}}\n"
    )
    return folder


@pytest.fixture
def preview(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> Preview:
    for name in [name for name in os.environ if name.startswith(("PET_", "NPROC", "CONFIG_", "CHECKPOINT", "NNODES"))]:
        monkeypatch.delenv(name)

    def run(*words: str) -> Result:
        result = CliRunner().invoke(app, ["preview", str(inputs / "config.yaml"), *words])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    return run


def test_in_a_pipe(preview: Preview) -> None:
    result = preview()
    assert result.exit_code == 0, result.stderr
    assert "⟦" in result.stdout
    assert "\x1b" not in result.stdout
    assert "step 1 of 8 (epoch 1): 8 rows" in result.stdout


def test_page_and_report(preview: Preview, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    result = preview("--html", str(page), "--report")
    assert result.exit_code == 0, result.stderr
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    for part in (f"wrote {page}", "train: data report", "val: data report", "longest row", "train.parquet"):
        assert part in result.stdout


def test_ranks_of_another_machine(preview: Preview) -> None:
    layout = ("ulysses_sequence_parallel_size=2", "data.micro_batch_size_per_gpu=1")
    assert preview(*layout).exit_code == 2
    result = preview("--ranks", "4", *layout)
    assert result.exit_code == 0, result.stderr
    assert "4 ranks = 2 data-parallel x 2 Ulysses, 4 micro-batches each" in result.stdout


def test_one_row(preview: Preview, inputs: Path) -> None:
    result = preview("--row", "train.parquet:5", "--json", "-")
    assert result.exit_code == 0, result.stderr
    (record,) = [json.loads(line) for line in result.stdout.splitlines()]
    assert pq.read_table(inputs / "train.parquet")["prompt"][5].as_py() in record["text"]
    assert record["row"] == f"{inputs}/train.parquet:5"
    assert json.loads(preview("--row", "5", "--json", "-").stdout) == record


def test_a_row_of_validation(preview: Preview, inputs: Path) -> None:
    result = preview("--row", "val.parquet:3", "--json", "-")
    assert result.exit_code == 0, result.stderr
    (record,) = [json.loads(line) for line in result.stdout.splitlines()]
    rows = pq.read_table(inputs / "val.parquet")
    assert rows["prompt"][3].as_py() in record["text"]
    assert (record["row"], record["pack"], record["reject_reason"]) == (f"{inputs}/val.parquet:3", None, None)
    # The same file as training rows: the same labels.
    twin = preview(
        "--row",
        "val.parquet:3",
        "--json",
        "-",
        f"data.train_files={inputs}/val.parquet",
        "data.val_files=null",
        "data.train_batch_size=2",
    )
    same = json.loads(twin.stdout)
    assert [record[key] for key in ("input_ids", "labels", "position_ids")] == [
        same[key] for key in ("input_ids", "labels", "position_ids")
    ]
    shown = preview("--row", "val.parquet:3").stdout
    assert "in the loss; validation, not trained" in shown
    assert "⟦" in shown
    named = f"data.val_files={{a: {inputs}/train.parquet, b: {inputs}/val.parquet}}"
    assert json.loads(preview(named, "--row", "val.parquet:3", "--json", "-").stdout) == record
    # A file of both is shown where it is trained.
    assert json.loads(preview(named, "--row", "train.parquet:3", "--json", "-").stdout)["pack"]


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (("--row", "val.parquet:5"), 65, "has 5 rows, numbered from 0 to 4"),
        (("--row", "val.parquet:4", "data.val_max_samples=2"), 0, "beyond data.val_max_samples = 2"),
        (("--row", "train.parquet:13"), 65, "has 13 rows, numbered from 0 to 12"),
        (("--row", "99"), 65, "the token cache has 13 rows, numbered from 0 to 12"),
        (("--row", "nowhere.parquet:0"), 65, "no such file among: "),
        (("--row", "train.parquet"), 2, "must be FILE:ROW"),
        (("--row", "train.parquet:9", "data.train_max_samples=5"), 0, "beyond data.train_max_samples = 5"),
        (("--step", "9999"), 2, "the run has the steps 1 to 8"),
        (("--rows", "0"), 2, "must be at least 1"),
        (("--html", "/nowhere/a.html"), 73, "a folder that does not exist"),
        (("data.prompt_key=question",), 65, "question"),
        (("optim.lrr=1", "model.partial_pretrain=/nowhere"), 2, "/nowhere"),
        (("model.partial_pretrain=/nowhere",), 66, "/nowhere"),
    ],
)
def test_ends(preview: Preview, options: tuple[str, ...], code: int, told: str) -> None:
    result = preview(*options)
    assert result.exit_code == code, result.stderr
    assert told in (result.stderr if code else result.stdout)


def test_a_row_that_is_not_trained(preview: Preview, tmp_path: Path) -> None:
    """It is the reason that nothing can be trained, and that is what is shown."""
    pq.write_table(pa.table({"prompt": ["a", None], "response": ["b", "c"]}), tmp_path / "bad.parquet")
    bad = f"data.train_files={tmp_path}/bad.parquet"
    result = preview(bad, "--row", "bad.parquet:1", "--json", "-")
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    assert record["reject_reason"].startswith("no_text: ")
    assert record["input_ids"] == []
    told = preview(bad, "--row", "bad.parquet:1", "--html", str(tmp_path / "a.html"))
    assert "not trained" in told.stdout
    assert "is not written" in told.stdout
    assert preview(bad, "--row", "bad.parquet:0").exit_code == 65
    assert preview(bad).exit_code == 65


def test_a_model_without_weights_will_do(preview: Preview, inputs: Path, tmp_path: Path) -> None:
    for path in (inputs / "model").iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    result = preview(f"model.partial_pretrain={tmp_path}")
    assert result.exit_code == 0, result.stderr
    assert "train would end with 66" in result.stderr
