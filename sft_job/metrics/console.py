"""What people see while the job trains: one live line on a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

BAR_CELLS = 16
PLAIN_SECONDS = 1.0
"""Without a terminal: least time between two lines of training steps."""

# Parts of the live line in the order in which they go where the terminal is too narrow for all of them.
_FIRST_TO_GO = ("grad", "bar", "epoch", "mfu", "lr", "speed")
_STYLES = {"bar": "green", "loss": "bold"}


class ConsoleLogger:
    """Progress of rank 0.

    On a terminal the last line is live (steps, share, time left, loss, ...) and everything else is printed above it.
    Without one, each logged step is a line, at most about one a second; the first and the last step and validations
    always are.

    Args:
        total_steps: steps of the whole run.
        resume_step: step that the run goes on from.
        console: where to; by default the process's standard output.
        clock: seconds, only ever going up.
    """

    def __init__(
        self,
        total_steps: int,
        resume_step: int = 0,
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or Console(highlight=False)
        self._clock = clock
        self._total = total_steps
        self._first = resume_step
        self._start = clock()
        self._record: Mapping[str, Any] | None = None
        self._printed_at: float | None = None
        self._unprinted = False
        self._live: Live | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(
                get_renderable=self._live_line, console=self._console, refresh_per_second=4, vertical_overflow="crop"
            )
            self._live.start()

    def log(self, record: Mapping[str, Any]) -> None:
        """Show a training or validation record."""
        if any(key.startswith("val/") for key in record):
            self.message(_validation_text(record))
        if "train/loss" not in record:
            return
        self._record = record
        if self._live is not None:
            return  # it refreshes by itself: at every step it could flicker
        now = self._clock()
        due = self._printed_at is None or now - self._printed_at >= PLAIN_SECONDS or record["step"] >= self._total
        self._unprinted = not due
        if due:
            self._printed_at = now
            self._print_plain()

    def message(self, text: str) -> None:
        """Print text above the live line, or as it is."""
        self._console.print(Text(text), soft_wrap=True)

    def warning(self, text: str) -> None:
        """Print a warning."""
        self._console.print(Text("warning: ", style="yellow") + Text(text), soft_wrap=True)

    def close(self) -> None:
        """Leave the last line standing."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        elif self._unprinted:
            self._unprinted = False
            self._print_plain()

    def _print_plain(self) -> None:
        self.message("step " + "  ".join(self._parts(self._record or {}).values()))

    def _live_line(self) -> Text:
        """The live line, without the parts that this width has no room for."""
        if self._record is None:
            return Text(f"step {self._first}/{self._total}  waiting for the first step", no_wrap=True)
        parts = {"bar": bar(self._record["step"] / max(self._total, 1))} | self._parts(self._record)
        for name in _FIRST_TO_GO:
            if len("  ".join(parts.values())) <= self._console.width:
                break
            parts.pop(name, None)
        line = Text(no_wrap=True, overflow="crop")
        for name, part in parts.items():
            line.append("  " if line else "").append(part, _STYLES.get(name))
        return line

    def _parts(self, record: Mapping[str, Any]) -> dict[str, str]:
        """The texts of a training record, in the order in which they are shown."""
        step = record["step"]
        parts = {
            "step": f"{step}/{self._total}",
            "share": f"{100 * step // max(self._total, 1)}%",
            "eta": f"eta {duration(self._seconds_left(step))}",
            "loss": f"loss {_number(record['train/loss'], '.4f')}",
            "lr": f"lr {_number(record.get('train/lr'), '.1e')}",
            "grad": f"grad {_number(record.get('train/grad_norm'), '.2f')}",
            "epoch": f"epoch {_number(record.get('epoch'), '.2f')}",
            "speed": f"{amount(record.get('perf/tokens_per_second_per_gpu'))} tok/s/gpu",
        }
        if record.get("perf/mfu") is not None:
            parts["mfu"] = f"mfu {100 * record['perf/mfu']:.0f}%"
        return parts

    def _seconds_left(self, step: int) -> float:
        """By the mean of this start's steps, with the validations and checkpoints between them."""
        done = max(step - self._first, 1)
        return (self._clock() - self._start) / done * max(self._total - step, 0)


def _validation_text(record: Mapping[str, Any]) -> str:
    named = [
        f"{key.removeprefix('val/').removesuffix('/loss')} {_number(value, '.4f')}"
        for key, value in record.items()
        if key.startswith("val/") and key.endswith("/loss") and key != "val/loss"
    ]
    text = f"step {record['step']}  validation loss {_number(record.get('val/loss'), '.4f')}"
    return f"{text} ({', '.join(named)})" if named else text


def bar(share: float) -> str:
    """A bar of ``BAR_CELLS`` cells, filled so far."""
    full = round(min(max(share, 0.0), 1.0) * BAR_CELLS)
    return "━" * full + "╌" * (BAR_CELLS - full)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def amount(value: float | None) -> str:
    """A number in thousands from 1,000 on."""
    if value is None:
        return "-"
    return f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.0f}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
