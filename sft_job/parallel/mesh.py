"""How the ranks are laid out: data-parallel groups of Ulysses ranks, and one FSDP mesh over all of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class Layout:
    """One rank's place. Ranks of a Ulysses group are neighbours: ``rank = dp_rank * ulysses_size + ulysses_rank``.

    Attributes:
        dp_size: data-parallel groups; each works on rows of its own.
        dp_rank: this rank's data-parallel group.
        ulysses_size: ranks that share the sequences of a data-parallel group.
        ulysses_rank: this rank's part of each sequence.
    """

    dp_size: int
    dp_rank: int
    ulysses_size: int
    ulysses_rank: int

    @property
    def world(self) -> int:
        """Ranks of the run."""
        return self.dp_size * self.ulysses_size

    @classmethod
    def of(cls, rank: int, world: int, ulysses_size: int) -> Layout:
        """Raises ValueError where the Ulysses size does not divide the number of ranks."""
        if world % ulysses_size:
            raise ValueError(f"ulysses size {ulysses_size} does not divide {world} ranks")
        return cls(world // ulysses_size, rank // ulysses_size, ulysses_size, rank % ulysses_size)


@dataclass(frozen=True)
class Mesh:
    """The process groups of a run.

    Attributes:
        layout: this rank's place.
        fsdp: all ranks, data x ulysses joined: one axis (dp_shard) that parameters are sharded over, or two
            (dp_replicate, dp_shard) for HSDP. Gradients are summed over all of it.
        ulysses: the group that shares this rank's sequences; None where it has one rank.
    """

    layout: Layout
    fsdp: DeviceMesh
    ulysses: dist.ProcessGroup | None

    @property
    def shard_group(self) -> dist.ProcessGroup:
        """The ranks that together hold one copy of the parameters."""
        return self.fsdp.get_group("dp_shard")


def build_mesh(device_type: str, ulysses_size: int, fsdp_size: int = -1) -> Mesh:
    """Build the meshes over the initialised default process group (a collective call).

    Args:
        device_type: cpu or cuda.
        ulysses_size: ranks that share a sequence; divides the world.
        fsdp_size: ranks that share one copy of the parameters; divides the world; -1 = all of them.
    """
    world = dist.get_world_size()
    layout = Layout.of(dist.get_rank(), world, ulysses_size)
    if fsdp_size in (-1, world):
        fsdp = init_device_mesh(device_type, (world,), mesh_dim_names=("dp_shard",))
    else:
        copies = (world // fsdp_size, fsdp_size)
        fsdp = init_device_mesh(device_type, copies, mesh_dim_names=("dp_replicate", "dp_shard"))
    if ulysses_size == 1:
        return Mesh(layout, fsdp, None)
    grid = init_device_mesh(device_type, (layout.dp_size, ulysses_size), mesh_dim_names=("dp", "ulysses"))
    return Mesh(layout, fsdp, grid.get_group("ulysses"))
