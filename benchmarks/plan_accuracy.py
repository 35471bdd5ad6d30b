"""How good ``sft-job plan`` is: planned beside measured, ``python -m benchmarks.plan_accuracy``; README.md explains.

Twelve configurations of Qwen2.5-7B at its real size: full fine-tuning and LoRA, documents of 4K, 32K and 128K tokens,
one card and two. Each is a run of the job of its own, a few steps long; those for two cards need two.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.plan import Run
from benchmarks.rows import Row, Side
from benchmarks.shapes import SHAPES
from benchmarks.throughput import Bench, machine, run_sitting
from benchmarks.tokens import Tokens
from sft_job.config.schema import JobConfig
from sft_job.errors import Problem
from sft_job.plan.activations import ATTENTION, FULL, NONE, OFFLOAD
from sft_job.plan.cards import Card, find_card
from sft_job.plan.estimate import FITS, TOO_LARGE, Estimate, Rows, estimate, largest_micro
from sft_job.plan.footprint import footprint
from sft_job.plan.prices import with_changes
from sft_job.plan.setup import GIB, Ranks
from sft_job.plan.shape import read_shape

SHAPE = "qwen2.5-7b"
MEMORY_GOAL, TIME_GOAL = 0.08, 0.15
_LORA = {"model.lora_rank": 16, "model.lora_alpha": 32, "model.target_modules": "all-linear"}
_LEVELS = {"nothing": NONE, "all but attention": ATTENTION, "all": FULL, "all, with inputs in host memory": OFFLOAD}


@dataclass(frozen=True)
class Config:
    """One configuration.

    Attributes:
        name: for the table.
        side: how it is run.
        steps: measured ones.
        warmup: steps before them.
    """

    name: str
    side: Side
    steps: int
    warmup: int

    @property
    def row(self) -> Row:
        """For the benchmarks' own runner."""
        return Row(self.name, SHAPE, self.side, (), "planned as measured")


def _configs() -> tuple[Config, ...]:
    found: list[Config] = []
    for cards in (1, 2):
        for length, rows, steps, warmup in ((4096, 4, 4, 2), (32768, 1, 2, 1), (131_072, 1, 1, 1)):
            for kind, trained in (("full", {}), ("lora", _LORA)):
                settings: dict[str, Any] = {"data.micro_batch_size_per_gpu": rows, **trained}
                tokens = Tokens(rows, length)
                if cards == 2 and length == 4096:
                    tokens = Tokens(2 * rows, length)
                elif cards == 2:
                    settings["ulysses_sequence_parallel_size"] = 2
                if length == 131_072:
                    # A step takes half a minute: one rehearsal instead of the four in which auto chooses.
                    settings["model.recompute"] = "full"
                side = Side(f"{kind}, {length // 1024}K, {cards}", "ours", tokens, cards, settings)
                name = f"{kind}_{length // 1024}k_{cards}"
                found.append(Config(name, side, steps, warmup))
    return tuple(found)


CONFIGS = _configs()


def planned(config: Config, card: Card, shape: str = SHAPE) -> Estimate:
    """What the plan says of a configuration, with the settings that ``ours_side`` gives it."""
    tokens = config.side.tokens
    settings = {
        "data.train_batch_size": tokens.rows,
        "data.max_length": tokens.length,
        "model.fsdp_config.model_dtype": "bf16",
        "trainer.async_save": False,
        "trainer.recovery_minutes": 0,
        **config.side.settings,
    }
    lengths = np.full(tokens.rows, tokens.length, dtype=np.int32)
    rows = Rows(lengths, None, True, tokens.length, 1.0, "benchmark")
    asked = with_changes(JobConfig(), settings)
    return estimate(asked, read_shape(SHAPES[shape]), card, Ranks(config.side.ranks), rows)


def chosen_levels(said: Sequence[str]) -> list[str] | None:
    """What the run recomputed, from its own line; None where it said nothing.

    Args:
        said: lines of its output.
    """
    for line in said:
        found = re.search(r"recomputation of \d+ blocks: (.*); peak", line)
        if found:
            # Their texts have commas of their own: a number begins each.
            counts = [part.partition(" ") for part in re.split(r", (?=\d)", found[1])]
            by_level = {_LEVELS[text]: int(count) for count, _, text in counts}
            return [level for level in (OFFLOAD, FULL, ATTENTION, NONE) for _ in range(by_level.get(level, 0))]
    return None


def compared(config: Config, plan: Estimate, run: Mapping[str, Any] | None) -> dict[str, Any]:
    """One line of the table: planned, measured, and how far they are apart.

    Args:
        config: what ran.
        plan: what was said of it.
        run: what ``throughput`` noted; None = it was not run.
    """
    assert plan.step is not None
    line: dict[str, Any] = {
        "name": config.name,
        "verdict": plan.verdict,
        "planned_gib": plan.memory.peak / GIB,
        "planned_least_gib": plan.least / GIB,
        "planned_seconds": plan.step.seconds,
        "planned_levels": {level: plan.memory.levels.count(level) for level in dict.fromkeys(plan.memory.levels)},
        "state": "not run" if run is None else run["state"],
    }
    if run is None:
        return line
    figures = run["figures"]
    levels = chosen_levels(run.get("said", ()))
    if levels is not None:
        shape = read_shape(SHAPES[run["shape"]])
        asked = _same_levels(config, plan, shape, levels)
        line |= {"levels": {level: levels.count(level) for level in dict.fromkeys(levels)}, "planned_gib": asked}
    memory, seconds = figures.get("memory") or {}, figures.get("step_seconds")
    peak = memory.get("allocated_gib_after_warmup") or memory.get("allocated_gib")
    if peak:
        line |= {"measured_gib": peak, "memory_off": line["planned_gib"] / peak - 1}
    if seconds:
        line |= {"measured_seconds": seconds["median"], "time_off": plan.step.seconds / seconds["median"] - 1}
    # The one mistake that must not happen.
    line["said_to_fit_and_did_not"] = plan.verdict == FITS and run["state"] == "out of memory"
    return line


def _same_levels(config: Config, plan: Estimate, shape: Any, levels: Sequence[str]) -> float:
    """The peak by the plan with the recomputation that the run has chosen."""
    lengths = np.full(config.side.tokens.rows, config.side.tokens.length, dtype=np.int32)
    settings = {"data.train_batch_size": len(lengths), **config.side.settings}
    rows = Rows(lengths, None, True, int(lengths[0]), 1.0, "")
    micro, _ = largest_micro(with_changes(JobConfig(), settings), rows)
    return footprint(shape, plan.setup, micro, levels).peak / GIB


def table(record: Mapping[str, Any]) -> str:
    """Markdown."""
    lines = [
        f"{record['machine']['gpu']}, {record['started']}, commit {record['machine']['commit']}; planned for "
        f"{record['card']}; model {record['shape']}, random weights, all layers",
        "",
        "| configuration | verdict | planned GiB | measured | off | planned s | measured | off | state |",
        "|---|---|---|---|---|---|---|---|---|",
    ]

    def shown(line: Mapping[str, Any], name: str, form: str) -> str:
        return format(line[name], form) if name in line else "-"

    for line in record["lines"]:
        cells = [line["name"], line["verdict"], f"{line['planned_gib']:.1f}", shown(line, "measured_gib", ".1f")]
        cells += [shown(line, "memory_off", "+.1%"), f"{line['planned_seconds']:.2f}"]
        cells += [shown(line, "measured_seconds", ".2f"), shown(line, "time_off", "+.1%"), line["state"]]
        lines.append(f"| {' | '.join(cells)} |")
    done = [line for line in record["lines"] if "memory_off" in line]
    off = [line["name"] for line in done if abs(line["memory_off"]) > MEMORY_GOAL]
    off += [line["name"] for line in done if abs(line.get("time_off", 0.0)) > TIME_GOAL]
    wrong = [line["name"] for line in record["lines"] if line.get("said_to_fit_and_did_not")]
    lines += ["", f"goals: {MEMORY_GOAL:.0%} of memory, {TIME_GOAL:.0%} of time; {len(done)} measured"]
    lines.append(f"beyond them: {', '.join(dict.fromkeys(off)) or 'none'}; said to fit and did not: {wrong or 'none'}")
    return "\n".join(lines) + "\n"


class _Sitting(Bench):
    """Runs of the throughput benchmark, whose results go into another table."""

    def write(self, rows: Sequence[Row]) -> None:
        """Everything is known by now from ``record``; the table is made by ``_write``."""


def _write(out: Path, record: dict[str, Any]) -> None:
    (out / "plan_accuracy.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (out / "plan_accuracy.md").write_text(table(record), encoding="utf-8")


def _cards_here() -> tuple[str | None, int]:
    import torch  # noqa: PLC0415  not for a dry run

    count = torch.cuda.device_count()
    return (torch.cuda.get_device_name(0) if count else None), count


def parser() -> argparse.ArgumentParser:
    """The command line."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(config.name for config in CONFIGS)
    asked.add_argument("--configs", default="", help=f"of {names}; default: those that the cards here allow")
    asked.add_argument("--card", default=None, help="as sft-job plan --gpu; default: the one here")
    asked.add_argument("--dry", action="store_true", help="only plan; needs no GPU")
    asked.add_argument("--seconds-limit", type=float, default=530, help="for everything together")
    asked.add_argument("--out", type=Path, default=None, help="folder of the results; $OUT, or benchmarks/results")
    asked.add_argument("--work", type=Path, default=None, help="folder for models and tokens; kept where it is named")
    return asked


def _chosen(names: str, cards: int, dry: bool) -> list[Config]:
    by_name = {config.name: config for config in CONFIGS}
    asked = names.split(",") if names else list(by_name)
    wrong = [name for name in asked if name not in by_name]
    if wrong:
        raise SystemExit(f"no such configuration: {', '.join(wrong)}; there are {', '.join(by_name)}")
    if names or dry:
        return [by_name[name] for name in asked]
    # One call measures those for one card, or where there are two cards those for two.
    return [config for config in CONFIGS if config.side.ranks == min(cards, 2)]


def main(words: Sequence[str] | None = None) -> int:
    """Plan, measure, compare."""
    arguments, began = parser().parse_args(words), time.monotonic()
    here, cards = (None, 0) if arguments.dry else _cards_here()
    card = find_card(arguments.card or here or "h200")
    if isinstance(card, Problem):
        raise SystemExit(card.text())
    if not arguments.dry and not cards:
        raise SystemExit("no GPU is here: --dry only plans")
    configs = _chosen(arguments.configs, cards, arguments.dry)
    out = arguments.out or Path(os.environ.get("OUT") or "benchmarks/results")
    out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(on_gpu=not arguments.dry),
        "card": card.name,
        "shape": SHAPE,
        "goals": {"memory": MEMORY_GOAL, "time": TIME_GOAL},
        "lines": [],
        "runs": [],
    }
    work = arguments.work or Path(tempfile.mkdtemp(prefix="plan_accuracy_"))
    work.mkdir(parents=True, exist_ok=True)
    sitting = _Sitting(work, out, True, began + arguments.seconds_limit, {"runs": record["runs"]})
    try:
        for config in configs:
            plan = planned(config, card)
            run = None
            # What does not fit by the plan is run too: that it fits would be a mistake as well, if a smaller one.
            if not arguments.dry:
                once = Run(config.name, "A", config.side, config.steps, config.warmup)
                run_sitting(sitting, [config.row], [once], config.steps + config.warmup + 1)
                run = record["runs"][-1]
            record["lines"].append(compared(config, plan, run))
            _write(out, record)
    finally:
        if arguments.work is None:
            shutil.rmtree(work, ignore_errors=True)
    sys.stdout.write(table(record))
    states = {line["state"] for line in record["lines"] if line["verdict"] != TOO_LARGE}
    return 0 if states <= {"done", "not run"} else 1


if __name__ == "__main__":
    sys.exit(main())
