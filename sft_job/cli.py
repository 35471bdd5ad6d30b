"""The command ``sft-job``."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sft_job import __version__
from sft_job.config.keys import keys_table
from sft_job.config.secrets import secrets_hidden
from sft_job.contract import ExitCode
from sft_job.errors import JobError
from sft_job.streams import settle_streams
from sft_job.version import commit

app = typer.Typer(
    help="Supervised fine-tuning of language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Settings = Annotated[
    list[str] | None,
    typer.Argument(
        help="A config file (else $CONFIG_PATH/$CONFIG_NAME), then settings as key=value.", show_default=False
    ),
]


def split_settings(given: list[str] | None) -> tuple[str | None, list[str]]:
    """The config file, if the first word is one, and the overrides."""
    words = list(given or [])
    if words and "=" not in words[0]:
        return words[0], words[1:]
    return None, words


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sft-job {__version__} (commit {commit(os.environ) or 'unknown'})")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show version and commit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Supervised fine-tuning of language models."""


@app.command()
def train(
    settings: Settings = None,
    check: Annotated[bool, typer.Option("--check", help="Only look at everything; see `sft-job check`.")] = False,
) -> None:
    """Train: what the image's entry point runs on each node."""
    config, overrides = split_settings(settings)
    if check:
        from sft_job.check import check_job  # noqa: PLC0415  a command loads only what it needs

        raise typer.Exit(check_job(config, overrides, os.environ))
    from sft_job.supervisor import Supervisor  # noqa: PLC0415

    raise typer.Exit(Supervisor(Console(), os.environ).train(config, overrides))


@app.command("check")
def check_command(
    settings: Settings = None,
    full: Annotated[bool, typer.Option("--full", help="Render every row instead of 1,000.")] = False,
) -> None:
    """Look at config, data files, template and disk before a GPU is booked; the same exit codes as train."""
    from sft_job.check import check_job  # noqa: PLC0415

    config, overrides = split_settings(settings)
    raise typer.Exit(check_job(config, overrides, os.environ, full=full))


@app.command()
def preflight(
    settings: Settings = None,
    limit: Annotated[
        float, typer.Option("--limit", min=10, help="Seconds after which there is an answer, whoever is missing.")
    ] = 60,
) -> None:
    """Run on each node of an allocation, as train is: do the nodes reach each other, and see the same files?"""
    from sft_job.preflight_job import preflight_job  # noqa: PLC0415

    config, overrides = split_settings(settings)
    raise typer.Exit(preflight_job(config, overrides, os.environ, limit))


@app.command()
def preview(
    settings: Settings = None,
    rows: Annotated[int, typer.Option("--rows", help="Rows to show, in the order of ranks and micro-batches.")] = 4,
    row: Annotated[str | None, typer.Option("--row", help="One row: FILE:ROW, or its number in the cache.")] = None,
    step: Annotated[int, typer.Option("--step", help="Optimizer step, from 1.")] = 1,
    ranks: Annotated[int | None, typer.Option("--ranks", min=1, help="Ranks of the run; default: as here.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write one HTML page that needs nothing else.")] = None,
    json: Annotated[str | None, typer.Option("--json", help="Write JSON lines; - = standard output.")] = None,
    report: Annotated[bool, typer.Option("--report", help="Show the data report instead of rows.")] = False,
    tokens: Annotated[bool, typer.Option("--tokens", help="Show where tokens end.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Show long rows whole.")] = False,
) -> None:
    """Show the tokens that a step trains on: trained ones marked, packed neighbours, positions; no GPU, no weights."""
    from sft_job.preview.command import PreviewOptions, preview_job  # noqa: PLC0415  imports torch

    config, overrides = split_settings(settings)
    options = PreviewOptions(rows, row, step, ranks, html, json, report, tokens, full)
    raise typer.Exit(preview_job(config, overrides, os.environ, options))


@app.command()
def plan(
    settings: Settings = None,
    gpus: Annotated[int | None, typer.Option("--gpus", min=1, help="GPUs of each node; default: as here.")] = None,
    nodes: Annotated[int | None, typer.Option("--nodes", min=1, help="Nodes; default: as here.")] = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="Card: h200, h100, a100, ...; default: the one here.")
    ] = None,
    memory: Annotated[
        float | None, typer.Option("--gpu-memory", min=1, help="GiB that tensors can have, instead of the card's.")
    ] = None,
    host: Annotated[
        float | None, typer.Option("--host-memory", min=1, help="GiB of memory of each node; default: as here.")
    ] = None,
    length: Annotated[
        int | None, typer.Option("--length", min=1, help="Tokens of every row, instead of the data's own.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object, for scripts.")] = False,
) -> None:
    """Say what a run will take in memory and time, what each setting costs, and what would fit; no GPU, no weights.

    Exit codes: 0 where it fits, 88 where it does not, 2, 65 and 66 as check.
    """
    from sft_job.plan.command import PlanOptions, plan_job  # noqa: PLC0415  a command loads only what it needs

    config, overrides = split_settings(settings)
    raise typer.Exit(plan_job(config, overrides, os.environ, PlanOptions(gpus, nodes, gpu, memory, length, json, host)))


@app.command()
def status(
    run: Annotated[
        str | None,
        typer.Argument(
            help="A run folder, its CHECKPOINT_DIR, or the id of a submitted job; default: $CHECKPOINT_DIR.",
            metavar="[RUN|JOBID]",
            show_default=False,
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object, for scripts.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte of the newest checkpoint.")] = False,
) -> None:
    """Show how a run stands: state, step, loss, checkpoint, restarts with their causes, where the logs are."""
    from sft_job.status.command import run_status  # noqa: PLC0415  a command loads only what it needs

    raise typer.Exit(run_status(run, os.environ, as_json=json, verify=verify))


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder (global_step_N) or a run folder.")],
    output: Annotated[Path, typer.Argument(help="Folder to write; must not exist or be empty.")],
    dtype: Annotated[str | None, typer.Option(help="bf16, fp32 or fp64; default: as trained.")] = None,
    base: Annotated[Path | None, typer.Option(help="Base model folder, if it has moved.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Of a LoRA run: base and adapters in one model.")] = False,
) -> None:
    """Write a checkpoint as a folder that Transformers loads."""
    from sft_job.export import export_checkpoint  # noqa: PLC0415  imports torch

    try:
        notes = export_checkpoint(checkpoint, output, dtype, base, merge=merge)
    except JobError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(error.code) from error
    typer.echo("\n".join([f"wrote {output}", *notes]))


@app.command()
def keys() -> None:
    """List every setting as a Markdown table: its default and what it does, or why it does nothing."""
    typer.echo(keys_table(), nl=False)


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="Folder for all that the demo makes; replaced.")] = Path("demo-run"),
) -> None:
    """Make graph problems and a small model, train it on two CPU ranks, show what it learned."""
    from sft_job.demo.run import run_demo  # noqa: PLC0415  imports torch

    raise typer.Exit(run_demo(folder))


submit_app = typer.Typer(help="Submit a job file to a scheduler.", no_args_is_help=True)
app.add_typer(submit_app, name="submit")


@submit_app.callback()
def _submit() -> None:
    """Submit a job file (job.yaml) to a scheduler."""


@submit_app.command("docker")
def submit_docker(
    job_file: Annotated[Path, typer.Argument(help="The job file (job.yaml).")],
    settings: Annotated[
        list[str] | None, typer.Argument(help="Settings of the job file or of the run, as key=value.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the engine's command and the plan only.")] = False,
) -> None:
    """Start a container on this machine; `docker stop` saves."""
    from deploy.docker.cli import submit  # noqa: PLC0415  the one place that knows a launcher

    raise typer.Exit(submit(job_file, settings or [], dry_run=dry_run))


@submit_app.command("slurm")
def submit_slurm(
    job_file: Annotated[Path, typer.Argument(help="The job file (job.yaml).")],
    settings: Annotated[
        list[str] | None, typer.Argument(help="Settings of the job file or of the run, as key=value.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the sbatch script and the plan only.")] = False,
    preflight: Annotated[
        bool, typer.Option("--preflight", help="Only look whether such nodes are fit; waits for the answer.")
    ] = False,
) -> None:
    """Submit to Slurm: saves and queues itself again at time limits, preemptions and lost nodes."""
    from slurm.cli import submit  # noqa: PLC0415  the one place that knows a launcher

    raise typer.Exit(submit(job_file, settings or [], dry_run=dry_run, preflight=preflight))


@submit_app.command("kubernetes")
def submit_kubernetes(
    job_file: Annotated[Path, typer.Argument(help="The job file (job.yaml).")],
    settings: Annotated[
        list[str] | None, typer.Argument(help="Settings of the job file or of the run, as key=value.")
    ] = None,
    kind: Annotated[str | None, typer.Option("--kind", help="pytorchjob, trainjob or job.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the manifests only, as YAML.")] = False,
) -> None:
    """Submit to Kubernetes: PyTorchJob, TrainJob or an Indexed Job, checked and applied by kubectl."""
    from deploy.kubernetes.cli import submit  # noqa: PLC0415  a command loads only what it needs

    raise typer.Exit(submit(job_file, settings or [], kind=kind, dry_run=dry_run))


def main() -> None:
    """Entry point; whatever is not foreseen ends with 1, a line, and its traceback in a file."""
    try:
        with secrets_hidden(os.environ) as mask:
            try:
                app(prog_name="sft-job")
            except Exception as error:
                with tempfile.NamedTemporaryFile("w", prefix="sft_job_bug_", suffix=".log", delete=False) as log:
                    log.write(mask.text(traceback.format_exc()))
                typer.echo(
                    f"a bug in sft_job: {type(error).__name__}: {error}\n    its traceback: {log.name}", err=True
                )
                sys.exit(ExitCode.BUG)
    finally:
        settle_streams()


if __name__ == "__main__":
    sys.exit(main())
