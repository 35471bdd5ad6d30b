"""Measures the data pipeline at scale: ``python benchmarks/data_pipeline.py``. README.md says what the numbers mean."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import data_steps
import texts
from data_steps import Data, Step
from data_table import lines, markdown
from rich.console import Console
from rich.table import Table

from sft_job import __version__
from sft_job.data.workers import available_cores

_LIBRARIES = ("torch", "transformers", "tokenizers", "pyarrow", "numpy")
_WARM_STARTS = 3


@dataclass(frozen=True)
class Settings:
    """Of one benchmark, all of them; written beside the results.

    Attributes:
        rows: rows of the large data set.
        row_tokens: their tokens on average, about.
        files: parquet files that they lie in.
        alone_rows: rows that the tokenizers library is measured with.
        repeats: times that cold tokenisation is measured; the library's own speed is taken before and after each.
        small_rows: rows of the small data set that memory is compared with.
        long_rows: rows of ``long_row_tokens``.
        long_row_tokens: tokens of each, exactly.
        small_files: files of ``small_file_rows`` rows.
        small_file_rows: rows in each.
        batch_rows: rows of a global batch.
        batch_tokens: most tokens in a micro-batch.
        steps: steps of the memory measurement.
        workers: processes that tokenise.
        seed: of all that is drawn.
    """

    rows: int
    row_tokens: int
    files: int
    alone_rows: int
    repeats: int
    small_rows: int
    long_rows: int
    long_row_tokens: int
    small_files: int
    small_file_rows: int
    batch_rows: int
    batch_tokens: int
    steps: int
    workers: int
    seed: int


def settings_for(rows: int, repeats: int, workers: int) -> Settings:
    """All settings; the number of rows scales the other data sets too."""
    return Settings(
        rows=rows,
        row_tokens=300,
        files=10,
        alone_rows=min(rows, 100_000),
        repeats=repeats,
        small_rows=1000,
        long_rows=max(4, rows // 4000),
        long_row_tokens=128_000,
        small_files=max(4, rows // 100),
        small_file_rows=10,
        batch_rows=256,
        batch_tokens=16_384,
        steps=min(300, max(20, rows // 20)),
        workers=workers,
        seed=1,
    )


class Bench:
    """Runs the steps and collects what they found."""

    def __init__(self, settings: Settings, work: Path, console: Console) -> None:
        self.settings = settings
        self.results: dict[str, Any] = {}
        self._work = work
        self._console = console
        self._process = _new_process()

    def run(self) -> None:
        """Everything; what a data set leaves on the disk is removed before the next one is made."""
        settings = self.settings
        paragraphs = texts.prose()
        vocabulary = texts.train_tokenizer(self._work / "model", paragraphs, settings.seed)
        self.results["tokenizer"] = {"vocabulary": vocabulary, "prose_characters": sum(map(len, paragraphs))}
        row = {"tokens": settings.row_tokens, "seed": settings.seed}

        self._write("large", paragraphs, rows=settings.rows, files=settings.files, **row)
        self._tokenisation(self._data("large"))
        for name, evict in (("warm", False), ("warm_from_disk", True)):
            self.results[name] = [self._step(data_steps.warm, self._data("large"), evict) for _ in range(_WARM_STARTS)]
        self._write("small", paragraphs, rows=settings.small_rows, files=1, **row)
        self._step(data_steps.cold, self._data("small"), 1)
        for name in ("large", "small"):
            self.results[f"rank_{name}"] = self._fresh(data_steps.batches, self._data(name), settings.steps, 1)
        self._remove("large")

        long = {"tokens": int(settings.long_row_tokens * 1.2), "seed": settings.seed, "spread": 0}
        self._write("long", paragraphs, rows=settings.long_rows, files=1, **long)
        self._long_rows(self._data("long", batch_rows=16))
        self._remove("long")

        count = settings.small_files
        self._write("many", paragraphs, rows=count * settings.small_file_rows, files=count, **row)
        data = self._data("many")
        self.results["many_files"] = {
            "files": self._step(data_steps.files, data),
            "cold": self._fresh(data_steps.cold, data, settings.workers),
            "warm": self._step(data_steps.warm, data, False),
        }

    def close(self) -> None:
        """End the process of the steps that need no fresh one."""
        self._process.shutdown()

    def _tokenisation(self, data: Data) -> None:
        """Library, pipeline, library, pipeline, library: so that a machine that gets busier shows."""
        settings = self.settings
        for _ in range(settings.repeats):
            self._alone(data)
            shutil.rmtree(data.cache, ignore_errors=True)
            self._add("cold", self._fresh(data_steps.cold, data, settings.workers))
        self._alone(data)

    def _alone(self, data: Data) -> None:
        rows = self.settings.alone_rows
        self._add("tokenizers_threads", data_steps.tokenizers_alone(data, rows, 1))
        self._add("tokenizers_processes", data_steps.tokenizers_alone(data, rows, self.settings.workers))

    def _long_rows(self, data: Data) -> None:
        self.results["long_rows"] = {
            "cold": self._fresh(data_steps.cold, data, self.settings.workers),
            "warm": self._step(data_steps.warm, data, False),
            "rank": self._fresh(data_steps.batches, data, 20, 1),
            "rank_of_ulysses_8": self._step(data_steps.batches, data, 20, 8),
        }

    def _add(self, name: str, result: dict[str, float]) -> None:
        self.results.setdefault(name, []).append(result)
        self._console.print(f"{name}: {result['rows_per_second']:,.0f} rows/s", highlight=False)

    def _step(self, step: Step, *arguments: Any) -> dict[str, float]:
        load = os.getloadavg()[0]
        return {**self._process.submit(step, *arguments).result(), "load_before": load}

    def _fresh(self, step: Step, *arguments: Any) -> dict[str, float]:
        """In a process of its own, where memory or a start from nothing counts."""
        load = os.getloadavg()[0]
        with _new_process() as process:
            return {**process.submit(step, *arguments).result(), "load_before": load}

    def _write(self, name: str, paragraphs: list[str], **how: Any) -> None:
        self._console.print(f"writing {how['rows']:,} rows in {how['files']:,} files", highlight=False)
        texts.write_rows(self._work / name / "rows", paragraphs, **how)

    def _data(self, name: str, batch_rows: int | None = None) -> Data:
        settings, folder = self.settings, self._work / name
        return Data(
            folder / "rows",
            self._work / "model",
            folder / "cache",
            settings.long_row_tokens,
            batch_rows or settings.batch_rows,
            settings.batch_tokens,
        )

    def _remove(self, name: str) -> None:
        shutil.rmtree(self._work / name)


def _new_process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def machine() -> dict[str, Any]:
    """Hardware and versions."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.split(":", 1)[1].strip() for line in info if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return {
        "cpu": model,
        "cores": available_cores(),
        "memory_gib": round(memory / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        "sft_job": __version__,
        **{name: version(name) for name in _LIBRARIES},
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of about 300 tokens")
    parser.add_argument("--repeats", type=int, default=2, help="times that cold tokenisation is measured")
    parser.add_argument("--workers", type=int, default=available_cores(), help="processes that tokenise")
    parser.add_argument("--work", type=Path, help="existing folder for temporary files (10 GB); default: the system's")
    parser.add_argument("--out", type=Path, help="JSON file of the results; a .md with the table lies beside it")
    return parser.parse_args()


def main() -> int:
    """Measure, show, write."""
    arguments = _arguments()
    console = Console()
    settings = settings_for(arguments.rows, arguments.repeats, arguments.workers)
    record: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "load": " ".join(f"{load:.2f}" for load in os.getloadavg()),
        "settings": asdict(settings),
    }
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="sft-job-bench-", dir=arguments.work) as work:
        bench = Bench(settings, Path(work), console)
        with closing(bench):
            bench.run()
    table = lines(asdict(settings), bench.results)
    record |= {"seconds": time.perf_counter() - begin, "results": bench.results}
    record["table"] = [asdict(line) for line in table]
    shown = Table(title="Data pipeline")
    for column in ("measured", "result", "goal", "met"):
        shown.add_column(column)
    for line in table:
        shown.add_row(*line.cells)
    console.print(shown)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        arguments.out.with_suffix(".md").write_text(markdown(record, table, _LIBRARIES), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
