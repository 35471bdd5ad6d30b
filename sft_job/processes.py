"""What Linux tells of processes, and a parent's duties: orphans are taken in, ended and reaped. Torch-free.

Elsewhere than on Linux these functions find nothing and do nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path

from sft_job.contract import Env

_PR_SET_CHILD_SUBREAPER = 36
_SHARED_MEMORY = ("/dev/shm/nccl-", "/dev/shm/torch_")
_POLL_SECONDS = 0.05
_KILL_SECONDS = 5.0


def supervisor_gone(environ: Mapping[str, str]) -> bool:
    """Whether the supervisor that started this process is no more."""
    supervisor = environ.get(Env.SUPERVISOR)
    return supervisor is not None and os.getppid() != int(supervisor)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends, as PID 1 of a container is anyway."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def reap(known: Collection[int]) -> None:
    """Wait for children that have ended and that nobody else waits for.

    Args:
        known: process ids of children that have a waiter of their own, whose statuses must not be taken away.
    """
    for pid in _listed_children():
        if pid not in known:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def children() -> set[int]:
    """Process ids of this process's children, ended ones that nobody has waited for included."""
    return {pid for pid in _all_pids() if _parent(pid) == os.getpid()}


def end_orphans(spared: Collection[int], grace_seconds: float) -> int:
    """End every child, and what their ends leave to us, until there is none.

    Args:
        spared: children that are none of our business: they were there before.
        grace_seconds: time between the request to end and the kill.

    Returns:
        How many were found.
    """
    found: set[int] = set()
    deadline = time.monotonic() + grace_seconds
    while left := children() - set(spared):
        now = time.monotonic()
        for pid in left:
            if now >= deadline or pid not in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL if now >= deadline else signal.SIGTERM)
        found |= left
        reap(spared)
        if now > deadline + _KILL_SECONDS:  # uninterruptible: the kernel ends it when its disk answers
            break
        time.sleep(_POLL_SECONDS)
    return len(found)


def kill_tree(pid: int) -> None:
    """Kill a process and all that descends from it, whatever sessions they are in."""
    parents = {each: _parent(each) for each in _all_pids()}
    doomed, new = {pid}, {pid}
    while new := {each for each, parent in parents.items() if parent in new} - doomed:
        doomed |= new
    for each in (pid, *(doomed - {pid})):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(each, signal.SIGKILL)


def state(pid: int) -> str:
    """The kernel's letter for what a process does: R, S, D, T (stopped), Z; '' where there is none."""
    fields = _stat(pid)
    return fields[0] if fields else ""


def bytes_moved(pid: int) -> int:
    """Bytes that a process has read and written so far, on whatever file system; 0 where it cannot be seen."""
    try:
        lines = Path(f"/proc/{pid}/io").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    counts = dict(line.split(": ") for line in lines if ": " in line)
    return int(counts.get("rchar", 0)) + int(counts.get("wchar", 0))


def shared_memory(pid: int) -> set[Path]:
    """Files in /dev/shm that a process maps and that NCCL or torch made for its ranks alone."""
    found: set[Path] = set()
    with contextlib.suppress(OSError), Path(f"/proc/{pid}/maps").open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            place = line.partition("/")[1] + line.partition("/")[2].rstrip("\n")
            if place.startswith(_SHARED_MEMORY) and not place.endswith(" (deleted)"):
                found.add(Path(place))
    return found


def memory_kills(cgroup: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """How many processes of this container were killed for lack of memory so far; None where it cannot be known."""
    for name in _memory_files(cgroup, own):
        try:
            lines = name.read_text(encoding="ascii").splitlines()
        except OSError:
            continue
        counts = [line.split() for line in lines]
        kills = [int(count[1]) for count in counts if len(count) == 2 and count[0] == "oom_kill"]
        if kills:
            return kills[0]
    return None


def host_room(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes of memory that the machine and this process's container still have; None where neither says it.

    File caches count as free.
    """
    found: list[int] = []
    with contextlib.suppress(OSError, ValueError, KeyError):
        found.append(_table(meminfo)["MemAvailable:"] * 1024)
    with contextlib.suppress(OSError, ValueError, KeyError):  # no cgroup here, or no limit ("max")
        limit, used = (int((cgroup / name).read_text()) for name in ("memory.max", "memory.current"))
        parts = _table(cgroup / "memory.stat")
        found.append(limit - used + parts["file"] - parts["shmem"])
    return max(0, min(found)) if found else None


def _table(path: Path) -> dict[str, int]:
    lines = (line.split() for line in path.read_text().splitlines() if line.strip())
    return {name: int(value) for name, value, *_ in lines}


def _memory_files(cgroup: Path, own: Path) -> list[Path]:
    """Candidates, the most exact first: cgroup v2, then v1; in a container the root is its own group."""
    second: list[Path] = []
    first: list[Path] = []
    with contextlib.suppress(OSError, ValueError):
        for line in own.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                second.append(cgroup / path.lstrip("/") / "memory.events")
            elif "memory" in controllers.split(","):
                first.append(cgroup / "memory" / path.lstrip("/") / "memory.oom_control")
    return [*second, cgroup / "memory.events", *first, cgroup / "memory/memory.oom_control"]


def _listed_children() -> set[int]:
    """As ``children``, from the kernel's own list: cheap enough for every moment, but it may miss one in a change."""
    try:
        lists = [path.read_text(encoding="ascii") for path in Path("/proc/self/task").glob("*/children")]
    except OSError:
        return children()
    return {int(pid) for text in lists for pid in text.split()} if lists else children()


def _all_pids() -> list[int]:
    try:
        return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
    except OSError:
        return []


def _parent(pid: int) -> int:
    fields = _stat(pid)
    return int(fields[1]) if fields else -1


def _stat(pid: int) -> list[str]:
    """Fields of a process's stat from its state on; the name before may hold anything."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return []
