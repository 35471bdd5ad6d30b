"""Lengths of the rows that a run will train on: from its token cache, from a sample, or as the user says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from sft_job.config.load import run_folder
from sft_job.config.schema import JobConfig
from sft_job.contract import ExitCode
from sft_job.data.cache import TokenCache, find_cache
from sft_job.data.mixture import repeated_entries, weighted_entries
from sft_job.data.sample import sample_lengths
from sft_job.data.spec import CacheSpec, Split, cache_specs
from sft_job.errors import JobError, Problem, ProblemsError
from sft_job.plan.estimate import Rows

SAMPLE_ROWS = 400
Int32 = npt.NDArray[np.int32]
_DRAWN, _LONGEST = 20_000, 1_000
_READ_AT_MOST = 4 << 30
"""Bytes of data files that are read to find a cache by their content; with more, a sample has to do."""


def told_rows(config: JobConfig, length: int) -> Rows:
    """Rows of one length, as many as the files' footers say, where they can be read."""
    total = _footer_rows(config, "train")
    validation = _footer_rows(config, "val") or 0
    count = min(total or config.data.train_batch_size, config.data.train_batch_size)
    lengths = np.full(max(1, count), length, dtype=np.int32)
    counted = f", {total:,} rows" if total else ""
    return Rows(lengths, total, True, length, 1.0, f"--length: every row has {length:,} tokens{counted}", validation)


def _footer_rows(config: JobConfig, split: Split) -> int | None:
    try:
        specs = cache_specs(config, split)
        return sum(pq.read_metadata(file).num_rows for spec in specs for file in spec.files) or None
    except (JobError, OSError, pa.ArrowException):
        return None


def read_rows(config: JobConfig) -> Rows:
    """The lengths of a run's own data.

    Raises:
        ProblemsError: files, tokenizer or template cannot be used, with the codes of ``check``.
    """
    specs = cache_specs(config, "train")
    try:
        validation = _footer_rows(config, "val") or 0
        warm = _warm(config, specs)
        if warm is not None:
            return _of_caches(specs, warm, validation)
        return _of_samples(config, specs, validation)
    except ProblemsError:
        raise
    except JobError as error:
        raise ProblemsError([Problem(error.code, "data.train_files", str(error))]) from error


def _warm(config: JobConfig, specs: list[CacheSpec]) -> list[TokenCache] | None:
    folder = Path(config.data.cache_dir).expanduser() if config.data.cache_dir else run_folder(config).cache
    try:
        there = any(folder.glob("train-*"))
        size = sum(file.stat().st_size for spec in specs for file in spec.files)
    except OSError:
        return None
    if not there or size > _READ_AT_MOST:
        return None
    caches = [find_cache(spec, folder) for spec in specs]
    return [cache for cache in caches if cache is not None] if all(caches) else None


def _mixed(specs: list[CacheSpec], each: list[Int32], sizes: list[int]) -> tuple[Int32, int]:
    """Lengths as an epoch meets them, the longest of every set among them, and the rows of an epoch."""
    entries = [spec.source.entry if spec.source else None for spec in specs]
    if any(entry is not None and entry.weight is not None for entry in entries):
        shares = weighted_entries(sizes, [float(entry.weight or 0) if entry else 0.0 for entry in entries])
    elif any(entry is not None and entry.repeat is not None for entry in entries):
        repeats = [1.0 if entry is None or entry.repeat is None else float(entry.repeat) for entry in entries]
        shares = repeated_entries(sizes, repeats)
    else:
        return np.concatenate(each).astype(np.int32), sum(sizes)
    generator, total = np.random.default_rng(0), sum(shares)
    drawn = [
        generator.choice(lengths, max(1, round(_DRAWN * share / total)))
        for lengths, share in zip(each, shares, strict=True)
    ]
    longest = [np.sort(lengths)[-_LONGEST:] for lengths, share in zip(each, shares, strict=True) if share]
    return np.concatenate([*drawn, *longest]).astype(np.int32), total


def _of_caches(specs: list[CacheSpec], caches: list[TokenCache], validation: int) -> Rows:
    lengths, total = _mixed(specs, [np.asarray(cache.lengths) for cache in caches], [each.num_rows for each in caches])
    tokens = sum(int(cache.lengths.sum(dtype=np.int64)) for cache in caches)
    targets = sum(int(cache.targets.sum(dtype=np.int64)) for cache in caches)
    source = f"token cache: {sum(cache.num_rows for cache in caches):,} rows, {_histogram(lengths)}"
    return Rows.of_all(lengths, total, max(0.01, targets / tokens), source, validation)


def _of_samples(config: JobConfig, specs: list[CacheSpec], validation: int) -> Rows:
    each = max(50, SAMPLE_ROWS // len(specs))
    found = [sample_lengths(spec, each) for spec in specs]
    if not all(len(sample.lengths) for sample in found):
        rule = f"none of {sum(sample.read for sample in found):,} rows looked at can be trained on"
        fix = "sft-job check says why; or plan with --length"
        raise ProblemsError([Problem(ExitCode.DATA, "data.train_files", rule, fix)])
    usable = [round(sample.total * len(sample.lengths) / sample.read) for sample in found]
    lengths, total = _mixed(specs, [sample.lengths for sample in found], usable)
    whole = all(sample.read >= sample.total for sample in found)
    longest = int(lengths.max()) if whole else config.data.max_length
    read = sum(sample.read for sample in found)
    source = f"{'all' if whole else 'a sample of'} {read:,} rows, {_histogram(lengths)}"
    if not whole:
        source += f"; a sample may miss the longest rows: memory is that of data.max_length = {longest:,} tokens"
    targets, tokens = (sum(int(getattr(each, name).sum()) for each in found) for name in ("targets", "lengths"))
    return Rows(lengths, total, whole, longest, max(0.01, targets / tokens), source, validation)


def _histogram(lengths: Int32) -> str:
    half, most = (int(np.quantile(lengths, share)) for share in (0.5, 0.9))
    return f"median {half:,}, a tenth above {most:,}, longest {int(lengths.max()):,} tokens"
