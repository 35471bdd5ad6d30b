"""``sft-job status``: from the command line to the screen."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from sft_job.contract import ExitCode
from sft_job.errors import JobError
from sft_job.status.life import WATCH_SECONDS, look
from sft_job.status.place import locate
from sft_job.status.read import read_status
from sft_job.status.show import show_status, status_json
from sft_job.streams import say

# Nobody wraps lines in a pipe.
_PIPE_WIDTH = 200


def run_status(named: str | None, environ: Mapping[str, str], *, as_json: bool = False, verify: bool = False) -> int:
    """Show how a run stands; 0 where that could be read.

    Args:
        named: a run folder, anything below it, its CHECKPOINT_DIR, or a launcher's job; None = ``$CHECKPOINT_DIR``.
        environ: environment variables.
        as_json: one JSON object instead of lines for people.
        verify: read every byte of the newest checkpoint.
    """
    for stream in (sys.stdout, sys.stderr):  # a message may hold what the terminal's encoding cannot say
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
    try:
        run, submission = locate(named, environ)
        try:
            life = look(run, WATCH_SECONDS)
            status = read_status(run, life, submission, verify=verify)
        except OSError as error:
            raise JobError(ExitCode.CANNOT_CREATE, f"{run.root} cannot be read: {error}") from error
        if as_json:
            console.print(status_json(status), markup=False, soft_wrap=True)
        else:
            show_status(status, console)
    except JobError as error:
        say(f"{error}\n")
        return error.code
    except KeyboardInterrupt:
        return ExitCode.STOPPED
    except BrokenPipeError:  # `| head` has seen enough
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  for the interpreter's last flush
    return ExitCode.DONE
