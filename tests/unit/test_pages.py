"""Host memory to be locked: private, in huge pages where the system has some, and not for children."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from sft_job.pages import own_pages


def _mapping(place: int) -> dict[str, str]:
    """What Linux says of the memory at an address."""
    found: dict[str, str] = {}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(" ")
        if "-" in name:
            begin, end = (int(part, 16) for part in name.split("-"))
            inside = begin <= place < end
            if inside:
                found["permissions"] = rest.split()[0]
        elif inside:
            found[name.rstrip(":")] = rest.strip()
    return found


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's account of memory")
def test_memory_is_private_and_wants_huge_pages() -> None:
    memory = own_pages(2**22)
    array = np.frombuffer(memory, dtype=np.uint8)
    assert len(array) == 2**22
    assert not array.any()
    found = _mapping(array.ctypes.data)
    assert found["permissions"].endswith("p"), "shared memory has no huge pages by default"
    flags = found["VmFlags"].split()
    assert "dc" in flags, "not for children"
    if Path("/sys/kernel/mm/transparent_hugepage/enabled").exists():
        assert "hg" in flags


def test_pages_are_whole() -> None:
    first, second = (np.frombuffer(own_pages(5000), dtype=np.uint8) for _ in range(2))
    assert first.ctypes.data % os.sysconf("SC_PAGE_SIZE") == 0
    assert abs(first.ctypes.data - second.ctypes.data) >= 2 * os.sysconf("SC_PAGE_SIZE")
