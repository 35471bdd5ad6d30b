"""A controller for tests: an scontrol that writes down what it is asked, and counts restarts as Slurm does."""

from __future__ import annotations

from pathlib import Path

STARTED = "2026-11-23T15:00:00"


def job_line(
    state: str = "RUNNING",
    restarts: int = 0,
    preempted: str = "None",
    end: str = "2026-11-23T16:00:00",
    limit: str = "01:00:00",
) -> str:
    """What ``scontrol show job`` says."""
    times = f"StartTime={STARTED} EndTime={end} TimeLimit={limit} PreemptTime={preempted}"
    return f"JobState={state} Restarts={restarts} {times}"


class Controller:
    """``scontrol`` in a folder that stands in PATH.

    A requeue of a job that runs makes it COMPLETING and counts one more restart. So does one of a job that is
    completing, but with ``Incomplete`` nothing happens, and scontrol says nothing.

    Args:
        folder: where it is put.
        line: of the job.
        later: what it says from the second question on.
    """

    def __init__(self, folder: Path, line: str, later: str = "") -> None:
        self._asked = folder / "asked"
        (folder / "job").write_text(line)
        (folder / "later").write_text(later)
        tool = folder / "scontrol"
        tool.write_text(f"""#!/bin/bash
cd {folder}
echo "$@" >> asked
if [ "$1" = show ]; then
  cat job
  [ ! -s later ] || mv later job
elif [ "$2" != Incomplete ] || grep -q RUNNING job; then
  now=$(grep -oP 'Restarts=\\K.*?(?= )' job)
  sed -i "s/JobState=[A-Z]*/JobState=COMPLETING/; s/Restarts=$now/Restarts=$((now + 1))/" job
fi
""")
        tool.chmod(0o755)
        (folder / "later").touch()

    def asked(self) -> list[str]:
        """What it was asked, in order."""
        return self._asked.read_text().splitlines() if self._asked.exists() else []

    def requeues(self) -> int:
        """How often a requeue was asked for."""
        return sum(each.startswith("requeue") for each in self.asked())
