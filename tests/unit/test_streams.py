from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sft_job.streams import say

ROOT = str(Path(__file__).parents[2])
CODE = """
import sys
from sft_job.streams import say, settle_streams
say("a last word\\n")
sys.stdout.write("a line\\n")
settle_streams()
sys.exit(65)
"""


@pytest.mark.parametrize("redirect", ["", "2>/dev/full", ">/dev/full", ">/dev/full 2>&1", "2>&-", ">&- 2>&-"])
def test_what_cannot_be_written_is_no_other_exit_code(redirect) -> None:
    line = f'exec "$0" -c "$1" {redirect}' if ">&- 2" not in redirect else 'exec "$0" -c "$2" >&- 2>&-'
    silent = CODE.replace("sys.stdout.write", "str")
    command = ["sh", "-c", line, sys.executable, CODE, silent]
    result = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": ROOT}, check=False)
    assert result.returncode == 65, result.stderr


def test_it_is_said(capsys) -> None:
    say("a last word\n")
    assert capsys.readouterr().err == "a last word\n"
