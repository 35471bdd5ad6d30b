"""What is measured: rows of the published table, each a way to run the job and the partners it is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from benchmarks.tokens import Tokens

FULL_8K = Tokens(rows=2, length=8192)
MIXED = Tokens(rows=78, length=32768, total=262_144, median=2048)

CHECKPOINTED: Mapping[str, Any] = {"gradient_checkpointing": True, "per_device_train_batch_size": 2}
KEPT: Mapping[str, Any] = {
    "gradient_checkpointing": False,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
}
"""Without recomputation 16,384 tokens at once are more than a card holds: the same rows, one after the other."""


@dataclass(frozen=True)
class Side:
    """One way to train.

    Attributes:
        name: for the table.
        program: the job, or TRL.
        tokens: its rows.
        ranks: GPUs.
        settings: of the job: settings by their full names; of TRL: arguments of ``SFTConfig``, and those that
            ``trl_side.py`` lists.
    """

    name: str
    program: Literal["ours", "trl"]
    tokens: Tokens
    ranks: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: on the command line.
        shape: of the model, see ``shapes.py``.
        subject: what is measured: it runs before and after the partners.
        partners: what it is compared with; the fastest of them counts.
        goals: what the table wants, in words.
        gate: largest relative difference of a loss from the reference's; over the first 5 steps, over the first 20.
        steps: most steps that are measured, where a step is so long that a call has no time for more.
        warmup: the same for steps before them.
        reference_steps: steps of the reference; 0 = none.
    """

    name: str
    shape: str
    subject: Side
    partners: tuple[Side, ...]
    goals: str
    gate: tuple[float, float] = (1e-3, 5e-3)
    steps: int | None = None
    warmup: int | None = None
    reference_steps: int = 20

    def tiny(self) -> Row:
        """The same at sizes for a CPU."""

        def smaller(side: Side) -> Side:
            return replace(side, tokens=side.tokens.tiny())

        return replace(
            self, shape="tiny", subject=smaller(self.subject), partners=tuple(smaller(each) for each in self.partners)
        )

    def reference(self) -> Side:
        """The subject's path that is slow and known to be right, for the losses of the first steps."""
        settings = {**self.subject.settings, **REFERENCE}
        return replace(self.subject, name="ours, SDPA, not compiled", settings=settings)


REFERENCE: Mapping[str, Any] = {"model.compile": False, "model.attention": "sdpa", "model.fp8": "none"}
"""Settings of the path that losses are compared with. A job that has no such setting has no other path."""


def _trl(name: str, tokens: Tokens, settings: Mapping[str, Any], **more: Any) -> Side:
    return Side(f"TRL, {name}", "trl", tokens, more.pop("ranks", 1), {**settings, **more})


_FULL_8K_PARTNERS = (
    _trl("recomputation", FULL_8K, CHECKPOINTED),
    _trl("no recomputation", FULL_8K, KEPT),
)
_LORA = {"model.lora_rank": 16, "model.lora_alpha": 32, "model.target_modules": "all-linear"}
_TRL_LORA = {"lora_rank": 16, "lora_alpha": 32, "bf16": True}

_128K = Tokens(1, 131_072)
_LONG = {"data.micro_batch_size_per_gpu": 1, "trainer.rehearsal": False}
"""A step takes minutes: none is spent on a rehearsal, and what is recomputed is said."""

ROWS: tuple[Row, ...] = (
    Row(
        "qwen7b_full_2x8192",
        "qwen2.5-7b",
        Side("ours", "ours", FULL_8K, settings={"data.micro_batch_size_per_gpu": 2}),
        _FULL_8K_PARTNERS,
        "0.88 of the ceiling; 1.35x TRL",
    ),
    Row(
        "qwen7b_full_2x8192_fp8",
        "qwen2.5-7b",
        Side(
            "ours, fp8 tensorwise",
            "ours",
            FULL_8K,
            settings={"data.micro_batch_size_per_gpu": 2, "model.fp8": "tensorwise"},
        ),
        _FULL_8K_PARTNERS,
        "1.10 of the ceiling; 1.7x TRL",
        # Twice that of bf16. In bf16's own row the losses of fp8 differ by 3e-4 to 7e-4 from the reference's (H200).
        gate=(2e-3, 1e-2),
    ),
    Row(
        "qwen4b_full_1x32768",
        "qwen3-4b",
        Side("ours", "ours", Tokens(1, 32768), settings={"data.micro_batch_size_per_gpu": 1}),
        (_trl("recomputation", Tokens(1, 32768), {**CHECKPOINTED, "per_device_train_batch_size": 1}),),
        "0.78 of the ceiling; 1.35x TRL",
        reference_steps=10,
    ),
    Row(
        "qwen4b_mixed",
        "qwen3-4b",
        Side("ours", "ours", MIXED, settings={"data.use_dynamic_bsz": True, "data.max_token_len_per_gpu": 32768}),
        (
            _trl(
                "bfd packing, recomputation",
                MIXED,
                {
                    "gradient_checkpointing": True,
                    "packing": True,
                    "packing_strategy": "bfd",
                    "per_device_train_batch_size": 1,
                    "gradient_accumulation_steps": 8,
                },
            ),
        ),
        "1.5x TRL's packing; padding and imbalance under 3 %",
        steps=5,
        warmup=2,
        reference_steps=2,
    ),
    Row(
        "qwen7b_lora_2x8192",
        "qwen2.5-7b",
        Side("ours, LoRA r16", "ours", FULL_8K, settings={"data.micro_batch_size_per_gpu": 2, **_LORA}),
        (
            _trl("PEFT, recomputation", FULL_8K, CHECKPOINTED, **_TRL_LORA),
            _trl("PEFT, no recomputation", FULL_8K, KEPT, **_TRL_LORA),
        ),
        "1.3x TRL with PEFT",
    ),
    Row(
        "qwen7b_fsdp2",
        "qwen2.5-7b",
        Side("ours, two GPUs", "ours", Tokens(4, 8192), 2, {"data.micro_batch_size_per_gpu": 2}),
        (Side("ours, one GPU", "ours", FULL_8K, 1, {"data.micro_batch_size_per_gpu": 2}),),
        "0.95 of one GPU's tokens/s per GPU",
    ),
    Row(
        "qwen7b_ulysses2_65536",
        "qwen2.5-7b",
        Side("ours, Ulysses 2", "ours", Tokens(1, 65536), 2, {"ulysses_sequence_parallel_size": 2}),
        (Side("ours, Ulysses 1", "ours", Tokens(2, 32768), 2, {"data.micro_batch_size_per_gpu": 1}),),
        "0.97 of Ulysses 1's TFLOP/s per GPU",
    ),
    Row(
        "qwen7b_ulysses2_32768",
        "qwen2.5-7b",
        Side("ours, Ulysses 2", "ours", Tokens(1, 32768), 2, {"ulysses_sequence_parallel_size": 2}),
        (
            _trl(
                "ring of 2, FSDP2, recomputation",
                Tokens(1, 32768),
                {**CHECKPOINTED, "per_device_train_batch_size": 1},
                ranks=2,
                ring=2,
            ),
        ),
        "1.4x TRL's ring",
    ),
    Row(
        "qwen4b_full_1x131072",
        "qwen3-4b",
        Side("ours", "ours", _128K, settings={**_LONG, "model.recompute": "attention"}),
        (_trl("recomputation", _128K, {**CHECKPOINTED, "per_device_train_batch_size": 1}),),
        "0.68 of the ceiling",
        steps=2,
        warmup=1,
        reference_steps=1,
    ),
    Row(
        "qwen7b_ulysses2_131072",
        "qwen2.5-7b",
        Side("ours, Ulysses 2", "ours", _128K, 2, {"ulysses_sequence_parallel_size": 2}),
        (
            _trl(
                "ring of 2, FSDP2, recomputation",
                _128K,
                {**CHECKPOINTED, "per_device_train_batch_size": 1},
                ranks=2,
                ring=2,
            ),
        ),
        "0.70 of the ceiling; 1.37x TRL's ring",
        steps=3,
        warmup=1,
        reference_steps=2,
    ),
    Row(
        "qwen7b_524288",
        "qwen2.5-7b-long",
        Side("ours, offload", "ours", Tokens(1, 524_288), settings={**_LONG, "model.recompute": "offload"}),
        (),
        "completes; the loss of qwen7b_ulysses2_524288",
        steps=1,
        warmup=0,
        reference_steps=0,
    ),
    Row(
        "qwen7b_20_layers_524288",
        "qwen2.5-7b-long-20-layers",
        Side(
            "ours, offload, 20 of 28 layers",
            "ours",
            Tokens(1, 524_288),
            settings={**_LONG, "model.recompute": "offload"},
        ),
        (),
        "completes, where qwen7b_524288 was cut off",
        steps=1,
        warmup=0,
        reference_steps=0,
    ),
    Row(
        "qwen7b_ulysses2_524288",
        "qwen2.5-7b-long",
        Side(
            "ours, Ulysses 2, offload",
            "ours",
            Tokens(1, 524_288),
            2,
            {**_LONG, "model.recompute": "offload", "ulysses_sequence_parallel_size": 2},
        ),
        (),
        "completes; the loss of qwen7b_524288",
        steps=1,
        warmup=0,
        reference_steps=0,
    ),
    Row(
        "qwen7b_7_layers_1048576",
        "qwen2.5-7b-long-7-layers",
        Side(
            "ours, Ulysses 2, offload",
            "ours",
            Tokens(1, 1_048_576),
            2,
            {**_LONG, "model.recompute": "offload", "ulysses_sequence_parallel_size": 2},
        ),
        (),
        "completes",
        steps=1,
        warmup=0,
        reference_steps=0,
    ),
)


def rows_named(names: Sequence[str]) -> list[Row]:
    """Rows by name, in the order asked for.

    Raises:
        ValueError: there is no such row.
    """
    known = {row.name: row for row in ROWS}
    wrong = [name for name in names if name not in known]
    if wrong:
        raise ValueError(f"no such row: {', '.join(wrong)}; there are {', '.join(known)}")
    return [known[name] for name in names]


def sittings(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that can share the runs of their partners: neighbours of the same model, length and partners."""
    groups: list[list[Row]] = []
    for row in rows:
        last = groups[-1][-1] if groups else None
        alike = last is not None and all(
            getattr(last, name) == getattr(row, name) for name in ("shape", "partners", "steps", "warmup")
        )
        if alike:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups
