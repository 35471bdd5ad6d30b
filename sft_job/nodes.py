"""What the first node tells the others before any rank starts: go on, the run is done, or how it ended. Torch-free.

Only the first node looks at the run folder, for file systems may show nodes different things. The others ask it, on the
port on which the ranks will meet and which is free until then. A node's question is one line, and so is each word:
a first one (tokenise), a second one (start the ranks); a word with an exit code is the last.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from sft_job.config.topology import Topology
from sft_job.contract import Env, ExitCode
from sft_job.errors import JobError
from sft_job.ranks import listen

_HELLO = b"sft_job node "
_WORDS = 2
_LONGEST = 1 << 20
_POLL_SECONDS = 0.1
_HELLO_SECONDS = 5.0
COMING_SECONDS = 1800.0
"""How long nodes are waited for at least: one may still wait for its GPUs, or pull its image."""
_END_SECONDS = 30.0
"""How long an end waits for nodes that have not asked yet."""


@dataclass(frozen=True)
class Word:
    """What the first node says.

    Attributes:
        code: how the run ended; None = it goes on.
        message: for the user.
    """

    code: int | None = None
    message: str = ""


class Nodes:
    """This node's line to the others; on a run of one node nobody is talked to.

    Args:
        topology: how many nodes there are, and which this one is.
        patience: seconds that a node is waited for. Another node waits twice as long for the first one's first word:
            meanwhile that one takes the run folder, and waits for the others.
        stopped: somebody asked this process to stop.

    Raises:
        JobError: the port is taken (137).
    """

    def __init__(self, topology: Topology, patience: float, stopped: Callable[[], bool]) -> None:
        self._topology = topology
        self._patience = patience
        self._stopped = stopped
        self._asked: dict[int, socket.socket] = {}
        self._first: socket.socket | None = None
        self._heard = bytearray()
        self._answered = False
        self._left = _WORDS if topology.nnodes > 1 else 0
        self._server = listen(topology) if self._left and topology.node_rank == 0 else None

    def agree(self, word: Word) -> Word:
        """The first node's next word, on every node.

        Args:
            word: what it says; that of another node is not looked at.

        Raises:
            JobError: a node did not come or is gone (137); stopped meanwhile (143).
        """
        if not self._left:
            return word
        self._left = 0 if word.code is not None else self._left - 1
        if self._topology.node_rank > 0:
            return self._hear()
        missing = self._gather(self._patience if word.code is None else min(self._patience, _END_SECONDS))
        if missing and word.code is None:
            if self._stopped():
                raise self._stop()
            text = ", ".join(map(str, sorted(missing)))
            lost = Word(ExitCode.LOST, f"node {text} did not come within {self._patience:g} s")
            self._left = 0
            self._tell(lost)
            raise JobError(ExitCode.LOST, lost.message)
        self._tell(word)
        return word

    def end(self, error: JobError) -> None:
        """On the first node: tell the others that still wait for a word how it ended."""
        if self._left and self._topology.node_rank == 0:
            with contextlib.suppress(JobError):
                self.agree(Word(error.code, str(error)))

    def close(self) -> None:
        """Hang up."""
        for line in (self._server, self._first, *self._asked.values()):
            if line is not None:
                line.close()
        self._server = None

    def _gather(self, seconds: float) -> set[int]:
        """Wait until every other node has asked; those that have not."""
        others = set(range(1, self._topology.nnodes))
        deadline = time.monotonic() + seconds
        while self._server is not None and (missing := others - self._asked.keys()):
            if time.monotonic() >= deadline or self._stopped():
                return missing
            self._server.settimeout(_POLL_SECONDS)
            with contextlib.suppress(TimeoutError):
                self._greet(self._server.accept()[0])
        if self._server is not None:
            # The ranks will meet at this port: from here on nobody else answers there.
            self._server.close()
            self._server = None
        return set()

    def _greet(self, line: socket.socket) -> None:
        """Note who asks; whatever else has found this port is sent away."""
        line.settimeout(_HELLO_SECONDS)
        try:
            hello = line.recv(64)
            rank = int(hello.removeprefix(_HELLO)) if hello.startswith(_HELLO) else 0
        except (OSError, ValueError):
            rank = 0
        if not 0 < rank < self._topology.nnodes:
            line.close()
            return
        if rank in self._asked:
            self._asked[rank].close()  # it was started anew
        self._asked[rank] = line

    def _tell(self, word: Word) -> None:
        for line in self._asked.values():
            with contextlib.suppress(OSError):  # its ranks will be missed, or its launcher knows
                line.sendall(json.dumps(asdict(word)).encode() + b"\n")
        if not self._left:
            self.close()

    def _hear(self) -> Word:
        if self._first is None:
            self._first = self._call()
        self._first.settimeout(_POLL_SECONDS)
        # What has answered is the first node, which may tokenise for hours; what has not may be anything, such as the
        # ranks' own meeting place in an earlier start of this run that is not over yet.
        patience = 2 * self._patience
        deadline = None if self._answered else time.monotonic() + patience
        while b"\n" not in self._heard:
            if self._stopped():
                raise self._stop()
            if deadline is not None and time.monotonic() >= deadline:
                raise self._gone(f"it has said nothing for {patience:g} s")
            try:
                part = self._first.recv(65536)
            except TimeoutError:
                continue
            except OSError as error:
                raise self._gone(str(error)) from error
            if not part or len(self._heard) > _LONGEST:
                raise self._gone("it hung up")
            self._heard += part
        line, _, self._heard = self._heard.partition(b"\n")
        try:
            word = Word(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise self._gone("it speaks of something else") from error
        self._answered = True
        if word.code is not None or not self._left:
            self._left = 0
            self.close()
        return word

    def _call(self) -> socket.socket:
        """Ask the first node, which may start later; then its end, but for no time, ends the waiting."""
        address = (self._topology.master_addr, self._topology.master_port or 0)
        deadline = time.monotonic() + self._patience
        while True:
            if self._stopped():
                raise self._stop()
            try:
                line = socket.create_connection(address, timeout=_HELLO_SECONDS)
                line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                if hasattr(socket, "TCP_KEEPIDLE"):
                    for option, value in (
                        (socket.TCP_KEEPIDLE, 10),
                        (socket.TCP_KEEPINTVL, 5),
                        (socket.TCP_KEEPCNT, 6),
                    ):
                        line.setsockopt(socket.IPPROTO_TCP, option, value)
                line.sendall(_HELLO + str(self._topology.node_rank).encode())
            except OSError as error:
                if time.monotonic() >= deadline:
                    raise self._gone(f"no answer within {self._patience:g} s ({error})") from error
                time.sleep(_POLL_SECONDS)
            else:
                return line

    def _stop(self) -> JobError:
        return JobError(ExitCode.STOPPED, "stopped before a new step: nothing to save")

    def _gone(self, why: str) -> JobError:
        where = f"{self._topology.master_addr}:{self._topology.master_port}"
        return JobError(
            ExitCode.LOST,
            f"the first node, {where}, cannot be asked where the run begins: {why}\n    fix: run it again; "
            f"{Env.MASTER_ADDR} and {Env.MASTER_PORT} must be the same on every node",
        )
