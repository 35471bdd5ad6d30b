"""`sft-job train` as users start it: the run folder, the exit codes, what is on the screen."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.integration.conftest import Job, end


def outcome(job: Job) -> dict:
    return json.loads((job.run / "logs" / "outcome.json").read_text())


def metrics(job: Job) -> list[dict]:
    return [json.loads(line) for line in (job.run / "logs" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def done(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, str]:
    """A finished run over two ranks with Ulysses 2, and what it showed."""
    job = Job(inputs, tmp_path_factory.mktemp("done"))
    result = job("ulysses_sequence_parallel_size=2", NPROC_PER_NODE="2")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return job, result.stdout


def test_the_screen(done) -> None:
    _, screen = done
    assert "2 ranks on 1 node(s)" in screen
    assert "trainer.total_epochs = 2" in screen
    assert "(seed_sft_trainer.yaml:60)" in screen
    assert "a response ends with '<|im_end|>'" in screen
    assert "step 4/4  100%" in screen
    assert "validation loss" in screen
    assert "Traceback" not in screen


def test_the_run_folder(done) -> None:
    job, _ = done
    record = outcome(job)
    assert (record["code"], record["reason"], record["step"]) == (0, "done", 4)
    assert len(record["weights_sha256"]) == 64
    final = job.run / "checkpoints" / "final"
    assert final.is_symlink()
    assert {path.name for path in (final / "huggingface").iterdir()} >= {"model.safetensors", "tokenizer.json"}
    assert (job.run / "checkpoints" / "latest").read_text() == "global_step_4"
    assert "partial_pretrain" in (job.run / "logs" / "config.yaml").read_text()
    assert json.loads((job.run / "logs" / "data_report.json").read_text())["train"][0]["rows_read"] == 13
    hidden = [path for path in (job.run / "checkpoints").iterdir() if path.name.startswith(".")]
    assert hidden == []


def test_the_metrics(done) -> None:
    job, _ = done
    steps = [line for line in metrics(job) if "train/loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert steps[-1].keys() == {
        "step",
        "epoch",
        "train/loss",
        "train/lr",
        "train/grad_norm",
        "train/tokens",
        "train/supervised_tokens",
        "perf/tokens_per_second_per_gpu",
        "perf/model_tflops_per_gpu",
        "perf/mfu",
        "perf/step_seconds",
        "perf/data_wait_seconds",
        "perf/compilations",
        "data/padding_fraction",
        "data/cost_imbalance",
        "memory/peak_gib",
    }
    assert [line["step"] for line in metrics(job) if "val/loss" in line] == [4]


def test_the_export_gives_the_same_loss_in_plain_transformers(done) -> None:
    """Validation in the job and in plain transformers: the same rows, the same labels, the same weights."""
    import torch
    from transformers import AutoModelForCausalLM

    from sft_job.data.cache import open_cache

    job, _ = done
    folder = job.run / "checkpoints" / "final" / "huggingface"
    model = AutoModelForCausalLM.from_pretrained(folder)
    rows = open_cache(next((job.run / "cache").glob("val-*")))
    total = 0.0
    with torch.no_grad():
        for index in range(rows.num_rows):
            row = rows.row(index)
            ids = torch.tensor(row.ids[None].astype("int64"))
            losses = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
            total += losses[torch.tensor(row.trained[1:])].sum().item()
    assert total / int(rows.targets.sum()) == pytest.approx(metrics(job)[-1]["val/loss"], rel=1e-5)


def test_generation_stops_where_training_ended_turns(done) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    job, _ = done
    folder = job.run / "checkpoints" / "final" / "huggingface"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stops = GenerationConfig.from_pretrained(folder).eos_token_id
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in (stops if isinstance(stops, list) else [stops])
    assert tokenizer.chat_template


def test_done_twice_is_done_and_writes_nothing(done) -> None:
    job, _ = done
    before = {path: path.stat().st_mtime_ns for path in job.run.rglob("*")}
    again = job("ulysses_sequence_parallel_size=2", NPROC_PER_NODE="2")
    assert again.returncode == 0
    assert "already done" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in job.run.rglob("*")} == before


def test_export_command(done, tmp_path) -> None:
    import subprocess
    import sys

    from safetensors.torch import load_file

    job, _ = done
    command = [sys.executable, "-m", "sft_job.cli", "export", str(job.run), str(tmp_path / "out")]
    first = subprocess.run(command, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    mine = load_file(tmp_path / "out" / "model.safetensors")
    live = load_file(job.run / "checkpoints" / "final" / "huggingface" / "model.safetensors")
    assert mine.keys() == live.keys()
    assert all((mine[name] == live[name]).all() for name in live)
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 73
    assert "is not empty" in again.stderr


def wait_for_step(job: Job, step: int, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    path = job.run / "logs" / "metrics.jsonl"
    while not (path.exists() and f'"step": {step},' in path.read_text()):
        assert time.monotonic() < deadline, "the run did not get that far"
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGUSR2, marks=pytest.mark.slow)])
def test_a_signal_saves_and_the_next_start_goes_on(job, number) -> None:
    long = "trainer.total_epochs=200"
    process = job.start(long, NPROC_PER_NODE="2")
    try:
        wait_for_step(job, 2)
        # As Ctrl-C does it: to the whole process group of the command.
        os.killpg(process.pid, number)
        _, error = process.communicate(timeout=60)
    finally:
        end(process)
    assert process.returncode == 143
    assert "run it again to go on from global_step_" in error
    assert "Traceback" not in error
    record = outcome(job)
    assert (record["code"], record["reason"]) == (143, "stopped")
    saved = record["step"]
    assert saved >= 2

    finish = job(
        f"trainer.total_training_steps={saved + 2}",
        "trainer.allow_changed=[trainer.total_training_steps,trainer.total_epochs]",
    )
    assert finish.returncode == 0, finish.stderr
    assert outcome(job)["restarts"] == [{"cause": "stopped", "step": saved}]
    steps = [line["step"] for line in metrics(job) if "train/loss" in line]
    assert steps == list(range(1, saved + 3))


def test_a_killed_rank_ends_the_others(job, tmp_path) -> None:
    words = r"'\x1b[31mloading\x1b[0m a bell\x07 rings\n'"
    (tmp_path / "my_lib.py").write_text(f"import sys; sys.stderr.write({words})")
    path = f"{tmp_path}:{Path(__file__).parents[2]}"
    more = ["trainer.total_epochs=200", "model.external_lib=my_lib"]
    process = job.start(*more, NPROC_PER_NODE="2", PYTHONPATH=path)
    try:
        wait_for_step(job, 2)
        children = children_of(process)
        assert len(children) == 2
        os.kill(children[1], signal.SIGKILL)
        _, error = process.communicate(timeout=60)
    finally:
        end(process)
    assert process.returncode == 137
    assert "rank 1 was killed by SIGKILL" in error
    assert "last lines of rank_1.log:\n" in error
    assert "\n      loading a bell rings\n" in error
    assert not any(Path(f"/proc/{child}").exists() for child in children)


@pytest.mark.parametrize("log", ["prepare.log", "rank_1.log"])
def test_a_signal_before_the_first_step(job, log) -> None:
    """While rows are tokenised, and while the ranks import torch: 143, and a next start begins at the beginning."""
    process = job.start("trainer.total_epochs=200", NPROC_PER_NODE="2")
    try:
        deadline = time.monotonic() + 60
        while not (job.run / "logs" / log).exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=60)
    finally:
        end(process)
    assert process.returncode == 143, error
    assert "Traceback" not in error


def test_one_rank_is_asked_to_stop_and_all_save(job) -> None:
    process = job.start("trainer.total_epochs=200", NPROC_PER_NODE="2")
    try:
        wait_for_step(job, 2)
        os.kill(children_of(process)[1], signal.SIGTERM)
        _, error = process.communicate(timeout=60)
    finally:
        end(process)
    assert process.returncode == 143
    assert outcome(job)["step"] >= 2
    assert "go on from global_step_" in error


def children_of(process) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def gone(pid: int, seconds: float = 40.0) -> bool:
    deadline = time.monotonic() + seconds
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    return not Path(f"/proc/{pid}").exists()


@pytest.mark.slow
def test_a_killed_supervisor_takes_its_ranks_along(job) -> None:
    process = job.start("trainer.total_epochs=200", NPROC_PER_NODE="2")
    try:
        wait_for_step(job, 2)
        ranks = children_of(process)
        second = job("trainer.total_epochs=200")
        assert second.returncode == 73
        assert "held by another run" in second.stderr
        process.kill()
        process.wait()
        assert all(gone(rank) for rank in ranks)
    finally:
        end(process)
    saved = metrics(job)[-1]["step"]  # on losing their supervisor the ranks saved and left
    third = job.start("trainer.total_epochs=200", NPROC_PER_NODE="2")
    try:
        wait_for_step(job, saved + 2)
        third.send_signal(signal.SIGTERM)
        third.communicate(timeout=60)
    finally:
        end(third)
    assert [restart["cause"] for restart in outcome(job)["restarts"]] == ["lost"]


@pytest.mark.slow
def test_a_full_disk(job) -> None:
    """Files larger than the shell's limit cannot be written: 73, and the message says which step."""
    import shlex
    import subprocess

    command = shlex.join(job.command("trainer.save_freq=1"))
    result = subprocess.run(
        ["bash", "-c", f"ulimit -f 60; exec {command}"],
        env=job.variables(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 73, result.stderr
    assert "cannot save step" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_a_damaged_later_folder_does_not_hide_the_end(job) -> None:
    assert job("trainer.total_training_steps=2").returncode == 0
    (job.run / "checkpoints" / "global_step_9").mkdir()
    longer = job("trainer.total_training_steps=3")
    assert longer.returncode == 0, longer.stderr
    assert outcome(job)["checkpoint"].endswith("global_step_3")
    assert not (job.run / "checkpoints" / "global_step_9").exists()


@pytest.mark.slow
def test_an_allowed_change_takes_effect(job) -> None:
    """Of two runs that go on from one checkpoint with another weight decay, one is allowed and ends elsewhere."""
    import shutil

    assert job("trainer.total_training_steps=1", "optim.lr=1e-2", "optim.lr_scheduler=constant").returncode == 0
    more = ["trainer.total_training_steps=2", "optim.lr=1e-2", "optim.lr_scheduler=constant"]
    shutil.copytree(job.root / "ckpt", job.root / "copy", symlinks=True)
    assert job(*more).returncode == 0
    changed = job(
        *more,
        "optim.weight_decay=0.9",
        "trainer.allow_changed=[optim.weight_decay]",
        CHECKPOINT_DIR=str(job.root / "copy"),
    )
    assert changed.returncode == 0, changed.stderr
    other = json.loads((job.root / "copy" / "sft" / "logs" / "outcome.json").read_text())
    assert other["weights_sha256"] != outcome(job)["weights_sha256"]


@pytest.mark.slow
def test_a_second_place_for_checkpoints(job) -> None:
    """Uploaded when published, and where the run folder is lost the run goes on from there."""
    import shutil

    where = [f"trainer.default_hdfs_dir=file://{job.root}/store", "trainer.logger=[tensorboard, file]"]
    short = job("trainer.total_training_steps=2", "trainer.save_freq=1", "optim.lr_scheduler=constant", *where)
    assert short.returncode == 0, short.stderr
    assert {path.name for path in (job.root / "store").iterdir()} >= {"global_step_1", "global_step_2", "latest"}
    assert list((job.run / "tensorboard").iterdir())
    shutil.rmtree(job.root / "ckpt")
    longer = job("trainer.total_training_steps=3", "trainer.save_freq=1", "optim.lr_scheduler=constant", *where)
    assert longer.returncode == 0, longer.stderr
    assert [line["step"] for line in metrics(job) if "train/loss" in line] == [3]
    assert (job.root / "store" / "latest").read_text() == "global_step_3"


@pytest.mark.slow
def test_external_lib_and_shared_memory(job, tmp_path) -> None:
    (tmp_path / "my_lib.py").write_text("import pathlib; pathlib.Path(__file__).with_suffix('.seen').touch()")
    shared = ["model.use_shm=true", "data.use_shm=true", "trainer.total_training_steps=1"]
    assert (
        job("model.external_lib=my_lib", *shared, PYTHONPATH=f"{tmp_path}:{Path(__file__).parents[2]}").returncode == 0
    )
    assert (tmp_path / "my_lib.seen").exists()
    missing = job("model.external_lib=nonesuch_lib")
    assert missing.returncode == 2
    assert "nonesuch_lib" in missing.stderr


def test_under_torchrun(job) -> None:
    """The worker runs without our supervisor too."""
    import subprocess
    import sys

    command = job.command("trainer.total_training_steps=2", "ulysses_sequence_parallel_size=2")[4:]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [*torchrun, "-m", "sft_job.train", *command],
        env={name: value for name, value in job.variables().items() if name != "NPROC_PER_NODE"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert [line["step"] for line in metrics(job) if "train/loss" in line] == [1, 2]


def test_non_finite_loss(job, inputs, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    for path in (inputs / "qwen3").iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    result = job(f"model.partial_pretrain={broken}")
    assert result.returncode == 87
    assert "step 1: loss nan" in result.stderr
    assert "rows of this batch" in result.stderr
    assert "Traceback" not in result.stderr
    assert outcome(job)["code"] == 87


def test_unwritable_run_folder(job) -> None:
    job.root.joinpath("ckpt").write_text("a file where the folder should be")
    result = job()
    assert result.returncode == 73
    assert "cannot be written" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_conversations(job: Job) -> None:
    """Rows of messages with tools, from the parquet file to a model, on two ranks."""
    call = {"type": "function", "function": {"name": "neighbours", "arguments": '{"node": 3}'}}
    tool = {"type": "function", "function": {"name": "neighbours", "parameters": '{"type": "object"}'}}
    rows = [
        [
            {"role": "user", "content": f"graph {row}"},
            {"role": "assistant", "content": "node", "tool_calls": [call] if row % 2 else None},
            *([{"role": "tool", "content": "edge"}, {"role": "assistant", "content": "tree"}] if row % 2 else []),
        ]
        for row in range(8)
    ]
    path = job.root / "messages.parquet"
    pq.write_table(pa.table({"messages": rows, "tools": [[tool] if row % 2 else None for row in range(8)]}), path)
    template = job.root / "template.jinja"
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    options = (
        f"data.train_files={path}",
        "data.val_files=null",
        "data.multiturn.enable=true",
        f"data.chat_template={template}",
    )
    checked = job(*options, verb="check")
    assert checked.returncode == 0, checked.stdout
    result = job(*options, "data.train_batch_size=4", "trainer.total_epochs=1", NPROC_PER_NODE="2")
    assert result.returncode == 0, result.stderr
    report = json.loads((job.run / "logs" / "data_report.json").read_text())["train"][0]
    assert (report["rows_usable"], report["rows_rejected"]) == (8, 0)
    assert metrics(job)[-1]["train/supervised_tokens"] == report["trained_tokens"]
