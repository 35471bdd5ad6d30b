"""Recomputation: what a decoder block keeps for its backward, and what it computes again."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from functools import partial
from types import FunctionType
from typing import Any

from torch import nn
from torch._ops import OpOverload
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

BlockForward = Callable[..., Any]
"""(block, *args, **kwargs) -> the block's output."""


class Recompute(StrEnum):
    """What is computed again in a block's backward."""

    NONE = "none"
    ATTENTION = "attention"
    """All but attention: its output and log-sum-exps are kept, which costs as much memory as the block's input."""
    FULL = "full"
    OFFLOAD = "offload"
    """Everything, and the block's input waits in host memory."""


def recomputing(forward: BlockForward, recompute: Recompute, attention_ops: frozenset[str], rng: bool) -> BlockForward:
    """A block's forward that keeps less.

    Args:
        forward: the block's own.
        recompute: what is computed again.
        attention_ops: names of the ops that attend, such as ``sft_job::flash4``.
        rng: the block draws random numbers, which have to be the same again.
    """
    if recompute is Recompute.NONE:
        return forward
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": rng}
    if recompute is Recompute.ATTENTION and attention_ops:
        policy = partial(_keep_attention, attention_ops)
        options["context_fn"] = partial(create_selective_checkpoint_contexts, policy)

    def run(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, block, *args, **options, **kwargs)

    # torch.compile counts compilations by code object, up to a limit: levels must not share one.
    return own_code(run, f"run_{recompute}")


def own_code(function: Any, name: str) -> BlockForward:
    """The same function with a code object of its own."""
    code = function.__code__.replace(co_name=name)
    copied = FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def _keep_attention(
    ops: frozenset[str], context: SelectiveCheckpointContext, op: OpOverload, *args: Any, **kwargs: Any
) -> CheckpointPolicy:
    name = op.name().partition(".")[0]
    return CheckpointPolicy.MUST_SAVE if name in ops else CheckpointPolicy.PREFER_RECOMPUTE


def draws_random_numbers(module: nn.Module) -> bool:
    """Whether anything is dropped while it trains."""
    drops = any(isinstance(part, nn.Dropout) and part.p > 0.0 for part in module.modules())
    return drops or any(getattr(part, "attention_dropout", 0.0) for part in module.modules())
