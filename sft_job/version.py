"""Which sft_job this is."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path

from sft_job.contract import Env


def commit(environ: Mapping[str, str]) -> str | None:
    """The commit that the image was built from, or that this checkout stands at; None where neither is known."""
    known = environ.get(Env.COMMIT)
    if known:
        return known
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    found = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or None
