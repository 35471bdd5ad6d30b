"""How gradients are added up over a step's micro-batches: whole on every rank, or in this rank's shard alone.

Whole, only the last micro-batch is reduced over the ranks, and until then every rank keeps a gradient of every
parameter in the dtype of the reduction. In the shard alone, every micro-batch is reduced.

FSDP2 adds reduced shards up in the parameters' dtype. For bf16 that would lose what small micro-batches bring, so such
shards are taken away as soon as they are there, and added up in fp32 here. With several copies of the parameters (HSDP)
there is no need: FSDP2 keeps a sum in the reduction's dtype itself until the copies' sums are added, once a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from sft_job.config.schema import FsdpConfig
from sft_job.config.shares import sums_shards

_GIB = 2**30


class Accumulation:
    """Adds gradients up; after a step's last micro-batch the parameters' ``grad`` holds the sums, and nothing else.

    Every trained parameter gets a gradient either on all ranks or on none of them in a micro-batch; with several copies
    also the same ones in all micro-batches of a step, as FSDP2's own sum knows no parameters.

    Args:
        root: the root module, sharded.
        shard_alone: in this rank's shard alone.
        copies: the parameters are held in several copies, each over some of the ranks.
        offloaded: shards and gradients live in host memory.
    """

    def __init__(
        self, root: nn.Module, *, shard_alone: bool = False, copies: bool = False, offloaded: bool = False
    ) -> None:
        assert isinstance(root, FSDPModule)
        self._root = root
        self.shard_alone = shard_alone
        """Every micro-batch is reduced, and no rank keeps gradients of all parameters."""
        self._last = True
        self._sums: dict[nn.Parameter, Tensor] = {}
        mine = shard_alone and not copies
        self._narrow = [p for p in root.parameters() if p.requires_grad and mine and _sum_dtype(p.dtype) != p.dtype]
        # In torch 2.11 a shard's copy to host memory may still be on its way when hooks are called, not after the
        # backward. On the device hooks need less: shards of one block at a time.
        self._after_backward = offloaded
        if not offloaded:
            for parameter in self._narrow:
                parameter.register_post_accumulate_grad_hook(self._take)

    @contextmanager
    def micro_batch(self, *, last: bool, reshard: bool) -> Iterator[None]:
        """Around a micro-batch's forward and backward.

        Args:
            last: it is the step's last one.
            reshard: free gathered weights after its backward, or keep them for the next micro-batch.
        """
        self._last = last
        self._root.set_requires_gradient_sync(last or self.shard_alone)
        self._root.set_requires_all_reduce(last)
        self._root.set_reshard_after_backward(reshard)
        yield
        if self._after_backward:
            for parameter in self._narrow:
                if parameter.grad is not None:
                    self._take(parameter)
        if last:
            self._leave_rest()

    @torch.no_grad()
    def _take(self, parameter: Tensor) -> None:
        """Move a reduced gradient into its sum; that of the last micro-batch stays, with the sum of all in it."""
        assert isinstance(parameter, nn.Parameter)
        assert parameter.grad is not None
        shard = _local(parameter.grad)
        total = self._sums.get(parameter)
        if total is not None:
            total.add_(shard)
        if not self._last:
            self._sums[parameter] = shard.to(_sum_dtype(shard.dtype)) if total is None else total
            parameter.grad = None
        elif total is not None:
            shard.copy_(total)
            del self._sums[parameter]

    @torch.no_grad()
    def _leave_rest(self) -> None:
        """Parameters that the last micro-batch gave no gradient."""
        while self._sums:
            parameter, total = self._sums.popitem()
            parameter.grad = torch.empty_like(parameter)
            _local(parameter.grad).copy_(total)

    def forget(self) -> None:
        """Drop the sums of a step that broke off."""
        self._sums.clear()

    @property
    def sums(self) -> list[Tensor]:
        """What waits for the step's next micro-batch besides the parameters' ``grad``: this rank's shards."""
        return list(self._sums.values())


def build_accumulation(
    root: nn.Module, config: FsdpConfig, mesh: DeviceMesh, reduce: torch.dtype, device: torch.device
) -> tuple[Accumulation, str]:
    """How a run adds gradients up, by its settings and the GPU's memory.

    Args:
        root: the root module, sharded.
        config: the settings of sharding.
        mesh: that of ``Sharding``.
        reduce: dtype in which gradients are summed over the ranks.
        device: of this rank.

    Returns:
        It, and a line for the log for runs whose steps have several micro-batches; empty where there is one shard.
    """
    shards = mesh.size(mesh.ndim - 1)
    memory = float(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else None
    size = reduce.itemsize * sum(parameter.numel() for parameter in root.parameters() if parameter.requires_grad)
    alone = sums_shards(config.shard_accumulated, size, memory, shards)
    found = Accumulation(
        root,
        shard_alone=alone,
        copies=mesh.size() > shards,
        offloaded=config.cpu_offload or config.offload_params,
    )
    if shards == 1:
        return found, ""
    whole = f"{size / _GIB:.1f}{'' if memory is None else f' of {memory / _GIB:.1f}'} GiB"
    if alone:
        return found, f"gradients of micro-batches add up in each rank's shard, reduced every time (whole: {whole})"
    return found, f"gradients of micro-batches add up whole on every rank, {whole}, reduced once a step"


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
