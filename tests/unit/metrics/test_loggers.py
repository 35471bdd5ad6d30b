from __future__ import annotations

import importlib.util
import json
import math
import threading
from pathlib import Path

import pytest

from sft_job.contract import ExitCode, RunFolder
from sft_job.errors import JobError
from sft_job.metrics.loggers import BackgroundLogger, JsonlLogger, make_loggers


def steps_of(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


class TestJsonl:
    def test_one_object_a_line_flushed(self, tmp_path: Path) -> None:
        path = tmp_path / "logs" / "metrics.jsonl"
        logger = JsonlLogger(path)
        logger.log({"step": 1, "train/loss": 2.5})
        assert path.read_text() == '{"step": 1, "train/loss": 2.5}\n'
        logger.close()

    def test_not_a_number_becomes_null(self, tmp_path: Path) -> None:
        path = tmp_path / "m.jsonl"
        logger = JsonlLogger(path)
        logger.log({"step": 1, "a": math.nan, "b": math.inf, "c": -math.inf, "d": None, "e": 0.5})
        assert json.loads(path.read_text()) == {"step": 1, "a": None, "b": None, "c": None, "d": None, "e": 0.5}

    def test_resume_cuts_what_comes_after_its_step(self, tmp_path: Path) -> None:
        path = tmp_path / "m.jsonl"
        first = JsonlLogger(path)
        for step in range(1, 8):
            first.log({"step": step, "train/loss": float(step)})
            if step % 2 == 0:
                first.log({"step": step, "val/loss": float(step)})
        first.close()
        with path.open("a") as file:
            file.write('{"step": 3, "train/lo')  # the process was killed here
        mode = path.stat().st_mode
        second = JsonlLogger(path, resume_step=4)
        assert steps_of(path) == [1, 2, 2, 3, 4, 4]
        assert path.stat().st_mode == mode
        second.log({"step": 5, "train/loss": 5.5})
        assert steps_of(path) == [1, 2, 2, 3, 4, 4, 5]
        assert json.loads(path.read_text().splitlines()[-1])["train/loss"] == 5.5
        assert [item.name for item in tmp_path.iterdir()] == ["m.jsonl"]

    def test_start_from_nothing_cuts_all(self, tmp_path: Path) -> None:
        path = tmp_path / "m.jsonl"
        path.write_text('{"step": 1, "train/loss": 1.0}\n')
        JsonlLogger(path, resume_step=0)
        assert path.read_text() == ""

    @pytest.mark.parametrize("damage", [b"\x00\xff\xfe\n", b"[1]\n", b'{"no": "step"}\n', b'{"step": 2}'])
    def test_damaged_lines_go(self, tmp_path: Path, damage: bytes) -> None:
        path = tmp_path / "m.jsonl"
        path.write_bytes(b'{"step": 1}\n' + damage)
        JsonlLogger(path, resume_step=9)
        assert path.read_bytes() == b'{"step": 1}\n'

    def test_file_without_surplus_is_not_written_anew(self, tmp_path: Path) -> None:
        path = tmp_path / "m.jsonl"
        path.write_text('{"step": 1}\n')
        before = path.stat().st_ino
        JsonlLogger(path, resume_step=1)
        assert path.stat().st_ino == before
        assert [item.name for item in tmp_path.iterdir()] == ["m.jsonl"]

    def test_each_step_once(self, tmp_path: Path) -> None:
        path = tmp_path / "m.jsonl"
        first = JsonlLogger(path)
        first.log({"step": 2, "train/loss": 1.0})
        first.log({"step": 2, "val/loss": 1.0})
        first.log({"step": 2, "val/loss": 1.0})
        first.close()
        second = JsonlLogger(path, resume_step=2)
        second.log({"step": 2, "val/loss": 1.0})  # a resumed run that validates again where it stopped
        assert len(path.read_text().splitlines()) == 2

    def test_unwritable_is_an_error_with_its_code(self, tmp_path: Path) -> None:
        (tmp_path / "logs").write_text("a file where the folder should be")
        with pytest.raises(JobError, match=r"metrics\.jsonl: cannot be written") as caught:
            JsonlLogger(tmp_path / "logs" / "metrics.jsonl")
        assert caught.value.code == ExitCode.CANNOT_CREATE

    def test_a_disk_that_is_full_for_a_while_costs_no_line(self, tmp_path: Path) -> None:
        path, warnings = tmp_path / "m.jsonl", []
        logger = JsonlLogger(path)
        logger.warn = warnings.append
        disk = logger._file = Full(logger._file)
        for step in range(1, 8):
            disk.room = {3: 0, 4: 0, 5: 17}.get(step, 10_000)
            logger.log({"step": step, "train/loss": float(step)})
        assert steps_of(path) == [1, 2, 3, 4, 5, 6, 7]
        logger.close()
        assert steps_of(path) == [1, 2, 3, 4, 5, 6, 7]
        assert len(warnings) == 1
        assert "m.jsonl: cannot be written: No space left on device" in warnings[0]

    def test_full_at_the_end_is_an_error_with_its_code(self, tmp_path: Path) -> None:
        logger = JsonlLogger(tmp_path / "m.jsonl")
        logger._file.close()
        logger._file = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115
        logger.log({"step": 1})
        with pytest.raises(JobError, match="No space left") as caught:
            logger.close()
        assert caught.value.code == ExitCode.CANNOT_CREATE
        assert logger._file.closed


class Full:
    """A file on a disk that has so much room."""

    def __init__(self, file) -> None:
        self.file, self.room = file, 0

    def write(self, data) -> int:
        if self.room == 0:
            raise OSError(28, "No space left on device")
        taken = self.file.write(bytes(data)[: self.room])
        self.room -= taken
        return taken

    def __enter__(self) -> None:
        self.file.__enter__()

    def __exit__(self, *error) -> None:
        self.file.__exit__(*error)


class Fake:
    """A logger that fails, hangs or keeps what it gets."""

    def __init__(self, *, log_error: bool = False, close_error: bool = False, gate: threading.Event | None = None):
        self.log_error, self.close_error, self.gate = log_error, close_error, gate
        self.records: list[dict] = []
        self.threads: set[str] = set()
        self.closed = False

    def log(self, record) -> None:
        self.threads.add(threading.current_thread().name)
        if self.gate is not None:
            self.gate.wait()
        if self.log_error:
            raise ConnectionError("the server is away")
        self.records.append(record)

    def close(self) -> None:
        if self.close_error:
            raise OSError("cannot finish")
        self.closed = True


class TestBackground:
    def test_everything_arrives_in_order_on_another_thread(self) -> None:
        inner, warnings = Fake(), []
        logger = BackgroundLogger(inner, name="x", warn=warnings.append)
        for step in range(100):
            logger.log({"step": step})
        logger.close()
        assert [record["step"] for record in inner.records] == list(range(100))
        assert inner.closed
        assert inner.threads == {"x-logger"}
        assert warnings == []

    def test_records_are_copies(self) -> None:
        gate = threading.Event()
        inner = Fake(gate=gate)
        logger = BackgroundLogger(inner, name="x", warn=print)
        record = {"step": 1}
        logger.log(record)
        record["step"] = 2
        gate.set()
        logger.close()
        assert inner.records == [{"step": 1}]

    def test_failures_are_one_warning(self) -> None:
        inner, warnings = Fake(log_error=True, close_error=True), []
        logger = BackgroundLogger(inner, name="x", warn=warnings.append)
        for step in range(10):
            logger.log({"step": step})
        logger.close()
        assert len(warnings) == 1
        assert "x: ConnectionError: the server is away" in warnings[0]

    def test_failure_at_the_end_is_a_warning(self) -> None:
        warnings: list[str] = []
        logger = BackgroundLogger(Fake(close_error=True), name="x", warn=warnings.append)
        logger.log({"step": 1})
        logger.close()
        assert ["cannot finish" in text for text in warnings] == [True]

    def test_hanging_logger_blocks_nobody(self) -> None:
        gate, warnings = threading.Event(), []
        inner = Fake(gate=gate)
        logger = BackgroundLogger(inner, name="x", warn=warnings.append, capacity=5, close_seconds=0.05)
        for step in range(50):
            logger.log({"step": step})  # would hang here for ever
        logger.close()
        assert logger.dropped in (44, 45)  # one record may already be in the inner logger's hands
        assert "does not keep up" in warnings[0]
        assert "did not finish within 0.05 s" in warnings[1]
        assert f"{logger.dropped} records were dropped" in warnings[2]
        gate.set()


class TestMakeLoggers:
    def test_jsonl_is_always_there(self, tmp_path: Path) -> None:
        run = RunFolder(tmp_path)
        loggers = make_loggers([], run, total_steps=2)
        loggers.log({"step": 1, "train/loss": 1.0})
        loggers.message("goes nowhere")
        loggers.close()
        assert steps_of(run.metrics) == [1]

    def test_logger_that_is_not_installed_is_a_warning(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        warnings: list[str] = []
        loggers = make_loggers(
            ["wandb", "swanlab", "tensorboard"], RunFolder(tmp_path), total_steps=2, warn=warnings.append
        )
        loggers.log({"step": 1, "train/loss": 1.0})
        loggers.close()
        assert "wandb, which is not installed" in warnings[0]
        assert "tensorboard, which is not installed (pip install tensorboard)" in warnings[1]
        assert "'swanlab', which this job does not know (known: console, wandb, tensorboard, file)" in warnings[2]
        assert steps_of(RunFolder(tmp_path).metrics) == [1]

    def test_console(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        loggers = make_loggers(["console", "file", "swanlab"], RunFolder(tmp_path), total_steps=2)
        loggers.log({"step": 1, "epoch": 0.5, "train/loss": 1.25, "train/lr": 1e-3})
        loggers.message("a message")
        loggers.warning("a warning")
        loggers.close()
        shown = capsys.readouterr().out
        assert "warning: trainer.logger names 'swanlab'" in shown
        assert "'file'" not in shown
        assert "loss 1.2500" in shown
        assert "a message" in shown
        assert "warning: a warning" in shown

    def test_warning_without_a_console(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        loggers = make_loggers(["file"], RunFolder(tmp_path), total_steps=2)
        loggers.warning("nobody watches")
        loggers.close()
        assert caplog.messages == ["nobody watches"]
