"""Wrong input: one screen with everything that is wrong, the right exit code, never a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import CHATML


def test_all_problems_at_once(job, tmp_path) -> None:
    result = job(
        "data.train_files=/nowhere/train.parquet",
        "model.partial_pretrain=/nowhere/model",
        "optim.lrr=1",
        "data.truncation=middle",
        "data.train_batch_size=eight",
    )
    assert result.returncode == 2
    for part in ("/nowhere/train.parquet", "/nowhere/model", "optim.lrr", "middle", "eight"):
        assert part in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "ckpt").exists()


@pytest.mark.parametrize(
    ("override", "code", "shown"),
    [
        ("data.train_files=/nowhere/train.parquet", 65, "/nowhere/train.parquet"),
        ("data.prompt_key=question", 65, "question"),
        ("model.partial_pretrain=/nowhere/model", 66, "/nowhere/model"),
        ("ulysses_sequence_parallel_size=3", 2, "ulysses_sequence_parallel_size"),
    ],
)
@pytest.mark.parametrize("verb", ["train", "check"])
def test_exit_codes(job, override, code, shown, verb) -> None:
    result = job(override, verb=verb)
    assert result.returncode == code, result.stderr
    assert shown in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("module", ["sft_job.cli", "sft_job.train"])
def test_a_full_disk_under_standard_error_is_no_other_exit_code(tmp_path, module) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("optim:\n  lr: much\n")
    verb, others = ("train ", (">/dev/full 2>&1", "2>&-")) if module == "sft_job.cli" else ("", ())
    for redirect in ("2>/dev/full", *others):
        line = f"exec '{sys.executable}' -m {module} {verb}'{bad}' {redirect}"
        result = subprocess.run(["sh", "-c", line], capture_output=True, check=False, timeout=60)
        assert result.returncode == 2, redirect


def test_rows_that_are_wrong(job, tmp_path) -> None:
    """Refused before any weight is read (there are none), listed whole, and let go where the setting says so."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    prompts, file = ["a", None, "c", "d"], tmp_path / "bad.parquet"
    pq.write_table(pa.table({"prompt": prompts, "response": ["b", "c", "", "e"]}), file)
    (tmp_path / "model").mkdir()
    for path in (job.inputs / "qwen3").iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    weightless = f"model.partial_pretrain={tmp_path}/model"
    rejected = job.run / "logs" / "rejected_rows.parquet"
    for verb, shown in (("check", "prompt is null"), ("train", str(rejected))):
        result = job(f"data.train_files={file}", weightless, "model.init=random", verb=verb)
        assert result.returncode == 65, result.stderr
        assert f"{file} row 1: prompt is null" in result.stderr
        assert shown in result.stderr
        assert "with 0.25 the run goes on" in result.stderr
        assert "Traceback" not in result.stderr
        assert rejected.exists() is (verb == "train")
    assert [(row["file"], row["row"]) for row in pq.read_table(rejected).to_pylist()] == [(str(file), 1)]
    (report,) = json.loads((job.run / "logs" / "data_report.json").read_text())["train"]
    assert (report["rows_usable"], report["rejected"]) == (3, {"no_text": 1})
    allowed = job(f"data.train_files={file}", "data.max_rejected_fraction=0.25", verb="check")
    assert allowed.returncode == 0, allowed.stderr
    assert "1 of 4 rows of data.train_files (25 %) cannot be used" in " ".join(allowed.stdout.split())


@pytest.mark.parametrize(("verb", "place"), [("check", "footer"), ("check", "page"), ("train", "page")])
def test_damaged_parquet(job, inputs, tmp_path, verb, place) -> None:
    """Pages with checksums; a file beside it is named good."""
    import pyarrow.parquet as pq

    bad = tmp_path / "bad.parquet"
    pq.write_table(pq.read_table(inputs / "train.parquet"), bad, write_page_checksum=True, compression="none")
    content = bytearray(bad.read_bytes())
    content[content.index(b"graph") if place == "page" else len(content) - 100] ^= 1
    if place == "footer":
        content[-200:-12] = bytes(188)
    bad.write_bytes(content)
    result = job(f"data.train_files=[{inputs}/train.parquet,{bad}]", verb=verb)
    assert result.returncode == 65, result.stderr
    assert str(bad) + (" row group 0: " if place == "page" else "") in result.stderr
    assert ("rows cannot be read" if place == "page" else "the other 1 file is good") in result.stderr
    assert f"{inputs}/train.parquet" not in result.stderr
    assert "Traceback" not in result.stderr


def test_overlong_rows_under_error(job) -> None:
    result = job("data.max_length=20", "data.truncation=error")
    assert result.returncode == 65
    assert "longer than 20 tokens" in result.stderr


def test_damaged_weights(job, inputs, tmp_path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in (inputs / "qwen3").iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    result = job(f"model.partial_pretrain={broken}")
    assert result.returncode == 66
    assert "Traceback" not in result.stderr


def test_check_of_a_good_config(job) -> None:
    result = job(verb="check")
    assert result.returncode == 0, result.stderr
    assert "ready to train" in result.stdout
    assert "of 13 rows looked at" in result.stdout
    assert not job.run.exists()


def test_without_any_config(tmp_path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "sft_job.cli", "train"],
        env={"PATH": "/usr/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert result.returncode == 2
    assert "CONFIG_PATH" in result.stderr
    assert "Traceback" not in result.stderr


def test_version() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "sft_job.cli", "--version"], capture_output=True, text=True, check=False
    )
    assert result.stdout.startswith("sft-job 0.")
    assert "commit" in result.stdout


def test_a_tokenizer_larger_than_the_model(job, inputs, tmp_path) -> None:
    import json

    broken = tmp_path / "broken"
    broken.mkdir()
    for path in (inputs / "qwen3").iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"vocab_size": 250}))
    result = job(f"model.partial_pretrain={broken}", "model.init=random")
    assert result.returncode == 66, result.stderr
    assert "the model's vocabulary ends at 249" in result.stderr


def test_an_unsupported_architecture(job, inputs, tmp_path) -> None:
    """Refused by train before any row is tokenised, and by check."""
    from transformers import BloomConfig

    broken = tmp_path / "broken"
    broken.mkdir()
    for path in (inputs / "qwen3").iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    config = BloomConfig(vocab_size=400, hidden_size=32, n_layer=2, n_head=4, architectures=["BloomForCausalLM"])
    config.save_pretrained(broken)
    for verb in ("train", "check"):
        result = job(f"model.partial_pretrain={broken}", "model.init=random", verb=verb)
        assert result.returncode == 2, result.stderr
        assert "bloom is not supported" in result.stderr
    assert not list(job.run.glob("cache/train-*"))


@pytest.mark.slow
def test_nobody_reads_the_screen(job) -> None:
    """`sft-job train | head -1`: the run goes on."""
    import shlex

    command = shlex.join(job.command())
    result = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | head -1"],
        env=job.variables(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (job.run / "checkpoints" / "final").exists(), result.stderr


@pytest.mark.slow
def test_check_says_what_train_would_say_of_the_run_folder(job) -> None:
    assert job().returncode == 0
    for verb in ("train", "check"):
        changed = job("optim.lr=3e-5", verb=verb)
        assert changed.returncode == 2
        assert "optim.lr = 3e-05" in changed.stderr


@pytest.mark.slow
def test_a_broken_template_is_refused_before_anything_is_tokenised(job, tmp_path) -> None:
    (tmp_path / "broken.jinja").write_text(CHATML.split("{% if")[0])
    for verb in ("train", "check"):
        result = job(f"data.chat_template={tmp_path}/broken.jinja", verb=verb)
        assert result.returncode == 2, result.stderr
        assert "data.chat_template\n    writes no generation prompt" in result.stderr
        assert "Traceback" not in result.stderr
    assert not (job.run / "cache").exists()
