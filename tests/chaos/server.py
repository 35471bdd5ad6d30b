"""A fork server of its own: torch, transformers and the job imported once, with the shim preloaded.

The servers of ``multiprocessing`` are one a process and cannot be given an environment; this one is started by hand, so
that it can stand beside the one of the other tests.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.chaos.shim import build_shim

ROOT = Path(__file__).parents[2]
PRELOAD = (
    "torch",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "transformers",
    "transformers.models.qwen3.modeling_qwen3",
    "peft",
    "sft_job.train",
    "sft_job.prepare",
    "sft_job.supervisor",
    "tests.chaos.world",
    "tests.chaos.oracle",
    "tests.chaos.faults",
)


class HangError(AssertionError):
    """A call did not come back in time."""


class Call:
    """One function that runs in a process forked from the server."""

    def __init__(self, reader: int, pid: int) -> None:
        self._reader = reader
        self.pid = pid

    def result(self, timeout: float) -> Any:
        """What it returned.

        Raises:
            HangError: it is not done after ``timeout`` seconds; it was killed.
            AssertionError: it raised, or died without a word.
        """
        deadline = time.monotonic() + timeout
        try:
            size = struct.unpack("!Q", self._read(8, deadline))[0]
            kind, value = pickle.loads(self._read(size, deadline))
        finally:
            os.close(self._reader)
        if kind == "error":
            raise AssertionError(f"in a process of the fork server:\n{value}")
        return value

    def _read(self, size: int, deadline: float) -> bytes:
        data = b""
        while len(data) < size:
            ready, _, _ = select.select([self._reader], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGKILL)
                raise HangError(f"process {self.pid} did not come back in time")
            piece = os.read(self._reader, size - len(data))
            if not piece:
                raise AssertionError(f"process {self.pid} of the fork server died without a word")
            data += piece
        return data


class Server:
    """The server; its calls run side by side. A context manager."""

    def __init__(self) -> None:
        mine, theirs = socket.socketpair()
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("PET_", "SFT_JOB_"))}
        environ |= {"LD_PRELOAD": str(build_shim()), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        environ |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.server", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=environ,
            cwd=ROOT,
        )
        theirs.close()
        self._socket = mine
        self._lock = threading.Lock()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._process.wait()

    def start(self, function: Callable[..., Any], *arguments: Any) -> Call:
        """Run a module-level function in a process of its own."""
        reader, writer = os.pipe()
        data = pickle.dumps((function, arguments))
        with self._lock:
            socket.send_fds(self._socket, [struct.pack("!Q", len(data))], [writer])
            self._socket.sendall(data)
            os.close(writer)
            pid = struct.unpack("!q", _receive(self._socket, 8))[0]
        return Call(reader, pid)

    def call(self, function: Callable[..., Any], *arguments: Any, timeout: float = 120.0) -> Any:
        """Run a function and wait for what it returns."""
        return self.start(function, *arguments).result(timeout)


def _receive(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = connection.recv(size - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data


def serve(connection: socket.socket) -> None:
    """Fork a process for each request until the other side hangs up."""
    for name in PRELOAD:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # children that collect would copy every page
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        head, descriptors, _, _ = socket.recv_fds(connection, 8, 1)
        if not head:
            return
        head += _receive(connection, 8 - len(head)) if len(head) < 8 else b""
        data = _receive(connection, struct.unpack("!Q", head)[0])
        pid = os.fork()
        if pid == 0:
            connection.close()
            _run(data, descriptors[0])
        os.close(descriptors[0])
        connection.sendall(struct.pack("!q", pid))


def _run(data: bytes, writer: int) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    try:
        function, arguments = pickle.loads(data)
        outcome = ("value", function(*arguments))
    except BaseException:
        outcome = ("error", traceback.format_exc())
    answer = pickle.dumps(outcome)
    with contextlib.suppress(BrokenPipeError):
        os.write(writer, struct.pack("!Q", len(answer)))
        while answer:
            answer = answer[os.write(writer, answer) :]
    os._exit(0)


if __name__ == "__main__":
    with contextlib.suppress(EOFError, ConnectionResetError, KeyboardInterrupt):
        serve(socket.socket(fileno=int(sys.argv[1])))
