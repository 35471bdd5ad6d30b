"""Why a checkpoint is saved, what a run saves and how, and how long a save took."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from sft_job.config.schema import TrainerConfig


class Purpose(enum.Enum):
    """Why a checkpoint is saved."""

    KEPT = "kept"
    """``save_freq``: counted by ``max_ckpt_to_keep``."""
    RECOVERY = "recovery"
    """``recovery_minutes``: the next checkpoint takes its place."""
    STOP = "stop"
    """On the way out, to go on from; nothing is removed for it."""
    LAST = "last"
    """The run is at its end: the checkpoint holds the export."""

    @property
    def awaited(self) -> bool:
        """The run ends with it: it is waited for, and it must not fail."""
        return self in (Purpose.STOP, Purpose.LAST)


@dataclass(frozen=True)
class SavePolicy:
    """How and what a run saves: ``trainer.*`` of the same names.

    Attributes:
        contents: ``checkpoint.save_contents``.
        keep: ``max_ckpt_to_keep``.
        asynchronous: ``async_save``.
        recovery_seconds: between recovery checkpoints; 0 = none.
        end_on_failure: ``on_save_failure`` is end.
    """

    contents: frozenset[str]
    keep: int | None = None
    asynchronous: bool = True
    recovery_seconds: float = 0.0
    end_on_failure: bool = True

    @classmethod
    def of(cls, trainer: TrainerConfig) -> SavePolicy:
        """What the settings say."""
        return cls(
            frozenset(trainer.checkpoint.save_contents),
            trainer.max_ckpt_to_keep,
            trainer.async_save,
            trainer.recovery_minutes * 60.0,
            trainer.on_save_failure == "end",
        )


@dataclass(frozen=True)
class SaveTiming:
    """Of one save, seconds on this rank.

    Attributes:
        stall: that training stood still for it.
        total: from its order to its publication.
        bytes: of its files; 0 where it failed.
    """

    stall: float
    total: float
    bytes: int
