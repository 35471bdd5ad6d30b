"""What a run on one node looks at; several nodes meet in tests/distributed/test_preflight.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sft_job.config.schema import JobConfig
from sft_job.contract import ExitCode
from sft_job.errors import ProblemsError
from sft_job.preflight.start import compare_nodes

RUNTIME: Any = SimpleNamespace(world=2, rank=1, is_first=False)


def test_gpus_that_were_asked_for_and_are_not_there() -> None:
    config = JobConfig()
    compare_nodes(config, RUNTIME, {"CUDA_VISIBLE_DEVICES": ""})
    asked = {"CUDA_VISIBLE_DEVICES": "", "SFT_JOB_GPUS_PER_NODE": "8"}
    with pytest.raises(ProblemsError, match="shows no GPU; 8 were asked for") as caught:
        compare_nodes(config, RUNTIME, asked)
    assert caught.value.code == ExitCode.CONFIG
    config.trainer.preflight = False
    compare_nodes(config, RUNTIME, asked)
