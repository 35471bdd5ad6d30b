"""Folders that a container sees: ``/path``, ``/path:/target``, ``/path:/target:rw``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mount:
    """One folder (or file) of the host in the container.

    Attributes:
        source: absolute path on the host.
        target: absolute path in the container.
        writable: the job may write there.
    """

    source: str
    target: str
    writable: bool = False

    def __str__(self) -> str:
        return f"{self.source}:{self.target}:{'rw' if self.writable else 'ro'}"


def parse_mount(text: str) -> Mount:
    """Read one entry of ``mounts``.

    Raises:
        ValueError: it has another form; the message is the rule.
    """
    parts = text.split(":")
    mode = parts.pop() if len(parts) > 1 and parts[-1] in ("ro", "rw") else "ro"
    if len(parts) > 2 or not all(part.startswith("/") for part in parts):
        raise ValueError("must be /path or /path:/path/in/container, with :ro (the default) or :rw behind it")
    for part in parts:
        check_path(part)
    return Mount(parts[0], parts[-1], mode == "rw")


def check_path(path: str) -> None:
    """Refuse an absolute path that could not be mounted, or would mount something else besides.

    Raises:
        ValueError: the message is the rule.
    """
    if any(character in path for character in ":,\\\"'") or ".." in path.split("/"):
        raise ValueError("must be plain absolute paths, without colons, commas, quotes, backslashes and ..")
