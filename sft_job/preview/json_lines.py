"""Rows as JSON lines, for programs that compare or count."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from sft_job.preview.rows import Pack, PreviewRow
from sft_job.preview.text import TokenTexts


def json_lines(rows: Iterable[tuple[Pack | None, PreviewRow]], texts: TokenTexts) -> Iterator[str]:
    """One line for each row, ASCII only, so that no byte of a file's name or a text is lost on the way.

    ``labels`` are aligned with ``input_ids`` and -100 where nothing is trained; training shifts them by one.
    """
    for pack, row in rows:
        yield json.dumps(_record(pack, row, texts)) + "\n"


def _record(pack: Pack | None, row: PreviewRow, texts: TokenTexts) -> dict[str, Any]:
    ids = row.input_ids.tolist()
    return {
        "row": row.name,
        "input_ids": ids,
        "labels": row.labels.tolist(),
        "position_ids": row.position_ids.tolist(),
        "text": texts.text(ids) if ids else "",
        "reject_reason": row.reject_reason,
        "pack": None if pack is None else _place(pack, row),
    }


def _place(pack: Pack, row: PreviewRow) -> dict[str, Any]:
    slot = pack.slot
    return {
        "step": slot.step,
        "epoch": slot.epoch,
        "ranks": list(slot.ranks),
        "micro_batch": slot.micro_batch,
        "document": row.document,
        "documents": len(pack.rows),
        "start": row.start,
        "tokens": pack.tokens,
        "padding": pack.padding,
    }
