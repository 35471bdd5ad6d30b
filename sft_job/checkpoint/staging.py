"""A copy of the state in host memory, so that training goes on while the copy is written.

On a GPU the copies run on a stream of their own into page-locked memory that is kept for the next save; the next
optimizer step waits, on the device, until they are done. Memory is locked on a thread before the first save needs it.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from sft_job.pages import own_pages

_Kind = tuple[Any, ...]
_LOCK_FROM = 1 << 20
"""Bytes; a smaller copy is quick enough without page-locked memory."""


def local_bytes(tree: Any) -> int:
    """Bytes of this rank's tensors in a state dict."""
    return sum(_local(tensor).nbytes for tensor in tensors_of(tree))


def global_bytes(tree: Any) -> int:
    """Bytes of all ranks' tensors in a state dict, replicas counted once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(tree))


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors of nested dicts and lists."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, Mapping):
        return [tensor for value in cast("Mapping[Any, Any]", tree).values() for tensor in tensors_of(value)]
    if isinstance(tree, (list, tuple)):
        return [tensor for value in cast("list[Any]", tree) for tensor in tensors_of(value)]
    return []


class Staging:
    """Copies states to host memory.

    Args:
        device: of this rank.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: defaultdict[_Kind, list[Tensor]] = defaultdict(list)
        self._lent: list[Tensor] = []
        self._sources: Any = None
        self._locked: list[int] = []  # where page-locked memory starts
        self._cudart: Any = torch.cuda.cudart() if device.type == "cuda" else None
        self._reserving: threading.Thread | None = None
        self._gave_up = threading.Event()
        self._copied: torch.cuda.Event | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def reserve(self, tensors: Iterable[Tensor]) -> None:
        """Make room for one copy of each of these tensors, on a thread; on the CPU memory is taken when needed."""
        wanted = [tensor for tensor in tensors if tensor.is_cuda]
        if not wanted:
            return
        self._reserving = threading.Thread(target=self._reserve, args=(wanted,), name="save-memory", daemon=True)
        self._reserving.start()

    def _reserve(self, tensors: list[Tensor]) -> None:
        torch.cuda.set_device(self._device)
        for tensor in tensors:
            if self._gave_up.is_set():
                return
            try:
                host = host_twin(tensor)
            except (OSError, MemoryError, RuntimeError):
                return  # the save that needs it meets this again, and deals with it
            local = _local(host)
            # What the system will not lock (a limit) serves all the same, only slower. CUDA keeps an error for its
            # thread's next call, so this is done on no other thread than this one.
            if (
                local.nbytes >= _LOCK_FROM
                and int(self._cudart.cudaHostRegister(local.data_ptr(), local.nbytes, 0)) == 0
            ):
                self._locked.append(local.data_ptr())
            self._free[_kind(tensor)].append(host)

    @property
    def ready(self) -> bool:
        """No memory is being made any more."""
        return self._reserving is None or not self._reserving.is_alive()

    @torch.no_grad()
    def stage(self, tree: Any) -> Any:
        """The same tree in host memory. On a GPU it is filled only once ``wait`` returns."""
        if self._reserving is not None:
            self._reserving.join()  # before the first save only
            self._reserving = None
        if self._stream is None:
            return self._copy(tree)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        self._sources = tree  # not to be freed before they are read
        with torch.cuda.stream(self._stream):
            staged = self._copy(tree)
        self._copied = torch.cuda.Event()
        self._copied.record(self._stream)
        return staged

    def _copy(self, tree: Any) -> Any:
        if isinstance(tree, Tensor):
            return self._copy_tensor(tree)
        if isinstance(tree, Mapping):
            return {name: self._copy(value) for name, value in cast("Mapping[Any, Any]", tree).items()}
        if isinstance(tree, (list, tuple)):
            return type(tree)(self._copy(value) for value in cast("list[Any]", tree))
        return tree

    def _copy_tensor(self, tensor: Tensor) -> Tensor:
        if not tensor.is_cuda:
            return tensor.detach().clone()
        free = self._free[_kind(tensor)]
        host = free.pop() if free else host_twin(tensor)
        self._lent.append(host)
        _local(host).copy_(_local(tensor), non_blocking=True)
        return host

    def guard(self, optimizer: torch.optim.Optimizer) -> None:
        """Let each of its steps wait, on the device, for the copies that were begun before it."""

        def wait_on_device(*_: Any) -> None:
            if self._copied is not None:
                torch.cuda.current_stream(self._device).wait_event(self._copied)

        optimizer.register_step_pre_hook(wait_on_device)

    def wait(self) -> None:
        """Wait for the copies (on any thread)."""
        if self._copied is not None:
            self._copied.synchronize()

    def release(self) -> None:
        """The last copy is no longer needed: its memory serves the next one."""
        self.wait()
        for host in self._lent:
            self._free[_kind(host)].append(host)
        self._lent = []
        self._sources = None

    def close(self) -> None:
        """Give all memory back; nothing is staged any more."""
        self._gave_up.set()
        if self._reserving is not None:
            self._reserving.join()
        self.drop()

    def drop(self) -> None:
        """Give all memory back, also that of a copy that failed half-way."""
        if self._stream is not None:
            self._stream.synchronize()
        self._lent = []
        self._sources = None
        for start in self._locked:
            self._cudart.cudaHostUnregister(start)
        self._locked = []
        self._free.clear()


@torch.no_grad()
def host_twin(tensor: Tensor) -> Tensor:
    """Host memory of a tensor's shape, dtype and sharding.

    A large one begins at a page and shares none, so that it can be page-locked exactly as large as it is; torch's own
    page-locked memory is rounded up to a power of two.
    """
    host = torch.empty_like(tensor.detach(), device="cpu")
    local = _local(host)
    if local.nbytes < _LOCK_FROM:
        return host
    memory = torch.frombuffer(own_pages(local.nbytes), dtype=torch.uint8)
    local.set_(memory.untyped_storage(), 0, local.shape, local.stride())
    if _local(host).data_ptr() != memory.data_ptr():
        raise AssertionError("a DTensor's to_local() gave a copy of its shard")
    return host


def _kind(tensor: Tensor) -> _Kind:
    local = _local(tensor)
    place = (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else ()
    return (tensor.shape, tensor.dtype, local.shape, local.stride(), place)


def _local(tensor: Tensor) -> Tensor:
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
