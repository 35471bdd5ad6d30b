"""Room on the disk: what a run will need, and what there is. Torch-free."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from sft_job.config.model_folder import ModelFacts
from sft_job.config.schema import JobConfig
from sft_job.preflight.inputs import data_files

_BYTES = {"bf16": 2, "fp32": 4, "fp64": 8}
_STATES = 3
"""Weights and AdamW's two moments, in the same dtype."""


@dataclass(frozen=True)
class Space:
    """Bytes that a run needs, about.

    Attributes:
        checkpoint: one checkpoint; there are two while a new one takes the place of the last.
        export: the Hugging Face folder.
        cache: token ids.
    """

    checkpoint: int
    export: int
    cache: int

    @property
    def total(self) -> int:
        """All of it."""
        return 2 * self.checkpoint + self.export + self.cache

    def text(self) -> str:
        """The sum and its parts."""
        return (
            f"{gib(self.total)}: two checkpoints of {gib(self.checkpoint)}, export {gib(self.export)}, token cache "
            f"{gib(self.cache)}"
        )


def space_needed(config: JobConfig, model: ModelFacts | None) -> Space:
    """Estimate by the model's parameters and the size of the data files that can be found."""
    size = _BYTES[config.model.fsdp_config.model_dtype]
    parameters = model.parameters if model else 0
    # Ids take 4 bytes each; a token is seldom shorter than 2 bytes of text, compressed parquet about as long.
    data = sum(path.stat().st_size for path in data_files(config)[0].values())
    return Space(parameters * size * _STATES, parameters * size, 4 * data)


def free_space(folder: Path) -> tuple[Path, int]:
    """The folder, or the nearest one above it that is there, and its free bytes."""
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return there, shutil.disk_usage(there).free


def gib(count: float) -> str:
    """Bytes as GiB."""
    return f"{count / 2**30:,.1f} GiB"
