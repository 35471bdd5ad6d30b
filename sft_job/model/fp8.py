"""Matrix products in fp8: the linear layers of the decoder blocks, through torchao."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import nn

from sft_job.contract import ExitCode
from sft_job.errors import JobError

MULTIPLE = 16
"""Tokens of a rank must be a multiple of this: fp8 products are laid out in rows of 16 bytes."""
_OFF = "none"
_INTO_HEADS = frozenset({"q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn"})


def uses_fp8(fp8: str) -> bool:
    """Whether ``model.fp8`` asks for it."""
    return fp8 != _OFF


def token_multiple(fp8: str) -> int:
    """What the tokens of a rank must be a multiple of."""
    return MULTIPLE if uses_fp8(fp8) else 1


def check_fp8(fp8: str, device: torch.device, compute: torch.dtype) -> None:
    """See that fp8 can be had here.

    Raises:
        JobError: the device, the dtype or a missing package rule it out (exit code 2).
    """
    if not uses_fp8(fp8):
        return
    reason = None
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        reason = "needs a GPU with fp8 units (H100, H200, L40S or later)"
    elif compute != torch.bfloat16:
        reason = "needs bf16 as the compute dtype (model.fsdp_config.dtype)"
    if reason is not None:
        raise JobError(ExitCode.CONFIG, f"model.fp8 = {fp8!r}: {reason}\n    fix: model.fp8=none")


def convert_to_fp8(blocks: Iterable[nn.Module], recipe: str, *, emulate: bool = False) -> int:
    """Swap linear layers for torchao's, in place; parameters keep their names, dtypes and identity.

    Adapters of LoRA stay as they are, their products being too thin, and so do the projections into heads: they are a
    fifteenth of the work, and a profile shows more time in rounding the gradients behind RoPE than they can gain (H200,
    a 7B's step: 1.044 s with them in fp8, 1.008 s without, in two sittings, not in turns). A frozen layer's products
    are in fp8 in both directions. Its weight's gradient, which nobody wants, is computed and thrown away where blocks
    are not compiled: torchao's backward does not ask, and no setting of its config leaves it out. Compilation does.

    Args:
        blocks: decoder blocks, on any device.
        recipe: tensorwise (one scale a tensor, fastest) or rowwise (one a row, more exact).
        emulate: compute with rounded values in wider dtypes, for devices without fp8 units.

    Returns:
        How many layers were swapped.

    Raises:
        JobError: torchao is not installed (exit code 2).
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # noqa: PLC0415  an optional package
        from torchao.float8.float8_linear import Float8Linear  # noqa: PLC0415
    except ImportError as error:
        raise JobError(
            ExitCode.CONFIG, f"model.fp8 = {recipe!r} needs the package torchao\n    fix: pip install 'sft_job[fp8]'"
        ) from error
    config = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=emulate)
    count = 0
    for block in blocks:
        convert_to_float8_training(block, module_filter_fn=_gains, config=config)
        count += sum(isinstance(part, Float8Linear) for part in block.modules())
    return count


def _gains(module: nn.Module, name: str) -> bool:
    if not isinstance(module, nn.Linear) or module.in_features % MULTIPLE or module.out_features % MULTIPLE:
        return False
    return not any(part.startswith("lora_") or part in _INTO_HEADS for part in name.split("."))
