"""The preview as one page that needs nothing else: no server, no network, no other file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from sft_job import __version__
from sft_job.data.batches import IGNORED
from sft_job.preview.report import SetReport
from sft_job.preview.rows import Pack, PreviewRow, StepPlan
from sft_job.preview.terminal import FILE_COLUMNS, file_cells, pack_line, row_line, step_line
from sft_job.preview.text import TokenTexts, one_line

# Neighbours that nobody asked for are on the page with their tokens up to so many in all, then only as bars.
_MOST_NEIGHBOUR_TOKENS = 300_000
# Rows from here on take the page's whole width.
_WIDE_TOKENS = 1200
_CHART = {"width": 640, "height": 180, "left": 52, "right": 24, "bottom": 34}


def write_page(
    path: Path,
    chosen: Sequence[tuple[Pack, Sequence[PreviewRow]]],
    plan: StepPlan,
    total_steps: int,
    reports: Sequence[SetReport],
    texts: TokenTexts,
) -> None:
    """Write the page.

    Args:
        path: the file.
        chosen: packs, and the rows of them that were asked for; their neighbours are shown too.
        plan: the step that the rows belong to.
        total_steps: of the whole run.
        reports: data report of each set.
        texts: the tokenizer's decoder.

    Raises:
        OSError: it cannot be written.
    """
    environment = Environment(
        loader=PackageLoader("sft_job.preview", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    packs, data = _packs(chosen, texts)
    page = environment.get_template("page.html").render(
        title=f"step {plan.slots[0].step:,}",
        summary=step_line(plan, total_steps),
        overview=list(_overview(plan, {pack.slot: number for number, (pack, _) in enumerate(chosen)})),
        packs=packs,
        data=data,
        reports=[_report(report) for report in reports],
        file_columns=FILE_COLUMNS,
        version=__version__,
    )
    path.write_text(page, encoding="utf-8", errors="backslashreplace")


def _packs(
    chosen: Sequence[tuple[Pack, Sequence[PreviewRow]]], texts: TokenTexts
) -> tuple[list[dict[str, Any]], list[dict[str, Any] | None]]:
    """What the template shows of the packs, and the tokens of each row by its number on the page."""
    packs: list[dict[str, Any]] = []
    data: list[dict[str, Any] | None] = []
    left = _MOST_NEIGHBOUR_TOKENS
    for pack, asked in chosen:
        wanted = {row.index for row in asked}
        rows: list[dict[str, Any]] = []
        for row in pack.rows:
            left -= 0 if row.index in wanted else len(row.input_ids)
            shown = row.index in wanted or left >= 0
            rows.append(_head(pack, row, len(data), shown) | {"asked": row.index in wanted})
            data.append(_tokens(pack, row, texts) if shown else None)
        cuts = range(pack.share, pack.tokens, pack.share)
        facts = {"title": pack_line(pack), "tokens": pack.tokens, "padding": pack.padding, "cuts": list(cuts)}
        packs.append(facts | {"rows": rows, "some": len(wanted) < len(pack.rows)})
    return packs, data


def _head(pack: Pack, row: PreviewRow, number: int, shown: bool) -> dict[str, Any]:
    tokens = len(row.input_ids)
    return {
        "number": number,
        "document": row.document,
        "name": one_line(Path(row.file).name) + f":{row.number}",
        "line": row_line(pack, row),
        "start": row.start,
        "tokens": tokens,
        "trained": row.trained_tokens,
        "ranks": pack.ranks_of(row) if pack.slot.ulysses_size > 1 else (),
        "index": row.index,
        "spans": _spans(row),
        "wide": tokens > _WIDE_TOKENS,
        "shown": shown,
    }


def _spans(row: PreviewRow) -> list[tuple[int, int]]:
    """Trained stretches: first token and how many."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], row.labels != IGNORED, [False]]).astype(np.int8)))
    return [(start, end - start) for start, end in edges.reshape(-1, 2).tolist()]


def _tokens(pack: Pack, row: PreviewRow, texts: TokenTexts) -> dict[str, Any]:
    pieces = texts.pieces(row)
    sizes = [piece.end - piece.start for piece in pieces]
    return {
        "ids": row.input_ids.tolist(),
        "pieces": [piece.text for piece in pieces],
        # Only what is not the rule: pieces of several tokens, special tokens.
        "long": [[number, size] for number, size in enumerate(sizes) if size > 1],
        "special": [number for number, piece in enumerate(pieces) if piece.special],
        "spans": _spans(row),
        "position": int(row.position_ids[0]),
        "start": row.start,
        "share": pack.share,
        "rank": pack.slot.ranks[0],
    }


def _overview(plan: StepPlan, shown: Mapping[Any, int]) -> Iterator[dict[str, Any]]:
    """The step's micro-batches, rank by rank, with widths relative to the largest."""
    most = max(plan.tokens)
    group: dict[str, Any] = {}
    for slot, rows, tokens, targets in zip(plan.slots, plan.rows, plan.tokens, plan.targets, strict=True):
        if slot.micro_batch == 1:
            ranks = "-".join(str(rank) for rank in dict.fromkeys((slot.ranks[0], slot.ranks[-1])))
            group = {"ranks": ranks, "bars": [], "tokens": 0}
        group["tokens"] += tokens
        facts = {"rows": len(rows), "tokens": tokens, "targets": targets, "pack": shown.get(slot)}
        share = targets / tokens if tokens else 0
        group["bars"].append(facts | {"width": 100 * tokens / most, "share": 100 * share, "number": slot.micro_batch})
        if slot.micro_batch == slot.micro_batches:
            yield group


def _report(report: SetReport) -> dict[str, Any]:
    return {
        "name": one_line(report.name),
        "lines": report.lines(),
        "chart": _chart(report),
        "files": [(one_line(str(file["path"])), file_cells(file)) for file in report.files],
        "notes": [one_line(line) for line in report.notes],
        "warnings": [one_line(line) for line in report.warnings],
        "trained_share": 100 * report.trained_share,
    }


def _chart(report: SetReport) -> dict[str, Any]:
    """The histogram's geometry in the units of its viewBox."""
    width, height = _CHART["width"] - _CHART["left"] - _CHART["right"], _CHART["height"] - _CHART["bottom"] - 10
    bins, most = report.bins(), max(report.rows, default=0) or 1
    step = width / max(1, len(bins))
    every = -(-len(bins) // 8)
    bars = [
        {
            "x": round(_CHART["left"] + number * step + 1, 2),
            "y": round(10 + height - height * count / most, 2),
            "width": round(max(1.0, step - 2), 2),
            "height": round(height * count / most, 2),
            "text": f"{label} tokens: {count:,} rows",
        }
        for number, (label, count) in enumerate(bins)
    ]
    labels = [
        (round(_CHART["left"] + number * step, 2), f"{edge:,}")
        for number, edge in enumerate(report.edges)
        if number % every == 0
    ]
    ticks = [
        (round(10 + height - height * rows / most, 2), f"{rows:,}") for rows in dict.fromkeys((0, most // 2, most))
    ]
    return {**_CHART, "bars": bars, "labels": labels, "ticks": ticks, "base": 10 + height}
