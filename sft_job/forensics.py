"""What is kept of a step whose loss or gradient is not finite: which rows, and their text in a file of its own."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_job.config.schema import JobConfig
from sft_job.contract import RunFolder
from sft_job.data.batches import StepBatch
from sft_job.data.mixture import Rows
from sft_job.data.tokenizer import load_tokenizer

_NAMED = 8


@dataclass(frozen=True)
class BadStep:
    """A step that was not taken.

    Attributes:
        step: its number, from 1.
        loss: mean loss of the global batch, perhaps not finite.
        grad_norm: global gradient norm, perhaps not finite.
        rows: where the batch's rows came from, ``file, row N``.
        evidence: file with the rows' text; None where it could not be written, or on ranks other than 0.
    """

    step: int
    loss: float
    grad_norm: float
    rows: tuple[str, ...]
    evidence: Path | None

    def text(self) -> str:
        """What happened and in which rows, for the log. Never the rows' text: logs are read by more people."""
        named = "".join(f"\n      {row}" for row in self.rows[:_NAMED])
        more = f"\n      ... {len(self.rows):,} in all" if len(self.rows) > _NAMED else ""
        kept = f"\n    their text: {self.evidence}" if self.evidence else ""
        return (
            f"step {self.step}: loss {self.loss}, gradient norm {self.grad_norm}: not finite, the step was not taken\n"
            f"    rows of this batch:{named}{more}{kept}"
        )


class BadSteps:
    """Makes a ``BadStep``, with the evidence on rank 0.

    Args:
        run: the run folder; the evidence goes to its logs.
        rows: the training rows.
        decode: ids to text; called for bad steps alone.
        writes: whether this rank writes.
    """

    def __init__(self, run: RunFolder, rows: Rows, decode: Callable[[list[int]], str], writes: bool) -> None:
        self._run = run
        self._rows = rows
        self._decode = decode
        self._writes = writes

    def note(self, batch: StepBatch, loss: float, grad_norm: float) -> BadStep:
        """Keep what is known of a step that was not taken."""
        rows = tuple(f"{file}, row {number}" for file, number in map(self._rows.origin, batch.row_ids.tolist()))
        evidence = self._write(batch, loss, grad_norm, rows) if self._writes else None
        return BadStep(batch.step + 1, loss, grad_norm, rows, evidence)

    def _write(self, batch: StepBatch, loss: float, grad_norm: float, rows: tuple[str, ...]) -> Path | None:
        path = self._run.logs / f"bad_step_{batch.step + 1}.json"
        record = {
            "step": batch.step + 1,
            "epoch": batch.epoch,
            # JSON knows no NaN.
            "loss": loss if math.isfinite(loss) else str(loss),
            "grad_norm": grad_norm if math.isfinite(grad_norm) else str(grad_norm),
            "rows": [self._row(index, origin) for index, origin in zip(batch.row_ids.tolist(), rows, strict=True)],
        }
        try:
            # The rows' text is for the run's owner alone, from the file's first moment on.
            path.unlink(missing_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(record, file, indent=1)
        except OSError:
            return None  # a full disk must not hide what happened
        return path

    def _row(self, index: int, origin: str) -> dict[str, Any]:
        row = self._rows.row(index)
        return {
            "row": origin,
            "tokens": len(row.ids),
            "trained_tokens": int(row.trained[1:].sum()),
            "text": self._decode(row.ids.tolist()),
        }


def decoder(config: JobConfig) -> Callable[[list[int]], str]:
    """Ids to text; the tokenizer is loaded when it is first needed, which is seldom."""

    def decode(ids: list[int]) -> str:
        tokenizer: Any = load_tokenizer(config.model.partial_pretrain, config.model.trust_remote_code)
        return tokenizer.decode(ids)

    return decode
