"""Paths of a job file, and what a container sees of them: ``/path``, ``/path:/target``, ``/path:/target:rw``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


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


def planned_mounts(config: str, checkpoint_dir: str, mounts: Sequence[str]) -> list[Mount]:
    """What a container of the job sees: the folder of the run's YAML, the checkpoint folder, and what is named besides.

    A folder comes before what lies in it, which it would hide otherwise. No place is named twice: engines refuse.

    Args:
        config: absolute path of the YAML that the run gets.
        checkpoint_dir: absolute path of ``CHECKPOINT_DIR``.
        mounts: entries of ``mounts``; the last one for a place counts.
    """
    folder, checkpoints = Path(config).parent, Path(checkpoint_dir)
    own = [Mount(str(checkpoints), str(checkpoints), True)]
    if not folder.is_relative_to(checkpoints):  # read-only on top of it, the job could not write there
        own.append(Mount(str(folder), str(folder)))
    found: dict[str, Mount] = {}
    for mount in (*own, *map(parse_mount, mounts)):
        source, target = os.path.normpath(mount.source), os.path.normpath(mount.target)
        before = found.get(target)
        # The job writes into its folder, whatever a mount of the same folder says.
        writable = mount.writable or (before is not None and before.writable and before.source == source)
        found[target] = Mount(source, target, writable)
    return sorted(found.values(), key=lambda mount: len(Path(mount.target).parts))


def check_path(path: str) -> None:
    """Refuse an absolute path that could not be mounted, or would mount something else besides.

    Raises:
        ValueError: the message is the rule.
    """
    if any(character in path for character in ":,\\\"'") or ".." in path.split("/"):
        raise ValueError("must be plain absolute paths, without colons, commas, quotes, backslashes and ..")


_TREES = (
    "/opt/sft-job",
    "/usr",
    "/etc",
    "/dev",
    "/proc",
    "/sys",
    "/bin",
    "/sbin",
    "/lib",
    "/lib32",
    "/lib64",
    "/run",
    "/boot",
)


def check_target(path: str) -> None:
    """Refuse a place in a container where a mount would hide what the image, its caches or the engine need.

    Raises:
        ValueError: the message is the rule.
    """
    target = Path(os.path.normpath(path.replace("//", "/")))
    hides = any(Path(tree).is_relative_to(target) or target.is_relative_to(tree) for tree in _TREES)
    if hides or target == Path("/tmp"):
        raise ValueError(f"mounted at {target} it would hide files that the image or the engine needs there")


def absolute(path: str, cwd: Path) -> str:
    """A path of the job file as an absolute one."""
    return os.path.normpath(cwd / with_home(path))


def with_home(path: str) -> str:
    """The path with ``~`` written out; nothing else of it changes, for an image may be no path."""
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError:  # nobody of that name
        return path
