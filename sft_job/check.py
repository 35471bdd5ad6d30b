"""``sft-job check``: everything that can be known before a GPU is booked, with the exit codes of ``train``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from sft_job.checkpoint.start import find_start
from sft_job.config.load import origins_text, run_folder
from sft_job.config.resolve import Resolution, resolve
from sft_job.config.schema import JobConfig
from sft_job.config.sets import SetEntry
from sft_job.config.topology import count_gpus
from sft_job.contract import ExitCode
from sft_job.data.counts import control_tokens_note
from sft_job.data.sample import check_all, check_sample
from sft_job.data.spec import CacheSpec, Split, cache_specs
from sft_job.data.template_check import check_templates
from sft_job.errors import JobError, Problem, ProblemsError, problems_text, worst_code
from sft_job.model.supported import check_architecture
from sft_job.opening import input_problems
from sft_job.preflight.space import free_space, gib, space_needed
from sft_job.streams import say

SAMPLE_ROWS = 1000


def check_job(
    config_arg: str | None, overrides: Sequence[str], environ: Mapping[str, str], *, full: bool = False
) -> int:
    """Look at settings, data files, template, a sample of the rows and the disk; no weights are read.

    Args:
        config_arg: config file, None = by the environment.
        overrides: ``key=value``.
        environ: environment variables.
        full: render every row instead of a sample.

    Returns:
        The exit code that ``train`` would end with for what was looked at.
    """
    console = Console()
    resolution = resolve(config_arg, overrides, environ, count_gpus(environ))
    problems = list(resolution.problems)
    loaded = resolution.loaded
    if loaded.readable:
        console.print(origins_text(loaded), markup=False, highlight=False)
        for line in (*loaded.mappings, *loaded.ignored):
            console.print(f"note: {line}", markup=False, highlight=False)
        if loaded.config.data.train_files:
            problems += input_problems(loaded)
    table = Table(box=None, show_header=False, pad_edge=False)
    if not problems:
        problems += _check_start(loaded.config)
        table.add_row("layout", _layout_text(resolution))
        problems += _check_template(loaded.config, table)
        splits: tuple[Split, Split] = ("train", "val")
        for split in splits:
            problems += _check_split(loaded.config, split, table, full)
        problems += _check_disk(resolution, table)
        console.print(table)
    for line in resolution.warnings:
        console.print(f"warning: {line}", markup=False, highlight=False)
    # A template that cannot be used is met again in each split.
    problems = [problem for place, problem in enumerate(problems) if problem not in problems[:place]]
    if problems:
        say(problems_text(problems) + "\n")
        return worst_code(problems)
    console.print("ready to train", highlight=False)
    return ExitCode.DONE


def _layout_text(resolution: Resolution) -> str:
    world, ulysses = resolution.topology.world, resolution.loaded.config.ulysses_sequence_parallel_size
    model = resolution.model
    kind = f", {model.model_type}: {model.num_hidden_layers} blocks" if model else ""
    return f"{world} ranks = {world // ulysses} data-parallel x {ulysses} ulysses{kind}"


def _check_start(config: JobConfig) -> list[Problem]:
    """The architecture, and what the run folder holds."""
    try:
        check_architecture(config.model)
        find_start(config, run_folder(config))
    except ProblemsError as error:
        return list(error.problems)
    except JobError as error:
        return [Problem(error.code, "run", str(error))]
    return []


def _check_template(config: JobConfig, table: Table) -> list[Problem]:
    try:
        report = check_templates([*cache_specs(config, "train"), *cache_specs(config, "val")])
    except ProblemsError:  # told of with the rows
        return []
    if report.text():
        table.add_row("template", report.text())
    for line in report.warnings:
        table.add_row("", f"warning: {line}")
    return report.problems


def _check_split(config: JobConfig, split: Split, table: Table, full: bool) -> list[Problem]:
    """Lines for each data set of a split."""
    try:
        specs = cache_specs(config, split)
    except ProblemsError as error:
        return list(error.problems)
    if not specs:
        table.add_row(split, "none")
    problems: list[Problem] = []
    for spec in specs:
        try:
            problems += _check_set(config, spec, table, full)
        except ProblemsError as error:
            problems += error.problems
        except JobError as error:
            problems.append(Problem(error.code, spec.files_option, str(error)))
    return problems


def _check_set(config: JobConfig, spec: CacheSpec, table: Table, full: bool) -> list[Problem]:
    allowed = config.data.max_rejected_fraction
    looked = check_all(spec, allowed, config.data.num_workers) if full else check_sample(spec, SAMPLE_ROWS, allowed)
    counts = looked.counts
    table.add_row(
        f"{spec.split} {spec.source.name}{_share(spec.source.entry)}" if spec.source else spec.split,
        f"{len(spec.files):,} files; of {counts.rows_read:,} rows looked at: longest {counts.longest_row:,} tokens, "
        f"{counts.rows_truncated:,} truncated, {counts.rows_without_target:,} without a token to train on, "
        f"{counts.rows_dropped:,} dropped, {counts.rows_rejected:,} rejected",
    )
    if note := control_tokens_note(counts):
        table.add_row("", note)
    if looked.warning:
        table.add_row("warning", looked.warning)
    if spec.split == "train":
        for note in looked.notes if spec.custom else ():
            table.add_row("rows", note)
    return looked.problems


def _share(entry: SetEntry) -> str:
    if entry.weight is not None:
        return f", weight {entry.weight:g}"
    return f", repeat {entry.repeat:g}" if entry.repeat is not None else ""


def _check_disk(resolution: Resolution, table: Table) -> list[Problem]:
    """Room for the token cache, one checkpoint beside the one it replaces, and the export."""
    there, free = free_space(run_folder(resolution.loaded.config).root)
    needed = space_needed(resolution.loaded.config, resolution.model)
    table.add_row("disk", f"{gib(free)} free at {there}; needed about {needed.text()}")
    if needed.total <= free:
        return []
    rule = f"{there} has {gib(free)} free, the run needs about {gib(needed.total)}"
    return [Problem(ExitCode.CANNOT_CREATE, "disk", rule, "free space, or another CHECKPOINT_DIR")]
