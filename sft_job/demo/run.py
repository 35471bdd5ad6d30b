"""``sft-job demo``: make the input, score, train with the real job, score again, show both."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers.utils import logging as transformers_logging

from sft_job.contract import Env, ExitCode, RunFolder
from sft_job.demo.graphs import KINDS, GraphProblem, draw_problems, write_parquet
from sft_job.demo.model import write_base_model
from sft_job.demo.score import Score, score
from sft_job.demo.tokenizer import train_tokenizer
from sft_job.streams import say

RECIPE = Path(__file__).parents[1] / "recipes" / "demo.yaml"
TRAIN_ROWS = 14_400
HELD_OUT_ROWS = 200
SEED = 1
RANKS = 2
SAMPLE_KINDS = ("neighbours", "path")
UNDECODABLE = "\N{REPLACEMENT CHARACTER}"
# It marks a folder as the demo's own, which a second run may replace.
MARKER = ".sft-job-demo"


@dataclass(frozen=True)
class DemoFolder:
    """Where the demo's files lie. Only names them; creates nothing."""

    root: Path

    @property
    def train(self) -> Path:
        """Training rows."""
        return self.root / "input" / "train.parquet"

    @property
    def validation(self) -> Path:
        """Held-out rows."""
        return self.root / "input" / "validation.parquet"

    @property
    def base_model(self) -> Path:
        """Tokenizer and random weights."""
        return self.root / "input" / "model"

    @property
    def run(self) -> RunFolder:
        """The training run."""
        return RunFolder(self.root / "run")

    @property
    def trained_model(self) -> Path:
        """What the training leaves."""
        return self.run.final / "huggingface"


def run_demo(
    folder: Path,
    *,
    train_rows: int = TRAIN_ROWS,
    held_out_rows: int = HELD_OUT_ROWS,
    overrides: Sequence[str] = (),
    console: Console | None = None,
) -> int:
    """Run the demo; the exit code.

    Args:
        folder: everything that the demo makes lies here. An earlier demo's folder is replaced, any other that is not
            empty is refused (exit code 73).
        train_rows: training problems.
        held_out_rows: problems that are scored, none of them trained on.
        overrides: further settings of the training, ``key=value``.
        console: where to show things.
    """
    console = Console(highlight=False) if console is None else console
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    paths = DemoFolder(folder)
    if not _replace(folder):
        say(f"{folder}: not empty, and not made by the demo\n    fix: name another folder\n")
        return ExitCode.CANNOT_CREATE

    _heading(console, f"1. Input: {train_rows:,} graph problems, a tokenizer, a small model of random weights")
    problems = make_input(paths, train_rows, held_out_rows, console)
    _heading(console, f"2. Before training: {held_out_rows} held-out problems")
    before = score(paths.base_model, problems)
    console.print(f"validation loss {before.loss:.3f}, exact match {before.accuracy:.1%}")

    command = train_command(paths, overrides)
    _heading(console, f"3. Training: sft-job train on {RANKS} CPU ranks, Ulysses {RANKS}")
    console.print(Text(f"NPROC_PER_NODE={RANKS} sft-job {' '.join(command[3:])}", style="dim"), soft_wrap=True)
    start = time.monotonic()
    code = _wait(command, train_environment(os.environ))
    if code != ExitCode.DONE:
        return code
    seconds = time.monotonic() - start

    _heading(console, "4. After training")
    after = score(paths.trained_model, problems)
    console.print(results_table(problems, before, after))
    for kind in SAMPLE_KINDS:
        index = next(i for i, problem in enumerate(problems) if problem.kind == kind)
        _show_sample(console, problems[index], before.responses[index], after.responses[index])
    _show_paths(console, paths, seconds)
    return ExitCode.DONE


def make_input(paths: DemoFolder, train_rows: int, held_out_rows: int, console: Console) -> list[GraphProblem]:
    """Write parquet files, tokenizer and base model; the held-out problems."""
    train, held_out = draw_problems(train_rows, held_out_rows, SEED)
    paths.train.parent.mkdir(parents=True)
    write_parquet(train, paths.train)
    write_parquet(held_out, paths.validation)
    tokenizer = train_tokenizer(train, paths.base_model)
    parameters = write_base_model(tokenizer, paths.base_model, SEED)
    console.print(f"{parameters:,} parameters, {len(tokenizer)} tokens in the vocabulary. One of the problems:")
    console.print(_quoted(f"{train[-1].prompt}\n{train[-1].response}"))
    return held_out


def train_command(paths: DemoFolder, overrides: Sequence[str] = ()) -> list[str]:
    """The real command line, with the demo's recipe and paths."""
    settings = {
        "data.train_files": paths.train,
        "data.val_files": paths.validation,
        "model.partial_pretrain": paths.base_model,
        "trainer.default_local_dir": paths.run.root,
    }
    words = [f"{key}={value}" for key, value in settings.items()]
    return [sys.executable, "-m", "sft_job.cli", "train", str(RECIPE), *words, *overrides]


def train_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment for one node of CPU ranks, whatever launcher's variables are set around the demo."""
    ours = {value for name, value in vars(Env).items() if name.isupper()}
    kept = {name: value for name, value in environ.items() if name not in ours and not name.startswith("PET_")}
    return kept | {
        Env.NPROC_PER_NODE: str(RANKS),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",  # threads would only wait for one another over tensors this small
    }


def results_table(problems: Sequence[GraphProblem], before: Score, after: Score) -> Table:
    """Validation loss and exact match, before and after."""
    table = Table(title=f"{len(problems)} held-out problems")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right", style="bold")
    table.add_row("validation loss", f"{before.loss:.3f}", f"{after.loss:.3f}")
    table.add_row("exact match", f"{before.accuracy:.1%}", f"{after.accuracy:.1%}", end_section=True)
    for kind in KINDS:
        shares = (result.accuracy_of(kind, problems) for result in (before, after))
        table.add_row(f"  {kind}", *(f"{share:.0%}" for share in shares))
    return table


def _replace(folder: Path) -> bool:
    """Make the folder anew; False where it holds what the demo did not make."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not (folder / MARKER).is_file():
            return False
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()
    return True


def _wait(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run the training in view; its exit code. Ctrl-C reaches it too: it saves and ends by itself."""
    process = subprocess.Popen(command, env=dict(environment))
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


def _heading(console: Console, text: str) -> None:
    console.print()
    console.print(Text(text, style="bold cyan"))


def _quoted(text: str) -> Text:
    return Text(textwrap.indent(text, "  │ "))


def _show_sample(console: Console, problem: GraphProblem, before: str, after: str) -> None:
    shown = "".join(c if c.isprintable() and c != UNDECODABLE else "·" for c in before)
    console.print()
    console.print(_quoted(problem.prompt))
    console.print(Text.assemble(("before:", "bold"), f" {shown[:60]} ..." if len(shown) > 60 else f" {shown}"))
    console.print(Text.assemble(("after", "bold"), f" (the answer is {problem.answer}):"))
    console.print(_quoted(after))


def _sft_job() -> str:
    """How this user calls the command: by its path where the environment that holds it is not active."""
    here = Path(sys.executable).with_name("sft-job")
    on_path = shutil.which("sft-job")
    return "sft-job" if on_path and Path(on_path).resolve() == here.resolve() else os.path.relpath(here)


def _show_paths(console: Console, paths: DemoFolder, seconds: float) -> None:
    rows = (
        ("trained model", paths.trained_model),
        ("metrics", paths.run.metrics),
        ("settings", paths.run.config),
        ("input", paths.train.parent),
    )
    console.print()
    console.print(f"Training took {seconds:.0f} s. Files:")
    for name, path in rows:
        console.print(Text(f"  {name:<14} {path}"), soft_wrap=True)
    console.print()
    console.print("The same with your own sft_trainer.yaml, parquet files and base model:")
    console.print(
        Text(
            f"  {_sft_job()} train sft_trainer.yaml data.train_files=train.parquet \\\n"
            "    data.val_files=val.parquet model.partial_pretrain=/path/to/base-model \\\n"
            "    trainer.default_local_dir=my-run"
        ),
        soft_wrap=True,
    )
