from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from sft_job.metrics.console import ConsoleLogger


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def record(step: int, mfu: float | None = None) -> dict:
    return {
        "step": step,
        "epoch": step / 50,
        "train/loss": 10.0 / step,
        "train/lr": 1e-3,
        "train/grad_norm": 0.5,
        "perf/tokens_per_second_per_gpu": 21234.0,
        "perf/mfu": mfu,
    }


def plain(total: int, resume_step: int = 0) -> tuple[ConsoleLogger, io.StringIO, Clock]:
    out, clock = io.StringIO(), Clock()
    return ConsoleLogger(total, resume_step, console=Console(file=out, width=80), clock=clock), out, clock


def terminal(width: int) -> tuple[ConsoleLogger, io.StringIO, Clock]:
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, width=width, force_terminal=True, color_system=None)
    return ConsoleLogger(1000, console=console, clock=clock), out, clock


def rows(text: str) -> list[str]:
    """What stands on the screen: each line after its last erasure, without control sequences."""
    lines = [line.rsplit("\x1b[2K", 1)[-1].rstrip("\r") for line in text.split("\n")]
    return [re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", line).strip("\r") for line in lines]


class TestWithoutTerminal:
    def test_line(self) -> None:
        logger, out, clock = plain(100)
        clock.now = 5.0
        logger.log(record(10, mfu=0.41))
        assert out.getvalue() == (
            "step 10/100  10%  eta 0:45  loss 1.0000  lr 1.0e-03  grad 0.50  epoch 0.20  21.2k tok/s/gpu  mfu 41%\n"
        )

    def test_about_one_a_second_but_always_the_first_and_the_last(self) -> None:
        logger, out, clock = plain(100)
        for step in range(1, 101):
            clock.now += 0.13
            logger.log(record(step))
        shown = [int(match) for match in re.findall(r"step (\d+)/100", out.getvalue())]
        assert shown[0] == 1
        assert shown[-1] == 100
        assert 12 <= len(shown) <= 15

    def test_slow_steps_are_all_shown(self) -> None:
        logger, out, clock = plain(5)
        for step in range(1, 6):
            clock.now += 2.0
            logger.log(record(step))
        assert len(out.getvalue().splitlines()) == 5

    def test_run_that_is_stopped_shows_its_last_step(self) -> None:
        logger, out, clock = plain(100)
        for step in (1, 2, 3):
            clock.now += 0.01
            logger.log(record(step))
        logger.close()
        logger.close()
        assert re.findall(r"step (\d+)/", out.getvalue()) == ["1", "3"]

    def test_validation_is_always_shown(self) -> None:
        logger, out, _ = plain(100)
        logger.log(record(1))
        logger.log({"step": 1, "val/loss": 0.5})
        logger.log({"step": 1, "val/loss": 0.5, "val/math/loss": 0.25, "val/code/loss": None})
        assert out.getvalue().splitlines()[1:] == [
            "step 1  validation loss 0.5000",
            "step 1  validation loss 0.5000 (math 0.2500, code -)",
        ]

    def test_time_left_counts_only_this_start(self) -> None:
        logger, out, clock = plain(100, resume_step=80)
        clock.now = 10.0
        logger.log(record(90))
        assert "eta 0:10" in out.getvalue()

    def test_messages_are_left_as_they_are(self) -> None:
        logger, out, _ = plain(100)
        text = "[bold]no markup[/bold] " + "and no line break " * 10
        logger.message(text)
        logger.warning("careful")
        assert out.getvalue() == f"{text}\nwarning: careful\n"

    def test_missing_values(self) -> None:
        logger, out, _ = plain(10)
        logger.log({"step": 10, "train/loss": None, "train/lr": 0.0})
        assert "loss -  lr 0.0e+00  grad -  epoch -  - tok/s/gpu" in out.getvalue()


class TestOnTerminal:
    def test_messages_stand_above_one_live_line(self) -> None:
        logger, out, _ = terminal(120)
        logger.log(record(100))
        logger.message("first message")
        logger.log({"step": 100, "val/loss": 0.5})
        logger.log(record(200))
        logger.close()
        screen = [row for row in rows(out.getvalue()) if row]
        assert screen[:2] == ["first message", "step 100  validation loss 0.5000"]
        assert screen[2].startswith("━━━╌╌╌")
        assert "  200/1000  20%" in screen[2]
        assert len(screen) == 3

    @pytest.mark.parametrize("width", [30, 40, 60, 80, 100, 120, 200])
    def test_line_fits_and_keeps_what_matters(self, width: int) -> None:
        logger, out, clock = terminal(width)
        clock.now = 3600.0
        logger.log(record(500, mfu=0.41))
        logger.close()
        line = next(row for row in rows(out.getvalue()) if "500/1000" in row)
        assert len(line) <= width
        assert "500/1000" in line
        if width >= 80:
            assert "eta 1:00:00  loss 0.0200  lr 1.0e-03  21.2k tok/s/gpu" in re.sub(
                r"  grad \S+|  epoch \S+", "", line
            )
            assert "mfu 41%" in line
        if width >= 120:
            assert line.startswith("━━━━━━━━╌╌╌╌╌╌╌╌")

    def test_before_the_first_step(self) -> None:
        logger, out, _ = terminal(80)
        logger.close()
        assert "step 0/1000  waiting for the first step" in out.getvalue()
