"""Host memory for blocks' inputs: locked before it is counted on, and the checkpoint's copy goes where they need it."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sft_job import capacity
from sft_job.capacity import Capacity
from sft_job.host import HostNeed
from sft_job.model.offload import AtOnce, HostPages, InputStore

PAGE = 4096


class Host:
    """So many pages can be locked; the checkpoint's copy holds some of them."""

    def __init__(self, room: int, copy: int) -> None:
        self.room, self.copies, self.ready = room, copy > 0, True
        self._copy = copy
        self.locked: set[int] = set()
        self.given_up = 0

    @property
    def left(self) -> int:
        return self.room - len(self.locked) - (self._copy if self.copies else 0)

    def cudaHostRegister(self, start: int, size: int, flags: int, /) -> int:
        if self.left <= 0:
            return 2
        self.locked.add(start)
        return 0

    def cudaHostUnregister(self, start: int, /) -> int:
        self.locked.remove(start)
        return 0

    def give_up_copy(self) -> None:
        self.copies, self.given_up = False, self.given_up + 1


@pytest.fixture(autouse=True)
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(("room", "copy", "found", "given_up"), [
    (30, 10, 7, 0),  # both have room
    (20, 10, 7, 1),  # not together
    (9, 4, 4, 1),  # not all inputs even without it
    (9, 0, 4, 0),
    (1, 0, 0, 0),
])  # fmt: skip
@pytest.mark.parametrize("knows", [True, False])
def test_inputs_come_before_the_copy(room, copy, found, given_up, knows, monkeypatch) -> None:
    """Whether the lack shows in what the system says it has, or only where it will not lock more."""
    host = Host(room, copy)
    store = InputStore(torch.device("cpu"), HostPages(host, PAGE), AtOnce(), AtOnce())
    # 5 % of what the system has is left for other things.
    monkeypatch.setattr(capacity, "host_room", lambda: int(host.left * PAGE / 0.95) + 1 if knows else None)
    module: Any = SimpleNamespace(blocks=SimpleNamespace(store=store, can_offload=True))
    need = HostNeed(2 * PAGE, 7, 1, 1, 2)
    nothing: Any = None
    room_for = Capacity(nothing, nothing, module, nothing, nothing, host, [], need, None)  # type: ignore[arg-type]
    assert room_for.host_blocks() == found
    assert host.given_up == given_up
    assert len(host.locked) == 2 * found, "what one block's input only half fits is given back"
