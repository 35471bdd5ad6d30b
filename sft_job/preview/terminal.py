"""Rows and report in the terminal: coloured and underlined on a terminal, with markers in a pipe or under NO_COLOR."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sft_job.preview.report import SetReport, share
from sft_job.preview.rows import Pack, PreviewRow, StepPlan
from sft_job.preview.text import Piece, TokenTexts, one_line

# Blue and orange of the palette of Okabe and Ito, which all kinds of colour vision tell apart.
_TRAINED = "bold underline #000000 on #56b4e9"
_SPECIAL = "#000000 on #e69f00"
_TRAINED_SPECIAL = "bold underline #000000 on #f0c75e"
_BOUNDARY = "dim"
_MARKS = {"trained": ("⟦", "⟧"), "special": ("‹", "›")}
# Longer rows are cut in the middle: so many tokens are left at either end.
_ENDS = 250
_MOST_BARS = 40


@dataclass(frozen=True)
class View:
    """How rows are shown.

    Attributes:
        marks: markers instead of colours.
        boundaries: a stroke between tokens.
        full: long rows are not cut.
    """

    marks: bool
    boundaries: bool = False
    full: bool = False


def show_rows(
    console: Console, chosen: Sequence[tuple[Pack, Sequence[PreviewRow]]], texts: TokenTexts, view: View
) -> None:
    """Rows, pack by pack, each under a line that says where it is trained."""
    console.print(_legend(view))
    for pack, rows in chosen:
        console.print()
        console.print(_plain(pack_line(pack), "bold"))
        for row in rows:
            _show_row(console, pack, row, texts, view)
        left = len(pack.rows) - len(rows)
        if left:
            first = _others(pack, rows)[:3]
            names = ", ".join(f"{one_line(row.name)} ({len(row.input_ids):,} tokens)" for row in first)
            more = ", ..." if left > 3 else ""
            console.print(_plain(f"  and {left:,} more in this pack: {names}{more}", "dim"))
        if pack.padding:
            tokens = f"{pack.padding:,} {'tokens' if pack.padding > 1 else 'token'}"
            console.print(_plain(f"  padding: {tokens} at the end, a document of its own", "dim"))


def show_rejected(console: Console, row: PreviewRow) -> None:
    """A row that is not trained, and why."""
    console.print(_plain(f"{one_line(row.name)}: not trained", "bold"))
    console.print(_plain(f"  {visible_reason(row)}"))


def show_lone_row(console: Console, row: PreviewRow, texts: TokenTexts, view: View) -> None:
    """A row of validation, which is in no pack of training."""
    tokens = len(row.input_ids)
    console.print(_legend(view))
    console.print()
    line = (
        f"{one_line(row.name)}   {tokens:,} tokens, {row.trained_tokens:,} of them in the loss; validation, not trained"
    )
    console.print(_plain(line, "bold"), soft_wrap=True)
    _show_tokens(console, row, texts, view)


def visible_reason(row: PreviewRow) -> str:
    """The reason as one line."""
    return one_line(row.reject_reason or "")


def show_step(console: Console, plan: StepPlan, total_steps: int) -> None:
    """One line on a step as a whole."""
    console.print(_plain(step_line(plan, total_steps)))


def step_line(plan: StepPlan, total_steps: int) -> str:
    """A step in words: rows, tokens, how it is spread."""
    slot, tokens, targets = plan.slots[0], sum(plan.tokens), sum(plan.targets)
    groups = f"{slot.dp_size} data-parallel x {slot.ulysses_size} Ulysses"
    return (
        f"step {slot.step:,} of {total_steps:,} (epoch {slot.epoch}): {len(plan.row_ids):,} rows, {tokens:,} tokens, "
        f"{targets:,} trained ({targets / max(1, tokens):.1%}); {slot.dp_size * slot.ulysses_size} ranks = {groups}, "
        f"{slot.micro_batches} {'micro-batches' if slot.micro_batches > 1 else 'micro-batch'} each"
    )


def pack_line(pack: Pack) -> str:
    """A pack in words."""
    slot = pack.slot
    return (
        f"step {slot.step}, {_ranks(slot.ranks)}, micro-batch {slot.micro_batch} of {slot.micro_batches}: "
        f"{len(pack.rows)} {'rows' if len(pack.rows) > 1 else 'row'}, {pack.tokens:,} tokens"
        + (f", {pack.share:,} on each rank" if slot.ulysses_size > 1 else "")
    )


def row_line(pack: Pack, row: PreviewRow) -> str:
    """Where a row stands and what of it is trained."""
    tokens = len(row.input_ids)
    where = f"pack {row.start:,}-{row.start + tokens - 1:,}"
    on = f" ({_ranks(pack.ranks_of(row))})" if pack.slot.ulysses_size > 1 else ""
    return (
        f"{one_line(row.name)}   {tokens:,} tokens, {row.trained_tokens:,} trained, positions 0-{tokens - 1:,}, "
        f"{where}{on}"
    )


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]}-{ranks[-1]}"


def _others(pack: Pack, rows: Sequence[PreviewRow]) -> list[PreviewRow]:
    return [row for row in pack.rows if row not in rows]


def _show_row(console: Console, pack: Pack, row: PreviewRow, texts: TokenTexts, view: View) -> None:
    head = Text.assemble((f"[{row.document}] ", "bold"), row_line(pack, row))
    console.print(head, soft_wrap=True)
    _show_tokens(console, row, texts, view)


def _show_tokens(console: Console, row: PreviewRow, texts: TokenTexts, view: View) -> None:
    pieces = texts.pieces(row)
    cut = not view.full and len(pieces) > 2 * _ENDS
    parts = [pieces[:_ENDS], pieces[-_ENDS:]] if cut else [pieces]
    body = Text("    ")
    for number, part in enumerate(parts):
        if number:
            middle = pieces[_ENDS:-_ENDS]
            tokens = middle[-1].end - middle[0].start
            trained = sum(piece.end - piece.start for piece in middle if piece.trained)
            gap = f"\n... {tokens:,} tokens left out, {trained:,} of them trained (--full shows them) ...\n"
            body.append(gap, "italic dim")
        body.append_text(_marked(part, view.boundaries) if view.marks else _coloured(part, view.boundaries))
    # Line breaks of the text keep the row's indentation.
    lines = body.split("\n")
    console.print(Text("\n    ").join(lines), soft_wrap=view.marks)


def _coloured(pieces: Sequence[Piece], boundaries: bool) -> Text:
    text = Text()
    for piece in pieces:
        style = (_TRAINED_SPECIAL if piece.trained else _SPECIAL) if piece.special else _TRAINED * piece.trained
        if boundaries and text:
            text.append("│", _BOUNDARY)
        text.append(piece.text, style)
    return text


def _marked(pieces: Sequence[Piece], boundaries: bool) -> Text:
    text, inside = Text(), False
    for number, piece in enumerate(pieces):
        if piece.trained != inside:
            text.append(_MARKS["trained"][0 if piece.trained else 1])
        elif boundaries and number:
            text.append("│")
        inside = piece.trained
        before, behind = _MARKS["special"] if piece.special else ("", "")
        text.append(f"{before}{piece.text}{behind}")
    return text.append(_MARKS["trained"][1]) if inside else text


def _legend(view: View) -> Text:
    if view.marks:
        shown = Text("⟦trained⟧  not trained  ‹special token›")
    else:
        shown = Text.assemble(("trained", _TRAINED), "  not trained  ", ("special token", _SPECIAL), "  ")
        shown.append("trained special token", _TRAINED_SPECIAL)
    shown.append("  ⏎ line break  · space  ⇥ tab")
    shown.append("  │ token boundary" if view.boundaries else "")
    return shown


def _plain(text: str, style: str = "") -> Text:
    return Text(text, style)


def show_report(console: Console, report: SetReport) -> None:
    """Counts, the lengths as bars, and the files of one set of rows."""
    console.print()
    console.print(_plain(f"{one_line(report.name)}: data report", "bold"))
    counts = Table(box=None, show_header=False, pad_edge=False)
    counts.add_column()
    counts.add_column(justify="right")
    for name, count in report.lines():
        counts.add_row(name, count)
    console.print(counts)
    console.print()
    console.print(_bars(report))
    console.print()
    console.print(_files(report.files))
    for kind, lines in (("note", report.notes), ("warning", report.warnings)):
        for line in lines:
            console.print(_plain(f"{kind}: {one_line(line)}"), soft_wrap=True)


def _bars(report: SetReport) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("tokens", justify="right")
    table.add_column("rows", justify="right")
    table.add_column("")
    most = max(report.rows, default=0)
    for label, count in report.bins():
        eighths = round(8 * _MOST_BARS * count / max(1, most)) or (1 if count else 0)
        bar = "█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8]
        table.add_row(label, f"{count:,}", Text(bar, "#0072b2"))
    return table


def _files(files: Sequence[Mapping[str, object]]) -> Table:
    """Without the columns in which every file has 0; the path comes last, where it has room to be long."""
    lines = [file_cells(file) for file in files]
    wanted = [place for place in range(len(FILE_COLUMNS)) if any(cells[place] != "0" for cells in lines)]
    table = Table(box=None, pad_edge=False)
    for place in wanted:
        table.add_column(FILE_COLUMNS[place], justify="right", no_wrap=True)
    table.add_column("file", overflow="fold")
    for file, cells in zip(files, lines, strict=True):
        table.add_row(*(cells[place] for place in wanted), Text(one_line(str(file["path"]))))
    return table


FILE_COLUMNS = ("rows", "trained on", "rejected", "no target", "dropped", "truncated", "tokens", "trained", "longest")


def file_cells(file: Mapping[str, object]) -> list[str]:
    """The cells of a file's line, in the order of ``FILE_COLUMNS``."""
    names = ("rows_read", "rows_usable", "rows_rejected", "rows_without_target", "rows_dropped", "rows_truncated")
    cells = [f"{file.get(name, 0):,}" for name in (*names, "tokens")]
    return [*cells, f"{share(file):.1%}", f"{file.get('longest_row', 0):,}"]
