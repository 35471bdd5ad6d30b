"""The tiny run that is killed: a model of some ten thousand parameters, 28 rows, 15 steps over three epochs."""

from __future__ import annotations

from pathlib import Path

from tests.chaos.plan import SAVE_FREQ, TOTAL_STEPS, Shape

SEED_YAML = Path(__file__).parents[1] / "golden" / "seed_sft_trainer.yaml"
ROWS = 27  # with the empty one left out: four batches of 6 and one of 2 in an epoch
BATCH = 6


def make_inputs(folder: Path) -> None:
    """Model folders with and without dropout, training and validation rows; imports torch."""
    from tests.tiny import save_model, write_rows

    for name, dropout in (("dropout", 0.2), ("plain", 0.0)):
        save_model(folder / name, "qwen3", attention_dropout=dropout)
    write_rows(folder / "train.parquet", ROWS, longest=24)
    write_rows(folder / "val.parquet", 5, seed=1, longest=16)


def run_overrides(inputs: Path, shape: Shape, world: int) -> tuple[str, ...]:
    """The settings of a run of this shape, on top of the seed's YAML."""
    ulysses = min(shape.ulysses, world)
    groups = 2 // shape.ulysses
    return (
        f"data.train_files={inputs}/train.parquet",
        f"data.val_files={inputs}/val.parquet",
        f"data.cache_dir={inputs}/cache",
        f"data.train_batch_size={BATCH}",
        f"data.micro_batch_size_per_gpu={BATCH // groups // shape.accumulation}",
        "data.max_length=256",
        "data.num_workers=1",
        # Dropout draws by the rank: with another number of ranks it draws something else.
        f"model.partial_pretrain={inputs}/{'dropout' if shape.exact else 'plain'}",
        "model.fsdp_config.model_dtype=fp32",
        f"model.lora_rank={4 if shape.lora else 0}",
        "optim.lr=1e-2",
        f"ulysses_sequence_parallel_size={ulysses}",
        "trainer.logger=[]",
        "trainer.total_epochs=3",
        f"trainer.total_training_steps={TOTAL_STEPS}",
        # A run that is killed again and again is what its breaker is there to end.
        "trainer.max_starts_without_progress=0",
        f"trainer.save_freq={SAVE_FREQ}",
        "trainer.test_freq=4",
        "trainer.max_ckpt_to_keep=2",
        "trainer.timeout_seconds=30",
        # Half of the runs make a recovery checkpoint at nearly every step besides.
        f"trainer.recovery_minutes={0.001 if shape.accumulation > 1 else 0}",
    )
