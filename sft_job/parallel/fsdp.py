"""FSDP2: which modules form a group, in which precision they compute and reduce."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Sharding:
    """How modules become FSDP groups.

    Attributes:
        mesh: one axis (shard), or two (replicate, shard).
        param_dtype: dtype of the gathered weights and of the computation.
        reduce_dtype: dtype in which gradients are summed over the ranks.
        reshard: free gathered weights after the forward; None = torch's choice (not for the root).
        offload: shards, gradients and optimizer states live in host memory.
        accumulates: a step may have several micro-batches, whose gradients are added up in ``reduce_dtype``.
        whole_frozen: every rank holds frozen weights whole, so that nothing is gathered for them.
    """

    mesh: DeviceMesh
    param_dtype: torch.dtype
    reduce_dtype: torch.dtype
    reshard: bool | None = True
    offload: bool = False
    accumulates: bool = True
    whole_frozen: bool = False

    def as_root(self) -> Sharding:
        """The same for the root module."""
        return replace(self, reshard=None)

    def leaves_whole(self, parameter: nn.Parameter) -> bool:
        """Whether FSDP would only cost something: it copies weights and gradients, also where there is one rank.

        One rank needs it to compute in another dtype than it stores, and to add gradients up in a wider one.
        """
        if self.offload or parameter.dtype != self.param_dtype:
            return False
        if not parameter.requires_grad:
            return self.whole_frozen or self.mesh.size() == 1
        return self.mesh.size() == 1 and not self.accumulates


def shard_module(module: nn.Module, sharding: Sharding) -> None:
    """Make a module one FSDP group; parameters of modules that are groups already are left alone.

    Args:
        module: its parameters may be real (then equal on all ranks) or on the meta device.
        sharding: how.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=sharding.param_dtype, reduce_dtype=sharding.reduce_dtype, cast_forward_inputs=False
    )
    # Pinned memory exists only where there is an accelerator.
    offload = CPUOffloadPolicy(pin_memory=sharding.mesh.device_type == "cuda") if sharding.offload else OffloadPolicy()
    fully_shard(
        module,
        mesh=sharding.mesh,
        mp_policy=policy,
        reshard_after_forward=sharding.reshard,
        offload_policy=offload,
        ignored_params={parameter for parameter in module.parameters() if sharding.leaves_whole(parameter)},
    )


def sum_gradients(modules: Iterable[nn.Module], sharding: Sharding) -> None:
    """Let every FSDP group sum gradients over the ranks: the loss is divided by the global token count already."""
    if sharding.mesh.size() == 1:
        return  # nothing is averaged there, and a factor of 1 would cost a pass over all gradients
    for module in modules:
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # A plain sum: scaling inside the collective (PREMUL_SUM) is NCCL's alone.
            module.set_force_sum_reduction_for_comms(True)


def can_reset(root: nn.Module) -> bool:
    """Whether this torch can reset FSDP after a step that broke off: 2.13 and later."""
    return hasattr(root, "reset_iter_state")


def forget_broken_step(root: nn.Module) -> bool:
    """Make FSDP ready for a forward after one, or its backward, broke off with an error; gradients are not touched.

    Without it the next backward would go on where that one stood, and some gradients would never be reduced.

    What FSDP leaves whole is no DTensor; where that is everything, its hooks have nothing to gather or to reduce,
    whatever they remember.

    Returns:
        False where it cannot be done: an older torch, and parameters that FSDP holds.
    """
    reset = getattr(root, "reset_iter_state", None)  # torch 2.13 and later
    if reset is not None:
        reset()
        return True
    return not any(isinstance(parameter, DTensor) for parameter in root.parameters())


def tied_once(module: nn.Module, preferred: set[str]) -> dict[str, torch.Tensor]:
    """A module's state with every tied parameter under one name, one of ``preferred`` where there is one."""
    names: dict[int, str] = {}
    state = module.state_dict(keep_vars=True)
    for name, tensor in state.items():
        known = names.get(id(tensor))
        if known is None or (known not in preferred and name in preferred):
            names[id(tensor)] = name
    return {name: state[name].detach() for name in names.values()}
