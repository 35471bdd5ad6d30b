"""``model.external_lib`` of the tests' jobs: makes steps long enough to strike between them, or a rank that dies.

``TEST_PACE``: seconds that each forward pass sleeps. ``TEST_DIES``: the first forward pass kills its rank.
``TEST_LEDGER``: folder in which each rank notes what every optimizer step trained on, for ``tests.chaos.oracle``.
``TEST_SEEN``: folder into which each rank writes what it sees of ``FROM_SETUP``, in a file of its number.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import Module
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from sft_job.data.order import RowOrder


def _pause(module: Module, arguments: Any) -> None:
    if "CausalLMLoss" in type(module).__name__:
        if os.environ.get("TEST_DIES"):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(float(os.environ.get("TEST_PACE", "0")))


register_module_forward_pre_hook(_pause)


class Ledger:
    """What each optimizer step of this rank trains on, seen by torch's global hooks."""

    def __init__(self, path: Path, rank: int, start: int) -> None:
        self._path, self._rank, self._start = path, rank, start
        self._rows: dict[int, list[int]] = {}
        self._step: int | None = None  # steps done; None before the first batch was asked for
        self._tokens = hashlib.sha256()

    def install(self) -> None:
        """Set the hooks."""
        rows = RowOrder.rows

        def watched(order: RowOrder, step: int) -> Any:
            found = rows(order, step)
            self._rows[step] = [int(row) for row in found]
            self._step = step if self._step is None else self._step
            return found

        RowOrder.rows = watched  # type: ignore[method-assign]
        register_module_forward_pre_hook(self._forward)
        register_optimizer_step_post_hook(self._stepped)

    def _forward(self, module: Module, arguments: Any) -> None:
        # What comes before the first batch is the rehearsal.
        if "CausalLMLoss" in type(module).__name__ and module.training and self._step is not None:
            batch = arguments[0]
            for tensor in (batch.input_ids, batch.position_ids, batch.targets):
                self._tokens.update(tensor.numpy().tobytes())

    def _stepped(self, optimizer: Any, *_: Any) -> None:
        if self._step is None:
            return  # torch makes an empty step when it loads an optimizer's state
        record = {
            "start": self._start,
            "rank": self._rank,
            "step": self._step + 1,
            "rows": self._rows.pop(self._step),
            "lr": optimizer.param_groups[0]["lr"],
            "tokens": self._tokens.hexdigest(),
            "seed": torch.initial_seed(),
            "rng": hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest(),
        }
        self._tokens = hashlib.sha256()
        file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(file, f"{json.dumps(record)}\n".encode())
        os.close(file)
        self._step += 1


if os.environ.get("TEST_LEDGER") and "RANK" in os.environ:
    Ledger(
        Path(os.environ["TEST_LEDGER"], "ledger.jsonl"),
        int(os.environ["RANK"]),
        int(os.environ.get("SLURM_RESTART_COUNT") or 0),
    ).install()

if os.environ.get("TEST_SEEN") and "RANK" in os.environ:
    Path(os.environ["TEST_SEEN"], os.environ["RANK"]).write_text(os.environ.get("FROM_SETUP", ""), encoding="utf-8")
