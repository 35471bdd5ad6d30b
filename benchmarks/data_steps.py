"""What the data benchmark measures: each step a function that runs in another process than the benchmark itself."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from family import Family
from tokenizers import Tokenizer

from sft_job.config.schema import JobConfig
from sft_job.data.batches import BatchLoader
from sft_job.data.cache import TokenCache, cache_spec, open_cache, open_or_build
from sft_job.data.files import check_files, read_footers
from sft_job.data.order import RowOrder
from sft_job.data.packing import pack_settings, plan_batch
from sft_job.data.spec import CacheSpec
from sft_job.data.tokenizer import load_tokenizer

# The library is as fast with 256 texts a call as with 8,192.
_ROWS_A_CALL = 2048
_MIB = 1 << 20


@dataclass(frozen=True)
class Data:
    """Rows and the settings that a run would have for them.

    Attributes:
        rows: folder of parquet files.
        tokenizer: model folder.
        cache: folder of the token caches.
        max_length: longest row in tokens; longer ones lose their end.
        batch_rows: rows of a global batch.
        batch_tokens: most tokens in a micro-batch.
    """

    rows: Path
    tokenizer: Path
    cache: Path
    max_length: int
    batch_rows: int
    batch_tokens: int

    def config(self) -> JobConfig:
        """The run's settings."""
        config = JobConfig()
        config.data.train_files = str(self.rows)
        config.data.cache_dir = str(self.cache)
        config.data.max_length = self.max_length
        config.data.truncation = "right"
        config.data.train_batch_size = self.batch_rows
        config.data.use_dynamic_bsz = True
        config.data.max_token_len_per_gpu = self.batch_tokens
        config.model.partial_pretrain = str(self.tokenizer)
        return config

    def spec(self) -> CacheSpec:
        """What the cache is made from."""
        spec = cache_spec(self.config(), "train")
        assert spec is not None  # there are training files
        return spec


Step = Callable[..., dict[str, float]]


def cold(data: Data, workers: int) -> dict[str, float]:
    """Everything from the paths to a published cache."""
    begin = time.perf_counter()
    with Family() as family:
        cache = open_or_build(data.spec(), data.cache, workers)
    seconds = time.perf_counter() - begin
    tokens = int(cache.lengths.sum(dtype="int64"))
    size = sum(file.stat().st_size for file in cache.folder.iterdir())
    return {
        "seconds": seconds,
        "rows": cache.num_rows,
        "tokens": tokens,
        "rows_per_second": cache.num_rows / seconds,
        "tokens_per_second": tokens / seconds,
        "rows_per_cpu_second": cache.num_rows / family.cpu_seconds,
        "peak_own_mib": family.peak_own_bytes / _MIB,
        "cache_mib": size / _MIB,
        "longest_row": int(cache.lengths.max()),
    }


def tokenizers_alone(data: Data, rows: int, processes: int) -> dict[str, float]:
    """``encode_batch_fast`` over rendered rows that are in memory already; its results are thrown away.

    Args:
        data: the first of its rows are taken.
        rows: how many.
        processes: 1 = the library's own threads; more = so many processes with one thread each.
    """
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(processes), context.Queue()
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if processes == 1 else "false"
    children = [
        context.Process(target=_encode, args=(data, rows, number, processes, barrier, answers))
        for number in range(processes)
    ]
    for child in children:
        child.start()
    found = [answers.get() for _ in children]
    for child in children:
        child.join()
    seconds = max(end for _, end, *_ in found) - min(begin for begin, *_ in found)
    return {
        "seconds": seconds,
        "rows_per_second": rows / seconds,
        "tokens_per_second": sum(tokens for *_, tokens in found) / seconds,
        "rows_per_cpu_second": rows / sum(cpu_seconds for _, _, cpu_seconds, _ in found),
    }


def _encode(data: Data, rows: int, number: int, processes: int, barrier: Barrier, answers: Queue[Any]) -> None:
    calls = [texts[number::processes] for texts in _rendered(data, rows)]
    encode = Tokenizer.from_file(str(data.tokenizer / "tokenizer.json")).encode_batch_fast
    tokens = 0
    barrier.wait()
    begin, cpu_begin = time.monotonic(), time.process_time()
    for texts in calls:
        tokens += sum(map(len, encode(texts, add_special_tokens=False)))
    answers.put((begin, time.monotonic(), time.process_time() - cpu_begin, tokens))


def _rendered(data: Data, rows: int) -> Iterable[list[str]]:
    """Prompts with the template around them and responses, as many texts a call as suits the library."""
    tokenizer: Any = load_tokenizer(data.tokenizer)
    left = rows
    for file in sorted(data.rows.iterdir()):
        for batch in pq.ParquetFile(file).iter_batches(_ROWS_A_CALL):
            taken = batch.slice(0, left)
            left -= taken.num_rows
            if not taken.num_rows:
                return
            prompts, responses = (taken.column(name).to_pylist() for name in ("prompt", "response"))
            conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
            yield tokenizer.apply_chat_template(conversations, add_generation_prompt=True, tokenize=False) + responses


def warm(data: Data, evict: bool) -> dict[str, float]:
    """From the paths to the first batch where the cache is there: what ``prepare`` does, then what a rank does.

    Args:
        data: its cache has been built.
        evict: let the system forget the files' pages first, so that they come from the disk.
    """
    if evict:
        for folder in (data.rows, data.cache):
            _evict(folder)
    clock = _Clock()
    spec = data.spec()
    clock.lap("find files")
    folder = open_or_build(spec, data.cache, 1).folder
    clock.lap("fingerprint, open in prepare")
    cache = open_cache(folder)
    clock.lap("open in the rank")
    loader, order = _loader(data, cache)
    plan_batch(cache.lengths, order.rows(0), 1, pack_settings(data.config()))
    clock.lap("order and plan")
    with closing(loader.steps(0, 1)) as ahead:
        next(ahead)
    clock.lap("first batch")
    return {**clock.laps, "seconds": sum(clock.laps.values())}


class _Clock:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now


def _evict(folder: Path) -> None:
    os.sync()  # only clean pages are let go
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def batches(data: Data, steps: int, ulysses: int) -> dict[str, float]:
    """Memory and time of a rank that only makes batches: one data-parallel rank, so it reads every row itself."""
    spec = data.spec()
    before = _resident()
    cache = open_or_build(spec, data.cache, 1)
    loader, _ = _loader(data, cache, ulysses)
    peak, tokens, micro_batches = before, 0, 0
    begin = time.perf_counter()
    with closing(loader.steps(0, steps)) as ahead:
        for batch in ahead:
            tokens += batch.num_tokens
            micro_batches += len(batch.micro_batches)
            peak = {name: max(value, peak[name]) for name, value in _resident().items()}
    seconds = time.perf_counter() - begin
    return {
        "steps": steps,
        "rows": cache.num_rows,
        "milliseconds_per_step": 1000 * seconds / steps,
        "tokens_per_second": tokens / seconds,
        "tokens_per_step": tokens / steps,
        "micro_batches_per_step": micro_batches / steps,
        **{f"{name}_growth_mib": (value - before[name]) / _MIB for name, value in peak.items()},
        **{f"{name}_peak_mib": value / _MIB for name, value in peak.items()},
    }


def _loader(data: Data, cache: TokenCache, ulysses: int = 1) -> tuple[BatchLoader, RowOrder]:
    order = RowOrder(1, cache.num_rows, data.batch_rows)
    settings = pack_settings(data.config())
    loader = BatchLoader(
        cache, order, settings, dp_rank=0, dp_size=1, ulysses_rank=0, ulysses_size=ulysses, pad_id=0, pin_memory=False
    )
    return loader, order


def _resident() -> dict[str, int]:
    """Bytes of this process that are resident, own memory and mapped files apart."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return {name: int(values[name].split()[0]) << 10 for name in ("RssAnon", "RssFile")}


def files(data: Data) -> dict[str, float]:
    """What is done for every file before any row is read."""
    clock = _Clock()
    spec = data.spec()
    clock.lap("find files")
    read_footers(spec.files, spec.columns, spec.files_option)
    clock.lap("footers")
    check_files(spec.files, spec.columns, spec.files_option)
    clock.lap("footers again")
    spec.fingerprint()
    clock.lap("fingerprint")
    return {"files": len(spec.files), **clock.laps}
