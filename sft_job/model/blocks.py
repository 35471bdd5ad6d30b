"""How decoder blocks run: compiled or not, keeping much or little for the backward.

A block's ``forward`` is replaced on the block itself, so that FSDP's hooks stay outside, around it: a block's weights
are gathered once for its recomputation and its backward, and torch.compile sees no collective of FSDP's.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from sft_job.config.schema import ModelConfig
from sft_job.model.attention.call import Backend
from sft_job.model.recompute import BlockForward, Recompute, draws_random_numbers, recomputing

INDUCTOR = "inductor"


class Blocks:
    """The decoder blocks of a model.

    Args:
        blocks: not sharded yet.
        backend: of their attention.
        compiled: run them through torch.compile.
        compiler: torch.compile's backend.
    """

    def __init__(
        self, blocks: Iterable[nn.Module], backend: Backend, *, compiled: bool, compiler: str = INDUCTOR
    ) -> None:
        self._blocks = list(blocks)
        self._plain: list[BlockForward] = [type(block).forward for block in self._blocks]
        self._ops = backend.saved
        self._rng = any(draws_random_numbers(block) for block in self._blocks)
        self._compiled = compiled
        self._compiler = compiler
        # Compilation sees through recomputation only where it sees all of the block.
        self._recompute_inside = compiled and backend.traced
        self._forwards: dict[tuple[BlockForward, Recompute], BlockForward] = {}
        self.plan: tuple[Recompute, ...] = ()
        """What each block computes again."""

    def set_plan(self, plan: Sequence[Recompute]) -> None:
        """Say what each block computes again, from the next forward on."""
        self.plan = tuple(plan)
        for block, plain, recompute in zip(self._blocks, self._plain, plan, strict=True):
            key = (plain, recompute)
            if key not in self._forwards:
                self._forwards[key] = self._make(plain, recompute)
            block.forward = partial(self._forwards[key], block)

    @contextmanager
    def watched(self, allocated: Callable[[], int]) -> Generator[list[int]]:
        """Collects what each block's forward leaves in device memory, in bytes, block by block.

        Measured inside FSDP's hooks, so without the weights that these gather.

        Args:
            allocated: bytes that tensors take now.
        """
        kept: list[int] = []

        def watching(forward: BlockForward, *args: Any, **kwargs: Any) -> Any:
            before = allocated()
            out = forward(*args, **kwargs)
            kept.append(allocated() - before)
            return out

        for block in self._blocks:
            block.forward = partial(watching, block.forward)
        try:
            yield kept
        finally:
            self.set_plan(self.plan)

    def _make(self, plain: BlockForward, recompute: Recompute) -> BlockForward:
        """One forward for all blocks of a class: a block is its first argument, so they share what is compiled."""
        if not self._compiled:
            return recomputing(plain, recompute, self._ops, self._rng)
        if self._recompute_inside:
            return maybe_compiled(recomputing(plain, recompute, self._ops, self._rng), compiler=self._compiler)
        return recomputing(maybe_compiled(plain, compiler=self._compiler), recompute, self._ops, self._rng)


def maybe_compiled(function: Any, compiled: bool = True, compiler: str = INDUCTOR) -> Any:
    """A function's compiled form.

    Shapes are static at first, which is fastest; the second number of tokens that comes makes it symbolic for good.
    """
    return torch.compile(function, backend=compiler) if compiled else function


def compiles(config: ModelConfig, device: torch.device) -> bool:
    """Whether blocks are compiled: where ``model.compile`` is auto, on a GPU."""
    return device.type == "cuda" if config.compile == "auto" else bool(config.compile)


def first_plan(config: ModelConfig, blocks: int) -> list[Recompute]:
    """What each block computes again before memory has been looked at: the most that the config allows."""
    if config.recompute != "auto":
        return [Recompute(config.recompute)] * blocks
    return [Recompute.FULL if config.enable_gradient_checkpointing else Recompute.NONE] * blocks
