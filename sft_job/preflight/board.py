"""Where ranks leave word for each other while it is not known who is there: keys with JSON in a store."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from sft_job.contract import Env

_POLL_SECONDS = 0.1


class Board:
    """A store that rank 0 keeps, on the socket that its supervisor opened.

    Args:
        store: shared by all ranks.
    """

    def __init__(self, store: dist.Store) -> None:
        self.store = store

    def put(self, key: str, value: Any) -> None:
        """Leave a value for all."""
        self.store.set(key, json.dumps(value))

    def get(self, key: str, until: float) -> Any:
        """A value, as soon as it is there.

        Raises:
            dist.DistError: it did not come in time, or rank 0 is gone.
        """
        self.store.wait([key], timedelta(seconds=max(0.1, until - time.monotonic())))
        return json.loads(self.store.get(key))

    def first(self, key: str) -> bool:
        """Whether this caller is the first who asks so."""
        return self.store.add(key, 1) == 1

    def has(self, key: str) -> bool:
        """Whether the value is there."""
        return self.store.check([key])

    def wait_for(self, keys: list[str], until: float) -> list[str]:
        """Wait for all of them; those that are not there when the time is up."""
        left = keys
        while left := [key for key in left if not self.has(key)]:
            if time.monotonic() >= until:
                break
            time.sleep(_POLL_SECONDS)
        return left


def open_board(environ: Mapping[str, str], world: int, until: float) -> Board:
    """Rank 0 opens it and waits for nobody; the others try until it answers.

    Raises:
        dist.DistError: it does not answer.
    """
    address, port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    timeout = timedelta(seconds=max(1.0, until - time.monotonic()))
    given = environ.get(Env.STORE_FD)
    handed: dict[str, Any] = {} if given is None else {"master_listen_fd": int(given)}
    store = dist.TCPStore(
        address, port, world, is_master=given is not None, timeout=timeout, wait_for_workers=False, **handed
    )
    return Board(store)
