"""tensorboard as a logger. Its writer is imported with the first record: on the thread that hands it over."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class TensorboardLogger:
    """Event files in one folder; a restart of the job adds a file, and hides what earlier ones hold of its steps.

    Args:
        folder: the event files.
        resume_step: step that the run goes on from: later steps of earlier files were lost with their weights, and
            are not shown.
    """

    def __init__(self, folder: Path, resume_step: int = 0) -> None:
        self._folder = folder
        self._resume_step = resume_step
        self._writer: Any = None

    def log(self, record: Mapping[str, Any]) -> None:
        """Write a record's numbers.

        Raises:
            Exception: whatever the writer raises; it is used through ``BackgroundLogger``.
        """
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  optional and slow to import

            self._writer = SummaryWriter(str(self._folder), purge_step=self._resume_step + 1)
        for key, value in record.items():
            if key != "step" and isinstance(value, int | float):
                self._writer.add_scalar(key, value, record["step"])
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()
