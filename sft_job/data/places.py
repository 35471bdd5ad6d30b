"""Hands the caches over from the process that made them to the ranks, so that no rank reads the data's files again."""

from __future__ import annotations

import json
from pathlib import Path

from sft_job.data.cache import TokenCache, open_cache

_FILE = "caches.json"


def write_places(folder: Path, train: TokenCache, val: TokenCache | None) -> None:
    """Note in a folder where the caches are."""
    places = {"train": str(train.folder), "val": str(val.folder) if val else None}
    (folder / _FILE).write_text(json.dumps(places), encoding="utf-8")


def open_places(folder: Path) -> tuple[TokenCache, TokenCache | None]:
    """Open the caches that ``write_places`` noted.

    Raises:
        OSError: nothing was noted.
        DamagedCacheError: a cache is not whole.
    """
    places = json.loads((folder / _FILE).read_text(encoding="utf-8"))
    return open_cache(Path(places["train"])), open_cache(Path(places["val"])) if places["val"] else None
