"""What one rank is: its process group, device, seeds and the wish to stop."""

from __future__ import annotations

import ctypes
import os
import signal
import zlib
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist

from sft_job.contract import STOP_SIGNALS


@dataclass(frozen=True)
class Runtime:
    """One rank of the run."""

    rank: int
    local_rank: int
    world: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Rank 0: the one that writes, logs and talks to the user."""
        return self.rank == 0


def start_runtime(timeout_seconds: int, deterministic: bool = False) -> Runtime:
    """Join the process group that RANK, WORLD_SIZE, LOCAL_RANK and MASTER_* describe; alone without them.

    CUDA where there is one device a rank, gloo ranks on the CPU otherwise. A collective that takes longer than
    ``timeout_seconds`` ends the rank.
    """
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device = torch.device("cpu")
        backend = "gloo"
    if deterministic and device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    dist.init_process_group(
        backend,
        timeout=timedelta(seconds=timeout_seconds),
        device_id=device if device.type == "cuda" else None,
    )
    return Runtime(dist.get_rank(), local_rank, dist.get_world_size(), device)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed every random generator of torch for one step of one rank.

    Randomness is a function of (seed, step, rank) and nothing else, so that a resumed run draws what an
    uninterrupted one would have drawn.
    """
    torch.manual_seed(zlib.crc32(f"{seed} {step} {rank}".encode()))


def agree(wish: bool, device: torch.device) -> bool:
    """Whether any rank has the wish; the same answer on every rank (a collective call)."""
    flag = torch.tensor([float(wish)], device=device)
    dist.all_reduce(flag)
    return bool(flag.item())


def die_with_parent() -> None:
    """Be asked to stop when the supervisor is gone: ranks without one would train on, seen by nobody."""
    if hasattr(signal, "pthread_sigmask") and os.uname().sysname == "Linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def peak_memory(device: torch.device) -> int | None:
    """Most bytes of device memory in use so far; None on the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


@dataclass
class StopWish:
    """Whether somebody asked this rank to stop; signals only set it, the loop acts at the next step's end."""

    signal: int = 0

    def install(self) -> StopWish:
        """Listen to the stop signals; a second one changes nothing.

        The supervisor starts ranks with these signals blocked, so that one that comes while torch is imported waits
        until here.
        """
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number
