"""Which attention backend a model gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sft_job.contract import ExitCode
from sft_job.errors import JobError
from sft_job.model.attention.call import Backend, Needs
from sft_job.model.attention.each_document import cudnn, cudnn_lacks, eager, sdpa, sdpa_lacks
from sft_job.model.attention.flash import (
    FLASH2_OP,
    FLASH4_OP,
    VARLEN_OP,
    flash2,
    flash2_lacks,
    flash4,
    flash4_lacks,
    slow_after_ampere,
    slow_beside_flash4,
    torch_varlen,
    torch_varlen_lacks,
)

_SDPA_OPS = frozenset(
    f"aten::_scaled_dot_product_{kind}"
    for kind in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
)

BACKENDS: tuple[Backend, ...] = (
    Backend("flash4", flash4, flash4_lacks, traced=True, saved=frozenset({FLASH4_OP})),
    Backend("cudnn", cudnn, cudnn_lacks, saved=_SDPA_OPS, slow_on=slow_beside_flash4),
    Backend(
        "flash2",
        flash2,
        flash2_lacks,
        saved=frozenset({FLASH2_OP}),
        slow_on=slow_after_ampere,
        note="by its own interface; never run by this project's authors",
    ),
    Backend(
        "torch_varlen",
        torch_varlen,
        torch_varlen_lacks,
        traced=True,
        saved=frozenset({VARLEN_OP}),
        slow_on=slow_after_ampere,
    ),
    Backend("sdpa", sdpa, sdpa_lacks, saved=_SDPA_OPS, slow_on=slow_after_ampere),
    Backend("eager", eager, lambda needs: None, slow_on=slow_after_ampere),
)
"""Fastest first."""
AUTO = "auto"


class AttentionChoice(NamedTuple):
    """Which backend a model gets.

    Attributes:
        backend: the one.
        text: a line for the log that says why.
        slow: why this card should have a faster one; empty where it is right, or was asked for by name.
    """

    backend: Backend
    text: str
    slow: str


def choose_backend(needs: Needs, name: str = AUTO, backends: Sequence[Backend] = BACKENDS) -> AttentionChoice:
    """The first backend that offers all that is needed, and why.

    Args:
        needs: of the model, its data and its device.
        name: of the only one to take; auto = any.
        backends: fastest first.

    Raises:
        JobError: none does (exit code 2).
    """
    passed: list[str] = []
    for backend in backends:
        if name not in (AUTO, backend.name):
            continue
        reason = backend.lacks(needs)
        if reason is None:
            why = "as set" if name != AUTO else "; ".join(passed)
            reasons = "; ".join(part for part in (why, backend.note) if part)
            text = f"attention: {backend.name}" + (f" ({reasons})" if reasons else "")
            return AttentionChoice(backend, text, (backend.slow_on(needs) or "") if name == AUTO else "")
        passed.append(f"{backend.name}: {reason}")
    asked = "" if name == AUTO else f"model.attention = {name!r}: "
    raise JobError(ExitCode.CONFIG, f"{asked}no attention backend serves this model: {'; '.join(passed)}")
