"""Large host memory in pages of its own, to be locked exactly as large as it is."""

from __future__ import annotations

import contextlib
import mmap

_WISHES = ("MADV_HUGEPAGE", "MADV_DONTFORK")


def own_pages(size: int) -> mmap.mmap:
    """Memory that begins at a page of the system's and shares none.

    Private: shared anonymous memory is a file in shared memory, for which most systems have huge pages turned off, and
    those make locking several times as fast. A child process gets none of it: it has no use for it, and a copy on write
    would put the parent's pages elsewhere than where a device reads them.

    Args:
        size: bytes.

    Raises:
        OSError: the system has none (likewise OverflowError).
    """
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for wish in _WISHES:
        if (advice := getattr(mmap, wish, None)) is not None:
            with contextlib.suppress(OSError):  # a kernel without it
                memory.madvise(advice)
    return memory
