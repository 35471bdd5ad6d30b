"""Token caches of a run, before its ranks start, and the report on its data."""

from __future__ import annotations

import json
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

from sft_job.config.schema import JobConfig
from sft_job.contract import RunFolder
from sft_job.data.build import Progress
from sft_job.data.cache import CacheSpec, TokenCache, open_or_build
from sft_job.data.files import check_files
from sft_job.data.mixture import MixedSet, Mixture, named_caches
from sft_job.data.shm import SHM, Warn, to_shm
from sft_job.data.spec import Split, cache_specs
from sft_job.data.workers import available_cores
from sft_job.errors import Problem, ProblemsError, raise_problems


def prepare(
    config: JobConfig, run: RunFolder, progress: Progress | None = None, warn: Warn | None = None, shm: Path = SHM
) -> tuple[TokenCache | Mixture, TokenCache | Mixture | None]:
    """Open or build the caches of the training and the validation rows.

    Args:
        config: the run's settings.
        run: its folder, which holds the caches unless ``data.cache_dir`` names another place.
        progress: called with rows done and rows in all, for one data set after the other.
        warn: takes the text of a warning; by default this package's Python logger.
        shm: where ``data.use_shm`` puts copies of the files.

    Returns:
        Training rows, and validation rows or None. Named data sets have a cache each, under a mixture.

    Raises:
        ProblemsError: all that is wrong with all data sets: exit 65, 66 or 2; 73 for the cache's folder.
        JobError: exit 137, where a worker process was killed.
    """
    folder = Path(config.data.cache_dir).expanduser() if config.data.cache_dir else run.cache
    workers = config.data.num_workers or available_cores()
    problems: list[Problem] = []
    specs: list[CacheSpec] = []
    caches: dict[Split, list[MixedSet]] = {"train": [], "val": []}
    splits: tuple[Split, Split] = ("train", "val")
    for split in splits:
        try:
            specs += cache_specs(config, split)
        except ProblemsError as error:
            problems += error.problems
    for spec in specs:
        try:
            if problems:  # the run ends anyway: only what is quick to find out
                problems += [] if spec.custom else check_files(spec.files, spec.columns, spec.files_option)
            else:
                if config.data.use_shm:
                    spec = replace(spec, copies=tuple(to_shm(spec.files, shm, warn)))
                caches[spec.split].append(_mixed(spec, open_or_build(spec, folder, workers, progress)))
        except ProblemsError as error:
            problems += error.problems
    raise_problems([problem for index, problem in enumerate(problems) if problem not in problems[:index]])
    return _rows(caches["train"]), _rows(caches["val"]) if caches["val"] else None


def _mixed(spec: CacheSpec, cache: TokenCache) -> MixedSet:
    if spec.source is None:
        return MixedSet("", cache)
    entry = spec.source.entry
    weight, repeat = (None if share is None else float(share) for share in (entry.weight, entry.repeat))
    return MixedSet(spec.source.name, cache, weight, repeat)


def _rows(sets: list[MixedSet]) -> TokenCache | Mixture:
    """A set without a name is the only one."""
    return sets[0].cache if not sets[0].name else Mixture(sets)


def write_report(run: RunFolder, train: TokenCache | Mixture, val: TokenCache | Mixture | None) -> None:
    """Write ``logs/data_report.json``: counts, notes and warnings of both splits, or of each of their named sets."""
    report = {"train": _report(train), "val": _report(val) if val else None}
    run.logs.mkdir(parents=True, exist_ok=True)
    temporary = run.data_report.with_name(f".{run.data_report.name}.{uuid.uuid4().hex}")
    temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    temporary.replace(run.data_report)


def _report(rows: TokenCache | Mixture) -> Any:
    if isinstance(rows, TokenCache):
        return rows.report
    return [{"name": name, **cache.report} for name, cache in named_caches(rows).items()]
