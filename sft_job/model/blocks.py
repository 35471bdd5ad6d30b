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
from sft_job.model.offload import InputStore
from sft_job.model.recompute import BlockForward, Recompute, draws_random_numbers, own_code, recomputing
from sft_job.model.tiled import TILE_ELEMENTS, dense_mlp, tile_tokens, tiled, widest

INDUCTOR = "inductor"


class Blocks:
    """The decoder blocks of a model.

    Args:
        blocks: not sharded yet.
        backend: of their attention.
        compiled: run them through torch.compile.
        compiler: torch.compile's backend.
        store: where inputs wait in a plan with ``offload``; None = there is no such plan.
        tile_elements: of the widest tensor in a piece of an MLP, in such a plan.
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        backend: Backend,
        *,
        compiled: bool,
        compiler: str = INDUCTOR,
        store: InputStore | None = None,
        tile_elements: int = TILE_ELEMENTS,
    ) -> None:
        self._blocks = list(blocks)
        self.store = store
        """Where inputs wait in a plan with ``offload``."""
        self._mlps = [dense_mlp(block) for block in self._blocks]
        self._mlp_classes: list[Any] = [type(mlp) for mlp in self._mlps]
        self._tiles = [0 if mlp is None else tile_tokens(mlp, tile_elements) for mlp in self._mlps]
        self._widths = [0 if mlp is None else widest(mlp) for mlp in self._mlps]
        self._tiled: dict[tuple[type[nn.Module], int], type[nn.Module]] = {}
        # torch.compile counts compilations by code object, up to a limit: kinds of layers must not share one.
        kinds = [(type(block), _windows(block)) for block in self._blocks]
        forwards = {
            kind: own_code(kind[0].forward, f"forward_{index}") for index, kind in enumerate(dict.fromkeys(kinds))
        }
        self._plain: list[BlockForward] = [forwards[kind] for kind in kinds]
        self._ops = backend.saved
        self._rng = any(draws_random_numbers(block) for block in self._blocks)
        self._compiled = compiled
        self._compiler = compiler
        # Compilation sees through recomputation only where it sees all of the block.
        self._recompute_inside = compiled and backend.traced
        self._forwards: dict[tuple[BlockForward, Recompute, bool], BlockForward] = {}
        self.plan: tuple[Recompute, ...] = ()
        """What each block computes again."""

    def set_plan(self, plan: Sequence[Recompute]) -> None:
        """Say what each block computes again, from the next forward on."""
        self.plan = tuple(plan)
        if self.store is not None:
            self.store.count_anew()
        moved = Recompute.OFFLOAD in self.plan
        for block, plain, recompute in zip(self._blocks, self._plain, plan, strict=True):
            key = (plain, recompute, moved)
            if key not in self._forwards:
                self._forwards[key] = self._make_stored(plain, recompute) if moved else self._make(plain, recompute)
            block.forward = partial(self._forwards[key], block)
        self._tile(on=moved)

    @property
    def can_offload(self) -> bool:
        """Whether a plan may send inputs to host memory: there is a store, and a block whose input can be away."""
        return self.store is not None and len(self._blocks) > 1

    def spared(self, tokens: int, input_bytes: int, element_bytes: int) -> int:
        """Device memory that full recomputation needs above a plan with ``offload``, by counting; it may be less.

        Inputs and the MLP's tensors, which need not be there at the same time: ``plan.guess.spared`` knows better.

        Args:
            tokens: of this rank.
            input_bytes: of a block's input.
            element_bytes: of a number.
        """
        inputs = (len(self._blocks) - 1) * input_bytes
        # A piece against the whole: gate, up, their product, the activation, and gradients of three of them.
        wide = [max(0, tokens - tile) * wide for tile, wide in zip(self._tiles, self._widths, strict=True)]
        return inputs + 7 * max(wide) * element_bytes

    def _tile(self, *, on: bool) -> None:
        """Let MLPs work in pieces, or as they are.

        By their class, so that parameters keep their names and torch.compile sees that all blocks are alike: what hangs
        on a module makes it compile for each one anew.
        """
        for mlp, kind, tokens in zip(self._mlps, self._mlp_classes, self._tiles, strict=True):
            if mlp is None:
                continue
            key = (kind, tokens)
            if on and key not in self._tiled:
                piecewise = maybe_compiled(kind.forward, self._compiled, self._compiler)
                forward = tiled(kind.forward, piecewise, tokens)
                self._tiled[key] = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
            mlp.__class__ = self._tiled[key] if on else kind

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

    def _make_stored(self, plain: BlockForward, recompute: Recompute) -> BlockForward:
        """In a plan with ``offload``: recomputation outside of what is compiled, because inputs are moved between."""
        assert self.store is not None
        compiled = maybe_compiled(plain, self._compiled, self._compiler)
        kind = Recompute.FULL if recompute is Recompute.OFFLOAD else recompute
        forward = recomputing(compiled, kind, self._ops, self._rng)
        return self.store.around(forward, moves=recompute is Recompute.OFFLOAD)


def _windows(block: nn.Module) -> tuple[str, ...]:
    """What layers of one class can differ by: how far their attention looks back."""
    return tuple(
        str(getattr(part, "sliding_window", None)) for part in block.modules() if hasattr(part, "sliding_window")
    )


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
    if config.recompute == Recompute.OFFLOAD:
        return offload_plan(blocks, blocks - 1)
    if config.recompute != "auto":
        return [Recompute(config.recompute)] * blocks
    return [Recompute.FULL if config.enable_gradient_checkpointing else Recompute.NONE] * blocks


def offload_plan(blocks: int, moved: int) -> list[Recompute]:
    """Inputs of the first blocks in host memory; that of the last one is needed as soon as it could be away."""
    return [Recompute.OFFLOAD] * moved + [Recompute.FULL] * (blocks - moved)
