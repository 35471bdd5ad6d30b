"""Do the ranks reach each other? A process group as the run's own, collectives with a time limit, clocks."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from sft_job.preflight.findings import Network, Speed

_BYTES = {"gloo": 8 * 2**20, "nccl": 256 * 2**20}
_ROUNDS = 3


def measure(store: dist.Store, rank: int, world: int, ranks_on_node: int, seconds: float) -> Network:
    """Join all ranks, send through every link, and compare clocks (a collective call).

    Args:
        store: on which they meet; keys of ours begin with ``group/``.
        rank: this rank.
        world: all of them.
        ranks_on_node: on each node.
        seconds: longest time for joining, and for each collective.

    Returns:
        Speeds and clocks; where something failed, ``faults`` holds this rank's fault, and what worked before it.
    """
    device = torch.device("cpu")
    backend = "gloo"
    if torch.cuda.is_available():
        os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"  # a timeout is an error to report, not the end of the process
        device = torch.device("cuda", rank % ranks_on_node)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    speeds: list[Speed] = []
    clocks: dict[int, float] = {}
    uncertain = 0.0
    doing = "joining the others"
    try:
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("group", store),
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=seconds),
            device_id=device if device.type == "cuda" else None,
        )
        doing = "comparing clocks (gloo)"
        clocks, uncertain = _clocks(world, ranks_on_node)
        for kind in ("gloo",) if device.type == "cpu" else ("gloo", "nccl"):
            place = device if kind == "nccl" else torch.device("cpu")
            for name in ("all-reduce", "all-to-all"):
                doing = f"{name} ({kind})"
                speeds.append(_speed(kind, name, place, world))
        doing = "leaving"
        _meet()
        dist.destroy_process_group()
    except Exception as error:  # whatever a backend raises is what people must see
        lines = [line for line in str(error).splitlines() if line.strip()]
        text = f"failed while {doing}: {lines[0] if lines else type(error).__name__}"
        return Network(tuple(speeds), clocks, {rank: text}, uncertain)
    return Network(tuple(speeds), clocks, {}, uncertain)


def _speed(kind: str, name: str, device: torch.device, world: int) -> Speed:
    count = _BYTES[kind] // 4 // world * world
    sent = torch.ones(count, device=device)
    received = torch.empty_like(sent)

    def all_reduce() -> None:
        dist.all_reduce(sent)
        sent.fill_(1.0)

    def all_to_all() -> None:
        dist.all_to_all_single(received, sent)

    action: Callable[[], None] = all_reduce if name == "all-reduce" else all_to_all
    action()  # connections are made by the first one
    _settle(device)
    began = time.perf_counter()
    for _ in range(_ROUNDS):
        action()
    _settle(device)
    return Speed(kind, name, count * 4, (time.perf_counter() - began) / _ROUNDS, world)


def _meet() -> None:
    """A barrier of the CPU: ``dist.barrier`` would be one of the GPUs."""
    dist.all_reduce(torch.zeros(1))


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _clocks(world: int, ranks_on_node: int) -> tuple[dict[int, float], float]:
    """Unix time of each node's first rank when all have met, and how long that meeting took."""
    _meet()  # the first one also makes connections
    began = time.monotonic()
    _meet()
    took = time.monotonic() - began
    mine = torch.tensor([time.time()], dtype=torch.float64)
    times = [torch.zeros_like(mine) for _ in range(world)]
    dist.all_gather(times, mine)
    return {rank // ranks_on_node: float(times[rank].item()) for rank in range(0, world, ranks_on_node)}, took
