"""Token caches of a run, before its ranks start; the report on its data, and the list of rows that it leaves out."""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sft_job.config.schema import JobConfig
from sft_job.contract import ExitCode, RunFolder
from sft_job.data.build import Progress
from sft_job.data.cache import CacheSpec, TokenCache, cache_spec, open_or_build
from sft_job.data.files import check_files
from sft_job.data.judge import Judged, judge_rows
from sft_job.data.rejected import write_rejected_rows
from sft_job.data.shm import SHM, Warn, to_shm
from sft_job.data.spec import Split
from sft_job.data.template_check import check_template
from sft_job.data.workers import available_cores
from sft_job.errors import JobError, Problem, ProblemsError, raise_problems


@dataclass(frozen=True)
class PreparedSet:
    """One data set of a run.

    Attributes:
        split: what it is for.
        name: its name within the split.
        cache: its rows.
        judged: what its rejected rows mean for the run.
    """

    split: Split
    name: str
    cache: TokenCache
    judged: Judged


def prepare(
    config: JobConfig, run: RunFolder, progress: Progress | None = None, warn: Warn | None = None, shm: Path = SHM
) -> tuple[TokenCache, TokenCache | None]:
    """Test the chat template, then open or build the caches of the training and the validation rows.

    ``logs/data_report.json`` and ``logs/rejected_rows.parquet`` are written, also where the rows are refused.

    Args:
        config: the run's settings.
        run: its folder, which holds the caches unless ``data.cache_dir`` names another place.
        progress: called with rows done and rows in all, for one split after the other.
        warn: takes the text of a warning; by default this package's Python logger.
        shm: where ``data.use_shm`` puts copies of the files.

    Returns:
        Training rows, and validation rows or None.

    Raises:
        ProblemsError: all that is wrong with both splits: exit 65, 66 or 2; 73 for the cache's folder.
        JobError: exit 137, where a worker process was killed; 73 where the logs cannot be written.
    """
    folder = Path(config.data.cache_dir).expanduser() if config.data.cache_dir else run.cache
    workers = config.data.num_workers or available_cores()
    warn = warn or logging.getLogger("sft_job").warning
    problems: list[Problem] = []
    specs: list[CacheSpec] = []
    sets: list[PreparedSet] = []
    splits: tuple[Split, Split] = ("train", "val")
    for split in splits:
        try:
            spec = cache_spec(config, split)
        except ProblemsError as error:
            problems += error.problems
        else:
            specs += [spec] if spec else []
    if specs:
        try:
            template = check_template(specs[0])
        except ProblemsError as error:
            problems += error.problems
        else:
            problems += template.problems
            for line in template.warnings:
                (warn or logging.getLogger("sft_job").warning)(line)
    for spec in specs:
        try:
            if problems:  # the run ends anyway: only what is quick to find out
                problems += [] if spec.custom else check_files(spec.files, spec.columns, spec.files_option)
            else:
                if config.data.use_shm:
                    spec = replace(spec, copies=tuple(to_shm(spec.files, shm, warn)))
                cache = open_or_build(spec, folder, workers, progress)
                judged = judge_rows(cache, spec, config.data.max_rejected_fraction, run.rejected_rows)
                sets.append(PreparedSet(spec.split, spec.split, cache, judged))
        except ProblemsError as error:
            problems += error.problems
    problems += [problem for prepared in sets for problem in prepared.judged.problems]
    if sets:
        _write_logs(run, sets)
    raise_problems([problem for index, problem in enumerate(problems) if problem not in problems[:index]])
    for prepared in sets:
        if prepared.judged.warning:
            warn(prepared.judged.warning)
    caches = {prepared.split: prepared.cache for prepared in sets}
    return caches["train"], caches.get("val")


def _write_logs(run: RunFolder, sets: Sequence[PreparedSet]) -> None:
    try:
        write_rejected_rows(
            run.rejected_rows, [(each.split, each.name, each.cache.files, each.cache.rejected) for each in sets]
        )
        write_report(run, sets)
    except OSError as error:
        raise JobError(ExitCode.CANNOT_CREATE, f"{run.logs} cannot be written: {error}") from error


def set_report(name: str, cache: TokenCache, warnings: Sequence[str] = ()) -> dict[str, Any]:
    """The report on one data set: counts of rows and tokens in all and for each file, notes and warnings."""
    return {"name": name, **cache.report, "warnings": [*cache.report["warnings"], *warnings]}


def write_report(run: RunFolder, sets: Sequence[PreparedSet]) -> None:
    """Write ``logs/data_report.json``: for ``train`` and ``val`` a list of the reports on their data sets.

    Raises:
        OSError: it cannot be written.
    """
    report: dict[Split, list[dict[str, Any]]] = {"train": [], "val": []}
    for each in sets:
        warnings = [each.judged.warning] if each.judged.warning else []
        report[each.split].append(set_report(each.name, each.cache, warnings))
    run.logs.mkdir(parents=True, exist_ok=True)
    temporary = run.data_report.with_name(f".{run.data_report.name}.{uuid.uuid4().hex}")
    temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    temporary.replace(run.data_report)
