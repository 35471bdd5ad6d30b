"""``sft-job preview``: from the command line to what is shown, on the same road as training."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from sft_job.config.load import run_folder
from sft_job.config.resolve import Resolution, resolve
from sft_job.config.schema import JobConfig
from sft_job.config.topology import count_gpus
from sft_job.contract import Env, ExitCode
from sft_job.data.cache import TokenCache
from sft_job.data.mixture import Mixture, named_caches
from sft_job.data.prepare import prepare
from sft_job.data.rejected import reason_of
from sft_job.data.spec import CacheSpec, cache_specs
from sft_job.data.tokenizer import load_tokenizer
from sft_job.errors import JobError, Problem, ProblemsError, raise_problems
from sft_job.opening import input_problems
from sft_job.prepare import Progress
from sft_job.preview.html import write_page
from sft_job.preview.json_lines import json_lines
from sft_job.preview.rejected import find_file, no_such_row, reject_reason
from sft_job.preview.report import SetReport, set_report
from sft_job.preview.rows import Pack, PreviewRow, TrainingStream, lone_row
from sft_job.preview.terminal import View, show_lone_row, show_rejected, show_report, show_rows, show_step
from sft_job.preview.text import TokenTexts
from sft_job.streams import say

STDOUT = "-"
# Nobody wraps lines in a pipe.
_PIPE_WIDTH = 200
Chosen = list[tuple[Pack, list[PreviewRow]]]


@dataclass(frozen=True)
class PreviewOptions:
    """What to show, and where.

    Attributes:
        rows: so many rows from the step on.
        row: one row instead: ``FILE:ROW``, or its number in the token cache.
        step: optimizer step, from 1.
        ranks: ranks of the run; None = as ``train`` would start here.
        html: a page to write.
        json: JSON lines to write; ``-`` = standard output.
        report: shows the data report instead of rows.
        tokens: shows where tokens end.
        full: shows long rows whole.
    """

    rows: int = 4
    row: str | None = None
    step: int = 1
    ranks: int | None = None
    html: Path | None = None
    json: str | None = None
    report: bool = False
    tokens: bool = False
    full: bool = False


def preview_job(
    config_arg: str | None, overrides: Sequence[str], environ: Mapping[str, str], options: PreviewOptions
) -> int:
    """Show what a step trains on; the exit code that ``train`` would end with for what was looked at.

    Args:
        config_arg: config file, None = by the environment.
        overrides: ``key=value``.
        environ: environment variables.
        options: what to show.
    """
    for stream in (sys.stdout, sys.stderr):  # a row may hold what the terminal's encoding cannot say
        reconfigure = getattr(stream, "reconfigure", None)  # also of a stream that hides secrets
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
    try:
        _preview(config_arg, overrides, environ, options)
    except JobError as error:
        say(f"{error}\n")
        return error.code
    except KeyboardInterrupt:
        return ExitCode.STOPPED
    except BrokenPipeError:  # `| head` has seen enough
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  for the interpreter's last flush
    return ExitCode.DONE


def _preview(
    config_arg: str | None, overrides: Sequence[str], environ: Mapping[str, str], options: PreviewOptions
) -> None:
    told = Console(stderr=True, highlight=False)
    if options.ranks is not None:
        names = {Env.NPROC_PER_NODE, Env.NNODES, Env.NODE_RANK}
        environ = {key: value for key, value in environ.items() if key.removeprefix("PET_") not in names}
        environ |= {Env.NPROC_PER_NODE: str(options.ranks), "CUDA_VISIBLE_DEVICES": ""}
    resolution = _resolved(config_arg, overrides, environ, options)
    for line in resolution.warnings:
        told.print(f"warning: {line}", markup=False, soft_wrap=True)
    config = resolution.loaded.config
    specs = cache_specs(config, "train")
    spec = specs[0]  # tokenizer and template are the same for all sets
    try:
        caches = prepare(config, run_folder(config), Progress(told), lambda text: told.print(text, markup=False))
    except ProblemsError as error:
        rejected = (
            _rejected_alone(options.row, [*specs, *cache_specs(config, "val")]) if error.code == ExitCode.DATA else None
        )
        if rejected is None:
            raise
        _show_alone(rejected, options, TokenTexts(load_tokenizer(spec.tokenizer, spec.trust_remote_code)))
        return
    texts = TokenTexts(load_tokenizer(spec.tokenizer, spec.trust_remote_code))
    reports = [
        set_report(f"{split} {name}".strip(), cache)
        for split, rows in zip(("train", "val"), caches, strict=True)
        for name, cache in named_caches(rows).items()
    ]
    if options.row is not None and not options.row.isdecimal():
        val = [*specs, *cache_specs(config, "val")]
        spec, file, number = _locate(options.row, val)
        if spec.split == "val" and caches[1] is not None:
            found = _find_at(spec, file, number, caches[1])
            row = lone_row(caches[1], found) if isinstance(found, int) else found
            _show_alone(row, options, texts)
            return
    _show(config, caches[0], resolution, specs, texts, reports, options)


def _resolved(
    config_arg: str | None, overrides: Sequence[str], environ: Mapping[str, str], options: PreviewOptions
) -> Resolution:
    """Settings and files without a fault. A model without weights will do: only its tokenizer is used."""
    resolution = resolve(config_arg, overrides, environ, count_gpus(environ))
    problems = [problem for problem in resolution.problems if problem.code != ExitCode.MODEL]
    left = [problem for problem in resolution.problems if problem.code == ExitCode.MODEL]
    resolution.warnings += [f"train would end with {int(ExitCode.MODEL)}: {problem.text()}" for problem in left]
    if resolution.loaded.readable and resolution.loaded.config.data.train_files and options.row is None:
        problems += input_problems(resolution.loaded)
    if options.row is None and options.rows < 1:
        problems.append(Problem(ExitCode.CONFIG, "--rows", "must be at least 1", value=options.rows))
    for option, value in (("--html", options.html), ("--json", options.json)):
        if value is not None and str(value) != STDOUT and (problem := _unwritable(option, Path(value))):
            problems.append(problem)
    # Faults of the model's folder are told together with others, but alone they leave what is shown here as it is.
    raise_problems([*problems, *left] if problems else [])
    return resolution


def _unwritable(option: str, path: Path) -> Problem | None:
    if path.is_dir():
        return Problem(ExitCode.CANNOT_CREATE, option, "is a folder: name a file", value=str(path))
    if not path.absolute().parent.is_dir():
        return Problem(ExitCode.CANNOT_CREATE, option, "lies in a folder that does not exist", value=str(path))
    return None


def _show(
    config: JobConfig,
    cache: TokenCache | Mixture,
    resolution: Resolution,
    specs: Sequence[CacheSpec],
    texts: TokenTexts,
    reports: Sequence[SetReport],
    options: PreviewOptions,
) -> None:
    stream = TrainingStream(config, cache, resolution.topology.world)
    if not 1 <= options.step <= stream.total_steps:
        rule = f"the run has the steps 1 to {stream.total_steps:,}"
        raise ProblemsError([Problem(ExitCode.CONFIG, "--step", rule, value=options.step)])
    step = options.step
    if options.row is None:
        chosen: Chosen = stream.first_rows(step, options.rows)
    else:
        found = _find(options.row, cache, specs)
        if isinstance(found, PreviewRow):
            _show_alone(found, options, texts)
            return
        pack, row = stream.pack_of(found, step)
        chosen, step = [(pack, [row])], pack.slot.step
    plan = stream.plan(step)
    console = _console(options)
    if options.json is not None:
        lines = json_lines(((pack, row) for pack, rows in chosen for row in rows), texts)
        _write_lines(options.json, lines)
    if options.html is not None:
        _guard(options.html, lambda path: write_page(path, chosen, plan, stream.total_steps, reports, texts))
        console.print(f"wrote {options.html}", markup=False, soft_wrap=True)
    if options.report:
        for report in reports:
            show_report(console, report)
    elif options.json is None and options.html is None:
        show_step(console, plan, stream.total_steps)
        show_rows(console, chosen, texts, _view(console, options))


def _console(options: PreviewOptions) -> Console:
    console = Console(stderr=options.json == STDOUT, highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, _PIPE_WIDTH)
    return console


def _view(console: Console, options: PreviewOptions) -> View:
    marks = not console.is_terminal or console.no_color or console.color_system is None
    return View(marks, options.tokens, options.full)


def _find(text: str, rows: TokenCache | Mixture, specs: Sequence[CacheSpec]) -> int | PreviewRow:
    """A row's number in the cache; a row that is not in it, with the reason."""
    if text.isdecimal():
        if int(text) >= len(rows):
            raise no_such_row(text, "the token cache", len(rows))
        return int(text)
    return _find_at(*_locate(text, specs), rows)


def _find_at(spec: CacheSpec, file: int, number: int, rows: TokenCache | Mixture) -> int | PreviewRow:
    """As ``_find``, for a row of a split's file."""
    caches = named_caches(rows)
    name = spec.source.name if spec.source else ""
    first = sum(len(caches[each]) for each in caches if each < name)
    found = caches[name].find(spec.origins[file], number)
    if found:
        return first + found[0]
    unused = (
        f"beyond data.{spec.split}_max_samples = {spec.max_samples:,}"
        if spec.max_samples >= 0
        else "not in the token cache"
    )
    reason = reason_of(caches[name].rejected, file, number) or reject_reason(spec, file, number) or unused
    return PreviewRow(spec.origins[file], number, reject_reason=reason)


def _locate(text: str, specs: Sequence[CacheSpec]) -> tuple[CacheSpec, int, int]:
    """The data set, the file's index in it and the row's number that ``FILE:ROW`` means; the first set that has it."""
    files = list(dict.fromkeys(file for spec in specs for file in spec.origins))
    file, number = find_file(text, files)
    spec = next(spec for spec in specs if files[file] in spec.origins)
    return spec, spec.origins.index(files[file]), number


def _rejected_alone(text: str | None, specs: Sequence[CacheSpec]) -> PreviewRow | None:
    """The row that was asked for, where it is at fault itself; None where others are."""
    if text is None or re.fullmatch("[0-9]+", text):
        return None
    spec, file, number = _locate(text, specs)
    reason = reject_reason(spec, file, number)
    return None if reason is None else PreviewRow(spec.origins[file], number, reject_reason=reason)


def _show_alone(row: PreviewRow, options: PreviewOptions, texts: TokenTexts) -> None:
    """A row that is in no pack of training: one that is not trained, or one of validation."""
    if options.json is not None:
        _write_lines(options.json, json_lines([(None, row)], texts))
    console = _console(options)
    if options.json != STDOUT:
        if row.reject_reason is not None:
            show_rejected(console, row)
        else:
            show_lone_row(console, row, texts, _view(console, options))
    if options.html is not None:
        console.print(f"{options.html} is not written: the row is in no pack", markup=False, soft_wrap=True)


def _write_lines(target: str, lines: Iterator[str]) -> None:
    if target == STDOUT:
        sys.stdout.writelines(lines)
        sys.stdout.flush()
        return

    def write(path: Path) -> None:
        with path.open("w", encoding="utf-8") as stream:
            stream.writelines(lines)

    _guard(Path(target), write)
    Console(stderr=True, highlight=False).print(f"wrote {target}", markup=False, soft_wrap=True)


def _guard(path: Path, write: Callable[[Path], None]) -> None:
    try:
        write(path)
    except BrokenPipeError:
        raise
    except OSError as error:
        rule = f"cannot be written: {error.strerror or error}"
        raise ProblemsError([Problem(ExitCode.CANNOT_CREATE, str(path), rule)]) from error
