"""Blocks' inputs in host memory between a block's forward and its backward, moved beside the computation.

What is moved is the one tensor that a wholly recomputed block keeps; each rank moves its own tokens. What is left on
the device then is counted in ``docs/long-documents.md``, which also says why ``model.tiled`` belongs to it.

Streams. A copy to the host starts when its block's forward starts, and reads a tensor that the computing stream has
been told to make before; the tensor is held here until the computing stream was told to wait for the copy, which is at
the next block's forward. So no memory is given back while it is read, and at most two inputs are on the device. A copy
back writes memory that the allocator has for the computing stream, so it comes behind all that this stream was given
so far; it starts a block before its input is needed, and the computing stream waits for it before it reads, or gives
the memory up. Hence a page of host memory comes back to the pool only when the computing stream is behind the copy that
read it, and as copies to the host are behind the computing stream, none writes a page that is still read. The CPU
waits where pages are made and locked, which is in the first step or before it, and in ``clear``; in no other step.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from sft_job.contract import ExitCode
from sft_job.errors import JobError
from sft_job.model.recompute import BlockForward
from sft_job.pages import own_pages

PAGE_BYTES = 2**25
"""Host memory is taken in pieces of this size, which serve inputs of any length, one after the other."""


def host_bytes(input_bytes: int, page: int = PAGE_BYTES) -> int:
    """Host memory that an input takes."""
    return -(-input_bytes // page) * page


class Mark(Protocol):
    """The end of a copy."""

    def wait(self) -> None:
        """Let what the computing stream is given from now on come after the copy."""
        ...


class Lane(Protocol):
    """Copies in one direction, one after the other."""

    def run(self, copy: Callable[[], None]) -> Mark:
        """Copy behind all that the computing stream was given so far."""
        ...


class AtOnce:
    """A lane, and a mark, of a device whose copies are over when they are asked for."""

    def run(self, copy: Callable[[], None]) -> Mark:
        """Copy now."""
        copy()
        return self

    def wait(self) -> None:
        """It is over."""


@dataclass(frozen=True)
class _CudaMark:
    event: torch.cuda.Event
    computing: torch.cuda.Stream

    def wait(self) -> None:
        self.computing.wait_event(self.event)


class CudaLane:
    """A stream of its own.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def run(self, copy: Callable[[], None]) -> Mark:
        """Copy on the stream."""
        computing = torch.cuda.current_stream(self._device)  # asked for here: inside ``with`` it is the lane's own
        self._stream.wait_stream(computing)
        with torch.cuda.stream(self._stream):
            copy()
        event = torch.cuda.Event()
        event.record(self._stream)
        return _CudaMark(event, computing)


class Locks(Protocol):
    """What ``torch.cuda.cudart()`` offers; 0 = done."""

    def cudaHostRegister(self, start: int, size: int, flags: int, /) -> Any:
        """Lock memory."""
        ...

    def cudaHostUnregister(self, start: int, /) -> Any:
        """Let the system move it again."""
        ...


class HostPages:
    """Host memory that is taken once and used again and again.

    Args:
        locks: locks it, so that a GPU reads and writes it without the CPU; None = it stays as it is. Not torch's own
            page-locked memory, which is rounded up to powers of two and is never given back to the system.
        size: bytes of a page.
    """

    def __init__(self, locks: Locks | None, size: int = PAGE_BYTES) -> None:
        self._locks = locks
        self.size = size
        """Bytes of a page."""
        self._free: list[Tensor] = []
        self._made = 0
        self._locked: dict[int, Tensor] = {}
        if locks is not None:
            # Memory that is unmapped while it is locked could not be locked when its addresses come again.
            weakref.finalize(self, _unlock, locks, self._locked).atexit = False

    @property
    def held(self) -> int:
        """Bytes taken from the host, used or not."""
        return self._made * self.size

    @property
    def in_use(self) -> int:
        """Bytes of pages that hold something."""
        return self.held - len(self._free) * self.size

    def take(self, count: int) -> list[Tensor]:
        """Pages, used ones first.

        Raises:
            JobError: the host has no memory left, or will not lock it (88).
        """
        while len(self._free) < count:
            self._free.append(self._make())
            self._made += 1
        return [self._free.pop() for _ in range(count)]

    def _make(self) -> Tensor:
        try:
            page = torch.frombuffer(own_pages(self.size), dtype=torch.uint8)
            error = 0 if self._locks is None else int(self._locks.cudaHostRegister(page.data_ptr(), self.size, 0))
            why = f"CUDA error {error}" if error else ""
            if self._locks is not None and not error:
                self._locked[page.data_ptr()] = page
        except (OSError, MemoryError, OverflowError) as failure:
            why = str(failure) or "MemoryError"
        if not why:
            return page
        raise JobError(
            ExitCode.OUT_OF_MEMORY,
            f"model.recompute=offload: the host gave {self.held / 2**30:.1f} GiB of page-locked memory to this rank "
            f"and no more: {why}\n    fix: more host memory (or a higher limit of the container or of locked memory), "
            "trainer.async_save=false, or a higher ulysses_sequence_parallel_size",
        )

    def reserve(self, count: int) -> int:
        """Make pages in advance, so that none is lacking in the middle of a step.

        Returns:
            How many there are now that hold nothing: fewer where the host has no more, or will not lock it.
        """
        while len(self._free) < count:
            try:
                self._free.append(self._make())
            except JobError:
                break
            self._made += 1
        return len(self._free)

    def give_back(self, pages: list[Tensor]) -> None:
        """Pages that hold nothing any more."""
        self._free.extend(pages)

    def clear(self, keep: int = 0) -> None:
        """Give back to the system what is not in use, but for so many pages; no copy may be under way."""
        surplus = self._free[keep:]
        if self._locks is not None:
            places = [page.data_ptr() for page in surplus]
            _unlock(self._locks, {place: self._locked.pop(place) for place in places})
        self._made -= len(surplus)
        del self._free[keep:]


def _unlock(locks: Locks, pages: dict[int, Tensor]) -> None:
    for place in pages:
        locks.cudaHostUnregister(place)
    pages.clear()


@dataclass
class _Slot:
    """Where an input is: in pages, and for a while on the device as well."""

    pages: list[Tensor]
    loaded: Tensor | None = None
    read: Mark | None = None


@dataclass(eq=False)
class _Held:
    """What the graph holds in a block input's place; it gives the pages back when the graph lets go of it."""

    slot: _Slot | None
    kept: Tensor | None
    shape: torch.Size
    dtype: torch.dtype
    below: Callable[[], _Held | None]
    """That of the block before, whose backward comes next."""


class InputStore:
    """Moves blocks' inputs out and back.

    Args:
        device: on which blocks compute.
        pages: host memory.
        out: copies to the host.
        back: copies to the device.
    """

    def __init__(
        self, device: torch.device, pages: HostPages | None = None, out: Lane | None = None, back: Lane | None = None
    ) -> None:
        cuda = device.type == "cuda"
        self._device = device
        self.pages = pages if pages is not None else HostPages(torch.cuda.cudart() if cuda else None)
        """Host memory, empty until the first block's forward."""
        self._out = out if out is not None else CudaLane(device) if cuda else AtOnce()
        self._back = back if back is not None else CudaLane(device) if cuda else AtOnce()
        self._leaving: list[tuple[Tensor, Mark]] = []
        self._top: Callable[[], _Held | None] = lambda: None
        self.sent = 0
        """Inputs that went to host memory since ``count_anew``."""
        self.stayed = 0
        """Inputs that should have gone and could not: no first argument, or not in one piece."""

    def count_anew(self) -> None:
        """Forget how many inputs went out."""
        self.sent = self.stayed = 0

    def reserve(self, inputs: int, input_bytes: int) -> int:
        """Make room for so many inputs in advance.

        Returns:
            For how many there is room: fewer where the host has no more, or will not lock it.
        """
        pages = -(-input_bytes // self.pages.size)
        found = min(inputs, self.pages.reserve(inputs * pages) // pages) if pages else inputs
        if found < inputs and self._device.type == "cuda":
            # CUDA keeps the refusal and would raise it at the next kernel, which may as well be this one.
            with contextlib.suppress(RuntimeError):
                torch.empty(1, device=self._device).fill_(0.0)
        return found

    def keep(self, inputs: int, input_bytes: int) -> None:
        """Let go of what was reserved for more inputs than these; no copy may be under way."""
        self.pages.clear(inputs * -(-input_bytes // self.pages.size))

    def around(self, forward: BlockForward, *, moves: bool) -> BlockForward:
        """A block's forward whose input waits in host memory.

        Args:
            forward: keeps its first argument and nothing else, as ``torch.utils.checkpoint`` without reentrance does.
            moves: False leaves the input where it is; its backward then only calls for the one before it.
        """

        def run(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(block, *args, **kwargs)
            if not args or not isinstance(args[0], Tensor):
                self.stayed += moves
                return forward(block, *args, **kwargs)
            # Its place and not the tensor: the graph holds on to ``pack``.
            place, shape = args[0].data_ptr(), args[0].shape

            def pack(saved: Tensor) -> Tensor | _Held:
                same = saved.data_ptr() == place and saved.shape == shape
                return self._hold(saved.detach(), moves=moves) if same and saved.is_contiguous() else saved

            before = self.sent
            with saved_tensors_hooks(pack, self._unpack):
                out = forward(block, *args, **kwargs)
            self.stayed += moves and self.sent == before
            return out

        return run

    def _hold(self, hidden: Tensor, *, moves: bool) -> _Held:
        self._settle()
        held = _Held(None, None if moves else hidden, hidden.shape, hidden.dtype, self._top)
        if moves:
            held.slot = self._send(hidden)
            weakref.finalize(held, self._let_go, held.slot).atexit = False
        self._top = weakref.ref(held)
        return held

    def _send(self, hidden: Tensor) -> _Slot:
        flat = hidden.reshape(-1).view(torch.uint8)
        pages = self.pages.take(-(-flat.numel() // self.pages.size))

        def copy() -> None:
            for piece, page in zip(flat.split(self.pages.size), pages, strict=True):
                page[: piece.numel()].copy_(piece, non_blocking=True)

        self._leaving.append((hidden, self._out.run(copy)))
        self.sent += 1
        return _Slot(pages)

    def _settle(self) -> None:
        """Let go of tensors whose copies were begun a block ago."""
        for _, sent in self._leaving:
            sent.wait()
        self._leaving.clear()

    def _load(self, held: _Held) -> None:
        slot = held.slot
        if slot is None or slot.loaded is not None:
            return
        target = torch.empty(held.shape, dtype=held.dtype, device=self._device)
        flat = target.view(-1).view(torch.uint8)

        def copy() -> None:
            for piece, page in zip(flat.split(self.pages.size), slot.pages, strict=True):
                piece.copy_(page[: piece.numel()], non_blocking=True)

        slot.read = self._back.run(copy)
        slot.loaded = target

    def _unpack(self, packed: Tensor | _Held) -> Tensor:
        """In a block's backward: its input, and the call for that of the block whose backward is next."""
        if isinstance(packed, Tensor):
            return packed
        self._settle()
        hidden = packed.kept
        if packed.slot is not None:
            self._load(packed)
            hidden, packed.slot.loaded = packed.slot.loaded, None
            assert packed.slot.read is not None
            packed.slot.read.wait()
        below = packed.below()
        if below is not None:
            self._load(below)
        assert hidden is not None
        return hidden

    def _let_go(self, slot: _Slot) -> None:
        """The graph is done with an input, or was given up in the middle of a step."""
        if slot.loaded is not None and slot.read is not None:
            slot.read.wait()  # or its memory would be given to others while the copy still writes it
            slot.loaded = None
        self.pages.give_back(slot.pages)

    def clear(self) -> None:
        """Let go of all that no graph holds: where another plan was chosen, and at the end. Waits for the device."""
        self._settle()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.pages.clear()
