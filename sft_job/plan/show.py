"""A plan on a screen, and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sft_job.metrics.console import duration
from sft_job.plan.activations import ATTENTION, FULL, NONE, OFFLOAD
from sft_job.plan.estimate import FITS, MARGIN, TIGHT, TOO_LARGE, Estimate
from sft_job.plan.footprint import STATE_COPY
from sft_job.plan.prices import Case, Price, Remedy
from sft_job.plan.setup import GIB
from sft_job.plan.shape import KNOWN

_WIDE = 150
"""Columns from which tables stand beside each other."""
_STYLES = {FITS: "bold green", TIGHT: "bold yellow"}
_LEVELS = {NONE: "nothing", ATTENTION: "all but attention", FULL: "all", OFFLOAD: "all, inputs in host memory"}
_SUMS = {False: ", whole on each rank", True: ", in each rank's shard alone"}
_DTYPES = {2: "bf16", 4: "fp32", 8: "fp64"}


def tokens_per_second(case: Case, found: Estimate) -> float:
    """Real tokens a second and GPU."""
    return found.step.tokens / found.step.seconds / case.ranks.world if found.step else 0.0


def of_ceiling(case: Case, found: Estimate) -> float:
    """Model FLOPs over what the card's matrix products reach."""
    if found.step is None:
        return 0.0
    return found.step.flops / found.step.seconds / case.ranks.world / (case.card.ceiling * 1e12)


def plan_json(case: Case, found: Estimate, changes: list[Price], remedy: Remedy | None, notes: list[str]) -> str:
    """One object with everything that the tables show; memory in GiB, times in seconds."""
    setup, levels = found.setup, found.memory.levels
    record: dict[str, Any] = {
        "verdict": found.verdict,
        "card": case.card.name,
        "card_measured": case.card.measured,
        "ranks": {
            "gpus": case.ranks.gpus,
            "nodes": case.ranks.nodes,
            "data_parallel": setup.dp,
            "ulysses": setup.ulysses,
            "shards": setup.shards,
        },
        "parameters": case.shape.parameters,
        "trained_parameters": _trained(case, found),
        "largest_micro_batch": {"tokens_per_rank": found.micro.tokens, "longest_document": found.micro.longest},
        "recompute": {level: levels.count(level) for level in dict.fromkeys(levels)},
        "memory_gib": _memory_record(found),
        "data": {"source": case.rows.source, "rows": case.rows.total, "exact": case.rows.exact},
        "step": _step_record(case, found),
        "run": None if found.run is None else {**asdict(found.run), "seconds": found.run.total},
        "prices": [_price_record(price) for price in changes],
        "smallest_change": None
        if remedy is None
        else {"change": remedy.words(), "note": remedy.note, "peak_gib": _gib(remedy.found.memory.peak)},
        "notes": notes,
    }
    return json.dumps(record, indent=1)


def _memory_record(found: Estimate) -> dict[str, Any]:
    memory = found.memory
    return {
        "peak": _gib(memory.peak),
        "moment": memory.moment,
        "least_peak": _gib(found.least),
        "usable": _gib(found.usable),
        "margin": MARGIN,
        "parts": {name: _gib(size) for name, size in memory.parts.items()},
        "host": _gib(memory.host_bytes),
        "host_room": None if found.setup.ranks.host is None else _gib(found.setup.ranks.host),
        "host_per_node": {name: _gib(size) for name, size in memory.host.items()},
    }


def _step_record(case: Case, found: Estimate) -> dict[str, Any] | None:
    if found.step is None:
        return None
    rates = {"tokens_per_second_per_gpu": tokens_per_second(case, found), "of_ceiling": of_ceiling(case, found)}
    return {**asdict(found.step), **rates}


def _price_record(price: Price) -> dict[str, Any]:
    return {
        "change": price.words(),
        "verdict": price.found.verdict,
        "peak_gib": _gib(price.found.memory.peak),
        "least_peak_gib": _gib(price.found.least),
        "step_seconds": price.found.step.seconds if price.found.step else None,
    }


def show_plan(
    case: Case,
    found: Estimate,
    changes: list[Price],
    remedy: Remedy | None,
    longest: int | None,
    notes: list[str],
    console: Console,
) -> None:
    """Print it."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, text in _facts(case, found):
        facts.add_row(name, text)
    facts.add_row("verdict", _verdict(found, remedy, longest))
    console.print(facts)
    console.print()
    tables = (_memory_table(found), _host_table(found), _time_table(case, found))
    if console.width < _WIDE:
        for table in tables:
            console.print(table)
            console.print()
    else:
        both = Table.grid(padding=(0, 5))
        both.add_row(*tables)
        console.print(both)
        console.print()
    console.print(_price_table(case, found, changes, short=console.width < _WIDE))
    for note in notes:
        console.print(f"note: {note}", markup=False, style="dim")


def _facts(case: Case, found: Estimate) -> list[tuple[str, str]]:
    setup, shape, micro = found.setup, case.shape, found.micro
    trained = (
        "all trained" if not setup.rank else f"LoRA rank {setup.rank}: {_trained(case, found) / 1e6:,.1f} M trained"
    )
    kind = shape.kind if shape.kind in KNOWN else f"{shape.kind} (counted as a llama)"
    counts = {_LEVELS[level]: found.memory.levels.count(level) for level in dict.fromkeys(found.memory.levels)}
    chosen = ", ".join(f"{count} {text}" for text, count in counts.items())
    return [
        (
            "model",
            f"{kind}: {shape.parameters / 1e9:.3f} B parameters, {shape.layers} blocks; {trained}; weights "
            f"and states {_DTYPES[setup.storage]}, computed in {_DTYPES[setup.compute]}"
            + (f", fp8 {setup.fp8}" if setup.fp8 != "none" else ""),
        ),
        (
            "ranks",
            f"{case.ranks.world} = {setup.dp} data-parallel x {setup.ulysses} Ulysses on {case.ranks.nodes} "
            f"node{'s' if case.ranks.nodes > 1 else ''}; one copy of the weights on {setup.shards}",
        ),
        (
            "card",
            f"{case.card.title}: {case.card.memory:.1f} GiB for tensors, matrix products {case.card.ceiling:g} TFLOP/s",
        ),
        ("attention", setup.attention),
        ("data", case.rows.source),
        (
            "micro-batch",
            f"at most {micro.tokens:,} tokens on a rank, the longest document {micro.longest:,}"
            + (f"; gradients add up over several{_SUMS[setup.sums_shards]}" if setup.accumulates else ""),
        ),
        ("recomputed", f"of {shape.layers} blocks: {chosen}" + (" (auto)" if setup.recompute == "auto" else "")),
    ]


def _verdict(found: Estimate, remedy: Remedy | None, longest: int | None) -> Text:
    peak, usable = found.memory.peak, found.usable
    text = Text().append(found.verdict, _STYLES.get(found.verdict, "bold red"))
    text.append(f": {peak / GIB:.1f} of {usable / GIB:.1f} GiB at the peak, {found.memory.moment}")
    if found.setup.recompute == "auto" and found.least < 0.98 * peak:
        text.append(f"; {found.least / GIB:.1f} GiB with the most recomputed")
    text.append(f"\n{FITS} = {MARGIN:.0%} of the memory stays free even so; {TIGHT} = less than that does")
    text.append(f"\n{_host_text(found)}")
    if longest is not None:
        text.append(f"\na document of up to about {longest:,} tokens fits with these settings, alone in a micro-batch")
    if found.verdict != FITS:
        if remedy is None:
            text.append(
                "\nno change of settings makes it fit, nor 512 GPUs: a smaller data.max_length, or another card"
            )
        else:
            text.append("\nsmallest change that fits: ").append(remedy.words(), "bold")
            text.append(f"   ({_remedy_text(remedy)})")
    return text


def _host_text(found: Estimate) -> str:
    """What the verdict takes of a node's host memory, which the run ends by as well."""
    memory, room = found.memory, found.setup.ranks.host
    text = f"needs {memory.host_bytes / GIB:.1f} GiB of host memory on a node"
    if room is not None:
        text += f", of {room / GIB:.1f}"
    elif STATE_COPY in memory.host:
        text += (
            f"; {(memory.host_bytes - memory.host[STATE_COPY]) / GIB:.1f} without a copy of the state for checkpoints"
        )
    if found.host_least > memory.host_bytes:
        text += f"; {found.host_least / GIB:.1f} with the most recomputed"
    if found.setup.stages and STATE_COPY not in memory.host:
        text += "; checkpoints are saved without a copy of the state, for which there is no room"
    return text if room is not None else f"{text} (--host-memory makes it part of the verdict)"


def _remedy_text(remedy: Remedy) -> str:
    found = remedy.found
    parts = [f"{found.memory.peak / GIB:.1f} GiB"]
    if found.step is not None:
        parts.append(f"{found.step.seconds:.2f} s a step")
    parts.append(f"{found.memory.host_bytes / GIB:.0f} GiB of host memory on a node")
    return "; ".join([", ".join(parts), *filter(None, [remedy.note])])


def _table(title: str, *columns: str) -> Table:
    table = Table(box=None, pad_edge=False, title=title, title_justify="left", title_style="bold")
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left", no_wrap=not place)
    return table


def _memory_table(found: Estimate) -> Table:
    table = _table("a rank's GPU at the peak", "", "GiB")
    for name, size in found.memory.parts.items():
        table.add_row(name, f"{size / GIB:.2f}")
    table.add_row("all tensors", f"{found.memory.peak / GIB:.2f}", style="bold")
    if found.memory.outside:
        table.add_row("NCCL, beside them", f"{found.memory.outside / GIB:.2f}")
    return table


def _host_table(found: Estimate) -> Table:
    table = _table("host memory of a node", "", "GiB")
    for name, size in found.memory.host.items():
        table.add_row(name, f"{size / GIB:.1f}")
    table.add_row("all", f"{found.memory.host_bytes / GIB:.1f}", style="bold")
    return table


def _time_table(case: Case, found: Estimate) -> Table:
    table = _table("time of a step", "", "s", "")
    step, run = found.step, found.run
    if step is None:
        return table
    for name, seconds in step.parts.items():
        table.add_row(name, f"{seconds:.3f}", f"{seconds / step.seconds:.0%}")
    table.add_row("step", f"{step.seconds:.3f}", "", style="bold")
    table.add_row("tokens", f"{step.tokens:,.0f}", "a step")
    table.add_row("", f"{tokens_per_second(case, found):,.0f}", "tok/s per GPU")
    table.add_row("share of the ceiling", f"{of_ceiling(case, found):.2f}", "")
    if run is not None:
        table.add_row(f"run of {run.steps:,} steps", duration(run.total), "", style="bold")
        table.add_row("  validation, saves, start", duration(run.validating + run.saving + run.starting), "")
    return table


def _price_table(case: Case, found: Estimate, changes: list[Price], *, short: bool) -> Table:
    """Peaks, and the least that a run can get along with: where auto chooses, the first fills what there is."""
    columns = ("setting", *(("peak", "least") if short else ("peak GiB", "least GiB", "")), "s a step", "", "")
    table = _table(f"what a change costs, each by itself{' (peak and least in GiB)' if short else ''}", *columns)
    assert found.step is not None
    table.columns[-1].no_wrap = True
    table.add_row("as it is", *_price_cells(found, found, short=short), style="bold")
    for price in changes:
        words = " ".join(word.rpartition(".")[2] for word in price.words().split()) if short else price.words()
        table.add_row(words, *_price_cells(found, price.found, short=short))
    return table


def _price_cells(found: Estimate, other: Estimate, *, short: bool) -> list[str | Text]:
    assert found.step is not None
    assert other.step is not None
    memory, least = other.memory.peak / GIB, other.least / GIB
    cells: list[str | Text] = [f"{memory:.1f}", f"{least:.1f}"]
    same = other is found
    if not short:
        cells.append("" if same else f"{least - found.least / GIB:+.1f}")
    cells += [f"{other.step.seconds:.2f}"]
    cells.append("" if same else f"{other.step.seconds / found.step.seconds - 1:+.0%}")
    verdict = "too large" if short and other.verdict == TOO_LARGE else other.verdict
    return [*cells, Text(verdict, _STYLES.get(other.verdict, "bold red"))]


def _trained(case: Case, found: Estimate) -> int:
    layers = case.shape.layers
    return found.setup.adapter_parameters(layers) if found.setup.rank else case.shape.parameters


def _gib(size: float) -> float:
    return round(size / GIB, 3)
