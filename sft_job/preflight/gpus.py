"""What the NVIDIA driver says of this node's GPUs, without CUDA; where it does not answer it is not waited for."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_FIELDS = (
    "index",
    "name",
    "driver_version",
    "memory.total",
    "memory.used",
    "ecc.errors.uncorrected.volatile.total",
    "clocks_event_reasons.hw_slowdown",
    "clocks_event_reasons.sw_thermal_slowdown",
)
_OLD_NAMES = {"clocks_event_reasons": "clocks_throttle_reasons"}  # before driver 535
_SECONDS = 15.0
_MIB = 2**20


@dataclass(frozen=True)
class Gpu:
    """One GPU of a node.

    Attributes:
        index: its number on the node, whatever CUDA_VISIBLE_DEVICES says.
        name: product name.
        driver: driver version.
        memory: bytes.
        used: bytes in use by whatever process.
        ecc_errors: uncorrected memory errors since the driver was loaded; None where it has no ECC.
        slowed: why its clocks are held down by heat or power, '' where they are not.
    """

    index: int
    name: str
    driver: str
    memory: int
    used: int
    ecc_errors: int | None = None
    slowed: str = ""


def read_gpus(run: Callable[[Sequence[str]], str | None] | None = None) -> tuple[Gpu, ...]:
    """The GPUs of this node; none where there is no driver or it does not answer.

    Args:
        run: gives a command's standard output, None where it failed.
    """
    run = run or _output
    query = ",".join(_FIELDS)
    for old, new in (("", ""), *_OLD_NAMES.items()):
        text = run(["nvidia-smi", f"--query-gpu={query.replace(old, new)}", "--format=csv,noheader,nounits"])
        if text is not None:
            return tuple(gpu for line in text.splitlines() if (gpu := _gpu(line)) is not None)
    return ()


def _gpu(line: str) -> Gpu | None:
    parts = [part.strip() for part in line.split(",")]
    if len(parts) != len(_FIELDS):
        return None
    index, name, driver, memory, used, ecc, hardware, thermal = parts
    reasons = {"hardware slowdown": hardware, "thermal slowdown": thermal}
    slowed = ", ".join(reason for reason, state in reasons.items() if state == "Active")
    try:
        errors = int(ecc) if ecc.isdecimal() else None  # [N/A] without ECC
        return Gpu(int(index), name, driver, int(float(memory) * _MIB), int(float(used) * _MIB), errors, slowed)
    except ValueError:
        return None


def _output(command: Sequence[str]) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None
