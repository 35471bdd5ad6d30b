"""Which dtype weights are kept in, computed in and reduced in."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sft_job.config.schema import FsdpConfig

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True)
class Precision:
    """Dtypes of a run.

    Attributes:
        storage: of weights and optimizer states.
        compute: of gathered weights and activations.
        reduce: in which gradients are summed over ranks.
    """

    storage: torch.dtype
    compute: torch.dtype
    reduce: torch.dtype


def precision_of(config: FsdpConfig, device_type: str) -> Precision:
    """Dtypes by the config; the compute dtype defaults to bf16 on CUDA and to the storage dtype on CPU."""
    storage = DTYPES[config.model_dtype]
    if config.dtype is not None:
        compute = DTYPES[config.dtype]
    else:
        compute = torch.bfloat16 if device_type == "cuda" and storage != torch.float64 else storage
    return Precision(storage, compute, torch.float64 if storage == torch.float64 else torch.float32)
