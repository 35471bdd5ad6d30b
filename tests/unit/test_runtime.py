from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = str(Path(__file__).parents[2])
CODE = """
from sft_job.runtime import StopWish, die_with_parent
stop = StopWish().install()
die_with_parent()
print(stop.wished)
"""


@pytest.mark.parametrize("alive", [True, False])
def test_a_supervisor_that_was_gone_before_is_noticed(alive) -> None:
    supervisor = os.getpid() if alive else 2**22 + 1  # above the largest process id
    environ = {**os.environ, "PYTHONPATH": ROOT, "SFT_JOB_SUPERVISOR": str(supervisor)}
    rank = subprocess.run([sys.executable, "-c", CODE], env=environ, capture_output=True, text=True, check=True)
    assert rank.stdout.strip() == str(not alive)
