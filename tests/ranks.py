"""Gloo ranks for tests: forked from a server that has torch imported, so that two ranks start in half a second."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from typing import Any

PRELOAD = ("torch", "torch.distributed", "transformers", "sft_job.train", "tests.ranks")


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_server() -> multiprocessing.context.BaseContext:
    """The fork server: one import of torch for all ranks of a test session."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    return context


def _rank(sender: Connection, environment: dict[str, str], function: Callable[..., Any], arguments: tuple) -> None:
    os.environ.update(environment)
    try:
        import torch

        torch.set_num_threads(1)
        outcome = ("value", function(*arguments))
    except BaseException:
        outcome = ("error", traceback.format_exc())
    try:
        # Plain pickle: the connection's own would pass tensors as handles that die with this process.
        sender.send_bytes(pickle.dumps(outcome))
    finally:
        sender.close()
        # Gloo's threads would delay a normal exit.
        os._exit(0)


def run_ranks(
    context: multiprocessing.context.BaseContext,
    world: int,
    function: Callable[..., Any],
    *arguments: Any,
    timeout: float = 120.0,
    environment: dict[str, str] | None = None,
) -> list[Any]:
    """Run ``function(*arguments)`` in ``world`` ranks; what each returned, by rank.

    Fails the test where a rank raises, dies, or is not done after ``timeout`` seconds.
    """
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= environment or {}
    processes, receivers = [], []
    for rank in range(world):
        receiver, sender = context.Pipe(duplex=False)
        variables = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = context.Process(target=_rank, args=(sender, variables, function, arguments), daemon=True)
        process.start()
        sender.close()
        processes.append(process)
        receivers.append(receiver)
    try:
        return _collect(receivers, time.monotonic() + timeout)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _collect(receivers: list[Connection], deadline: float) -> list[Any]:
    values: dict[int, Any] = {}
    while len(values) < len(receivers):
        open_ones = [r for i, r in enumerate(receivers) if i not in values]
        ready = wait_for(open_ones, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise AssertionError(f"ranks {sorted(set(range(len(receivers))) - set(values))} did not finish in time")
        for receiver in ready:
            rank = receivers.index(receiver)
            try:
                kind, value = pickle.loads(receiver.recv_bytes())
            except EOFError:
                raise AssertionError(f"rank {rank} died without a word") from None
            if kind == "error":
                raise AssertionError(f"rank {rank} failed:\n{value}")
            values[rank] = value
    return [values[rank] for rank in range(len(receivers))]
