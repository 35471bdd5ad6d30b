"""What a run says first reaches its reader also without a console."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from sft_job.announce import tell_start
from sft_job.config.schema import JobConfig
from sft_job.contract import RunFolder
from sft_job.metrics.loggers import make_loggers
from sft_job.model.attention.call import Needs
from sft_job.model.attention.choose import AttentionChoice, choose_backend


def warnings(tmp_path, caplog, attention: AttentionChoice) -> list[str]:
    rows: Any = SimpleNamespace(
        lengths=np.array([3, 4]), num_rows=2, report={"notes": [], "warnings": []}, name="", sets=()
    )
    state: Any = SimpleNamespace(step=0, total_steps=4, steps_per_epoch=2)
    loggers = make_loggers([], RunFolder(tmp_path), total_steps=4)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "sft_job"):
        tell_start(loggers, JobConfig(), attention, rows, None, state)
    loggers.close()
    return [record.getMessage() for record in caplog.records]


def test_a_slower_fallback_is_a_warning_where_there_is_no_console(tmp_path, caplog) -> None:
    hopper = Needs("cuda", torch.float32, 64, capability=(9, 0), longest=8192)
    found = warnings(tmp_path, caplog, choose_backend(hopper))
    assert [line for line in found if line.startswith("attention: sdpa is slow here: this card can do")] == found != []
    assert warnings(tmp_path, caplog, choose_backend(Needs("cpu", torch.float32, 64))) == []
