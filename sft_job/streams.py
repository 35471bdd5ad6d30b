"""The last word to the user, where nobody may be able to read it: the exit code is the same. Torch-free."""

from __future__ import annotations

import contextlib
import os
import sys


def say(text: str) -> None:
    """Write to standard error; a full disk or a closed stream there is no reason to end otherwise."""
    with contextlib.suppress(OSError, ValueError):
        if sys.stderr is not None:  # pyright: ignore[reportUnnecessaryComparison]  None where it was closed at the start
            sys.stderr.write(text)
            sys.stderr.flush()


def settle_streams() -> None:
    """Write out what both streams hold, or drop it: the interpreter's own flush at exit would change the code."""
    for stream in (sys.stdout, sys.stderr):
        if stream is None:  # pyright: ignore[reportUnnecessaryComparison]
            continue
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
                stream.flush()
