"""What one rank is: its process group, device, seeds and the wish to stop."""

from __future__ import annotations

import ctypes
import os
import signal
import zlib
from dataclasses import dataclass, field
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor

from sft_job.contract import STOP_SIGNALS, Env
from sft_job.deadline import Deadline
from sft_job.processes import supervisor_gone
from sft_job.pulse import Pulse


@dataclass(frozen=True)
class Runtime:
    """One rank of the run."""

    rank: int
    local_rank: int
    world: int
    device: torch.device
    pulse: Pulse = field(default_factory=Pulse)

    @property
    def is_first(self) -> bool:
        """Rank 0: the one that writes, logs and talks to the user."""
        return self.rank == 0


def start_runtime(timeout_seconds: int, deterministic: bool = False, pulse: Pulse | None = None) -> Runtime:
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
    timeout = timedelta(seconds=timeout_seconds)
    device_id = device if device.type == "cuda" else None
    if Env.REPORT_DIR in os.environ:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = _supervisors_store(world, timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout, device_id=device_id)
    else:
        dist.init_process_group(backend, timeout=timeout, device_id=device_id)
    return Runtime(dist.get_rank(), local_rank, dist.get_world_size(), device, pulse or Pulse())


def _supervisors_store(world: int, timeout: timedelta) -> dist.Store:
    """Where the ranks meet: on the socket that the supervisor opened, and handed to rank 0."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    given = os.environ.get(Env.STORE_FD)
    if given is None:
        return dist.TCPStore(address, port, world, is_master=False, timeout=timeout)
    return dist.TCPStore(address, port, world, is_master=True, timeout=timeout, master_listen_fd=int(given))


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


class HostCopy:
    """Values of a tensor on their way to the host; reading them waits for the copy, not for what is queued after it.

    Args:
        tensor: of few values.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._copied: torch.cuda.Event | None = None
        self._values = tensor
        if tensor.is_cuda:
            self._values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._values.copy_(tensor, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(tensor.device))

    def tolist(self) -> list[float]:
        """The values, once they are there."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.tolist()


def die_with_parent() -> None:
    """Be asked to stop when the supervisor is gone: ranks without one would train on, seen by nobody."""
    if os.uname().sysname == "Linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
    # It may have gone while this process imported torch: the kernel tells of later ends only.
    if supervisor_gone(os.environ):
        os.kill(os.getpid(), signal.SIGTERM)


def peak_memory(device: torch.device) -> int | None:
    """Most bytes of device memory in use so far; None on the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


@dataclass
class StopWish:
    """Whether somebody asked this rank to stop; signals only set it, the loop acts at the next step's end.

    Attributes:
        signal: the first stop signal; 0 = none.
        deadline: on rank 0, where there is one: it asks too.
    """

    signal: int = 0
    deadline: Deadline | None = None

    @property
    def wished(self) -> bool:
        """It is time to stop, by a signal or the deadline."""
        return self.signal != 0 or (self.deadline is not None and self.deadline.reached)

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
