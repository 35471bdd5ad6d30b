from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sft_job import processes

FAMILY = """
import os, signal, subprocess, sys, time
from sft_job.processes import adopt_orphans, children, end_orphans, reap, state
own = subprocess.Popen(["sleep", "100"])
adopt_orphans()
before = children()
assert before == {own.pid}
# A rank that leaves three behind: a plain one, one in a session of its own, one that is deaf to SIGTERM.
deaf = "trap '' TERM; echo deaf; while :; do sleep 1; done"
rank = subprocess.Popen(["sh", "-c", f"sleep 100 & setsid sleep 100 & setsid sh -c \\"{deaf}\\" & sleep 0.5"],
                        stdout=subprocess.PIPE)
assert rank.stdout.readline() == b"deaf\\n"
assert rank.wait() == 0
left = children() - before
assert len(left) == 3, left
# One of them ends by itself: it is waited for, and a child with a waiter keeps its status.
killed = left.pop()
waited = subprocess.Popen(["sh", "-c", "exit 7"])
os.kill(killed, signal.SIGKILL)
while state(killed) or state(waited.pid) != "Z":
    reap({own.pid, waited.pid})
    time.sleep(0.01)
assert waited.wait() == 7
assert end_orphans(before, 0.5) >= 2
assert children() == before
assert own.poll() is None
own.kill()
own.wait()
"""


def test_orphans_are_taken_in_and_ended() -> None:
    subprocess.run([sys.executable, "-c", FAMILY], check=True, timeout=60)


def test_what_is_seen_of_a_process() -> None:
    assert processes.state(os.getpid()) == "R"
    moved = processes.bytes_moved(os.getpid())
    Path("/dev/null").write_bytes(b"x" * 100_000)
    assert processes.bytes_moved(os.getpid()) >= moved + 100_000
    process = subprocess.Popen(["sleep", "100"])
    process.kill()
    process.wait()
    assert processes.state(process.pid) == ""
    assert processes.bytes_moved(process.pid) == 0
    assert processes.shared_memory(process.pid) == set()


def test_shared_memory_of_ranks_is_found() -> None:
    name = f"torch_test_{os.getpid()}_{time.monotonic_ns()}"
    code = (
        f"import mmap; f = open('/dev/shm/{name}', 'r+b'); m = mmap.mmap(f.fileno(), 0); print(1, flush=True); input()"
    )
    path = Path("/dev/shm") / name
    other = Path("/dev/shm") / f"other_{name}"
    try:
        path.write_bytes(bytes(4096))
        other.write_bytes(bytes(4096))
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stdin=subprocess.PIPE)
        assert process.stdout
        process.stdout.readline()
        assert processes.shared_memory(process.pid) == {path}
        process.communicate(b"\n")
    finally:
        path.unlink()
        other.unlink()


@pytest.mark.parametrize(
    ("file", "own", "text", "found"),
    [
        ("memory.events", "0::/", "low 0\noom 3\noom_kill 2\n", 2),
        ("a/b/memory.events", "0::/a/b", "oom_kill 5\n", 5),
        ("memory/x/memory.oom_control", "4:memory:/x\n0::/", "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n", 1),
        ("memory/memory.oom_control", "4:cpu,memory:/gone\n", "oom_kill 4\n", 4),
        ("elsewhere", "0::/", "oom_kill 1\n", None),
        ("memory.events", "garbage", "low 0\n", None),
    ],
)
def test_kills_for_lack_of_memory(tmp_path, file, own, text, found) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(text)
    (tmp_path / "own").write_text(own)
    assert processes.memory_kills(tmp_path, tmp_path / "own") == found


def test_memory_of_machine_and_container(tmp_path: Path) -> None:
    meminfo, cgroup = tmp_path / "meminfo", tmp_path / "cgroup"
    assert processes.host_room(meminfo, cgroup) is None
    meminfo.write_text("MemTotal:       1000 kB\nMemAvailable:    600 kB\nHugePages_Total:       0\n")
    assert processes.host_room(meminfo, cgroup) == 600 * 1024
    cgroup.mkdir()
    (cgroup / "memory.max").write_text("max\n")
    assert processes.host_room(meminfo, cgroup) == 600 * 1024
    (cgroup / "memory.max").write_text("100000\n")
    (cgroup / "memory.current").write_text("90000\n")
    (cgroup / "memory.stat").write_text("anon 20000\nfile 70000\nshmem 15000\n")
    assert processes.host_room(meminfo, cgroup) == 100000 - 90000 + 70000 - 15000
