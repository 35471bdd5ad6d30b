"""Token caches of a run, before its ranks start, and the report on its data."""

from __future__ import annotations

import json
import logging
import uuid
from dataclasses import replace
from pathlib import Path

from sft_job.config.schema import JobConfig
from sft_job.contract import RunFolder
from sft_job.data.build import Progress
from sft_job.data.cache import CacheSpec, TokenCache, cache_spec, open_or_build
from sft_job.data.files import check_files
from sft_job.data.shm import SHM, Warn, to_shm
from sft_job.data.spec import Split
from sft_job.data.template_check import check_template
from sft_job.data.workers import available_cores
from sft_job.errors import Problem, ProblemsError, raise_problems


def prepare(
    config: JobConfig, run: RunFolder, progress: Progress | None = None, warn: Warn | None = None, shm: Path = SHM
) -> tuple[TokenCache, TokenCache | None]:
    """Test the chat template, then open or build the caches of the training and the validation rows.

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
        JobError: exit 137, where a worker process was killed.
    """
    folder = Path(config.data.cache_dir).expanduser() if config.data.cache_dir else run.cache
    workers = config.data.num_workers or available_cores()
    problems: list[Problem] = []
    specs: list[CacheSpec] = []
    caches: dict[Split, TokenCache] = {}
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
            template = check_template(specs[0], config.data.multiturn.enable)
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
                caches[spec.split] = open_or_build(spec, folder, workers, progress)
        except ProblemsError as error:
            problems += error.problems
    raise_problems([problem for index, problem in enumerate(problems) if problem not in problems[:index]])
    return caches["train"], caches.get("val")


def write_report(run: RunFolder, train: TokenCache, val: TokenCache | None) -> None:
    """Write ``logs/data_report.json``: counts, notes and warnings of both splits."""
    report = {"train": train.report, "val": val.report if val else None}
    run.logs.mkdir(parents=True, exist_ok=True)
    temporary = run.data_report.with_name(f".{run.data_report.name}.{uuid.uuid4().hex}")
    temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    temporary.replace(run.data_report)
