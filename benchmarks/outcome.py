"""What one process of a run leaves behind."""

from __future__ import annotations

import json
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "peft",
    "trl",
    "liger-kernel",
    "flash-attn-4",
    "flash-attn",
    "nvidia-cutlass-dsl",
    "quack-kernels",
    "torchao",
    "nvidia-cudnn-cu13",
    "nvidia-nccl-cu13",
    "datasets",
)


class Outcome:
    """A JSON file that grows: whatever is known is on the disk at once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, Any] = {}

    def add(self, **values: Any) -> None:
        """Write these down too."""
        self._known |= values
        draft = self._path.with_suffix(".draft")
        draft.write_text(json.dumps(self._known, indent=1, default=str) + "\n", encoding="utf-8")
        draft.replace(self._path)


def versions() -> dict[str, str]:
    """Of Python and the packages that matter, those that are installed."""
    found = {"python": sys.version.split()[0]}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def say(text: str) -> None:
    """A line for the run's log."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
