"""Is the run folder one folder for all nodes? Each writes a token and reads those of the others. Torch-free."""

from __future__ import annotations

import contextlib
import os
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sft_job.checkpoint.files import write_durably

READ_SECONDS = 10.0
"""How long a token may take to show on another node: a file server's clients look again after a few seconds."""
_PREFIX = ".preflight."
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Token:
    """What a node wrote.

    Attributes:
        name: of the file in the run folder; '' where it could not be written.
        text: its content.
        fault: why it could not be written.
    """

    name: str
    text: str = ""
    fault: str = ""


@contextlib.contextmanager
def own_token(folder: Path) -> Iterator[Token]:
    """Write this node's token; it is removed at the end. The folder is made where it is not there yet."""
    token = Token(f"{_PREFIX}{socket.gethostname()[:64]}.{uuid.uuid4().hex}", uuid.uuid4().hex)
    path = folder / token.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(path, token.text)
    except OSError as error:
        yield Token("", fault=f"{error.strerror or error} (this process runs as uid {os.getuid()})")
        return
    try:
        yield token
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def unseen(folder: Path, tokens: Mapping[int, Token], seconds: float = READ_SECONDS) -> dict[int, str]:
    """Nodes whose token is not what this node reads, and why; a token is waited for.

    Args:
        folder: the run folder, as this node names it.
        tokens: what each node wrote; those that could not write are left out.
        seconds: longest wait for all of them.
    """
    deadline = time.monotonic() + seconds
    left = {node: token for node, token in tokens.items() if token.name}
    faults: dict[int, str] = {}
    while True:
        faults = {node: fault for node, token in left.items() if (fault := _fault(folder, token))}
        left = {node: left[node] for node in faults}
        if not faults or time.monotonic() >= deadline:
            return faults
        time.sleep(_POLL_SECONDS)


def _fault(folder: Path, token: Token) -> str:
    try:
        os.close(os.open(folder, os.O_RDONLY))  # makes an NFS client look whether names in it have changed
        text = (folder / token.name).read_text(encoding="utf-8")
    except FileNotFoundError:
        return "is not there"
    except (OSError, ValueError) as error:
        return f"cannot be read: {error}"
    return "" if text == token.text else "holds something else"
