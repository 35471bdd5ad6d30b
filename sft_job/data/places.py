"""Hands the caches over from the process that made them to the ranks, so that no rank reads the data's files again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sft_job.data.cache import TokenCache, open_cache
from sft_job.data.mixture import MixedSet, Mixture

_FILE = "caches.json"


def write_places(folder: Path, train: TokenCache | Mixture, val: TokenCache | Mixture | None) -> None:
    """Note in a folder where the caches are, and how several are mixed."""
    places = {"train": _place(train), "val": _place(val) if val else None}
    (folder / _FILE).write_text(json.dumps(places), encoding="utf-8")


def open_places(folder: Path) -> tuple[TokenCache | Mixture, TokenCache | Mixture | None]:
    """Open the caches that ``write_places`` noted.

    Raises:
        OSError: nothing was noted.
        DamagedCacheError: a cache is not whole.
    """
    places = json.loads((folder / _FILE).read_text(encoding="utf-8"))
    return _open(places["train"]), _open(places["val"]) if places["val"] else None


def _place(rows: TokenCache | Mixture) -> Any:
    if isinstance(rows, TokenCache):
        return str(rows.folder)
    return [[each.name, str(each.cache.folder), each.weight, each.repeat] for each in rows.sets]


def _open(place: Any) -> TokenCache | Mixture:
    if isinstance(place, str):
        return open_cache(Path(place))
    return Mixture([MixedSet(name, open_cache(Path(at)), weight, repeat) for name, at, weight, repeat in place])
