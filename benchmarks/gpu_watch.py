"""Clock, power and temperature of the GPUs while a run is on; only read, never set."""

from __future__ import annotations

import contextlib
import shutil
import statistics
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_ASKED = ("clocks.sm", "power.draw", "temperature.gpu", "utilization.gpu")
_MILLISECONDS = 500


@contextlib.contextmanager
def watching(path: Path) -> Iterator[None]:
    """Let nvidia-smi write a line twice a second; nothing where there is none."""
    if shutil.which("nvidia-smi") is None:
        yield
        return
    command = [
        "nvidia-smi",
        f"--query-gpu={','.join(_ASKED)}",
        "--format=csv,noheader,nounits",
        f"--loop-ms={_MILLISECONDS}",
    ]
    with path.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.DEVNULL)
        try:
            yield
        finally:
            process.terminate()
            process.wait()


def under_load(path: Path) -> dict[str, Any]:
    """Medians over the moments at which a GPU was busy."""
    busy: list[list[float]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            values = [float(value) for value in line.split(",")]
        except ValueError:
            continue
        if len(values) == len(_ASKED) and values[3] >= 90:
            busy.append(values)
    if not busy:
        return {}
    names = ("sm_clock_mhz", "power_watts", "temperature_c")
    return {name: statistics.median(values[index] for values in busy) for index, name in enumerate(names)}
