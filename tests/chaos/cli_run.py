"""A kill of the real command: interpreters of its own, the real command line, signals from outside."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.chaos.plan import GRACEFUL, Phase, Strike, Target
from tests.chaos.server import ROOT
from tests.chaos.shim import Act, Op, build_shim
from tests.chaos.world import JOURNAL

_HANG_SECONDS = 240.0
# Phases that the preloaded shim can hit in a process that knows nothing of it.
_FILE_PHASES = {
    Phase.SAVE_SHARD: (Op.WRITE, ".distcp"),
    Phase.FSYNC: (Op.FSYNC, "/checkpoints"),
    Phase.RENAME: (Op.RENAME, "/checkpoints/"),
    Phase.LATEST: (Op.RENAME, "/latest"),
    Phase.EXPORT: (Op.WRITE, "/huggingface/"),
}


def killed_and_resumed(
    folder: Path, config: Path, overrides: Sequence[str], strike: Strike, codes: list[int]
) -> list[str]:
    """Start ``sft-job train``, kill it once, start it again and let it end; what was wrong on the way."""
    control = folder / "control"
    control.mkdir(parents=True, exist_ok=True)
    (control / "ledger.jsonl").touch()
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PET_", "SFT_JOB_"))}
    environ |= {"CHECKPOINT_DIR": str(folder), "NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environ |= {"SFT_JOB_ID": folder.name, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "sft_job.cli", "train", str(config), *overrides]
    armed = {}
    in_files = strike.phase in _FILE_PHASES and strike.target is Target.RANK and strike.signal != signal.SIGSTOP
    if in_files:
        ops, part = _FILE_PHASES[strike.phase]
        if "model.lora_rank=4" in overrides and strike.phase is Phase.EXPORT:
            part = "/adapter/"
        armed = {
            "LD_PRELOAD": str(build_shim()),
            "CHAOS_ARM": f"{int(ops)}|{folder}/sft|{part}|{strike.nth}|{int(Act.STRIKE)}|0",
            "CHAOS_STRIKE": f"{control / JOURNAL}|{strike.number} {strike.phase.value}|{int(strike.signal)}",
        }
    code, output = _run(command, environ | armed, folder, None if in_files else strike)
    codes.append(code)
    faults = []
    if code not in _right_codes(strike):
        faults.append(f"exit code {code} after the kill\n{output[-2000:]}")
    code, output = _run(command, environ, folder, None)
    codes.append(code)
    if code != 0:
        faults.append(f"exit code {code} when started again\n{output[-2000:]}")
    return faults


def _right_codes(strike: Strike) -> tuple[int, ...]:
    if strike.signal in GRACEFUL:
        return (143, 0)
    if strike.target in (Target.SUPERVISOR, Target.NODE):
        return (-strike.signal, 0)
    return (137, 0)


def _run(command: Sequence[str], environ: dict[str, str], folder: Path, strike: Strike | None) -> tuple[int, str]:
    """Run the command; with a strike send its signal when ``metrics.jsonl`` shows its step."""
    log = folder / "control" / "cli.log"
    with log.open("ab") as out:
        process = subprocess.Popen(command, env=environ, stdout=out, stderr=out, start_new_session=True)
    deadline = time.monotonic() + _HANG_SECONDS
    pids: set[int] = set()
    while process.poll() is None:
        time.sleep(0.02)
        pids |= set(_ranks_of(process.pid))
        if strike is not None and _steps(folder) >= max(1, strike.step):
            _send(process.pid, strike, folder)
            strike = None
        if time.monotonic() > deadline:
            for pid in (process.pid, *pids):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
            raise AssertionError(f"the command hung:\n{log.read_text(errors='replace')[-2000:]}")
    while any(_alive(pid) for pid in pids):  # ranks that outlive their supervisor save and leave
        if time.monotonic() > deadline:
            raise AssertionError("ranks outlived their supervisor")
        time.sleep(0.05)
    return process.returncode, log.read_text(errors="replace")


def _send(supervisor: int, strike: Strike, folder: Path) -> None:
    ranks = _ranks_of(supervisor)
    targets = {
        Target.RANK: ranks[strike.rank % len(ranks) :][:1] if ranks else [],
        Target.RANKS: ranks,
        Target.SUPERVISOR: [supervisor],
        Target.NODE: [supervisor, *ranks],
    }[strike.target]
    with (folder / "control" / JOURNAL).open("a") as journal:
        journal.write(f"{strike.number} {strike.phase.value} running {supervisor}\n")
    for pid in targets:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, strike.signal)
    if strike.signal == signal.SIGSTOP:
        time.sleep(0.3)
        for pid in targets:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _steps(folder: Path) -> int:
    try:
        return (folder / "sft" / "logs" / "metrics.jsonl").read_text().count("train/loss")
    except FileNotFoundError:
        return 0


def _ranks_of(supervisor: int) -> list[int]:
    """Processes of a supervisor that run a rank, by their start."""
    try:
        children = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
    except OSError:
        return []
    found = []
    for pid in children:
        with contextlib.suppress(OSError):
            if b"sft_job.train" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(int(pid))
    return found


def _alive(pid: int) -> bool:
    try:
        return (Path(f"/proc/{pid}") / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
