"""The C library's file calls, watched and failed from outside; built with the system's compiler when asked for."""

from __future__ import annotations

import ctypes
import enum
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

SOURCE = Path(__file__).with_name("shim.c")
COMPILERS = ("gcc", "cc", "clang")


class Op(enum.IntFlag):
    """Kinds of calls."""

    WRITE = 1
    FSYNC = 2
    RENAME = 4
    UNLINK = 8


class Act(enum.IntEnum):
    """What happens at a call that matches."""

    COUNT = 0
    STRIKE = 1
    FAIL = 2
    DELAY = 3
    TRACE = 4


def compiler() -> str | None:
    """The C compiler of this machine."""
    return next((name for name in COMPILERS if shutil.which(name)), None)


def build_shim() -> Path:
    """The shared object, from a cache by the content of its source."""
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"sft_chaos_shim_{os.getuid()}_{digest}.so"
    if not library.exists():
        draft = library.with_suffix(f".{os.getpid()}")
        command = [compiler() or "cc", "-O1", "-fPIC", "-shared", "-Wall", str(SOURCE), "-o", str(draft), "-ldl"]
        subprocess.run(command, check=True, capture_output=True)
        draft.replace(library)
    return library


class Shim:
    """The shim in this process; it must have been preloaded."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)
        if not hasattr(self._library, "chaos_arm"):
            raise RuntimeError("the shim is not preloaded")
        self._library.chaos_seen.restype = ctypes.c_long
        self._library.chaos_arm.argtypes = [
            ctypes.c_int,
            ctypes.c_char_p,
            ctypes.c_char_p,
            ctypes.c_long,
            ctypes.c_int,
            ctypes.c_long,
        ]

    def arm(self, ops: Op, root: Path, part: str, act: Act, *, skip: int = 0, value: int = 0) -> None:
        """From now on act at calls of these kinds on paths under ``root`` whose rest holds ``part``.

        Args:
            skip: matching calls that pass before a strike or a failure.
            value: errno of a failure, microseconds of a delay.
        """
        self._library.chaos_arm(int(ops), str(root).encode(), part.encode(), skip, int(act), value)

    def disarm(self) -> None:
        """Let everything pass."""
        self._library.chaos_arm(0, b"/", b"", 0, 0, 0)

    def seen(self) -> int:
        """Matching calls since ``arm``."""
        return int(self._library.chaos_seen())

    def prepare(self, journal: Path, text: str, number: int, pid_files: Sequence[Path] = ()) -> None:
        """Say what a strike does: note ``text`` and the place in the journal, then send the signal.

        Args:
            pid_files: of the processes that it goes to; none = this one.
        """
        names = ":".join(map(str, pid_files))
        self._library.chaos_prepare(str(journal).encode(), text.encode(), number, names.encode())

    def strike(self, phase: str) -> None:
        """Strike here and now, unless it was done already."""
        self._library.chaos_strike(phase.encode())

    @property
    def struck(self) -> bool:
        """Whether the strike was done."""
        return bool(self._library.chaos_struck())
