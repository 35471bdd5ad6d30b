"""When each step ended, and what is written down of a run while it goes on: the same for the job and for the peer."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

GIB = 2**30


class StepClock:
    """Marks the ends of steps, on the device's own clock where there is one.

    A mark is put in line behind the step's work and waited for by nobody, so marking costs a step nothing. What the
    host knows goes to ``steps.jsonl`` at once: a run that is cut off has left its times there.

    Args:
        device: of this rank.
        path: the file of host times; None = none is kept (other ranks than the first).
        warmup: steps before the peak of memory is counted anew.
    """

    def __init__(self, device: torch.device, path: Path | None, warmup: int) -> None:
        self._cuda = device.type == "cuda"
        self._device = device
        self._path = path
        self._warmup = warmup
        self._events: list[Any] = []
        self._times: list[float] = []
        self._first_peak: dict[str, float] = {}

    def mark(self) -> None:
        """Now: once before the first step, then after each one."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)
        self._times.append(time.perf_counter())
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.steps, "host_seconds": self._times[-1]}) + "\n")
        if self._cuda and self.steps == self._warmup:
            self._first_peak = self._peak()
            torch.cuda.reset_peak_memory_stats(self._device)

    @property
    def began(self) -> float:
        """When the first step began, by ``time.perf_counter``; infinity where none did."""
        return self._times[0] if self._times else float("inf")

    @property
    def steps(self) -> int:
        """Steps that have ended."""
        return len(self._times) - 1

    def seconds(self) -> list[float]:
        """Length of each step; waits for the device."""
        if not self._cuda:
            return differences(self._times)
        torch.cuda.synchronize(self._device)
        return [first.elapsed_time(second) / 1e3 for first, second in pairwise(self._events)]

    def memory(self) -> dict[str, float]:
        """Peaks in GiB: of the whole run, and of the steps after the warm-up; of the host's, page-locked memory too."""
        if not self._cuda:
            return {}
        later = self._peak()
        whole = {name: max(value, self._first_peak.get(name, 0.0)) for name, value in later.items()}
        whole["host_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return {**whole, **{f"{name}_after_warmup": value for name, value in later.items()}}

    def _peak(self) -> dict[str, float]:
        return {
            "allocated_gib": torch.cuda.max_memory_allocated(self._device) / GIB,
            "reserved_gib": torch.cuda.max_memory_reserved(self._device) / GIB,
        }


def differences(times: Sequence[float]) -> list[float]:
    """Time between neighbours."""
    return [second - first for first, second in pairwise(times)]


def host_seconds(path: Path) -> list[float]:
    """Step times by the host's clock that a run has left so far; a line that was cut off does not count."""
    times: list[float] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            times.append(float(json.loads(line)["host_seconds"]))
        except (ValueError, KeyError):
            break
    return differences(times)
