"""Stopped after any step and started again, a run ends with the same bits as one that was never stopped."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.checkpoint as dcp

from sft_job.checkpoint.files import Files
from tests.distributed.runs import Watched, run_job, run_jobs, seed_config

# 13 rows in batches of 4: steps 4 and 8 end an epoch with a batch of one row.
TOTAL = 8


def config_of(inputs: Path, run: Path, *overrides: str):
    return seed_config(
        inputs / "qwen3",
        inputs / "train.parquet",
        inputs / "val.parquet",
        run,
        "ulysses_sequence_parallel_size=1",
        "data.train_batch_size=4",
        "data.micro_batch_size_per_gpu=2",
        "optim.lr=1e-2",
        "model.fsdp_config.model_dtype=fp32",
        "trainer.test_freq=after_each_epoch",
        *overrides,
    )


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]


def final_state(run: Path) -> dict:
    return json.loads((run / "checkpoints" / "final" / "state.json").read_text())


@pytest.fixture(scope="module")
def straight(inputs: Path, tmp_path_factory: pytest.TempPathFactory, ranks) -> tuple[Watched, Path]:
    run = tmp_path_factory.mktemp("straight") / "run"
    return ranks(2, run_job, config_of(inputs, run))[0], run


@pytest.mark.parametrize("stop", [1, 3, 4, 5, 7])
def test_stop_and_go_on(inputs, tmp_path, ranks, straight, stop) -> None:
    reference, reference_run = straight
    run = tmp_path / "run"
    config = config_of(inputs, run)
    first, second = ranks(2, run_jobs, [(config, {"stop_after": stop}), (config, {})])[0]
    assert first.stopped
    assert first.step == stop
    assert not second.stopped
    assert second.step == TOTAL
    assert second.weights_sha256 == reference.weights_sha256
    assert first.losses + second.losses == reference.losses
    assert first.rates + second.rates == reference.rates
    assert first.rows + second.rows == reference.rows
    assert first.documents + second.documents == reference.documents
    shown = ("step", "epoch", "train/loss", "train/lr", "train/tokens", "train/supervised_tokens", "val/loss")
    assert [{k: r[k] for k in shown if k in r} for r in lines(run)] == [
        {k: r[k] for k in shown if k in r} for r in lines(reference_run)
    ]


def test_stop_in_the_last_step(inputs, tmp_path, ranks, straight) -> None:
    """The weights are saved, quickly; export and validation are left to the next start."""
    run = tmp_path / "run"
    config = config_of(inputs, run)
    first, second, third = ranks(2, run_jobs, [(config, {"stop_after": TOTAL}), (config, {}), (config, {})])[0]
    assert first.stopped
    assert first.weights_sha256 == ""
    assert not second.stopped
    assert second.losses == []
    assert second.weights_sha256 == straight[0].weights_sha256
    assert (run / "checkpoints" / f"global_step_{TOTAL}" / "huggingface" / "model.safetensors").exists()
    assert lines(run)[-1]["val/loss"] == lines(straight[1])[-1]["val/loss"]
    assert third.done_before
    assert saved_rate(run) == saved_rate(straight[1]) > 0


def saved_rate(run: Path) -> float:
    """The learning rate that the last checkpoint holds."""
    saved: dict[str, Any] = {"optimizer.param_groups.0.lr": 0.0}
    dcp.load(saved, checkpoint_id=run / "checkpoints" / f"global_step_{TOTAL}")
    return saved["optimizer.param_groups.0.lr"]


@pytest.mark.parametrize("left", ["global_step_4", "", None])
def test_killed_between_the_last_checkpoint_and_its_pointer(inputs, tmp_path, ranks, left) -> None:
    """Nothing is saved any more, and yet the pointer names the last one."""
    run = tmp_path / "run"
    config = config_of(inputs, run, "trainer.save_freq=4", "trainer.total_training_steps=5")
    first = ranks(2, run_job, config)[0]
    checkpoints = run / "checkpoints"
    (checkpoints / "final").unlink()
    (checkpoints / "latest").rename(checkpoints / ".latest.tmp")
    if left is not None:
        (checkpoints / "latest").write_text(left)
    second = ranks(2, run_job, config)[0]
    assert (second.losses, second.weights_sha256) == ([], first.weights_sha256)
    assert (checkpoints / "latest").read_text() == "global_step_5"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["final", "global_step_4", "global_step_5", "latest"]


class Operations(Files):
    """What a run reads back and opens to write, by the name of the step."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def before(self, operation: str, path: Path) -> None:
        if operation == "open":
            self.seen.append(f"{path.parent.name.rpartition('_')[2]} {path.name}")

    def read_back(self, path: Path) -> Any:
        self.seen.append(f"{path.parent.name.rpartition('_')[2]} read back")
        return super().read_back(path)


def _with_operations(config: Any, stop_after: int | None = None) -> tuple[Watched, list[str]]:
    files = Operations()
    return run_job(config, stop_after=stop_after, files=files), files.seen


@pytest.mark.parametrize("export", [True, False])
def test_stop_at_a_kept_checkpoint(inputs, tmp_path, ranks, straight, export) -> None:
    """What is needed to go on is saved and no more; where a kept one holds an export too, the next start makes it."""
    run = tmp_path / "run"
    contents = "model,optimizer,hf_model" if export else "model,optimizer"
    options = ("trainer.save_freq=2", "trainer.max_ckpt_to_keep=2", f"trainer.checkpoint.save_contents=[{contents}]")
    config = config_of(inputs, run, *options)
    stopped, seen = ranks(2, _with_operations, config, 4)[0]
    assert (stopped.stopped, stopped.step) == (True, 4)
    assert [line for line in seen if line.startswith("4 ") and "distcp" in line]
    assert "4 read back" not in seen
    folder = run / "checkpoints" / "global_step_4"
    state = json.loads((folder / "state.json").read_text())
    assert state["contents"] == ["model", "optimizer"]
    assert state["kept"] is not export
    assert not (folder / "huggingface").exists()
    again, second = ranks(2, _with_operations, config)[0]
    assert again.weights_sha256 == straight[0].weights_sha256
    assert bool([line for line in second if line.startswith("4 ")]) is export
    left = sorted(path.name for path in (run / "checkpoints").glob("global_step_*"))
    assert left == ["global_step_6", "global_step_8"]


def test_a_kept_checkpoint_that_a_stop_left_undone(inputs, tmp_path, ranks) -> None:
    run = tmp_path / "run"
    options = ("trainer.save_freq=2", "trainer.checkpoint.save_contents=[model,optimizer,hf_model]")
    config = config_of(inputs, run, *options)
    stops = [(config, {"stop_after": 2}), (config, {"stop_after": 3}), (config, {})]
    ranks(2, run_jobs, stops)
    for step in (2, 4, 6, 8):
        folder = run / "checkpoints" / f"global_step_{step}"
        assert json.loads((folder / "state.json").read_text())["kept"]
        assert (folder / "huggingface" / "model.safetensors").exists()


def test_finished_with_only_the_export(inputs, tmp_path, ranks) -> None:
    """Nothing can be gone on from, and nothing has to be: the run is done."""
    run = tmp_path / "run"
    config = config_of(
        inputs,
        run,
        "trainer.checkpoint.save_contents=[hf_model]",
        "trainer.total_training_steps=2",
        "trainer.save_freq=-1",
    )
    first, second = ranks(2, run_jobs, [(config, {}), (config, {})])[0]
    assert (first.step, first.done_before) == (2, False)
    assert final_state(run)["contents"] == []  # no shards: only huggingface/
    assert (second.step, second.done_before) == (2, True)


def test_several_stops_and_dropout(inputs, tmp_path, ranks) -> None:
    """Dropout draws what it would have drawn: randomness is a function of the step."""
    folder = tmp_path / "inputs"
    folder.mkdir()
    (folder / "qwen3").mkdir()
    for path in (inputs / "qwen3").iterdir():
        (folder / "qwen3" / path.name).symlink_to(path)
    (folder / "qwen3" / "config.json").unlink()
    sizes = json.loads((inputs / "qwen3" / "config.json").read_text())
    (folder / "qwen3" / "config.json").write_text(json.dumps(sizes | {"attention_dropout": 0.2}))
    for name in ("train.parquet", "val.parquet"):
        (folder / name).symlink_to(inputs / name)
    straight = ranks(2, run_job, config_of(folder, tmp_path / "straight"))[0]
    config = config_of(folder, tmp_path / "run")
    parts = ranks(2, run_jobs, [(config, {"stop_after": 2}), (config, {"stop_after": 3}), (config, {})])[0]
    assert [part.step for part in parts] == [2, 3, TOTAL]
    assert parts[-1].weights_sha256 == straight.weights_sha256


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_other_number_of_ranks(inputs, tmp_path, ranks, straight, before, after) -> None:
    """The rows stay in order; the sums are rounded in another order, so the loss is equal within fp32."""
    run = tmp_path / "run"
    config = config_of(inputs, run)
    first = ranks(before, _stopped_after_three, config)[0]
    second = ranks(after, run_job, config)[0]
    assert (first.step, second.step) == (3, TOTAL)
    assert first.rows + second.rows == straight[0].rows
    assert first.losses + second.losses == pytest.approx(straight[0].losses, rel=1e-4)


def test_other_ulysses_size(inputs, tmp_path, ranks, straight) -> None:
    run = tmp_path / "run"
    first = ranks(2, _stopped_after_three, config_of(inputs, run))[0]
    second = ranks(2, run_job, config_of(inputs, run, "ulysses_sequence_parallel_size=2"))[0]
    assert first.rows + second.rows == straight[0].rows
    assert first.losses + second.losses == pytest.approx(straight[0].losses, rel=1e-4)


def _stopped_after_three(config) -> Watched:
    return run_job(config, stop_after=3)


def test_each_row_once_an_epoch(straight) -> None:
    for epoch in (0, 4):
        counts = Counter(row for rows in straight[0].rows[epoch : epoch + 4] for row in rows)
        assert counts == dict.fromkeys(range(13), 1)


def test_longer_run_goes_on_with_a_new_curve(inputs, tmp_path, ranks, straight) -> None:
    run = tmp_path / "run"
    ranks(2, run_job, config_of(inputs, run))
    longer = ranks(2, run_job, config_of(inputs, run, "trainer.total_epochs=3"))[0]
    assert len(longer.losses) == 4
    assert longer.step == 12
    assert final_state(run)["total_steps"] == 12
    # The curve that would have ended at step 8 goes on as that of a run of 12 steps.
    assert longer.rates[0] > straight[0].rates[-1]


def test_changed_settings_are_refused_all_at_once(inputs, tmp_path, ranks) -> None:
    run = tmp_path / "run"
    config = config_of(inputs, run)
    ranks(1, _stopped_after_three, config)
    changed = config_of(inputs, run, "optim.lr=2e-2", "data.train_batch_size=5", "trainer.log_freq=2")
    message = ranks(1, _error_of, changed)[0]
    assert message.startswith("exit 2: ")
    assert "data.train_batch_size = 5" in message
    assert "made with 4" in message
    assert "optim.lr = 0.02" in message
    assert "log_freq" not in message
    allowed = replace(changed, trainer=replace(changed.trainer, allow_changed=["optim.lr", "data.train_batch_size"]))
    assert ranks(1, _error_of, allowed)[0] == ""


def _error_of(config) -> str:
    from sft_job.errors import JobError

    try:
        run_job(config)
    except JobError as error:
        return f"exit {error.code}: {error}"
    return ""


def test_other_rows_are_refused(inputs, tmp_path, ranks) -> None:
    from tests.tiny import write_rows

    run = tmp_path / "run"
    ranks(1, _stopped_after_three, config_of(inputs, run))
    other = write_rows(tmp_path / "train.parquet", 13, seed=9)
    message = ranks(1, _error_of, config_of(inputs, run, f"data.train_files={other}"))[0]
    assert "content of the training files" in message
    same = tmp_path / "renamed.parquet"
    same.write_bytes((inputs / "train.parquet").read_bytes())
    assert ranks(1, _error_of, config_of(inputs, run, f"data.train_files={same}"))[0] == ""


def test_kept_checkpoints(inputs, tmp_path, ranks) -> None:
    """max_ckpt_to_keep holds across restarts; the checkpoint of a stop goes when a newer one is there."""
    run = tmp_path / "run"
    config = config_of(inputs, run, "trainer.save_freq=2", "trainer.max_ckpt_to_keep=2")
    ranks(1, _stopped_after_three, config)
    assert _folders(run) == ["global_step_2", "global_step_3"]
    ranks(1, run_job, config)
    assert _folders(run) == ["global_step_6", "global_step_8"]
    assert (run / "checkpoints" / "latest").read_text() == "global_step_8"
    assert (run / "checkpoints" / "final").resolve().name == "global_step_8"


def _folders(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").iterdir() if p.is_dir() and not p.is_symlink())


def test_damaged_newest_checkpoint_is_passed_over(inputs, tmp_path, ranks, straight) -> None:
    run = tmp_path / "run"
    config = config_of(inputs, run, "trainer.save_freq=2")
    ranks(2, _stopped_after_three, config)
    shard = next((run / "checkpoints" / "global_step_3").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    second = ranks(2, run_job, config)[0]
    assert len(second.losses) == TOTAL - 2
    assert second.weights_sha256 == straight[0].weights_sha256
