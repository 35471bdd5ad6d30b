"""``sft-job plan``: from the command line to the tables."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from sft_job.config.model_folder import read_model_folder
from sft_job.config.resolve import Resolution, resolve
from sft_job.config.topology import count_gpus
from sft_job.contract import Env, ExitCode
from sft_job.errors import Problem, ProblemsError, raise_problems
from sft_job.plan.cards import Card, card_like, find_card
from sft_job.plan.estimate import FITS, TOO_LARGE, Rows
from sft_job.plan.prices import Case, longest_that_fits, prices, smallest_change
from sft_job.plan.setup import GIB, Ranks
from sft_job.plan.shape import KNOWN, Shape, read_shape
from sft_job.plan.show import plan_json, show_plan
from sft_job.processes import host_room
from sft_job.streams import say

# Nobody wraps lines in a pipe.
_PIPE_WIDTH = 200
_DRIVER = Path("/proc/driver/nvidia/gpus")
_UNNAMED = "h100"


@dataclass(frozen=True)
class PlanOptions:
    """For which machine, and how it is shown.

    Attributes:
        gpus: of each node; None = as ``train`` would find them here, else as the settings say.
        nodes: of the run; None likewise.
        gpu: name of the card; None = the one that is here, else an H100.
        memory: GiB that tensors can have on it, instead of the card's.
        length: tokens of every row, instead of the data's own.
        json: one JSON object instead of tables.
        host: GiB of memory of each node; None = that of this machine where the card is the one here, else unknown.
    """

    gpus: int | None = None
    nodes: int | None = None
    gpu: str | None = None
    memory: float | None = None
    length: int | None = None
    json: bool = False
    host: float | None = None


def plan_job(config_arg: str | None, overrides: Sequence[str], environ: Mapping[str, str], options: PlanOptions) -> int:
    """Show what a run will take.

    Args:
        config_arg: config file, None = by the environment.
        overrides: ``key=value``.
        environ: environment variables.
        options: machine and form.

    Returns:
        0 where the run fits, also tightly; 88 where it does not, as ``train`` would end; 2, 65, 66 for bad input.
    """
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
    try:
        case, notes = _case(config_arg, overrides, environ, options)
        found = case.estimate()
        remedy = smallest_change(case) if found.verdict != FITS else None
        changes = prices(case)
        if options.json:
            console.print(plan_json(case, found, changes, remedy, notes), markup=False, soft_wrap=True)
        else:
            show_plan(case, found, changes, remedy, longest_that_fits(case), notes, console)
    except ProblemsError as error:
        say(f"{error}\n")
        return error.code
    except BrokenPipeError:  # `| head` has seen enough
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  for the interpreter's last flush
        return ExitCode.DONE
    return ExitCode.OUT_OF_MEMORY if found.verdict == TOO_LARGE else ExitCode.DONE


def _case(
    config_arg: str | None, overrides: Sequence[str], environ: Mapping[str, str], options: PlanOptions
) -> tuple[Case, list[str]]:
    problems: list[Problem] = []
    card, notes = _card(options, problems)
    resolution = _resolved(config_arg, overrides, environ, options)
    if not resolution.loaded.config.trainer.default_local_dir and not environ.get(Env.CHECKPOINT_DIR):
        # Nothing is written: a plan needs no run folder.
        resolution = _resolved(config_arg, overrides, {**environ, Env.CHECKPOINT_DIR: str(Path.cwd())}, options)
    problems += resolution.problems
    shape: Shape | None = None
    if resolution.model is not None:
        shape = _shape(resolution, problems)
    raise_problems(problems)
    if shape is None or card is None:
        raise RuntimeError("no shape and no problem that says why")
    config, topology = resolution.loaded.config, resolution.topology
    if shape.kind not in KNOWN:
        notes.append(f"parts of a {shape.kind} are not known here: its blocks are taken for a llama's")
    notes += resolution.warnings
    rows = _rows(resolution, options)
    host = _host(options, card)
    return Case(config, shape, card, Ranks(topology.nproc_per_node, topology.nnodes, host), rows), notes


def _host(options: PlanOptions, card: Card) -> float | None:
    """Bytes of a node's memory; of this machine's what a run would find free."""
    if options.host is not None:
        return options.host * GIB
    here = _card_here()
    if here is None or card_like(here).name != card.name:
        return None
    return host_room()


def _card(options: PlanOptions, problems: list[Problem]) -> tuple[Card | None, list[str]]:
    notes: list[str] = []
    name = options.gpu or _card_here()
    if name is None:
        name = _UNNAMED
        notes.append(f"no card was named (--gpu) and none is here: planned for {name}")
    card = find_card(name)
    if isinstance(card, Problem) and options.gpu is None:
        # Nobody asked for it: it is merely here.
        card = card_like(name)
        notes.append(
            f"there are no figures for {name}: planned as {card.title} with {options.memory or card.memory:.1f} GiB; "
            "--gpu and --gpu-memory tell better"
        )
    if isinstance(card, Problem):
        problems.append(card)
        return None, notes
    if not card.measured:
        notes.append(f"no run of this job was measured on {card.title}: its times are scaled from other cards'")
    return (replace(card, memory=options.memory) if options.memory else card), notes


def _card_here() -> str | None:
    try:
        texts = [path.read_text(encoding="utf-8") for path in sorted(_DRIVER.glob("*/information"))]
    except OSError:
        return None
    names = [
        line.partition(":")[2].strip() for text in texts for line in text.splitlines() if line.startswith("Model:")
    ]
    return names[0] if names else None


def _resolved(
    config_arg: str | None, overrides: Sequence[str], environ: Mapping[str, str], options: PlanOptions
) -> Resolution:
    """The settings on the ranks that are planned for."""
    gpus, nodes, here = options.gpus, options.nodes, count_gpus(environ)
    said = any(environ.get(name) for name in (Env.NPROC_PER_NODE, Env.NNODES, "PET_NPROC_PER_NODE", "PET_NNODES"))
    if gpus is None and nodes is None and (said or here):
        return resolve(config_arg, overrides, environ, here, need_weights=False)
    if gpus is None or nodes is None:
        # On a login node nobody says more than the settings do.
        first = resolve(config_arg, overrides, _on(environ, gpus or 1, nodes or 1), gpus or 1, need_weights=False)
        trainer, origin = first.loaded.config.trainer, first.loaded.origin
        gpus = gpus or (trainer.n_gpus_per_node if origin("trainer.n_gpus_per_node") else here or 1)
        nodes = nodes or (trainer.nnodes if origin("trainer.nnodes") else 1)
    return resolve(config_arg, overrides, _on(environ, max(1, gpus), max(1, nodes)), max(1, gpus), need_weights=False)


def _on(environ: Mapping[str, str], gpus: int, nodes: int) -> dict[str, str]:
    """The environment as a launcher of so many GPUs would set it."""
    kept = {name: value for name, value in environ.items() if not name.startswith("PET_")}
    first = {Env.NODE_RANK: "0", Env.MASTER_ADDR: "127.0.0.1", Env.MASTER_PORT: "29500"}
    return {**kept, **first, Env.NPROC_PER_NODE: str(gpus), Env.NNODES: str(nodes)}


def _shape(resolution: Resolution, problems: list[Problem]) -> Shape | None:
    model = resolution.model
    assert model is not None
    try:
        config = json.loads((model.path / "config.json").read_text(encoding="utf-8-sig"))
        shape = read_shape(config)
        if shape.kind in KNOWN:
            return shape
        # Parts that are not known are counted in the files of weights, where there are any.
        counted, _ = read_model_folder(str(model.path), "", need_weights=True)
        return read_shape(config, counted.parameters if counted else 0)
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        rule = f"config.json does not name the sizes of a decoder that plan knows: {type(error).__name__} {error}"
        fix = "plan knows hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, vocab_size"
        problems.append(Problem(ExitCode.MODEL, "model.partial_pretrain", rule, fix, str(model.path)))
        return None


def _rows(resolution: Resolution, options: PlanOptions) -> Rows:
    # Imports tokenizers where there is data to look at.
    from sft_job.plan.lengths import read_rows, told_rows  # noqa: PLC0415

    config = resolution.loaded.config
    return told_rows(config, options.length) if options.length else read_rows(config)
